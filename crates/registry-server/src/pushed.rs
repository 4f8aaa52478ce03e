//! Images that others keep, and what was pushed to them, byte by byte.
//!
//! Two know something of a tag: who keeps the images has a name, the directory what was pushed. A tag leads to what was
//! pushed as long as the name leads to an image of it. What is no image has no name, and its tag is its own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_oci::{Digest, Sha256Writer};
use rustix::fs::{AtFlags, CWD, linkat};
use tokio::sync::{Mutex, OwnedMutexGuard, Semaphore};

use crate::directory::{Collected, Directory, DirectoryError, Manifest, NotPut, Reads};
use crate::images::{Found, ImagesError, NotTaken, Parts, Takes};
use crate::route::{Name, Tag, Which};
use crate::settings::{Collection, Limits};

/// Images that are brought in at once: each unpacks its layers side by side.
const AT_ONCE: usize = 2;
/// Tags that are written at once; two may wait for each other without need.
const TURNS: usize = 64;

/// Both together.
pub(crate) struct Pushing {
    pub(crate) images: Arc<dyn Takes>,
    pub(crate) directory: Arc<Directory>,
    /// Name and tag are set one after the other, by one request at a time.
    turns: [Arc<Mutex<()>>; TURNS],
    pub(crate) room: Arc<Semaphore>,
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
    pub(crate) fn new(images: Arc<dyn Takes>, directory: Directory) -> Self {
        let turns = std::array::from_fn(|_| Arc::default());
        Self { images, directory: Arc::new(directory), turns, room: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Held by who writes this tag.
    pub(crate) async fn turn(&self, name: &Name, tag: &Tag) -> OwnedMutexGuard<()> {
        let digest = Digest::of(format!("{name}:{tag}").as_bytes());
        let nth = usize::from_str_radix(&digest.hex()[..4], 16).unwrap_or(0) % TURNS;
        self.turns[nth].clone().lock_owned().await
    }

    /// What was pushed under a tag, if that is what the tag stands for now.
    pub(crate) fn tagged(&self, name: &Name, tag: &Tag) -> Result<Option<Manifest>, Trouble> {
        let Some(manifest) = self.directory.manifest(name, &Which::Tag(tag.clone()))? else {
            return Ok(None);
        };
        let configs = self.directory.image_configs(name, &manifest)?;
        let holds = match self.images.image(name, tag)? {
            Some(config) => configs.contains(&config),
            None => configs.is_empty(),
        };
        Ok(holds.then_some(manifest))
    }

    /// The tags of what was pushed, sorted.
    pub(crate) fn tags(&self, name: &Name) -> Result<Vec<Tag>, Trouble> {
        let mut tags = Vec::new();
        for tag in self.directory.all_tags(name)? {
            if self.tagged(name, &tag)?.is_some() {
                tags.push(tag);
            }
        }
        Ok(tags)
    }

    /// Removes tags that do not stand for what was pushed any more; how many. What they led to is garbage then.
    pub(crate) fn follow_names(&self) -> Result<u64, Trouble> {
        let mut count = 0;
        for name in self.directory.repositories()? {
            for tag in self.directory.all_tags(&name)? {
                let Some(digest) = self.directory.tag(&name, &tag).ok().flatten() else { continue };
                // What is damaged stays: it may be mended by another push.
                let Ok(None) = self.tagged(&name, &tag) else { continue };
                count += u64::from(self.directory.remove_tag(&name, &tag, &digest)?);
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
        self.adopt(name, reads)?;
        self.check_sizes(name, reads)?;
        // First without the tag: from now on nothing of it is garbage.
        self.directory.put_manifest(name, None, &manifest, reads)?;
        let Some(tag) = tag else { return Ok(()) };
        if !self.directory.image_configs(name, &manifest)?.is_empty() {
            let parts = Arrived { directory: self.directory.clone(), name: name.clone() };
            let pushed = crate::images::Pushed {
                media_type: manifest.media_type.clone(),
                digest: manifest.digest,
                size_bytes: manifest.bytes.len() as u64,
                parts: Arc::new(parts),
            };
            self.images.take(name, tag, pushed)?;
        } else if self.images.image(name, tag)?.is_some() {
            return Err(Trouble::IsImage);
        }
        Ok(self.directory.put_manifest(name, Some(tag), &manifest, reads)?)
    }

    /// A blob that is longer than its manifest says could not be pulled.
    fn check_sizes(&self, name: &Name, reads: &Reads) -> Result<(), Trouble> {
        for blob in reads.blobs() {
            if let Some((_, size_bytes)) = self.directory.open_blob(name, &blob.digest)?
                && size_bytes != blob.size
            {
                let why = format!("{} has {size_bytes} bytes, not {}", blob.digest, blob.size);
                return Err(NotTaken::Refused(why).into());
            }
        }
        Ok(())
    }

    /// Keeps what a manifest needs and a client has found here without sending it: parts of images that were never
    /// pushed.
    fn adopt(&self, name: &Name, reads: &Reads) -> Result<(), Trouble> {
        for child in &reads.manifests {
            if self.directory.manifest(name, &Which::Digest(child.digest))?.is_some() {
                continue;
            }
            let Found::Manifest(found) = self.images.manifest(name, &Which::Digest(child.digest))? else {
                continue;
            };
            let manifest =
                Manifest { media_type: found.media_type, digest: found.digest, bytes: found.bytes };
            // An index in an index has to be pushed: how deep they go is not for a client to say.
            let Ok(reads) = Reads::new(&manifest.bytes) else { continue };
            for blob in reads.blobs() {
                self.adopt_blob(name, name, &blob.digest)?;
            }
            self.directory.put_manifest(name, None, &manifest, &reads)?;
        }
        for blob in reads.blobs() {
            self.adopt_blob(name, name, &blob.digest)?;
        }
        Ok(())
    }

    /// Lets `name` have a blob of an image in `from`; whether it has it then.
    pub(crate) fn adopt_blob(&self, name: &Name, from: &Name, digest: &Digest) -> Result<bool, Trouble> {
        if self.directory.open_blob(name, digest)?.is_some() || self.directory.mount(name, from, digest)? {
            return Ok(true);
        }
        let Some((file, _)) = self.images.blob(from, digest)? else { return Ok(false) };
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

    /// Takes away what a tag, or all tags with this digest, lead to; whether there was anything.
    pub(crate) fn remove(&self, name: &Name, which: &Which) -> Result<bool, Trouble> {
        match which {
            Which::Tag(tag) => self.remove_tagged(name, tag),
            Which::Digest(digest) => {
                let mut found = false;
                for tag in self.images.tags(name)? {
                    let leads_to = match self.tagged(name, &tag)? {
                        Some(manifest) => Some(manifest.digest),
                        // What was never packed has no digest yet.
                        None => match self.images.manifest(name, &Which::Tag(tag.clone()))? {
                            Found::Manifest(manifest) => Some(manifest.digest),
                            Found::Unready | Found::Missing => None,
                        },
                    };
                    if leads_to == Some(*digest) {
                        found |= self.remove_tagged(name, &tag)?;
                    }
                }
                Ok(self.directory.remove_manifest(name, which)? || found)
            }
        }
    }

    /// The name first: a tag without it leads nowhere, and what led nowhere before was not there.
    fn remove_tagged(&self, name: &Name, tag: &Tag) -> Result<bool, Trouble> {
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
}

impl Parts for Arrived {
    fn document(&self, digest: &Digest) -> Result<Option<Vec<u8>>, ImagesError> {
        let found = self.directory.manifest(&self.name, &Which::Digest(*digest));
        Ok(found.map_err(|error| ImagesError(Box::new(error)))?.map(|manifest| manifest.bytes))
    }

    fn blob(&self, digest: &Digest) -> Result<Option<PathBuf>, ImagesError> {
        self.directory.blob_file(&self.name, digest).map_err(|error| ImagesError(Box::new(error)))
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

/// Removes what was pushed to images and has lost its names there since, where nobody serves them. `None`: there is
/// nothing, or somebody does, who sees to it himself.
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
    let pushing = Pushing::new(images, directory);
    match pushing.follow_names() {
        Ok(_) => {}
        Err(Trouble::Directory(error)) => return Err(error.into()),
        Err(Trouble::Images(error)) => return Err(error.into()),
        Err(Trouble::Lacks(_) | Trouble::NotTaken(_) | Trouble::IsImage) => {}
    }
    pushing.directory.uploads.expire()?;
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
