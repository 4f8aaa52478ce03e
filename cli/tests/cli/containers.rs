//! Everyday life with containers, as transcripts written against docker's documented behaviour. What
//! podman does the same way runs with podman as well, so that the transcripts themselves are checked.

mod borders;
mod end;
mod files;
mod life;
mod machines;
mod networks;
mod ports;
mod settings;
mod streams;

use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{Outcome, Store, test_as};
use crate::interop::Tools;

/// Something that takes docker's command line.
pub(crate) enum Docker {
    Kiln(Store),
    Podman(Tools),
}

impl Docker {
    pub(crate) fn kiln() -> Docker {
        Docker::Kiln(Store::with_busybox())
    }

    /// Runs a transcript with kiln, and with podman where that is installed and works.
    pub(crate) fn each(transcript: impl Fn(&Docker)) {
        let kiln = Docker::kiln();
        transcript(&kiln);
        kiln.is_clean();
        if test_as().is_some() {
            // With podman, root's run has checked the test.
            return;
        }
        match Docker::podman() {
            Some(podman) => transcript(&podman),
            None => {
                eprintln!("SKIPPED ALOUD: podman does not run containers here, so nobody checks the test")
            }
        }
    }

    fn podman() -> Option<Docker> {
        if ["podman", "runc"].iter().any(|name| Command::new(name).arg("--version").output().is_err()) {
            return None;
        }
        let (store, tools) = (Store::with_busybox(), Tools::new());
        let archive = tools.path("busybox.tar");
        let archive = crate::harness::text(&archive);
        store.ok(&["save", "-o", archive, "busybox"]);
        let podman = Docker::Podman(tools);
        let loaded = podman.run(&["load", "-i", archive]);
        if loaded.code != Some(0) {
            eprintln!("podman: {}", loaded.stderr);
            return None;
        }
        podman.run(&["tag", "docker.io/library/busybox:latest", "busybox"]);
        let works = podman.run(&["run", "--rm", "--network", "none", "busybox", "true"]);
        if works.code != Some(0) {
            eprintln!("podman: {}", works.stderr);
            return None;
        }
        Some(podman)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        match self {
            Docker::Kiln(store) => store.command(args),
            Docker::Podman(tools) => {
                let flags = ["--runtime", "runc", "--cgroup-manager", "cgroupfs"];
                let mut command = tools.command("podman", &flags, args);
                command.stdin(std::process::Stdio::null());
                command
            }
        }
    }

    pub(crate) fn run(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(args).output().expect("it starts"))
    }

    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        self.run(args).expect(0).stdout.trim_end().to_owned()
    }

    /// Starts a container in the background, without network.
    #[track_caller]
    pub(crate) fn start(&self, name: &str, flags: &[&str], script: &str) {
        let mut args = vec!["run", "-d", "--name", name, "--network", "none"];
        args.extend_from_slice(flags);
        args.extend_from_slice(&["busybox", "sh", "-c", script]);
        self.ok(&args);
    }

    #[track_caller]
    pub(crate) fn field(&self, name: &str, format: &str) -> String {
        self.ok(&["inspect", "-f", format, name])
    }

    /// Asks again and again, as there is nothing to be woken by, until `is` holds.
    #[track_caller]
    pub(crate) fn until(&self, args: &[&str], is: impl Fn(&Outcome) -> bool) -> Outcome {
        let start = Instant::now();
        loop {
            let outcome = self.run(args);
            if is(&outcome) {
                return outcome;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{args:?}: {outcome:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Nothing is left of removed containers.
    #[track_caller]
    fn is_clean(&self) {
        if let Docker::Kiln(store) = self {
            assert_eq!(self.ok(&["ps", "-aq"]), "");
            assert_eq!(store.active_snapshots(), [""; 0]);
            assert_eq!(store.mounts(), [""; 0]);
            store.sound().expect("the store is sound");
        }
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let listed = self.run(&["ps", "-aq"]);
        for id in listed.stdout.lines() {
            self.run(&["rm", "-f", id]);
        }
    }
}
