//! `kiln why`

use kiln_build::builds::{BuildRecord, StepRecord, StepState};
use kiln_build::why::{StepChange, StepDifference, compare_builds, in_words};
use serde_json::{Value, json};

use super::builds::{as_json, find, step, took};
use super::{ago, print};
use crate::args::builds::WhyArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &WhyArgs) -> Result<u8, Failure> {
    if let Some([one, other]) = args.diff.as_deref() {
        return diff(session, *one, *other, args.json);
    }
    let (number, build) = find(session, args.build)?;
    let steps: Vec<&StepRecord> = match &args.step {
        Some(wanted) => vec![step(number, &build, wanted)?],
        None => build.steps.iter().collect(),
    };
    if args.json {
        let mut json = as_json(number, &build);
        let steps: Vec<Value> = steps.into_iter().map(step_json).collect();
        if let Some(object) = json.as_object_mut() {
            object.insert("steps".to_owned(), steps.into());
        }
        return print(&format!("{json:#}\n")).map(|()| 0);
    }
    let mut text = String::new();
    if args.step.is_none() {
        text = format!("build {number}, {}: {}\n", ago(build.at_unix), what(&build));
    }
    for step in steps {
        text.push_str(&format!("{}\n    {}\n", printable(&step.title), state(step)));
    }
    print(&text)?;
    Ok(0)
}

/// What was built.
fn what(build: &BuildRecord) -> String {
    let target = build.target.as_ref().map(|target| format!(", target {target}")).unwrap_or_default();
    printable(&format!("{}{target}", build.context))
}

fn step_json(step: &StepRecord) -> Value {
    let mut json = serde_json::to_value(step).unwrap_or_default();
    if let Some(object) = json.as_object_mut()
        && !step.why.is_empty()
    {
        object.insert("text".to_owned(), in_words(&step.why).into());
    }
    json
}

fn state(step: &StepRecord) -> String {
    let why = if step.why.is_empty() { String::new() } else { printable(&in_words(&step.why)) };
    match step.state {
        StepState::Cached => match &step.from {
            Some(from) => format!("cached, from {}", printable(from)),
            None => "cached".to_owned(),
        },
        StepState::Ran => format!("ran {}: {why}", took(step.took_ms)),
        StepState::Failed => format!("failed; it ran: {why}"),
        StepState::Cancelled => format!("stopped; it ran: {why}"),
    }
}

fn diff(session: &Session, one: u64, other: u64, json: bool) -> Result<u8, Failure> {
    let ((_, old), (_, new)) = (find(session, Some(one))?, find(session, Some(other))?);
    let differences = compare_builds(session.engine.store.root(), &old, &new);
    if json {
        let steps: Vec<Value> = differences.iter().map(difference_json).collect();
        return print(&format!("{:#}\n", json!({ "from": one, "to": other, "steps": steps }))).map(|()| 0);
    }
    if differences.is_empty() {
        print("the steps are the same\n")?;
    }
    for StepDifference { title, what } in &differences {
        let what = match what {
            StepChange::Added => format!("only in build {other}"),
            StepChange::Removed => format!("only in build {one}"),
            StepChange::Changed(reasons) => printable(&in_words(reasons)),
            StepChange::Unknown => "differs; what it was is not kept any more".to_owned(),
        };
        print(&format!("{}\n    {what}\n", printable(title)))?;
    }
    Ok(0)
}

fn difference_json(difference: &StepDifference) -> Value {
    let title = &difference.title;
    match &difference.what {
        StepChange::Added => json!({ "title": title, "change": "added" }),
        StepChange::Removed => json!({ "title": title, "change": "removed" }),
        StepChange::Changed(why) => {
            json!({ "title": title, "change": "changed", "why": why, "text": in_words(why) })
        }
        StepChange::Unknown => json!({ "title": title, "change": "unknown" }),
    }
}

/// Dockerfiles and file names are not ours.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
