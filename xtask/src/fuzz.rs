//! The task `fuzz`: builds the targets of `fuzz/` with coverage counters and runs them.
//!
//! libFuzzer comes with the crate libfuzzer-sys, and the compiler pass that counts edges is in every
//! rustc: neither a nightly compiler nor cargo-fuzz is needed.

use std::fs::{self, File};
use std::io::Read;
use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use crate::binary;
use crate::step::{self, Failure};

/// What cargo-fuzz passes for coverage alone, without a sanitizer. All of it is stable.
const RUSTFLAGS: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg=fuzzing",
];
const SECONDS: u64 = 10;
/// One input may take this long on a loaded machine; what is not linear takes far longer.
const INPUT_SECONDS: u64 = 10;
const MEMORY_MIB: u64 = 1024;
const LONGEST_INPUT: u64 = 8192;

/// `fuzz [TARGET…] [--seconds N]`.
#[derive(Debug, PartialEq)]
struct Request {
    /// Empty: all.
    targets: Vec<String>,
    each: Duration,
}

/// What one run says of itself.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    inputs: u64,
    /// Edges that the known inputs reach, and those that were reached in the end.
    known_edges: u64,
    edges: u64,
}

/// The task with its arguments.
pub(crate) fn run(args: &[String]) -> Result<(), Failure> {
    let request = parse(args)?;
    let known = targets()?;
    if let Some(word) = request.targets.iter().find(|target| !known.contains(target)) {
        step::note(&format!("targets: {}", known.join(" ")));
        return Err(Failure::Usage { word: word.clone() });
    }
    let chosen = if request.targets.is_empty() { known } else { request.targets };
    all(&chosen, &build()?, request.each)
}

/// Every target for so long; for the task `test`.
pub(crate) fn each(time: Duration) -> Result<(), Failure> {
    all(&targets()?, &build()?, time)
}

fn parse(args: &[String]) -> Result<Request, Failure> {
    let mut request = Request { targets: Vec::new(), each: Duration::from_secs(SECONDS) };
    let mut args = args.iter();
    while let Some(word) = args.next() {
        if word == "--seconds" {
            let value = args.next().unwrap_or(word);
            let seconds = value.parse().map_err(|_| Failure::Usage { word: value.clone() })?;
            request.each = Duration::from_secs(seconds);
        } else if word.starts_with('-') {
            return Err(Failure::Usage { word: word.clone() });
        } else {
            request.targets.push(word.clone());
        }
    }
    Ok(request)
}

fn home() -> PathBuf {
    step::repository().join("fuzz")
}

/// Names of all targets: the files of `fuzz/fuzz_targets`.
fn targets() -> Result<Vec<String>, Failure> {
    let dir = home().join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).map_err(Failure::io("read", &dir))? {
        let path = entry.map_err(Failure::io("read", &dir))?.path();
        names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

/// Builds all targets; returns the directory of the binaries.
fn build() -> Result<PathBuf, Failure> {
    let triple = binary::host_triple()?;
    let target_dir = step::target_dir()?.join("fuzz");
    let mut build = step::cargo();
    // With `--target`, the flags do not reach build scripts, which would not link.
    build.current_dir(home()).args(["build", "--release", "--bins", "--locked", "--target", &triple]);
    build.arg("--target-dir").arg(&target_dir);
    build.env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"));
    step::note("in fuzz/, with coverage counters");
    step::show(&mut build)?;
    Ok(target_dir.join(triple).join("release"))
}

/// Runs the targets, as many at a time as there are processors.
fn all(targets: &[String], binaries: &Path, time: Duration) -> Result<(), Failure> {
    let lanes = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(targets.len());
    let work = step::target_dir()?.join("fuzz");
    step::note(&format!("{} s for each target, {lanes} at a time", time.as_secs()));
    let queue = Mutex::new(targets.iter());
    let next = || queue.lock().ok()?.next();
    let lane = || {
        let mut failures = Vec::new();
        while let Some(target) = next() {
            match one(target, binaries, &work, time) {
                Ok(outcome) => step::note(&spoken(target, &outcome)),
                Err(failure) => failures.push(failure),
            }
        }
        failures
    };
    let mut failures: Vec<Failure> = std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..lanes).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().flat_map(|lane| lane.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let last = failures.pop();
    failures.iter().for_each(step::complain);
    last.map_or(Ok(()), Err)
}

fn spoken(target: &str, outcome: &Outcome) -> String {
    let Outcome { inputs, known_edges, edges } = outcome;
    format!("{target:13}{inputs:>9} inputs, {edges:>5} edges reached, {} of them new", edges - known_edges)
}

/// Runs one target. What it finds worth keeping goes to `work`, not to the repository's corpus.
fn one(target: &str, binaries: &Path, work: &Path, time: Duration) -> Result<Outcome, Failure> {
    let (found, crashes, logs) = (work.join("corpus").join(target), work.join("crashes"), work.join("logs"));
    for dir in [&found, &crashes, &logs] {
        fs::create_dir_all(dir).map_err(Failure::io("create", dir))?;
    }
    let mut command = Command::new(binaries.join(target));
    command.current_dir(home());
    let numbers = [
        ("max_total_time", time.as_secs()),
        ("timeout", INPUT_SECONDS),
        ("rss_limit_mb", MEMORY_MIB),
        ("max_len", LONGEST_INPUT),
        ("print_final_stats", 1),
    ];
    command.args(numbers.map(|(name, value)| format!("-{name}={value}")));
    command.arg(format!("-artifact_prefix={}/{target}-", crashes.display()));
    let dictionary = home().join("dictionaries").join(target);
    if dictionary.exists() {
        command.arg(format!("-dict={}", dictionary.display()));
    }
    command.arg(&found).arg(home().join("corpus").join(target));
    if target == "dockerfile" {
        command.arg(parser_cases(&work.join("cases"))?);
    }

    let path = logs.join(target);
    let log = File::create(&path).map_err(Failure::io("create", &path))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let status = command.status().map_err(step::spawn_failure(&command))?;
    let mut bytes = Vec::new();
    File::open(&path).and_then(|mut log| log.read_to_end(&mut bytes)).map_err(Failure::io("read", &path))?;
    let text = String::from_utf8_lossy(&bytes);
    if !status.success() {
        let program = command.get_program().to_string_lossy();
        let stderr =
            format!("{}\nall of it: {}\nonce more: {program} FILE", what_went_wrong(&text), path.display());
        return Err(Failure::Exited { line: step::typed(&command), status, stderr });
    }
    read(&text).ok_or_else(|| Failure::Output {
        line: step::typed(&command),
        expected: "coverage counters and statistics",
    })
}

/// Copies the Dockerfiles of the parser's test cases into one directory, without what lies beside
/// them. Returns it.
fn parser_cases(dir: &Path) -> Result<&Path, Failure> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Failure::io("remove", dir)(error));
        }
        _ => fs::create_dir_all(dir).map_err(Failure::io("create", dir))?,
    }
    let cases = step::repository().join("testdata/dockerfile");
    for case in fs::read_dir(&cases).map_err(Failure::io("read", &cases))? {
        let case = case.map_err(Failure::io("read", &cases))?;
        let dockerfile = case.path().join("Dockerfile");
        if dockerfile.is_file() {
            fs::copy(&dockerfile, dir.join(case.file_name())).map_err(Failure::io("copy", &dockerfile))?;
        }
    }
    Ok(dir)
}

/// Reads libFuzzer's log: `#40 INITED cov: 172 ft: …`, `#590471 DONE cov: 236 ft: …`. `None` also
/// when it does not count edges: a run without guidance finds nothing and must not look good.
fn read(log: &str) -> Option<Outcome> {
    log.lines().find(|line| line.contains("inline 8-bit counters"))?;
    let edges = |mark: &str| -> Option<u64> {
        let line = log.lines().rfind(|line| line.starts_with('#') && line.contains(mark))?;
        line.split_once("cov: ")?.1.split(' ').next()?.parse().ok()
    };
    let inputs = log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?;
    let (known_edges, edges) = (edges("INITED")?, edges("DONE")?);
    Some(Outcome { inputs: inputs.trim().parse().ok()?, known_edges, edges: edges.max(known_edges) })
}

/// The lines of a log that say what happened: the panic's message, the kind, the input's file.
fn what_went_wrong(log: &str) -> String {
    let told = |line: &&str| {
        ["panicked at", "ERROR:", "Test unit written", "SUMMARY"].iter().any(|mark| line.contains(mark))
    };
    let mut shown = Vec::new();
    let mut lines = log.lines();
    while let Some(line) = lines.by_ref().find(told) {
        shown.push(line);
        if line.contains("panicked at") {
            shown.extend(lines.by_ref().take(3));
        }
    }
    if shown.is_empty() {
        log.lines().last().unwrap_or("it says nothing").to_owned()
    } else {
        shown.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect()
    }

    #[test]
    fn arguments_are_targets_and_a_time() {
        let request = parse(&words("mode words --seconds 7")).unwrap();
        assert_eq!(request, Request { targets: words("mode words"), each: Duration::from_secs(7) });
        assert_eq!(parse(&[]).unwrap().each, Duration::from_secs(SECONDS));
        for bad in ["--seconds", "--seconds x", "--fast"] {
            assert!(matches!(parse(&words(bad)), Err(Failure::Usage { .. })), "{bad}");
        }
    }

    #[test]
    fn every_target_is_built_and_has_inputs_to_start_from() {
        let manifest = fs::read_to_string(home().join("Cargo.toml")).unwrap();
        let targets = targets().unwrap();
        assert!(targets.len() >= 7, "{targets:?}");
        for target in &targets {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")), "{target}");
            let corpus = fs::read_dir(home().join("corpus").join(target)).unwrap();
            assert!(corpus.count() >= 15, "{target}");
        }
    }

    const LOG: &str = "INFO: Loaded 1 modules   (537 inline 8-bit counters): 537 [0x1, 0x2),\n\
        #28\tINITED cov: 172 ft: 296 corp: 26/115b exec/s: 0 rss: 27Mb\n\
        #99\tNEW    cov: 180 ft: 300 corp: 27/120b lim: 4 exec/s: 0 rss: 27Mb L: 2/2 MS: 1 CopyPart-\n\
        #590471\tDONE   cov: 236 ft: 781 corp: 283/18Kb lim: 3038 exec/s: 98411 rss: 28Mb\n\
        stat::number_of_executed_units: 590471\n";

    #[test]
    fn a_run_tells_its_inputs_and_its_edges() {
        let outcome = Outcome { inputs: 590_471, known_edges: 172, edges: 236 };
        assert_eq!(read(LOG), Some(outcome));
    }

    #[test]
    fn a_run_without_coverage_counters_does_not_count() {
        assert_eq!(read(&LOG.replace("inline 8-bit counters", "guards")), None);
        assert_eq!(read(&LOG.replace("DONE", "pulse")), None);
    }

    #[test]
    fn a_crash_is_told_by_its_message_and_its_file() {
        let log = "#1\tNEW cov: 1\nthread '<unnamed>' panicked at src/lib.rs:1:2:\nassertion failed\n  left: 1\n right: 2\nstack backtrace:\n\
            ==1== ERROR: libFuzzer: deadly signal\nTest unit written to /x/mode-crash-1\n";
        let told = what_went_wrong(log);
        assert!(told.contains("right: 2") && told.contains("/x/mode-crash-1"), "{told}");
        assert!(!told.contains("backtrace") && !told.contains("#1"), "{told}");
        assert_eq!(what_went_wrong("a\nkilled"), "killed");
    }
}
