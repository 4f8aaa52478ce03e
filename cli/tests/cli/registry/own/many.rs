//! Many kilns at once, each a process of its own with a store of its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex};

use super::super::server::{Bench, digest_in};
use super::Own;
use crate::harness::{Context, needs_root, text};

const CLIENTS: usize = 64;
/// So much more memory is no growth: buffers come and go.
const SLACK_KIB: f64 = 10.0 * 1024.0;

/// How much memory the registry had when so many commands had ended.
#[derive(Default)]
struct Course {
    ended: AtomicU64,
    points: Mutex<Vec<(f64, f64)>>,
}

impl Course {
    fn note(&self, own: &Own) {
        let ended = self.ended.fetch_add(1, Ordering::SeqCst) + 1;
        self.points.lock().expect("nobody panics").push((ended as f64, own.rss_kib() as f64));
    }

    /// By how many KiB the memory grew from the first point to the last, by the straight line that fits all of them
    /// best: what single points have too much or too little does not count.
    fn growth_kib(&self) -> f64 {
        let points = self.points.lock().expect("nobody panics");
        let count = points.len() as f64;
        let mean = |part: fn(&(f64, f64)) -> f64| points.iter().map(part).sum::<f64>() / count;
        let (x, y) = (mean(|point| point.0), mean(|point| point.1));
        let (mut both, mut square) = (0.0, 0.0);
        for point in points.iter() {
            both += (point.0 - x) * (point.1 - y);
            square += (point.0 - x) * (point.0 - x);
        }
        both / square * (count - 1.0)
    }
}

/// One of those who push and pull.
struct Kiln {
    bench: Bench,
    number: usize,
    context: Context,
}

impl Kiln {
    fn new(number: usize) -> Self {
        let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY file /\nLABEL of=test\n")]);
        Self { bench: Bench::empty(), number, context }
    }

    /// Builds and pushes an image that nobody has; its digest.
    fn push(&self, own: &Own, round: usize) -> String {
        let mut bytes = super::super::pace::noise(1);
        bytes.truncate(200_000);
        bytes.extend_from_slice(format!("{} in round {round}", self.number).as_bytes());
        std::fs::write(self.context.at("file"), bytes).expect("ours to write");
        let pushed =
            self.bench.build(&self.context, &["--push", "-t", &name(own, self.number, round)]).expect(0);
        assert!(pushed.stdout.contains("2 blobs sent"), "{}", pushed.stdout);
        digest_in(&pushed.stdout).to_owned()
    }

    /// Pulls what another one has pushed.
    fn pull(&self, own: &Own, of: usize, round: usize, digest: &str) {
        let name = name(own, of, round);
        assert_eq!(digest_in(&self.bench.ok(&["pull", &name])), digest);
        let out = self.bench.at("file");
        self.bench.ok(&["cp", &format!("{name}:/file"), text(&out)]);
        let file = std::fs::read(&out).expect("just copied");
        assert!(file.ends_with(format!("{of} in round {round}").as_bytes()));
        std::fs::remove_file(out).expect("ours");
    }
}

fn name(own: &Own, number: usize, round: usize) -> String {
    own.name(&format!("team/app{}:t{number}-{round}", number % 8))
}

/// All of them at once.
fn all<T: Send>(kilns: &[Kiln], work: impl Fn(&Kiln) -> T + Sync) -> Vec<T> {
    let (start, work) = (&Barrier::new(kilns.len()), &work);
    std::thread::scope(|scope| {
        let begin = |kiln| {
            scope.spawn(move || {
                start.wait();
                work(kiln)
            })
        };
        let threads: Vec<_> = kilns.iter().map(begin).collect();
        threads.into_iter().map(|thread| thread.join().expect("no kiln sees an error")).collect()
    })
}

/// Everybody pushes, and then pulls what his neighbour has pushed.
fn round(own: &Own, kilns: &[Kiln], round: usize, course: &Course) {
    let pushed = all(kilns, |kiln| {
        let digest = kiln.push(own, round);
        course.note(own);
        digest
    });
    all(kilns, |kiln| {
        let of = (kiln.number + 1) % CLIENTS;
        kiln.pull(own, of, round, &pushed[of]);
        course.note(own);
    });
}

#[test]
fn sixty_four_kilns_push_and_pull_at_once_in_flat_memory() {
    needs_root!();
    let rounds = std::env::var("KILN_REGISTRY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let own = Own::start();
    let kilns: Vec<Kiln> = (0..CLIENTS).map(Kiln::new).collect();
    // All buffers that there will ever be are there behind this one.
    round(&own, &kilns, 0, &Course::default());
    let course = Course::default();
    (1..=rounds).for_each(|number| round(&own, &kilns, number, &course));
    let growth = course.growth_kib();
    eprintln!("{growth:.0} KiB in {} commands", 2 * CLIENTS * rounds);
    assert!(growth < SLACK_KIB, "{growth:.0} KiB in {} commands", 2 * CLIENTS * rounds);
    let metrics = String::from_utf8(own.client().get("/metrics").expect(200).body).unwrap();
    // That a blob or tag is not there yet is what they ask.
    let is_error = |line: &&str| {
        line.contains("status=\"5") || (line.contains("status=\"4") && !line.contains("status=\"404\""))
    };
    assert_eq!(metrics.lines().filter(is_error).collect::<Vec<_>>(), [""; 0]);
    let pushed = format!("{{method=\"PUT\",route=\"manifest\",status=\"201\"}} {}", CLIENTS * (rounds + 1));
    assert!(metrics.contains(&pushed), "{metrics}");
    kilns[0].bench.store.sound().unwrap();
}
