//! `kiln shell`: a command where a step has been or would be.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use kiln_executor::{ExecError, Exit, Handles, Managed, Relay, Stdio};
use kiln_layer::beneath;
use kiln_llb as llb;
use kiln_oci::SnapshotId;
use kiln_snapshotter::OpenOptions;
use kiln_solver::Scope;
use rustix::fs::OFlags;

use super::mounts::StepMounts;
use super::{BuildOp, process};
use crate::engine::Active;
use crate::tree::Tree;
use crate::{Engine, OpError, entitlement};

/// Where kiln's own shell is inside.
const LENT: &str = "/.kiln";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Which tree a command runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ShellTree {
    /// What the step stands on.
    Before,
    /// This one; `None`: an empty one.
    Of(Option<SnapshotId>),
}

/// A command in the place of a step.
pub(crate) struct ShellJob {
    pub(crate) tree: ShellTree,
    /// Program and arguments; empty: a shell.
    pub(crate) command: Vec<String>,
    /// It gets a terminal; else this process's standard streams.
    pub(crate) terminal: bool,
    ended: Mutex<Option<Exit>>,
}

impl ShellJob {
    pub(crate) fn new(tree: ShellTree, command: Vec<String>, terminal: bool) -> Self {
        Self { tree, command, terminal, ended: Mutex::default() }
    }

    /// How it ended, once it has run.
    pub(crate) fn ended(&self) -> Option<Exit> {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A shell of the host's, for an image that has none: a directory with a static busybox and a link for
/// each of its applets.
struct Lent {
    active: Active,
}

impl Lent {
    /// `None`: this host has no static busybox.
    fn make(engine: &Engine) -> Result<Option<Self>, OpError> {
        let Some(busybox) = static_busybox() else { return Ok(None) };
        let active = engine.prepare(None)?;
        let dir = engine.snapshots.open_layer(active.key())?;
        let copy = || -> io::Result<()> {
            let dir = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
            fs::set_permissions(dir.join("."), fs::Permissions::from_mode(0o755))?;
            fs::copy(&busybox, dir.join("busybox"))?;
            fs::set_permissions(dir.join("busybox"), fs::Permissions::from_mode(0o755))?;
            let applets = Command::new(&busybox).arg("--list").output()?.stdout;
            for applet in String::from_utf8_lossy(&applets).lines() {
                if applet != "busybox" && !applet.contains('/') {
                    symlink("busybox", dir.join(applet))?;
                }
            }
            Ok(())
        };
        copy().map_err(|source| OpError::LendShell { source })?;
        Ok(Some(Self { active }))
    }
}

impl BuildOp {
    pub(in crate::ops) fn run_shell(
        &self,
        shell: &ShellJob,
        inputs: &[Tree],
        scope: &Scope<'_>,
    ) -> Result<Tree, OpError> {
        let engine = &self.shared.engine;
        let plain;
        let exec = match &self.op {
            llb::Op::Exec(exec) => exec,
            other => {
                plain = without_process(other);
                &plain
            }
        };
        entitlement::check(exec, &self.shared.steps.allow)?;
        let mut mounts = StepMounts::prepare(self, exec, inputs, scope)?;
        let base = match &shell.tree {
            ShellTree::Before => exec.base.and_then(|index| inputs[index.0].snapshot()),
            ShellTree::Of(id) => id.as_ref(),
        };
        // What it writes goes with it.
        let active = engine.prepare(base)?;
        let mut extra_lower = Vec::from_iter(mounts.stubs_path());
        extra_lower.push(engine.executor.stub_dir().to_owned());
        let options = OpenOptions { extra_lower, ..OpenOptions::default() };
        let root = engine.snapshots.open_active(active.key(), &options)?;
        let own = own_shell(exec, root.as_fd());
        let lent = if own.is_none() { Lent::make(engine)? } else { None };
        if let Some(lent) = &lent {
            mounts.add_dir(LENT, engine.snapshots.open_layer(lent.active.key())?.as_fd())?;
        }
        let mut spec = process(exec, &mut mounts);
        spec.args = match (&shell.command[..], own) {
            ([], Some(own)) => vec![own],
            ([], None) if lent.is_some() => vec![format!("{LENT}/sh")],
            ([], None) => return Err(OpError::NoShell),
            (command, _) => command.to_vec(),
        };
        if lent.is_some() {
            match spec.env.iter_mut().find(|(name, _)| name == "PATH") {
                Some((_, path)) => *path = format!("{path}:{LENT}"),
                None => spec.env.push(("PATH".to_owned(), format!("{PATH}:{LENT}"))),
            }
        }
        if shell.terminal && spec.env.iter().all(|(name, _)| name != "TERM") {
            let term = std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned());
            spec.env.push(("TERM".to_owned(), term));
        }
        let mut handles = Handles { root, inputs: mounts.take_handles(), network: None };
        self.shared.steps.authorities.give(&mut spec, &mut handles)?;
        let cancel = self.shared.cancel.processes();
        let finished = if shell.terminal {
            engine.executor.run(handles, &spec, Stdio::Terminal, cancel)?
        } else {
            let (streams, relay) = Relay::of_standard_streams(true)
                .map_err(|source| ExecError::Start { step: "standard streams".to_owned(), source })?;
            let managed = Managed { streams: Some(streams), started: &mut |_| {} };
            let finished = engine.executor.run(handles, &spec, Stdio::Managed(managed), cancel);
            relay.finish();
            finished?
        };
        drop((mounts, lent));
        *shell.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(finished.exit);
        Ok(Tree::Empty)
    }
}

/// A process for a step that has none: root's, on the step's files.
fn without_process(op: &llb::Op) -> llb::Exec {
    llb::Exec {
        base: op.base(),
        args: Vec::new(),
        env: vec![("PATH".to_owned(), PATH.to_owned())],
        unkeyed_env: Vec::new(),
        cwd: "/".to_owned(),
        user: None,
        hostname: "buildkitsandbox".to_owned(),
        extra_hosts: Vec::new(),
        network: llb::Network::Default,
        security: llb::Security::Sandbox,
        mounts: Vec::new(),
        secret_env: Vec::new(),
        cache_ttl: None,
        foreign: None,
    }
}

/// The shell that the step itself is a command of, else `/bin/sh`, if the tree has it.
fn own_shell(exec: &llb::Exec, root: BorrowedFd<'_>) -> Option<String> {
    let steps = match &exec.args[..] {
        [shell, flag, ..] if flag == "-c" && shell.starts_with('/') => Some(shell.as_str()),
        _ => None,
    };
    let there = |shell: &&str| {
        let file = beneath::open_file(root, shell.trim_start_matches('/').as_bytes(), OFlags::PATH);
        let mode = file.ok().and_then(|file| rustix::fs::fstat(&file).ok()).map(|stat| stat.st_mode);
        mode.is_some_and(|mode| mode & 0o170_000 == 0o100_000 && mode & 0o111 != 0)
    };
    steps.into_iter().chain(["/bin/sh"]).find(there).map(str::to_owned)
}

/// The first `busybox` of the `PATH` that needs no libraries.
fn static_busybox() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/bin", "/usr/bin"].map(PathBuf::from));
    dirs.map(|dir| dir.join("busybox")).find(|file| is_static(file).unwrap_or(false))
}

/// Whether a file is a program that needs no interpreter: an ELF file without `PT_INTERP`.
fn is_static(path: &Path) -> io::Result<bool> {
    const PT_INTERP: u32 = 3;
    let mut head = Vec::new();
    // Program headers follow the file's own, wherever a linker has its usual way.
    File::open(path)?.take(8 << 10).read_to_end(&mut head)?;
    let is_wide = head.get(4) == Some(&2);
    let word = |at: usize, size: usize| -> Option<usize> {
        let bytes = head.get(at..at + size)?;
        let fold = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
        let little = head.get(5) == Some(&1);
        let value = if little { bytes.iter().rev().fold(0, fold) } else { bytes.iter().fold(0, fold) };
        usize::try_from(value).ok()
    };
    if head.get(..4) != Some(b"\x7fELF") {
        return Ok(false);
    }
    let place = if is_wide {
        (word(32, 8), word(54, 2), word(56, 2))
    } else {
        (word(28, 4), word(42, 2), word(44, 2))
    };
    let (Some(start), Some(size), Some(count)) = place else { return Ok(false) };
    let interprets = (0..count).map(|nth| word(start.checked_add(nth * size)?, 4));
    let mut kinds = interprets.map(|kind| kind != Some(PT_INTERP as usize) && kind.is_some());
    Ok(count > 0 && kinds.all(|fine| fine))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_need_libraries_are_told_from_those_that_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let check = |bytes: &[u8], expected: bool| {
            let file = dir.path().join("file");
            fs::write(&file, bytes).unwrap();
            assert_eq!(is_static(&file).unwrap(), expected);
        };
        let elf = |kinds: &[u32]| {
            let mut bytes = vec![0; 64 + 56 * kinds.len()];
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
            bytes[32] = 64;
            bytes[54] = 56;
            bytes[56] = u8::try_from(kinds.len()).unwrap();
            for (nth, kind) in kinds.iter().enumerate() {
                bytes[64 + 56 * nth..][..4].copy_from_slice(&kind.to_le_bytes());
            }
            bytes
        };
        check(&elf(&[6, 1, 1]), true);
        check(&elf(&[6, 3, 1]), false);
        check(&elf(&[]), false);
        check(&elf(&[6, 1])[..100], false);
        check(b"#!/bin/sh\n", false);
        check(b"", false);
        assert!(!is_static(Path::new("/bin/ls")).unwrap());
    }
}
