//! `kiln registry serve`: one command, other tools, many clients, and ends of every kind.

#[allow(dead_code, reason = "each side uses what it needs")]
#[path = "../../../../crates/registry-server/tests/registry/client.rs"]
mod client;
mod crowd;
mod ends;
mod limits;
mod peers;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::harness::{Outcome, text};
use client::Client;

/// It runs until this value goes.
struct Own {
    child: Child,
    dir: TempDir,
    address: SocketAddr,
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

    fn with(args: &[&str]) -> Self {
        Self::on(tempfile::tempdir().expect("temporary directories can be made"), args)
    }

    fn on(dir: TempDir, args: &[&str]) -> Self {
        let mut command = command();
        command.args(["--listen", "127.0.0.1:0", "--dir", text(&dir.path().join("registry"))]).args(args);
        // Its errors go where the test's go.
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
    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("registry").join(path)
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
