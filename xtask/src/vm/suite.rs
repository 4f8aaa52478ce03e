//! The tests inside the machine, and the table of how they went.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use super::boot::{Accelerator, Boot, END};
use super::image::Image;
use super::payload::{self, Payload};
use crate::bases::Bases;
use crate::step::{self, Failure};

/// Everything that depends on the kernel.
const ALL: &str = "package(kiln-executor) + package(kiln-snapshotter) + package(kiln-containers) + \
    (package(kiln) & test(/^(cgroups|containers|interrupts|kills|rootless|run|run_mounts|runtime|sandbox|\
    shell|signals|universal|gc|concurrency)::/)) - (package(kiln) & test(/::podman|podman_/)) - \
    (package(kiln-executor) & test(/^linux::seccomp/))";

/// What no machine with control groups of version 1 can show.
pub(super) const SHORT: &str = "test(/cgroup|limit|group|memory|pause|oom|processes_and_processor|update|stats/) \
    & (package(kiln-executor) + (package(kiln) & test(/^(cgroups|containers|sandbox)::/)))";

/// How long the machine may be on.
const LIMIT: Duration = Duration::from_secs(600);

/// nextest inside. The machine's own store of temporary files is on its disk; tests that need a service
/// manager or control groups of version 2 find them, and must not pass by.
const SCRIPT: &str = "mkdir -p /var/tmp/k && export TMPDIR=/var/tmp/k KILN_TEST_MACHINE=1 CARGO_TERM_COLOR=never\n\
    cp /payload/cargo-nextest /usr/local/bin/ && chmod 755 /usr/local/bin/cargo-nextest\n\
    uname -r; systemctl --version | head -1; stat -fc %T /sys/fs/cgroup; systemctl is-active user@1000.service\n\
    cargo-nextest nextest run --binaries-metadata /payload/binaries.json \
    --cargo-metadata /payload/metadata.json --status-level pass --final-status-level none \
    --success-output immediate --failure-output immediate";

/// Runs the tests of an expression, by default all that depend on the kernel.
///
/// # Errors
/// When one fails, or the machine does.
pub(super) fn run(
    image: &Image,
    bases: &Bases,
    scratch: &Path,
    only: Option<&str>,
    accelerator: Accelerator,
) -> Result<(), Failure> {
    step::heading("Tests for it", "kiln and its tests, on a disk of their own");
    let tests = payload::build()?;
    let mut load = Payload::new(&scratch.join("payload"))?;
    load.bases(bases)?;
    load.tests(&tests)?;
    let disk = scratch.join("payload.raw");
    let quoted = |word: &str| format!("'{}'", word.replace('\'', r"'\''"));
    let mut script = format!("export KILN_TEST_BASES={}\n", quoted(&bases.dir.display().to_string()));
    for name in ["KILN_SEED", "KILN_INTERRUPTS", "KILN_KILLS"] {
        if let Ok(value) = std::env::var(name) {
            script.push_str(&format!("export {name}={}\n", quoted(&value)));
        }
    }
    let repository = quoted(&step::repository().display().to_string());
    let profile = if accelerator == Accelerator::Tcg { "--profile emulated" } else { "" };
    let filter = quoted(only.unwrap_or(ALL));
    script.push_str(&format!("cd {repository}\n{SCRIPT} {profile} -E {filter}\n"));
    script.push_str(&format!("echo {END}$?\n"));
    load.disk(&script, &disk)?;

    step::heading("Boot", "no network to the outside, 2 processors, 4 GiB");
    let limit = accelerator.patience(LIMIT);
    let log = step::target_dir()?.join("vm/tests.log");
    let mut kept = File::create(&log).map_err(Failure::io("create", &log))?;
    let machine = Boot { image, payload: &disk, disk: None, scratch, accelerator }.start()?;
    let mut tally = Tally::default();
    let mut code = None;
    loop {
        let line = match machine.line(limit) {
            Ok(Some(line)) => line,
            Ok(None) => break,
            Err(failure) => {
                tally.print();
                return Err(failure);
            }
        };
        writeln!(kept, "{line}").map_err(Failure::io("write", &log))?;
        if let Some(number) = line.strip_prefix(END) {
            code = number.trim().parse::<i32>().ok();
        } else if tally.read(&line) == Line::Before {
            step::note(&line);
        }
    }
    let took = super::spoken(machine.uptime());
    step::heading("Results", &format!("{took} from the power button to the end; {}", log.display()));
    tally.print();
    match code {
        Some(0) if tally.failed() == 0 => Ok(()),
        Some(_) => Err(Failure::Machine {
            what: format!("{} tests failed in the machine; see {}", tally.failed(), log.display()),
        }),
        None => Err(machine.failure("the machine went off before its tests had ended".to_owned())),
    }
}

/// What became of the tests of one group.
#[derive(Debug, Default, PartialEq)]
struct Group {
    passed: usize,
    failed: usize,
    /// Said so of themselves.
    skipped: usize,
    seconds: f64,
}

/// Reads what nextest says.
#[derive(Debug, Default)]
struct Tally {
    groups: BTreeMap<String, Group>,
    failures: Vec<String>,
    skips: Vec<String>,
    /// The test whose output is being read, and its group.
    last: Option<(String, String)>,
    /// The output of one that failed.
    telling: bool,
}

/// What a line was.
#[derive(Debug, PartialEq)]
enum Line {
    /// Before the first test.
    Before,
    Other,
}

impl Tally {
    fn read(&mut self, line: &str) -> Line {
        if let Some((passed, seconds, group, test)) = status(line) {
            let known = self.groups.entry(group.clone()).or_default();
            known.seconds += seconds;
            if passed {
                known.passed += 1;
            } else {
                known.failed += 1;
                self.failures.push(format!("{group} {test}"));
                step::warn(&format!("   FAILED {group} {test}"));
            }
            self.telling = !passed;
            self.last = Some((group, test));
        } else if let Some((group, test)) = &self.last {
            if self.telling && line.starts_with("    ") && !line.trim().is_empty() {
                step::note(line);
            }
            if let Some((_, reason)) = line.split_once("SKIPPED ALOUD: ") {
                let known = self.groups.entry(group.clone()).or_default();
                let told = format!("{group} {test}: {reason}");
                let more = self.skips.iter().any(|other| other.starts_with(&format!("{group} {test}:")));
                if !more && !self.telling {
                    known.skipped += 1;
                }
                self.skips.push(told);
            }
        } else {
            return Line::Before;
        }
        Line::Other
    }

    fn failed(&self) -> usize {
        self.failures.len()
    }

    fn print(&self) {
        let width = self.groups.keys().map(String::len).max().unwrap_or(0).max(5);
        step::note(&format!("{:width$}  passed  failed  skipped  seconds", "tests"));
        for (name, group) in &self.groups {
            step::note(&format!(
                "{name:width$}  {:6}  {:6}  {:7}  {:7.1}",
                group.passed - group.skipped,
                group.failed,
                group.skipped,
                group.seconds
            ));
        }
        for skip in &self.skips {
            step::note(&format!("skipped: {skip}"));
        }
        for failure in &self.failures {
            step::warn(&format!("   FAILED: {failure}"));
        }
    }
}

/// Whether a test passed, its seconds, group and name, of a line as
/// `PASS [   0.018s] (1/9) kiln::cli containers::life::x`.
fn status(line: &str) -> Option<(bool, f64, String, String)> {
    let (word, rest) = line.trim_start().split_once(' ')?;
    let passed = match word {
        "PASS" => true,
        "FAIL" | "TIMEOUT" | "SIGABRT" | "SIGSEGV" | "SIGKILL" | "ABORT" | "LEAK-FAIL" => false,
        "LEAK" => true,
        _ => return None,
    };
    let (time, rest) = rest.trim_start().strip_prefix('[')?.split_once("s]")?;
    let seconds = time.trim().trim_start_matches('>').parse().ok()?;
    let mut words = rest.split_whitespace().filter(|word| !word.starts_with('(') && !word.ends_with(')'));
    let (binary, test) = (words.next()?, words.next()?);
    let crate_name = binary.split("::").next().unwrap_or(binary);
    let module = test.split("::").next().filter(|module| *module != test).unwrap_or("");
    let group = if crate_name == "kiln" { format!("kiln {module}") } else { crate_name.to_owned() };
    Some((passed, seconds, group.trim().to_owned(), test.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_nextest_become_a_table() {
        let mut tally = Tally::default();
        assert_eq!(tally.read("6.1.0-44-cloud-amd64"), Line::Before);
        for line in [
            "        PASS [   0.018s] (1/4) kiln-executor linux::cgroup::tests::a_parent_is_a_name",
            "        PASS [   1.500s] (2/4) kiln::cli containers::life::pause",
            "SKIPPED ALOUD: needs podman",
            "        FAIL [   0.004s] (3/4) kiln::cli containers::life::stop",
            "SKIPPED ALOUD: needs root",
            " TIMEOUT [ 240.004s] (4/4) kiln-executor::sandbox settings::x",
        ] {
            assert_eq!(tally.read(line), Line::Other, "{line}");
        }
        let group = |passed, failed, skipped, seconds| Group { passed, failed, skipped, seconds };
        assert_eq!(tally.groups["kiln-executor"], group(1, 1, 0, 240.022));
        assert_eq!(tally.groups["kiln containers"], group(1, 1, 1, 1.504));
        assert_eq!(tally.failures, ["kiln containers containers::life::stop", "kiln-executor settings::x"]);
        assert_eq!(tally.failed(), 2);
    }
}
