//! `kiln registry gc`

use kiln_registry_server::{Collected, Collection, Judged, Kind, collect_offline};
use serde_json::json;

use super::settings;
use crate::args::registry_serve::CollectArgs;
use crate::args::store::Format;
use crate::commands::{human_size, print, table};
use crate::errors::Failure;

pub(super) fn run(args: &CollectArgs) -> Result<u8, Failure> {
    let file = settings::read(args.config.as_deref())?;
    let policy = Collection {
        every: None,
        grace: args.grace.or(file.grace()?).unwrap_or(Collection::default().grace),
        untagged: args.untagged || file.gc_untagged,
    };
    let directory = settings::directory(args.dir.clone().or(file.dir))?;
    let mut all = Vec::new();
    let verbose = args.verbose || args.dry_run || args.format == Format::Json;
    let collected = collect_offline(&directory, &policy, args.dry_run, &mut |judged| {
        if judged.removed || verbose {
            all.push(judged);
        }
    })?;
    match args.format {
        Format::Json => print(&json(&all, &collected, args.dry_run)),
        Format::Table => print(&text(&all, &collected, args.dry_run)),
    }?;
    Ok(0)
}

/// Of repositories that may need what nobody can read.
pub(super) const LEFT: &str =
    "repositories left alone, for a manifest or a tag of theirs is damaged (push it again, or delete it)";

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Manifest => "manifest",
        Kind::Share => "share",
        Kind::Blob => "blob",
    }
}

fn text(all: &[Judged], collected: &Collected, dry_run: bool) -> String {
    let removed = if dry_run { "would go" } else { "removed" };
    let row = |judged: &Judged| {
        let short = judged.digest.hex().chars().take(12).collect::<String>();
        let name = judged.repository.as_ref().map_or(short.clone(), |name| format!("{name}@{short}"));
        // Who has a blob takes no room.
        let size = if judged.kind == Kind::Share { String::new() } else { human_size(judged.bytes) };
        let verdict = if judged.removed { removed } else { "stays" };
        [verdict, kind(judged.kind), &name, &size, judged.reason].map(str::to_owned).to_vec()
    };
    let rows: Vec<_> = all.iter().map(row).collect();
    let Collected { manifests, blobs, bytes, damaged } = collected;
    let left = match damaged {
        0 => String::new(),
        count => format!("{LEFT}: {count}\n"),
    };
    format!(
        "{}{manifests} manifests and {blobs} blobs {removed}, {}\n{left}",
        table(&rows),
        human_size(*bytes)
    )
}

fn json(all: &[Judged], collected: &Collected, dry_run: bool) -> String {
    let object = |judged: &Judged| {
        json!({
            "kind": kind(judged.kind),
            "repository": judged.repository,
            "digest": judged.digest,
            "bytes": judged.bytes,
            "removed": judged.removed,
            "reason": judged.reason,
        })
    };
    let value = json!({
        "dry_run": dry_run,
        "manifests": collected.manifests,
        "blobs": collected.blobs,
        "bytes": collected.bytes,
        "damaged_repositories": collected.damaged,
        "objects": all.iter().map(object).collect::<Vec<_>>(),
    });
    format!("{value:#}\n")
}
