//! One build as a walk: Dockerfile, definition, solve, image, names.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_content::{ImageRecord, LayerRecord};
use kiln_frontend::{BaseImage, Diagnostic, Lowered, Lowering, Options, Severity, ignore::Patterns};
use kiln_llb::{Location, Op, Source, VertexId};
use kiln_oci::{Digest, Platform, Reference, SnapshotId};
use kiln_solver::{EventSink, Job, SolveError};

use crate::cache::BuildCache;
use crate::cancel::BuildCancel;
use crate::context::Context;
use crate::engine::rfc3339;
use crate::image::{read_config, store_image, with_layers};
use crate::layers::Layers;
use crate::ops::{BuildOp, Shared};
use crate::tree::Tree;
use crate::{BuildError, Engine, OpError};

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// The context directory.
    pub context: PathBuf,
    /// `-f`; `None`: `Dockerfile`, `dockerfile` or `Containerfile` in the context.
    pub dockerfile: Option<PathBuf>,
    /// Names for the result.
    pub tags: Vec<Reference>,
    /// `--build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `--label`.
    pub labels: BTreeMap<String, String>,
    /// `--target`; `None`: the last stage.
    pub target: Option<String>,
    /// Run every step again.
    pub no_cache: bool,
}

/// A Dockerfile as read: for messages.
#[derive(Debug)]
pub struct Dockerfile {
    /// Its name as the user would type it.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// Follows a build; called from several threads.
pub trait Progress: Send + Sync {
    /// The steps that may run, in Dockerfile order; events refer to them by position.
    fn plan(&self, titles: &[String]);
    /// Something that deserves a look, but no stop.
    fn warning(&self, dockerfile: &Dockerfile, warning: &Diagnostic);
    /// Something happened to a step.
    fn event(&self, event: kiln_solver::Event);
}

/// A finished build.
#[derive(Debug)]
pub struct Built {
    /// The image.
    pub image: ImageRecord,
    /// Steps that had to run.
    pub steps_run: usize,
}

/// Builds an image and names it.
///
/// # Errors
/// [`BuildError`]; the store then holds at most more cache than before, never a half-made image,
/// and no name has moved.
pub async fn build(
    engine: &Engine,
    request: &BuildRequest,
    progress: Arc<dyn Progress>,
    cancel: &BuildCancel,
) -> Result<Built, BuildError> {
    if !request.context.is_dir() {
        return Err(match fs::metadata(&request.context) {
            Ok(_) => BuildError::ContextKind { path: request.context.clone() },
            Err(source) => BuildError::Unreadable { path: request.context.clone(), source },
        });
    }
    let path = find_dockerfile(request)?;
    let dockerfile = Arc::new(read_dockerfile(&path)?);
    let ignore = read_ignore(&request.context, &path)?;
    let lowered = lower(engine, request, &dockerfile, &ignore)?;
    for warning in &lowered.warnings {
        progress.warning(&dockerfile, warning);
    }

    let context = if lowered.definition.vertices().iter().any(|vertex| is_local(&vertex.op)) {
        Some(Arc::new(Context::open(&request.context, ignore, &engine.store.root().join("state"))?))
    } else {
        None
    };
    let shared = Arc::new(Shared {
        engine: engine.clone(),
        layers: Layers::new(engine.store.clone(), engine.snapshots.clone()),
        context,
        cancel: cancel.clone(),
    });
    let cache = Arc::new(BuildCache::new(engine.store.clone(), engine.snapshots.clone(), request.no_cache));
    let tree = solve(&lowered, &dockerfile, &shared, &cache, request, progress).await?;
    if let Some(context) = &shared.context {
        context.save_digests();
    }
    let image = finish(engine, &lowered, &dockerfile, &shared.layers, &cache, &tree).await?;
    for tag in &request.tags {
        engine.store.set_name(tag, &image.config)?;
    }
    engine.store.barrier()?;
    Ok(Built { image, steps_run: cache.saved() })
}

fn is_local(op: &Op) -> bool {
    matches!(op, Op::Source(Source::Local(_)))
}

fn find_dockerfile(request: &BuildRequest) -> Result<PathBuf, BuildError> {
    if let Some(path) = &request.dockerfile {
        return if path.exists() {
            Ok(path.clone())
        } else {
            Err(BuildError::NoDockerfile { path: path.clone() })
        };
    }
    let names = ["Dockerfile", "dockerfile", "Containerfile"];
    let found = names.iter().map(|name| request.context.join(name)).find(|path| path.exists());
    found.ok_or_else(|| BuildError::NoDockerfile { path: request.context.join("Dockerfile") })
}

/// A Dockerfile beyond this size is refused before it is read.
const MAX_DOCKERFILE_BYTES: u64 = 1 << 20;

fn read_dockerfile(path: &Path) -> Result<Dockerfile, BuildError> {
    let unreadable = |source| BuildError::Unreadable { path: path.to_owned(), source };
    let name = path.strip_prefix("./").unwrap_or(path).display().to_string();
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(unreadable(io::Error::other("not a regular file")));
    }
    let wrong = |text: String, diagnostic| BuildError::Dockerfile {
        dockerfile: Arc::new(Dockerfile { name: name.clone(), text }),
        diagnostics: vec![diagnostic],
    };
    if metadata.len() > MAX_DOCKERFILE_BYTES {
        let message = format!("the Dockerfile has {} bytes, 1 MiB is the limit", metadata.len());
        let span = kiln_frontend::Span { start: 0, end: 0 };
        return Err(wrong(
            String::new(),
            Diagnostic { severity: Severity::Error, span, message, hint: None },
        ));
    }
    let bytes = fs::read(path).map_err(unreadable)?;
    match kiln_frontend::decode(&bytes) {
        Ok(text) => Ok(Dockerfile { name, text: text.to_owned() }),
        Err(diagnostic) => Err(wrong(String::from_utf8_lossy(&bytes).into_owned(), diagnostic)),
    }
}

/// `<Dockerfile>.dockerignore` beside the Dockerfile, else `.dockerignore` at the context's root.
fn read_ignore(context: &Path, dockerfile: &Path) -> Result<Patterns, BuildError> {
    let mut beside = dockerfile.as_os_str().to_owned();
    beside.push(".dockerignore");
    for path in [PathBuf::from(beside), context.join(".dockerignore")] {
        match fs::read_to_string(&path) {
            Ok(text) => {
                return Patterns::parse(&text).map_err(|error| BuildError::Ignore {
                    file: path.display().to_string(),
                    line: error.line,
                    message: error.message,
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(BuildError::Unreadable { path, source }),
        }
    }
    Ok(Patterns::from_lines(&[]).unwrap_or_else(|_| unreachable!("no lines, no bad line")))
}

/// Rounds of asking for base images; each round needs one more, and stages are bounded.
const MAX_ROUNDS: usize = 1000;

fn lower(
    engine: &Engine,
    request: &BuildRequest,
    dockerfile: &Arc<Dockerfile>,
    ignore: &Patterns,
) -> Result<Lowered, BuildError> {
    let wrong = |diagnostics| BuildError::Dockerfile { dockerfile: dockerfile.clone(), diagnostics };
    let (ast, mut warnings) = kiln_frontend::parse(&dockerfile.text);
    if warnings.iter().any(|diagnostic| matches!(diagnostic.severity, Severity::Error)) {
        return Err(wrong(warnings));
    }
    let options = Options {
        build_args: request.build_args.clone(),
        target: request.target.clone(),
        platform: Platform::host(),
        labels: request.labels.clone(),
        ignore: ignore.lines().to_vec(),
    };
    let mut images: BTreeMap<Reference, BaseImage> = BTreeMap::new();
    for _ in 0..MAX_ROUNDS {
        match kiln_frontend::lower(&ast, &options, &images).map_err(wrong)? {
            Lowering::Done(mut lowered) => {
                warnings.append(&mut lowered.warnings);
                lowered.warnings = warnings;
                return Ok(*lowered);
            }
            Lowering::Needs(references) => {
                for (reference, span) in references {
                    let Some(record) = engine.store.resolve(&reference)? else {
                        let at = Some((dockerfile.clone(), lines_of(&dockerfile.text, span.start, span.end)));
                        return Err(BuildError::NoImage { reference: Box::new(reference), at });
                    };
                    let config = read_config(engine, &record.config)?;
                    images.insert(reference, BaseImage { config_digest: record.config, config });
                }
            }
        }
    }
    Err(BuildError::Bug { what: "the frontend keeps asking for base images".to_owned() })
}

fn lines_of(text: &str, start: usize, end: usize) -> Location {
    let line = |at: usize| 1 + text.bytes().take(at).filter(|&b| b == b'\n').count();
    Location { first_line: line(start), last_line: line(end.max(start + 1) - 1) }
}

async fn solve(
    lowered: &Lowered,
    dockerfile: &Arc<Dockerfile>,
    shared: &Arc<Shared>,
    cache: &Arc<BuildCache>,
    request: &BuildRequest,
    progress: Arc<dyn Progress>,
) -> Result<Tree, BuildError> {
    let Some(target) = lowered.result else { return Ok(Tree::Empty) };
    let ids = || (0..lowered.definition.vertices().len()).map(VertexId);
    let titles: Vec<String> = ids().map(|id| lowered.source_map.title(id).to_owned()).collect();
    progress.plan(&titles);
    let vertices = lowered.definition.vertices().iter().zip(&titles);
    let events: EventSink = Arc::new(move |event| progress.event(event));
    let job = Job {
        vertices: vertices
            .map(|(vertex, title)| {
                (Arc::new(BuildOp::new(vertex, shared)), BuildOp::inputs(vertex), title.clone())
            })
            .collect(),
        target: target.0,
        cache: cache.clone(),
        use_cache: !request.no_cache,
        parallelism: std::thread::available_parallelism().map_or(4, usize::from).max(4) * 8,
        cancel: Arc::new(shared.cancel.clone()),
        events,
    };
    kiln_solver::solve(job).await.map_err(|error| match error {
        SolveError::Cancelled => BuildError::Cancelled,
        SolveError::Vertex { vertex, source: OpError::Build(inner) }
            if matches!(*inner, BuildError::Store(_)) =>
        {
            let _ = vertex;
            *inner
        }
        SolveError::Vertex { vertex, source } => step_error(lowered, dockerfile, VertexId(vertex), source),
        SolveError::Cache { source } => source,
        other => BuildError::Bug { what: other.to_string() },
    })
}

fn step_error(
    lowered: &Lowered,
    dockerfile: &Arc<Dockerfile>,
    vertex: VertexId,
    source: OpError,
) -> BuildError {
    let at = lowered.source_map.location(vertex).map(|location| (dockerfile.clone(), location.clone()));
    let title = lowered.source_map.title(vertex).to_owned();
    BuildError::Step { title, at, source: Box::new(source) }
}

/// Diff IDs, history with times, config, manifest.
async fn finish(
    engine: &Engine,
    lowered: &Lowered,
    dockerfile: &Arc<Dockerfile>,
    layers: &Layers,
    cache: &BuildCache,
    tree: &Tree,
) -> Result<ImageRecord, BuildError> {
    let chain: Vec<SnapshotId> = match tree.snapshot() {
        Some(top) => engine.snapshots.chain(top)?,
        None => Vec::new(),
    };
    let made: Vec<VertexId> = lowered.history.iter().filter_map(|entry| entry.vertex).collect();
    let inherited = chain.len().saturating_sub(made.len());
    let mut records: Vec<LayerRecord> = Vec::with_capacity(chain.len());
    for (nth, snapshot) in chain.iter().enumerate() {
        let record = layers.record(snapshot).await.map_err(|error| {
            // A layer that cannot be written is the fault of the step that made its files.
            match nth.checked_sub(inherited).and_then(|nth| made.get(nth)) {
                Some(vertex) => step_error(lowered, dockerfile, *vertex, error.into()),
                None => error,
            }
        });
        records.push(record?);
    }
    let mut config = lowered.config.clone();
    let mut own = chain.iter().skip(inherited);
    // An instruction without a layer is as old as what stands before it, so that a build from the
    // cache gives the same bytes again.
    let mut created = config.created.clone();
    for entry in &lowered.history {
        let mut history = entry.history.clone();
        if entry.vertex.is_some()
            && let Some(at) = own.next().and_then(|snapshot| cache.created_unix(snapshot))
        {
            created = Some(rfc3339(at));
        }
        history.created = Some(created.clone().unwrap_or_else(|| rfc3339(0)));
        config.history.push(history);
    }
    config.created = created.or_else(|| Some(rfc3339(0)));
    store_image(engine, &with_layers(config, &records), &records, tree.snapshot().cloned())
}

/// The digest under which users know the image.
impl Built {
    /// The image ID: digest of its config.
    pub fn image_id(&self) -> Digest {
        self.image.config
    }
}
