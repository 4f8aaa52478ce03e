//! A tree with busybox, and the ways to run something on it.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use kiln_executor::{
    Cancel, ExecError, Executor, Exit, Handles, Linux, Network, ProcessSpec, Stdio, Stream, Usage,
};
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

pub(crate) struct Sandbox {
    pub(crate) dir: tempfile::TempDir,
    /// What the last process used.
    pub(crate) usage: Mutex<Usage>,
    pub(crate) linux: Linux,
}

impl Sandbox {
    /// `None`, said aloud, where the tests cannot run.
    pub(crate) fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED ALOUD: needs root");
            return None;
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().map(Path::new).find(|path| path.exists());
        let Some(busybox) = busybox else {
            eprintln!("SKIPPED ALOUD: needs the package busybox-static");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for path in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        fs::copy(busybox, root.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "cat", "ls", "ps", "id", "sleep", "echo", "true", "setsid", "hostname", "mount", "nc",
            "ip", "touch", "readlink", "kill", "env", "pwd", "mknod", "stat", "mkdir", "rm", "ln", "head",
            "tr", "wc", "find", "sort", "chroot", "df", "umount",
        ] {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        for file in ["resolv.conf", "hosts", "hostname"] {
            fs::write(root.join("etc").join(file), "").unwrap();
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n")
            .unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\napp:x:1001:\naudio:x:29:app\n").unwrap();
        let probe = PathBuf::from(env!("CARGO_BIN_EXE_kiln-init-probe"));
        let linux = Linux::open_with(&dir.path().join("state"), probe).unwrap();
        Some(Self { dir, linux, usage: Mutex::default() })
    }

    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().join("root").join(inside)
    }

    /// Makes `/bin/NAME` of a C program; false, said aloud, where there is no compiler.
    pub(crate) fn compile(&self, name: &str, source: &str) -> bool {
        let file = self.dir.path().join(format!("{name}.c"));
        fs::write(&file, source).unwrap();
        let mut compiler = std::process::Command::new("cc");
        compiler.args(["-static", "-O1", "-o"]).arg(self.path("bin").join(name)).arg(file);
        let made = compiler.status().is_ok_and(|status| status.success());
        if !made {
            eprintln!("SKIPPED ALOUD: needs cc and a static C library");
        }
        made
    }

    pub(crate) fn tree(&self) -> OwnedFd {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(CWD, self.path(""), flags).unwrap()
    }

    pub(crate) fn run_spec(
        &self,
        spec: &ProcessSpec,
        cancel: &Cancel,
    ) -> (Result<Exit, ExecError>, String, String) {
        self.run_with(spec, Vec::new(), cancel)
    }

    /// Runs with inputs for the spec's mounts; how it ended, standard output, standard error.
    pub(crate) fn run_with(
        &self,
        spec: &ProcessSpec,
        inputs: Vec<OwnedFd>,
        cancel: &Cancel,
    ) -> (Result<Exit, ExecError>, String, String) {
        let handles = Handles { root: self.tree(), inputs, network: None };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut collect = |stream: Stream, bytes: &[u8]| match stream {
            Stream::Stdout => out.extend_from_slice(bytes),
            Stream::Stderr => err.extend_from_slice(bytes),
        };
        let result = self.linux.run(handles, spec, Stdio::Captured(&mut collect), cancel);
        *self.usage.lock().unwrap() = result.as_ref().map(|finished| finished.usage).unwrap_or_default();
        let result = result.map(|finished| finished.exit);
        (result, String::from_utf8_lossy(&out).into_owned(), String::from_utf8_lossy(&err).into_owned())
    }

    /// Runs a shell script that must succeed; its output.
    pub(crate) fn sh(&self, script: &str) -> String {
        let (result, out, err) = self.run_spec(&shell(script), &Cancel::new().unwrap());
        assert_eq!(result.unwrap(), Exit::Code(0), "{script}: {err}");
        out
    }
}

/// A shell script without network.
pub(crate) fn shell(script: &str) -> ProcessSpec {
    ProcessSpec {
        args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec![("PATH".to_owned(), "/bin".to_owned())],
        hostname: "sandbox".to_owned(),
        network: Network::None,
        ..ProcessSpec::default()
    }
}
