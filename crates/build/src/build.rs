//! One build as a walk: Dockerfile, definition, solve, image, names.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_content::{ImageRecord, LayerRecord};
use kiln_frontend::{Diagnostic, Lowered};
use kiln_llb::{Op, Source, Vertex, VertexId};
use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Platform, Reference, SnapshotId};

use crate::attest::{Found, Stood, predicates};
use crate::cache::BuildCache;
use crate::cancel::BuildCancel;
use crate::dockerfile::Dockerfile;
use crate::engine::{now_unix, rfc3339};
use crate::export::{Assembled, Delivered, Delivery, Output, are_of, deliver};
use crate::image::with_layers;
use crate::input::Reader;
use crate::last_build;
use crate::layers::Layers;
use crate::lock::{Pins, Saved};
use crate::lowering::{Purpose, Understood, lower_all};
use crate::no_cache::MadeAgain;
use crate::ops::{Shared, StepResources};
use crate::platforms::{Product, Target};
use crate::registry::{PushedName, Unpulled};
use crate::remote_cache::{
    Borrowed, CacheTarget, Exported, INLINE_KEY, RemoteCache, Results, describe_inline,
    export as export_cache,
};
use crate::solve::{solve_all, step_error};
use crate::tree::Tree;
use crate::why::{Reason, Why};
use crate::{BuildError, BuildRequest, Engine};

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
    /// What its names are pinned to.
    pub(crate) pins: Pins,
    /// The lock file, where it was written.
    lock: Option<PathBuf>,
    pub(crate) again: Arc<MadeAgain>,
    pub(crate) jobs: Option<NonZeroUsize>,
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
    Ok(Plan { lowered, targets, dockerfile, shared, cache, stood, revision, pins, lock, again, jobs })
}

fn local_name(vertex: &Vertex) -> Option<&str> {
    match &vertex.op {
        Op::Source(Source::Local(local)) => Some(&local.name),
        _ => None,
    }
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
