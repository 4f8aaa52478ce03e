//! `RUN`: a process on a tree.

mod certificates;
mod mounts;
mod shell;

pub(crate) use self::shell::{ShellJob, ShellTree};

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_content::Space;
use kiln_executor::{
    Authorities, ExecError, Exit, Handles, Network, ProcessSpec, Security, Stdio, Unfit, check_emulator,
};
use kiln_llb as llb;
use kiln_oci::Digest;
use kiln_snapshotter::OpenOptions;
use kiln_solver::{InputUse, Scope, Stream};

use self::certificates::{Covers, take_out};
use self::mounts::StepMounts;
use super::BuildOp;
use crate::cache_mounts::CacheMounts;
use crate::context_files::ContextFiles;
use crate::entitlement;
use crate::last_build::Kept;
use crate::step_costs::StepCosts;
use crate::tree::Tree;
use crate::{BuildRequest, Engine, Entitlement, OpError, SecretStore, SshAgents};

/// What the steps of one build may use besides their inputs.
pub(crate) struct StepResources {
    secrets: SecretStore,
    ssh: SshAgents,
    authorities: Authorities,
    allow: BTreeSet<Entitlement>,
    caches: CacheMounts,
    contexts: ContextFiles,
    costs: StepCosts,
    /// Steps that were made.
    runs: AtomicUsize,
    /// Where the files of a step that fails go; `None`: nobody will ask for them.
    kept: Option<Kept>,
}

impl StepResources {
    pub(crate) fn new(engine: &Engine, request: &BuildRequest) -> Self {
        let mut allow = request.allow.clone();
        if request.network == llb::Network::Host {
            // The user said it himself, of all steps.
            allow.insert(Entitlement::NetworkHost);
        }
        Self {
            secrets: request.secrets.clone(),
            ssh: request.ssh.clone(),
            authorities: request.authorities.clone(),
            allow,
            caches: CacheMounts::new(engine.store.root(), request.no_cache.all),
            contexts: ContextFiles::default(),
            costs: StepCosts::open(engine.store.root()),
            runs: AtomicUsize::new(0),
            kept: request.origin.is_some().then(Kept::default),
        }
    }

    /// What steps took.
    pub(crate) fn costs(&self) -> &StepCosts {
        &self.costs
    }

    /// A step was made.
    pub(crate) fn note_run(&self) {
        self.runs.fetch_add(1, Ordering::Relaxed);
    }

    /// How many steps were made.
    pub(crate) fn runs(&self) -> usize {
        self.runs.load(Ordering::Relaxed)
    }

    /// The files that the step `op` left when it failed.
    pub(crate) fn kept(&self, op: &Digest) -> Option<kiln_oci::SnapshotId> {
        self.kept.as_ref()?.of(op)
    }

    /// Whether `op` may run.
    ///
    /// # Errors
    /// [`OpError::NotAllowed`].
    pub(crate) fn check(&self, op: &llb::Op) -> Result<(), OpError> {
        match op {
            llb::Op::Exec(exec) => entitlement::check(exec, &self.allow),
            llb::Op::Source(_) | llb::Op::File(_) | llb::Op::Merge(_) => Ok(()),
        }
    }
}

/// How a step uses an input: what it mounts, or seeds a cache with, counts by content; what it runs
/// on counts by key, mounted as well or not.
pub(super) fn input_use(exec: &llb::Exec, position: usize) -> InputUse {
    let input = llb::InputIndex(position);
    let mut shown = exec.mounts.iter().filter_map(shows);
    if exec.base != Some(input) && shown.any(|(from, _)| from == input) {
        InputUse::Content
    } else {
        InputUse::Definition
    }
}

/// Which input a mount shows something of, and what.
fn shows(mount: &llb::Mount) -> Option<(llb::InputIndex, &str)> {
    match &mount.kind {
        llb::MountKind::Bind(bind) => bind.from.map(|from| (from, bind.source.as_str())),
        llb::MountKind::Cache(cache) => cache.from.map(|from| (from, cache.source.as_str())),
        llb::MountKind::Tmpfs { .. } | llb::MountKind::Secret(_) | llb::MountKind::Ssh(_) => None,
    }
}

impl BuildOp {
    /// Digest of what the mounts show of input number `input`.
    pub(super) fn shown_content(
        &self,
        exec: &llb::Exec,
        input: usize,
        tree: &Tree,
    ) -> Result<Digest, OpError> {
        let mut digests = String::new();
        for (from, source) in exec.mounts.iter().filter_map(shows) {
            if from == llb::InputIndex(input) {
                let (selection, ignore_owner) = self.part(tree, source)?;
                digests.push_str(&selection.digest(ignore_owner).to_string());
                if self.shared.why.is_some() {
                    let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
                    shown.push((input, selection, ignore_owner));
                }
            }
        }
        Ok(Digest::of(digests.as_bytes()))
    }

    pub(super) fn run_exec(
        &self,
        exec: &llb::Exec,
        inputs: &[Tree],
        scope: &Scope<'_>,
    ) -> Result<(Tree, u64), OpError> {
        let engine = &self.shared.engine;
        entitlement::check(exec, &self.shared.steps.allow)?;
        let mut mounts = StepMounts::prepare(self, exec, inputs, scope)?;
        let base = exec.base.and_then(|index| inputs[index.0].snapshot());
        let active = engine.prepare(base)?;
        let mut extra_lower = Vec::from_iter(mounts.stubs_path());
        extra_lower.push(engine.executor.stub_dir().to_owned());
        let authorities = &self.shared.steps.authorities;
        let shown = Covers::make(engine, authorities, base)?;
        let covers = shown.iter().map(Covers::path).collect();
        let options = OpenOptions { extra_lower, covers, ..OpenOptions::default() };
        let root = engine.snapshots.open_active(active.key(), &options)?;
        if let Some(platform) = &exec.foreign {
            check_emulator(platform, root.as_fd()).map_err(OpError::NoEmulator)?;
        }
        let mut spec = process(exec, &mut mounts);
        let mut redactors = [mounts.redactor(), mounts.redactor()];
        let mut log = |stream: kiln_executor::Stream, bytes: &[u8]| {
            let (stream, redactor) = match stream {
                kiln_executor::Stream::Stdout => (Stream::Stdout, &mut redactors[0]),
                kiln_executor::Stream::Stderr => (Stream::Stderr, &mut redactors[1]),
            };
            redactor.push(bytes, &mut |bytes| scope.log(stream, bytes));
        };
        let owner = process_owner(root.as_fd(), exec.user.as_deref())?;
        let mut handles = Handles { root, inputs: mounts.take_handles(), network: None };
        authorities.give(&mut spec, &mut handles)?;
        let cancel = self.shared.cancel.processes();
        let exit = engine.executor.run(handles, &spec, Stdio::Captured(&mut log), cancel);
        let [stdout, stderr] = &mut redactors;
        stdout.finish(&mut |bytes| scope.log(Stream::Stdout, bytes));
        stderr.finish(&mut |bytes| scope.log(Stream::Stderr, bytes));
        // Locks, sockets and what was written to throw-away trees end with the step.
        drop((mounts, shown));
        let finished = exit.map_err(|error| no_emulator(exec, error))?;
        take_out(engine, authorities, &active, self.shared.cancel.flag())?;
        if let Some(why) = &self.shared.why {
            why.note_memory(self.vertex, finished.usage.peak_memory_bytes);
        }
        match finished.exit {
            Exit::Code(0) => {
                if let Some(owner) = owner {
                    active.record_owner(base, owner, self.shared.cancel.flag())?;
                }
                if let Some(base) = base {
                    active.drop_unchanged(base, self.shared.cancel.flag())?;
                }
                Ok((self.commit(active)?, finished.usage.peak_memory_bytes))
            }
            exit => {
                // Before what the step wrote is given back.
                let is_full = is_full(engine.store.root());
                if let Some(kept) = self.shared.steps.kept.as_ref().filter(|_| !cancel.is_cancelled()) {
                    kept.keep(self.op.digest(), active);
                }
                Err(if is_full { OpError::ExitOnFullDisk { exit } } else { OpError::Exit { exit } })
            }
        }
    }
}

/// What it means that the process did not start: the kernel's rules for foreign programs are not to be seen
/// everywhere, so it may be the first to know.
fn no_emulator(exec: &llb::Exec, error: ExecError) -> OpError {
    match error {
        ExecError::NotExecutable { why: Unfit::Foreign(foreign), .. } if exec.foreign.is_some() => {
            OpError::NoEmulator(foreign)
        }
        error => error.into(),
    }
}

/// Whether nothing more can be written below `root`, or next to nothing.
fn is_full(root: &Path) -> bool {
    /// Less than a program that was refused a block or a file leaves to others.
    const FEW_INODES: u64 = 8;
    const FEW_BYTES: u64 = 64 << 10;
    // Steps run as root.
    let is_full = |space: Space| {
        space.root_inodes.is_some_and(|inodes| inodes < FEW_INODES) || space.root_bytes < FEW_BYTES
    };
    Space::of(root).is_ok_and(is_full)
}

/// The process of a step, with its mounts.
fn process(exec: &llb::Exec, mounts: &mut StepMounts) -> ProcessSpec {
    ProcessSpec {
        args: exec.args.clone(),
        env: environment(exec, mounts.take_env()),
        cwd: exec.cwd.clone(),
        create_cwd: true,
        user: exec.user.clone(),
        hostname: exec.hostname.clone(),
        extra_hosts: exec.extra_hosts.clone(),
        network: match exec.network {
            llb::Network::Default => Network::Default,
            llb::Network::None => Network::None,
            llb::Network::Host => Network::Host,
        },
        security: match exec.security {
            llb::Security::Sandbox => Security::Sandbox,
            llb::Security::Insecure => Security::Insecure,
        },
        mounts: mounts.take_mounts(),
        task_limit: Some(task_limit()),
        // For the next build, which does not start more at once than there is memory for.
        adds_up_memory: true,
        platform: exec.foreign.clone(),
        ..ProcessSpec::default()
    }
}

/// Whose the files are in truth that a process makes who is not root: where there is one id only, the
/// disk does not tell.
fn process_owner(root: BorrowedFd<'_>, user: Option<&str>) -> Result<Option<(u32, u32)>, OpError> {
    if !kiln_layer::has_single_id() {
        return Ok(None);
    }
    let ids = kiln_executor::resolve_user(root, user.unwrap_or("0"))?;
    Ok(Some((ids.uid, ids.gid)))
}

/// Processes and threads of a step at most: enough for any build, and an end to a fork bomb.
fn task_limit() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
    u32::try_from(processors).unwrap_or(u32::MAX).saturating_mul(256).max(4096)
}

/// Each name once: of several the last. What is in the key stands before what is not.
fn environment(exec: &llb::Exec, secrets: Vec<(String, String)>) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = Vec::with_capacity(exec.env.len());
    let mut set =
        |entry: &(String, String), replace: bool| match env.iter_mut().find(|(name, _)| *name == entry.0) {
            Some(known) if replace => known.1.clone_from(&entry.1),
            Some(_) => {}
            None => env.push(entry.clone()),
        };
    exec.env.iter().for_each(|entry| set(entry, true));
    exec.unkeyed_env.iter().for_each(|entry| set(entry, false));
    secrets.iter().for_each(|entry| set(entry, true));
    env
}

#[cfg(test)]
mod tests;
