//! `kiln diff`

use kiln_build::toolkit::{Difference, Kind, diff};
use kiln_layer::{Entry, EntryKind};
use serde_json::{Value, json};

use super::layer::{entry_json, kind, names, set_path};
use super::{human_size, print, table};
use crate::args::store::Format;
use crate::args::toolkit::DiffArgs;
use crate::errors::Failure;
use crate::escape;
use crate::session::Session;

/// Exit codes as those of diff(1): 0 the same files, 1 not the same, more is trouble.
pub(crate) fn run(session: &Session, args: &DiffArgs) -> Result<u8, Failure> {
    let Some(other) = &args.other else {
        return super::containers::files::changes(session, &args.one);
    };
    let (one, other) = (session.find(&args.one)?, session.find(other)?);
    let found = diff(&session.engine, &one, &other, &session.cancel)?;
    match args.format {
        Format::Json => print(&format!("{:#}\n", document(&found)))?,
        Format::Table if found.is_empty() => {}
        Format::Table => print(&text(&found))?,
    }
    Ok(u8::from(!found.is_empty()))
}

fn size(entry: &Entry) -> u64 {
    if let EntryKind::File { size, .. } = entry.kind { size } else { 0 }
}

/// What a table says of the size: that of a file, or what else it is.
fn cell(entry: &Entry) -> String {
    if let EntryKind::File { size, .. } = entry.kind { human_size(size) } else { kind(entry).to_owned() }
}

fn text(found: &[Difference]) -> String {
    let mut rows = Vec::with_capacity(found.len() + 1);
    rows.push(["", "PATH", "BEFORE", "AFTER", "CHANGED"].map(str::to_owned).to_vec());
    let (mut added, mut deleted, mut changed) = ((0, 0), (0, 0), 0);
    for Difference { path, kind } in found {
        let path = format!("/{}", escape::path(path));
        rows.push(match kind {
            Kind::Added(entry) => {
                added = (added.0 + 1, added.1 + size(entry));
                vec!["A".to_owned(), path, String::new(), cell(entry), String::new()]
            }
            Kind::Deleted(entry) => {
                deleted = (deleted.0 + 1, deleted.1 + size(entry));
                vec!["D".to_owned(), path, cell(entry), String::new(), String::new()]
            }
            Kind::Changed { before, after, aspects } => {
                changed += 1;
                let what = details(before, after, &names(aspects));
                vec!["C".to_owned(), path, cell(before), cell(after), what]
            }
        });
    }
    let part = |(count, bytes): (u64, u64), what| format!("{count} {what} ({})", human_size(bytes));
    format!("{}{}, {}, {changed} changed\n", table(&rows), part(added, "added"), part(deleted, "deleted"))
}

/// The names of what changed, with the values of what is short enough.
fn details(before: &Entry, after: &Entry, names: &str) -> String {
    let told = names.split(", ").map(|name| match name {
        "mode" => format!("mode {:04o} -> {:04o}", before.mode, after.mode),
        "owner" => format!("owner {}:{} -> {}:{}", before.uid, before.gid, after.uid, after.gid),
        "target" => match (&before.kind, &after.kind) {
            (EntryKind::Symlink { target: one }, EntryKind::Symlink { target: other }) => {
                format!("target {} -> {}", escape::path(one), escape::path(other))
            }
            _ => name.to_owned(),
        },
        name => name.to_owned(),
    });
    told.collect::<Vec<_>>().join(", ")
}

fn document(found: &[Difference]) -> Value {
    let differences = found.iter().map(|Difference { path, kind }| {
        let mut value = match kind {
            Kind::Added(entry) => json!({ "kind": "A", "after": entry_json(entry) }),
            Kind::Deleted(entry) => json!({ "kind": "D", "before": entry_json(entry) }),
            Kind::Changed { before, after, aspects } => json!({
                "kind": "C",
                "before": entry_json(before),
                "after": entry_json(after),
                "changed": aspects.iter().map(|aspect| aspect.name()).collect::<Vec<_>>(),
            }),
        };
        set_path(&mut value, "path", &[b"/", &path[..]].concat());
        value
    });
    json!({ "differences": differences.collect::<Vec<_>>() })
}
