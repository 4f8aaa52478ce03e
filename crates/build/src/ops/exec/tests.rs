//! Steps as vertices of a solve, with an executor that looks at what it is given instead of running
//! it. Needs root: snapshots are mounted.

mod certificates;
mod resources;
mod trees;

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kiln_content::Store;
use kiln_executor::{Cancel, ExecError, Executor, Exit, Finished, Handles, ProcessSpec, Stdio};
use kiln_frontend::ignore::Patterns;
use kiln_llb::{InputIndex, MountKind, Sharing, Vertex, VertexId};
use kiln_oci::{Mount, SnapshotId};
use kiln_snapshotter::Overlay;
use kiln_solver::{Event, Job, SolveError};
use tempfile::TempDir;

use super::*;
use crate::cache::BuildCache;
use crate::cancel::BuildCancel;
use crate::context::Context;
use crate::layers::Layers;
use crate::ops::Shared;
use crate::registry::Unpulled;
use crate::secrets::SecretSpec;
use crate::{Engine, SshSpec};

/// What a step does, in place of its process.
type Script = Box<dyn Fn(&Inside<'_, '_>) + Send + Sync>;

/// What a process would find.
struct Inside<'a, 's> {
    spec: &'a ProcessSpec,
    handles: &'a Handles,
    stdio: Mutex<Stdio<'s>>,
}

impl Inside<'_, '_> {
    fn mount(&self, target: &str) -> &Mount {
        let found = self.spec.mounts.iter().find(|mount| mount.target() == target);
        found.unwrap_or_else(|| panic!("nothing at {target}: {:?}", self.spec.mounts))
    }

    /// A path for `std::fs` to what is mounted at `target`.
    fn at(&self, target: &str, below: &str) -> PathBuf {
        let Mount::Tree(tree) = self.mount(target) else { panic!("{target} is no tree") };
        let handle = self.handles.inputs[tree.input].as_raw_fd();
        let path = [tree.source.as_str(), below].into_iter().filter(|part| !part.is_empty());
        path.fold(PathBuf::from(format!("/proc/self/fd/{handle}")), |all, part| all.join(part))
    }

    fn read(&self, target: &str, below: &str) -> Option<String> {
        fs::read_to_string(self.at(target, below)).ok()
    }

    fn read_only(&self, target: &str) -> bool {
        matches!(self.mount(target), Mount::Tree(tree) if tree.read_only)
    }

    fn env(&self, name: &str) -> Option<&str> {
        let mut found =
            self.spec.env.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str());
        let value = found.next();
        assert_eq!(found.next(), None, "{name} twice");
        value
    }

    fn print(&self, bytes: &[u8]) {
        if let Stdio::Captured(log) = &mut *self.stdio.lock().unwrap() {
            log(kiln_executor::Stream::Stdout, bytes);
        }
    }

    fn root(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{path}", self.handles.root.as_raw_fd()))
    }
}

struct Scripted {
    script: Mutex<Option<Script>>,
    stubs: PathBuf,
}

impl Executor for Scripted {
    fn run(
        &self,
        handles: Handles,
        spec: &ProcessSpec,
        stdio: Stdio<'_>,
        _: &Cancel,
    ) -> Result<Finished, ExecError> {
        if let Some(script) = &*self.script.lock().unwrap() {
            script(&Inside { spec, handles: &handles, stdio: Mutex::new(stdio) });
        }
        Ok(Exit::Code(0).into())
    }

    fn stub_dir(&self) -> &Path {
        &self.stubs
    }
}

/// A store, a context and what to build from it.
struct Bench {
    temp: TempDir,
    engine: Engine,
    executor: Arc<Scripted>,
    ignore: Patterns,
    request: BuildRequest,
    definition: llb::Definition,
}

impl Bench {
    /// `None`, said aloud, without the rights it takes.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED ALOUD: mounting overlayfs needs root");
            return None;
        }
        let temp = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&temp.path().join("store")).unwrap());
        let snapshots = Arc::new(Overlay::open(&temp.path().join("store/snapshots")).unwrap());
        let stubs = temp.path().join("stubs");
        fs::create_dir(&stubs).unwrap();
        let executor = Arc::new(Scripted { script: Mutex::default(), stubs });
        let engine = Engine::new(store, snapshots, executor.clone()).unwrap();
        fs::create_dir(temp.path().join("context")).unwrap();
        let request = BuildRequest::new(temp.path().join("context"));
        let definition = llb::Definition::default();
        Some(Self { temp, engine, executor, ignore: Patterns::default(), request, definition })
    }

    /// Writes a file of the context; its path.
    fn write(&self, path: &str, content: &str) -> PathBuf {
        let path = self.temp.path().join("context").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn local(&mut self) -> VertexId {
        let local = llb::Local { name: "context".to_owned(), ignore: Vec::new() };
        self.definition.push(Vertex { op: llb::Op::Source(llb::Source::Local(local)), inputs: Vec::new() })
    }

    /// A tree with these files.
    fn tree(&mut self, files: &[(&str, &str)]) -> VertexId {
        let mut actions = Vec::new();
        for &(path, data) in files {
            let parent = path.rsplit_once('/').unwrap().0;
            if !parent.is_empty() {
                let path = parent.to_owned();
                actions.push(llb::FileAction::Mkdir(llb::Mkdir {
                    path,
                    mode: 0o755,
                    owner: None,
                    created: None,
                }));
            }
            let (path, data) = (path.to_owned(), data.to_owned());
            actions.push(llb::FileAction::Mkfile(llb::Mkfile { path, mode: 0o644, data }));
        }
        let op = llb::Op::File(llb::File { base: None, actions });
        self.definition.push(Vertex { op, inputs: Vec::new() })
    }

    fn step(
        &mut self,
        base: Option<VertexId>,
        inputs: &[VertexId],
        change: impl FnOnce(&mut llb::Exec),
    ) -> VertexId {
        let mut exec = llb::Exec {
            base: base.map(|_| InputIndex(0)),
            args: vec!["true".to_owned()],
            env: Vec::new(),
            unkeyed_env: Vec::new(),
            extra_hosts: Vec::new(),
            cwd: "/".to_owned(),
            user: None,
            hostname: "sandbox".to_owned(),
            network: llb::Network::None,
            security: llb::Security::Sandbox,
            mounts: Vec::new(),
            secret_env: Vec::new(),
            cache_ttl: None,
            foreign: None,
        };
        change(&mut exec);
        let inputs = base.into_iter().chain(inputs.iter().copied()).collect();
        self.definition.push(Vertex { op: llb::Op::Exec(exec), inputs })
    }

    /// A step on nothing with these mounts; `InputIndex(0)` is `inputs[0]`.
    fn mounting(&mut self, inputs: &[VertexId], mounts: Vec<llb::Mount>) -> VertexId {
        self.step(None, inputs, |exec| exec.mounts = mounts)
    }

    /// Solves for `target`; also how many steps ran and what they printed.
    fn solve(&self, target: VertexId, script: impl Fn(&Inside<'_, '_>) + Send + Sync + 'static) -> Solved {
        *self.executor.script.lock().unwrap() = Some(Box::new(script));
        let (store, snapshots) = (self.engine.store.clone(), self.engine.snapshots.clone());
        let context = Context::open(
            &self.temp.path().join("context"),
            self.ignore.clone(),
            &self.temp.path().join("state"),
        )
        .unwrap();
        let shared = Arc::new(Shared {
            engine: self.engine.clone(),
            layers: Layers::new(store.clone(), snapshots.clone()),
            contexts: [("context".to_owned(), Tree::Context(Arc::new(context)))].into(),
            unpulled: Unpulled::default(),
            sources: Default::default(),
            cancel: BuildCancel::new().unwrap(),
            steps: StepResources::new(&self.engine, &self.request),
            borrowed: None,
            why: None,
            found: Default::default(),
        });
        let seen: Arc<Mutex<(usize, String)>> = Arc::default();
        let events = seen.clone();
        let exec = |vertex: &Vertex| matches!(vertex.op, llb::Op::Exec(_));
        let steps: Vec<bool> = self.definition.vertices().iter().map(exec).collect();
        let job = Job {
            vertices: self
                .definition
                .vertices()
                .iter()
                .enumerate()
                .map(|(at, vertex)| {
                    BuildOp::new(vertex, &shared).planned(vertex, VertexId(at), "", self.request.no_cache.all)
                })
                .collect(),
            target: target.0,
            cache: Arc::new(BuildCache::new(store, snapshots)),
            cancel: Arc::new(shared.cancel.clone()),
            events: Arc::new(move |event| match event {
                Event::Started { vertex } if steps[vertex] => events.lock().unwrap().0 += 1,
                Event::Log { bytes, .. } => {
                    events.lock().unwrap().1.push_str(&String::from_utf8_lossy(&bytes))
                }
                _ => {}
            }),
        };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        let result = runtime
            .block_on(kiln_solver::solve(job, kiln_solver::Limits { jobs: 4, memory_bytes: u64::MAX }));
        drop((shared, runtime));
        let (ran, log) = std::mem::take(&mut *seen.lock().unwrap());
        let result = result.map(|tree| tree.snapshot().unwrap().clone()).map_err(|error| match error {
            SolveError::Vertex { source, .. } => source,
            other => panic!("{other}"),
        });
        Solved { result, ran, log }
    }

    /// Names in the layer that a step made.
    fn layer(&self, id: &SnapshotId) -> Vec<String> {
        let changes = self.engine.snapshots.open_changes(id).unwrap();
        let mut names: Vec<String> = fs::read_dir(format!("/proc/self/fd/{}", changes.dir.as_raw_fd()))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Everything that steps leave for a time only.
    fn leftovers(&self) -> Vec<String> {
        self.engine.snapshots.list().unwrap().1.iter().map(ToString::to_string).collect()
    }
}

struct Solved {
    result: Result<SnapshotId, OpError>,
    ran: usize,
    log: String,
}

impl Solved {
    #[track_caller]
    fn ok(self) -> SnapshotId {
        self.result.unwrap()
    }

    #[track_caller]
    fn error(self) -> OpError {
        assert_eq!(self.log, "");
        self.result.unwrap_err()
    }
}

fn bind(input: Option<usize>, source: &str, target: &str, writable: bool) -> llb::Mount {
    let bind = llb::BindMount { from: input.map(InputIndex), source: source.to_owned(), writable };
    llb::Mount { target: target.to_owned(), kind: MountKind::Bind(bind) }
}

fn cache(id: &str, target: &str, change: impl FnOnce(&mut llb::CacheMount)) -> llb::Mount {
    let mut cache = llb::CacheMount {
        id: id.to_owned(),
        sharing: Sharing::Shared,
        from: None,
        source: String::new(),
        mode: 0o755,
        uid: 0,
        gid: 0,
        read_only: false,
    };
    change(&mut cache);
    llb::Mount { target: target.to_owned(), kind: MountKind::Cache(cache) }
}

fn wanted(id: &str, required: bool) -> llb::SecretMount {
    llb::SecretMount { id: id.to_owned(), mode: 0o440, uid: 1, gid: 2, required }
}

fn secret(id: &str, target: &str, required: bool) -> llb::Mount {
    llb::Mount { target: target.to_owned(), kind: MountKind::Secret(wanted(id, required)) }
}

/// A store with the secret `token`.
fn secrets(bench: &Bench, value: &str) -> SecretStore {
    let path = bench.temp.path().join("token");
    fs::write(&path, value).unwrap();
    let spec = SecretSpec::parse(&format!("id=token,src={}", path.display())).unwrap();
    SecretStore::new([spec]).unwrap()
}
