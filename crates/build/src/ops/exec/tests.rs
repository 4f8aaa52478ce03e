//! Steps as vertices of a solve, with an executor that looks at what it is given instead of running
//! it. Needs root: snapshots are mounted.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kiln_content::Store;
use kiln_executor::{Cancel, ExecError, Executor, Exit, Handles, ProcessSpec, Stdio};
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
    ) -> Result<Exit, ExecError> {
        if let Some(script) = &*self.script.lock().unwrap() {
            script(&Inside { spec, handles: &handles, stdio: Mutex::new(stdio) });
        }
        Ok(Exit::Code(0))
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
                actions.push(llb::FileAction::Mkdir(llb::Mkdir { path, mode: 0o755, owner: None }));
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
            cwd: "/".to_owned(),
            user: None,
            hostname: "sandbox".to_owned(),
            network: llb::Network::None,
            security: llb::Security::Sandbox,
            mounts: Vec::new(),
            secret_env: Vec::new(),
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
            sources: Default::default(),
            cancel: BuildCancel::new().unwrap(),
            steps: StepResources::new(&self.engine, &self.request),
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
                .map(|vertex| {
                    (Arc::new(BuildOp::new(vertex, &shared)), BuildOp::inputs(vertex), String::new())
                })
                .collect(),
            target: target.0,
            cache: Arc::new(BuildCache::new(store, snapshots, self.request.no_cache)),
            use_cache: !self.request.no_cache,
            parallelism: 4,
            cancel: Arc::new(shared.cancel.clone()),
            events: Arc::new(move |event| match event {
                Event::Started { vertex } if steps[vertex] => events.lock().unwrap().0 += 1,
                Event::Log { bytes, .. } => {
                    events.lock().unwrap().1.push_str(&String::from_utf8_lossy(&bytes))
                }
                _ => {}
            }),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        let result = runtime.block_on(kiln_solver::solve(job));
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

#[test]
fn a_stage_is_shown_read_only_from_its_source_on() {
    let Some(mut bench) = Bench::new() else { return };
    let stage = bench.tree(&[("/src/a", "content"), ("/src/sub/b", "")]);
    let target = bench.mounting(
        &[stage],
        vec![bind(Some(0), "src", "/mnt", false), bind(Some(0), "src/a", "/file", false)],
    );
    let solved = bench.solve(target, |inside| {
        assert_eq!(inside.read("/mnt", "a").unwrap(), "content");
        assert_eq!(inside.read("/file", "").unwrap(), "content");
        assert!(inside.read_only("/mnt") && inside.read_only("/file"));
    });
    solved.ok();
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn writes_to_a_writable_mount_are_thrown_away() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("dir/a", "context");
    let (stage, local) = (bench.tree(&[("/a", "stage")]), bench.local());
    let target = bench.mounting(
        &[stage, local],
        vec![
            bind(Some(0), "", "/stage", true),
            bind(Some(1), "dir", "/context", true),
            bind(None, "", "/none", true),
        ],
    );
    let id = bench
        .solve(target, |inside| {
            for (target, content) in
                [("/stage", Some("stage")), ("/context", Some("context")), ("/none", None)]
            {
                assert!(!inside.read_only(target));
                assert_eq!(inside.read(target, "a").as_deref(), content);
                fs::write(inside.at(target, "a"), "changed").unwrap();
                assert_eq!(inside.read(target, "a").unwrap(), "changed");
            }
        })
        .ok();
    assert_eq!(bench.layer(&id), [""; 0]);
    assert_eq!(fs::read_to_string(bench.temp.path().join("context/dir/a")).unwrap(), "context");
    let again = bench.mounting(&[stage], vec![bind(Some(0), "", "/again", false)]);
    bench.solve(again, |inside| assert_eq!(inside.read("/again", "a").unwrap(), "stage")).ok();
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_context_shows_what_is_not_ignored_as_roots_files() {
    let Some(mut bench) = Bench::new() else { return };
    bench.ignore =
        Patterns::from_lines(&["*.log".to_owned(), "out".to_owned(), "!out/keep".to_owned()]).unwrap();
    for path in ["main.go", "debug.log", "out/drop", "out/keep", "sub/x"] {
        bench.write(path, path);
    }
    rustix::fs::chown(bench.write("owned", ""), Some(rustix::fs::Uid::from_raw(1000)), None).unwrap();
    fs::set_permissions(bench.write("script", ""), fs::Permissions::from_mode(0o755)).unwrap();
    let _socket = UnixListener::bind(bench.temp.path().join("context/socket")).unwrap();
    symlink("/etc/passwd", bench.temp.path().join("context/link")).unwrap();
    let local = bench.local();
    let target =
        bench.mounting(&[local], vec![bind(Some(0), "", "/src", false), bind(Some(0), "sub/x", "/x", false)]);
    let solved = bench.solve(target, |inside| {
        for (path, there) in [
            ("main.go", true),
            ("debug.log", false),
            ("out/drop", false),
            ("out/keep", true),
            ("socket", false),
        ] {
            assert_eq!(inside.at("/src", path).exists(), there, "{path}");
        }
        assert_eq!(inside.read("/x", "").unwrap(), "sub/x");
        assert_eq!(fs::metadata(inside.at("/src", "owned")).unwrap().uid(), 0);
        assert_eq!(fs::metadata(inside.at("/src", "script")).unwrap().mode() & 0o7777, 0o755);
        assert!(fs::symlink_metadata(inside.at("/src", "link")).unwrap().is_symlink());
    });
    solved.ok();
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_context_is_copied_once_for_all_steps_of_a_build() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("a", "first");
    let local = bench.local();
    let mount = || vec![bind(Some(0), "", "/src", false)];
    let one = bench.mounting(&[local], mount());
    let two = bench.step(Some(one), &[local], |exec| {
        exec.mounts = vec![bind(Some(1), "", "/src", false)];
    });
    let places: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let seen = places.clone();
    let solved = bench.solve(two, move |inside| {
        let stat = fs::metadata(inside.at("/src", "a")).unwrap();
        seen.lock().unwrap().push((stat.dev(), stat.ino()));
    });
    assert_eq!(solved.ran, 2);
    solved.ok();
    let places = places.lock().unwrap();
    assert_eq!(places[0], places[1]);
}

#[test]
fn a_step_runs_again_when_what_it_mounts_changed_and_only_then() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("src/a", "first");
    let local = bench.local();
    let target = bench.mounting(&[local], vec![bind(Some(0), "src", "/src", false)]);
    assert_eq!(bench.solve(target, |_| {}).ran, 1);
    assert_eq!(bench.solve(target, |_| {}).ran, 0);
    bench.write("beside", "no part of it");
    assert_eq!(bench.solve(target, |_| {}).ran, 0);
    bench.write("src/a", "second");
    assert_eq!(bench.solve(target, |_| {}).ran, 1);
}

#[test]
fn a_stage_that_changed_where_nothing_is_mounted_from_changes_no_step() {
    let Some(mut bench) = Bench::new() else { return };
    let mut ran = |beside: &str| {
        bench.definition = llb::Definition::default();
        let stage = bench.tree(&[("/src/a", "same"), ("/beside", beside)]);
        let target = bench.mounting(&[stage], vec![bind(Some(0), "src", "/src", false)]);
        bench.solve(target, |_| {}).ran
    };
    assert_eq!([ran("first"), ran("second")], [1, 0]);
}

#[test]
fn a_base_that_is_mounted_too_counts_by_its_key() {
    let exec = |mounts| llb::Exec {
        base: Some(InputIndex(0)),
        args: Vec::new(),
        env: Vec::new(),
        unkeyed_env: Vec::new(),
        cwd: "/".to_owned(),
        user: None,
        hostname: String::new(),
        network: llb::Network::None,
        security: llb::Security::Sandbox,
        mounts,
        secret_env: Vec::new(),
    };
    let seeded = cache("c", "/c", |cache| cache.from = Some(InputIndex(2)));
    let exec = exec(vec![bind(Some(0), "", "/a", false), bind(Some(1), "", "/b", false), seeded]);
    let uses = [0, 1, 2].map(|position| input_use(&exec, position));
    assert_eq!(uses, [InputUse::Definition, InputUse::Content, InputUse::Content]);
}

#[test]
fn a_missing_source_is_told_as_copy_tells_it() {
    let Some(mut bench) = Bench::new() else { return };
    bench.ignore = Patterns::from_lines(&["*.log".to_owned()]).unwrap();
    bench.write("main.go", "");
    bench.write("a.log", "");
    let (stage, local) = (bench.tree(&[("/source", "")]), bench.local());
    let mut missing = |input: VertexId, source: &str| {
        let target = bench.mounting(&[input], vec![bind(Some(0), source, "/mnt", false)]);
        match bench.solve(target, |_| panic!("it must not run")).error() {
            OpError::NoSource { path, ignored_by, similar, .. } => (path, ignored_by, similar),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(missing(local, "mian.go"), ("mian.go".to_owned(), None, Some("main.go".to_owned())));
    assert_eq!(missing(local, "a.log").1, Some(1));
    assert_eq!(missing(stage, "sorce"), ("sorce".to_owned(), None, Some("source".to_owned())));
    let target = bench.mounting(&[], vec![bind(None, "x", "/mnt", false)]);
    assert!(matches!(bench.solve(target, |_| {}).error(), OpError::NoSource { .. }));
}

#[test]
fn a_source_is_a_plain_path_even_if_it_looks_like_a_pattern() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("a[1]/x", "bracket");
    bench.write("a1/x", "plain");
    bench.write("*/x", "star");
    bench.write("back\\[slash/x", "backslash");
    let local = bench.local();
    for (source, content) in [("a[1]", "bracket"), ("*", "star"), ("back\\[slash", "backslash")] {
        let target = bench.mounting(&[local], vec![bind(Some(0), source, "/mnt", false)]);
        bench.solve(target, move |inside| assert_eq!(inside.read("/mnt", "x").unwrap(), content)).ok();
    }
    let target = bench.mounting(&[local], vec![bind(Some(0), "b?", "/mnt", false)]);
    let error = bench.solve(target, |_| {}).error();
    assert!(matches!(&error, OpError::NoSource { path, .. } if path == "b?"), "{error:?}");
}

#[test]
fn a_source_that_leads_out_of_its_tree_leads_to_its_root() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("etc/passwd", "inside");
    symlink("/etc", bench.temp.path().join("context/link")).unwrap();
    symlink("../../../../../../etc/passwd", bench.temp.path().join("context/up")).unwrap();
    let local = bench.local();
    let target =
        bench.mounting(&[local], vec![bind(Some(0), "link", "/a", false), bind(Some(0), "up", "/b", false)]);
    let solved = bench.solve(target, |inside| {
        assert_eq!(inside.read("/a", "passwd").unwrap(), "inside");
        assert_eq!(inside.read("/b", "").unwrap(), "inside");
    });
    solved.ok();
}

#[test]
fn targets_stand_below_the_tree_and_leave_the_layer_alone() {
    let Some(mut bench) = Bench::new() else { return };
    bench.request.secrets = secrets(&bench, "hunter2hunter2");
    let base = bench.tree(&[("/run/x", "")]);
    let target = bench.step(Some(base), &[], |exec| {
        exec.mounts = vec![
            secret("token", "/run/secrets/token", true),
            cache("c", "/root/.cache/deep", |_| {}),
            secret("missing", "/run/secrets/missing", false),
        ];
    });
    let id = bench
        .solve(target, |inside| {
            assert!(inside.root("run/secrets/token").is_file() && inside.root("root/.cache/deep").is_dir());
            assert!(!inside.root("run/secrets/missing").exists());
            assert_eq!(fs::metadata(inside.root("run/secrets/token")).unwrap().len(), 0);
            fs::write(inside.root("made"), "").unwrap();
        })
        .ok();
    assert_eq!(bench.layer(&id), ["made"]);
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn parents_are_mounted_before_what_is_below_them() {
    let Some(mut bench) = Bench::new() else { return };
    let target = bench.mounting(
        &[],
        vec![cache("b", "/a/b/c", |_| {}), cache("a", "/a", |_| {}), cache("c", "/z", |_| {})],
    );
    let solved = bench.solve(target, |inside| {
        let order: Vec<&str> = inside.spec.mounts.iter().map(Mount::target).collect();
        assert_eq!(order, ["/a", "/z", "/a/b/c"]);
    });
    solved.ok();
}

#[test]
fn a_mount_over_the_sandbox_is_refused_before_anything_runs() {
    let Some(mut bench) = Bench::new() else { return };
    for at in ["/", "/proc", "/sys/fs", "/dev", "/dev/null"] {
        let target = bench.mounting(&[], vec![cache("c", at, |_| {})]);
        let error = bench.solve(target, |_| panic!("it must not run")).error();
        assert!(
            matches!(&error, OpError::Exec(ExecError::Refused { target, .. }) if target == at),
            "{error:?}"
        );
    }
}

#[test]
fn a_cache_outlives_its_step_and_is_no_part_of_the_layer() {
    let Some(mut bench) = Bench::new() else { return };
    let one = bench.mounting(&[], vec![cache("go", "/cache", |_| {})]);
    let two = bench.mounting(&[], vec![cache("go", "/elsewhere", |cache| cache.read_only = true)]);
    let id = bench.solve(one, |inside| fs::write(inside.at("/cache", "x"), "kept").unwrap()).ok();
    assert_eq!(bench.layer(&id), [""; 0]);
    let solved = bench.solve(two, |inside| {
        assert_eq!(inside.read("/elsewhere", "x").unwrap(), "kept");
        assert!(inside.read_only("/elsewhere"));
    });
    assert_eq!(solved.ran, 1);
    solved.ok();
    // Another cache is the same step: what a cache holds is no part of a result.
    let other = bench.mounting(&[], vec![cache("other", "/cache", |_| {})]);
    assert_eq!(bench.solve(other, |_| {}).ran, 0);
    bench.request.no_cache = true;
    bench.solve(two, |inside| assert_eq!(inside.read("/elsewhere", "x"), None)).ok();
}

#[test]
fn a_cache_starts_from_its_seed() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("file", "");
    let (stage, local) = (bench.tree(&[("/seed/sub/x", "planted"), ("/other", "")]), bench.local());
    let seeded = |input: usize, source: &str| {
        let source = source.to_owned();
        vec![cache("go", "/cache", |cache| (cache.from, cache.source) = (Some(InputIndex(input)), source))]
    };
    let target = bench.mounting(&[stage], seeded(0, "seed"));
    let check = |inside: &Inside<'_, '_>| {
        assert_eq!(inside.read("/cache", "sub/x").unwrap(), "planted");
        assert!(!inside.at("/cache", "other").exists());
    };
    bench.solve(target, check).ok();
    let missing = bench.mounting(&[stage], seeded(0, "sead"));
    assert!(matches!(bench.solve(missing, |_| {}).error(), OpError::NoSource { .. }));
    bench.write("dir/x", "from the context");
    let context = bench.mounting(&[local], seeded(0, "dir"));
    bench.solve(context, |inside| assert_eq!(inside.read("/cache", "x").unwrap(), "from the context")).ok();
    let file = bench.mounting(&[local], seeded(0, "file"));
    assert!(matches!(bench.solve(file, |_| {}).error(), OpError::Read { .. }));
}

/// A store with the secret `token`.
fn secrets(bench: &Bench, value: &str) -> SecretStore {
    let path = bench.temp.path().join("token");
    fs::write(&path, value).unwrap();
    let spec = SecretSpec::parse(&format!("id=token,src={}", path.display())).unwrap();
    SecretStore::new([spec]).unwrap()
}

#[test]
fn secrets_reach_the_step_and_no_log_no_layer_and_no_key() {
    let Some(mut bench) = Bench::new() else { return };
    bench.request.secrets = secrets(&bench, "hunter2hunter2\n");
    let target = bench.step(None, &[], |exec| {
        exec.mounts = vec![secret("token", "/run/secrets/token", true)];
        let (name, id) = ("TOKEN".to_owned(), "token".to_owned());
        exec.secret_env = vec![llb::SecretEnv { name, id, required: true }];
        exec.env = vec![("TOKEN".to_owned(), "of the image".to_owned())];
    });
    let solved = bench.solve(target, |inside| {
        let Mount::File(file) = inside.mount("/run/secrets/token") else { panic!("no file") };
        assert_eq!((file.mode, file.uid, file.gid), (0o440, 1, 2));
        let mut content = File::from(inside.handles.inputs[file.input].try_clone().unwrap());
        content.rewind().unwrap();
        let mut text = String::new();
        content.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hunter2hunter2\n");
        assert_eq!(inside.env("TOKEN"), Some("hunter2hunter2\n"));
        for chunk in ["token is hun", "ter2hunt", "er2, says the step\nhunter2"] {
            inside.print(chunk.as_bytes());
        }
    });
    assert_eq!(solved.log, "token is ***, says the step\nhunter2");
    let id = solved.ok();
    assert_eq!(bench.layer(&id), [""; 0]);
    // Another value is the same step.
    bench.request.secrets = secrets(&bench, "another value");
    assert_eq!(bench.solve(target, |_| {}).ran, 0);
}

#[test]
fn a_required_secret_that_is_missing_stops_the_step() {
    let Some(mut bench) = Bench::new() else { return };
    let file = bench.mounting(&[], vec![secret("token", "/run/secrets/token", true)]);
    let env = bench.step(None, &[], |exec| {
        let (name, id) = ("TOKEN".to_owned(), "token".to_owned());
        exec.secret_env = vec![llb::SecretEnv { name, id, required: true }];
    });
    for target in [file, env] {
        let error = bench.solve(target, |_| panic!("it must not run")).error();
        assert!(matches!(&error, OpError::NoSecret { id } if id == "token"), "{error:?}");
    }
    let optional = bench.step(None, &[], |exec| {
        let (name, id) = ("TOKEN".to_owned(), "token".to_owned());
        exec.secret_env = vec![llb::SecretEnv { name, id, required: false }];
        exec.mounts = vec![secret("token", "/run/secrets/token", false)];
    });
    let solved = bench.solve(optional, |inside| {
        assert_eq!((inside.env("TOKEN"), inside.spec.mounts.len()), (None, 0));
    });
    solved.ok();
}

#[test]
fn a_step_gets_a_socket_that_leads_to_the_agent() {
    let Some(mut bench) = Bench::new() else { return };
    let path = bench.temp.path().join("agent");
    let _agent = UnixListener::bind(&path).unwrap();
    let spec = SshSpec::parse(&format!("default={}", path.display())).unwrap();
    bench.request.ssh = SshAgents::new([spec]).unwrap();
    let mount = |id: &str, required: bool| llb::Mount {
        target: "/run/buildkit/ssh_agent.0".to_owned(),
        kind: MountKind::Ssh(wanted(id, required)),
    };
    let target = bench.mounting(&[], vec![mount("default", true)]);
    let real = fs::metadata(&path).unwrap().ino();
    let solved = bench.solve(target, move |inside| {
        let stat = fs::metadata(inside.at("/run/buildkit/ssh_agent.0", "")).unwrap();
        assert!(stat.file_type().is_socket() && stat.ino() != real);
        assert_eq!((stat.mode() & 0o777, stat.uid(), stat.gid()), (0o440, 1, 2));
    });
    solved.ok();
    assert_eq!(bench.leftovers(), [""; 0]);
    let missing = bench.mounting(&[], vec![mount("other", true)]);
    assert!(matches!(bench.solve(missing, |_| {}).error(), OpError::NoAgent { .. }));
    let optional = bench.mounting(&[], vec![mount("other", false)]);
    bench.solve(optional, |inside| assert_eq!(inside.spec.mounts.len(), 0)).ok();
}

#[test]
fn the_environment_has_each_name_once_and_proxies_only_where_the_step_says_nothing() {
    let Some(mut bench) = Bench::new() else { return };
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let target = bench.step(None, &[], |exec| {
        exec.env = vec![pair("A", "1"), pair("HTTP_PROXY", "own"), pair("A", "2")];
        exec.unkeyed_env = vec![pair("HTTP_PROXY", "given"), pair("NO_PROXY", "given")];
        exec.hostname = "elsewhere".to_owned();
    });
    let solved = bench.solve(target, |inside| {
        let values = ["A", "HTTP_PROXY", "NO_PROXY"].map(|name| inside.env(name));
        assert_eq!(values, [Some("2"), Some("own"), Some("given")]);
        assert_eq!(inside.spec.hostname, "elsewhere");
    });
    solved.ok();
}

#[test]
fn what_was_not_allowed_does_not_run() {
    let Some(mut bench) = Bench::new() else { return };
    let host = bench.step(None, &[], |exec| exec.network = llb::Network::Host);
    let insecure = bench.step(None, &[], |exec| exec.security = llb::Security::Insecure);
    for (target, needed) in [(host, Entitlement::NetworkHost), (insecure, Entitlement::SecurityInsecure)] {
        let error = bench.solve(target, |_| panic!("it must not run")).error();
        assert!(matches!(error, OpError::NotAllowed { entitlement } if entitlement == needed), "{error:?}");
    }
    bench.request.allow.insert(Entitlement::SecurityInsecure);
    bench.solve(insecure, |inside| assert_eq!(inside.spec.security, Security::Insecure)).ok();
    assert!(bench.solve(host, |_| {}).result.is_err());
    bench.request.network = llb::Network::Host;
    bench.solve(host, |inside| assert_eq!(inside.spec.network, Network::Host)).ok();
}
