//! `kiln du`: what takes how much, who needs it, and what could go.

use std::collections::{BTreeMap, BTreeSet};

use kiln_oci::SnapshotId;

use crate::gc::{self, Kind, Object, Policy, Verdict};
use crate::world::World;
use crate::{BuildError, Engine, WhichBuild, last_build};

/// What the store takes on disk. All sizes are bytes of blocks.
#[derive(Debug, Clone, Default)]
pub struct DiskUsage {
    /// Images, newest first.
    pub images: Vec<ImageUsage>,
    /// File trees, each without what it stands on; largest first.
    pub layers: Vec<LayerUsage>,
    /// Blobs: configs, manifests, layers as they came.
    pub blobs: PartUsage,
    /// Cache mounts, largest first.
    pub cache_mounts: Vec<CacheMountUsage>,
    /// Repositories that checkouts are made from.
    pub repositories: PartUsage,
    /// What running steps and containers write to, by name.
    pub containers: Vec<(String, u64)>,
    /// Directories, the index, locks, what is on its way in or out.
    pub rest_bytes: u64,
    /// All of it, as `du -s` counts.
    pub total_bytes: u64,
    /// What `kiln prune` would remove.
    pub reclaimable_bytes: u64,
    /// What `kiln prune --all` would remove.
    pub reclaimable_all_bytes: u64,
}

/// An image's share.
#[derive(Debug, Clone)]
pub struct ImageUsage {
    /// Its ID.
    pub id: String,
    /// Its names.
    pub names: Vec<String>,
    /// When it came; seconds since 1970.
    pub created_unix: i64,
    /// All of its layers, and what these are deltas on.
    pub disk_bytes: u64,
    /// Those that no other image has.
    pub unique_bytes: u64,
    /// How many layers it has.
    pub layers: usize,
}

/// A file tree.
#[derive(Debug, Clone)]
pub struct LayerUsage {
    /// Its name in the store.
    pub id: SnapshotId,
    /// What it stands on.
    pub parent: Option<SnapshotId>,
    /// What it alone takes.
    pub disk_bytes: u64,
    /// Images that need it.
    pub images: Vec<String>,
    /// The step that made it, or failed at it; empty when it came from elsewhere.
    pub step: String,
    /// It is a result that builds may find.
    pub is_cache: bool,
    /// When it was last used; seconds since 1970.
    pub last_used_unix: Option<i64>,
    /// In how many different hours it was used.
    pub times_used: i64,
    /// `kiln prune` would remove it.
    pub reclaimable: bool,
}

/// A cache mount.
#[derive(Debug, Clone)]
pub struct CacheMountUsage {
    /// The ID that steps know it by.
    pub id: String,
    /// What it takes.
    pub disk_bytes: u64,
    /// When a step last began to use it; seconds since 1970.
    pub last_used_unix: i64,
    /// A step is using it.
    pub in_use: bool,
}

/// A part of the store as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PartUsage {
    /// How many there are.
    pub count: usize,
    /// What they take.
    pub disk_bytes: u64,
    /// What of that `kiln prune` would remove.
    pub reclaimable_bytes: u64,
}

/// Measures the store. Costs O(objects), and O(files) of what is new or may change.
///
/// # Errors
/// [`BuildError`] when something cannot be read.
pub fn disk_usage(engine: &Engine) -> Result<DiskUsage, BuildError> {
    let world = World::look(engine)?;
    let removable = |named_images| {
        let collected = gc::judge(engine, &world, &Policy::prune(named_images))?;
        let removed = collected.into_iter().filter(|object| object.verdict == Verdict::Remove);
        Ok::<_, BuildError>(removed.collect::<Vec<Object>>())
    };
    let (prunable, prunable_all) = (removable(false)?, removable(true)?);
    let sum = |objects: &[Object]| objects.iter().map(|object| object.disk_bytes).sum::<u64>();
    let part = |kind: fn(&Kind) -> bool, count: usize, disk_bytes: u64| {
        let of_kind = prunable.iter().filter(|object| kind(&object.kind));
        let reclaimable_bytes = of_kind.map(|object| object.disk_bytes).sum();
        PartUsage { count, disk_bytes, reclaimable_bytes }
    };
    let blobs = world.blobs.values().map(|blob| blob.disk_bytes).sum();
    let repositories = world.repositories.iter().map(|repository| repository.disk_bytes).sum();
    let prunable_ids = prunable.iter().filter(|object| matches!(object.kind, Kind::Snapshot { .. }));
    let prunable_ids: BTreeSet<&str> = prunable_ids.map(|object| object.id.as_str()).collect();
    let mut cache_mounts: Vec<CacheMountUsage> = world
        .cache_mounts
        .iter()
        .map(|(mount, disk_bytes)| CacheMountUsage {
            id: mount.record.id.clone(),
            disk_bytes: *disk_bytes,
            last_used_unix: mount.record.last_used_unix,
            in_use: mount.in_use,
        })
        .collect();
    cache_mounts.sort_by_key(|mount| std::cmp::Reverse(mount.disk_bytes));
    Ok(DiskUsage {
        images: images(&world),
        layers: layers(&world, &prunable_ids, failed_step(engine)),
        blobs: part(|kind| matches!(kind, Kind::Blob(_)), world.blobs.len(), blobs),
        cache_mounts,
        repositories: part(|kind| *kind == Kind::Repository, world.repositories.len(), repositories),
        containers: world.active.iter().map(|(key, bytes)| (key.to_string(), *bytes)).collect(),
        rest_bytes: world.rest_bytes,
        total_bytes: world.total_bytes(),
        reclaimable_bytes: sum(&prunable),
        reclaimable_all_bytes: sum(&prunable_all),
    })
}

/// How many images need each snapshot, and which.
fn needed_by(world: &World) -> BTreeMap<&SnapshotId, Vec<String>> {
    let names = world.names();
    let mut needed: BTreeMap<&SnapshotId, Vec<String>> = BTreeMap::new();
    for image in &world.survey.images {
        let name = names.get(&image.config).map_or_else(|| image.config.short(), |names| names.join(", "));
        for id in image.snapshot.iter().flat_map(|top| world.needs(top)) {
            needed.entry(id).or_default().push(name.clone());
        }
    }
    needed
}

fn images(world: &World) -> Vec<ImageUsage> {
    let (mut names, needed) = (world.names(), needed_by(world));
    let usage = |image: &kiln_content::ImageRecord| {
        let needs: Vec<&SnapshotId> = image.snapshot.iter().flat_map(|top| world.needs(top)).collect();
        let bytes = |id: &SnapshotId| world.nodes.get(id).map_or(0, |node| node.disk_bytes);
        let unique = needs.iter().filter(|id| needed.get(*id).is_some_and(|images| images.len() == 1));
        ImageUsage {
            id: image.config.to_string(),
            names: names.remove(&image.config).unwrap_or_default(),
            created_unix: image.created_unix,
            disk_bytes: needs.iter().map(|id| bytes(id)).sum(),
            unique_bytes: unique.map(|id| bytes(id)).sum(),
            layers: image.snapshot.as_ref().map_or(0, |top| world.chain(top).len()),
        }
    };
    world.survey.images.iter().map(usage).collect()
}

/// What is kept of a failed step, and the step.
fn failed_step(engine: &Engine) -> Option<(SnapshotId, String)> {
    let failed = last_build(engine.store.root(), WhichBuild::Failed).ok()??.failed?;
    Some((failed.snapshot?, failed.title))
}

fn layers(world: &World, prunable: &BTreeSet<&str>, failed: Option<(SnapshotId, String)>) -> Vec<LayerUsage> {
    let needed = needed_by(world);
    let mut made: BTreeMap<&SnapshotId, (&str, i64)> = BTreeMap::new();
    for (_, record) in &world.survey.cache {
        made.insert(&record.snapshot, (&record.description, record.created_unix));
    }
    let usage = |(id, node): (&SnapshotId, &crate::world::Node)| {
        let (known, made) = (world.usage(id), made.get(id));
        LayerUsage {
            id: id.clone(),
            parent: node.parent.clone(),
            disk_bytes: node.disk_bytes,
            images: needed.get(id).cloned().unwrap_or_default(),
            step: match (made, &failed) {
                (Some((step, _)), _) => (*step).to_owned(),
                (None, Some((kept, step))) if kept == id => format!("failed: {step}"),
                (None, _) => String::new(),
            },
            is_cache: made.is_some(),
            last_used_unix: known.last_used_unix.max(made.map(|(_, created)| *created)),
            times_used: known.times_used,
            reclaimable: prunable.contains(id.as_str()),
        }
    };
    let mut layers: Vec<LayerUsage> = world.nodes.iter().map(usage).collect();
    layers.sort_by(|one, other| other.disk_bytes.cmp(&one.disk_bytes).then(one.id.cmp(&other.id)));
    layers
}
