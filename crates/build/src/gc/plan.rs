//! What shall go, and why: decided without touching anything.

use std::collections::{BTreeMap, HashMap, HashSet};

use kiln_content::Pinnable;
use kiln_oci::{Digest, SnapshotId};

use super::{Policy, needed_blobs};
use crate::BuildError;
use crate::world::World;

/// What an object is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A record of an image.
    Image {
        /// The image.
        config: Digest,
        /// Its files.
        snapshot: Option<SnapshotId>,
        /// It has a name, and goes all the same.
        named: bool,
    },
    /// A file tree with what is known of it.
    Snapshot {
        /// Which.
        id: SnapshotId,
        /// It is a result of builds.
        cache: bool,
        /// It came from outside.
        source: bool,
    },
    /// A blob.
    Blob(Digest),
    /// A directory of `--mount=type=cache`.
    CacheMount,
    /// A remote's repository.
    Repository,
}

impl Kind {
    /// One word for it.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Image { .. } => "image",
            Kind::Snapshot { source: true, .. } => "source",
            Kind::Snapshot { cache: true, .. } => "result",
            Kind::Snapshot { .. } => "layer",
            Kind::Blob(_) => "blob",
            Kind::CacheMount => "cache mount",
            Kind::Repository => "repository",
        }
    }
}

/// What becomes of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It stays.
    Keep,
    /// It goes.
    Remove,
}

/// An object of the store, with what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// What it is.
    pub kind: Kind,
    /// Its name in the store.
    pub id: String,
    /// What users know it by: image names, the step, the ID of the mount.
    pub title: String,
    /// What it alone takes on disk.
    pub disk_bytes: u64,
    /// When it was last used; seconds since 1970. `None`: nobody keeps count.
    pub last_used_unix: Option<i64>,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
}

pub(super) struct Plan {
    pub(super) objects: Vec<Object>,
    pub(super) over_limit: bool,
}

/// Tells whether somebody has pinned a thing.
type InUse<'a> = &'a dyn Fn(&Pinnable) -> Result<bool, BuildError>;

/// Judges every object of `world`.
pub(super) fn plan(
    world: &World,
    policy: &Policy,
    now_unix: i64,
    free_bytes: Option<u64>,
    in_use: InUse<'_>,
) -> Result<Plan, BuildError> {
    let judge = Judge {
        world,
        policy,
        now_unix,
        in_use,
        names: world.names(),
        too_many_bytes: too_many_bytes(world, policy, free_bytes),
        freed_bytes: 0,
        kept_children: HashMap::new(),
        gone_images: HashSet::new(),
        gone: HashSet::new(),
        damaged: world.nodes.iter().filter(|(_, node)| node.damaged).map(|(id, _)| id).collect(),
        objects: Vec::new(),
    };
    judge.all()
}

/// How much has to go for the limits to hold.
fn too_many_bytes(world: &World, policy: &Policy, free_bytes: Option<u64>) -> u64 {
    let over = policy.max_store_bytes.map_or(0, |max| world.total_bytes().saturating_sub(max));
    let missing = policy.min_free_bytes.zip(free_bytes).map_or(0, |(min, free)| min.saturating_sub(free));
    over.max(missing)
}

struct Judge<'a> {
    world: &'a World,
    policy: &'a Policy,
    now_unix: i64,
    in_use: InUse<'a>,
    names: HashMap<Digest, Vec<String>>,
    too_many_bytes: u64,
    freed_bytes: u64,
    /// Snapshots that others which stay need, with one of those and what for.
    kept_children: HashMap<SnapshotId, String>,
    gone_images: HashSet<Digest>,
    gone: HashSet<SnapshotId>,
    /// Snapshots of which nobody knows what they stand on.
    damaged: Vec<&'a SnapshotId>,
    objects: Vec<Object>,
}

/// What is judged together, in the order of its last use.
enum Candidate<'a> {
    Image(usize),
    Snapshot(&'a SnapshotId),
    CacheMount(usize),
    Repository(usize),
}

/// How the records know a snapshot.
#[derive(Default)]
struct Known<'a> {
    /// The step that made it, when it is a result of builds.
    step: Option<&'a str>,
    source: bool,
    images: Vec<Digest>,
    last_used_unix: Option<i64>,
}

impl<'a> Judge<'a> {
    fn all(mut self) -> Result<Plan, BuildError> {
        let world = self.world;
        let (needed, images) = self.named_images()?;
        let known = self.known();
        let last_used = self.effective_use(&known);

        let mut candidates: Vec<(i64, usize, Candidate<'a>)> = Vec::new();
        for at in images {
            let image = &world.survey.images[at];
            let used = image.snapshot.as_ref().and_then(|id| world.usage(id).last_used_unix);
            candidates.push((used.unwrap_or(0).max(image.created_unix), 0, Candidate::Image(at)));
        }
        for id in world.nodes.keys() {
            // Those above before those that they need.
            let depth = usize::MAX - world.needs(id).len();
            candidates.push((last_used.get(id).copied().unwrap_or(0), depth, Candidate::Snapshot(id)));
        }
        for (at, (mount, _)) in world.cache_mounts.iter().enumerate() {
            candidates.push((mount.record.last_used_unix, 0, Candidate::CacheMount(at)));
        }
        for (at, repository) in world.repositories.iter().enumerate() {
            candidates.push((repository.last_used_unix, 0, Candidate::Repository(at)));
        }
        candidates.sort_by_key(|(used, order, _)| (*used, *order));
        for (used, _, candidate) in candidates {
            match candidate {
                Candidate::Image(at) => self.image(at, used)?,
                Candidate::Snapshot(id) => self.snapshot(id, used, &needed, known.get(id))?,
                Candidate::CacheMount(at) => self.cache_mount(at),
                Candidate::Repository(at) => self.repository(at),
            }
        }
        self.blobs()?;
        let over_limit = self.freed_bytes < self.too_many_bytes;
        Ok(Plan { objects: self.objects, over_limit })
    }

    /// What images need that have names and keep them; and the places of all other images.
    fn named_images(&mut self) -> Result<(HashMap<&'a SnapshotId, String>, Vec<usize>), BuildError> {
        let mut needed: HashMap<&SnapshotId, String> = HashMap::new();
        let mut others = Vec::new();
        // Its image may be forgotten: what its layer stands on stays all the same.
        for container in &self.world.containers {
            for id in container.snapshot.iter().flat_map(|top| self.world.needs(top)) {
                needed.entry(id).or_insert_with(|| format!("container {} needs it", container.name));
            }
        }
        for (at, image) in self.world.survey.images.iter().enumerate() {
            if let Some(container) = self.container_of(&image.config) {
                let verdict = (Verdict::Keep, format!("container {container} was made of it"));
                let named = self.names.contains_key(&image.config);
                for id in image.snapshot.iter().flat_map(|top| self.world.needs(top)) {
                    needed.entry(id).or_insert_with(|| format!("container {container} needs it"));
                }
                self.push_image(at, image.created_unix, named, verdict);
                continue;
            }
            let Some(name) = self.names.get(&image.config).and_then(|names| names.first()).cloned() else {
                others.push(at);
                continue;
            };
            if self.policy.named_images {
                let files = image.snapshot.clone().map(Pinnable::Snapshot);
                let used = (self.in_use)(&Pinnable::Blob(image.config))?
                    || files.as_ref().map_or(Ok(false), |files| (self.in_use)(files))?;
                if !used {
                    others.push(at);
                    continue;
                }
            }
            for id in image.snapshot.iter().flat_map(|top| self.world.needs(top)) {
                needed.entry(id).or_insert_with(|| format!("{name} needs it"));
            }
            let verdict = (Verdict::Keep, "it has a name".to_owned());
            self.push_image(at, image.created_unix, false, verdict);
        }
        Ok((needed, others))
    }

    /// A container that was made of this image.
    fn container_of(&self, config: &Digest) -> Option<&'a str> {
        let made = self.world.containers.iter().find(|container| container.image.as_ref() == Some(config));
        made.map(|container| container.name.as_str())
    }

    fn known(&self) -> HashMap<&'a SnapshotId, Known<'a>> {
        let survey = &self.world.survey;
        let mut known: HashMap<&SnapshotId, Known<'_>> = HashMap::new();
        for (_, record) in &survey.cache {
            let entry = known.entry(&record.snapshot).or_default();
            entry.step = Some(&record.description);
            entry.last_used_unix = entry.last_used_unix.max(Some(record.created_unix));
        }
        for (_, record) in &survey.sources {
            let entry = known.entry(&record.snapshot).or_default();
            entry.source = true;
            entry.last_used_unix = entry.last_used_unix.max(Some(record.created_unix));
        }
        for image in &survey.images {
            let Some(id) = &image.snapshot else { continue };
            let entry = known.entry(id).or_default();
            entry.images.push(image.config);
            entry.last_used_unix = entry.last_used_unix.max(Some(image.created_unix));
        }
        for (id, usage) in &survey.usage {
            if let Some(entry) = known.get_mut(id) {
                entry.last_used_unix = entry.last_used_unix.max(usage.last_used_unix);
            }
        }
        known
    }

    /// When each snapshot, or one that stands on it, was last used.
    fn effective_use(&self, known: &HashMap<&SnapshotId, Known<'_>>) -> BTreeMap<&'a SnapshotId, i64> {
        let mut used: BTreeMap<&SnapshotId, i64> = BTreeMap::new();
        for id in self.world.nodes.keys() {
            let own = known.get(id).and_then(|known| known.last_used_unix).unwrap_or(0);
            for below in self.world.needs(id) {
                let entry = used.entry(below).or_default();
                *entry = own.max(*entry);
            }
        }
        used
    }

    /// Whether the policy lets go of what was last used then; and the words for it.
    fn evict(&self, last_used_unix: i64) -> (Verdict, String) {
        let seconds = self.now_unix.saturating_sub(last_used_unix).max(0);
        let ago = format!("last used {}", ago(seconds));
        let limited = self.policy.max_store_bytes.is_some() || self.policy.min_free_bytes.is_some();
        let old = match self.policy.keep {
            Some(keep) => u64::try_from(seconds).unwrap_or(0) >= keep.as_secs(),
            None => limited,
        };
        if !old || (limited && self.freed_bytes >= self.too_many_bytes) {
            return (Verdict::Keep, ago);
        }
        (Verdict::Remove, ago)
    }

    fn push(&mut self, object: Object) {
        if object.verdict == Verdict::Remove {
            self.freed_bytes += object.disk_bytes;
        }
        self.objects.push(object);
    }

    fn push_image(&mut self, at: usize, last_used_unix: i64, named: bool, verdict: (Verdict, String)) {
        let image = &self.world.survey.images[at];
        let names = self.names.get(&image.config).map(|names| names.join(", "));
        let (verdict, reason) = verdict;
        if verdict == Verdict::Remove {
            self.gone_images.insert(image.config);
        }
        self.push(Object {
            kind: Kind::Image { config: image.config, snapshot: image.snapshot.clone(), named },
            id: image.config.to_string(),
            title: names.unwrap_or_else(|| "<none>".to_owned()),
            // Its files and blobs are objects of their own.
            disk_bytes: 0,
            last_used_unix: Some(last_used_unix),
            verdict,
            reason,
        });
    }

    /// An image without a name, or one whose name does not keep it.
    fn image(&mut self, at: usize, last_used_unix: i64) -> Result<(), BuildError> {
        let image = &self.world.survey.images[at];
        let named = self.names.contains_key(&image.config);
        let files = image.snapshot.clone().map(Pinnable::Snapshot);
        let used = (self.in_use)(&Pinnable::Blob(image.config))?
            || files.as_ref().map_or(Ok(false), |files| (self.in_use)(files))?;
        let verdict = if used {
            (Verdict::Keep, "a running command uses it".to_owned())
        } else if named {
            (Verdict::Remove, "no container uses it".to_owned())
        } else {
            let (verdict, ago) = self.evict(last_used_unix);
            (verdict, format!("it has no name, {ago}"))
        };
        self.push_image(at, last_used_unix, named, verdict);
        Ok(())
    }

    fn snapshot(
        &mut self,
        id: &'a SnapshotId,
        last_used_unix: i64,
        needed: &HashMap<&SnapshotId, String>,
        known: Option<&Known<'a>>,
    ) -> Result<(), BuildError> {
        let nothing = Known::default();
        let known = known.unwrap_or(&nothing);
        let image = known.images.iter().find(|image| !self.gone_images.contains(image));
        let (verdict, reason) = if let Some(reason) = needed.get(id) {
            (Verdict::Keep, reason.clone())
        } else if let Some(reason) = self.kept_children.get(id) {
            (Verdict::Keep, reason.clone())
        } else if let Some(image) = image {
            (Verdict::Keep, format!("image {} needs it", image.short()))
        } else if (self.in_use)(&Pinnable::Snapshot(id.clone()))? {
            (Verdict::Keep, "a running command uses it".to_owned())
        } else if let Some(damaged) = self.damaged.iter().find(|damaged| **damaged != id) {
            // What a snapshot needs that cannot be read, nobody can prove.
            (Verdict::Keep, format!("layer {damaged} is damaged and may stand on it"))
        } else if known.step.is_none() && !known.source {
            (Verdict::Remove, "nothing refers to it".to_owned())
        } else {
            let (verdict, ago) = self.evict(last_used_unix);
            (verdict, format!("cache, {ago}"))
        };
        let node = &self.world.nodes[id];
        if verdict == Verdict::Keep {
            if let Some(parent) = &node.parent {
                self.kept_children.insert(parent.clone(), format!("layer {id} stands on it"));
            }
            if let Some(full) = &node.full {
                self.kept_children.insert(full.clone(), format!("layer {id} shows its files"));
            }
        } else {
            self.gone.insert(id.clone());
        }
        self.push(Object {
            kind: Kind::Snapshot { id: id.clone(), cache: known.step.is_some(), source: known.source },
            id: id.to_string(),
            title: known.step.unwrap_or_default().to_owned(),
            disk_bytes: node.disk_bytes,
            last_used_unix: (last_used_unix > 0).then_some(last_used_unix),
            verdict,
            reason,
        });
        Ok(())
    }

    fn cache_mount(&mut self, at: usize) {
        let (mount, disk_bytes) = &self.world.cache_mounts[at];
        let (verdict, reason) = if mount.in_use {
            (Verdict::Keep, "a running step uses it".to_owned())
        } else {
            self.evict(mount.record.last_used_unix)
        };
        self.push(Object {
            kind: Kind::CacheMount,
            id: mount.name.clone(),
            title: mount.record.id.clone(),
            disk_bytes: *disk_bytes,
            last_used_unix: Some(mount.record.last_used_unix),
            verdict,
            reason,
        });
    }

    fn repository(&mut self, at: usize) {
        let repository = &self.world.repositories[at];
        let (verdict, reason) = if repository.in_use {
            (Verdict::Keep, "a running build uses it".to_owned())
        } else {
            self.evict(repository.last_used_unix)
        };
        self.push(Object {
            kind: Kind::Repository,
            id: repository.name.clone(),
            title: String::new(),
            disk_bytes: repository.disk_bytes,
            last_used_unix: Some(repository.last_used_unix),
            verdict,
            reason,
        });
    }

    fn blobs(&mut self) -> Result<(), BuildError> {
        let gone = self.gone.iter().collect();
        let needed = needed_blobs(self.world, &self.gone_images, &gone);
        for (digest, file) in &self.world.blobs {
            let (verdict, reason) = if needed.contains(digest) {
                (Verdict::Keep, "an image or layer needs it")
            } else if (self.in_use)(&Pinnable::Blob(*digest))? {
                (Verdict::Keep, "a running command uses it")
            } else {
                (Verdict::Remove, "nothing refers to it")
            };
            self.push(Object {
                kind: Kind::Blob(*digest),
                id: digest.to_string(),
                title: String::new(),
                disk_bytes: file.disk_bytes,
                last_used_unix: None,
                verdict,
                reason: reason.to_owned(),
            });
        }
        Ok(())
    }
}

fn ago(seconds: i64) -> String {
    let (count, unit) = match seconds {
        ..120 => (seconds, "second"),
        120..7200 => (seconds / 60, "minute"),
        7200..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests;
