//! What a rebuild costs when nothing changed, when one file did, and when everything is new.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Row, containers, remove, sample, timed, write};
use crate::bases::Bases;
use crate::demo::{Kiln, median, milliseconds};
use crate::peers::Peer;
use crate::step::{self, Failure};

const SMALL_SAMPLES: usize = 21;
const LARGE_SAMPLES: usize = 5;
/// Of peers, which take their time.
const THEIR_SAMPLES: usize = 2;

const FILES: usize = 50_000;
const STAGES: usize = 100;
const IMAGE: &str = "kiln-bench-cache";

/// Four stages, twelve instructions.
const SMALL: &str = "FROM busybox AS base\nWORKDIR /app\nENV MODE=production\n\
    FROM base AS deps\nCOPY package.json ./\nRUN mkdir -p node_modules && echo dep > node_modules/dep\n\
    FROM base AS build\nCOPY --from=deps /app/node_modules ./node_modules\nCOPY . .\n\
    RUN find src -type f | sort | xargs cat | wc -c > size\n\
    FROM base\nCOPY --from=build /app/size /app/src/ ./\nUSER 1000\nCMD [\"cat\", \"size\"]\n";

/// One line of the table: the times of each builder, in the order of [`run`].
struct Line {
    title: String,
    rows: Vec<Row>,
}

/// Prints one table. Takes some minutes, most of them the peers', and 5 GiB of disk below `temp`.
pub(super) fn run(kiln: &Kiln, peers: &[Peer], bases: &Bases, temp: &Path) -> Result<(), Failure> {
    step::heading("Caches", "no change, one file of 50,000, all of them, 10,000 steps from the cache");
    let dir = temp.join("cache");
    let contexts = Contexts::make(&dir)?;
    let mut builders = vec![Builder::Kiln { kiln, bases, cold: dir.join("cold") }];
    builders.extend(peers.iter().map(Builder::Peer));
    let mut lines = Vec::new();
    for (title, measure) in [
        ("nothing changed: 12 instructions, 200 files", small as fn(&Builder<'_>, &Contexts) -> _),
        ("nothing changed: 50,000 files of 8 KiB", large),
        ("one of the 50,000 changed, COPY and RUN again", one_changed),
        ("COPY of the 50,000, cold", cold),
    ] {
        let mut rows = Vec::new();
        for builder in &builders {
            step::note(&format!("{}: {title}", builder.name()));
            rows.push(Row { builder: builder.name().to_owned(), times: measure(builder, &contexts)? });
        }
        lines.push(Line { title: title.to_owned(), rows });
    }
    let rows = containers::stages(kiln, peers, &dir)?;
    lines.push(Line { title: "16 stages of `RUN sleep 1`, joined".to_owned(), rows });
    step::note("10,000 steps, all cached: kiln alone, the others would take hours to make them");
    let builder = &builders[0];
    step::read(&mut builder.build(&contexts.steps, &[], IMAGE))?;
    let times = sample(LARGE_SAMPLES, || builder.build(&contexts.steps, &[], IMAGE))?;
    let rows = vec![Row { builder: builder.name().to_owned(), times }];
    lines.push(Line { title: "nothing changed: 10,000 steps in 100 stages".to_owned(), rows });
    println!("\n{}", table(&builders.iter().map(Builder::name).collect::<Vec<_>>(), &lines));
    step::read(&mut kiln.command(&["rmi", "-f", IMAGE]))?;
    remove(&dir)
}

enum Builder<'a> {
    Kiln {
        kiln: &'a Kiln,
        bases: &'a Bases,
        /// A store that knows nothing.
        cold: PathBuf,
    },
    Peer(&'a Peer),
}

impl Builder<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Kiln { .. } => "kiln",
            Self::Peer(peer) => peer.name,
        }
    }

    fn build(&self, context: &Path, flags: &[&str], image: &str) -> Command {
        match self {
            Self::Kiln { kiln, .. } => {
                let path = context.to_string_lossy();
                kiln.command(&[&["build", "--progress", "quiet", "-t", image], flags, &[&*path]].concat())
            }
            Self::Peer(peer) => peer.build_with(context, image, flags),
        }
    }

    fn samples(&self, ours: usize) -> usize {
        if matches!(self, Self::Kiln { .. }) { ours } else { ours.min(THEIR_SAMPLES) }
    }
}

fn small(builder: &Builder<'_>, contexts: &Contexts) -> Result<Vec<Duration>, Failure> {
    again(builder, &contexts.small, SMALL_SAMPLES)
}

fn large(builder: &Builder<'_>, contexts: &Contexts) -> Result<Vec<Duration>, Failure> {
    again(builder, &contexts.large, LARGE_SAMPLES)
}

fn again(builder: &Builder<'_>, context: &Path, samples: usize) -> Result<Vec<Duration>, Failure> {
    step::read(&mut builder.build(context, &[], IMAGE))?;
    // Young files are read once more.
    step::read(&mut builder.build(context, &[], IMAGE))?;
    sample(builder.samples(samples), || builder.build(context, &[], IMAGE))
}

fn one_changed(builder: &Builder<'_>, contexts: &Contexts) -> Result<Vec<Duration>, Failure> {
    let changed = |nth| {
        // Never a content that some builder has seen before, and each time another directory.
        let path = contexts.file(nth * 9_973 % FILES);
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        fs::write(&path, format!("{now:?}")).map_err(Failure::io("write", &path))?;
        timed(&mut builder.build(&contexts.large, &[], IMAGE))
    };
    (1..=builder.samples(LARGE_SAMPLES)).map(changed).collect()
}

fn cold(builder: &Builder<'_>, contexts: &Contexts) -> Result<Vec<Duration>, Failure> {
    let copy = contexts.large.join("Dockerfile.copy");
    let flags = ["-f", &copy.to_string_lossy()];
    let once = |_| match builder {
        Builder::Kiln { kiln, bases, cold } => {
            remove(cold)?;
            let (root, base) = (cold.to_string_lossy(), bases.busybox.to_string_lossy());
            step::read(&mut kiln.command(&["--root", &*root, "import", &*base, "busybox:latest"]))?;
            step::read(&mut Command::new("sync"))?;
            timed(builder.build(&contexts.large, &flags, IMAGE).env("KILN_ROOT", cold))
        }
        Builder::Peer(_) => {
            step::read(&mut Command::new("sync"))?;
            timed(&mut builder.build(&contexts.large, &[&["--no-cache"], &flags[..]].concat(), IMAGE))
        }
    };
    (0..builder.samples(LARGE_SAMPLES)).map(once).collect()
}

struct Contexts {
    small: PathBuf,
    large: PathBuf,
    steps: PathBuf,
}

impl Contexts {
    fn make(dir: &Path) -> Result<Self, Failure> {
        let [small, large, steps] = ["small", "large", "steps"].map(|name| dir.join(name));
        write(&small.join("Dockerfile"), SMALL)?;
        write(&small.join("package.json"), "{}\n")?;
        for nth in 0..198 {
            let text = format!("line {nth}\n").repeat(100 + nth);
            write(&small.join(format!("src/m{}/f{nth}.js", nth % 14)), &text)?;
        }
        let copy = "FROM busybox\nCOPY tree /data/tree\n";
        write(&large.join("Dockerfile"), &format!("{copy}RUN echo built > /done\n"))?;
        write(&large.join("Dockerfile.copy"), copy)?;
        let contexts = Self { small, large, steps };
        for nth in 0..FILES {
            write_large(&contexts.file(nth), nth)?;
        }
        write(&contexts.steps.join("Dockerfile"), &ten_thousand())?;
        write(&contexts.steps.join("f"), "f\n")?;
        Ok(contexts)
    }

    fn file(&self, nth: usize) -> PathBuf {
        self.large.join(format!("tree/d{}/s{}/f{nth}.txt", nth / 2000, nth / 100 % 20))
    }
}

/// 8 KiB that no other file has.
fn write_large(path: &Path, nth: usize) -> Result<(), Failure> {
    write(path, "")?;
    let fill = || {
        let mut out = BufWriter::new(File::create(path)?);
        (0..512).try_for_each(|line| writeln!(out, "{nth:05} line {line:04}"))?;
        out.flush()
    };
    fill().map_err(Failure::io("write", path))
}

/// Stages of copies that all differ, joined in the last one.
fn ten_thousand() -> String {
    let mut text = String::new();
    for stage in 0..STAGES {
        text.push_str(&format!("FROM busybox AS s{stage}\n"));
        (1..STAGES).for_each(|copy| text.push_str(&format!("COPY f /{stage}/{copy}\n")));
    }
    text.push_str("FROM busybox\n");
    (0..STAGES).for_each(|stage| text.push_str(&format!("COPY --from=s{stage} /{stage} /{stage}\n")));
    text
}

/// Medians in milliseconds, those of others with how many times kiln's they are.
fn table(builders: &[&str], lines: &[Line]) -> String {
    let mut text = "### Rebuilds, ms (times kiln)\n\n| scenario |".to_owned();
    builders.iter().for_each(|name| text.push_str(&format!(" {name} |")));
    text.push_str("\n|---|");
    builders.iter().for_each(|_| text.push_str("--:|"));
    text.push('\n');
    for Line { title, rows } in lines {
        text.push_str(&format!("| {title} |"));
        let first = rows.first().map_or(Duration::ZERO, |row| median(&row.times)).as_secs_f64();
        for name in builders {
            // Some have a row for each of several ways: the first is the default one.
            match rows.iter().find(|row| row.builder.starts_with(name)).map(|row| median(&row.times)) {
                Some(time) if *name != "kiln" && first > 0.0 => {
                    let ratio = time.as_secs_f64() / first;
                    text.push_str(&format!(" {} ({ratio:.1}) |", milliseconds(time)));
                }
                Some(time) => text.push_str(&format!(" {} |", milliseconds(time))),
                None => text.push_str(" |"),
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_column_for_each_builder_and_a_gap_for_who_did_not_do_it() {
        let row = |builder: &str, ms: u64| Row {
            builder: builder.to_owned(),
            times: vec![Duration::from_millis(ms)],
        };
        let line = |title: &str, rows| Line { title: title.to_owned(), rows };
        let lines = [
            line("one", vec![row("kiln", 4), row("podman", 1000)]),
            line("two", vec![row("kiln", 5), row("buildah", 50), row("podman, 16 jobs", 20)]),
        ];
        let text = table(&["kiln", "buildah", "podman"], &lines);
        assert!(text.contains("\n| one | 4.0 | | 1000.0 (250.0) |\n"), "{text}");
        assert!(text.contains("\n| two | 5.0 | 50.0 (10.0) | 20.0 (4.0) |\n"), "{text}");
    }

    #[test]
    fn there_are_ten_thousand_steps_and_no_two_are_the_same() {
        let text = ten_thousand();
        let steps: std::collections::HashSet<&str> =
            text.lines().filter(|line| line.starts_with("COPY")).collect();
        assert_eq!(steps.len(), 10_000);
    }
}
