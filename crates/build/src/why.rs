//! Why a step ran: what its key is made of is compared with what it was made of before.
//! The decisions are in `docs/adr/0018-why.md`.
//!
//! Read `pre_image.rs` first, then `explain.rs`, `reason.rs`, and `lineage.rs` for what is kept where.
//!
//! # Invariants
//! - A step that hits costs nothing here: nothing is read before the first step runs, and nothing but the
//!   build's own record is written when none did.
//! - All of it is advice. A build with a full disk, or without its history, is the same build.

mod explain;
mod lineage;
mod listing;
mod pre_image;
mod reason;

pub(crate) use lineage::forget_oldest;
pub use listing::{Difference, FileChange, FileChanges};
pub use reason::{Reason, VariableKind, in_words};

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kiln_frontend::Lowered;
use kiln_llb::{Op, VertexId};
use kiln_oci::Digest;
use kiln_solver::{Event, InputUse};

use self::explain::{Around, differences};
pub(crate) use self::listing::Listing;
use self::pre_image::{InputImage, PreImage};
use crate::build::{Built, Progress};
use crate::builds::logs::StepLogs;
use crate::builds::{self, BuildRecord, Outcome, StepRecord, StepState, taken};
use crate::dockerfile::Dockerfile;
use crate::engine::now_unix;
use crate::input::DockerfileSource;
use crate::no_cache::MadeAgain;
use crate::remote_context::ContextSource;
use crate::tree::Tree;
use crate::{BuildError, BuildRequest};

/// One build: what becomes of its steps, and why.
pub(crate) struct Why {
    root: PathBuf,
    lineage: String,
    id: String,
    record: BuildRecord,
    began: Instant,
    again: Arc<MadeAgain>,
    /// Names of `ARG`s that no `ENV` has.
    args: BTreeSet<String>,
    /// By vertex.
    steps: Vec<Step>,
    progress: Arc<dyn Progress>,
    logs: StepLogs,
    earlier: OnceLock<Earlier>,
    state: Mutex<State>,
}

struct Step {
    title: String,
    op: Op,
    inputs: Vec<usize>,
    /// First bytes of the digests of what was read.
    content: AtomicU64,
    peak_memory_bytes: AtomicU64,
    /// Its result was older than this, and from then; seconds since 1970.
    outdated: OnceLock<(Duration, i64)>,
}

/// What earlier builds of the lineage left.
struct Earlier {
    /// Oldest first.
    images: Vec<PreImage>,
    last: Option<BuildRecord>,
}

#[derive(Default)]
struct State {
    /// Titles of the steps that ran.
    ran: BTreeSet<String>,
    steps: BTreeMap<usize, (StepState, Duration)>,
    why: BTreeMap<usize, Vec<Reason>>,
    /// Which cache steps came from that others filled.
    from: BTreeMap<usize, Arc<str>>,
    new: Vec<PreImage>,
}

/// A step that is about to run.
pub(crate) struct Begun {
    image: PreImage,
    lists: Vec<(String, Listing)>,
}

/// The first digits of a digest: enough to tell two of one lineage apart.
fn digits(digest: &Digest) -> String {
    digest.hex()[..16].to_owned()
}

impl Why {
    /// For a build that somebody may ask about; `None`: nobody will. Reads and writes nothing.
    pub(crate) fn new(
        root: &Path,
        request: &BuildRequest,
        lowered: &Lowered,
        dockerfile: &Dockerfile,
        again: &Arc<MadeAgain>,
        progress: Arc<dyn Progress>,
    ) -> Option<Arc<Self>> {
        let origin = request.origin.as_ref()?;
        let vertices = lowered.definition.vertices().iter().enumerate();
        let steps = vertices.map(|(nth, vertex)| Step {
            title: lowered.source_map.title(VertexId(nth)).to_owned(),
            op: vertex.op.clone(),
            inputs: vertex.inputs.iter().map(|input| input.0).collect(),
            content: AtomicU64::new(0),
            peak_memory_bytes: AtomicU64::new(0),
            outdated: OnceLock::new(),
        });
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let id = format!("{:016x}-{}", since.as_nanos(), std::process::id());
        let (context, lineage) = lineage_of(request, &origin.dir);
        let mut record = BuildRecord::new(id.clone(), lineage.clone(), Outcome::Done);
        record.at_unix = now_unix();
        record.context = context;
        record.dockerfile.clone_from(&dockerfile.name);
        record.target.clone_from(&request.target);
        Some(Arc::new(Self {
            root: root.to_owned(),
            lineage,
            record,
            began: Instant::now(),
            again: again.clone(),
            args: lowered.args.clone(),
            steps: steps.collect(),
            progress,
            logs: StepLogs::new(root, &id),
            id,
            earlier: OnceLock::new(),
            state: Mutex::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain data: a panic elsewhere leaves nothing half-done in it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the build.
    pub(crate) fn event(&self, event: &Event) {
        let no_time = Duration::ZERO;
        let (vertex, state) = match event {
            Event::Log { vertex, bytes, .. } => return self.logs.write(*vertex, bytes),
            Event::Cached { vertex, from } => {
                if let Some(from) = from {
                    self.lock().from.insert(*vertex, from.clone());
                }
                (*vertex, (StepState::Cached, no_time))
            }
            Event::Completed { vertex, took } => (*vertex, (StepState::Ran, *took)),
            Event::Failed { vertex, .. } => (*vertex, (StepState::Failed, no_time)),
            Event::Cancelled { vertex } => (*vertex, (StepState::Cancelled, no_time)),
            _ => return,
        };
        self.lock().steps.insert(vertex, state);
    }

    /// The content that `vertex` reads of its input has this digest.
    pub(crate) fn note_content(&self, vertex: usize, input: usize, digest: &Digest) {
        let first = digest.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let turn = u32::try_from(input % 64).unwrap_or(0);
        self.steps[vertex].content.fetch_xor(first.rotate_left(turn), Ordering::Relaxed);
    }

    /// The result of `vertex` does not count: it is from `at_unix`, and was good for `ttl`.
    pub(crate) fn note_outdated(&self, vertex: usize, ttl: Duration, at_unix: i64) {
        // The first one that was found.
        let _ = self.steps[vertex].outdated.set((ttl, at_unix));
    }

    /// `vertex` made nothing: its layer was there.
    pub(crate) fn note_kept(&self, vertex: usize) {
        self.lock().why.entry(vertex).or_default().push(Reason::LayerKept);
    }

    /// The processes of `vertex` had so much memory.
    pub(crate) fn note_memory(&self, vertex: usize, peak_bytes: u64) {
        self.steps[vertex].peak_memory_bytes.store(peak_bytes, Ordering::Relaxed);
    }

    /// Which of the variables of a step's environment are `ARG`s.
    fn args_of(&self, op: &Op) -> Vec<String> {
        let Op::Exec(exec) = op else { return Vec::new() };
        let names = exec.env.iter().map(|(name, _)| name).filter(|name| self.args.contains(*name));
        names.cloned().collect()
    }

    fn content(&self, vertex: usize) -> String {
        match self.steps[vertex].content.load(Ordering::Relaxed) {
            0 => String::new(),
            first => format!("{first:016x}"),
        }
    }

    /// `vertex` is about to run on these trees: finds out why, and tells. `listing` lists what it reads of
    /// an input.
    pub(crate) fn begin(
        &self,
        vertex: usize,
        trees: &[Tree],
        usage: &dyn Fn(usize) -> InputUse,
        listing: &dyn Fn(usize) -> Option<Listing>,
    ) -> Option<Begun> {
        let step = &self.steps[vertex];
        if matches!(step.op, Op::Source(_)) {
            // They answer themselves whether there is something to do.
            return None;
        }
        let mut lists = Vec::new();
        let inputs = step.inputs.iter().zip(trees).enumerate().map(|(nth, (from, tree))| {
            let from = &self.steps[*from];
            if usage(nth) == InputUse::Content {
                let list = listing(nth).map(|listing| {
                    let name = Listing::name_of(listing.bytes());
                    lists.push((name.clone(), listing));
                    name
                });
                return InputImage::Files { title: from.title.clone(), list };
            }
            InputImage::whole(&from.op, &from.title, tree.snapshot().map(ToString::to_string))
        });
        let inputs = inputs.collect();
        let image = PreImage {
            title: step.title.clone(),
            op: digits(&step.op.digest()),
            content: self.content(vertex),
            parts: pre_image::parts(&step.op),
            args: self.args_of(&step.op),
            inputs,
            build: self.id.clone(),
            at_unix: now_unix(),
            result: None,
        };
        let reasons = self.explain(vertex, &image, &lists);
        self.progress.why(vertex, &reasons);
        self.lock().why.insert(vertex, reasons);
        Some(Begun { image, lists })
    }

    /// The step is over; `result` is what it made, or that it failed.
    pub(crate) fn end(&self, begun: Begun, result: Option<&Tree>) {
        let Begun { mut image, lists } = begun;
        for (name, list) in lists.iter().filter(|_| builds::has_room(&self.root)) {
            lineage::add_list(&self.root, name, list);
        }
        // A tree without files has no snapshot, and was made nevertheless.
        let made = |tree: &Tree| tree.snapshot().map_or("none".to_owned(), ToString::to_string);
        image.result = result.map(made);
        let mut state = self.lock();
        state.ran.insert(image.title.clone());
        state.new.push(image);
    }

    fn explain(&self, vertex: usize, now: &PreImage, lists: &[(String, Listing)]) -> Vec<Reason> {
        if self.again.is_all() {
            return vec![Reason::NoCache];
        }
        if let Some(option) = self.again.reason(vertex) {
            return vec![Reason::Asked { option: option.to_owned() }];
        }
        if let Some((ttl, at_unix)) = self.steps[vertex].outdated.get() {
            return vec![Reason::Expired { ttl_seconds: ttl.as_secs(), at_unix: *at_unix }];
        }
        let earlier = self.earlier.get_or_init(|| Earlier {
            images: lineage::read(&self.root, &self.lineage),
            last: builds::last_of(&self.root, &self.lineage),
        });
        if earlier.images.is_empty() {
            return vec![Reason::NeverBuilt];
        }
        let alike = self.alike(now, &earlier.images);
        if let Some(same) = alike.iter().rev().find(|image| image.is_same(now)) {
            return vec![self.absence(same)];
        }
        let in_last = |image: &&&PreImage| {
            let steps = earlier.last.iter().flat_map(|last| &last.steps);
            let mut steps = steps.filter(|step| step.op == image.op && step.content == image.content);
            steps.any(|step| pre_image::text_of(&step.title) == image.text())
        };
        let Some(before) = alike.iter().rev().find(in_last).or(alike.last()) else {
            return vec![Reason::NewStep];
        };
        let read = |name: &str| {
            let here = lists.iter().find(|(known, _)| known == name).map(|(_, list)| list.clone());
            here.or_else(|| lineage::read_list(&self.root, name))
        };
        let ran = self.lock().ran.clone();
        let reasons = differences(now, before, &Around { ran: &ran, list: &read });
        // Results below it went, too, and were made anew.
        let only_below = reasons.iter().all(|reason| matches!(reason, Reason::Parent { .. }));
        match self.absence(before) {
            evicted @ Reason::Evicted { .. } if only_below => vec![evicted],
            absent if reasons.is_empty() => vec![absent],
            _ => reasons,
        }
    }

    /// Why the result of a step that is as before is not there.
    fn absence(&self, before: &PreImage) -> Reason {
        match &before.result {
            None => Reason::FailedBefore,
            Some(result) => match taken::find(&self.root, result) {
                Some((by, at_unix)) => Reason::Evicted { by, at_unix },
                None => Reason::NoResult,
            },
        }
    }

    /// What may be the same step in earlier builds, oldest first: what reads the same, in the same place
    /// if there are several; else what stood in its place and stands nowhere else now.
    fn alike<'a>(&self, now: &PreImage, images: &'a [PreImage]) -> Vec<&'a PreImage> {
        let (stage, number) = now.place();
        let of_kind = || images.iter().filter(|image| image.kind() == now.kind());
        let reads_same: Vec<&PreImage> = of_kind().filter(|image| image.text() == now.text()).collect();
        let in_stage: Vec<&PreImage> =
            reads_same.iter().copied().filter(|image| image.place().0 == stage).collect();
        let in_place: Vec<&PreImage> =
            in_stage.iter().copied().filter(|image| image.place().1 == number).collect();
        for found in [in_place, in_stage, reads_same] {
            if !found.is_empty() {
                return found;
            }
        }
        let is_here = |image: &PreImage| {
            self.steps.iter().any(|step| {
                let place = crate::shell::stage_of(&step.title).unwrap_or_default();
                place.0 == stage && pre_image::text_of(&step.title) == image.text()
            })
        };
        of_kind().filter(|image| image.place() == (stage, number) && number > 0 && !is_here(image)).collect()
    }

    /// The build is over: writes it down.
    pub(crate) fn finish(&self, built: Result<&Built, &BuildError>) {
        let logs = self.logs.finish();
        let mut state = self.lock();
        let new = std::mem::take(&mut state.new);
        if !new.is_empty() && builds::has_room(&self.root) {
            lineage::add(&self.root, &self.lineage, new);
        }
        let mut record = self.record.clone();
        record.took_ms = millis(self.began.elapsed());
        match built {
            Ok(built) => {
                record.image = built.id.map(|id| id.to_string());
                record.names = built.names.iter().map(kiln_oci::Reference::familiar).collect();
            }
            Err(BuildError::Cancelled) => record.outcome = Outcome::Cancelled,
            Err(_) => record.outcome = Outcome::Failed,
        }
        let steps = state.steps.iter().filter(|(vertex, _)| {
            let Step { title, op, .. } = &self.steps[**vertex];
            !matches!(op, Op::Source(_)) && crate::shell::stage_of(title).is_some()
        });
        let step = |(vertex, (state_of, took)): (&usize, &(StepState, Duration))| StepRecord {
            title: self.steps[*vertex].title.clone(),
            state: *state_of,
            took_ms: millis(*took),
            peak_memory_bytes: self.steps[*vertex].peak_memory_bytes.load(Ordering::Relaxed),
            why: state.why.get(vertex).cloned().unwrap_or_default(),
            from: from_of(&state, *vertex, *state_of),
            log: logs.contains(vertex).then_some(*vertex),
            op: digits(&self.steps[*vertex].op.digest()),
            content: self.content(*vertex),
        };
        record.steps = steps.map(step).collect();
        builds::note(&self.root, &record);
    }
}

/// Where the result of a step came from that did not run.
fn from_of(state: &State, vertex: usize, of: StepState) -> Option<String> {
    state.from.get(&vertex).filter(|_| of == StepState::Cached).map(|from| from.to_string())
}

fn millis(took: Duration) -> u64 {
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
}

/// The context for people, and the name of what is comparable: context, Dockerfile, target, platform.
fn lineage_of(request: &BuildRequest, dir: &Path) -> (String, String) {
    // Spelled alike without a look at the disk: `.` and what has a slash at its end.
    let spelled = |path: &Path| {
        let whole = dir.join(path);
        whole.components().collect::<PathBuf>().display().to_string()
    };
    let context = match &request.context {
        ContextSource::Directory(path) => spelled(path),
        ContextSource::Stdin => "-".to_owned(),
        ContextSource::Git(git) => format!("{}#{}:{}", git.remote, git.reference, git.subdir),
        ContextSource::Http(url) => url.clone(),
    };
    let context = kiln_frontend::without_credentials(&context).into_owned();
    let dockerfile = match &request.dockerfile {
        DockerfileSource::Usual => String::new(),
        DockerfileSource::File(path) => {
            let path = spelled(path);
            let usual = format!("{context}/{}", crate::dockerfile::NAMES[0]);
            if path == usual { String::new() } else { path }
        }
        DockerfileSource::Stdin => "-".to_owned(),
        DockerfileSource::Url(url) => kiln_frontend::without_credentials(url).into_owned(),
    };
    let target = request.target.as_deref().unwrap_or_default();
    let platforms: Vec<String> = request.targets().iter().map(ToString::to_string).collect();
    let platform = platforms.join(",");
    let all = format!("{context}\n{dockerfile}\n{target}\n{platform}");
    let name = Listing::name_of(all.as_bytes());
    (context, name)
}

/// How a step of one build differs from the same step of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepDifference {
    /// As the later build calls it, or the earlier one where it is gone.
    pub title: String,
    /// What about it.
    pub what: StepChange,
}

/// What about a step differs between two builds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepChange {
    /// Only the later build has it.
    Added,
    /// Only the earlier build has it.
    Removed,
    /// These parts of its key.
    Changed(Vec<Reason>),
    /// It differs, and what it was is not kept any more.
    Unknown,
}

/// Compares what the steps of two builds were made of; those that are alike are left out. Reads what is
/// kept of the lineages of both.
pub fn compare_builds(root: &Path, one: &BuildRecord, other: &BuildRecord) -> Vec<StepDifference> {
    let (old, new) = (lineage::read(root, &one.lineage), lineage::read(root, &other.lineage));
    let image = |images: &[PreImage], record: &BuildRecord, step: &StepRecord| {
        let is_it = |image: &&PreImage| {
            let text = pre_image::text_of(&step.title);
            image.op == step.op && image.content == step.content && image.text() == text
        };
        let ran = images.iter().rev().find(|image| image.build == record.id && image.title == step.title);
        ran.or_else(|| images.iter().rev().find(is_it)).cloned()
    };
    let text = |step: &StepRecord| pre_image::text_of(&step.title).to_owned();
    let place =
        |step: &StepRecord| crate::shell::stage_of(&step.title).map(|(stage, nth)| (stage.to_owned(), nth));
    let mut left: Vec<&StepRecord> = one.steps.iter().collect();
    let mut out = Vec::new();
    for step in &other.steps {
        let same = |known: &&StepRecord| text(known) == text(step);
        let found = left.iter().position(|known| same(known) && place(known) == place(step));
        let found = found.or_else(|| left.iter().position(same)).or_else(|| {
            let elsewhere = |known: &&StepRecord| other.steps.iter().any(|step| text(step) == text(known));
            left.iter().position(|known| place(known) == place(step) && !elsewhere(known))
        });
        let title = step.title.clone();
        let Some(found) = found else {
            out.push(StepDifference { title, what: StepChange::Added });
            continue;
        };
        let before = left.remove(found);
        let what = match (image(&new, other, step), image(&old, one, before)) {
            (Some(now), Some(before)) => {
                let read = |name: &str| lineage::read_list(root, name);
                let around = Around { ran: &BTreeSet::new(), list: &read };
                StepChange::Changed(differences(&now, &before, &around))
            }
            _ if step.op == before.op && step.content == before.content => StepChange::Changed(Vec::new()),
            _ => StepChange::Unknown,
        };
        if what != StepChange::Changed(Vec::new()) {
            out.push(StepDifference { title, what });
        }
    }
    out.extend(
        left.into_iter().map(|step| StepDifference { title: step.title.clone(), what: StepChange::Removed }),
    );
    out
}
