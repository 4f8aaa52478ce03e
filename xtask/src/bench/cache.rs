//! What a rebuild costs when nothing changed, when one file did, and when everything is new.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Row, containers, remove, sample, timed, vertices, write};
use crate::bases::Bases;
use crate::demo::{Kiln, median, milliseconds};
use crate::peers::{self, Peer};
use crate::step::{self, Failure};

const SMALL_SAMPLES: usize = 21;
pub(super) const LARGE_SAMPLES: usize = 5;
/// Of peers, which take their time.
const THEIR_SAMPLES: usize = 2;

const FILES: usize = 50_000;
pub(super) const IMAGE: &str = "kiln-bench-cache";

/// Four stages, twelve instructions.
const SMALL: &str = "FROM busybox AS base\nWORKDIR /app\nENV MODE=production\n\
    FROM base AS deps\nCOPY package.json ./\nRUN mkdir -p node_modules && echo dep > node_modules/dep\n\
    FROM base AS build\nCOPY --from=deps /app/node_modules ./node_modules\nCOPY . .\n\
    RUN find src -type f | sort | xargs cat | wc -c > size\n\
    FROM base\nCOPY --from=build /app/size /app/src/ ./\nUSER 1000\nCMD [\"cat\", \"size\"]\n";

/// One line of the table: the times of each builder, in the order of [`run`].
pub(super) struct Line {
    pub(super) title: String,
    pub(super) rows: Vec<Row>,
}

/// Prints one table. Takes some minutes, most of them the peers', and 5 GiB of disk below `temp`.
pub(super) fn run(kiln: &Kiln, peers: &[Peer], bases: &Bases, temp: &Path) -> Result<(), Failure> {
    step::heading("Caches", "no change, one file of 50,000, all of them, 10,000 steps from the cache");
    let dir = temp.join("cache");
    let contexts = Contexts::make(&dir)?;
    let docker = peers::docker(bases)?;
    let builders = builders(kiln, peers.iter().chain(&docker), bases, &dir);
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
    lines.extend(vertices::lines(&builders, &dir)?);
    println!("\n{}", table(&builders.iter().map(Builder::name).collect::<Vec<_>>(), &lines));
    remove(&dir)
}

/// Prints the lines of graphs alone.
pub(super) fn run_vertices(kiln: &Kiln, peers: &[Peer], bases: &Bases, temp: &Path) -> Result<(), Failure> {
    step::heading("Vertices", "200 steps and 10,000, all of them cached");
    let dir = temp.join("vertices");
    let docker = peers::docker(bases)?;
    let builders = builders(kiln, peers.iter().chain(&docker), bases, &dir);
    let lines = vertices::lines(&builders, &dir)?;
    println!("\n{}", table(&builders.iter().map(Builder::name).collect::<Vec<_>>(), &lines));
    remove(&dir)
}

fn builders<'a>(
    kiln: &'a Kiln,
    peers: impl Iterator<Item = &'a Peer>,
    bases: &'a Bases,
    dir: &Path,
) -> Vec<Builder<'a>> {
    let own = Builder::Kiln { kiln, bases, cold: dir.join("cold") };
    std::iter::once(own).chain(peers.map(Builder::Peer)).collect()
}

pub(super) enum Builder<'a> {
    Kiln {
        kiln: &'a Kiln,
        bases: &'a Bases,
        /// A store that knows nothing.
        cold: PathBuf,
    },
    Peer(&'a Peer),
}

impl Builder<'_> {
    pub(super) fn name(&self) -> &str {
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

    /// Removes an image's name, and of what others have made for it all that nothing else needs.
    pub(super) fn remove(&self, image: &str) -> Result<(), Failure> {
        let mut command = match self {
            Self::Kiln { kiln, .. } => kiln.command(&["rmi", "-f", image]),
            Self::Peer(peer) => peer.command(&["rmi", "-f", image].map(str::to_owned)),
        };
        step::read(&mut command).map(drop)
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

pub(super) fn again(builder: &Builder<'_>, context: &Path, samples: usize) -> Result<Vec<Duration>, Failure> {
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
}

impl Contexts {
    fn make(dir: &Path) -> Result<Self, Failure> {
        let [small, large] = ["small", "large"].map(|name| dir.join(name));
        write(&small.join("Dockerfile"), SMALL)?;
        write(&small.join("package.json"), "{}\n")?;
        for nth in 0..198 {
            let text = format!("line {nth}\n").repeat(100 + nth);
            write(&small.join(format!("src/m{}/f{nth}.js", nth % 14)), &text)?;
        }
        let copy = "FROM busybox\nCOPY tree /data/tree\n";
        write(&large.join("Dockerfile"), &format!("{copy}RUN echo built > /done\n"))?;
        write(&large.join("Dockerfile.copy"), copy)?;
        let contexts = Self { small, large };
        for nth in 0..FILES {
            write_large(&contexts.file(nth), nth)?;
        }
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
}
