//! Removes what nothing refers to, while others push, and tells why.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use kiln_oci::Digest;

use super::manifests::Reads;
use super::{Directory, DirectoryError, digests, names, remove};
use crate::route::{Name, Which};
use crate::settings::{Collection, Limits};

/// What a collection removed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Collected {
    /// Manifests that no tag, index or subject leads to.
    pub manifests: u64,
    /// Blobs that no repository has any more.
    pub blobs: u64,
    /// How many bytes those were, without those that others have under names of their own.
    pub bytes: u64,
    /// Repositories that nothing was taken from: what a damaged manifest or tag of theirs leads to, nobody knows.
    pub damaged: u64,
}

/// What a collection looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A manifest or an index of a repository.
    Manifest,
    /// That a repository has a blob.
    Share,
    /// The bytes of a blob, whoever has it.
    Blob,
}

/// What became of one thing, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// What it is.
    pub kind: Kind,
    /// Whose it is; `None` for the bytes of a blob.
    pub repository: Option<String>,
    /// Its name.
    pub digest: Digest,
    /// What it takes; nothing for a share.
    pub bytes: u64,
    /// It went, or would go.
    pub removed: bool,
    /// As people read it.
    pub reason: &'static str,
}

/// Blobs that a repository got since a collection began.
#[derive(Default)]
pub(super) struct Fresh(Mutex<Option<HashSet<Digest>>>);

impl Fresh {
    pub(super) fn add(&self, digest: &Digest) {
        if let Some(fresh) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            fresh.insert(*digest);
        }
    }

    fn set(&self, value: Option<HashSet<Digest>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = value;
    }

    fn has(&self, digest: &Digest) -> bool {
        let fresh = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        fresh.as_ref().is_none_or(|fresh| fresh.contains(digest))
    }
}

/// Collects garbage in the directory of a registry that nobody serves, and tells `note` of each thing what became of it.
/// With `dry_run` nothing changes, and somebody may serve it meanwhile.
///
/// # Errors
/// [`DirectoryError::Taken`] while somebody serves it; [`DirectoryError::Missing`]: there is no registry.
pub fn collect_offline(
    root: &Path,
    policy: &Collection,
    dry_run: bool,
    note: &mut dyn FnMut(Judged),
) -> Result<Collected, DirectoryError> {
    let directory = Directory::open_existing(root, &Limits::default(), dry_run)?;
    directory.collect(policy, dry_run, note)
}

impl Directory {
    /// Removes manifests without a tag, if that is asked for, then what no manifest of its repository refers to,
    /// then blobs of no repository. Whatever somebody had to do with within [`Collection::grace`] stays. `note` hears of
    /// each thing what became of it; with `dry_run` that is all that happens. One at a time: another waits.
    ///
    /// Pushes wait for a repository's part, and for a 256th of the blobs, at the longest.
    pub(crate) fn collect(
        &self,
        policy: &Collection,
        dry_run: bool,
        note: &mut dyn FnMut(Judged),
    ) -> Result<Collected, DirectoryError> {
        let _turn = self.collecting.lock().unwrap_or_else(PoisonError::into_inner);
        let grace = policy.grace;
        let (collected, needed) = (Collected::default(), HashSet::new());
        let mut run = Run { directory: self, grace, dry_run, note, collected, needed };
        self.fresh.set(Some(HashSet::new()));
        let done = run.all(policy.untagged);
        self.fresh.set(None);
        done.map(|()| run.collected)
    }
}

/// One collection.
struct Run<'a> {
    directory: &'a Directory,
    grace: Duration,
    dry_run: bool,
    note: &'a mut dyn FnMut(Judged),
    collected: Collected,
    /// What manifests need.
    needed: HashSet<Digest>,
}

/// Why something stays that somebody may be about to need.
const YOUNG: &str = "it is younger than the grace time";

impl Run<'_> {
    fn all(&mut self, untagged: bool) -> Result<(), DirectoryError> {
        let directory = self.directory;
        let mut kept = HashSet::new();
        for name in directory.repositories()? {
            let _alone = directory.publishing.write().unwrap_or_else(PoisonError::into_inner);
            let done = self.manifests(&name, untagged).and_then(|gone| self.shares(&name, &gone, &mut kept));
            match done {
                Err(DirectoryError::Damaged { .. }) => self.leave(&name, &mut kept)?,
                done => done?,
            }
            if !self.dry_run {
                directory.collect_directories(&name);
            }
        }
        let blobs = directory.root.join("blobs/sha256");
        for first in names(&blobs)? {
            let _alone = directory.publishing.write().unwrap_or_else(PoisonError::into_inner);
            for digest in digests(&blobs.join(&first))? {
                self.blob(&digest, kept.contains(&digest))?;
            }
        }
        Ok(())
    }

    fn tell(&mut self, kind: Kind, name: Option<&Name>, digest: &Digest, bytes: u64, verdict: Verdict) {
        let repository = name.map(|name| name.as_str().to_owned());
        let (removed, reason) = verdict;
        (self.note)(Judged { kind, repository, digest: *digest, bytes, removed, reason });
    }

    /// Takes nothing from a repository: something in it is damaged, and it may need anything.
    fn leave(&mut self, name: &Name, kept: &mut HashSet<Digest>) -> Result<(), DirectoryError> {
        self.collected.damaged += 1;
        for digest in digests(&self.directory.repository(name).join("_blobs"))? {
            kept.insert(digest);
            self.needed.insert(digest);
            let verdict = (false, "a manifest or a tag of its repository is damaged");
            self.tell(Kind::Share, Some(name), &digest, 0, verdict);
        }
        Ok(())
    }

    /// Removes what no tag leads to, over indexes and subjects, if that is asked for; what went.
    fn manifests(&mut self, name: &Name, untagged: bool) -> Result<HashSet<Digest>, DirectoryError> {
        let directory = self.directory;
        let dir = directory.repository(name).join("_manifests");
        let all = directory.manifests(name)?;
        let verdicts = if untagged {
            self.judge_manifests(name, &dir, &all)?
        } else {
            vec![(false, "manifests stay unless those without a tag are asked for"); all.len()]
        };
        let mut gone = HashSet::new();
        for (digest, verdict) in all.iter().zip(verdicts) {
            let bytes = fs::metadata(dir.join(digest.hex())).map_or(0, |metadata| metadata.len());
            if verdict.0 {
                if !self.dry_run {
                    directory.forget_manifest(name, digest)?;
                }
                gone.insert(*digest);
                self.collected.manifests += 1;
            }
            if !self.dry_run && untagged {
                match verdict.1 == YOUNG {
                    true => directory.waiting.add_manifest(name, digest, bytes),
                    false => directory.waiting.forget_manifest(name, digest),
                }
            }
            self.tell(Kind::Manifest, Some(name), digest, bytes, verdict);
        }
        Ok(gone)
    }

    fn judge_manifests(
        &self,
        name: &Name,
        dir: &Path,
        all: &[Digest],
    ) -> Result<Vec<Verdict>, DirectoryError> {
        let directory = self.directory;
        let tagged = directory.tagged(name)?;
        // Somebody may be about to push the index, or the tag.
        let is_young = |digest: &&Digest| !is_older(&dir.join(digest.hex()), self.grace);
        let young = all.iter().filter(is_young).copied();
        let live = directory.reach(name, tagged.iter().copied(), Reach::All)?;
        let held = directory.reach(name, young, Reach::All)?;
        let judge = |digest: &Digest| match () {
            () if tagged.contains(digest) => (false, "a tag leads to it"),
            () if live.contains_key(digest) => (false, "an index or a subject that stays leads to it"),
            () if held.contains_key(digest) => (false, YOUNG),
            () => (true, "no tag, index or subject leads to it"),
        };
        Ok(all.iter().map(judge).collect())
    }

    /// Takes from a repository the blobs that none of its manifests needs, those that are gone left out; what is left
    /// goes into `kept`.
    fn shares(
        &mut self,
        name: &Name,
        gone: &HashSet<Digest>,
        kept: &mut HashSet<Digest>,
    ) -> Result<(), DirectoryError> {
        let directory = self.directory;
        let mut needed = HashSet::new();
        for digest in directory.manifests(name)?.iter().filter(|digest| !gone.contains(digest)) {
            // One that cannot be read may need anything: nothing of this repository goes then.
            let Some(manifest) = directory.manifest(name, &Which::Digest(*digest))? else { continue };
            let damaged = || DirectoryError::Damaged { path: directory.repository(name) };
            let reads = Reads::new(&manifest.bytes).map_err(|_| damaged())?;
            needed.extend(reads.all_blobs().map(|blob| blob.digest));
        }
        self.needed.extend(&needed);
        let dir = directory.repository(name).join("_blobs");
        for digest in digests(&dir)? {
            let mark = dir.join(digest.hex());
            let verdict = match () {
                () if needed.contains(&digest) => (false, "a manifest needs it"),
                () if directory.fresh.has(&digest) => (false, "it came meanwhile"),
                () if !is_older(&mark, self.grace) => {
                    (false, "it was sent, mounted or asked for within the grace time")
                }
                () => (true, "no manifest of its repository needs it"),
            };
            if !verdict.0 {
                kept.insert(digest);
            } else if !self.dry_run {
                remove(&mark)?;
            }
            self.tell(Kind::Share, Some(name), &digest, 0, verdict);
        }
        Ok(())
    }

    fn blob(&mut self, digest: &Digest, is_kept: bool) -> Result<(), DirectoryError> {
        let path = self.directory.blob(digest);
        let stat = fs::metadata(&path);
        let bytes = stat.as_ref().map_or(0, |stat| stat.len());
        let is_fresh = self.directory.fresh.has(digest);
        let verdict = match () {
            () if is_kept => (false, "a repository has it"),
            () if is_fresh => (false, "it came meanwhile"),
            () if !is_older(&path, self.grace) => (false, YOUNG),
            () => (true, "no repository has it"),
        };
        if !self.dry_run && !verdict.0 && !is_fresh {
            match self.needed.contains(digest) {
                true => self.directory.waiting.forget(digest),
                false => self.directory.waiting.add(digest, bytes),
            }
        }
        if verdict.0 && (self.dry_run || remove(&path)?) {
            if !self.dry_run {
                self.directory.waiting.forget(digest);
            }
            self.collected.blobs += 1;
            // Under its other name, the store's, the file stays.
            let is_last_name = stat.is_ok_and(|stat| stat.nlink() == 1);
            self.collected.bytes += if is_last_name { bytes } else { 0 };
        }
        self.tell(Kind::Blob, None, digest, bytes, verdict);
        Ok(())
    }
}

/// Whether something goes, and why or why not.
type Verdict = (bool, &'static str);

/// Where manifests lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// To what an index lists.
    Down,
    /// To that, and to what refers to them: a signature lives as long as what it signs.
    All,
}

/// Says that a manifest is not garbage, though no tag leads to it, until this is dropped.
pub(crate) struct Keeping<'a> {
    directory: &'a Directory,
    which: (Name, Digest),
}

impl Drop for Keeping<'_> {
    fn drop(&mut self) {
        let mut kept = self.directory.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = kept.get_mut(&self.which) {
            *count -= 1;
            if *count == 0 {
                kept.remove(&self.which);
            }
        }
    }
}

impl Directory {
    /// A manifest is about to get a tag.
    pub(crate) fn keep(&self, name: &Name, digest: &Digest) -> Keeping<'_> {
        let which = (name.clone(), *digest);
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner).entry(which.clone()).or_default() += 1;
        Keeping { directory: self, which }
    }

    /// The manifests that tags lead to, or are about to.
    pub(super) fn tagged(&self, name: &Name) -> Result<HashSet<Digest>, DirectoryError> {
        let mut tagged = HashSet::new();
        for tag in self.all_tags(name)? {
            tagged.extend(self.tag(name, &tag)?);
        }
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        tagged.extend(kept.keys().filter(|(of, _)| of == name).map(|(_, digest)| *digest));
        Ok(tagged)
    }

    /// All manifests that these lead to, with the blobs that each needs.
    ///
    /// # Errors
    /// [`DirectoryError::Damaged`]: one of them cannot be read, and may lead anywhere.
    pub(super) fn reach(
        &self,
        name: &Name,
        from: impl IntoIterator<Item = Digest>,
        reach: Reach,
    ) -> Result<HashMap<Digest, Vec<Digest>>, DirectoryError> {
        let mut found = HashMap::new();
        let mut open: Vec<Digest> = from.into_iter().collect();
        while let Some(digest) = open.pop() {
            let Entry::Vacant(new) = found.entry(digest) else { continue };
            if reach == Reach::All {
                open.extend(digests(&self.referrers_path(name, &digest))?);
            }
            let manifest = self.manifest(name, &Which::Digest(digest))?;
            let reads = manifest.and_then(|manifest| Reads::new(&manifest.bytes).ok()).unwrap_or_default();
            open.extend(reads.manifests.iter().map(|child| child.digest));
            new.insert(reads.all_blobs().map(|blob| blob.digest).collect());
        }
        Ok(found)
    }

    /// Removes the directories of a repository in which nothing is left.
    fn collect_directories(&self, name: &Name) {
        let root = self.repository(name);
        for part in ["_blobs", "_manifests", "_referrers", "_tags"] {
            let _ = fs::remove_dir(root.join(part));
        }
        let _ = fs::remove_dir(root);
    }
}

/// A time that lies ahead is no age.
fn is_older(path: &Path, than: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|age| age >= than))
}
