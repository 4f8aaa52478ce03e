//! `kiln layer ls`, `kiln layer show`

use std::os::unix::ffi::OsStrExt;

use kiln_build::toolkit::{
    Aspect, LayerInfo, PathReport, ShowReport, Step, Summary, Waste, WasteKind, layers, show,
};
use kiln_layer::{Entry, EntryKind};
use serde_json::{Value, json};

use super::{human_size, print, table};
use crate::args::store::Format;
use crate::args::toolkit::{LayerCommand, LayerLsArgs, LayerShowArgs};
use crate::errors::Failure;
use crate::escape;
use crate::session::Session;

/// Wasted files in the table unless all are asked for.
const SHOWN: usize = 20;
/// Characters of an instruction in a table.
const WIDTH: usize = 60;

pub(crate) fn run(session: &Session, command: LayerCommand) -> Result<u8, Failure> {
    match command {
        LayerCommand::Ls(args) => ls(session, &args),
        LayerCommand::Show(args) => show_layers(session, &args),
    }
}

fn ls(session: &Session, args: &LayerLsArgs) -> Result<u8, Failure> {
    let image = session.find(&args.image)?;
    let layers = layers(&session.engine, &image)?;
    if args.format == Format::Json {
        let layers: Vec<Value> = layers.iter().map(layer_json).collect();
        print(&format!("{:#}\n", json!({ "image": image.config, "layers": layers })))?;
        return Ok(0);
    }
    let mut rows = vec![row(&["LAYER", "DIFF ID", "TAR", "ON DISK", "CREATED BY"])];
    let width = if args.no_trunc { usize::MAX } else { WIDTH };
    rows.extend(layers.iter().map(|layer| {
        vec![
            layer.number.to_string(),
            layer.diff_id.0.short(),
            human_size(layer.tar_bytes),
            human_size(layer.disk_bytes),
            instruction(layer, width),
        ]
    }));
    print(&table(&rows))?;
    Ok(0)
}

fn layer_json(layer: &LayerInfo) -> Value {
    json!({
        "layer": layer.number,
        "diff_id": layer.diff_id,
        "snapshot": layer.snapshot.as_str(),
        "tar_bytes": layer.tar_bytes,
        "disk_bytes": layer.disk_bytes,
        "blob": layer.blob.map(|(digest, size)| json!({ "digest": digest, "size": size })),
        "created": layer.created,
        "created_by": layer.created_by,
    })
}

fn show_layers(session: &Session, args: &LayerShowArgs) -> Result<u8, Failure> {
    let image = session.find(&args.image)?;
    let path = args.path.as_deref().map(OsStrExt::as_bytes);
    let report = show(&session.engine, &image, path, &session.cancel)?;
    match args.format {
        Format::Json => print(&format!("{:#}\n", report_json(&report)))?,
        Format::Table => print(&report_text(&report, args.all))?,
    }
    Ok(0)
}

fn report_text(report: &ShowReport, all: bool) -> String {
    let mut parts = Vec::new();
    let mut is_file = false;
    if let Some(path) = &report.path {
        parts.push(path_text(path, report));
        let is_dir = |entry: &Entry| entry.kind == EntryKind::Dir;
        is_file = path.steps.iter().all(|(_, step)| match step {
            Step::Added(entry) | Step::Changed(entry, _) => !is_dir(entry),
            Step::Deleted => true,
        });
    }
    if !is_file {
        let mut rows = vec![row(&["LAYER", "DIFF ID", "FILES", "SIZE", "HIDES", "WASTED", "CREATED BY"])];
        rows.extend(report.layers.iter().map(|(layer, summary)| {
            vec![
                layer.number.to_string(),
                layer.diff_id.0.short(),
                summary.files.to_string(),
                human_size(summary.bytes),
                summary.hides.to_string(),
                human_size(summary.wasted_bytes),
                instruction(layer, WIDTH),
            ]
        }));
        parts.push(table(&rows));
    }
    let wasted: u64 = report.waste.iter().map(|waste| waste.bytes).sum();
    let total: u64 = report.layers.iter().map(|(_, summary)| summary.bytes).sum();
    parts.push(match report.waste.len() {
        0 => "nothing is wasted\n".to_owned(),
        count => {
            let shown = if all { count } else { count.min(SHOWN) };
            let mut rows = vec![row(&["WASTED", "PATH", "IN LAYER", "WHY"])];
            rows.extend(report.waste.iter().take(shown).map(waste_row));
            let more = match count - shown {
                0 => String::new(),
                more => format!("and {more} more, see --all\n"),
            };
            let files = if count == 1 { "1 file".to_owned() } else { format!("{count} files") };
            let (wasted, total) = (human_size(wasted), human_size(total));
            format!("{}{more}{wasted} of {total} are wasted by {files}\n", table(&rows))
        }
    });
    parts.join("\n")
}

fn waste_row(waste: &Waste) -> Vec<String> {
    let by = waste.by;
    vec![
        human_size(waste.bytes),
        format!("/{}", escape::path(&waste.path)),
        waste.layer.to_string(),
        match waste.kind {
            WasteKind::Deleted => format!("deleted by layer {by}"),
            WasteKind::Overwritten => format!("overwritten by layer {by}"),
            WasteKind::SameContent => format!("the same content again in layer {by}"),
        },
    ]
}

fn path_text(path: &PathReport, report: &ShowReport) -> String {
    let name = escape::path(&path.path);
    let now = match &path.now {
        Some(place) => format!("/{name} is from layer {}: {}\n\n", place.layer, describe(&place.entry)),
        None => format!("/{name} is not in the image\n\n"),
    };
    let mut rows = vec![row(&["LAYER", "DIFF ID", "WHAT", "THEN", "CREATED BY"])];
    for (number, step) in &path.steps {
        let (layer, _) = &report.layers[number - 1];
        let (what, then) = match step {
            Step::Added(entry) => ("added".to_owned(), describe(entry)),
            Step::Changed(entry, aspects) if aspects.is_empty() => {
                // A directory is in a layer when anything in it is.
                let again = if entry.kind == EntryKind::Dir { "as before" } else { "the same again" };
                (again.to_owned(), describe(entry))
            }
            Step::Changed(entry, aspects) => (format!("changed: {}", names(aspects)), describe(entry)),
            Step::Deleted => ("deleted".to_owned(), "-".to_owned()),
        };
        rows.push(vec![number.to_string(), layer.diff_id.0.short(), what, then, instruction(layer, WIDTH)]);
    }
    now + &table(&rows)
}

/// What changed, in words.
pub(super) fn names(aspects: &[Aspect]) -> String {
    aspects.iter().map(|aspect| aspect.name()).collect::<Vec<_>>().join(", ")
}

/// What an entry is, in a few words.
pub(super) fn describe(entry: &Entry) -> String {
    let (mode, uid, gid) = (entry.mode, entry.uid, entry.gid);
    match &entry.kind {
        EntryKind::Symlink { target } => format!("link to {}, {uid}:{gid}", escape::path(target)),
        EntryKind::File { size, .. } => format!("file, {mode:04o}, {uid}:{gid}, {}", human_size(*size)),
        EntryKind::Char { major, minor } | EntryKind::Block { major, minor } => {
            format!("{}, {mode:04o}, {uid}:{gid}, {major}:{minor}", kind(entry))
        }
        _ => format!("{}, {mode:04o}, {uid}:{gid}", kind(entry)),
    }
}

/// One word for what an entry is, the same in tables and JSON.
pub(super) fn kind(entry: &Entry) -> &'static str {
    match entry.kind {
        EntryKind::File { .. } => "file",
        EntryKind::Dir => "dir",
        EntryKind::Symlink { .. } => "link",
        EntryKind::Char { .. } => "char",
        EntryKind::Block { .. } => "block",
        EntryKind::Fifo => "fifo",
        EntryKind::Socket => "socket",
    }
}

/// An entry in JSON.
pub(super) fn entry_json(entry: &Entry) -> Value {
    let mut value = json!({
        "type": kind(entry),
        "mode": format!("{:04o}", entry.mode),
        "uid": entry.uid,
        "gid": entry.gid,
    });
    match &entry.kind {
        EntryKind::File { size, .. } => value["size"] = json!(size),
        EntryKind::Symlink { target } => set_path(&mut value, "target", target),
        EntryKind::Char { major, minor } | EntryKind::Block { major, minor } => {
            value["device"] = json!([major, minor]);
        }
        _ => {}
    }
    value
}

/// Sets `key`, and `key_bytes` as well when the path is not UTF-8.
pub(super) fn set_path(value: &mut Value, key: &str, path: &[u8]) {
    let (text, bytes) = escape::json(path);
    value[key] = json!(text);
    if let Some(bytes) = bytes {
        value[format!("{key}_bytes")] = json!(bytes);
    }
}

fn report_json(report: &ShowReport) -> Value {
    let layers = report.layers.iter().map(|(layer, summary)| {
        let Summary { files, bytes, hides, wasted_bytes } = summary;
        let mut value = layer_json(layer);
        value["files"] = json!(files);
        value["bytes"] = json!(bytes);
        value["hides"] = json!(hides);
        value["wasted_bytes"] = json!(wasted_bytes);
        value
    });
    let waste = report.waste.iter().map(|waste| {
        let how = match waste.kind {
            WasteKind::Deleted => "deleted",
            WasteKind::Overwritten => "overwritten",
            WasteKind::SameContent => "same-content",
        };
        let mut value = json!({ "bytes": waste.bytes, "layer": waste.layer, "by": waste.by, "how": how });
        set_path(&mut value, "path", &[b"/", &waste.path[..]].concat());
        value
    });
    let path = report.path.as_ref().map(|path| {
        let steps = path.steps.iter().map(|(layer, step)| match step {
            Step::Added(entry) => json!({ "layer": layer, "what": "added", "entry": entry_json(entry) }),
            Step::Changed(entry, aspects) => json!({
                "layer": layer,
                "what": "changed",
                "changed": aspects.iter().map(|aspect| aspect.name()).collect::<Vec<_>>(),
                "entry": entry_json(entry),
            }),
            Step::Deleted => json!({ "layer": layer, "what": "deleted" }),
        });
        let mut value = json!({
            "layer": path.now.as_ref().map(|place| place.layer),
            "entry": path.now.as_ref().map(|place| entry_json(&place.entry)),
            "steps": steps.collect::<Vec<_>>(),
        });
        set_path(&mut value, "path", &[b"/", &path.path[..]].concat());
        value
    });
    let total: u64 = report.waste.iter().map(|waste| waste.bytes).sum();
    json!({
        "layers": layers.collect::<Vec<_>>(),
        "waste": waste.collect::<Vec<_>>(),
        "wasted_bytes": total,
        "path": path,
    })
}

fn instruction(layer: &LayerInfo, width: usize) -> String {
    layer.created_by.as_deref().map_or_else(|| "<unknown>".to_owned(), |text| escape::line(text, width))
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|&cell| cell.to_owned()).collect()
}
