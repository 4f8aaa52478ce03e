//! What is in the store and what it takes on disk.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kiln_content::{BlobFile, ContainerUse, Survey, Usage};
use kiln_oci::{ActiveKey, Digest, SnapshotId};
use kiln_snapshotter::{Needs, disk_bytes};

use crate::cache_mounts::{CacheMountInfo, cache_mounts};
use crate::{BuildError, Engine};

/// A committed snapshot among the others.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    /// `None`: it stands on nothing, or its sidecar cannot be read.
    pub(crate) parent: Option<SnapshotId>,
    /// What it is a delta on; `None`: it is none, or its sidecar cannot be read.
    pub(crate) full: Option<SnapshotId>,
    /// The sidecar cannot be read: nothing is known of what it needs.
    pub(crate) damaged: bool,
    pub(crate) disk_bytes: u64,
}

/// A remote's repository that checkouts are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Repository {
    /// Its directory's name.
    pub(crate) name: String,
    /// What it takes on disk.
    pub(crate) disk_bytes: u64,
    /// When a build last used it; seconds since 1970.
    pub(crate) last_used_unix: i64,
    /// A build is using it.
    pub(crate) in_use: bool,
}

/// Everything in the store at about one moment: records first, then the data, so that there is data
/// for each record unless somebody is removing it.
pub(crate) struct World {
    pub(crate) survey: Survey,
    pub(crate) nodes: BTreeMap<SnapshotId, Node>,
    pub(crate) blobs: BTreeMap<Digest, BlobFile>,
    pub(crate) cache_mounts: Vec<(CacheMountInfo, u64)>,
    pub(crate) repositories: Vec<Repository>,
    pub(crate) active: Vec<(ActiveKey, u64)>,
    pub(crate) containers: Vec<ContainerUse>,
    /// Directories, the index, locks, digests of contexts, what is on its way in or out.
    pub(crate) rest_bytes: u64,
}

impl World {
    /// Looks at everything. Costs O(objects), and O(files) for what was never measured before and
    /// what may change: cache mounts, repositories, active snapshots.
    pub(crate) fn look(engine: &Engine) -> Result<Self, BuildError> {
        let (store, root) = (&engine.store, engine.store.root());
        let survey = store.survey()?;
        let containers = store.container_uses()?;
        let mut nodes = BTreeMap::new();
        let mut measured = Vec::new();
        for id in engine.snapshots.committed()? {
            let known = survey.usage.get(&id).and_then(|usage| usage.disk_bytes);
            let disk_bytes = match known {
                Some(bytes) => bytes,
                None => match engine.snapshots.disk_bytes(&id) {
                    Ok(bytes) => {
                        measured.push((id.clone(), bytes));
                        bytes
                    }
                    // Removed meanwhile.
                    Err(kiln_snapshotter::Error::NoSnapshot(_)) => continue,
                    Err(error) => return Err(error.into()),
                },
            };
            let (Needs { parent, full }, damaged) = match engine.snapshots.needs(&id) {
                Ok(needs) => (needs, false),
                Err(kiln_snapshotter::Error::NoSnapshot(_)) => continue,
                Err(kiln_snapshotter::Error::Damaged { .. }) => (Needs::default(), true),
                Err(error) => return Err(error.into()),
            };
            nodes.insert(id, Node { parent, full, damaged, disk_bytes });
        }
        store.put_disk_bytes(&measured)?;
        let blobs: BTreeMap<_, _> = store.blob_files()?.blobs.into_iter().collect();
        let mounts = cache_mounts(root).map_err(unreadable(root))?;
        let mut sized = Vec::new();
        for mount in mounts {
            let bytes = disk_bytes(&root.join("cache-mounts").join(&mount.name))?;
            sized.push((mount, bytes));
        }
        let repositories = repositories(&root.join("git")).map_err(unreadable(root))?;
        let overhead = engine.snapshots.overhead()?;
        let mut world = Self {
            survey,
            nodes,
            blobs,
            cache_mounts: sized,
            repositories,
            active: overhead.active,
            containers,
            rest_bytes: overhead.rest_bytes,
        };
        world.rest_bytes += world.rest(root)?;
        Ok(world)
    }

    /// What no part above has counted.
    fn rest(&self, root: &Path) -> Result<u64, BuildError> {
        let mut rest = fs::symlink_metadata(root).map_or(0, |root| root.blocks() * 512);
        for entry in fs::read_dir(root).map_err(unreadable(root))? {
            let entry = entry.map_err(unreadable(root))?;
            if entry.file_name() != "snapshots" {
                rest += disk_bytes(&entry.path())?;
            }
        }
        // This process's own, gone with it.
        for log in ["db/meta.sqlite-wal", "db/meta.sqlite-shm"] {
            rest = rest.saturating_sub(disk_bytes(&root.join(log))?);
        }
        let counted = self.blobs.values().map(|blob| blob.disk_bytes).sum::<u64>()
            + self.cache_mounts.iter().map(|(_, bytes)| bytes).sum::<u64>()
            + self.repositories.iter().map(|repository| repository.disk_bytes).sum::<u64>();
        Ok(rest.saturating_sub(counted))
    }

    /// What the store takes on disk.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.nodes.values().map(|node| node.disk_bytes).sum::<u64>()
            + self.blobs.values().map(|blob| blob.disk_bytes).sum::<u64>()
            + self.cache_mounts.iter().map(|(_, bytes)| bytes).sum::<u64>()
            + self.repositories.iter().map(|repository| repository.disk_bytes).sum::<u64>()
            + self.active.iter().map(|(_, bytes)| bytes).sum::<u64>()
            + self.rest_bytes
    }

    /// `id` and all it stands on, highest first; ends where something is missing or a circle closes.
    pub(crate) fn chain<'a>(&'a self, id: &'a SnapshotId) -> Vec<&'a SnapshotId> {
        let mut chain: Vec<&SnapshotId> = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next.filter(|id| !chain.contains(id)) {
            let Some(node) = self.nodes.get(id) else { break };
            chain.push(id);
            next = node.parent.as_ref();
        }
        chain
    }

    /// `id` and all that it cannot be without: what it stands on and what it is a delta on, and what those
    /// stand on. Each has more of these than any of the others.
    pub(crate) fn needs<'a>(&'a self, id: &'a SnapshotId) -> Vec<&'a SnapshotId> {
        let mut needs: Vec<&SnapshotId> = Vec::new();
        let mut pending = vec![id];
        while let Some(id) = pending.pop() {
            for id in self.chain(id) {
                if needs.contains(&id) {
                    break;
                }
                needs.push(id);
                pending.extend(self.nodes.get(id).and_then(|node| node.full.as_ref()));
            }
        }
        needs
    }

    /// What is known of the use of a snapshot.
    pub(crate) fn usage(&self, id: &SnapshotId) -> Usage {
        self.survey.usage.get(id).copied().unwrap_or_default()
    }

    /// The names of each image, as users write them.
    pub(crate) fn names(&self) -> HashMap<Digest, Vec<String>> {
        let mut names: HashMap<Digest, Vec<String>> = HashMap::new();
        for (name, config) in &self.survey.names {
            names.entry(*config).or_default().push(name.familiar());
        }
        names
    }
}

/// A part of the store cannot be read or changed.
pub(crate) fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> BuildError + use<> {
    let path = path.to_owned();
    move |source| kiln_content::Error::Host { call: "looking after the store", path, source }.into()
}

fn repositories(dir: &Path) -> io::Result<Vec<Repository>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.len() != 32 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
            continue;
        }
        let lock = lock_of(dir, &name);
        // Whoever uses a repository makes its lock file anew.
        let last_used_unix = fs::metadata(&lock).or_else(|_| entry.metadata()).map_or(0, |file| file.mtime());
        let in_use = File::open(&lock).is_ok_and(|file| file.try_lock().is_err());
        let disk_bytes = disk_bytes(&entry.path()).map_err(io::Error::other)?;
        found.push(Repository { name, disk_bytes, last_used_unix, in_use });
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

fn lock_of(dir: &Path, name: &str) -> std::path::PathBuf {
    dir.join(format!("{name}.lock"))
}

/// Removes a repository unless a build uses it; whether it is gone. Its lock stays: it is empty, and
/// somebody may be waiting for it.
pub(crate) fn remove_repository(root: &Path, name: &str) -> io::Result<bool> {
    let dir = root.join("git");
    let lock = File::options().write(true).create(true).truncate(false).open(lock_of(&dir, name))?;
    if lock.try_lock().is_err() {
        return Ok(false);
    }
    match fs::remove_dir_all(dir.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_is_removed_unless_a_build_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let (git, name) = (dir.path().join("git"), "0123456789abcdef0123456789abcdef");
        fs::create_dir_all(git.join(name)).unwrap();
        fs::write(git.join(name).join("HEAD"), vec![0; 10_000]).unwrap();
        let user = File::create(lock_of(&git, name)).unwrap();
        user.lock().unwrap();
        let found = repositories(&git).unwrap();
        assert_eq!((found.len(), found[0].in_use), (1, true));
        assert!(found[0].disk_bytes >= 10_000 && found[0].last_used_unix > 1_600_000_000);
        assert!(!remove_repository(dir.path(), name).unwrap());
        drop(user);
        assert!(!repositories(&git).unwrap()[0].in_use);
        assert!(remove_repository(dir.path(), name).unwrap());
        assert!(repositories(&git).unwrap().is_empty());
    }
}
