//! `kiln history builds`, `kiln log`: builds that are over.

use std::io::Write;

use kiln_build::StepNumber;
use kiln_build::builds::{BuildRecord, Outcome, StepRecord, StepState, builds, read_log};

use super::{ago, human_size, print, table};
use crate::args::builds::{BuildsArgs, LogArgs};
use crate::errors::Failure;
use crate::session::{Session, id_digits};

pub(crate) fn run(session: &Session, args: &BuildsArgs) -> Result<u8, Failure> {
    let builds = all(session)?;
    if args.json {
        let json: Vec<_> = builds.iter().rev().map(|(number, build)| as_json(*number, build)).collect();
        print(&format!("{:#}\n", serde_json::Value::Array(json)))?;
        return Ok(0);
    }
    let mut rows = vec![
        ["BUILD", "STARTED", "TOOK", "RESULT", "CACHED", "RAN", "MEMORY", "IMAGE", "CONTEXT"]
            .map(str::to_owned)
            .to_vec(),
    ];
    // Newest first, as docker lists things.
    for (number, build) in builds.iter().rev() {
        let (cached, ran) = build.counts();
        let memory = build.peak_memory_bytes();
        rows.push(vec![
            number.to_string(),
            ago(build.at_unix),
            took(build.took_ms),
            outcome(build.outcome).to_owned(),
            cached.to_string(),
            ran.to_string(),
            if memory == 0 { String::new() } else { human_size(memory) },
            image(build),
            build.context.clone(),
        ]);
    }
    print(&table(&rows))?;
    Ok(0)
}

/// `kiln log`
pub(crate) fn log(session: &Session, args: &LogArgs) -> Result<u8, Failure> {
    let (number, build) = find(session, Some(args.build))?;
    let steps: Vec<&StepRecord> = match &args.step {
        Some(wanted) => vec![step(number, &build, wanted)?],
        None => build.steps.iter().filter(|step| step.log.is_some()).collect(),
    };
    let root = session.engine.store.root();
    for step in &steps {
        let Some(name) = step.log else {
            let why = match step.state {
                StepState::Cached => "came from the cache: the build that ran it has its log",
                _ => "printed nothing",
            };
            return Err(Failure::source(format!("`{}` {why}", step.title))
                .hint("`kiln history builds` lists the builds"));
        };
        let bytes = read_log(root, &build.id, name).map_err(|error| {
            Failure::source(format!("the log of `{}` is not kept any more: {error}", step.title))
                .hint("logs of the last 50 builds are kept, up to 256 MiB")
        })?;
        if args.step.is_none() {
            print(&format!("==> {} <==\n", step.title))?;
        }
        write(&bytes)?;
        if args.step.is_none() && !bytes.ends_with(b"\n") {
            print("\n")?;
        }
    }
    Ok(0)
}

/// What a step printed, byte for byte; a reader that went away is no error.
fn write(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::output(&error)),
        _ => Ok(()),
    }
}

fn all(session: &Session) -> Result<Vec<(u64, BuildRecord)>, Failure> {
    builds(session.engine.store.root())
        .map_err(|error| Failure::store(format!("the record of the builds: {error}")))
}

/// A build by its number; `None`: the last.
pub(super) fn find(session: &Session, number: Option<u64>) -> Result<(u64, BuildRecord), Failure> {
    let mut builds = all(session)?;
    let Some((last, _)) = builds.last() else {
        return Err(Failure::source("nothing was built in this store, as far as is known"));
    };
    let (first, last) = (builds.first().map_or(*last, |(first, _)| *first), *last);
    let wanted = number.unwrap_or(last);
    let found = builds.iter().position(|(number, _)| *number == wanted);
    let found = found.map(|at| builds.swap_remove(at));
    found.ok_or_else(|| {
        Failure::source(format!("there is no record of build {wanted}"))
            .hint(format!("builds {first} to {last} are known: `kiln history builds` lists them"))
    })
}

/// A step of a build by its number; of the last stage unless it says which.
pub(super) fn step<'a>(
    number: u64,
    build: &'a BuildRecord,
    wanted: &StepNumber,
) -> Result<&'a StepRecord, Failure> {
    let last = build.steps.last().and_then(|step| step.place()).map(|(stage, _)| stage);
    let stage = wanted.stage.as_deref().or(last).unwrap_or_default();
    // The last of those that make one step.
    let found = build.steps.iter().rfind(|step| step.place() == Some((stage, wanted.number)));
    found.ok_or_else(|| {
        let titles: Vec<&str> = build.steps.iter().map(|step| step.title.as_str()).collect();
        Failure::source(format!("build {number} has no step {wanted}")).hint(format!(
            "its steps: {}",
            if titles.is_empty() { "none".to_owned() } else { titles.join(", ") }
        ))
    })
}

pub(super) fn as_json(number: u64, build: &BuildRecord) -> serde_json::Value {
    let mut json = serde_json::to_value(build).unwrap_or_default();
    if let Some(object) = json.as_object_mut() {
        object.insert("number".to_owned(), number.into());
    }
    json
}

fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Done => "done",
        Outcome::Failed => "failed",
        Outcome::Cancelled => "cancelled",
    }
}

fn image(build: &BuildRecord) -> String {
    match (build.names.as_slice(), &build.image) {
        ([name, ..], _) => name.clone(),
        ([], Some(id)) => id_digits(id).chars().take(12).collect(),
        ([], None) => String::new(),
    }
}

pub(super) fn took(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms}ms"),
        1000..120_000 => format!("{}.{}s", ms / 1000, ms % 1000 / 100),
        _ => format!("{}m{:02}s", ms / 60_000, ms / 1000 % 60),
    }
}
