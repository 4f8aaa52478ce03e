//! `kiln selftest`

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use kiln_executor::{Check, Finished, Network, ProcessSpec, Resources};
use kiln_oci::ActiveKey;
use kiln_oci::{BindMount, Mount};
use kiln_snapshotter::OpenOptions;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::print;
use crate::args::{Inside, SelftestArgs};
use crate::errors::{Failure, exit};
use crate::session::Session;

/// Where kiln's own program lies in the container.
const PROGRAM: &str = "/kiln";
/// What a held container says when it runs.
const HELD: &str = "held";

/// What a kiln inside the container does, which has no store.
pub(crate) fn inside(what: Inside) -> Result<u8, Failure> {
    match what {
        Inside::Probe => {
            let checks = kiln_executor::probe_sandbox();
            let json = serde_json::to_string(&checks).map_err(|error| Failure::source(error.to_string()))?;
            print(&json)?;
        }
        Inside::Nothing => {}
        Inside::Wait => {
            print(&format!("{HELD}\n"))?;
            loop {
                std::thread::park();
            }
        }
    }
    Ok(0)
}

/// Runs the checks in a container of their own and shows them as a table.
pub(crate) fn run(session: &Session, args: &SelftestArgs) -> Result<u8, Failure> {
    if let Some(what) = args.container {
        let finished = container(session, what, None)?;
        return Ok(u8::try_from(finished).unwrap_or(255));
    }
    if !args.security {
        return Err(Failure::usage("say what to test: --security"));
    }
    // First the one that leaves a layer behind: the next kiln, which probes, sweeps it.
    let left = parent_death(session)?;
    let mut checks = probe(session)?;
    checks.extend([groups(session)?, left]);
    let width =
        |of: fn(&Check) -> &str| checks.iter().map(|check| of(check).len()).max().unwrap_or(0).min(40);
    let (name, expected) = (width(|check| &check.name), width(|check| &check.expected));
    let mut table = String::new();
    for check in &checks {
        let verdict = if check.holds() { "ok  " } else { "FAIL" };
        let found = if check.holds() { "" } else { check.found.as_str() };
        let line = format!("{verdict}  {:name$}  {:expected$}  {found}", check.name, check.expected);
        table.push_str(line.trim_end());
        table.push('\n');
    }
    let failed = checks.iter().filter(|check| !check.holds()).count();
    table.push_str(&match failed {
        0 => format!("{} checks, all as they should be\n", checks.len()),
        failed => format!("{failed} of {} checks FAILED\n", checks.len()),
    });
    print(&table)?;
    Ok(if failed == 0 { 0 } else { exit::RUN.number() })
}

/// This kiln again, on the same store, with the container's output to be read.
fn again(session: &Session, what: &str) -> Result<Child, Failure> {
    let program = std::env::current_exe().map_err(|error| Failure::source(error.to_string()))?;
    let mut command = Command::new(program);
    command.arg("--root").arg(session.engine.store.root()).args(["selftest", "--container", what]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    child.map_err(|error| Failure::source(format!("kiln cannot be started again: {error}")))
}

fn probe(session: &Session) -> Result<Vec<Check>, Failure> {
    let child = again(session, "probe")?;
    let output = child.wait_with_output().map_err(|error| Failure::source(error.to_string()))?;
    let mut checks: Vec<Check> = serde_json::from_slice(&output.stdout).map_err(|_| {
        Failure::store(format!("the container did not start ({})", output.status)).in_container()
    })?;
    // A user's container is in the namespace that this kiln is in, and sees no id more.
    if let Some(check) = checks.iter_mut().find(|check| check.name == "user map") {
        let own = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        check.expected = own.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    Ok(checks)
}

/// A container with a limit, if this machine can hold one to it.
fn groups(session: &Session) -> Result<Check, Failure> {
    let limits = Resources { pids: Some(64), ..Resources::default() };
    let found = match container(session, Inside::Nothing, Some(limits)) {
        Ok(_) => "yes".to_owned(),
        Err(failure) => failure.render().trim().replace('\n', "; "),
    };
    Ok(Check::new("limits by control groups", "yes", found))
}

/// What becomes of a container whose kiln is killed.
fn parent_death(session: &Session) -> Result<Check, Failure> {
    let failed = |error: std::io::Error| Failure::source(error.to_string());
    let mut child = again(session, "wait")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
    }
    let handles: Vec<_> = descendants(child.id())
        .into_iter()
        .filter_map(|pid| pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok())
        .collect();
    child.kill().map_err(failed)?;
    let status = child.wait().map_err(failed)?;
    let mut left = 0;
    for handle in &handles {
        let limit = Timespec { tv_sec: 2, tv_nsec: 0 };
        let mut fds = [PollFd::new(handle, PollFlags::IN)];
        if !matches!(poll(&mut fds, Some(&limit)), Ok(1..)) {
            left += 1;
        }
    }
    // The helper and process 1: fewer would mean that nothing was tried.
    let found = match (line.trim() == HELD, handles.len(), left, status.signal()) {
        (true, 2.., 0, Some(_)) => "nothing".to_owned(),
        (_, seen, left, _) => format!("{left} of {seen} processes"),
    };
    Ok(Check::new("left of a container whose kiln was killed", "nothing", found))
}

/// Children, their children and so on.
fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut parents = vec![pid];
    while let Some(parent) = parents.pop() {
        let threads = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
        for thread in threads {
            let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            let children: Vec<u32> = children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
            found.extend(&children);
            parents.extend(children);
        }
    }
    found
}

/// Runs kiln itself in a container without any image; its exit code.
fn container(session: &Session, what: Inside, limits: Option<Resources>) -> Result<i32, Failure> {
    let program = std::env::current_exe().map_err(|error| Failure::source(error.to_string()))?;
    let mut mounts = vec![bind(&program, PROGRAM)];
    // A program that is not linked statically needs its libraries where they are on the host.
    for dir in ["/lib", "/lib64", "/usr/lib", "/usr/lib64"] {
        if let Ok(source) = Path::new(dir).canonicalize() {
            mounts.push(bind(&source, dir));
        }
    }
    let word = match what {
        Inside::Nothing => "nothing",
        Inside::Probe => "probe",
        Inside::Wait => "wait",
    };
    let command = [PROGRAM, "selftest", "--inside", word].map(str::to_owned).to_vec();
    let spec = ProcessSpec {
        args: command,
        env: vec![("PATH".to_owned(), "/bin".to_owned())],
        mounts,
        network: Network::None,
        resources: limits,
        ..ProcessSpec::default()
    };
    let engine = &session.engine;
    let key = engine.store.lease()?.new_key();
    engine.snapshots.prepare(&key, None)?;
    let finished = on_layer(session, &key, &spec);
    // The next command sweeps what cannot be removed now.
    let _ = engine.snapshots.remove_active(&key);
    Ok(finished?.exit.shell_code())
}

fn on_layer(session: &Session, key: &ActiveKey, spec: &ProcessSpec) -> Result<Finished, Failure> {
    let engine = &session.engine;
    let options =
        OpenOptions { extra_lower: vec![engine.executor.stub_dir().to_owned()], ..OpenOptions::default() };
    let root = engine.snapshots.open_active(key, &options)?;
    Ok(engine.executor.run(root.into(), spec, kiln_executor::Stdio::Output, session.cancel.processes())?)
}

fn bind(source: &Path, target: &str) -> Mount {
    Mount::Bind(BindMount { source: PathBuf::from(source), target: target.to_owned(), read_only: true })
}
