//! What a vertex can be.

use std::sync::Arc;

use kiln_oci::Digest;

use crate::key::KeyKind;
use crate::{CacheKey, Cached, Cost, Identity, InputUse, VertexInput};

use super::JobId;

/// A vertex as a job brings it.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) identity: Identity,
    /// See [`crate::Op::identity_by_content`].
    pub(crate) by_content: Option<Digest>,
    pub(crate) inputs: Vec<VertexInput>,
    /// Run it although there may be a result.
    pub(crate) refresh: bool,
    /// See [`crate::Vertex::lineage`].
    pub(crate) lineage: Option<Digest>,
    pub(crate) cost: Cost,
}

/// How to remember what a run makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Save {
    /// What users derive their keys from.
    pub(crate) canonical: CacheKey,
    /// Where it is looked up; the first is the one that identical work shares.
    pub(crate) keys: Vec<CacheKey>,
    /// See [`crate::key::KeyKind::Mark`].
    pub(crate) marks: Vec<CacheKey>,
    /// Where the last result of the step is; `None`: it is not compared with that.
    pub(crate) slot: Option<CacheKey>,
    /// It was made although there may be a result: it replaces that.
    pub(crate) refresh: bool,
    /// See [`Cached::is_borrowed`].
    pub(crate) is_borrowed: bool,
}

impl Save {
    /// What users derive their keys from, when `name` is the result's own. One that was made in spite of
    /// an earlier one is not taken for that, unless its key says all of it.
    pub(crate) fn canonical(&self, name: &Digest) -> CacheKey {
        if self.refresh && self.slot.is_some() {
            CacheKey::derive(KeyKind::Fresh, &self.canonical.0, &[*name])
        } else {
            self.canonical
        }
    }
}

/// The keys of a vertex.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Keys {
    /// By definition; `None` where an input has no key.
    pub(super) fast: Option<CacheKey>,
    /// By content; `None` where nothing is read, or where it is not known yet.
    pub(super) slow: Option<CacheKey>,
}

impl Keys {
    /// The key that says most of what the result is.
    pub(super) fn main(&self) -> Option<CacheKey> {
        self.slow.or(self.fast)
    }
}

/// The key that users see before there is an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Provisional {
    /// Not known yet.
    Open,
    /// There will be none: whoever reads from it is keyed by what is read.
    Never,
    Key(CacheKey),
}

impl Provisional {
    pub(super) fn key(self) -> Option<CacheKey> {
        match self {
            Self::Key(key) => Some(key),
            Self::Open | Self::Never => None,
        }
    }
}

/// What vertices have in common that are run once: the key, whether in spite of the cache, and whether what they
/// are made from is borrowed. The last because keys of that may lie.
pub(super) type RunsAs = (CacheKey, bool, bool);

/// Which of its inputs' keys a vertex is looked up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Round {
    /// The provisional ones.
    First,
    /// The final ones: all inputs have outputs.
    Last,
}

/// One question, one field: how far a vertex is.
#[derive(Debug)]
pub(super) enum State<O> {
    /// Nobody asked yet, or inputs have no key yet.
    Idle,
    /// The lookup by definition is under way.
    Fast { key: CacheKey },
    /// Digests of what is read are being gathered.
    Content { fast: Option<CacheKey> },
    /// The lookup by content is under way.
    Slow { keys: Keys },
    /// There is a record; nobody needs the result so far.
    Hit { cached: Cached<O>, keys: Keys },
    /// The result is being fetched.
    Loading { cached: Cached<O>, keys: Keys },
    /// There is no result. Without `keys` none is looked up or saved, or its keys are not known yet.
    Missed { keys: Option<Keys> },
    /// Waits for its turn to run.
    Ready { save: Option<Arc<Save>>, keys: Option<Keys>, inputs: Vec<O> },
    /// Being run.
    Running { keys: Option<Keys> },
    /// Gets the result of another vertex with the same key.
    Follows { runner: usize, keys: Option<Keys> },
    /// There is a result.
    Done { canonical: Option<CacheKey>, output: O, is_borrowed: bool },
    /// It, or something it needs, did not work.
    Failed,
}

/// A vertex.
#[derive(Debug)]
pub(super) struct Node<O> {
    pub(super) job: JobId,
    pub(super) identity: Identity,
    pub(super) by_content: Option<Digest>,
    /// The graph's edges have no order; these are in the op's.
    pub(super) inputs: Arc<[(usize, InputUse)]>,
    pub(super) refresh: bool,
    pub(super) lineage: Option<Digest>,
    pub(super) cost: Cost,
    /// How long the way from here to the target takes; nanoseconds.
    pub(super) priority: u64,

    pub(super) state: State<O>,
    pub(super) round: Round,
    pub(super) asked: bool,
    pub(super) wanted: bool,
    pub(super) provisional: Provisional,
    /// By input; of what is read.
    pub(super) digests: Vec<Option<Digest>>,
    pub(super) digest_asked: Vec<bool>,
    /// Inputs whose marks were asked.
    pub(super) mark_asked: Vec<bool>,
    /// Inputs that are read and have no digest.
    pub(super) undigested: usize,
    /// Inputs that are not identified.
    pub(super) missing_keys: usize,
    /// Inputs without output.
    pub(super) missing_outputs: usize,
    /// The first lookup by definition will fail.
    pub(super) fast_lost: bool,
    /// No first lookup will find anything: the key will be a new one.
    pub(super) lost: bool,
    /// All inputs were wanted, or those that are read.
    pub(super) inputs_wanted: bool,
    pub(super) reads_wanted: bool,
    /// Where it stands among [`super::Core::runners`].
    pub(super) runs_as: Option<RunsAs>,
    /// Vertices that get its result.
    pub(super) followers: Vec<usize>,
    /// Commands without answer.
    pub(super) pending: usize,
    /// No job knows it; it is dropped with the last answer.
    pub(super) is_orphan: bool,
}

impl<O> Node<O> {
    /// A vertex that nobody asked for; `inputs` by number.
    pub(super) fn new(plan: &Plan, job: JobId, inputs: Arc<[(usize, InputUse)]>, priority: u64) -> Self {
        let count = inputs.len();
        Self {
            job,
            identity: plan.identity.clone(),
            by_content: plan.by_content,
            undigested: inputs.iter().filter(|(_, usage)| *usage == InputUse::Content).count(),
            missing_keys: count,
            missing_outputs: count,
            inputs,
            refresh: plan.refresh,
            lineage: plan.lineage,
            cost: plan.cost,
            priority,
            state: State::Idle,
            round: Round::First,
            asked: false,
            wanted: false,
            provisional: Provisional::Open,
            digests: vec![None; count],
            digest_asked: vec![false; count],
            mark_asked: vec![false; count],
            fast_lost: false,
            lost: false,
            inputs_wanted: false,
            reads_wanted: false,
            runs_as: None,
            followers: Vec::new(),
            pending: 0,
            is_orphan: false,
        }
    }

    /// It is looked up before it is run, and its first key is not known.
    pub(super) fn is_open(&self) -> bool {
        self.provisional == Provisional::Open && !self.refresh && matches!(self.identity, Identity::Cached(_))
    }

    /// What users derive their keys from once there is an output.
    pub(super) fn canonical(&self) -> Option<CacheKey> {
        match &self.state {
            State::Done { canonical, .. } => *canonical,
            _ => None,
        }
    }

    /// Whether its result is; see [`Cached::is_borrowed`].
    pub(super) fn is_borrowed(&self) -> bool {
        matches!(self.state, State::Done { is_borrowed: true, .. })
    }

    pub(super) fn output(&self) -> Option<&O> {
        match &self.state {
            State::Done { output, .. } => Some(output),
            _ => None,
        }
    }
}
