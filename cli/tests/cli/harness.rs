//! A store with the busybox image in it, build contexts, and the ways to run `kiln` on them.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kiln_testkit::faults::Traced;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;
use wait4::Wait4;

const PATH: &str = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Returns from the test, aloud, unless it runs as root, or as one of the users of `cargo xtask users`.
macro_rules! needs_root {
    () => {
        if !$crate::harness::can_build() {
            eprintln!("SKIPPED ALOUD: needs root");
            return;
        }
    };
}
pub(crate) use needs_root;

/// Whether builds are expected to work for who runs the test.
pub(crate) fn can_build() -> bool {
    rustix::process::geteuid().is_root() || test_as().is_some()
}

/// Which ids the user has in whose name the test runs, `range` or `single`; `None`: root's.
pub(crate) fn test_as() -> Option<&'static str> {
    static IDS: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    IDS.get_or_init(|| std::env::var("KILN_TEST_AS").ok()).as_deref()
}

/// What a finished command left.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    pub(crate) fn of(output: Output) -> Outcome {
        Outcome {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// What a traced command left.
    pub(crate) fn of_traced(Traced { code, stdout, stderr, .. }: Traced) -> Outcome {
        Outcome { code, stdout, stderr }
    }

    /// Fails the test unless the exit code is this.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Outcome {
        assert_eq!(self.code, Some(code), "\nstdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Fails the test unless stderr contains each of these.
    #[track_caller]
    pub(crate) fn says(self, texts: &[&str]) -> Outcome {
        for text in texts {
            assert!(self.stderr.contains(text), "stderr lacks `{text}`:\n{}", self.stderr);
        }
        self
    }

    /// Titles of the steps, without `[stage n/m]`, with whether they came from the cache.
    pub(crate) fn steps(&self) -> Vec<(String, bool)> {
        let title = |line: &str| {
            let (number, rest) = line.strip_prefix('#')?.split_once(' ')?;
            let (_, title) = rest.strip_prefix('[')?.split_once("] ")?;
            Some((number.to_owned(), title.to_owned()))
        };
        let mut seen: Vec<(String, String)> = Vec::new();
        for (number, title) in self.stderr.lines().filter_map(title) {
            if seen.iter().all(|(known, _)| *known != number) {
                seen.push((number, title));
            }
        }
        let is_cached = |line: &str, number: &str| {
            let rest = line.strip_prefix(&format!("#{number} CACHED"));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(" from "))
        };
        // What was found elsewhere and could not be fetched is run after all.
        let was_run =
            |number: &str| self.stderr.lines().any(|line| line.starts_with(&format!("#{number} DONE")));
        let cached =
            |number: &str| self.stderr.lines().any(|line| is_cached(line, number)) && !was_run(number);
        seen.iter().map(|(number, title)| (title.clone(), cached(number))).collect()
    }

    /// Steps other than FROM and the context that were executed.
    pub(crate) fn ran(&self) -> Vec<String> {
        let instruction =
            |title: &str| ["RUN", "COPY", "ADD", "WORKDIR"].contains(&title.split(' ').next().unwrap_or(""));
        let steps = self.steps().into_iter();
        steps.filter(|(title, cached)| !cached && instruction(title)).map(|(title, _)| title).collect()
    }
}

/// A store below a temporary directory, gone with this value.
pub(crate) struct Store {
    dir: TempDir,
    /// What the directory is in; goes after it.
    _memory: Option<Memory>,
}

/// A file system in memory, of 2 GiB at most, unmounted with this value.
struct Memory(TempDir);

impl Memory {
    fn mount() -> Memory {
        let place = tempdir();
        let options = Some(c"size=2g,nr_inodes=1m");
        mount("tmpfs", place.path(), "tmpfs", MountFlags::empty(), options).expect("root may mount");
        Memory(place)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Mounts of kiln's that are left go with their processes.
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

fn tempdir() -> TempDir {
    tempfile::tempdir().expect("temporary directories can be made")
}

/// Where a campaign's store is. What is not about disks is some times faster without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Disk,
    Memory,
}

impl Store {
    /// An empty store.
    pub(crate) fn empty() -> Store {
        Store { dir: tempdir(), _memory: None }
    }

    /// An empty store at that place. Who may not mount has it on the disk.
    pub(crate) fn empty_at(place: Place) -> Store {
        let memory = (place == Place::Memory && rustix::process::geteuid().is_root()).then(Memory::mount);
        let dir = memory.as_ref().map_or_else(tempfile::tempdir, |memory| tempfile::tempdir_in(&memory.0));
        Store { dir: dir.expect("temporary directories can be made"), _memory: memory }
    }

    /// A store with `busybox:latest`.
    pub(crate) fn with_busybox() -> Store {
        let store = Store::empty();
        let tar = busybox_tar(store.dir.path());
        store.ok(&["import", text(&tar), "busybox:latest", "-c", "CMD [\"sh\"]", "-c", PATH]);
        store
    }

    /// The same with [`few_commands_tar`]: for campaigns, which write and check every layer hundreds of times.
    pub(crate) fn with_few_commands(place: Place) -> Store {
        let store = Store::empty_at(place);
        let tar = few_commands_tar(store.dir.path());
        store.ok(&["import", text(&tar), "busybox:latest", "-c", "CMD [\"sh\"]", "-c", PATH]);
        store
    }

    /// Where the store is.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// A place beside the store.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command line of kiln on this store.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command.args(args).env("KILN_ROOT", self.root()).stdin(Stdio::null());
        command.env_remove("SOURCE_DATE_EPOCH");
        // No test may depend on what registries have, or on there being any.
        command.env("KILN_PULL", "never");
        // Servers of these tests are on loopback, and nobody's proxy knows them.
        for name in ["http_proxy", "https_proxy", "all_proxy", "no_proxy"] {
            command.env_remove(name).env_remove(name.to_uppercase());
        }
        command
    }

    /// Runs kiln to its end.
    pub(crate) fn kiln(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(args).output().expect("kiln starts"))
    }

    /// Runs kiln and expects 0.
    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> Outcome {
        self.kiln(args).expect(0)
    }

    /// `kiln build --progress plain ARGS CONTEXT`.
    pub(crate) fn build(&self, context: &Context, args: &[&str]) -> Outcome {
        self.kiln(&build_line(context.path(), args))
    }

    /// Builds as [`Store::build`] does, and holds kiln to what every input is bound to.
    #[track_caller]
    pub(crate) fn build_bounded(&self, context: &Context, args: &[&str]) -> Outcome {
        self.build_from(context.path(), args)
    }

    /// The same with anything that can stand in the place of a context.
    #[track_caller]
    pub(crate) fn build_from(&self, context: &str, args: &[&str]) -> Outcome {
        self.bounded(self.command(&build_line(context, args)))
    }

    /// The same with these bytes on standard input.
    #[track_caller]
    pub(crate) fn build_piped(&self, input: &[u8], context: &str, args: &[&str]) -> Outcome {
        let mut file = tempfile::tempfile().expect("temporary files can be made");
        file.write_all(input).and_then(|()| file.rewind()).expect("ours to write");
        let mut command = self.command(&build_line(context, args));
        command.stdin(file);
        self.bounded(command)
    }

    /// Runs a command to its end, and holds kiln to what every input is bound to: a minute,
    /// 256 MiB of memory, no panic, nothing left mounted or half-written.
    #[track_caller]
    pub(crate) fn bounded(&self, mut command: Command) -> Outcome {
        // Files, because wait4(2) reaps the child: nobody may be left to empty a pipe.
        let file = || tempfile::tempfile().expect("temporary files can be made");
        let (mut stdout, mut stderr) = (file(), file());
        let handle = |file: &fs::File| file.try_clone().expect("there are file descriptors left");
        let started = Instant::now();
        let child = command.stdout(handle(&stdout)).stderr(handle(&stderr)).spawn().expect("kiln starts");
        let used = child.wait4().expect("our child");
        let took = started.elapsed();
        let read = |file: &mut fs::File| {
            let mut bytes = Vec::new();
            file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("ours to read");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let outcome =
            Outcome { code: used.status.code(), stdout: read(&mut stdout), stderr: read(&mut stderr) };
        assert!(outcome.code.is_some_and(|code| code != 101), "panic or signal: {outcome:?}");
        assert!(!outcome.stderr.contains("panicked at"), "{}", outcome.stderr);
        assert!(took < Duration::from_secs(60), "took {took:?}:\n{}", outcome.stderr);
        let rss_mib = used.rusage.maxrss >> 20;
        assert!(rss_mib < 256, "{rss_mib} MiB of memory:\n{}", outcome.stderr);
        assert_eq!(self.active_snapshots(), [""; 0], "active snapshots are left");
        assert_eq!(self.mounts(), [""; 0], "mounts are left");
        outcome
    }

    /// Builds a Dockerfile that needs no context, as `name`.
    #[track_caller]
    pub(crate) fn image(&self, name: &str, dockerfile: &str) {
        self.build(&Context::new(&[("Dockerfile", dockerfile)]), &["-t", name]).expect(0);
    }

    /// stdout of a shell command in a container of `image`.
    #[track_caller]
    pub(crate) fn shell(&self, image: &str, script: &str) -> String {
        let args = ["run", "--rm", "--network", "none", "--entrypoint", "/bin/sh", image, "-c", script];
        self.ok(&args).stdout.trim_end().to_owned()
    }

    /// The first object of `kiln inspect`.
    #[track_caller]
    pub(crate) fn inspect(&self, image: &str) -> serde_json::Value {
        let json = self.ok(&["inspect", image]).stdout;
        let mut all: serde_json::Value = serde_json::from_str(&json).expect("inspect prints JSON");
        all[0].take()
    }

    /// An image's config as it is in the store, history and all.
    #[track_caller]
    pub(crate) fn config(&self, image: &str) -> serde_json::Value {
        let id = self.inspect(image)["Id"].as_str().expect("a digest").replace("sha256:", "");
        let blob = self.root().join("blobs/sha256").join(&id[..2]).join(&id);
        let json = fs::read(blob).expect("configs are blobs");
        serde_json::from_slice(&json).expect("JSON")
    }

    /// All that the store holds which is no temporary file: images, blobs, committed snapshots but the
    /// one of a failed step.
    #[track_caller]
    pub(crate) fn holds(&self) -> (String, Vec<String>) {
        let mut files = Vec::new();
        for part in ["blobs", "snapshots/committed"] {
            list(&self.root().join(part), 4, &mut files);
        }
        files.sort();
        if let Some(kept) = self.kept() {
            files.retain(|path| !path.ends_with(&format!("/{kept}")));
        }
        (self.ok(&["images", "--quiet"]).stdout, files)
    }

    /// The snapshot that `kiln shell` would show of the last step that failed.
    pub(crate) fn kept(&self) -> Option<String> {
        let record = fs::read(self.root().join("state/failed-build.json")).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
        Some(record["failed"]["snapshot"].as_str()?.to_owned())
    }

    /// How many committed snapshots there are, that one too.
    pub(crate) fn snapshots(&self) -> usize {
        let mut files = Vec::new();
        list(&self.root().join("snapshots/committed"), 1, &mut files);
        files.len()
    }

    /// Checks everything that the store holds; what is wrong with it.
    pub(crate) fn sound(&self) -> Result<(), String> {
        let outcome = self.kiln(&["fsck", "--deep"]);
        if outcome.code == Some(0) { Ok(()) } else { Err(format!("{}{}", outcome.stdout, outcome.stderr)) }
    }

    /// Active snapshots: what steps in flight write to.
    pub(crate) fn active_snapshots(&self) -> Vec<String> {
        let mut found = Vec::new();
        list(&self.root().join("snapshots/active"), 1, &mut found);
        found
    }

    /// Lines of any process's mount table that mention this store, once the kernel had its time.
    pub(crate) fn mounts(&self) -> Vec<String> {
        let root = self.dir.path().to_string_lossy().into_owned();
        left(|| {
            let tables = processes().filter_map(|process| fs::read_to_string(process.join("mountinfo")).ok());
            let lines = tables.flat_map(|table| table.lines().map(str::to_owned).collect::<Vec<_>>());
            lines.filter(|line| line.contains(&root)).collect()
        })
    }

    /// Behind a command that was told to end and took so long. What has not ended within a second and a half is
    /// left where it is, and the next command tidies up: on a busy machine there is such a one.
    pub(crate) fn tidy_after(&self, took: Duration) {
        if took > Duration::from_secs(1) {
            self.ok(&["images"]);
        }
    }
}

pub(crate) fn build_line<'a>(context: &'a str, args: &[&'a str]) -> Vec<&'a str> {
    [&["build", "--progress", "plain"], args, &[context]].concat()
}

// Snapshots hold whole trees; their names are enough.
fn list(dir: &Path, depth: u32, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        found.push(entry.path().to_string_lossy().into_owned());
        if depth > 1 && !dir.ends_with("committed") && entry.path().is_dir() {
            list(&entry.path(), depth - 1, found);
        }
    }
}

/// A directory with a Dockerfile and whatever it copies, gone with this value.
pub(crate) struct Context {
    dir: TempDir,
}

impl Context {
    /// Writes these files, making their directories.
    pub(crate) fn new(files: &[(&str, &str)]) -> Context {
        let context = Context { dir: tempdir() };
        for (name, content) in files {
            context.write(name, content);
        }
        context
    }

    /// Writes or replaces a file.
    pub(crate) fn write(&self, name: &str, content: &str) {
        let path = self.dir.path().join(name);
        fs::create_dir_all(path.parent().expect("below the context")).expect("ours to write");
        fs::write(&path, content).expect("ours to write");
    }

    /// As an argument.
    pub(crate) fn path(&self) -> &str {
        text(self.dir.path())
    }

    /// A place in it.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// A kiln that runs while the test goes on; killed with this value, if it has not ended.
pub(crate) struct Running {
    /// Until it is waited for.
    child: Option<Child>,
    stderr: BufReader<std::process::ChildStderr>,
    seen: String,
}

impl Running {
    /// Starts a command with its stderr read by us.
    pub(crate) fn start(mut command: Command) -> Running {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("kiln starts");
        let stderr = BufReader::new(child.stderr.take().expect("piped above"));
        Running { child: Some(child), stderr, seen: String::new() }
    }

    /// Waits until a line of stderr contains `mark`.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, mark: &str) {
        loop {
            let mut line = String::new();
            let read = self.stderr.read_line(&mut line).expect("stderr is text");
            self.seen.push_str(&line);
            assert!(read > 0, "kiln ended before it printed `{mark}`:\n{}", self.seen);
            if line.contains(mark) {
                return;
            }
        }
    }

    fn child(&self) -> &Child {
        self.child.as_ref().expect("nobody has waited for it")
    }

    /// kiln's number.
    pub(crate) fn id(&self) -> u32 {
        self.child().id()
    }

    /// Sends a signal to kiln alone.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(self.child());
        rustix::process::kill_process(pid, signal).expect("our child is not reaped yet");
    }

    /// Waits for the end.
    pub(crate) fn end(mut self) -> Outcome {
        let _ = self.stderr.read_to_string(&mut self.seen);
        let child = self.child.take().expect("nobody has waited for it");
        let mut outcome = Outcome::of(child.wait_with_output().expect("our child"));
        outcome.stderr = std::mem::take(&mut self.seen);
        outcome
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Processes with this word among their arguments.
pub(crate) fn processes_with(argument: &str) -> Vec<String> {
    let command_lines = processes().filter_map(|process| fs::read(process.join("cmdline")).ok());
    let words = command_lines.map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "));
    words.filter(|line| line.split(' ').any(|word| word == argument)).collect()
}

/// The same once the kernel had its time: what is killed takes a moment to go.
pub(crate) fn processes_left(argument: &str) -> Vec<String> {
    left(|| processes_with(argument))
}

/// What `look` still finds after ten seconds, if it finds anything so long.
pub(crate) fn left(look: impl Fn() -> Vec<String>) -> Vec<String> {
    let begun = Instant::now();
    loop {
        let found = look();
        if found.is_empty() || begun.elapsed() > Duration::from_secs(10) {
            return found;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How long commands took to end that were told to: two seconds are promised. A busy machine may take longer for
/// one of them, but neither for most nor for ever.
#[derive(Default)]
pub(crate) struct Ends(Vec<Duration>);

impl Ends {
    #[track_caller]
    pub(crate) fn add(&mut self, what: &str, took: Duration) {
        assert!(took < Duration::from_secs(10), "{what}: it ended after {took:?}");
        self.0.push(took);
    }

    #[track_caller]
    pub(crate) fn check(mut self, what: &str) {
        self.0.sort();
        let median = self.0.get((self.0.len().max(1) - 1) / 2);
        assert!(median.is_none_or(|took| *took < Duration::from_secs(2)), "{what}: {:?}", self.0);
    }

    /// As [`Ends::check`]; and one of them at least did not wait until it was given up.
    #[track_caller]
    pub(crate) fn check_at_once(self, what: &str) {
        let grace = Duration::from_millis(1500);
        assert!(self.0.iter().any(|took| *took < grace), "{what}: {:?}", self.0);
        self.check(what);
    }

    pub(crate) fn slowest(&self) -> Duration {
        self.0.iter().max().copied().unwrap_or_default()
    }
}

/// Whether a process catches a signal by now, or has it wait: before that, it does what it does to any.
pub(crate) fn minds(pid: u32, signal: rustix::process::Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let bits = |name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
    };
    (bits("SigBlk:") | bits("SigCgt:")) >> (signal.as_raw() - 1) & 1 == 1
}

fn processes() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    entries.map(|entry| entry.path()).filter(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
    })
}

/// Gives a file to somebody else where the test's user may; where not, it stays his.
pub(crate) fn give_away(path: &Path, uid: u32, gid: u32) {
    match std::os::unix::fs::chown(path, Some(uid), Some(gid)) {
        Err(_) if test_as().is_some() => {}
        other => other.expect("root may"),
    }
}

/// Whom files belong to that kiln writes for the test's user.
pub(crate) fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Paths of this test suite are UTF-8.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// A base tree that `cargo xtask test` made.
pub(crate) fn base(name: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("KILN_TEST_BASES")?;
    let tar = Path::new(&dir).join(name);
    tar.is_file().then_some(tar)
}

/// A tar file of a busybox root file system.
pub(crate) fn busybox_tar(scratch: &Path) -> PathBuf {
    if let Some(tar) = base("busybox.tar") {
        return tar;
    }
    let tree = scratch.join("busybox");
    for dir in ["bin", "etc", "root", "tmp"] {
        fs::create_dir_all(tree.join(dir)).expect("ours to write");
    }
    fs::set_permissions(tree.join("tmp"), Permissions::from_mode(0o1777)).expect("ours");
    fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("busybox-static is installed");
    let applets = Command::new("/bin/busybox").arg("--list").output().expect("busybox runs").stdout;
    for applet in String::from_utf8_lossy(&applets).lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", tree.join("bin").join(applet)).expect("applets have one name each");
    }
    fs::write(tree.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").expect("ours to write");
    fs::write(tree.join("etc/group"), "root:x:0:\n").expect("ours to write");
    let tar = scratch.join("busybox.tar");
    // Whoever packs it has the same bytes.
    let mut packed = Command::new("tar");
    packed.args(["--sort=name", "--mtime=@0", "-C"]).arg(&tree).arg("-cf").arg(&tar).arg(".");
    let packed = packed.status();
    assert!(packed.expect("tar runs").success());
    tar
}

/// The same with a shell and a few commands only, a twentieth of the entries: files, links and directories of
/// all kinds are there, and what is done with one is done with each.
pub(crate) fn few_commands_tar(scratch: &Path) -> PathBuf {
    const COMMANDS: [&str; 9] = ["busybox", "cat", "cp", "echo", "rm", "sh", "sleep", "touch", "true"];
    let few = scratch.join("few-commands.tar");
    let mut all = tar::Archive::new(fs::File::open(busybox_tar(scratch)).expect("ours to read"));
    let mut kept = tar::Builder::new(fs::File::create(&few).expect("ours to write"));
    for entry in all.entries().expect("a tar file") {
        let mut entry = entry.expect("a tar file");
        let path = entry.path().expect("a path").into_owned();
        let is_command = path.parent().is_some_and(|dir| dir.ends_with("bin"));
        if is_command && !COMMANDS.iter().any(|name| path.ends_with(name)) {
            continue;
        }
        let header = entry.header().clone();
        kept.append(&header, &mut entry).expect("ours to write");
    }
    kept.finish().expect("ours to write");
    few
}
