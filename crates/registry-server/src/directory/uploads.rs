//! Blobs on their way here.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use kiln_oci::{Digest, Sha256Writer};
use tokio::sync::OwnedMutexGuard;

use super::{Directory, DirectoryError, remove};
use crate::rights::Who;
use crate::route::{Name, UploadId};
use crate::settings::Limits;

/// A client whose connection broke is back sooner.
const IDLE: Duration = Duration::from_secs(600);

/// The uploads that were begun and not ended.
pub(crate) struct Uploads {
    dir: PathBuf,
    most: usize,
    life: Duration,
    open: Mutex<HashMap<UploadId, Arc<Upload>>>,
}

/// One of them.
struct Upload {
    name: Name,
    who: Who,
    /// How many there are, also while somebody writes.
    size_bytes: Arc<AtomicU64>,
    writing: Arc<tokio::sync::Mutex<Writing>>,
}

impl Upload {
    fn new(name: Name, who: Who, path: PathBuf, file: File, size: u64) -> Self {
        // This process has seen all of it if there is nothing yet.
        let hash = (size == 0).then(|| Sha256Writer::new(io::sink()));
        let size_bytes = Arc::new(AtomicU64::new(size));
        let writing = Writing { path, file, size, seen: size_bytes.clone(), hash, ended: false };
        Self { name, who, size_bytes, writing: Arc::new(tokio::sync::Mutex::new(writing)) }
    }
}

/// What came of a blob. Whoever has it is the only one who writes.
pub(crate) struct Writing {
    path: PathBuf,
    file: File,
    size: u64,
    /// The same for those who do not write.
    seen: Arc<AtomicU64>,
    /// Of what was written so far; `None` when this process does not know what that was.
    hash: Option<Sha256Writer<io::Sink>>,
    /// It became a blob, or will be none.
    ended: bool,
}

/// Why an upload does not become a blob.
pub(crate) enum NotEnded {
    Digest { actual: Digest },
    Directory(DirectoryError),
}

impl Uploads {
    /// Those that a process before this one did not end go on.
    pub(super) fn open(dir: PathBuf, limits: &Limits) -> Result<Self, DirectoryError> {
        let mut open = HashMap::new();
        for file in super::names(&dir)? {
            let path = dir.join(&file);
            let id = file.strip_suffix(".for").unwrap_or(&file).parse::<UploadId>();
            let known = id.ok().and_then(|id| Some((read_owner(&dir, &id)?, id)));
            match known {
                Some(_) if file.ends_with(".for") => {}
                Some(((name, who), id)) => {
                    let opened = OpenOptions::new().read(true).write(true).open(&path);
                    let opened = opened.and_then(|file| Ok((file.metadata()?.len(), file)));
                    let (size, file) = opened.map_err(DirectoryError::host("opened", &path))?;
                    open.insert(id, Arc::new(Upload::new(name, who, path, file, size)));
                }
                None => drop(remove(&path)?),
            }
        }
        // Killed between the two files.
        for file in super::names(&dir)? {
            let id = file.strip_suffix(".for").and_then(|id| id.parse::<UploadId>().ok());
            if id.is_some_and(|id| !open.contains_key(&id)) {
                remove(&dir.join(&file))?;
            }
        }
        Ok(Self { dir, most: limits.uploads, life: limits.upload_life, open: Mutex::new(open) })
    }

    /// None at all, and none can begin.
    pub(super) fn none(dir: PathBuf) -> Self {
        Self { dir, most: 0, life: Duration::MAX, open: Mutex::default() }
    }

    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<UploadId, Arc<Upload>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.all().len()
    }

    /// What all of them take on the disk.
    pub(crate) fn size_bytes(&self) -> u64 {
        let all = self.all();
        all.values().map(|upload| super::waiting::on_disk(upload.size_bytes.load(Ordering::Relaxed))).sum()
    }

    /// Begins one; `None`: there are too many.
    pub(crate) fn begin(&self, name: &Name, who: &Who) -> Result<Option<UploadId>, DirectoryError> {
        let mut random = [0; 16];
        let mut filled = 0;
        while filled < random.len() {
            let got = rustix::rand::getrandom(&mut random[filled..], rustix::rand::GetRandomFlags::empty());
            filled += got.map_err(|error| DirectoryError::host("named", &self.dir)(error.into()))?;
        }
        let id = UploadId::new(random);
        if self.count() >= self.most {
            return Ok(None);
        }
        let path = self.dir.join(id.as_str());
        fs::write(owner_path(&self.dir, &id), owner_text(name, who))
            .map_err(DirectoryError::host("written", &path))?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(DirectoryError::host("made", &path))?;
        let upload = Upload::new(name.clone(), who.clone(), path, file, 0);
        self.all().insert(id.clone(), Arc::new(upload));
        Ok(Some(id))
    }

    /// Somebody's own upload to this repository, once nobody else writes to it; `None`: there is none.
    pub(crate) async fn enter(
        &self,
        name: &Name,
        id: &UploadId,
        who: &Who,
    ) -> Option<OwnedMutexGuard<Writing>> {
        let found = self.all().get(id).cloned();
        let upload = found.filter(|upload| upload.name == *name && upload.who == *who)?;
        let writing = upload.writing.clone().lock_owned().await;
        if writing.ended { None } else { Some(writing) }
    }

    /// Forgets one; its file goes unless it has another name by now.
    pub(crate) fn end(&self, id: &UploadId, writing: &mut Writing) -> Result<(), DirectoryError> {
        writing.ended = true;
        self.all().remove(id);
        remove(&self.dir.join(id.as_str()))?;
        remove(&owner_path(&self.dir, id))?;
        Ok(())
    }

    /// Forgets those that nobody went on with; how many.
    pub(crate) fn expire(&self) -> Result<u64, DirectoryError> {
        self.expire_after(self.life)
    }

    /// The same where others need the room: whoever comes back so late begins again.
    pub(crate) fn expire_idle(&self) -> Result<u64, DirectoryError> {
        self.expire_after(IDLE.min(self.life))
    }

    /// The same for those that nobody went on with for so long.
    pub(crate) fn expire_after(&self, life: Duration) -> Result<u64, DirectoryError> {
        let all: Vec<_> = self.all().iter().map(|(id, upload)| (id.clone(), upload.clone())).collect();
        let mut count = 0;
        for (id, upload) in all {
            let Ok(mut writing) = upload.writing.clone().try_lock_owned() else { continue };
            let age = writing.file.metadata().and_then(|metadata| metadata.modified());
            let age = age.ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
            if age.is_some_and(|age| age >= life) {
                self.end(&id, &mut writing)?;
                count += 1;
            }
        }
        Ok(count)
    }
}

impl Writing {
    /// How many bytes there are.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Adds these.
    pub(crate) fn add(&mut self, pieces: &[Bytes]) -> Result<(), DirectoryError> {
        let failed = DirectoryError::host("written", self.path.clone());
        let mut write = || {
            self.file.seek(SeekFrom::Start(self.size))?;
            for piece in pieces {
                self.file.write_all(piece)?;
                if let Some(hash) = &mut self.hash {
                    hash.write_all(piece)?;
                }
                self.size += piece.len() as u64;
            }
            Ok(())
        };
        let written = write();
        self.seen.store(self.size, Ordering::Relaxed);
        if written.is_err() {
            // Half a piece may be there.
            let _ = self.cut(self.size);
        }
        written.map_err(failed)
    }

    /// Leaves only the first bytes.
    pub(crate) fn cut(&mut self, size: u64) -> Result<(), DirectoryError> {
        self.file.set_len(size).map_err(DirectoryError::host("written", &self.path))?;
        self.size = size;
        self.seen.store(size, Ordering::Relaxed);
        self.hash = None;
        Ok(())
    }

    fn digest(&mut self) -> Result<Digest, DirectoryError> {
        let failed = |error| DirectoryError::host("read", &self.path)(error);
        let hash = match self.hash.take() {
            Some(hash) => hash,
            None => {
                let mut hash = Sha256Writer::new(io::sink());
                self.file.seek(SeekFrom::Start(0)).map_err(failed)?;
                io::copy(
                    &mut io::BufReader::with_capacity(256 << 10, (&self.file).take(self.size)),
                    &mut hash,
                )
                .map_err(failed)?;
                hash
            }
        };
        Ok(hash.finish().1)
    }
}

impl Directory {
    /// Makes a blob of what came, if it has this digest; else the upload is over.
    pub(crate) fn end_upload(
        &self,
        name: &Name,
        id: &UploadId,
        writing: &mut Writing,
        expected: &Digest,
    ) -> Result<(), NotEnded> {
        let actual = writing.digest().map_err(NotEnded::Directory)?;
        if actual != *expected {
            self.uploads.end(id, writing).map_err(NotEnded::Directory)?;
            return Err(NotEnded::Digest { actual });
        }
        // It counts as a blob from here on, not twice.
        writing.seen.store(0, Ordering::Relaxed);
        let published = self.publish(name, expected, &writing.path, &writing.file);
        if published.is_err() {
            writing.seen.store(writing.size, Ordering::Relaxed);
        }
        published.and_then(|()| self.uploads.end(id, writing)).map_err(NotEnded::Directory)
    }
}

fn owner_path(dir: &Path, id: &UploadId) -> PathBuf {
    dir.join(format!("{id}.for"))
}

fn owner_text(name: &Name, who: &Who) -> String {
    match who {
        Who::Anonymous => format!("{name}\n"),
        Who::Account(user) => format!("{name}\n{user}\n"),
    }
}

fn read_owner(dir: &Path, id: &UploadId) -> Option<(Name, Who)> {
    let text = fs::read_to_string(owner_path(dir, id)).ok()?;
    let mut lines = text.lines();
    let name = lines.next()?.parse().ok()?;
    let who = lines.next().map_or(Who::Anonymous, |user| Who::Account(user.to_owned()));
    (owner_text(&name, &who) == text).then_some((name, who))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_goes_on_with_is_forgotten_with_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let life = Duration::from_secs(3600);
        let uploads =
            Uploads::open(dir.path().to_owned(), &Limits { upload_life: life, ..Limits::default() }).unwrap();
        let name: Name = "team/app".parse().unwrap();
        let begin = || uploads.begin(&name, &Who::Anonymous).unwrap().unwrap();
        let (old, busy, new) = (begin(), begin(), begin());
        for id in [&old, &busy] {
            let file = OpenOptions::new().write(true).open(dir.path().join(id.as_str())).unwrap();
            file.set_modified(SystemTime::now() - 2 * life).unwrap();
        }
        // Whoever writes at this moment goes on with it.
        let writing = uploads.all()[&busy].writing.clone();
        let turn = writing.try_lock().unwrap();
        assert_eq!(uploads.expire().unwrap(), 1);
        drop(turn);
        let left: Vec<bool> = [&old, &busy, &new]
            .iter()
            .map(|id| dir.path().join(id.as_str()).exists() && owner_path(dir.path(), id).exists())
            .collect();
        assert_eq!((left, uploads.count()), (vec![false, true, true], 2));
        assert_eq!(uploads.expire().unwrap(), 1);
        // Before its time where there is no room for others.
        let file = OpenOptions::new().write(true).open(dir.path().join(new.as_str())).unwrap();
        assert_eq!(uploads.expire_idle().unwrap(), 0);
        file.set_modified(SystemTime::now() - IDLE).unwrap();
        assert_eq!((uploads.expire().unwrap(), uploads.expire_idle().unwrap()), (0, 1));
    }
}
