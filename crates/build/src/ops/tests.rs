//! File ops as vertices of a solve. Needs root: files get owners, snapshots are mounted.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use kiln_content::Store;
use kiln_executor::{Cancel, ExecError, Executor, Exit, Finished, Handles, ProcessSpec, Stdio};
use kiln_frontend::ignore::Patterns;
use kiln_layer::{ScanOptions, scan};
use kiln_llb::{FileAction, InputIndex, Vertex, VertexId};
use kiln_snapshotter::Overlay;
use kiln_solver::{Event, Job, SolveError};
use tempfile::TempDir;

use super::*;
use crate::BuildRequest;
use crate::cache::BuildCache;
use crate::context::Context;

/// File ops start no processes.
struct NoProcesses;

impl Executor for NoProcesses {
    fn run(&self, _: Handles, _: &ProcessSpec, _: Stdio<'_>, _: &Cancel) -> Result<Finished, ExecError> {
        Ok(Exit::Code(127).into())
    }

    fn stub_dir(&self) -> &Path {
        Path::new("/")
    }
}

/// A store, a context and what to build from it.
struct Bench {
    temp: TempDir,
    engine: Engine,
    context: Arc<Context>,
    definition: llb::Definition,
}

impl Bench {
    /// `None`, said aloud, without the rights it takes.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting overlayfs needs root");
            return None;
        }
        let temp = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&temp.path().join("store")).unwrap());
        let snapshots = Arc::new(Overlay::open(&temp.path().join("snapshots")).unwrap());
        let engine = Engine::new(store, snapshots, Arc::new(NoProcesses)).unwrap();
        fs::create_dir(temp.path().join("context")).unwrap();
        let context =
            Context::open(&temp.path().join("context"), Patterns::default(), &temp.path().join("state"))
                .unwrap();
        Some(Self { temp, engine, context: Arc::new(context), definition: llb::Definition::default() })
    }

    fn context(&self, path: &str) -> PathBuf {
        let path = self.temp.path().join("context").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn push(&mut self, op: llb::Op, inputs: &[VertexId]) -> VertexId {
        self.definition.push(Vertex { op, inputs: inputs.to_vec() })
    }

    fn local(&mut self) -> VertexId {
        let local = llb::Local { name: "context".to_owned(), ignore: Vec::new() };
        self.push(llb::Op::Source(llb::Source::Local(local)), &[])
    }

    /// Files, as `path`, mode and content, and directories, which end in a slash.
    fn files(&mut self, base: Option<VertexId>, files: &[(&str, u32, &str)]) -> VertexId {
        let actions = files.iter().map(|&(path, mode, data)| match path.strip_suffix('/') {
            Some(path) => {
                FileAction::Mkdir(llb::Mkdir { path: path.to_owned(), mode, owner: None, created: None })
            }
            None => FileAction::Mkfile(llb::Mkfile { path: path.to_owned(), mode, data: data.to_owned() }),
        });
        let file = llb::File { base: base.map(|_| InputIndex(0)), actions: actions.collect() };
        self.push(llb::Op::File(file), &base.into_iter().collect::<Vec<_>>())
    }

    fn copy(&mut self, base: Option<VertexId>, from: VertexId, copy: llb::Copy) -> VertexId {
        let inputs: Vec<VertexId> = base.into_iter().chain([from]).collect();
        let copy = llb::Copy { from: InputIndex(inputs.len() - 1), ..copy };
        let file = llb::File { base: base.map(|_| InputIndex(0)), actions: vec![FileAction::Copy(copy)] };
        self.push(llb::Op::File(file), &inputs)
    }

    fn merge(&mut self, base: VertexId, layer: VertexId) -> VertexId {
        let merge = llb::Merge { base: Some(InputIndex(0)), layer: InputIndex(1) };
        self.push(llb::Op::Merge(merge), &[base, layer])
    }

    /// Solves for `target`; also says which vertices ran.
    fn solve(&self, target: VertexId) -> (Result<SnapshotId, OpError>, Vec<usize>, String) {
        let (store, snapshots) = (self.engine.store.clone(), self.engine.snapshots.clone());
        let shared = Arc::new(Shared {
            unpulled: Unpulled::default(),
            sources: Default::default(),
            engine: self.engine.clone(),
            layers: Layers::new(store.clone(), snapshots.clone()),
            contexts: [("context".to_owned(), Tree::Context(self.context.clone()))].into(),
            cancel: BuildCancel::new().unwrap(),
            steps: StepResources::new(&self.engine, &BuildRequest::new(PathBuf::new())),
            borrowed: None,
            why: None,
            found: Default::default(),
        });
        let seen: Arc<Mutex<(Vec<usize>, String)>> = Arc::default();
        let events = seen.clone();
        let vertices = self.definition.vertices().iter();
        let job = Job {
            vertices: vertices
                .enumerate()
                .map(|(at, vertex)| BuildOp::new(vertex, &shared).planned(vertex, VertexId(at), "", false))
                .collect(),
            target: target.0,
            cache: Arc::new(BuildCache::new(store, snapshots)),
            cancel: Arc::new(shared.cancel.clone()),
            events: Arc::new(move |event| match event {
                Event::Started { vertex } => events.lock().unwrap().0.push(vertex),
                Event::Log { bytes, .. } => {
                    events.lock().unwrap().1.push_str(&String::from_utf8_lossy(&bytes));
                }
                _ => {}
            }),
        };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        let result = runtime.block_on(async {
            let solved = kiln_solver::solve(job, kiln_solver::Limits { jobs: 4, memory_bytes: u64::MAX })
                .await
                .map_err(|error| match error {
                    SolveError::Vertex { source, .. } => source,
                    other => panic!("{other}"),
                });
            let id = solved?.snapshot().cloned().expect("a snapshot");
            for snapshot in self.engine.snapshots.chain(&id).unwrap() {
                shared.layers.record(&snapshot).await.unwrap();
            }
            Ok(id)
        });
        let (ran, log) = std::mem::take(&mut *seen.lock().unwrap());
        (result, ran, log)
    }

    /// What `target` holds, a line an entry: path, kind and mode, owner.
    #[track_caller]
    fn check(&self, target: VertexId, expected: &[&str]) {
        let id = self.solve(target).0.unwrap();
        let view = self.engine.snapshots.open_view(&id).unwrap();
        let never = std::sync::atomic::AtomicBool::new(false);
        let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: &never };
        let lines: Vec<String> = scan(view.as_fd(), b"", &options)
            .unwrap()
            .into_iter()
            .skip(1)
            .map(|entry| {
                let path = String::from_utf8_lossy(&entry.path).into_owned();
                match &entry.kind {
                    kiln_layer::EntryKind::Dir => {
                        format!("{path}/ {:o} {}:{}", entry.mode, entry.uid, entry.gid)
                    }
                    kiln_layer::EntryKind::Symlink { target } => {
                        format!("{path} -> {}", String::from_utf8_lossy(target))
                    }
                    _ => format!("{path} {:o} {}:{}", entry.mode, entry.uid, entry.gid),
                }
            })
            .collect();
        assert_eq!(lines, expected);
    }

    fn text(&self, target: VertexId, path: &str) -> String {
        let id = self.solve(target).0.unwrap();
        let view = self.engine.snapshots.open_view(&id).unwrap();
        let path = format!("/proc/self/fd/{}/{path}", std::os::fd::AsRawFd::as_raw_fd(&view));
        fs::read_to_string(path).unwrap()
    }
}

fn copy(source: &str, destination: &str) -> llb::Copy {
    let (destination, into) = match destination.strip_suffix('/') {
        Some(path) if !path.is_empty() => (path, true),
        _ => (destination, destination == "/"),
    };
    llb::Copy {
        from: InputIndex(0),
        sources: vec![source.to_owned()],
        destination: destination.to_owned(),
        destination_is_dir: into,
        owner: llb::Owner::Root,
        mode: None,
        parents: false,
        exclude: Vec::new(),
        unpack: llb::Unpack::Never,
    }
}

fn chmod(mode: &str, copy: llb::Copy) -> llb::Copy {
    llb::Copy { mode: Some(mode.parse().unwrap()), ..copy }
}

fn chown(owner: &str, copy: llb::Copy) -> llb::Copy {
    llb::Copy { owner: llb::Owner::Named(owner.to_owned()), ..copy }
}

#[test]
fn octal_modes_and_owners_are_for_directories_made_on_the_way_too() {
    let Some(mut bench) = Bench::new() else { return };
    fs::write(bench.context("f"), "").unwrap();
    symlink("f", bench.context("d/link")).unwrap();
    fs::create_dir(bench.context("d/sub")).unwrap();
    let context = bench.local();
    let base = bench.files(None, &[("/there/", 0o711, "")]);
    let one = bench.copy(Some(base), context, chmod("600", chown("5:6", copy("f", "/new/"))));
    bench.check(one, &["new/ 600 5:6", "new/f 600 5:6", "there/ 711 0:0"]);
    let two = bench.copy(None, context, chmod("4750", copy("d", "/a/b")));
    bench.check(two, &["a/ 750 0:0", "a/b/ 750 0:0", "a/b/link -> f", "a/b/sub/ 4750 0:0"]);
    let three = bench.copy(Some(base), context, chmod("700", chown("5", copy("f", "/there"))));
    bench.check(three, &["there/ 711 0:0", "there/f 700 5:5"]);
    let symbolic = bench.copy(None, context, chmod("go-rwx,u+X", copy("d", "/x/y")));
    bench.check(symbolic, &["x/ 755 0:0", "x/y/ 755 0:0", "x/y/link -> f", "x/y/sub/ 700 0:0"]);
}

#[test]
fn a_stages_owners_are_kept_and_its_directories_parents_are_not() {
    let Some(mut bench) = Bench::new() else { return };
    fs::write(bench.context("f"), "").unwrap();
    let context = bench.local();
    let stage = bench.copy(None, context, chmod("640", chown("7:8", copy("f", "/src/in/"))));
    let keep = |from: &str, to: &str| llb::Copy { owner: llb::Owner::Keep, ..copy(from, to) };
    let plain = bench.copy(None, stage, keep("src/in", "/out"));
    bench.check(plain, &["out/ 755 0:0", "out/f 640 7:8"]);
    let parents = bench.copy(None, stage, llb::Copy { parents: true, ..keep("src/in/f", "/out/") });
    bench
        .check(parents, &["out/ 755 0:0", "out/src/ 640 7:8", "out/src/in/ 640 7:8", "out/src/in/f 640 7:8"]);
}

#[test]
fn destinations_are_followed_through_links_inside_the_root() {
    let Some(mut bench) = Bench::new() else { return };
    for (link, target) in
        [("links/abs", "/real"), ("links/up", "../../../real/sub"), ("links/file", "/real/f")]
    {
        symlink(target, bench.context(link)).unwrap();
    }
    fs::write(bench.context("f"), "new").unwrap();
    let context = bench.local();
    let base = bench.files(None, &[("/real/f", 0o600, "old")]);
    let base = bench.copy(Some(base), context, copy("links", "/"));
    let mut check = |source: &str, to: &str, at: &str| {
        let target = bench.copy(Some(base), context, copy(source, to));
        assert_eq!(bench.text(target, at), "new", "{to}");
    };
    check("f", "/abs/", "real/f");
    check("f", "/up/x", "real/sub/x");
    check("f", "/file", "real/f");
    check("f", "/abs/x/", "real/x/f");
}

#[test]
fn several_files_need_a_directory() {
    let Some(mut bench) = Bench::new() else { return };
    for name in ["a", "b", "d/c"] {
        fs::write(bench.context(name), name).unwrap();
    }
    let context = bench.local();
    let base = bench.files(None, &[("/dir/", 0o755, ""), ("/file", 0o644, "")]);
    let sources = |sources: &[&str], to: &str| llb::Copy {
        sources: sources.iter().map(|&source| source.to_owned()).collect(),
        ..copy("", to)
    };
    for (from, to) in [(&["a", "b"][..], "/new"), (&["[ab]"], "/new"), (&["a", "b"], "/file")] {
        let target = bench.copy(Some(base), context, sources(from, to));
        assert!(matches!(bench.solve(target).0, Err(OpError::ManyToOne { .. })), "{from:?} {to}");
    }
    let onto = |target, says: &str, bench: &Bench| {
        let error = bench.solve(target).0.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    };
    let target = bench.copy(Some(base), context, copy("d", "/file"));
    onto(target, "cannot copy to non-directory", &bench);
    let target = bench.copy(Some(base), context, copy("a", "/file/"));
    onto(target, "cannot copy to non-directory", &bench);
    let inside = bench.files(Some(base), &[("/dir/a/", 0o755, "")]);
    let target = bench.copy(Some(inside), context, copy("a", "/dir"));
    onto(target, "cannot replace directory \"dir/a\" with a file", &bench);
    let files = ["dir/ 755 0:0", "dir/a 644 0:0", "dir/b 644 0:0", "file 644 0:0"];
    let target = bench.copy(Some(base), context, sources(&["a", "b"], "/dir"));
    bench.check(target, &files);
    let target = bench.copy(Some(base), context, sources(&["d", "a"], "/dir"));
    bench.check(target, &["dir/ 755 0:0", "dir/a 644 0:0", "dir/c 644 0:0", "file 644 0:0"]);
}

#[test]
fn a_heredocs_file_is_written_whatever_stood_there() {
    let Some(mut bench) = Bench::new() else { return };
    let base = bench.files(None, &[("/d/a", 0o600, "a longer text")]);
    let target = bench.files(Some(base), &[("/d/a", 0o4644, "new"), ("/e/b", 0o755, "")]);
    assert_eq!(bench.text(target, "d/a"), "new");
    bench.check(target, &["d/ 755 0:0", "d/a 4644 0:0", "e/ 755 0:0", "e/b 755 0:0"]);
    let onto = bench.files(Some(base), &[("/d", 0o644, "")]);
    assert!(matches!(bench.solve(onto).0, Err(OpError::Write { .. })));
}

/// A tar with one file of user 3, in a directory of its own.
fn tar() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o640);
    header.set_uid(3);
    header.set_gid(3);
    header.set_size(2);
    header.set_mtime(1);
    tar.append_data(&mut header, "in/file", &b"hi"[..]).unwrap();
    tar.into_inner().unwrap()
}

#[test]
fn add_unpacks_what_is_an_archive_by_its_content() {
    let Some(mut bench) = Bench::new() else { return };
    let gzip = |bytes: &[u8]| {
        let mut encoder = kiln_layer::Codec::GZIP.encoder(Vec::new()).unwrap();
        std::io::Write::write_all(&mut encoder, bytes).unwrap();
        encoder.finish().unwrap()
    };
    fs::write(bench.context("a.txt"), tar()).unwrap();
    fs::write(bench.context("b"), gzip(&tar())).unwrap();
    fs::write(bench.context("c.tar"), "no tar at all").unwrap();
    fs::write(bench.context("d.tar.gz"), gzip(b"no tar either")).unwrap();
    fs::write(bench.context("empty.tar"), [0; 1024]).unwrap();
    let context = bench.local();
    let add = |source: &str, to: &str| llb::Copy { unpack: llb::Unpack::Archives, ..copy(source, to) };
    let unpacked = ["x/ 755 0:0", "x/in/ 755 0:0", "x/in/file 640 3:3"];
    for archive in ["a.txt", "b"] {
        let target = bench.copy(None, context, add(archive, "/x"));
        bench.check(target, &unpacked);
    }
    let target = bench.copy(None, context, chown("5:6", chmod("777", add("b", "/x"))));
    bench.check(target, &["x/ 755 5:6", "x/in/ 755 0:0", "x/in/file 640 5:6"]);
    for plain in ["c.tar", "d.tar.gz", "empty.tar"] {
        let target = bench.copy(None, context, add(plain, "/x"));
        bench.check(target, &["x 644 0:0"]);
    }
    let target = bench.copy(None, context, copy("a.txt", "/x"));
    bench.check(target, &["x 644 0:0"]);
}

#[test]
fn a_merge_shows_the_layer_on_the_base_and_shares_its_diff_id() {
    let Some(mut bench) = Bench::new() else { return };
    fs::write(bench.context("f"), "layer").unwrap();
    let context = bench.local();
    let layer = bench.copy(None, context, chmod("750", copy("f", "/etc/app/")));
    let bases: Vec<VertexId> = ["one", "two"]
        .map(|name| bench.files(None, &[("/etc/", 0o700, ""), (&format!("/etc/{name}"), 0o644, "")]))
        .to_vec();
    let merged: Vec<VertexId> = bases.iter().map(|&base| bench.merge(base, layer)).collect();
    bench.check(merged[0], &["etc/ 750 0:0", "etc/app/ 750 0:0", "etc/app/f 750 0:0", "etc/one 644 0:0"]);
    let (top, _, _) = bench.solve(merged[1]);
    bench.check(merged[1], &["etc/ 750 0:0", "etc/app/ 750 0:0", "etc/app/f 750 0:0", "etc/two 644 0:0"]);
    let store = &bench.engine.store;
    let record = |id: &SnapshotId| store.layer(id).unwrap().expect("a record");
    let (own, merged_record) = (record(&bench.solve(layer).0.unwrap()), record(&top.unwrap()));
    assert_eq!((own.diff_id, own.size_bytes), (merged_record.diff_id, merged_record.size_bytes));
    let written =
        crate::layers::write_tar(&*bench.engine.snapshots, &merged_record.snapshot, std::io::sink());
    assert_eq!(written.unwrap().diff_id, own.diff_id);
}

#[test]
fn another_base_does_not_copy_a_linked_layer_again() {
    let Some(mut bench) = Bench::new() else { return };
    fs::write(bench.context("f"), "layer").unwrap();
    let context = bench.local();
    let layer = bench.copy(None, context, copy("f", "/f"));
    let one = bench.files(None, &[("/one", 0o644, "")]);
    let merged = bench.merge(one, layer);
    assert!(bench.solve(merged).1.contains(&layer.0));
    let two = bench.files(None, &[("/two", 0o644, "")]);
    let other = bench.merge(two, layer);
    let (result, ran, _) = bench.solve(other);
    result.unwrap();
    assert!(ran.contains(&other.0) && !ran.contains(&layer.0), "{ran:?}");
}

#[test]
fn fifos_of_a_context_are_left_out_aloud() {
    let Some(mut bench) = Bench::new() else { return };
    fs::write(bench.context("d/f"), "").unwrap();
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o644));
    rustix::fs::mknodat(rustix::fs::CWD, bench.context("d/pipe"), kind, mode, 0).unwrap();
    assert!(fs::metadata(bench.context("d/pipe")).unwrap().file_type().is_fifo());
    let context = bench.local();
    let target = bench.copy(None, context, copy("d", "/x"));
    let (result, _, log) = bench.solve(target);
    result.unwrap();
    assert!(log.contains("warning: d/pipe"), "{log:?}");
    bench.check(target, &["x/ 755 0:0", "x/f 644 0:0"]);
}

#[test]
fn hard_links_modes_and_times_of_a_context_arrive() {
    let Some(mut bench) = Bench::new() else { return };
    fs::write(bench.context("d/a"), "").unwrap();
    fs::hard_link(bench.context("d/a"), bench.context("d/b")).unwrap();
    fs::set_permissions(bench.context("d/a"), fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::chown(bench.context("d/a"), Some(1000), Some(1000)).unwrap();
    fs::set_permissions(bench.context("d/a"), fs::Permissions::from_mode(0o4711)).unwrap();
    let modified = fs::metadata(bench.context("d/a")).unwrap();
    let context = bench.local();
    let target = bench.copy(None, context, copy("d", "/x/"));
    bench.check(target, &["x/ 755 0:0", "x/a 4711 0:0", "x/b 4711 0:0"]);
    let id = bench.solve(target).0.unwrap();
    let changes = bench.engine.snapshots.open_changes(&id).unwrap();
    let stat = rustix::fs::statat(&changes.dir, "x/b", rustix::fs::AtFlags::empty()).unwrap();
    assert_eq!((stat.st_nlink, stat.st_mtime), (2, modified.mtime()));
}
