//! The contract between the solver and what it solves.

use std::sync::Arc;
use std::time::Duration;

use kiln_oci::Digest;

use crate::{CacheKey, Stream};

/// What a vertex does. The solver asks in this order, and only as far as it must:
///
/// ```text
/// identity ─▶ (lookup) ─▶ content of inputs that are read ─▶ (lookup) ─▶ run ─▶ is_same
/// ```
///
/// `content`, `run` and `is_same` are blocking code on threads of their own.
pub trait Op: Send + Sync + 'static {
    /// A result: small, cloned freely; a handle on the real thing.
    type Output: Clone + Send + Sync + 'static;
    /// Why it did not work.
    type Error: std::error::Error + Send + Sync + 'static;

    /// What this op is, inputs apart.
    fn identity(&self) -> Identity;

    /// The digest of what this op is when inputs that are read count by their content: it may leave out where
    /// in them that stands. `None`: it is the same one. Asked only of [`Identity::Cached`].
    fn identity_by_content(&self) -> Option<Digest> {
        None
    }

    /// Whether a result that was found under `key` does not count any more: it is made again then, as with
    /// [`Vertex::refresh`]. Asked for each hit, by the task that owns the solve: may cost an index read.
    fn is_too_old(&self, key: &CacheKey, found: &Self::Output) -> bool {
        let _ = (key, found);
        false
    }

    /// Digest of the part of input number `input` that this op reads. Asked only for inputs of
    /// [`InputUse::Content`].
    fn content(&self, input: usize, output: &Self::Output, scope: &Scope<'_>) -> Result<Digest, Self::Error>;

    /// Does the work. Checks [`Scope::is_cancelled`] at least once per file or process event.
    fn run(&self, inputs: &[Self::Output], scope: &Scope<'_>) -> Result<Self::Output, Self::Error>;

    /// Whether what it made now may be replaced by `earlier`, the last result of the same
    /// [`Vertex::lineage`] on the same inputs: nobody who reads either could tell them apart. Then all
    /// that stands on the earlier one stays cached. Should tell what differs before it reads content.
    fn is_same(
        &self,
        earlier: &Self::Output,
        now: &Self::Output,
        scope: &Scope<'_>,
    ) -> Result<bool, Self::Error>;

    /// A name that no other result has.
    fn name(&self, output: &Self::Output) -> Digest;
}

/// A step of a job.
pub struct Vertex<O> {
    /// What it does.
    pub op: Arc<O>,
    /// What it does it with.
    pub inputs: Vec<VertexInput>,
    /// What its results are remembered as.
    pub title: String,
    /// Run it although there may be a result, which the new one replaces. What stands on it is looked up
    /// by what comes out.
    pub refresh: bool,
    /// Names the step whatever it says today, for [`Op::is_same`]; `None`: its results are not compared,
    /// because its key says all of what comes out.
    pub lineage: Option<Digest>,
    /// What it needed last time.
    pub cost: Cost,
}

/// What it takes to run a vertex, as far as it is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// How long; `None`: never measured.
    pub took: Option<Duration>,
    /// The most memory at a time; 0: not known.
    pub peak_memory_bytes: u64,
}

/// What an op is, inputs apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// Same digest and same inputs: same result. Looked up and saved. Ops with the same digest use
    /// their inputs alike.
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
    /// Nobody waits for it any more; stop soon.
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
    /// Somebody said so, of this result or of one that it was made from, whom this job believes and others may
    /// not. Its keys may lie: who saves it, or what was made with it, keeps it from jobs that did not ask the same
    /// others.
    pub is_borrowed: bool,
}

/// Where a result is saved.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    /// Keys that it is looked up by. What is there stays, so that two solves at once agree, unless
    /// `replace` is set.
    pub keys: &'a [CacheKey],
    /// See above.
    pub replace: bool,
    /// Marks: keys that some result of the op is found by, whichever.
    pub marks: &'a [CacheKey],
    /// The key that always has the newest result of the step; `None`: it is not compared with later ones.
    pub slot: Option<CacheKey>,
}

/// Results of earlier builds.
///
/// Those that are *near* are in the index; others may be *far*, on another machine: they are asked for on
/// threads of their own, several at a time, and are fetched only when somebody needs one.
///
/// What is [borrowed](Cached::is_borrowed) is saved and linked as such, and found by jobs that believe the same
/// others only. It never takes the place of what is not, nor the other way round; of both, a lookup finds what is
/// not.
pub trait CacheStore<O>: Send + Sync {
    /// Why the store did not answer.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The result saved under `key`; it may be gone. Costs one index read.
    fn lookup(&self, key: &CacheKey) -> Result<Option<Cached<O>>, Self::Error>;

    /// Whether something far may know `key`, which [`CacheStore::lookup`] did not find. Costs nothing.
    fn may_be_far(&self, _key: &CacheKey) -> bool {
        false
    }

    /// Asks what is far for `keys`; the answers stand in their order. `soon` are keys that are likely to be
    /// looked up next, if these are found: they may be asked for in the same breath. Blocks; what cannot be
    /// reached knows nothing.
    fn ask_far(&self, keys: &[CacheKey], _soon: &[CacheKey]) -> Vec<Option<Cached<O>>> {
        keys.iter().map(|_| None).collect()
    }

    /// Whether a result that was found has to be fetched by [`CacheStore::fetch`], and not loaded.
    fn is_far(&self, _found: &Cached<O>) -> bool {
        false
    }

    /// Makes a result near, and looks after it until the solve ends; `None`: it cannot be had, or is not
    /// what it should be. Blocks; ends soon when [`Scope::is_cancelled`].
    fn fetch(&self, _found: &Cached<O>, _scope: &Scope<'_>) -> Result<Option<O>, Self::Error> {
        Ok(None)
    }

    /// Where a result that was found comes from; `None`: it is near.
    fn origin(&self, _found: &Cached<O>) -> Option<Arc<str>> {
        None
    }

    /// Whether a result that was found is there; if it is, it stays until the solve ends. If it is gone,
    /// later lookups should not find it.
    fn load(&self, found: &Cached<O>) -> Result<bool, Self::Error>;

    /// Saves a result that was made just now, all places at once.
    fn save(&self, places: &Places<'_>, result: &Cached<O>, title: &str) -> Result<(), Self::Error>;

    /// Saves a result that was found under more keys.
    fn link(&self, places: &Places<'_>, result: &Cached<O>, title: &str) -> Result<(), Self::Error>;

    /// Waits until nobody else, of this process or another, makes what `key` names; whoever holds the
    /// claim makes it, and saves it before the claim is dropped. `None`: given up, because
    /// [`Scope::is_cancelled`]. Tells `scope` whom it waits for.
    fn claim(&self, key: &CacheKey, scope: &Scope<'_>) -> Result<Option<Claim>, Self::Error>;
}

/// The right to make a result; dropped when it is saved, or cannot be made.
pub struct Claim {
    _guard: Box<dyn Send>,
}

impl Claim {
    /// A claim that holds as long as `guard` is not dropped.
    pub fn new(guard: impl Send + 'static) -> Self {
        Self { _guard: Box::new(guard) }
    }
}
