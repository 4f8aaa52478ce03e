//! One build as a walk: Dockerfile, definition, solve, image, names.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_content::{ImageRecord, LayerRecord};
use kiln_frontend::{
    Ast, BaseImage, Diagnostic, EpochTime, ImageKey, Lowered, Lowering, Need, Options, Severity,
};
use kiln_llb::{Location, Op, Source, Vertex, VertexId};
use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Platform, Reference, SnapshotId};
use kiln_solver::{EventSink, Job, Limits, SolveError};

use crate::attest::{Found, Stood, predicates};
use crate::cache::BuildCache;
use crate::cancel::BuildCancel;
use crate::dockerfile::Dockerfile;
use crate::engine::{now_unix, rfc3339};
use crate::export::{Assembled, Delivered, Delivery, Output, are_of, deliver};
use crate::image::with_layers;
use crate::input::{Input, Reader};
use crate::last_build::{self, FailedStep};
use crate::layers::Layers;
use crate::lock::{Pins, Remark, Saved};
use crate::no_cache::MadeAgain;
use crate::ops::{BuildOp, Gathered, Shared, ShellJob, StepResources};
use crate::platforms::{Product, Target, join, serves, stored_platform};
use crate::registry::{
    Base, PushedName, Resolved, Stored, Unpulled, known_base, newest, pinned_base, resolve_base, seen_base,
};
use crate::remote_cache::{
    Borrowed, CacheTarget, Exported, INLINE_KEY, RemoteCache, Results, describe_inline,
    export as export_cache,
};
use crate::step_costs;
use crate::tree::Tree;
use crate::why::{Reason, Why};
use crate::{BuildError, BuildRequest, Engine, OpError};

/// Follows a build; called from several threads.
pub trait Progress: Send + Sync {
    /// The steps that may run, in Dockerfile order; events refer to them by position.
    fn plan(&self, titles: &[String]);
    /// Something that deserves a look, but no stop.
    fn warning(&self, dockerfile: &Dockerfile, warning: &Diagnostic);
    /// Something happened to a step.
    fn event(&self, event: kiln_solver::Event);
    /// The step at this position, which was started, runs for these reasons.
    fn why(&self, _vertex: usize, _reasons: &[Reason]) {}
    /// Something went wrong that does not change what comes out.
    fn note(&self, _text: &str) {}
}

/// A finished build.
#[derive(Debug)]
pub struct Built {
    /// The image in the store; `None`: no output put one there.
    pub image: Option<ImageRecord>,
    /// Digest of the image's config, under which users know it. Of the first output that is an image,
    /// or of the image that the build would have made. For several platforms it is that of the index.
    pub id: Option<Digest>,
    /// Points to the manifest, or index, of the first output that is an image.
    pub manifest: Option<Descriptor>,
    /// Names that the image got, in the store or in archives.
    pub names: Vec<Reference>,
    /// Names that registries have now.
    pub pushed: Vec<PushedName>,
    /// Files and directories that were written.
    pub files: Vec<PathBuf>,
    /// What the user should know.
    pub notes: Vec<String>,
    /// The platforms that were asked for; none: nobody asked.
    pub platforms: Vec<Platform>,
    /// Steps that had to run.
    pub steps_run: usize,
    /// Somebody stopped the export of the cache: everything else is here as if nobody had.
    pub is_export_interrupted: bool,
}

/// Builds, and writes what the request asks for: by default an image in the store.
///
/// # Errors
/// [`BuildError`]; the store then holds at most more cache than before, never a half-made image,
/// no name has moved, and no file has appeared.
pub async fn build(
    engine: &Engine,
    request: &BuildRequest,
    progress: Arc<dyn Progress>,
    cancel: &BuildCancel,
) -> Result<Built, BuildError> {
    let plan = plan(engine, request, &progress, cancel)?;
    let built = carry_out(engine, request, &plan, progress.clone(), cancel).await;
    if let (Err(_), Some(lock)) = (&built, &plan.lock) {
        progress.note(&format!("{} was written before the build failed", lock.display()));
    }
    if let Some(why) = &plan.shared.why {
        why.finish(built.as_ref());
    }
    built
}

/// Solves and delivers.
async fn carry_out(
    engine: &Engine,
    request: &BuildRequest,
    plan: &Plan,
    progress: Arc<dyn Progress>,
    cancel: &BuildCancel,
) -> Result<Built, BuildError> {
    let wanted: Vec<Option<VertexId>> = plan.targets.iter().map(|target| target.result).collect();
    let solved = solve_all(plan, &wanted, progress.clone()).await;
    plan.shared.steps.costs().save();
    let Plan { lowered, shared, cache, .. } = plan;
    let is_inline = request.cache_to.iter().any(CacheTarget::is_inline);
    let trees = match solved {
        Ok(trees) => trees,
        Err(error) => {
            if let Some(failed) = error.failed {
                last_build::note(engine, request, Some(*failed));
            }
            return Err(error.source);
        }
    };
    let tops: Vec<SnapshotId> = trees.iter().filter_map(|tree| tree.snapshot().cloned()).collect();
    cache.adopt(&tops)?;
    for tree in shared.contexts.values() {
        if let Tree::Context(context) = tree {
            context.save_digests();
        }
    }
    let default = [Output::image(&request.tags)];
    let outputs = if request.outputs.is_empty() { &default[..] } else { &request.outputs };
    let says = !request.attestations.is_empty() && outputs.iter().any(|output| *output != Output::CacheOnly);
    let wants_image = says || request.wants_id || outputs.iter().any(Output::is_image);
    let mut products = Vec::with_capacity(plan.targets.len());
    for (target, tree) in plan.targets.iter().zip(&trees) {
        let image =
            if wants_image { Some(assemble(engine, plan, target, is_inline, tree).await?) } else { None };
        let (platform, top) = (target.platform.clone(), tree.snapshot().cloned());
        products.push(Product { platform, image, top, predicates: Vec::new() });
    }
    let mut said_notes = Vec::new();
    for (target, product) in plan.targets.iter().zip(&mut products).filter(|_| says) {
        product.predicates = tokio::task::block_in_place(|| {
            predicates(engine, request, plan, (target, &*product), cancel, &mut said_notes)
        })?;
    }
    let (epoch, wants_manifest) = (lowered.epoch, request.wants_id);
    let registries = request.bases.registries.as_deref();
    let delivery = Delivery { engine, products: &products, wants_manifest, epoch, registries, cancel };
    let delivered = tokio::task::block_in_place(|| deliver(&delivery, outputs))?;
    engine.store.barrier()?;
    engine.store.note_use(now_unix())?;
    last_build::note(engine, request, None);
    let Delivered { image: record, id, manifest, names, mut files, notes, pushed, .. } = delivered;
    files.extend(plan.lock.clone());
    let notes = said_notes.into_iter().chain(notes).collect();
    let registries = request.bases.registries.as_ref();
    let results = Results { cache, layers: &shared.layers, tops: &tops, registries };
    let exported = export_cache(engine, &request.cache_to, &results, cancel, &*progress).await;
    // An output with a time of its own has another image.
    let id = id.or_else(|| record.as_ref().map(|record| record.config));
    // Several images have no ID together unless there is an index of them.
    let only = if let [only] = products.as_slice() { only.image.as_ref() } else { None };
    let id = id.or_else(|| only.map(|image| Digest::of(&image.config_json)));
    Ok(Built {
        image: record,
        id,
        manifest,
        names,
        pushed,
        files,
        notes,
        platforms: request.platforms.clone(),
        steps_run: shared.steps.runs(),
        is_export_interrupted: exported == Exported::Interrupted,
    })
}

/// A build that only has to be solved.
pub(crate) struct Plan {
    /// The first target's, with the steps of all of them.
    pub(crate) lowered: Lowered,
    /// For each platform.
    pub(crate) targets: Vec<Target>,
    pub(crate) dockerfile: Arc<Dockerfile>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) cache: Arc<BuildCache>,
    /// The images that it stands on; none where nobody asks.
    pub(crate) stood: Vec<Stood>,
    /// Digest of what was fetched as the context.
    pub(crate) revision: Option<(&'static str, String)>,
    /// The lock file, where it was written.
    lock: Option<PathBuf>,
    again: Arc<MadeAgain>,
    jobs: Option<NonZeroUsize>,
}

/// Reads and lowers what a request asks for, and opens the contexts it needs.
pub(crate) fn plan(
    engine: &Engine,
    request: &BuildRequest,
    progress: &Arc<dyn Progress>,
    cancel: &BuildCancel,
) -> Result<Plan, BuildError> {
    let reader = Reader { engine, request, cancel };
    // Fetching waits for networks and disks: not on a thread that others need.
    let (input, pins, understood) = tokio::task::block_in_place(|| {
        let input = reader.read()?;
        let mut pins = Pins::open(engine, &input.lock, request.lock)?;
        let understood = lower_all(&reader, &input, Purpose::Build, &mut pins)?;
        Ok::<_, BuildError>((input, pins, understood))
    })?;
    let Understood { lowered, targets, unpulled, stood } = understood;
    let dockerfile = &input.dockerfile;
    for warning in &lowered.warnings {
        progress.warning(dockerfile, warning);
    }
    // An argument that nobody declares and the like are no findings of a check.
    let found = lowered.warnings.iter().filter(|warning| warning.rule.is_some()).count();
    if lowered.warnings_are_errors && found > 0 {
        return Err(BuildError::Warnings { count: found });
    }
    // Before a context is looked at: the file may be in it.
    let Saved { written: lock, notes } = tokio::task::block_in_place(|| pins.save(cancel))?;
    notes.iter().for_each(|note| progress.note(note));

    let again = Arc::new(MadeAgain::find(&request.no_cache, &lowered)?);
    let (dockerfile, revision) = (dockerfile.clone(), input.revision());
    let used: BTreeSet<&str> = lowered.definition.vertices().iter().filter_map(local_name).collect();
    let contexts = input.trees(&engine.store.root().join("state"), |name| used.contains(name))?;
    let shared = Arc::new(Shared {
        engine: engine.clone(),
        layers: Layers::new(engine.store.clone(), engine.snapshots.clone()),
        contexts,
        unpulled: Unpulled::new(unpulled, request.bases.asked().cloned(), progress.clone()),
        sources: request.source_options(),
        cancel: cancel.clone(),
        steps: StepResources::new(engine, request),
        borrowed: Borrowed::of(&request.cache_from),
        why: Why::new(engine.store.root(), request, &lowered, &dockerfile, &again, progress.clone()),
        found: Found::default(),
    });
    let remote =
        (!request.cache_from.is_empty()).then(|| RemoteCache::new(engine, request, cancel, progress.clone()));
    let cache = BuildCache::new(engine.store.clone(), engine.snapshots.clone());
    let cache = Arc::new(cache.shared(remote, !request.cache_to.is_empty()));
    let jobs = request.jobs;
    Ok(Plan { lowered, targets, dockerfile, shared, cache, stood, revision, lock, again, jobs })
}

fn local_name(vertex: &Vertex) -> Option<&str> {
    match &vertex.op {
        Op::Source(Source::Local(local)) => Some(&local.name),
        _ => None,
    }
}

/// What the definition is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// It will be solved: every image must be there, or at a registry.
    Build,
    /// Only what is said about it counts: an image that is not there is taken for an empty one.
    Look,
    /// The same, at all stages.
    Check,
}

/// A Dockerfile that was understood, for every platform of the request.
pub(crate) struct Understood {
    /// The first one's, with the steps of all.
    pub(crate) lowered: Lowered,
    pub(crate) targets: Vec<Target>,
    /// Those of the images that it stands on of which no layer has come.
    pub(crate) unpulled: Vec<Arc<Resolved>>,
    /// All of them; none where nobody asks.
    pub(crate) stood: Vec<Stood>,
}

/// Lowers the Dockerfile for every platform of the request.
pub(crate) fn lower_all(
    reader: &Reader<'_>,
    input: &Input,
    purpose: Purpose,
    pins: &mut Pins,
) -> Result<Understood, BuildError> {
    let (mut unpulled, mut stood) = (Vec::new(), Vec::new());
    let lowered = |platform: Platform| {
        let (lowered, bases) = lower(reader, input, purpose, &platform, pins)?;
        unpulled.extend(bases.unpulled);
        stood.extend(bases.stood);
        Ok((platform, lowered))
    };
    let all = reader.request.targets().into_iter().map(lowered).collect::<Result<_, BuildError>>()?;
    let (lowered, targets) =
        join(all).ok_or_else(|| BuildError::Bug { what: "a build for no platform".to_owned() })?;
    Ok(Understood { lowered, targets, unpulled, stood })
}

/// Rounds of asking for base images; each round needs one more, and stages are bounded.
const MAX_ROUNDS: usize = 1000;

/// The images that a build stands on.
#[derive(Default)]
pub(crate) struct StandsOn {
    /// Those of which no layer has come.
    unpulled: Vec<Arc<Resolved>>,
    /// All; none where nobody asks.
    stood: Vec<Stood>,
}

/// Parses and lowers the Dockerfile of a request for `platform`, with the images it needs; `pins` says which those are,
/// and learns. Blocks when it asks for the time of something.
pub(crate) fn lower(
    reader: &Reader<'_>,
    input: &Input,
    purpose: Purpose,
    platform: &Platform,
    pins: &mut Pins,
) -> Result<(Lowered, StandsOn), BuildError> {
    let Reader { engine, request, .. } = *reader;
    let Input { dockerfile, ignore, named, .. } = input;
    let wrong = |diagnostics| BuildError::Dockerfile { dockerfile: dockerfile.clone(), diagnostics };
    let (ast, mut warnings) = kiln_frontend::parse(&dockerfile.text);
    if warnings.iter().any(Diagnostic::is_error) {
        return Err(wrong(warnings));
    }
    let mut options = Options {
        build_args: request.build_args.clone(),
        target: request.target.clone(),
        labels: request.labels.clone(),
        ignore: ignore.clone(),
        contexts: named.clone(),
        extra_hosts: request.extra_hosts.clone(),
        network: request.network,
        all_stages: purpose == Purpose::Check && request.target.is_none(),
        keep_owners: input.has_owners(),
        epoch: if purpose == Purpose::Build { EpochTime::Unasked } else { EpochTime::Unknown },
        build_platform: Platform::host(),
        names_platform: request.platforms.len() > 1,
        ..Options::new(platform.clone())
    };
    let mut images: BTreeMap<ImageKey, BaseImage> = BTreeMap::new();
    let mut bases = StandsOn::default();
    for _ in 0..MAX_ROUNDS {
        match kiln_frontend::lower(&ast, &options, &images).map_err(wrong)? {
            Lowering::Done(mut lowered) => {
                warnings.append(&mut lowered.warnings);
                lowered.warnings = warnings;
                return Ok((*lowered, bases));
            }
            Lowering::NeedsTime(asked) => options.epoch = EpochTime::At(reader.time_of(input, &asked)?),
            Lowering::Needs(needs) => {
                for need in needs {
                    let found = match (&need.image.layout, purpose) {
                        (Some(layout), _) => {
                            let image = reader.layout(layout, &need.image.platform)?;
                            Some(Base::Here(Stored::unread(image)))
                        }
                        (None, Purpose::Build) => {
                            find_base(reader, dockerfile, &ast, &need, pins, &mut warnings)?
                        }
                        (None, Purpose::Look | Purpose::Check) => {
                            let seen = |name: &Reference| seen_base(engine, name, &need.image.platform);
                            let exact = pins.exact(&need.image.reference);
                            seen(&exact)?
                                .map_or_else(|| seen(&need.image.reference), |base| Ok(Some(base)))?
                        }
                    };
                    let Need { image: key, span, stages } = need;
                    let at = || Some((dockerfile.clone(), lines_of(&dockerfile.text, span.start, span.end)));
                    if purpose == Purpose::Build
                        && request.attestations.provenance.is_some()
                        && let Some(base) = &found
                    {
                        bases.stood.push(stood(engine, &key, base, pins)?);
                    }
                    let image = match found {
                        Some(Base::Here(here)) => {
                            let config_digest = here.image.config;
                            let config = here.into_config(engine)?;
                            // For this machine's own platform it is the frontend that warns.
                            let is_asked =
                                purpose == Purpose::Build && key.platform != options.build_platform;
                            if is_asked && !serves(&key.platform, &config) {
                                return Err(BuildError::OtherPlatform {
                                    reference: Box::new(key.reference),
                                    wanted: Box::new(key.platform),
                                    actual: Box::new(config.platform()),
                                    at: at(),
                                    source: None,
                                });
                            }
                            BaseImage { config_digest, config, unknown: false }
                        }
                        Some(Base::There(resolved)) => {
                            let (config_digest, config) =
                                (resolved.config_digest(), resolved.config().clone());
                            bases.unpulled.push(resolved);
                            BaseImage { config_digest, config, unknown: false }
                        }
                        None if purpose != Purpose::Build => {
                            BaseImage::unknown(&key.reference, &key.platform)
                        }
                        None => {
                            let reference = pins.exact(&key.reference);
                            // What is pinned was not misspelt.
                            let is_pinned = pins.pinned(&key.reference).is_some();
                            let similar =
                                if is_pinned { None } else { similar_name(engine, &ast, &reference)? };
                            return Err(BuildError::NoImage {
                                reference: Box::new(reference),
                                at: at(),
                                stages,
                                similar,
                            });
                        }
                    };
                    images.insert(key, image);
                }
            }
        }
    }
    Err(BuildError::Bug { what: "the frontend keeps asking for base images".to_owned() })
}

/// An image that the build stands on, as it was found.
fn stood(engine: &Engine, key: &ImageKey, base: &Base, pins: &Pins) -> Result<Stood, BuildError> {
    let ImageKey { reference, platform, layout } = key;
    // What a layout holds is not what a registry has under a name.
    let root = match (layout, pins.pinned(reference)) {
        (Some(_), _) => None,
        (None, Some(digest)) => Some(digest),
        (None, None) => base.led_to(engine, reference, platform)?.map(|(root, _)| root),
    };
    let config = match base {
        Base::Here(here) => here.image.config,
        Base::There(resolved) => resolved.config_digest(),
    };
    Ok(Stood { reference: reference.clone(), platform: platform.clone(), config, root })
}

/// The image that a FROM or a `from` means.
fn find_base(
    reader: &Reader<'_>,
    dockerfile: &Arc<Dockerfile>,
    ast: &Ast,
    need: &Need,
    pins: &mut Pins,
    warnings: &mut Vec<Diagnostic>,
) -> Result<Option<Base>, BuildError> {
    let Reader { engine, cancel, .. } = *reader;
    let Need { image: ImageKey { reference, platform, .. }, span, stages } = need;
    let span = *span;
    let at = Some((dockerfile.clone(), lines_of(&dockerfile.text, span.start, span.end)));
    let mut remark = |(message, hint): Remark| {
        warnings.push(Diagnostic { severity: Severity::Warning, span, message, hint, rule: None });
    };
    // Whoever misspells a stage wants to hear that, not what a registry says.
    let bare = reference.familiar();
    let bare = bare.strip_suffix(":latest").unwrap_or(&bare);
    let stages = stages.iter().flatten().map(String::as_str);
    let is_locked = pins.lists(reference) || pins.pinned(reference).is_some();
    let is_stage = !is_locked && kiln_frontend::nearest(bare, stages).is_some();
    let found = if is_stage {
        let Some(known) = known_base(engine, reference, platform, cancel)? else { return Ok(None) };
        pins.demand(reference, at.clone())?;
        Ok(Some(known))
    } else {
        pins.demand(reference, at.clone())?;
        means(reader, &need.image, pins, &mut |message| remark((message, None)))
    };
    let found = match found {
        Err(BuildError::Cancelled) => return Err(BuildError::Cancelled),
        Ok(Some(found)) => {
            if pins.wants(reference) {
                // Of one without files nobody notes down what led to it.
                let root = match found.led_to(engine, reference, platform)? {
                    Some((root, _)) => Some(root),
                    None => pins.led.of(reference),
                };
                if let Some(said) = pins.found(reference, root) {
                    remark(said);
                }
            }
            return Ok(Some(found));
        }
        found => found,
    };
    let locked = pins.file_of(reference);
    let reference = &pins.exact(reference);
    // There is one of this name, and it is not the right one.
    if let Some(named) = engine.store.resolve(reference)? {
        let (actual, is_right) = stored_platform(engine, &named, platform)?;
        if !is_right {
            return Err(BuildError::OtherPlatform {
                reference: Box::new(reference.clone()),
                wanted: Box::new(platform.clone()),
                actual: Box::new(actual),
                at,
                source: found.err().map(Box::new),
            });
        }
    }
    match found {
        Err(error) => {
            let similar = if locked.is_some() { None } else { similar_name(engine, ast, reference)? };
            let (reference, source) = (Box::new(reference.clone()), Box::new(error));
            Err(BuildError::Pull { reference, at, similar, locked, source })
        }
        found => found,
    }
}

/// The image that a name stands for: what it is pinned to, or what it leads to. `note` hears what deserves a look.
fn means(
    reader: &Reader<'_>,
    image: &ImageKey,
    pins: &mut Pins,
    note: &mut dyn FnMut(String),
) -> Result<Option<Base>, BuildError> {
    let Reader { engine, request, cancel } = *reader;
    let (bases, ImageKey { reference, platform, .. }) = (&request.bases, image);
    if let Some(registries) = bases.asked()
        && pins.renews(reference)
        && (pins.lists(reference) || !is_own(reader, image)?)
    {
        let root = newest(registries, reference, &mut pins.led, cancel);
        registries.client().take_notes().into_iter().for_each(&mut *note);
        pins.pin(reference, root?);
    }
    let pinned = pins.pinned(reference);
    let led = &mut pins.led;
    match pinned {
        Some(digest) => pinned_base(engine, bases, (reference, digest), platform, led, cancel, note),
        None => resolve_base(engine, bases, reference, platform, led, cancel, note),
    }
}

/// Whether an image of the store was built, loaded or imported here: no registry has it.
fn is_own(reader: &Reader<'_>, image: &ImageKey) -> Result<bool, BuildError> {
    let (engine, ImageKey { reference, platform, .. }) = (reader.engine, image);
    let Some(known) = known_base(engine, reference, platform, reader.cancel)? else { return Ok(false) };
    Ok(known.led_to(engine, reference, platform)?.is_none())
}

/// A stage or an image of the store whose name is close, or that has another tag.
fn similar_name(engine: &Engine, ast: &Ast, wanted: &Reference) -> Result<Option<String>, BuildError> {
    let bare = |name: String| name.strip_suffix(":latest").map(str::to_owned).unwrap_or(name);
    let mut known: Vec<String> =
        kiln_frontend::targets(ast).into_iter().filter_map(|target| target.name).collect();
    let mut other_tags = Vec::new();
    for image in engine.store.images()? {
        for name in engine.store.names_of(&image.config)? {
            if (name.domain(), name.path()) == (wanted.domain(), wanted.path()) {
                other_tags.push(name.familiar());
            }
            known.push(bare(name.familiar()));
        }
    }
    let near = kiln_frontend::nearest(&bare(wanted.familiar()), known.iter().map(String::as_str));
    Ok(near.map(str::to_owned).or_else(|| other_tags.into_iter().next()))
}

fn lines_of(text: &str, start: usize, end: usize) -> Location {
    let line = |at: usize| 1 + text.bytes().take(at).filter(|&b| b == b'\n').count();
    Location { first_line: line(start), last_line: line(end.max(start + 1) - 1) }
}

/// A solve without a result.
pub(crate) struct Unsolved {
    pub(crate) source: BuildError,
    /// The step that failed, if one did.
    failed: Option<Box<FailedStep>>,
}

impl From<BuildError> for Unsolved {
    fn from(source: BuildError) -> Self {
        Self { source, failed: None }
    }
}

/// Solves for all `targets` at once.
async fn solve_all(
    plan: &Plan,
    targets: &[Option<VertexId>],
    progress: Arc<dyn Progress>,
) -> Result<Vec<Tree>, Unsolved> {
    let mut wanted: Vec<VertexId> = targets.iter().flatten().copied().collect();
    wanted.sort_unstable();
    wanted.dedup();
    let trees = match wanted.as_slice() {
        [] => Vec::new(),
        [only] => vec![solve(plan, Some(*only), None, progress).await?],
        several => {
            let gathered = Arc::new(Gathered::default());
            solve_for(plan, Goal::All(several, gathered.clone()), progress).await?;
            gathered.take()
        }
    };
    let of = |target: &VertexId| wanted.binary_search(target).ok().and_then(|at| trees.get(at).cloned());
    Ok(targets.iter().map(|target| target.as_ref().and_then(of).unwrap_or(Tree::Empty)).collect())
}

/// Solves for `target`; `None`: for nothing. With `shell`, the target runs that instead.
pub(crate) async fn solve(
    plan: &Plan,
    target: Option<VertexId>,
    shell: Option<Arc<ShellJob>>,
    progress: Arc<dyn Progress>,
) -> Result<Tree, Unsolved> {
    let Some(target) = target else { return Ok(Tree::Empty) };
    solve_for(plan, Goal::One(target, shell), progress).await
}

/// What is wanted of a solve.
enum Goal<'a> {
    /// One tree; or a shell in the place of what makes it.
    One(VertexId, Option<Arc<ShellJob>>),
    /// All of these trees.
    All(&'a [VertexId], Arc<Gathered>),
}

async fn solve_for(plan: &Plan, goal: Goal<'_>, progress: Arc<dyn Progress>) -> Result<Tree, Unsolved> {
    let Plan { lowered, dockerfile, shared, cache, .. } = plan;
    let ids = || (0..lowered.definition.vertices().len()).map(VertexId);
    let titles: Vec<String> = ids().map(|id| lowered.source_map.title(id).to_owned()).collect();
    for (id, vertex) in ids().zip(lowered.definition.vertices()) {
        // Refused before anything runs, and even if the step's result is there already.
        shared.steps.check(&vertex.op).map_err(|error| step_error(lowered, dockerfile, id, error))?;
    }
    progress.plan(&titles);
    let vertices = lowered.definition.vertices().iter().zip(&titles);
    let why = shared.why.clone();
    let count = titles.len();
    let events: EventSink = Arc::new(move |event| {
        // The step that waits for all targets is nobody's business.
        if event.vertex() >= count {
            return;
        }
        if let Some(why) = &why {
            why.event(&event);
        }
        progress.event(event);
    });
    let op = |id: VertexId, vertex| match &goal {
        Goal::One(target, Some(shell)) if id == *target => BuildOp::with_shell(vertex, shared, shell.clone()),
        _ => BuildOp::new(vertex, shared),
    };
    let mut vertices: Vec<_> = ids()
        .zip(vertices)
        .map(|(id, (vertex, title))| {
            op(id, vertex).planned(vertex, id, title, plan.again.reason(id.0).is_some())
        })
        .collect();
    let target = match &goal {
        Goal::One(target, _) => target.0,
        Goal::All(targets, gathered) => {
            vertices.push(BuildOp::gathering(targets, count, shared, gathered.clone()));
            count
        }
    };
    let job = Job { vertices, target, cache: cache.clone(), cancel: Arc::new(shared.cancel.clone()), events };
    // Steps that only wait are many: the kernel shares processors better than a limit does.
    let many = std::thread::available_parallelism().map_or(4, usize::from).max(4) * 8;
    let limits = Limits {
        jobs: plan.jobs.map_or(many, NonZeroUsize::get),
        memory_bytes: step_costs::free_memory_bytes(),
    };
    kiln_solver::solve(job, limits).await.map_err(|error| match error {
        SolveError::Cancelled => BuildError::Cancelled.into(),
        SolveError::Vertex { vertex: _, source: OpError::Build(inner) }
            if matches!(*inner, BuildError::Store(_)) =>
        {
            Unsolved::from(*inner)
        }
        SolveError::Vertex { vertex, source: OpError::Build(inner) }
            if matches!(*inner, BuildError::Pull { .. } | BuildError::NoImage { .. }) =>
        {
            Unsolved::from(base_error(lowered, dockerfile, VertexId(vertex), *inner))
        }
        SolveError::Vertex { vertex, source } => {
            let op = lowered.definition.vertices()[vertex].op.digest();
            let title = titles[vertex].clone();
            let failed = FailedStep { op, title, snapshot: shared.steps.kept(&op) };
            let source = step_error(lowered, dockerfile, VertexId(vertex), source);
            Unsolved { source, failed: Some(Box::new(failed)) }
        }
        SolveError::Cache { source } => source.into(),
        other => BuildError::Bug { what: other.to_string() }.into(),
    })
}

/// A base image that was found and could not be had when a step needed it: the error says for which line.
fn base_error(
    lowered: &Lowered,
    dockerfile: &Arc<Dockerfile>,
    vertex: VertexId,
    mut error: BuildError,
) -> BuildError {
    if let BuildError::Pull { at, .. } | BuildError::NoImage { at, .. } = &mut error {
        *at = lowered.source_map.location(vertex).map(|location| (dockerfile.clone(), location.clone()));
    }
    error
}

pub(crate) fn step_error(
    lowered: &Lowered,
    dockerfile: &Arc<Dockerfile>,
    vertex: VertexId,
    source: OpError,
) -> BuildError {
    let at = lowered.source_map.location(vertex).map(|location| (dockerfile.clone(), location.clone()));
    let title = lowered.source_map.title(vertex).to_owned();
    BuildError::Step { title, at, source: Box::new(source) }
}

/// Diff IDs, history with times, config.
async fn assemble(
    engine: &Engine,
    plan: &Plan,
    target: &Target,
    is_inline: bool,
    tree: &Tree,
) -> Result<Assembled, BuildError> {
    let Plan { lowered, dockerfile, shared, cache, .. } = plan;
    let chain: Vec<SnapshotId> = match tree.snapshot() {
        Some(top) => engine.snapshots.chain(top)?,
        None => Vec::new(),
    };
    let made: Vec<VertexId> = target.history.iter().filter_map(|entry| entry.vertex).collect();
    let inherited = chain.len().saturating_sub(made.len());
    let mut records: Vec<LayerRecord> = Vec::with_capacity(chain.len());
    for (nth, snapshot) in chain.iter().enumerate() {
        let record = shared.layers.record(snapshot).await.map_err(|error| {
            // A layer that cannot be written is the fault of the step that made its files.
            match nth.checked_sub(inherited).and_then(|nth| made.get(nth)) {
                Some(vertex) => step_error(lowered, dockerfile, *vertex, error.into()),
                None => error,
            }
        });
        records.push(record?);
    }
    let mut config = target.config.clone();
    // A base that has lost a layer must not become an image that never had it.
    if !are_of(&records[..inherited], &config) {
        return Err(BuildError::OtherLayers { image: "the base image".to_owned() });
    }
    let mut own = chain.iter().skip(inherited);
    // An instruction without a layer is as old as what stands before it, so that a build from the
    // cache gives the same bytes again.
    let mut created = config.created.clone();
    for entry in &target.history {
        let mut history = entry.history.clone();
        if let Some(epoch) = lowered.epoch {
            created = Some(rfc3339(epoch));
        } else if entry.vertex.is_some()
            && let Some(at) = own.next().and_then(|snapshot| cache.created_unix(snapshot))
        {
            created = Some(rfc3339(at));
        }
        history.created = Some(created.clone().unwrap_or_else(|| rfc3339(0)));
        config.history.push(history);
    }
    // That of the image below says nothing of this one.
    config.extra.remove(INLINE_KEY);
    if is_inline {
        config.extra.insert(INLINE_KEY.to_owned(), describe_inline(&cache.entries(), &records));
    }
    config.created = lowered.epoch.map(rfc3339).or(created).or_else(|| Some(rfc3339(0)));
    let (config_json, top) = (with_layers(config, &records), tree.snapshot().cloned());
    let own_history = lowered.history.len();
    Ok(Assembled { config_json, layers: records, top, inherited, own_history, manifest: None })
}
