//! Collections run all the time while images come slowly, are built on, copied out and removed by other
//! processes: what a command says that it has done is done, and whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::server::Bench;
use crate::harness::{Context, needs_root, text};
use crate::scripted::{Reply, Server};

/// Between the two halves of every blob: a collection takes less.
const PAUSE: Duration = Duration::from_millis(60);
/// Images that the registry has, `v0` and on.
const VERSIONS: usize = 3;

/// A registry whose blobs come in two halves, with a pause between them, and its images.
fn halting(maker: &Bench) -> Server {
    let this: Arc<OnceLock<Server>> = Arc::default();
    let own = this.clone();
    let server = Server::scripted(move |request, _| {
        let server = own.get().filter(|_| request.is_blob())?;
        Some(match server.behave(request) {
            Reply::Bytes(bytes) => {
                let (first, second) = bytes.split_at(bytes.len() / 2);
                Reply::Halting(first.to_vec(), PAUSE, second.to_vec())
            }
            other => other,
        })
    });
    for version in 0..VERSIONS {
        let steps = format!("FROM busybox\nCOPY variant /\nRUN --network=none echo made {version} > /made\n");
        let variant = format!("variant {version}\n");
        let context = Context::new(&[("Dockerfile", &steps), ("variant", &variant)]);
        let name = format!("{}/made/app:v{version}", server.domain());
        maker.build(&context, &["--push", "-t", &name]).expect(0);
    }
    // From now on it takes its time.
    assert!(this.set(server.clone()).is_ok(), "set once");
    server
}

/// One process after the other, and what they say must hold.
struct Worker<'b> {
    bench: &'b Bench,
    server: &'b Server,
    archive: &'b Path,
    number: usize,
}

impl Worker<'_> {
    /// A repository of its own; the registry has the same images in each.
    fn remote(&self, version: usize) -> String {
        format!("{}/w{}/app:v{version}", self.server.domain(), self.number)
    }

    fn local(&self, name: &str) -> String {
        format!("w{}-{name}:1", self.number)
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.bench.store.beside(&format!("w{}-{name}", self.number))
    }

    #[track_caller]
    fn says(&self, image: &str, version: usize) {
        let said = self.bench.ok(&["run", "--rm", "--network", "none", image, "cat", "/variant", "/made"]);
        assert_eq!(said, format!("variant {version}\nmade {version}\n"), "{image}");
    }

    /// A build on an image that has to come first.
    fn build(&self, version: usize, name: &str) {
        let steps =
            format!("FROM {}\nRUN --network=none cat /made > /again\nCOPY f /f\n", self.remote(version));
        let context = Context::new(&[("Dockerfile", &steps), ("f", &format!("{} {version}", self.number))]);
        self.bench.build(&context, &["-t", name]).expect(0);
    }

    /// Names stay; each is held to what it should lead to as soon as it is there.
    fn named(&self, rounds: usize) {
        for round in 0..rounds {
            let version = (self.number + round) % VERSIONS;
            let (remote, built) = (self.remote(version), self.local("built"));
            match self.number % 4 {
                0 => {
                    self.bench.ok(&["pull", &remote]);
                    self.says(&remote, version);
                }
                1 => self.says(&remote, version),
                2 => {
                    self.build(version, &built);
                    self.says(&built, version);
                }
                _ => {
                    self.bench.ok(&["pull", &remote]);
                    self.copies(&remote, version);
                }
            }
            // So that it has to come again.
            if round + 1 < rounds {
                self.bench.ok(&["rmi", "--force", &remote, &built]);
            }
        }
    }

    /// Everything else that reads an image or makes one of it.
    fn copies(&self, image: &str, version: usize) {
        let (tar, rootfs) = (self.beside("saved.tar"), self.beside("rootfs.tar"));
        let (imported, changed) = (self.local("imported"), self.local("changed"));
        self.bench.ok(&["export", "-o", text(&rootfs), image]);
        self.bench.ok(&["import", text(&rootfs), &imported, "-c", "ENV PATH=/bin"]);
        self.says(&imported, version);
        let out = self.beside("copied");
        self.bench.ok(&["cp", &format!("{imported}:/variant"), text(&out)]);
        assert_eq!(fs::read_to_string(&out).expect("copied"), format!("variant {version}\n"));
        self.bench.ok(&["mutate", image, "-t", &changed, "--label", "a=b", "--squash=all"]);
        self.says(&changed, version);
        self.bench.ok(&["save", "-o", text(&tar), &changed]);
        self.bench.ok(&["rmi", &imported, &changed]);
        self.bench.ok(&["load", "-q", "-i", text(&tar)]);
        self.says(&changed, version);
    }

    /// Any name may go as soon as it is there; what is under way must not.
    fn nameless(&self, rounds: usize) {
        for round in 0..rounds {
            let version = (self.number + round) % VERSIONS;
            match self.number % 4 {
                0 => drop(self.bench.ok(&["pull", &self.remote(version)])),
                1 => self.says(&self.remote(version), version),
                2 => self.build(version, &self.local("built")),
                _ => drop(self.bench.ok(&["load", "-q", "-i", text(self.archive)])),
            }
        }
    }
}

/// Lets four workers work while `collections` follow each other; how many there were.
fn race(
    collections: &[&[&str]],
    work: impl Fn(&Worker<'_>) + Sync,
    afterwards: impl FnOnce(&[Worker<'_>]),
) -> usize {
    let maker = Bench::new();
    let server = halting(&maker);
    let archive = maker.store.beside("v0.tar");
    maker.ok(&["save", "-o", text(&archive), &format!("{}/made/app:v0", server.domain())]);
    let bench = Bench::empty();
    bench.ok(&["images"]);
    let workers: Vec<Worker<'_>> =
        (0..4).map(|number| Worker { bench: &bench, server: &server, archive: &archive, number }).collect();
    let (stop, work) = (AtomicBool::new(false), &work);
    let runs = std::thread::scope(|scope| {
        let (bench, stop) = (&bench, &stop);
        let collector = scope.spawn(move || {
            let mut runs = 0;
            while !stop.load(Ordering::SeqCst) {
                bench.ok(collections[runs % collections.len()]);
                runs += 1;
            }
            runs
        });
        let threads: Vec<_> = workers.iter().map(|worker| scope.spawn(move || work(worker))).collect();
        // All of them end before anybody is told that one has failed.
        let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        stop.store(true, Ordering::SeqCst);
        let runs = collector.join().expect("the collector's assertion");
        for end in ended {
            end.expect("a worker's assertion");
        }
        runs
    });
    bench.store.sound().unwrap();
    assert_eq!(bench.store.active_snapshots(), [""; 0]);
    afterwards(&workers);
    bench.store.sound().unwrap();
    println!("{runs} collections");
    runs
}

#[test]
fn what_has_a_name_is_whole_however_it_came_while_everything_else_goes() {
    needs_root!();
    let rounds = 4;
    let collections: [&[&str]; 2] = [&["gc", "--keep-duration", "0s"], &["prune", "--force"]];
    let runs = race(
        &collections,
        |worker| worker.named(rounds),
        |workers| {
            for worker in workers {
                let version = (worker.number + rounds - 1) % VERSIONS;
                let name = if worker.number == 2 { worker.local("built") } else { worker.remote(version) };
                // Nobody is asked: it is there.
                worker.bench.store.shell(&name, "cat /variant");
                worker.bench.ok(&["save", "-o", text(&worker.beside("last.tar")), &name]);
            }
            workers[3].says(&workers[3].local("changed"), (3 + rounds - 1) % VERSIONS);
        },
    );
    assert!(runs > rounds, "{runs}");
}

#[test]
fn what_is_on_its_way_arrives_although_every_name_goes() {
    needs_root!();
    let runs = race(
        &[&["prune", "--all", "--force"]],
        |worker| worker.nameless(4),
        |workers| {
            for worker in workers {
                let name = worker.remote(0);
                worker.bench.ok(&["pull", &name]);
                worker.says(&name, 0);
                worker.bench.ok(&["save", "-o", text(&worker.beside("last.tar")), &name]);
            }
        },
    );
    assert!(runs > 4, "{runs}");
}
