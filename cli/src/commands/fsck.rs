//! `kiln fsck`

use kiln_build::fsck::{FsckOptions, Problem, Report, fsck};
use kiln_containers::fsck as containers;
use serde_json::json;

use super::print;
use crate::args::store::{Format, FsckArgs};
use crate::errors::{Failure, exit};
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &FsckArgs) -> Result<u8, Failure> {
    let options = FsckOptions { deep: args.deep, repair: args.repair };
    let mut report = fsck(&session.engine, &options, &session.cancel)?;
    let mut found = containers::fsck(&session.containers, &*session.engine.snapshots, args.repair)?;
    report.problems.extend(found.problems.drain(..).map(|problem| {
        let containers::Problem { kind, id, what, repaired } = problem;
        Problem { kind, id, what, repaired }
    }));
    report.notes.append(&mut found.notes);
    match args.format {
        Format::Json => print(&json(&report, &found)),
        Format::Table => print(&text(&report, &found, args)),
    }?;
    Ok(if report.is_damaged() { exit::STORE.number() } else { 0 })
}

fn text(report: &Report, found: &containers::Report, args: &FsckArgs) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        let done = problem.repaired.map_or_else(String::new, |done| format!(" ({done})"));
        text.push_str(&format!("{} {}: {}{done}\n", problem.kind, problem.id, problem.what));
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    let Report { records, snapshots, blobs, blobs_read, layers_read, problems, .. } = report;
    let containers::Report { containers, volumes, .. } = found;
    let beside = match (containers, volumes) {
        (0, 0) => String::new(),
        _ => format!(", {containers} containers, {volumes} volumes"),
    };
    text.push_str(&format!("{records} records, {snapshots} layers and {blobs} blobs{beside} checked"));
    if args.deep {
        text.push_str(&format!("; {layers_read} layers and {blobs_read} blobs read"));
    }
    let verdict = match (problems.len(), report.is_damaged()) {
        (0, _) => "the store is in order".to_owned(),
        (count, false) => format!("{count} problems repaired"),
        (count, true) => format!("{count} problems"),
    };
    text.push_str(&format!(": {verdict}\n"));
    if report.is_damaged() {
        let index = problems.iter().any(|problem| problem.kind == "index");
        let mut left = problems.iter().filter(|problem| problem.repaired.is_none());
        let (beside, repair) = (["container", "volume"], args.repair);
        text.push_str(if index {
            "hint: the next command makes the index anew; `kiln fsck --rebuild` does it now\n"
        } else if repair && left.all(|problem| beside.contains(&problem.kind)) {
            "hint: what is left can be removed: `kiln rm -f CONTAINER`, `kiln volume rm VOLUME`\n"
        } else {
            "hint: `kiln fsck --repair` forgets what is damaged; the next build or load makes it anew\n"
        });
    }
    text
}

fn json(report: &Report, found: &containers::Report) -> String {
    let problems = report.problems.iter().map(|problem| {
        json!({
            "kind": problem.kind,
            "id": problem.id,
            "what": problem.what,
            "repaired": problem.repaired,
        })
    });
    let value = json!({
        "ok": report.problems.is_empty(),
        "damaged": report.is_damaged(),
        "records": report.records,
        "snapshots": report.snapshots,
        "blobs": report.blobs,
        "blobs_read": report.blobs_read,
        "layers_read": report.layers_read,
        "containers": found.containers,
        "volumes": found.volumes,
        "problems": problems.collect::<Vec<_>>(),
        "notes": report.notes,
    });
    format!("{value:#}\n")
}
