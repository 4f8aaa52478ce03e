//! `kiln du`

use kiln_build::usage::{DiskUsage, disk_usage};
use serde_json::json;

use super::{ago, human_size, print, table};
use crate::args::store::{DuArgs, Format};
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &DuArgs) -> Result<u8, Failure> {
    let usage = disk_usage(&session.engine)?;
    match args.format {
        Format::Json => print(&json(&usage)),
        Format::Table if args.verbose => print(&verbose(&usage)),
        Format::Table => print(&summary(&usage)),
    }?;
    Ok(0)
}

/// Layers of images and layers that only the cache needs: count, size, what could go.
fn parts(usage: &DiskUsage) -> [(usize, u64, u64); 2] {
    let mut parts = [(0, 0, 0); 2];
    for layer in &usage.layers {
        let part = &mut parts[usize::from(layer.images.is_empty())];
        part.0 += 1;
        part.1 += layer.disk_bytes;
        part.2 += if layer.reclaimable { layer.disk_bytes } else { 0 };
    }
    parts
}

fn summary(usage: &DiskUsage) -> String {
    let mut rows = vec![["TYPE", "COUNT", "SIZE", "RECLAIMABLE"].map(str::to_owned).to_vec()];
    let mut row = |what: &str, count: Option<usize>, bytes: u64, reclaimable: Option<u64>| {
        let count = count.map_or_else(String::new, |count| count.to_string());
        rows.push(vec![
            what.to_owned(),
            count,
            human_size(bytes),
            reclaimable.map_or_else(String::new, human_size),
        ]);
    };
    let [images, cache] = parts(usage);
    row("Image layers", Some(images.0), images.1, Some(images.2));
    row("Build cache", Some(cache.0), cache.1, Some(cache.2));
    row("Blobs", Some(usage.blobs.count), usage.blobs.disk_bytes, Some(usage.blobs.reclaimable_bytes));
    let (mounts, free) = usage.cache_mounts.iter().fold((0, 0), |(all, free), mount| {
        (all + mount.disk_bytes, free + if mount.in_use { 0 } else { mount.disk_bytes })
    });
    row("Cache mounts", Some(usage.cache_mounts.len()), mounts, Some(free));
    let repositories = usage.repositories;
    row(
        "Repositories",
        Some(repositories.count),
        repositories.disk_bytes,
        Some(repositories.reclaimable_bytes),
    );
    let containers = usage.containers.iter().map(|(_, bytes)| bytes).sum();
    row("Containers", Some(usage.containers.len()), containers, Some(0));
    row("Index and rest", None, usage.rest_bytes, None);
    row("Total", None, usage.total_bytes, Some(usage.reclaimable_bytes));
    table(&rows)
}

fn verbose(usage: &DiskUsage) -> String {
    let header =
        |columns: &[&str]| vec![columns.iter().map(|column| (*column).to_owned()).collect::<Vec<_>>()];
    let used = |unix: Option<i64>| unix.map_or_else(|| "-".to_owned(), ago);
    let mut images = header(&["IMAGE", "IMAGE ID", "LAYERS", "SIZE", "SHARED", "UNIQUE"]);
    for image in &usage.images {
        let name = if image.names.is_empty() { "<none>".to_owned() } else { image.names.join(", ") };
        images.push(vec![
            name,
            image.id.trim_start_matches("sha256:").chars().take(12).collect(),
            image.layers.to_string(),
            human_size(image.disk_bytes),
            human_size(image.disk_bytes.saturating_sub(image.unique_bytes)),
            human_size(image.unique_bytes),
        ]);
    }
    let mut layers = header(&["LAYER", "SIZE", "LAST USED", "RECLAIMABLE", "IMAGES", "STEP"]);
    for layer in &usage.layers {
        layers.push(vec![
            layer.id.to_string(),
            human_size(layer.disk_bytes),
            used(layer.last_used_unix),
            if layer.reclaimable { "yes" } else { "no" }.to_owned(),
            if layer.images.is_empty() { "-".to_owned() } else { layer.images.join(", ") },
            layer.step.lines().next().unwrap_or_default().chars().take(60).collect(),
        ]);
    }
    let mut mounts = header(&["CACHE MOUNT", "SIZE", "LAST USED", "IN USE"]);
    for mount in &usage.cache_mounts {
        mounts.push(vec![
            mount.id.clone(),
            human_size(mount.disk_bytes),
            used(Some(mount.last_used_unix)),
            if mount.in_use { "yes" } else { "no" }.to_owned(),
        ]);
    }
    let mut containers = header(&["CONTAINER", "SIZE"]);
    containers.extend(usage.containers.iter().map(|(key, bytes)| vec![key.clone(), human_size(*bytes)]));
    let tables = [images, layers, mounts, containers].map(|rows| table(&rows));
    format!("{}\n{}", tables.join("\n"), summary(usage))
}

fn json(usage: &DiskUsage) -> String {
    let images = usage.images.iter().map(|image| {
        json!({
            "id": image.id,
            "names": image.names,
            "created": image.created_unix,
            "disk_bytes": image.disk_bytes,
            "unique_bytes": image.unique_bytes,
            "layers": image.layers,
        })
    });
    let layers = usage.layers.iter().map(|layer| {
        json!({
            "id": layer.id.as_str(),
            "parent": layer.parent.as_ref().map(|parent| parent.as_str()),
            "disk_bytes": layer.disk_bytes,
            "images": layer.images,
            "step": layer.step,
            "cache": layer.is_cache,
            "last_used": layer.last_used_unix,
            "times_used": layer.times_used,
            "reclaimable": layer.reclaimable,
        })
    });
    let mounts = usage.cache_mounts.iter().map(|mount| {
        json!({
            "id": mount.id,
            "disk_bytes": mount.disk_bytes,
            "last_used": mount.last_used_unix,
            "in_use": mount.in_use,
        })
    });
    let part = |part: kiln_build::usage::PartUsage| {
        json!({
            "count": part.count,
            "disk_bytes": part.disk_bytes,
            "reclaimable_bytes": part.reclaimable_bytes,
        })
    };
    let container = |(id, bytes): &(String, u64)| json!({ "id": id, "disk_bytes": bytes });
    let value = json!({
        "images": images.collect::<Vec<_>>(),
        "layers": layers.collect::<Vec<_>>(),
        "blobs": part(usage.blobs),
        "cache_mounts": mounts.collect::<Vec<_>>(),
        "repositories": part(usage.repositories),
        "containers": usage.containers.iter().map(container).collect::<Vec<_>>(),
        "rest_bytes": usage.rest_bytes,
        "total_bytes": usage.total_bytes,
        "reclaimable_bytes": usage.reclaimable_bytes,
        "reclaimable_all_bytes": usage.reclaimable_all_bytes,
    });
    format!("{value:#}\n")
}
