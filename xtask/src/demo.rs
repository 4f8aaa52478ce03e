//! The task `demo`: from nothing to a running application image, and the rebuild that runs nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::step::{self, Failure};
use crate::{bases, binary, packages, progress};

/// PATH that the base images declare.
pub(crate) const PATH: &str = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the demo application is, seen from the repository's root.
pub(crate) const CONTEXT: &str = "testdata/demo";

const REBUILDS: usize = 5;

/// A kiln binary together with the store that it works on.
pub(crate) struct Kiln {
    program: PathBuf,
    root: PathBuf,
}

impl Kiln {
    /// A command line of kiln on this store, started at the repository's root.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).env("KILN_ROOT", &self.root).current_dir(step::repository());
        command
    }

    fn show(&self, args: &[&str]) -> Result<(), Failure> {
        step::show(&mut self.command(args)).map(drop)
    }
}

/// The task.
pub(crate) fn run() -> Result<(), Failure> {
    let kiln = prepare()?;

    step::heading(
        "Build",
        "the Dockerfile in testdata/demo: gcc in stage 1, python3 and the program in stage 2",
    );
    kiln.show(&["build", "-t", "kiln-demo:latest", CONTEXT])?;

    step::heading("Run", "the image's own ENTRYPOINT, as its unprivileged user");
    kiln.show(&["run", "--rm", "kiln-demo"])?;

    step::heading("Build again", "nothing has changed, so nothing may run: every step has to say CACHED");
    let mut again = kiln.command(&["build", "--progress", "plain", "-t", "kiln-demo:latest", CONTEXT]);
    let outcome = progress::read(&step::show_and_keep(&mut again)?.1);
    if !outcome.ran.is_empty() || outcome.cached == 0 {
        return Err(Failure::NotCached { steps: outcome.ran });
    }
    let times = rebuild_times(&kiln, REBUILDS)?;
    let listed: Vec<String> = times.iter().map(|time| milliseconds(*time)).collect();
    step::note(&format!("{} steps came from the cache", outcome.cached));
    step::note(&format!("{REBUILDS} more rebuilds took {} ms", listed.join(", ")));
    step::note(&format!("median {} ms from start to exit", milliseconds(median(&times))));

    step::heading("Look around", "what the store holds now, and what each instruction added");
    kiln.show(&["images"])?;
    kiln.show(&["history", "kiln-demo"])?;

    step::heading("Done", "to go on by hand:");
    println!("export PATH={}:$PATH", kiln.program.parent().unwrap_or(Path::new("/")).display());
    println!("export KILN_ROOT={}", kiln.root.display());
    step::note("The store is kept, so the next demo starts with a full cache. Remove it with:");
    println!("rm -rf {}", kiln.root.display());
    Ok(())
}

/// Everything up to the first build: packages, the binary, base trees and base images.
pub(crate) fn prepare() -> Result<Kiln, Failure> {
    step::heading("Packages", "what the demo needs from the distribution");
    packages::ensure(&[packages::DEMO])?;

    step::heading("The binary", "kiln in release mode, one static file");
    let program = binary::release()?;

    let bases = bases::ensure()?;
    let kiln = Kiln { program, root: step::cache_home().join("kiln-demo") };

    step::heading("Base images", "root file systems become images that FROM can name");
    step::note(&format!("export KILN_ROOT={}   (a store of the demo's own)", kiln.root.display()));
    for (tar, name, shell) in
        [(&bases.debian, "debian:bookworm", "bash"), (&bases.busybox, "busybox:latest", "sh")]
    {
        // Importing the same tree again would only make the same layer again.
        if step::succeeds(&mut kiln.command(&["inspect", name])) {
            step::note(&format!("{name} is there"));
            continue;
        }
        let cmd = format!("CMD [\"{shell}\"]");
        kiln.show(&["import", &tar.to_string_lossy(), name, "-c", &cmd, "-c", PATH])?;
    }
    Ok(kiln)
}

/// Wall times of builds in which nothing has changed, process start and exit included.
pub(crate) fn rebuild_times(kiln: &Kiln, count: usize) -> Result<Vec<Duration>, Failure> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        step::read(&mut kiln.command(&["build", "--progress", "quiet", "-t", "kiln-demo:latest", CONTEXT]))?;
        times.push(start.elapsed());
    }
    Ok(times)
}

/// The middle one; of an even number, the upper of the two.
pub(crate) fn median(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// With one digit after the point.
pub(crate) fn milliseconds(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_one() {
        let times = [30, 10, 500, 20, 25].map(Duration::from_millis);
        assert_eq!(median(&times), Duration::from_millis(25));
        assert_eq!(median(&[]), Duration::ZERO);
    }

    #[test]
    fn milliseconds_have_one_digit() {
        assert_eq!(milliseconds(Duration::from_micros(23_456)), "23.5");
    }

    #[test]
    fn the_demo_application_is_where_the_demo_looks_for_it() {
        let context = step::repository().join(CONTEXT);
        for file in ["Dockerfile", ".dockerignore", "hello.c", "app/main.py"] {
            assert!(context.join(file).is_file(), "{file}");
        }
    }
}
