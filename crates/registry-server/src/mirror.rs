//! What is not here is fetched from the registry behind, and kept.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Reference};
use kiln_registry::{Error, Repository};
use tokio::sync::watch;

use crate::body::Growth;
use crate::directory::{Directory, Manifest};
use crate::refusal::Refusal;
use crate::route::{Name, Tag, Which};
use crate::settings::MirrorOf;

/// The registry behind, and what is on its way from there.
pub(crate) struct Mirror {
    behind: MirrorOf,
    coming: Mutex<HashMap<(Name, Digest), Weak<Coming>>>,
}

/// A blob on its way: whoever asks for it meanwhile reads along.
pub(crate) struct Coming {
    pub(crate) file: File,
    pub(crate) size: u64,
    pub(crate) grows: watch::Receiver<Growth>,
}

impl Mirror {
    pub(crate) fn new(behind: MirrorOf) -> Self {
        Self { behind, coming: Mutex::default() }
    }

    fn repository(&self, name: &Name) -> Result<Repository, Refusal> {
        let reference = format!("{}/{name}", self.behind.domain).parse::<Reference>();
        Ok(self.behind.client.repository(&reference.map_err(|_| Refusal::no_repository())?))
    }

    /// Brings a manifest here, unless it is; whether something was fetched. Of a tag that is here and old
    /// enough it asks where it leads now; no answer leaves it as it is.
    pub(crate) async fn manifest(
        &self,
        directory: &Arc<Directory>,
        name: &Name,
        which: &Which,
    ) -> Result<bool, Refusal> {
        let here = disk(directory, {
            let (name, which, life) = (name.clone(), which.clone(), self.behind.tag_life);
            move |directory| {
                let Some(manifest) = directory.manifest(&name, &which)? else { return Ok(None) };
                let is_good = match &which {
                    Which::Digest(_) => true,
                    Which::Tag(tag) => directory.tag_age(&name, tag).is_some_and(|age| age < life),
                };
                Ok(Some((manifest.digest, is_good)))
            }
        })
        .await?;
        let repository = self.repository(name)?;
        let ask = match which {
            Which::Tag(tag) => kiln_registry::Which::Tag(tag.as_str()),
            Which::Digest(digest) => kiln_registry::Which::Digest(digest),
        };
        if let Some((known, is_good)) = here {
            let Which::Tag(tag) = which else { return Ok(false) };
            if is_good {
                return Ok(false);
            }
            match repository.resolve(ask).await {
                Ok(now) if now.digest != known => {}
                Ok(_) => {
                    directory.confirm_tag(name, tag);
                    return Ok(false);
                }
                // The old one is better than none.
                Err(_) => return Ok(false),
            }
        }
        let came = repository.manifest(ask).await.map_err(|error| refusal(&error, Refusal::no_manifest))?;
        let tag: Option<Tag> = match which {
            Which::Tag(tag) => Some(tag.clone()),
            Which::Digest(_) => None,
        };
        let name = name.clone();
        disk(directory, move |directory| {
            let manifest = Manifest { media_type: came.media_type, digest: came.digest, bytes: came.bytes };
            directory.mirror_manifest(&name, tag.as_ref(), &manifest).map_err(Refusal::from)
        })
        .await?;
        Ok(true)
    }

    /// A blob that is not here: on its way from now on.
    pub(crate) async fn blob(
        self: &Arc<Self>,
        directory: &Arc<Directory>,
        name: &Name,
        digest: &Digest,
    ) -> Result<Arc<Coming>, Refusal> {
        let key = (name.clone(), *digest);
        if let Some(coming) = self.coming().get(&key).and_then(Weak::upgrade) {
            return Ok(coming);
        }
        let repository = self.repository(name)?;
        let size = repository.blob_size(digest).await;
        let size = size.map_err(|error| refusal(&error, Refusal::no_blob))?.ok_or_else(Refusal::no_blob)?;
        let path = directory.new_file();
        let (writer, seen) = watch::channel(Growth::To(0));
        let made = {
            let mut all = self.coming();
            if let Some(coming) = all.get(&key).and_then(Weak::upgrade) {
                return Ok(coming);
            }
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            let coming = Arc::new(Coming { file, size, grows: seen });
            all.retain(|_, known| known.strong_count() > 0);
            all.insert(key.clone(), Arc::downgrade(&coming));
            coming
        };
        // It is fetched to its end although nobody may wait for it any more: it is asked for again.
        let (mirror, directory, coming) = (self.clone(), directory.clone(), made.clone());
        let digest = *digest;
        tokio::spawn(async move {
            let fetched = fetch(&repository, &digest, &coming, &writer).await;
            let stored = match fetched {
                true => {
                    let (name, path, coming) = (key.0.clone(), path.clone(), coming.clone());
                    disk(&directory, move |directory| {
                        directory.publish(&name, &digest, &path, &coming.file).map_err(Refusal::from)
                    })
                    .await
                    .is_ok()
                }
                false => false,
            };
            if !stored {
                let _ = std::fs::remove_file(&path);
            }
            mirror.coming().remove(&key);
            // The last byte is given out only now.
            writer.send_replace(if fetched { Growth::To(coming.size) } else { Growth::Failed });
        });
        Ok(made)
    }

    fn coming(&self) -> std::sync::MutexGuard<'_, HashMap<(Name, Digest), Weak<Coming>>> {
        self.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether all of the blob came, and was what its digest says.
async fn fetch(
    repository: &Repository,
    digest: &Digest,
    coming: &Coming,
    grows: &watch::Sender<Growth>,
) -> bool {
    let Ok(file) = coming.file.try_clone() else { return false };
    let blob = Descriptor::new("", *digest, coming.size);
    let mut out = Growing { file, at: 0, size: coming.size, grows };
    repository.fetch_blob(&blob, &mut out).await.is_ok()
}

/// Writes to the file and says how far it is, but for the last byte: nobody has a whole blob before its
/// digest was compared.
struct Growing<'a> {
    file: File,
    at: u64,
    size: u64,
    grows: &'a watch::Sender<Growth>,
}

impl Write for Growing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        self.grows.send_replace(Growth::To(self.at.min(self.size.saturating_sub(1))));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs what waits for the disk.
pub(crate) async fn disk<T: Send + 'static>(
    directory: &Arc<Directory>,
    work: impl FnOnce(&Directory) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let directory = directory.clone();
    let done = tokio::task::spawn_blocking(move || work(&directory)).await;
    done.unwrap_or_else(|_| Err(Refusal::new(500, "UNKNOWN", "the registry made a mistake")))
}

fn refusal(error: &Error, missing: fn() -> Refusal) -> Refusal {
    match error {
        Error::NotFound { .. } => missing(),
        Error::Limited { .. } => {
            Refusal::new(429, "TOOMANYREQUESTS", "the registry behind this mirror allows no more requests")
        }
        // Many say it of what is not there.
        Error::Denied { .. } => missing(),
        _ => Refusal::new(502, "UNKNOWN", "the registry behind this mirror does not answer as it should"),
    }
}
