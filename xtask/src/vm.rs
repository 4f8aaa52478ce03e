//! The task `vm`: a Debian machine with systemd, control groups of version 2 and a kernel of its own.
//!
//! Read [`image`] first (how it is made), then [`boot`], [`payload`], [`suite`] and [`power`].
//!
//! A developer's machine may have another kernel, control groups of version 1 and no session of a user:
//! what depends on these is run where users have them. The machine has no network to the outside, its
//! disk is never written to, and it ends with the task.

mod boot;
mod disk;
mod image;
mod payload;
mod power;
mod suite;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use self::boot::Accelerator;
use crate::step::{self, Failure};

/// How often the power is cut unless it is said.
const CUTS: u32 = 3;

/// What was asked for.
#[derive(Debug, PartialEq)]
enum Request {
    /// The tests that depend on the kernel; those of one expression of nextest's only.
    Tests { only: Option<String> },
    /// Cut the power so often.
    Power { cuts: u32, seed: Option<u64> },
}

/// The task with its arguments: `vm [--only EXPRESSION]`, `vm --power [N] [--seed N]`.
pub(crate) fn run(args: &[String]) -> Result<(), Failure> {
    let request = parse(args)?;
    step::heading("Machine", "Debian with systemd, made from the distribution's packages");
    boot::check_host()?;
    let bases = crate::bases::ensure()?;
    let image = image::ensure(&bases)?;
    let scratch = Scratch::new()?;
    let accelerator = Accelerator::find(&image, &scratch.0)?;
    match request {
        Request::Tests { only } => suite::run(&image, &bases, &scratch.0, only.as_deref(), accelerator),
        Request::Power { cuts, seed } => power::run(&image, &bases, &scratch.0, accelerator, cuts, seed),
    }
}

/// The short form, for the task `test`: what no other machine can show. Where it would take many minutes,
/// it says aloud that it was left out.
pub(crate) fn short() -> Result<(), Failure> {
    let left_out = |why: &str| {
        step::warn(&format!(
            "NOT TESTED: control groups of version 2, systemd, another kernel ({why}); `cargo xtask vm` does"
        ));
        Ok(())
    };
    if std::env::consts::ARCH != "x86_64" || !Path::new("/dev/kvm").exists() {
        return left_out("no /dev/kvm here");
    }
    boot::check_host()?;
    let bases = crate::bases::ensure()?;
    let image = image::ensure(&bases)?;
    let scratch = Scratch::new()?;
    let accelerator = Accelerator::find(&image, &scratch.0)?;
    if accelerator == Accelerator::Tcg {
        return left_out("/dev/kvm does not work here");
    }
    suite::run(&image, &bases, &scratch.0, Some(suite::SHORT), accelerator)
}

fn parse(args: &[String]) -> Result<Request, Failure> {
    let (mut only, mut cuts, mut seed) = (None, None, None);
    let mut args = args.iter().peekable();
    let number = |word: &str| word.parse().map_err(|_| Failure::Usage { word: word.to_owned() });
    while let Some(word) = args.next() {
        let missing = || Failure::Usage { word: word.clone() };
        match word.as_str() {
            "--only" => only = Some(args.next().ok_or_else(missing)?.clone()),
            "--power" => {
                let given = args.next_if(|next| !next.starts_with('-'));
                let given = given.map(|word| number(word)).transpose()?;
                cuts = Some(given.map_or(Ok(CUTS), u32::try_from).map_err(|_| missing())?);
            }
            "--seed" => seed = Some(number(args.next().ok_or_else(missing)?)?),
            _ => return Err(missing()),
        }
    }
    match (only, cuts, seed) {
        (only, None, None) => Ok(Request::Tests { only }),
        (None, Some(cuts), seed) => Ok(Request::Power { cuts, seed }),
        _ => Err(Failure::Usage { word: "--power".to_owned() }),
    }
}

/// A directory below the target directory, gone with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, Failure> {
        let above = step::target_dir()?.join("vm");
        fs::create_dir_all(&above).map_err(Failure::io("create", &above))?;
        sweep(&above);
        let dir = above.join(std::process::id().to_string());
        fs::create_dir(&dir).map_err(Failure::io("create", &dir))?;
        Ok(Self(dir))
    }
}

// What a task that was killed has left.
fn sweep(above: &Path) {
    for entry in fs::read_dir(above).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.bytes().all(|byte| byte.is_ascii_digit()) && !Path::new("/proc").join(&name).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// As it is said to people.
fn spoken(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_say_what_is_to_be_done() {
        let parse = |line: &str| parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        assert!(matches!(parse(""), Ok(Request::Tests { only: None })));
        assert!(matches!(parse("--only all()"), Ok(Request::Tests { only: Some(only) }) if only == "all()"));
        assert!(matches!(parse("--power"), Ok(Request::Power { cuts: CUTS, seed: None })));
        assert!(matches!(parse("--power 20 --seed 7"), Ok(Request::Power { cuts: 20, seed: Some(7) })));
        for wrong in ["--only", "--power x", "--seed 7", "--only a --power", "more", "--power 99999999999"] {
            assert!(matches!(parse(wrong), Err(Failure::Usage { .. })), "{wrong}");
        }
    }
}
