//! What is mounted below a process's root, and what must not be.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use kiln_executor::{Cancel, ExecError, Exit, ProcessSpec, Security, check_mount_target, detach};
use kiln_oci::{FileMount, Mount, TmpfsMount, TreeMount};

use crate::harness::{Sandbox, shell};

fn tree(source: &str, target: &str, read_only: bool) -> Mount {
    Mount::Tree(TreeMount { input: 0, source: source.to_owned(), target: target.to_owned(), read_only })
}

fn tmpfs(target: &str, size_bytes: Option<u64>) -> Mount {
    Mount::Tmpfs(TmpfsMount { target: target.to_owned(), size_bytes, mode: None, executable: true })
}

fn with(script: &str, mounts: Vec<Mount>) -> ProcessSpec {
    ProcessSpec { mounts, ..shell(script) }
}

/// A directory of the host beside the root, as an input.
fn outside(sandbox: &Sandbox, files: &[(&str, &str)]) -> (std::path::PathBuf, OwnedFd) {
    let dir = sandbox.dir.path().join("outside");
    for (name, content) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let open = File::open(&dir).unwrap();
    let tree = detach(open.as_fd()).unwrap();
    (dir, tree)
}

/// Standard output of a script that must succeed with these mounts.
#[track_caller]
fn output(sandbox: &Sandbox, spec: &ProcessSpec, inputs: Vec<OwnedFd>) -> String {
    let (result, out, err) = sandbox.run_with(spec, inputs, &Cancel::new().unwrap());
    assert_eq!(result.unwrap(), Exit::Code(0), "{err}");
    out
}

#[test]
fn a_tree_is_seen_at_its_target_and_not_written_to() {
    let Some(sandbox) = Sandbox::new() else { return };
    let (dir, input) = outside(&sandbox, &[("a/file", "content")]);
    let script = "cat /mnt/deep/a/file; touch /mnt/deep/new 2>/dev/null || echo refused";
    let spec = with(script, vec![tree("", "/mnt/deep", true)]);
    assert_eq!(output(&sandbox, &spec, vec![input]), "contentrefused\n");
    assert!(!sandbox.path("mnt").exists(), "the mount's target is taken out again");
    assert_eq!(fs::read_dir(dir).unwrap().count(), 1);
}

#[test]
fn a_writable_tree_keeps_what_was_written() {
    let Some(sandbox) = Sandbox::new() else { return };
    let (dir, input) = outside(&sandbox, &[("a/file", "")]);
    let spec = with("echo kept > /cache/new", vec![tree("a", "/cache", false)]);
    output(&sandbox, &spec, vec![input]);
    assert_eq!(fs::read_to_string(dir.join("a/new")).unwrap(), "kept\n");
}

#[test]
fn one_file_of_a_tree_can_be_mounted() {
    let Some(sandbox) = Sandbox::new() else { return };
    let (_, input) = outside(&sandbox, &[("a/file", "content"), ("a/other", "")]);
    let spec = with("cat /opt/x; ls /opt", vec![tree("a/file", "/opt/x", true)]);
    assert_eq!(output(&sandbox, &spec, vec![input]), "contentx\n");
    assert!(!sandbox.path("opt").exists());
}

#[test]
fn a_source_that_is_a_link_stays_inside_its_tree() {
    let Some(sandbox) = Sandbox::new() else { return };
    let (dir, input) = outside(&sandbox, &[("etc/passwd", "inside")]);
    symlink("/etc", dir.join("link")).unwrap();
    symlink("../../../../etc/passwd", dir.join("up")).unwrap();
    let again = detach(File::open(&dir).unwrap().as_fd()).unwrap();
    let second = Mount::Tree(TreeMount {
        input: 1,
        source: "up".to_owned(),
        target: "/up".to_owned(),
        read_only: true,
    });
    let spec = with("cat /link/passwd /up", vec![tree("link", "/link", true), second]);
    assert_eq!(output(&sandbox, &spec, vec![input, again]), "insideinside");
}

#[test]
fn more_inputs_than_one_message_carries_arrive() {
    let Some(sandbox) = Sandbox::new() else { return };
    let (dir, first) = outside(&sandbox, &[("f", "x")]);
    let mut inputs = vec![first];
    let mut mounts = vec![tree("", "/m/0", true)];
    for input in 1..100 {
        inputs.push(detach(File::open(&dir).unwrap().as_fd()).unwrap());
        let (source, target) = ("f".to_owned(), format!("/m/{input}"));
        mounts.push(Mount::Tree(TreeMount { input, source, target, read_only: true }));
    }
    assert_eq!(output(&sandbox, &with("cat /m/0/f /m/1 /m/99", mounts), inputs), "xxx");
}

fn secret(content: &str, target: &str, mode: u32) -> (Mount, OwnedFd) {
    let memory = rustix::fs::memfd_create("secret", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(memory);
    file.write_all(content.as_bytes()).unwrap();
    let mount = FileMount { input: 0, target: target.to_owned(), mode, uid: 1000, gid: 1001 };
    (Mount::File(mount), file.into())
}

#[test]
fn a_secret_has_its_mode_and_owner_and_lies_in_memory() {
    let Some(sandbox) = Sandbox::new() else { return };
    let (mount, input) = secret("hunter2", "/run/secrets/key", 0o400);
    let script = "cat /run/secrets/key; stat -c ' %a %u %g' /run/secrets/key; stat -f -c %T /run/secrets/key; \
                  echo x > /run/secrets/key || echo refused; rm -f /run/secrets/key; ls /run/secrets";
    let out = output(&sandbox, &with(script, vec![mount]), vec![input]);
    assert_eq!(out, "hunter2 400 1000 1001\ntmpfs\nrefused\nkey\n");
    assert!(!sandbox.path("run").exists(), "nothing of it stays in the tree");
}

#[test]
fn a_secret_is_readable_by_its_owner_alone() {
    let Some(sandbox) = Sandbox::new() else { return };
    let (mount, input) = secret("hunter2", "/key", 0o400);
    let mut spec = with("cat /key", vec![mount]);
    spec.user = Some("app".to_owned());
    assert_eq!(output(&sandbox, &spec, vec![input]), "hunter2");
    let (mount, input) = secret("hunter2", "/key", 0o400);
    let mut spec = with("cat /key 2>/dev/null || echo refused", vec![mount]);
    spec.user = Some("2000".to_owned());
    assert_eq!(output(&sandbox, &spec, vec![input]), "refused\n");
}

/// Busybox has no client for a socket with a path; perl has, and its libraries come along.
const CLIENT: &str = "exec perl -MIO::Socket::UNIX -e \
    'print readline(IO::Socket::UNIX->new(Peer => \"/run/agent\") || die \"no answer: $!\")'";

#[test]
fn a_socket_of_the_host_answers_inside() {
    let Some(sandbox) = Sandbox::new() else { return };
    if !Path::new("/usr/bin/perl").exists() || !Path::new("/lib").is_symlink() {
        eprintln!("SKIPPED ALOUD: needs perl below a merged /usr");
        return;
    }
    for link in ["lib", "lib64"] {
        symlink(format!("usr/{link}"), sandbox.path(link)).unwrap();
    }
    let path = sandbox.dir.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let socket = rustix::fs::open(&path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    let inputs = vec![detach(socket.as_fd()).unwrap(), detach(File::open("/usr").unwrap().as_fd()).unwrap()];
    let usr = TreeMount { input: 1, source: String::new(), target: "/usr".to_owned(), read_only: true };
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"hello from outside\n").unwrap();
    });
    let mut spec = with(CLIENT, vec![tree("", "/run/agent", true), Mount::Tree(usr)]);
    spec.env = vec![("PATH".to_owned(), "/bin:/usr/bin".to_owned())];
    assert_eq!(output(&sandbox, &spec, inputs), "hello from outside\n");
    server.join().unwrap();
}

#[test]
fn a_tmpfs_has_its_size_and_leaves_nothing() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mounts = vec![tmpfs("/scratch", Some(1 << 20)), tmpfs("/dev/shm", Some(4096))];
    let script = "echo x > /scratch/f && stat -f -c '%T %b %S' /scratch /dev/shm; \
                  head -c 2000000 /dev/zero > /scratch/big 2>/dev/null || echo full";
    assert_eq!(output(&sandbox, &with(script, mounts), vec![]), "tmpfs 256 4096\ntmpfs 1 4096\nfull\n");
    assert!(!sandbox.path("scratch").exists());
}

#[test]
fn mounts_over_what_the_sandbox_keeps_are_refused() {
    let Some(sandbox) = Sandbox::new() else { return };
    symlink("/proc", sandbox.path("link")).unwrap();
    symlink("/", sandbox.path("top")).unwrap();
    symlink("/dev/null", sandbox.path("null")).unwrap();
    for target in
        ["/", "/proc", "/sys", "/dev", "/dev/tty", "/proc/sys/kernel", "/link", "/link/self", "/top"]
    {
        let spec = with("true", vec![tmpfs(target, None)]);
        let result = sandbox.run_spec(&spec, &Cancel::new().unwrap()).0;
        assert!(matches!(result, Err(ExecError::Refused { .. })), "{target}: {result:?}");
    }
    let (mount, input) = secret("x", "/null", 0o400);
    let result = sandbox.run_with(&with("true", vec![mount]), vec![input], &Cancel::new().unwrap()).0;
    assert!(matches!(result, Err(ExecError::Refused { .. })), "{result:?}");
    assert!(check_mount_target("/dev/shm/x").is_ok());
}

#[test]
fn a_file_and_a_directory_do_not_cover_each_other() {
    let Some(sandbox) = Sandbox::new() else { return };
    let result = sandbox.run_spec(&with("true", vec![tmpfs("/etc/passwd", None)]), &Cancel::new().unwrap()).0;
    assert!(matches!(result, Err(ExecError::Refused { .. })), "{result:?}");
    let (mount, input) = secret("x", "/etc", 0o400);
    let result = sandbox.run_with(&with("true", vec![mount]), vec![input], &Cancel::new().unwrap()).0;
    assert!(matches!(result, Err(ExecError::Refused { .. })), "{result:?}");
}

#[test]
fn a_link_in_the_way_of_a_target_is_followed_inside_only() {
    let Some(sandbox) = Sandbox::new() else { return };
    let host = sandbox.dir.path().join("host");
    fs::create_dir(&host).unwrap();
    fs::create_dir(sandbox.path("real")).unwrap();
    symlink("/real", sandbox.path("var-run")).unwrap();
    symlink(&host, sandbox.path("out")).unwrap();
    symlink("../gone/dir", sandbox.path("etc/dangling")).unwrap();
    let mounts = vec![tmpfs("/var-run/a", None), tmpfs("/out/b", None), tmpfs("/etc/dangling", None)];
    let script = "stat -f -c %T /real/a /out/b /gone/dir";
    assert_eq!(output(&sandbox, &with(script, mounts), vec![]), "tmpfs\ntmpfs\ntmpfs\n");
    assert_eq!(fs::read_dir(&host).unwrap().count(), 0, "the host's directory is not touched");
    assert_eq!(fs::read_dir(sandbox.path("real")).unwrap().count(), 0);
    assert!(!sandbox.path("gone").exists());
}

#[test]
fn an_image_whose_resolv_conf_is_a_link_to_nothing_works() {
    let Some(sandbox) = Sandbox::new() else { return };
    fs::remove_file(sandbox.path("etc/resolv.conf")).unwrap();
    symlink("../run/systemd/resolve/stub-resolv.conf", sandbox.path("etc/resolv.conf")).unwrap();
    sandbox.sh("cat /etc/resolv.conf");
    assert!(!sandbox.path("run").exists());
}

#[test]
fn a_target_that_somebody_filled_meanwhile_is_left_alone() {
    let Some(sandbox) = Sandbox::new() else { return };
    let spec = with("echo x > /new/file", vec![tmpfs("/new/mnt", None)]);
    output(&sandbox, &spec, vec![]);
    assert!(sandbox.path("new/file").exists() && !sandbox.path("new/mnt").exists());
}

#[test]
fn devices_made_inside_do_not_open() {
    let Some(sandbox) = Sandbox::new() else { return };
    let script = "mknod /zero c 1 5; mknod /dev/zero2 c 1 5; mknod /dev/shm/zero c 1 5; mknod /t/zero c 1 5; \
                  for f in /zero /dev/zero2 /dev/shm/zero /t/zero; do [ -c $f ] || echo missing $f; \
                  head -c 1 $f 2>/dev/null && echo opened $f; done; head -c 1 /dev/zero | wc -c; echo > /dev/null";
    let out = output(&sandbox, &with(script, vec![tmpfs("/t", None)]), vec![]);
    assert_eq!(out, "1\n");
    assert_eq!(fs::metadata("/dev/null").unwrap().rdev(), 0x103, "the host's device is what it was");
}

#[test]
fn an_insecure_process_has_every_capability_and_a_whole_proc_and_sys() {
    let Some(sandbox) = Sandbox::new() else { return };
    let script = "while read -r k v; do case $k in CapEff*|CapBnd*) echo $v;; esac; done < /proc/self/status; \
                  mount -t tmpfs none /tmp && echo mounted; cat /proc/timer_list >/dev/null && echo unmasked; \
                  echo changed > /proc/sys/kernel/hostname && hostname; while read -r a b c d where how rest; do \
                  [ $where = /sys ] && echo ${how%%,*}; done < /proc/self/mountinfo; \
                  mknod /dev/zero2 c 1 5 && head -c 1 /dev/zero2 | wc -c";
    let mut spec = shell(script);
    spec.security = Security::Insecure;
    let out = output(&sandbox, &spec, vec![]);
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("CapPrm:")).unwrap().trim().to_owned();
    let expected = format!("{own}\n{own}\nmounted\nunmasked\nchanged\nrw\n1\n");
    assert_eq!(out, expected);
}
