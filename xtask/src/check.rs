//! The task `test`: everything that CI checks, in the order in which a mistake shows soonest.

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::time::{Duration, Instant};
use std::{env, fs};

use crate::step::{self, Failure};
use crate::{bases, fuzz, packages, s3, users, vm};

/// Cargo's own tools that the checks run: name, version, what for.
const TOOLS: [(&str, &str, &str); 2] = [
    ("cargo-nextest", "0.9.143", "runs the tests"),
    ("cargo-deny", "0.20.2", "checks licences and advisories"),
];

/// How long each fuzz target runs here.
const FUZZ_EACH: Duration = Duration::from_secs(5);

/// The task. Stops at the first step that fails.
pub(crate) fn run() -> Result<(), Failure> {
    let start = Instant::now();
    timed("Packages", "what the tests need from the distribution", || {
        packages::ensure(&[packages::DEMO, packages::TEST])
    })?;
    timed("Tools", "pinned versions of cargo's helpers", tools)?;
    timed("Format", "", || show(&["fmt", "--all", "--check"]))?;
    timed("Lints", "", || show(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    timed("Licences, bans, sources", "of everything that is linked in", || {
        show(&["deny", "check", "licenses", "bans", "sources"])
    })?;
    timed("Advisories", "known vulnerabilities of our dependencies", advisories)?;
    timed("Build", "the test kiln and every test", || show(&["nextest", "run", "--workspace", "--no-run"]))?;
    let mut dir = None;
    timed("Bases", "", || {
        let bases = bases::ensure()?;
        s3::ensure(&bases);
        dir = Some(bases.dir);
        Ok(())
    })?;
    timed("Tests", "unit tests, then the real binary against real stores", || tests(dir.as_deref()))?;
    timed("Machine", "what this one cannot show; `cargo xtask vm` for all of it", vm::short)?;
    if let Some(dir) = &dir {
        for (title, ids) in users::turns() {
            timed(&title, "the real binary as above, without privileges", || users::suites(ids, dir, &[]))?;
        }
    }
    timed("Fuzzing", "a short run of every target; `cargo xtask fuzz` for longer ones", fuzzing)?;
    timed("Examples in documentation", "", || show(&["test", "--doc", "--workspace"]))?;
    println!("\nall checks passed in {}", spoken(start));
    Ok(())
}

fn timed(title: &str, why: &str, step: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    step::heading(title, why);
    let start = Instant::now();
    let result = step();
    step::note(&format!("{}: {}", if result.is_ok() { "done" } else { "FAILED" }, spoken(start)));
    result
}

fn spoken(start: Instant) -> String {
    format!("{:.1} s", start.elapsed().as_secs_f64())
}

fn show(args: &[&str]) -> Result<(), Failure> {
    step::show(step::cargo().args(args)).map(drop)
}

fn tools() -> Result<(), Failure> {
    for (name, version, what_for) in TOOLS {
        let found = step::read(Command::new(name).arg("--version")).unwrap_or_default();
        if has_version(&found, version) {
            step::note(&format!("{name} {version} is there"));
            continue;
        }
        step::note(&format!(
            "installing {name} {version}: {what_for}. It is compiled here, for some minutes"
        ));
        let mut install = step::cargo();
        install.args(["install", "--locked", &format!("{name}@{version}"), "--target-dir"]);
        install.arg(step::target_dir()?.join("tools"));
        // A tool that runs for seconds is not worth minutes of optimization.
        let profile = [("OPT_LEVEL", "1"), ("LTO", "false"), ("CODEGEN_UNITS", "16"), ("DEBUG", "false")];
        install.envs(profile.map(|(key, value)| (format!("CARGO_PROFILE_RELEASE_{key}"), value)));
        step::show(&mut install)?;
    }
    Ok(())
}

fn has_version(printed: &str, version: &str) -> bool {
    printed.lines().next().is_some_and(|line| line.split(' ').any(|word| word == version))
}

// The database is a git repository elsewhere. Not reaching it says nothing about us; a finding does.
fn advisories() -> Result<(), Failure> {
    if let Err(failure) = step::read(step::cargo().args(["deny", "fetch", "db"])) {
        let text = failure.to_string();
        if !text.contains("failed to fetch") {
            return Err(failure);
        }
        let reason = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("").trim();
        step::warn(&format!("NOT CHECKED: advisories (the database cannot be fetched: {reason})"));
        return Ok(());
    }
    show(&["deny", "check", "--disable-fetch", "advisories"])
}

fn tests(bases: Option<&Path>) -> Result<(), Failure> {
    // Stores hold overlay upperdirs: on the target directory's file system, not on a tmpfs in /tmp.
    let stores = step::target_dir()?.join("test-stores");
    fs::create_dir_all(&stores).map_err(Failure::io("create", &stores))?;
    let temp = ShortPath::to(&stores)?;
    let mut command = step::nextest_run();
    command.arg("--workspace").env("TMPDIR", &temp.0);
    if let Some(dir) = bases {
        command.env("KILN_TEST_BASES", dir);
    }
    // Tests choose their own stores; a user's must not be touched by one that forgets.
    command.env_remove("KILN_ROOT");
    step::show(&mut command).map(drop)
}

/// A short name for a directory, gone with this value: a socket's path has at most 107 bytes, and the
/// target directory may be anywhere.
struct ShortPath(PathBuf);

impl ShortPath {
    fn to(dir: &Path) -> Result<Self, Failure> {
        for number in 0.. {
            let link = env::temp_dir().join(format!("kiln-{}-{number}", process::id()));
            match symlink(dir, &link) {
                Ok(()) => return Ok(Self(link)),
                // Somebody else's, or that of a process with our id that was killed.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Failure::io("link", &link)(error)),
            }
        }
        unreachable!("names do not run out")
    }
}

impl Drop for ShortPath {
    fn drop(&mut self) {
        // One that stays behind is a link to nothing of value.
        let _ = fs::remove_file(&self.0);
    }
}

fn fuzzing() -> Result<(), Failure> {
    // A workspace of its own, which the steps above do not see.
    step::show(step::cargo().current_dir(step::repository().join("fuzz")).args(["fmt", "--check"]))?;
    fuzz::each(FUZZ_EACH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_of_another_version_does_not_count() {
        assert!(has_version("cargo-nextest 0.9.143 (60fa45f63 2026-08-04)\nrelease: 0.9.143\n", "0.9.143"));
        assert!(has_version("cargo-deny 0.20.2\n", "0.20.2"));
        assert!(!has_version("cargo-deny 0.20.21\n", "0.20.2"));
        assert!(!has_version("", "0.20.2"));
    }

    #[test]
    fn what_a_failed_step_says_is_passed_on() {
        let failure = || Failure::Output { line: "x".into(), expected: "y" };
        assert!(timed("A step", "", || Err(failure())).is_err());
    }
}
