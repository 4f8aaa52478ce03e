//! `kiln fsck`

use kiln_build::fsck::{FsckOptions, Report, fsck};
use serde_json::json;

use super::print;
use crate::args::store::{Format, FsckArgs};
use crate::errors::{Failure, exit};
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &FsckArgs) -> Result<u8, Failure> {
    let options = FsckOptions { deep: args.deep, repair: args.repair };
    let report = fsck(&session.engine, &options, &session.cancel)?;
    match args.format {
        Format::Json => print(&json(&report)),
        Format::Table => print(&text(&report, args)),
    }?;
    Ok(if report.is_damaged() { exit::STORE.number() } else { 0 })
}

fn text(report: &Report, args: &FsckArgs) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        let done = problem.repaired.map_or_else(String::new, |done| format!(" ({done})"));
        text.push_str(&format!("{} {}: {}{done}\n", problem.kind, problem.id, problem.what));
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    let Report { records, snapshots, blobs, blobs_read, layers_read, problems, .. } = report;
    text.push_str(&format!("{records} records, {snapshots} layers and {blobs} blobs checked"));
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
        text.push_str(if index {
            "hint: the next command makes the index anew; `kiln fsck --rebuild` does it now\n"
        } else {
            "hint: `kiln fsck --repair` forgets what is damaged; the next build or load makes it anew\n"
        });
    }
    text
}

fn json(report: &Report) -> String {
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
        "problems": problems.collect::<Vec<_>>(),
        "notes": report.notes,
    });
    format!("{value:#}\n")
}
