//! The contract between the solver and what it solves.

use kiln_oci::Digest;

use crate::{CacheKey, Stream};

/// What a vertex does. The solver asks in this order, and only as far as it must:
///
/// ```text
/// identity ─▶ (lookup) ─▶ content of inputs that are read ─▶ (lookup) ─▶ run
/// ```
///
/// `content` and `run` are blocking code on threads of their own.
pub trait Op: Send + Sync + 'static {
    /// A result: small, cloned freely; a handle on the real thing.
    type Output: Clone + Send + Sync + 'static;
    /// Why it did not work.
    type Error: std::error::Error + Send + Sync + 'static;

    /// What this op is, inputs apart.
    fn identity(&self) -> Identity;

    /// Digest of the part of input number `input` that this op reads. Asked only for inputs of
    /// [`InputUse::Content`].
    fn content(&self, input: usize, output: &Self::Output, scope: &Scope<'_>) -> Result<Digest, Self::Error>;

    /// Does the work. Checks [`Scope::is_cancelled`] at least once per file or process event.
    fn run(&self, inputs: &[Self::Output], scope: &Scope<'_>) -> Result<Self::Output, Self::Error>;
}

/// What an op is, inputs apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// Same digest and same inputs: same result. Looked up and saved.
    Cached(Digest),
    /// Names its result by itself and is cheap to run: never looked up, never saved.
    Source(Digest),
    /// Says nothing beforehand (a directory that may change at any time): whoever reads from it
    /// is keyed by the content read.
    Unknown,
}

/// One input of a vertex.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VertexInput {
    /// Position of the vertex it comes from; smaller than the user's own.
    pub vertex: usize,
    /// How it enters the key.
    pub usage: InputUse,
}

/// How an input enters its user's cache key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputUse {
    /// By its own key: everything in it may matter.
    Definition,
    /// By the digest of what is read from it.
    Content,
}

/// What a running op may use of the solve around it.
pub struct Scope<'a> {
    pub(crate) cancel: &'a dyn Cancellation,
    pub(crate) log: &'a (dyn Fn(Stream, &[u8]) + Sync),
}

impl Scope<'_> {
    /// The solve was given up; stop soon.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// Passes on what the op prints.
    pub fn log(&self, stream: Stream, bytes: &[u8]) {
        (self.log)(stream, bytes);
    }
}

/// Gives up a solve: by the user, or by the solver after the first failure.
pub trait Cancellation: Send + Sync {
    /// Stops what runs; may be called more than once.
    fn cancel(&self);
    /// Whether somebody called `cancel`.
    fn is_cancelled(&self) -> bool;
}

/// A result found in the cache.
#[derive(Debug, Clone)]
pub struct Cached<O> {
    /// The key that users of this result build theirs from; the same on a hit by any key.
    pub canonical: CacheKey,
    /// The result.
    pub output: O,
}

/// Results of earlier builds.
pub trait CacheStore<O>: Send + Sync {
    /// Why the store did not answer.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The result saved under `key`, only if it is still usable. Costs one index read.
    fn lookup(&self, key: &CacheKey) -> Result<Option<Cached<O>>, Self::Error>;

    /// Saves a result under all `keys` at once.
    fn save(&self, keys: &[CacheKey], result: &Cached<O>, title: &str) -> Result<(), Self::Error>;
}
