//! Images to and from registries: the first push, one with nothing to send, a pull into an empty store.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Row, by_hand, images, table, timed};
use crate::bases::Bases;
use crate::demo::Kiln;
use crate::packages;
use crate::peers::Peer;
use crate::step::{self, Failure};

const SAMPLES: usize = 3;
const AGAIN_SAMPLES: usize = 11;
const FILES: usize = 50_000;
const IMAGE: &str = "kiln-bench-pushed";

/// Prints the tables. Takes half an hour, most of it the peers', and 20 GiB of disk below `temp`.
pub(super) fn run(kiln: &Kiln, peers: &[Peer], bases: &Bases, temp: &Path) -> Result<(), Failure> {
    step::heading("Registries", "a layer of 1 GiB and one of 50,000 files, pushed, pushed again, and pulled");
    let temp = temp.join("registry");
    let bench = Bench { kiln, peers, bases, context: temp.join("context"), store: temp.join("store") };
    bench.make_context()?;
    if packages::find_program("docker-registry").is_none() {
        step::note(
            "docker-registry is missing: only kiln's own is measured (`cargo xtask test` installs it)",
        );
    } else {
        let config = temp.join("registry.yml");
        let place = Server::free_place()?;
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {place}}}\n",
            temp.join("theirs").display()
        );
        fs::write(&config, text).map_err(Failure::io("write", &config))?;
        let mut command = Command::new("docker-registry");
        bench.with(&Server::start("docker-registry", command.arg("serve").arg(config), place)?)?;
        super::remove(&temp.join("theirs"))?;
    }
    let place = Server::free_place()?;
    let dir = temp.join("ours");
    let mut command =
        kiln.command(&["registry", "serve", "--listen", &place, "--dir", &dir.to_string_lossy()]);
    bench.with(&Server::start("kiln registry serve", &mut command, place)?)?;
    super::remove(&temp)
}

/// A registry on loopback, until it is dropped.
struct Server {
    name: &'static str,
    place: String,
    process: Child,
}

impl Server {
    fn free_place() -> Result<String, Failure> {
        let here = Path::new("127.0.0.1:0");
        let listener = TcpListener::bind("127.0.0.1:0").map_err(Failure::io("listen on", here))?;
        Ok(listener.local_addr().map_err(Failure::io("listen on", here))?.to_string())
    }

    fn start(name: &'static str, command: &mut Command, place: String) -> Result<Self, Failure> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().map_err(step::spawn_failure(command))?;
        let server = Self { name, place, process };
        let begun = Instant::now();
        while let Err(error) = TcpStream::connect(&server.place) {
            if begun.elapsed() > Duration::from_secs(10) {
                return Err(Failure::io("connect to", Path::new(name))(error));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

struct Bench<'a> {
    kiln: &'a Kiln,
    peers: &'a [Peer],
    bases: &'a Bases,
    context: PathBuf,
    /// Of kiln, to pull into.
    store: PathBuf,
}

impl Bench<'_> {
    fn make_context(&self) -> Result<(), Failure> {
        super::write(&self.context.join("Dockerfile"), "FROM busybox\nCOPY tree /tree\nCOPY big /big\n")?;
        (0..FILES).try_for_each(|nth| {
            let path = self.context.join(format!("tree/d{}/s{}/f{nth}", nth / 2000, nth / 100 % 20));
            super::write(&path, &format!("{nth:07}\n").repeat(64))
        })
    }

    fn with(&self, server: &Server) -> Result<(), Failure> {
        for packing in ["gzip", "zstd"] {
            let mut pushes = vec![self.push_first(server, packing)?];
            let mut again = vec![self.push_again(server, packing)?];
            let mut pulls = vec![self.pull(server, packing)?];
            for peer in self.peers {
                step::note(&format!("{}: {packing}, {}", peer.name, server.name));
                let rows = self.peer(peer, server, packing)?;
                for (rows, times) in [&mut pushes, &mut again, &mut pulls].into_iter().zip(rows) {
                    rows.push(Row { builder: peer.name.to_owned(), times });
                }
            }
            if packages::find_program("skopeo").is_some() {
                again.push(self.skopeo_again(server, packing)?);
            }
            if by_hand::is_possible() {
                step::note(&format!("by hand: {packing}, {}", server.name));
                let (ours, temp) =
                    (format!("http://{}/v2/kiln/image", server.place), self.store.with_file_name("by-hand"));
                let theirs = format!("http://{}/v2/by-hand/image", server.place);
                pushes.push(by_hand::push(&theirs, packing, &self.context, &["tree", "big"], &temp)?);
                pulls.push(by_hand::pull(&ours, packing, packing, &temp)?);
                super::remove(&temp)?;
            }
            let title = |what: &str| format!("{what}, {packing}, {}, ms", server.name);
            println!("\n{}", table(&title("First push"), &pushes, 1));
            println!("{}", table(&title("Push with nothing to send"), &again, 1));
            println!("{}", table(&title("Pull into an empty store, unpacked"), &pulls, 1));
            // Each is two GiB, and the next ones are other images.
            super::remove(&self.store)?;
            step::read(&mut self.kiln.command(&["rmi", "-f", &self.name(server, "kiln", packing), IMAGE]))?;
            step::read(&mut self.kiln.command(&["prune", "--force"]))?;
        }
        Ok(())
    }

    fn name(&self, server: &Server, who: &str, packing: &str) -> String {
        format!("{}/{who}/image:{packing}", server.place)
    }

    /// Each time content that nobody packed or sent before.
    fn push_first(&self, server: &Server, packing: &str) -> Result<Row, Failure> {
        let name = self.name(server, "kiln", packing);
        let times = (0..SAMPLES).map(|nth| {
            images::write_mixed(&self.context.join("big"))?;
            super::write(&self.context.join("tree/which"), &format!("{name}, {nth}"))?;
            let context = self.context.to_string_lossy();
            step::read(&mut self.kiln.command(&["build", "--progress", "quiet", "-t", IMAGE, &context]))?;
            step::read(&mut self.kiln.command(&["tag", IMAGE, &name]))?;
            images::settle()?;
            timed(&mut self.kiln.command(&["push", "-q", "--compression", packing, &name]))
        });
        Ok(Row { builder: "kiln".to_owned(), times: times.collect::<Result<_, _>>()? })
    }

    fn push_again(&self, server: &Server, packing: &str) -> Result<Row, Failure> {
        let name = self.name(server, "kiln", packing);
        let push = || self.kiln.command(&["push", "-q", "--compression", packing, &name]);
        Ok(Row { builder: "kiln".to_owned(), times: super::sample(AGAIN_SAMPLES, push)? })
    }

    fn pull(&self, server: &Server, packing: &str) -> Result<Row, Failure> {
        let (root, name) = (self.store.to_string_lossy(), self.name(server, "kiln", packing));
        let times = (0..SAMPLES).map(|_| {
            super::remove(&self.store)?;
            images::settle()?;
            timed(&mut self.kiln.command(&["--root", &root, "pull", "-q", &name]))
        });
        Ok(Row { builder: "kiln".to_owned(), times: times.collect::<Result<_, _>>()? })
    }

    /// A peer's first push, push again and pull.
    fn peer(&self, peer: &Peer, server: &Server, packing: &str) -> Result<[Vec<Duration>; 3], Failure> {
        let name = self.name(server, peer.name, packing);
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let push =
            words(&["push", "-q", "--tls-verify=false", "--compression-format", packing, IMAGE, &name]);
        images::write_mixed(&self.context.join("big"))?;
        step::read(&mut peer.build(&self.context, IMAGE, false))?;
        images::settle()?;
        let first = timed(&mut peer.command(&push))?;
        let again = super::sample(SAMPLES, || peer.command(&push))?;
        let all_gone = words(&["rmi", "-a", "-f"]);
        step::read(&mut peer.command(&all_gone))?;
        images::settle()?;
        let pull = timed(&mut peer.command(&words(&["pull", "-q", "--tls-verify=false", &name])))?;
        step::read(&mut peer.command(&all_gone))?;
        peer.import_busybox(self.bases)?;
        Ok([vec![first], again, vec![pull]])
    }

    /// From the registry to where it is already.
    fn skopeo_again(&self, server: &Server, packing: &str) -> Result<Row, Failure> {
        let name = format!("docker://{}", self.name(server, "kiln", packing));
        let copy = || {
            let mut command = Command::new("skopeo");
            command.args(["copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false", &name, &name]);
            command
        };
        Ok(Row { builder: "skopeo".to_owned(), times: super::sample(SAMPLES, copy)? })
    }
}
