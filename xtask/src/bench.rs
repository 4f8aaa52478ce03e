//! The task `bench`: what a rebuild costs, what a RUN costs; see `benches/README.md`.

mod by_hand;
mod cache;
mod containers;
mod images;
mod registry;
mod vertices;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::bases::{self, Bases};
use crate::demo::{self, Kiln, median, milliseconds};
use crate::peers::{self, Peer};
use crate::step::{self, Failure};

const REBUILDS: usize = 21;
const STEP_BUILDS: usize = 11;
const STEPS: u32 = 50;
const RUN_TITLE: &str = "`RUN true` on busybox, ms a step (50 steps, builder's start included)";

/// One builder's samples.
struct Row {
    builder: String,
    times: Vec<Duration>,
}

/// What the benches stand on.
struct Bench {
    kiln: Kiln,
    bases: Bases,
    peers: Vec<Peer>,
    temp: PathBuf,
}

impl Bench {
    fn prepare() -> Result<Self, Failure> {
        let kiln = demo::prepare()?;
        let bases = bases::ensure()?;
        let temp = step::target_dir()?.join("bench");
        remove(&temp)?;
        let peers = peers::prepare(&temp.join("peers"), &bases)?;
        Ok(Self { kiln, bases, peers, temp })
    }

    fn steps(&self) -> Result<(), Failure> {
        let rows = run_steps(&self.kiln, &self.peers, &self.temp)?;
        println!("\n{}", table(RUN_TITLE, &rows, STEPS));
        containers::run(&self.kiln, &self.peers, &self.bases, &self.temp)
    }

    fn images(&self) -> Result<(), Failure> {
        images::run(&self.kiln, &self.peers, &self.bases, &self.temp)
    }

    fn cache(&self) -> Result<(), Failure> {
        cache::run(&self.kiln, &self.peers, &self.bases, &self.temp)
    }

    fn vertices(&self) -> Result<(), Failure> {
        cache::run_vertices(&self.kiln, &self.peers, &self.bases, &self.temp)
    }

    fn registry(&self) -> Result<(), Failure> {
        registry::run(&self.kiln, &self.peers, &self.bases, &self.temp)
    }

    /// Images that lost their names are as large as those that have theirs.
    fn finish(self) -> Result<(), Failure> {
        step::read(&mut self.kiln.command(&["prune", "--force"]))?;
        remove(&self.temp)
    }
}

/// The task `bench images`: only the images of 1 GiB.
pub(crate) fn run_images() -> Result<(), Failure> {
    let bench = Bench::prepare()?;
    bench.images()?;
    bench.finish()
}

/// The task `bench cache`: only rebuilds.
pub(crate) fn run_cache() -> Result<(), Failure> {
    let bench = Bench::prepare()?;
    bench.cache()?;
    bench.finish()
}

/// The task `bench vertices`: only many steps that are all cached.
pub(crate) fn run_vertices() -> Result<(), Failure> {
    let bench = Bench::prepare()?;
    bench.vertices()?;
    bench.finish()
}

/// The task `bench registry`: only pushes and pulls.
pub(crate) fn run_registry() -> Result<(), Failure> {
    let bench = Bench::prepare()?;
    bench.registry()?;
    bench.finish()
}

/// The task `bench containers`: only what a container and a RUN step cost.
pub(crate) fn run_containers() -> Result<(), Failure> {
    let bench = Bench::prepare()?;
    bench.steps()?;
    bench.finish()
}

/// The task.
pub(crate) fn run() -> Result<(), Failure> {
    let bench = Bench::prepare()?;
    for peer in &bench.peers {
        step::note(&peer.version()?);
    }
    let rebuild = rebuilds(&bench.kiln, &bench.peers)?;
    println!("\n{}", table("No-change rebuild of testdata/demo, ms", &rebuild, 1));
    bench.steps()?;
    bench.cache()?;
    bench.images()?;
    bench.registry()?;
    large_inputs()?;
    layers()?;
    bench.finish()
}

// A bench of the crate itself: xtask depends on no crate of ours, so that it starts at once.
fn large_inputs() -> Result<(), Failure> {
    step::heading("Large inputs", "a Dockerfile of 1 MiB, 10,000 stages, 1,000,000 ignore rules");
    step::show(step::cargo().args(["bench", "-q", "-p", "kiln-frontend", "--bench", "parse"])).map(drop)
}

// As above: the crate's own bench, which runs GNU tar and umoci beside it.
fn layers() -> Result<(), Failure> {
    step::heading("Layers", "apply and diff of 50,000 files and of 1 GiB");
    step::show(step::cargo().args(["bench", "-q", "-p", "kiln-layer", "--bench", "layers"])).map(drop)
}

fn rebuilds(kiln: &Kiln, peers: &[Peer]) -> Result<Vec<Row>, Failure> {
    step::heading("No-change rebuild", "each builder builds the demo once, then again without a change");
    let context = step::repository().join(demo::CONTEXT);
    demo::rebuild_times(kiln, 1)?;
    let mut rows = vec![Row { builder: "kiln".into(), times: demo::rebuild_times(kiln, REBUILDS)? }];
    for peer in peers {
        step::note(&format!("{}: first build", peer.name));
        step::read(&mut peer.build(&context, "kiln-demo", false))?;
        let times = sample(REBUILDS, || peer.build(&context, "kiln-demo", false))?;
        rows.push(Row { builder: peer.name.into(), times });
    }
    Ok(rows)
}

fn run_steps(kiln: &Kiln, peers: &[Peer], temp: &Path) -> Result<Vec<Row>, Failure> {
    step::heading("RUN true", "50 steps without a cache: the fixed cost of starting and committing one");
    let context = temp.join("steps");
    fs::create_dir_all(&context).map_err(Failure::io("create", &context))?;
    let dockerfile = context.join("Dockerfile");
    let text = format!("FROM busybox\n{}", "RUN true\n".repeat(STEPS as usize));
    fs::write(&dockerfile, text).map_err(Failure::io("write", &dockerfile))?;

    let path = context.to_string_lossy();
    let ours =
        || kiln.command(&["build", "--progress", "quiet", "--no-cache", "-t", "kiln-bench-steps", &path]);
    let alone = || {
        let mut command = ours();
        command.args(["--network", "none"]);
        command
    };
    let mut rows = vec![
        Row { builder: "kiln".into(), times: sample(STEP_BUILDS, ours)? },
        Row { builder: "kiln, no network".into(), times: sample(STEP_BUILDS, alone)? },
    ];
    step::read(&mut kiln.command(&["rmi", "-f", "kiln-bench-steps"]))?;
    for peer in peers {
        step::note(&format!("{}: {STEP_BUILDS} builds of {STEPS} steps, takes a while", peer.name));
        let times = sample(STEP_BUILDS, || peer.build(&context, "kiln-bench-steps", true))?;
        rows.push(Row { builder: peer.name.into(), times });
    }
    Ok(rows)
}

fn sample(count: usize, command: impl Fn() -> Command) -> Result<Vec<Duration>, Failure> {
    (0..count).map(|_| timed(&mut command())).collect()
}

/// Runs a command that has to succeed; how long that took.
fn timed(command: &mut Command) -> Result<Duration, Failure> {
    let start = Instant::now();
    step::read(command)?;
    Ok(start.elapsed())
}

// Ratios are to the first row, which is kiln's.
fn table(title: &str, rows: &[Row], divisor: u32) -> String {
    let mut text = format!(
        "### {title}\n\n| builder | n | median | min | max | times kiln |\n|---|--:|--:|--:|--:|--:|\n"
    );
    let first = rows.first().map_or(Duration::ZERO, |row| median(&row.times));
    for row in rows {
        let middle = median(&row.times);
        let show = |time: Option<&Duration>| milliseconds(time.copied().unwrap_or_default() / divisor);
        let ratio = if first.is_zero() { 0.0 } else { middle.as_secs_f64() / first.as_secs_f64() };
        let (least, most) = (show(row.times.iter().min()), show(row.times.iter().max()));
        let (builder, n, middle) = (&row.builder, row.times.len(), show(Some(&middle)));
        text.push_str(&format!("| {builder} | {n} | {middle} | {least} | {most} | {ratio:.1} |\n"));
    }
    text
}

/// Writes a file of a context, in directories that are made.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let parent = path.parent().expect("it is in a context");
    fs::create_dir_all(parent).map_err(Failure::io("create", parent))?;
    fs::write(path, text).map_err(Failure::io("write", path))
}

fn remove(dir: &Path) -> Result<(), Failure> {
    // Overlay stores leave a bind mount of themselves behind.
    let store = dir.join("peers/store/overlay");
    if store.exists() {
        step::succeeds(Command::new("umount").arg("-l").arg(store));
    }
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::io("remove", dir)(source))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_gives_medians_a_step_and_ratios_to_kiln() {
        let row = |builder: &str, ms: &[u64]| Row {
            builder: builder.into(),
            times: ms.iter().map(|ms| Duration::from_millis(*ms)).collect(),
        };
        let text = table("t", &[row("kiln", &[500, 450, 600]), row("podman", &[5000, 5000, 7000])], 50);
        assert!(text.contains("| kiln | 3 | 10.0 | 9.0 | 12.0 | 1.0 |"), "{text}");
        assert!(text.contains("| podman | 3 | 100.0 | 100.0 | 140.0 | 10.0 |"), "{text}");
    }
}
