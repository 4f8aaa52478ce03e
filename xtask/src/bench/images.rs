//! Images of 1 GiB in and out: packed in every way, beside podman and buildah.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Row, table, timed};
use crate::bases::Bases;
use crate::demo::Kiln;
use crate::peers::Peer;
use crate::step::{self, Failure};

const SAMPLES: usize = 5;
/// Theirs take ten to twenty seconds each.
const PEER_SAMPLES: usize = 3;
const SIZE: usize = 1 << 30;

/// Prints the tables. Takes some minutes and 10 GiB of disk below `temp`.
pub(super) fn run(kiln: &Kiln, peers: &[Peer], bases: &Bases, temp: &Path) -> Result<(), Failure> {
    step::heading("Images of 1 GiB", "saved packed and plain, loaded into an empty store");
    let context = temp.join("image");
    fs::create_dir_all(&context).map_err(Failure::io("create", &context))?;
    let dockerfile = context.join("Dockerfile");
    let text = "FROM busybox\nCOPY big /big\n";
    fs::write(&dockerfile, text).map_err(Failure::io("write", &dockerfile))?;
    let bench = Bench { kiln, bases, context, out: temp.join("image.tar"), scratch: temp.join("load") };

    for (title, ours, theirs, bare) in [
        ("plain docker archive", &["--format", "docker"][..], Theirs::Docker, &["cp", "--reflink=never"][..]),
        ("OCI archive, gzip", &["--format", "oci"], Theirs::Oci(None), &[]),
        (
            "OCI archive, zstd",
            &["--format", "oci", "--compression", "zstd"],
            Theirs::Oci(Some("zstd")),
            &["zstd", "-q", "-3", "-T2", "-o"],
        ),
    ] {
        let mut saves = vec![Row { builder: "kiln".into(), times: bench.ours(ours)? }];
        let mut loads = vec![Row { builder: "kiln".into(), times: bench.ours_back()? }];
        for peer in peers {
            step::note(&format!("{}: {title}", peer.name));
            if let Some((save, load)) = bench.theirs(peer, theirs)? {
                saves.push(Row { builder: peer.name.into(), times: save });
                loads.push(Row { builder: peer.name.into(), times: load });
            }
        }
        if !bare.is_empty() {
            saves.push(Row { builder: format!("`{}`", bare.join(" ")), times: bench.bare(bare)? });
        }
        println!("\n{}", table(&format!("1 GiB saved as {title}, ms"), &saves, 1));
        println!("{}", table(&format!("{title} loaded again, ms"), &loads, 1));
    }
    fs::remove_file(&bench.out).map_err(Failure::io("remove", &bench.out))?;
    step::read(&mut kiln.command(&["rmi", "-f", "kiln-bench-image"]))?;
    Ok(())
}

type Times = Vec<Duration>;

/// What a peer writes.
#[derive(Clone, Copy)]
enum Theirs {
    Docker,
    /// Compressed so; by default with gzip.
    Oci(Option<&'static str>),
}

struct Bench<'a> {
    kiln: &'a Kiln,
    bases: &'a Bases,
    context: PathBuf,
    out: PathBuf,
    /// Stores to load into.
    scratch: PathBuf,
}

impl Bench<'_> {
    fn ours(&self, how: &[&str]) -> Result<Vec<Duration>, Failure> {
        let context = self.context.to_string_lossy();
        let out = self.out.to_string_lossy();
        (0..SAMPLES)
            .map(|_| {
                write_mixed(&self.context.join("big"))?;
                let build = ["build", "--progress", "quiet", "-t", "kiln-bench-image", &*context];
                step::read(&mut self.kiln.command(&build))?;
                self.without_output()?;
                let save = [&["save"], how, &["-o", &*out, "kiln-bench-image"]].concat();
                timed(&mut self.kiln.command(&save))
            })
            .collect()
    }

    /// What a program takes for the file of 1 GiB alone: how fast this machine is today. The output is named
    /// before the input where `-o` stands last.
    fn bare(&self, program: &[&str]) -> Result<Times, Failure> {
        let (big, out) = (self.context.join("big"), self.scratch.with_extension("bare"));
        let times = (0..PEER_SAMPLES).map(|_| {
            let _ = fs::remove_file(&out);
            settle()?;
            let mut command = Command::new(program[0]);
            command.args(&program[1..]);
            timed(match program.last() {
                Some(&"-o") => command.args([&out, &big]),
                _ => command.args([&big, &out]),
            })
        });
        let times = times.collect();
        fs::remove_file(&out).map_err(Failure::io("remove", &out))?;
        times
    }

    /// Loads what was saved last.
    fn ours_back(&self) -> Result<Vec<Duration>, Failure> {
        let out = self.out.to_string_lossy();
        (0..SAMPLES)
            .map(|_| {
                self.clear()?;
                settle()?;
                let root = self.scratch.to_string_lossy();
                timed(&mut self.kiln.command(&["--root", &*root, "load", "-q", "-i", &*out]))
            })
            .collect()
    }

    /// The same start for everybody: no file to write over (not every peer does that), no dirty pages.
    fn without_output(&self) -> Result<(), Failure> {
        match fs::remove_file(&self.out) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Failure::io("remove", &self.out)(error));
            }
            _ => {}
        }
        settle()
    }

    fn clear(&self) -> Result<(), Failure> {
        match fs::remove_dir_all(&self.scratch) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::io("remove", &self.scratch)(error))
            }
            _ => Ok(()),
        }
    }

    /// Saving and loading by a peer; `None`: it does not know this form.
    fn theirs(&self, peer: &Peer, form: Theirs) -> Result<Option<(Times, Times)>, Failure> {
        let path = self.out.to_string_lossy().into_owned();
        let image = "kiln-bench-image";
        let save: Vec<String> = match (peer.name, form) {
            ("podman", Theirs::Docker) => ["save", "-q", "-o", &path, image].map(str::to_owned).to_vec(),
            ("podman", Theirs::Oci(None)) => {
                ["save", "-q", "--format", "oci-archive", "-o", &path, image].map(str::to_owned).to_vec()
            }
            ("buildah", Theirs::Docker) => {
                let to = format!("docker-archive:{path}:{image}");
                ["push", "-q", image, &to].map(str::to_owned).to_vec()
            }
            ("buildah", Theirs::Oci(format)) => {
                let to = format!("oci-archive:{path}:{image}");
                let format = format.unwrap_or("gzip");
                ["push", "-q", "--compression-format", format, image, &to].map(str::to_owned).to_vec()
            }
            _ => return Ok(None),
        };
        let from = match form {
            Theirs::Docker => format!("docker-archive:{path}"),
            Theirs::Oci(_) => format!("oci-archive:{path}"),
        };
        let load: Vec<String> = match peer.name {
            "podman" => ["load", "-q", "-i", &path].map(str::to_owned).to_vec(),
            _ => ["pull", "-q", "--policy", "always", &from].map(str::to_owned).to_vec(),
        };
        step::read(&mut peer.build(&self.context, image, false))?;
        let saves = (0..PEER_SAMPLES).map(|_| {
            self.without_output()?;
            timed(&mut peer.command(&save))
        });
        let saves = saves.collect::<Result<Vec<_>, Failure>>()?;
        let loads = (0..PEER_SAMPLES).map(|_| {
            step::read(&mut peer.command(&["rmi", "-a", "-f"].map(str::to_owned)))?;
            settle()?;
            timed(&mut peer.command(&load))
        });
        let loads = loads.collect::<Result<Vec<_>, Failure>>()?;
        step::read(&mut peer.command(&["rmi", "-a", "-f"].map(str::to_owned)))?;
        peer.import_busybox(self.bases)?;
        Ok(Some((saves, loads)))
    }
}

/// Writes 1 GiB that nobody packed before: packed layers are remembered.
pub(super) fn write_mixed(path: &Path) -> Result<(), Failure> {
    let write = || {
        let seed = std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.subsec_nanos() | 1);
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        mixed(u64::from(seed), SIZE, &mut out)?;
        out.flush()
    };
    write().map_err(Failure::io("write", path))
}

/// Writes out what earlier work left, so that nobody pays for what is not theirs.
pub(super) fn settle() -> Result<(), Failure> {
    step::read(&mut Command::new("sync")).map(drop)
}

/// Data of which about half can be compressed away, the same for the same `seed`: pieces of noise and of
/// words in turn.
fn mixed(seed: u64, size: usize, out: &mut impl Write) -> std::io::Result<()> {
    const PIECE: usize = 64 << 10;
    const WORDS: [&str; 16] = [
        "layer ",
        "digest ",
        "the ",
        "manifest ",
        "of ",
        "snapshot ",
        "and ",
        "index\n",
        "0x7f",
        "build ",
        "(cache) ",
        "a ",
        "{\"size\":",
        "1234567",
        "}, ",
        "config ",
    ];
    let mut state = seed;
    let mut random = move || {
        // xorshift64 (Marsaglia): speed is all that counts.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut piece = Vec::with_capacity(PIECE + 16);
    for nth in 0..size / PIECE {
        piece.clear();
        while piece.len() < PIECE {
            let number = random();
            if nth % 2 == 0 {
                piece.extend_from_slice(&number.to_le_bytes());
            } else {
                piece.extend_from_slice(WORDS[(number >> 60) as usize].as_bytes());
            }
        }
        out.write_all(&piece[..PIECE])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_data_is_as_long_as_asked_and_its_own_for_each_seed() {
        let of = |seed| {
            let mut out = Vec::new();
            mixed(seed, 1 << 20, &mut out).expect("in memory");
            out
        };
        assert!(of(1).len() == 1 << 20 && of(1) == of(1) && of(1) != of(2));
    }
}
