//! `kiln registry`: one command, other tools, many clients, images of a store, and ends of every kind.

mod cache;
#[allow(dead_code, reason = "each side uses what it needs")]
#[path = "../../../../crates/registry-server/tests/registry/client.rs"]
mod client;
mod collect;
mod crowd;
mod ends;
mod limits;
mod many;
mod peers;
mod pushes;
mod referrers;
mod reload;
mod store;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::server::Bench;
use crate::harness::{Outcome, text};
use client::Client;

/// It runs until this value goes.
pub(super) struct Own {
    child: Child,
    dir: TempDir,
    pub(super) address: SocketAddr,
    /// What it said at the start.
    said: String,
}

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(["registry", "serve"]).stdin(Stdio::null());
    command
}

impl Own {
    /// On a free port of loopback, with everything else as it is when nobody says anything.
    fn start() -> Self {
        Self::with(&[])
    }

    pub(super) fn with(args: &[&str]) -> Self {
        Self::on(tempfile::tempdir().expect("temporary directories can be made"), args)
    }

    fn on(dir: TempDir, args: &[&str]) -> Self {
        let mut command = command();
        command.args(["--dir", text(&dir.path().join("registry"))]).args(args);
        Self::start_by(command, dir)
    }

    /// The same with a file for what it says on standard error; see [`Own::log`].
    fn logged(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("temporary directories can be made");
        let mut command = command();
        command.args(["--dir", text(&dir.path().join("registry"))]).args(args);
        command.stderr(std::fs::File::create(dir.path().join("log")).expect("ours to write"));
        Self::start_by(command, dir)
    }

    /// One that gives out the images of a store.
    fn of_store(bench: &Bench, args: &[&str]) -> Self {
        let mut command = bench.command(&["registry", "serve", "--store"]);
        command.args(args);
        Self::start_by(command, tempfile::tempdir().expect("temporary directories can be made"))
    }

    fn start_by(mut command: Command, dir: TempDir) -> Self {
        command.args(["--listen", "127.0.0.1:0"]);
        // Its errors go where the test's go, if nobody has said otherwise.
        let mut child = command.stdout(Stdio::piped()).spawn().expect("kiln starts");
        let mut said = String::new();
        let mut stdout = BufReader::new(child.stdout.take().expect("piped above"));
        stdout.read_line(&mut said).expect("it says where it is");
        let place = said.split_once("://").map_or("", |(_, rest)| rest);
        let address = place.split(',').next().unwrap_or_default().parse().expect("an address");
        Self { child, dir, address, said }
    }

    fn client(&self) -> Client {
        Client::new(self.address)
    }

    /// `127.0.0.1:PORT/NAME`
    pub(super) fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("registry").join(path)
    }

    /// What it said on standard error.
    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).expect("it was started with a file for it")
    }

    /// Asks again until the answer is what it shall be.
    #[track_caller]
    fn until<T: PartialEq + std::fmt::Debug>(&self, expected: T, ask: impl Fn() -> T) {
        let begun = std::time::Instant::now();
        loop {
            let found = ask();
            if found == expected {
                return;
            }
            assert!(begun.elapsed().as_secs() < 50, "{found:?} and not {expected:?}");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Whether `/metrics` has this line, without the word in front of all of them.
    fn counts(&self, line: &str) -> bool {
        let text = String::from_utf8(self.client().get("/metrics").expect(200).body).expect("text");
        text.lines().any(|known| known == format!("kiln_registry_{line}"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("our child is not reaped yet");
    }

    /// Waits for its end; its directory is another one's now.
    fn wait(mut self) -> (ExitStatus, TempDir) {
        let status = self.child.wait().expect("our child");
        let empty = tempfile::tempdir().expect("temporary directories can be made");
        (status, std::mem::replace(&mut self.dir, empty))
    }

    /// The memory that is its own, in KiB.
    fn rss_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("the kernel says");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The outcome of one that does not start.
fn refused(args: &[&str], code: i32) -> Outcome {
    Outcome::of(command().args(args).output().expect("kiln starts")).expect(code)
}

fn write(dir: &Path, name: &str, content: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, content).expect("ours to write");
    text(&path).to_owned()
}
