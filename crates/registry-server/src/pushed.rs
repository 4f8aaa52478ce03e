//! Images that others keep, and what was pushed to them, byte by byte.
//!
//! Two know something of a tag: who keeps the images has a name, the directory what was pushed. A tag leads to what was
//! pushed as long as the name leads to an image of it. What is no image has no name, and its tag is its own.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, PoisonError, Weak};

use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Sha256Writer};
use rustix::fs::{AtFlags, CWD, linkat};
use tokio::sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

use crate::directory::{Collected, Directory, DirectoryError, Manifest, NotPut, Reads};
use crate::images::{Found, ImagesError, NotTaken, Part, Parts, Takes};
use crate::reports::Reports;
use crate::route::{Name, Tag, Which};
use crate::settings::{Collection, Limits};

/// Images that are brought in at once: each unpacks its layers side by side.
const AT_ONCE: usize = 2;
/// Manifests that are put at once without anything being unpacked.
const PLAIN_AT_ONCE: usize = 4;
/// Tags that somebody writes, or has written, before those that nobody writes are forgotten.
const MANY_TURNS: usize = 1024;
/// Manifests that wait for their turn are in memory.
const WAITING_BYTES: usize = 32 << 20;
/// A manifest lists at most so many layers or manifests: each is looked for.
const MOST_LISTED: usize = 1000;
/// Manifests that wait for one tag: all but the last are for nothing. And of those that are larger than others.
const WAITING_FOR_TAG: (usize, usize) = (64, 2);
/// Manifests of images have a few kilobytes.
const LARGE_BYTES: usize = 256 << 10;
/// Configs that are remembered.
const MOST_CONFIGS: usize = 1 << 18;

/// Held by who writes a tag; gone when nobody does.
type Turns = HashMap<(Name, Tag), Weak<Mutex<()>>>;

/// Both together.
pub(crate) struct Pushing {
    pub(crate) images: Arc<dyn Takes>,
    pub(crate) directory: Arc<Directory>,
    /// Name and tag are set one after the other, by one request at a time.
    turns: std::sync::Mutex<Turns>,
    images_room: Arc<Semaphore>,
    plain_room: Arc<Semaphore>,
    /// In kibibytes.
    waiting_room: Arc<Semaphore>,
    configs: std::sync::Mutex<Configs>,
    reports: Arc<Reports>,
}

/// Configs of the images that manifests lead to: what has a digest does not change.
#[derive(Default)]
struct Configs {
    known: HashMap<(Name, Digest), Arc<HashSet<Digest>>>,
    count: usize,
}

impl Configs {
    fn insert(&mut self, key: (Name, Digest), found: Arc<HashSet<Digest>>) {
        self.count += found.len() + 1;
        if self.count > MOST_CONFIGS {
            *self = Self { count: found.len() + 1, ..Self::default() };
        }
        self.known.insert(key, found);
    }

    /// Those of one repository.
    fn forget(&mut self, name: &Name) {
        self.known.retain(|(of, _), _| of != name);
        self.count = self.known.values().map(|found| found.len() + 1).sum();
    }
}

/// All names of images at one time.
pub(crate) type Names = HashMap<Name, HashMap<Tag, Digest>>;

/// How a manifest that came waits.
pub(crate) struct Place {
    _waiting: OwnedSemaphorePermit,
}

/// Why something is not done.
pub(crate) enum Trouble {
    Directory(DirectoryError),
    Images(ImagesError),
    /// Of a manifest.
    Lacks(NotPut),
    /// Of an image.
    NotTaken(NotTaken),
    /// The tag is the name of an image, and what came is none.
    IsImage,
}

impl From<DirectoryError> for Trouble {
    fn from(error: DirectoryError) -> Self {
        Self::Directory(error)
    }
}

impl From<ImagesError> for Trouble {
    fn from(error: ImagesError) -> Self {
        Self::Images(error)
    }
}

impl From<NotPut> for Trouble {
    fn from(error: NotPut) -> Self {
        Self::Lacks(error)
    }
}

impl From<NotTaken> for Trouble {
    fn from(error: NotTaken) -> Self {
        Self::NotTaken(error)
    }
}

impl Pushing {
    pub(crate) fn new(images: Arc<dyn Takes>, directory: Directory, reports: Arc<Reports>) -> Self {
        directory.waiting.be_strict();
        let room = |count| Arc::new(Semaphore::new(count));
        Self {
            images,
            directory: Arc::new(directory),
            turns: std::sync::Mutex::default(),
            images_room: room(AT_ONCE),
            plain_room: room(PLAIN_AT_ONCE),
            waiting_room: room(WAITING_BYTES >> 10),
            configs: std::sync::Mutex::default(),
            reports,
        }
    }

    fn turn_of(&self, name: &Name, tag: &Tag) -> Arc<Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if turns.len() >= MANY_TURNS {
            turns.retain(|_, turn| turn.strong_count() > 0);
        }
        // The same for all names of a repository.
        let turn = turns.entry((self.images.called(name), tag.clone())).or_default();
        if let Some(turn) = turn.upgrade() {
            return turn;
        }
        let new = Arc::default();
        *turn = Arc::downgrade(&new);
        new
    }

    /// Held by who writes this tag.
    pub(crate) async fn turn(&self, name: &Name, tag: &Tag) -> OwnedMutexGuard<()> {
        self.turn_of(name, tag).lock_owned().await
    }

    /// The same for who comes with a manifest of so many bytes; `None`: too many wait for it.
    pub(crate) async fn turn_to_put(
        &self,
        name: &Name,
        tag: &Tag,
        size_bytes: usize,
    ) -> Option<OwnedMutexGuard<()>> {
        let turn = self.turn_of(name, tag);
        let (most, most_large) = WAITING_FOR_TAG;
        // One of them is this one's own, another belongs to whoever has the turn.
        if Arc::strong_count(&turn) > 2 + if size_bytes > LARGE_BYTES { most_large } else { most } {
            return None;
        }
        Some(turn.lock_owned().await)
    }

    /// A place to wait in with a manifest of so many bytes; `None`: there are too many.
    pub(crate) fn wait(&self, size_bytes: usize) -> Option<Place> {
        // What was read of it is about as much again, and everything takes something.
        let kibibytes = u32::try_from((size_bytes >> 9) + 16).unwrap_or(u32::MAX);
        let waiting = self.waiting_room.clone().try_acquire_many_owned(kibibytes).ok()?;
        Some(Place { _waiting: waiting })
    }

    /// Room to put a manifest in; `None`: the registry ends.
    pub(crate) async fn room(&self, is_unpacked: bool) -> Option<OwnedSemaphorePermit> {
        let room = if is_unpacked { &self.images_room } else { &self.plain_room };
        room.clone().acquire_owned().await.ok()
    }

    /// The configs of the images that a manifest leads to; `None`: it is not there, or leads to more than it may.
    fn configs(&self, name: &Name, digest: &Digest) -> Result<Option<Arc<HashSet<Digest>>>, Trouble> {
        let key = (name.clone(), *digest);
        let configs = || self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = configs().known.get(&key) {
            return Ok(Some(known.clone()));
        }
        let Some(manifest) = self.directory.manifest(name, &Which::Digest(*digest))? else { return Ok(None) };
        let Some((found, is_whole)) = self.directory.image_configs(name, &manifest)? else { return Ok(None) };
        let found = Arc::new(found);
        // What is missing may come again.
        if is_whole {
            configs().insert(key, found.clone());
        }
        Ok(Some(found))
    }

    /// Whether a tag that leads to `digest` and whose name leads to `image` stands for what was pushed.
    fn holds(&self, name: &Name, digest: &Digest, image: Option<&Digest>) -> Result<bool, Trouble> {
        Ok(match (self.configs(name, digest)?, image) {
            (None, _) => false,
            (Some(configs), Some(image)) => configs.contains(image),
            (Some(configs), None) => configs.is_empty(),
        })
    }

    /// What a tag that holds leads to. What is damaged holds nothing, and is told of.
    fn pushed(&self, name: &Name, tag: &Tag, image: Option<&Digest>) -> Result<Option<Digest>, Trouble> {
        let find = || -> Result<Option<Digest>, Trouble> {
            let Some(digest) = self.directory.tag(name, tag)? else { return Ok(None) };
            Ok(self.holds(name, &digest, image)?.then_some(digest))
        };
        self.unless_damaged(find())
    }

    fn unless_damaged<T>(&self, found: Result<Option<T>, Trouble>) -> Result<Option<T>, Trouble> {
        match found {
            Err(Trouble::Directory(error @ DirectoryError::Damaged { .. })) => {
                self.reports.error("what was pushed is not given out", &error);
                Ok(None)
            }
            found => found,
        }
    }

    /// What was pushed under a tag, if that is what the tag stands for now.
    pub(crate) fn tagged(&self, name: &Name, tag: &Tag) -> Result<Option<Manifest>, Trouble> {
        // Where nothing was pushed nobody asks for names.
        if !self.directory.has_tag(name, tag) {
            return Ok(None);
        }
        let image = self.images.image(name, tag)?;
        let Some(digest) = self.pushed(name, tag, image.as_ref())? else { return Ok(None) };
        self.by_digest(name, digest)
    }

    /// What was pushed under a digest. What is damaged is not there, and is told of: who pushes it again mends it.
    pub(crate) fn by_digest(&self, name: &Name, digest: Digest) -> Result<Option<Manifest>, Trouble> {
        self.directory.ask_for(name, &digest);
        let found = self.directory.manifest(name, &Which::Digest(digest));
        self.unless_damaged(found.map_err(Trouble::from))
    }

    /// The tags of what was pushed, sorted.
    pub(crate) fn tags(&self, name: &Name, names: &Names) -> Result<Vec<Tag>, Trouble> {
        let named = names.get(name);
        let mut tags = Vec::new();
        for tag in self.directory.all_tags(name)? {
            if self.pushed(name, &tag, named.and_then(|named| named.get(&tag)))?.is_some() {
                tags.push(tag);
            }
        }
        Ok(tags)
    }

    /// Removes tags that do not stand for what was pushed any more; how many. What they led to is garbage then. A tag that
    /// somebody is about to write is his.
    pub(crate) fn follow_names(&self) -> Result<u64, Trouble> {
        let names = self.images.names()?;
        let mut count = 0;
        for name in self.directory.repositories()? {
            let named = names.get(&name);
            for tag in self.directory.all_tags(&name)? {
                // What is damaged stays: it may be mended by another push.
                let is_lost = |image: Option<&Digest>| {
                    let digest = self.directory.tag(&name, &tag).ok().flatten()?;
                    matches!(self.holds(&name, &digest, image), Ok(false)).then_some(digest)
                };
                if is_lost(named.and_then(|named| named.get(&tag))).is_none() {
                    continue;
                }
                // It may have been pushed, or named, since.
                let Ok(_turn) = self.turn_of(&name, &tag).try_lock_owned() else { continue };
                let image = self.images.image(&name, &tag)?;
                if let Some(digest) = is_lost(image.as_ref()) {
                    count += u64::from(self.directory.remove_tag(&name, &tag, &digest)?);
                }
            }
        }
        Ok(count)
    }

    /// Puts what came, and makes an image of it if it is one and gets a tag. In the tag's turn.
    pub(crate) fn put(
        &self,
        name: &Name,
        tag: Option<&Tag>,
        manifest: Manifest,
        reads: &Reads,
    ) -> Result<(), Trouble> {
        let refused = |why: String| -> Result<(), Trouble> { Err(NotTaken::Refused(why).into()) };
        let listed = reads.layers.len() + reads.manifests.len();
        if listed > MOST_LISTED {
            return refused(format!("it lists {listed} layers or manifests, {MOST_LISTED} are allowed"));
        }
        self.adopt(name, reads)?;
        self.check_sizes(name, reads)?;
        // First without the tag: from now on nothing of it is garbage, however long it takes.
        let _keeping = self.directory.keep(name, &manifest.digest);
        let Some(tag) = tag else {
            return Ok(self.directory.put_manifest(name, None, &manifest, reads)?);
        };
        let Some((configs, _)) = self.directory.image_configs(name, &manifest)? else {
            return refused(format!("it leads to more than {MOST_LISTED} manifests, or to too long ones"));
        };
        if configs.is_empty() && self.images.image(name, tag)?.is_some() {
            return Err(Trouble::IsImage);
        }
        let configs = Arc::new(configs);
        let key = (name.clone(), manifest.digest);
        self.configs.lock().unwrap_or_else(PoisonError::into_inner).insert(key, configs.clone());
        self.directory.put_manifest(name, None, &manifest, reads)?;
        // Before the name moves: nothing shall fail then.
        let ready = self.directory.ready_tag(name, tag, &manifest.digest)?;
        if !configs.is_empty() {
            let parts = Arc::new(Arrived::new(self.directory.clone(), name.clone()));
            let pushed = crate::images::Pushed {
                media_type: manifest.media_type.clone(),
                digest: manifest.digest,
                size_bytes: manifest.bytes.len() as u64,
                configs,
                parts: parts.clone(),
            };
            let taken = self.images.take(name, tag, pushed);
            let asked = parts.asked();
            if let Err(NotTaken::Refused(_)) = &taken {
                // What was good once may have rotted: the next one reads it again.
                asked.iter().for_each(|blob| self.directory.verified.forget(blob));
            }
            // Its files may have names elsewhere now.
            self.directory.names_changed(name, asked.into_iter());
            taken?;
        }
        Ok(self.directory.set_tag(name, &ready, &manifest, reads)?)
    }

    /// A blob that is longer than its manifest says could not be pulled.
    fn check_sizes(&self, name: &Name, reads: &Reads) -> Result<(), Trouble> {
        let check = |listed: &Descriptor, size_bytes: u64| {
            if size_bytes == listed.size {
                return Ok(());
            }
            let why = format!("{} has {size_bytes} bytes, not {}", listed.digest, listed.size);
            Err(Trouble::from(NotTaken::Refused(why)))
        };
        for blob in reads.all_blobs() {
            if let Some((_, size_bytes)) = self.directory.open_blob(name, &blob.digest)? {
                check(blob, size_bytes)?;
            }
        }
        for child in &reads.manifests {
            if let Some(manifest) = self.by_digest(name, child.digest)? {
                check(child, manifest.bytes.len() as u64)?;
            }
        }
        Ok(())
    }

    /// Keeps what a manifest needs and a client has found here without sending it: parts of images that were never
    /// pushed. Ends with the first that neither side has.
    fn adopt(&self, name: &Name, reads: &Reads) -> Result<(), Trouble> {
        for child in &reads.manifests {
            if self.by_digest(name, child.digest)?.is_some() {
                continue;
            }
            let Found::Manifest(found) = self.images.manifest(name, &Which::Digest(child.digest))? else {
                return Err(NotPut::Lacks { digest: child.digest, is_manifest: true }.into());
            };
            let manifest =
                Manifest { media_type: found.media_type, digest: found.digest, bytes: found.bytes };
            // An index in an index has to be pushed: how deep they go is not for a client to say.
            let Ok(reads) = Reads::new(&manifest.bytes) else { continue };
            self.adopt_blobs(name, &reads)?;
            self.directory.put_manifest(name, None, &manifest, &reads)?;
        }
        self.adopt_blobs(name, reads)
    }

    fn adopt_blobs(&self, name: &Name, reads: &Reads) -> Result<(), Trouble> {
        for blob in reads.blobs() {
            if !self.adopt_blob(name, name, &blob.digest)? {
                return Err(NotPut::Lacks { digest: blob.digest, is_manifest: false }.into());
            }
        }
        Ok(())
    }

    /// Lets `name` have a blob of an image in `from`; whether it has it then.
    pub(crate) fn adopt_blob(&self, name: &Name, from: &Name, digest: &Digest) -> Result<bool, Trouble> {
        if self.directory.open_blob(name, digest)?.is_some() || self.directory.mount(name, from, digest)? {
            return Ok(true);
        }
        let Some((file, _)) = self.images.blob(from, digest)? else { return Ok(false) };
        // Another repository has the very same, and it was read already.
        if self.directory.give_good(name, digest)? {
            return Ok(true);
        }
        let path = self.directory.new_file();
        let kept = keep(&file, digest, &path);
        match kept {
            Ok(Some(kept)) => {
                self.directory.publish(name, digest, &path, &kept)?;
                Ok(true)
            }
            other => {
                let _ = fs::remove_file(&path);
                other.map_err(DirectoryError::host("written", path))?;
                Ok(false)
            }
        }
    }

    /// The tags that lead to a manifest, also those that somebody else has named; sorted.
    ///
    /// # Errors
    /// [`NotTaken::Needed`] when they cannot all be taken away.
    pub(crate) fn leading_to(&self, name: &Name, digest: &Digest) -> Result<Vec<Tag>, Trouble> {
        let mut names = self.images.names()?;
        let named = names.remove(name).unwrap_or_default();
        let mut tags: BTreeSet<Tag> = self.directory.all_tags(name)?.into_iter().collect();
        tags.extend(named.keys().cloned());
        let mut leading = Vec::new();
        for tag in tags {
            let leads = self.leads_to(name, &tag, named.get(&tag))? == Some(*digest);
            if leads || self.directory.tag(name, &tag).is_ok_and(|tagged| tagged == Some(*digest)) {
                leading.push((leads, tag));
            }
        }
        let going: Vec<Tag> =
            leading.iter().filter(|(leads, _)| *leads).map(|(_, tag)| tag.clone()).collect();
        self.images.can_forget(name, &going)?;
        Ok(leading.into_iter().map(|(_, tag)| tag).collect())
    }

    fn leads_to(&self, name: &Name, tag: &Tag, image: Option<&Digest>) -> Result<Option<Digest>, Trouble> {
        if let Some(digest) = self.pushed(name, tag, image)? {
            return Ok(Some(digest));
        }
        if image.is_none() {
            return Ok(None);
        }
        Ok(match self.images.manifest(name, &Which::Tag(tag.clone()))? {
            Found::Manifest(manifest) => Some(manifest.digest),
            // What was never packed has no digest yet.
            Found::Unready | Found::Missing => None,
        })
    }

    /// Takes a tag away if it still leads to this manifest; whether it did. In the tag's turn.
    pub(crate) fn remove_if_leads(&self, name: &Name, tag: &Tag, digest: &Digest) -> Result<bool, Trouble> {
        let image = self.images.image(name, tag)?;
        if self.leads_to(name, tag, image.as_ref())? == Some(*digest) {
            return self.remove_tagged(name, tag);
        }
        // Its name was lost before.
        self.directory.remove_tag(name, tag, digest)?;
        Ok(false)
    }

    /// Takes a manifest away that no tag leads to; whether there was one, or `None`: a tag does by now.
    pub(crate) fn remove_untagged(&self, name: &Name, digest: &Digest) -> Result<Option<bool>, Trouble> {
        let removed = self.directory.remove_untagged(name, digest)?;
        // An index may have led there.
        self.configs.lock().unwrap_or_else(PoisonError::into_inner).forget(name);
        Ok(removed)
    }

    /// Takes a tag away; whether it led anywhere. In its turn. The name first: a tag without it leads nowhere, and what
    /// led nowhere before was not there.
    pub(crate) fn remove_tagged(&self, name: &Name, tag: &Tag) -> Result<bool, Trouble> {
        // What is damaged can be deleted, too.
        let led_here = self.tagged(name, tag).is_ok_and(|found| found.is_some());
        let had_name = self.images.forget(name, tag)?;
        self.directory.remove_manifest(name, &Which::Tag(tag.clone()))?;
        Ok(had_name || led_here)
    }
}

/// What came to a repository.
struct Arrived {
    directory: Arc<Directory>,
    name: Name,
    asked: std::sync::Mutex<HashSet<Digest>>,
}

impl Arrived {
    fn new(directory: Arc<Directory>, name: Name) -> Self {
        Self { directory, name, asked: std::sync::Mutex::default() }
    }

    /// The blobs whose files somebody got.
    fn asked(&self) -> HashSet<Digest> {
        std::mem::take(&mut self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Parts for Arrived {
    fn document(&self, digest: &Digest) -> Result<Option<Vec<u8>>, ImagesError> {
        let found = self.directory.manifest(&self.name, &Which::Digest(*digest));
        Ok(found.map_err(|error| ImagesError(Box::new(error)))?.map(|manifest| manifest.bytes))
    }

    fn blob(&self, digest: &Digest) -> Result<Option<Part>, ImagesError> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(*digest);
        self.directory.part(&self.name, digest).map_err(|error| ImagesError(Box::new(error)))
    }
}

/// The bytes of `file` under another name, as the same file where the file system lets it be; `None`: they are not
/// what `digest` says.
fn keep(file: &File, digest: &Digest, path: &Path) -> io::Result<Option<File>> {
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut reader = File::open(&source)?;
    let mut hash = Sha256Writer::new(io::sink());
    let is_linked = linkat(CWD, &source, CWD, path, AtFlags::SYMLINK_FOLLOW).is_ok();
    if is_linked {
        io::copy(&mut reader, &mut hash)?;
        return Ok((hash.finish().1 == *digest).then_some(reader));
    }
    let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    let mut out = Sha256Writer::new(made);
    io::copy(&mut reader, &mut out)?;
    out.flush()?;
    let (made, actual, _) = out.finish();
    Ok((actual == *digest).then_some(made))
}

/// Removes what was pushed to images and has lost its names there since, where nobody serves them, once it is as old as
/// `policy` says and as who served them last said. `None`: there is nothing, or somebody does, who sees to it himself.
///
/// # Errors
/// [`DirectoryError`]; [`ImagesError`] where the names cannot be read.
pub fn follow_offline(
    root: &Path,
    images: Arc<dyn Takes>,
    policy: &Collection,
) -> Result<Option<Collected>, FollowError> {
    let directory = match Directory::open_existing(root, &Limits::default(), false) {
        Ok(directory) => directory,
        Err(DirectoryError::Missing { .. } | DirectoryError::Taken { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let pushing = Pushing::new(images, directory, Arc::default());
    match pushing.follow_names() {
        Ok(_) => {}
        Err(Trouble::Directory(error)) => return Err(error.into()),
        Err(Trouble::Images(error)) => return Err(error.into()),
        Err(Trouble::Lacks(_) | Trouble::NotTaken(_) | Trouble::IsImage) => {}
    }
    pushing.directory.uploads.expire_after(
        pushing.directory.noted_life().unwrap_or_default().max(Limits::default().upload_life),
    )?;
    // Who served it may have wanted it to stay longer.
    let grace = pushing.directory.noted_grace().unwrap_or_default().max(policy.grace);
    let policy = &Collection { grace, ..policy.clone() };
    Ok(Some(pushing.directory.collect(policy, false, &mut |_| {})?))
}

/// Why what was pushed cannot follow the names of its images.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    /// What was pushed cannot be read, or removed.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The names cannot be read.
    #[error(transparent)]
    Images(#[from] ImagesError),
}
