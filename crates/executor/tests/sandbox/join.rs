//! Processes that others look after, and processes that join a running container.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::mpsc;

use kiln_executor::{Cancel, ExecError, Executor, Exit, Handles, Managed, ProcessSpec, Started, Stdio};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::harness::{Sandbox, shell};

fn null() -> OwnedFd {
    std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into()
}

/// Runs a container that sleeps, and `work` beside it with its pidfd; ends it then.
fn beside(sandbox: &Sandbox, script: &str, work: impl FnOnce(OwnedFd)) {
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        let container = scope.spawn(move || {
            let mut started = move |started: Started| sender.send(started.pid).unwrap();
            let streams = Some([null(), null(), null()]);
            let stdio = Stdio::Managed(Managed { streams, started: &mut started });
            let cancel = Cancel::new().unwrap();
            sandbox.linux.run(sandbox.tree().into(), &shell(script), stdio, &cancel)
        });
        let pid = Pid::from_raw(receiver.recv().unwrap()).unwrap();
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        work(pidfd.try_clone().unwrap());
        pidfd_send_signal(&pidfd, Signal::KILL).unwrap();
        assert_eq!(container.join().unwrap().unwrap().exit, Exit::Signal(9));
    });
}

/// Joins the container; how it ended, and what it printed.
fn join(sandbox: &Sandbox, container: &OwnedFd, spec: &ProcessSpec) -> (Result<Exit, ExecError>, String) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut started = |_| {};
    let streams = Some([null(), writer.try_clone().unwrap().into(), writer.into()]);
    let stdio = Stdio::Managed(Managed { streams, started: &mut started });
    let result = sandbox.linux.join(container.try_clone().unwrap(), spec, stdio, &Cancel::new().unwrap());
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    (result, text)
}

#[test]
fn a_joined_process_sees_what_the_container_sees() {
    let Some(sandbox) = Sandbox::new() else { return };
    beside(&sandbox, "exec sleep 1000", |container| {
        let (result, text) = join(
            &sandbox,
            &container,
            // The container's shell becomes another program, in its own time.
            &shell(
                "n=0; until [ $(cat /proc/1/cmdline | wc -c) = 11 ] || [ $n = 600 ]; do n=$((n+1)); sleep 0.05; done; \
                 hostname; cat /proc/1/cmdline | wc -c; ls /sys/class/net; while read -r k v; do case $k in CapEff*) echo $v;; esac; done < /proc/self/status",
            ),
        );
        assert_eq!(result.unwrap(), Exit::Code(0), "{text}");
        assert_eq!(text, "sandbox\n11\nlo\n00000000a80425fb\n");
        let mut other = shell("id -u; pwd; exit 7");
        (other.user, other.cwd) = (Some("app".to_owned()), "/tmp".to_owned());
        let (result, text) = join(&sandbox, &container, &other);
        assert_eq!((result.unwrap(), text.as_str()), (Exit::Code(7), "1000\n/tmp\n"));
    });
}

#[test]
fn a_program_that_does_not_start_is_reported_and_never_called_started() {
    let Some(sandbox) = Sandbox::new() else { return };
    beside(&sandbox, "exec sleep 1000", |container| {
        let mut missing = shell("");
        missing.args = vec!["/bin/absent".to_owned()];
        let (result, _) = join(&sandbox, &container, &missing);
        assert!(matches!(result, Err(ExecError::NotFound { .. })), "{result:?}");
        let mut started = |started: Started| panic!("{started:?}");
        let stdio =
            Stdio::Managed(Managed { streams: Some([null(), null(), null()]), started: &mut started });
        let handles = Handles::from(sandbox.tree());
        let result = sandbox.linux.run(handles, &missing, stdio, &Cancel::new().unwrap());
        assert!(matches!(result, Err(ExecError::NotFound { .. })), "{result:?}");
    });
}

#[test]
fn a_joined_process_has_a_terminal_of_the_container() {
    let Some(sandbox) = Sandbox::new() else { return };
    beside(&sandbox, "exec sleep 1000", |container| {
        let (sender, receiver) = mpsc::channel();
        let mut started = move |started: Started| sender.send(started.terminal.unwrap()).unwrap();
        let stdio = Stdio::Managed(Managed { streams: None, started: &mut started });
        let spec = shell("[ -t 0 ] && [ -t 1 ] && readlink /proc/self/fd/0");
        let result = sandbox.linux.join(container, &spec, stdio, &Cancel::new().unwrap());
        assert_eq!(result.unwrap(), Exit::Code(0));
        let mut text = [0; 100];
        let count = rustix::io::read(receiver.recv().unwrap(), &mut text).unwrap();
        assert_eq!(String::from_utf8_lossy(&text[..count]), "/dev/pts/0\r\n");
    });
}

#[test]
fn a_joined_process_ends_with_the_container() {
    let Some(sandbox) = Sandbox::new() else { return };
    let (sender, receiver) = mpsc::channel();
    let sandbox = &sandbox;
    std::thread::scope(|scope| {
        beside(sandbox, "exec sleep 1000", |container| {
            let (runs, running) = mpsc::channel();
            scope.spawn(move || {
                let mut started = move |_| runs.send(()).unwrap();
                let streams = Some([null(), null(), null()]);
                let stdio = Stdio::Managed(Managed { streams, started: &mut started });
                let cancel = Cancel::new().unwrap();
                let result = sandbox.linux.join(container, &shell("exec sleep 1000"), stdio, &cancel);
                sender.send(result).unwrap();
            });
            running.recv().unwrap();
        });
    });
    assert_eq!(receiver.recv().unwrap().unwrap(), Exit::Signal(9));
}
