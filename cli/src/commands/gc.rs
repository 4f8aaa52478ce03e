//! `kiln gc`, and what happens after builds.

use kiln_build::gc::{Collected, Object, Policy, Verdict, collect, collect_sometimes};
use serde_json::json;

use super::registry_serve::follow_names;
use super::{human_size, print, table};
use crate::args::store::{Format, GcArgs};
use crate::config::{Config, GcConfig};
use crate::errors::{Failure, say};
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &GcArgs) -> Result<u8, Failure> {
    let mut config = Config::read()?.gc;
    config.max_store = args.max_store.or(config.max_store);
    config.min_free = args.min_free.or(config.min_free);
    config.keep_duration = args.keep_duration.or(config.keep_duration);
    let policy = config.policy(session.engine.store.root());
    if !args.dry_run {
        // First: the store's own blobs may be the same files.
        forget_pushed(session);
    }
    let collected = collect(&session.engine, &policy, args.dry_run, &session.cancel)?;
    match args.format {
        Format::Json => print(&json(&collected, args.dry_run)),
        Format::Table => print_text(&collected, args.dry_run, args.verbose || args.dry_run),
    }?;
    if collected.over_limit {
        say("warning: the limit does not hold although all that may go is gone\n");
    }
    Ok(0)
}

fn print_text(collected: &Collected, dry_run: bool, verbose: bool) -> Result<(), Failure> {
    let removed = if dry_run { "would go" } else { "removed" };
    let mut rows = Vec::new();
    for object in &collected.objects {
        let verdict = match object.verdict {
            Verdict::Remove => removed,
            Verdict::Keep if verbose => "stays",
            Verdict::Keep => continue,
        };
        let size = human_size(object.disk_bytes);
        rows.push(
            [verdict, object.kind.name(), &name(object), &size, &object.reason].map(str::to_owned).to_vec(),
        );
    }
    print(&table(&rows))?;
    let count = collected.objects.iter().filter(|object| object.verdict == Verdict::Remove).count();
    let left = collected.before_bytes.saturating_sub(collected.removed_bytes);
    print(&format!(
        "{count} objects {removed}, {}; the store {} {}\n",
        human_size(collected.removed_bytes),
        if dry_run { "would take" } else { "takes" },
        human_size(left)
    ))
}

/// What a user calls it.
pub(super) fn name(object: &Object) -> String {
    let title = object.title.lines().next().unwrap_or_default();
    let short: String = title.chars().take(60).collect();
    if !short.is_empty() && short != "<none>" {
        return short;
    }
    object.id.trim_start_matches("sha256:").chars().take(20).collect()
}

fn json(collected: &Collected, dry_run: bool) -> String {
    let object = |object: &Object| {
        json!({
            "kind": object.kind.name(),
            "id": object.id,
            "title": object.title,
            "disk_bytes": object.disk_bytes,
            "last_used": object.last_used_unix,
            "removed": object.verdict == Verdict::Remove,
            "reason": object.reason,
        })
    };
    let value = json!({
        "dry_run": dry_run,
        "before_bytes": collected.before_bytes,
        "removed_bytes": collected.removed_bytes,
        "over_limit": collected.over_limit,
        "objects": collected.objects.iter().map(object).collect::<Vec<_>>(),
    });
    format!("{value:#}\n")
}

/// Removes what others pushed and has no name any more; how many bytes. Nothing else fails for it.
pub(super) fn forget_pushed(session: &Session) -> u64 {
    follow_names(session).unwrap_or_else(|error| {
        say(&format!("warning: what was pushed to the store was not collected: {error}\n"));
        0
    })
}

/// Collects garbage after a build that made something, if the configuration has a policy. A build
/// that went well does not fail for it.
pub(super) fn after_build(session: &Session, config: &GcConfig) {
    if !config.is_automatic() {
        return;
    }
    let policy: Policy = config.policy(session.engine.store.root());
    if let Err(error) = collect_sometimes(&session.engine, &policy, &session.cancel) {
        say(&format!("warning: garbage was not collected: {error}\n"));
    }
}
