//! Digests of unchanged files, kept from one build to the next.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::index::{FileStat, KnownFile, StatCache};
use crate::looked_at::LookedAt;

const MAGIC: &[u8; 8] = b"kilnstat";
const VERSION: u32 = 2;
/// Magic and version.
const HEADER: usize = 12;
/// dev, ino, size, mtime, ctime, mode, content, whether it is bare.
const RECORD: usize = 8 + 8 + 8 + 16 + 16 + 4 + 32 + 1;
const CHECKSUM: usize = 32;
/// Files not seen lately are kept up to this many beyond twice those seen.
const SPARE: usize = 10_000;

/// A [`StatCache`] in one file.
///
/// A file that changed about when this cache was loaded is not remembered ([`LookedAt`]): it may change
/// again without its times showing it.
pub struct FileStatCache {
    loaded_at: LookedAt,
    records: RwLock<HashMap<(u64, u64), Record>>,
    changed: AtomicBool,
    /// The file is a newer kiln's: not ours to replace.
    newer: bool,
}

struct Record {
    stat: FileStat,
    known: KnownFile,
    used: AtomicBool,
}

impl Record {
    fn new(stat: FileStat, known: KnownFile, used: bool) -> Self {
        Self { stat, known, used: used.into() }
    }
}

impl FileStatCache {
    /// Reads the cache at `path`; a missing or damaged file is an empty cache.
    pub fn load(path: &Path) -> Self {
        // The clock is read before any file is looked at.
        let loaded_at = LookedAt::now();
        let bytes = fs::read(path).unwrap_or_default();
        let records = RwLock::new(decode(&bytes).unwrap_or_default());
        Self { loaded_at, records, changed: AtomicBool::new(false), newer: is_newer(&bytes) }
    }

    /// Writes the cache to `path` in one step, if anything was learned since it was loaded.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        if self.newer || !self.changed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        let used = records.values().filter(|record| record.used.load(Ordering::Relaxed)).count();
        if records.len() > 2 * used + SPARE {
            records.retain(|_, record| *record.used.get_mut());
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent {
            fs::create_dir_all(parent)?;
        }
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}.tmp", std::process::id()));
        // No fsync: the checksum tells a torn file, and that costs only time.
        fs::write(&temporary, encode(&records))?;
        fs::rename(&temporary, path).inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })?;
        self.changed.store(false, Ordering::Relaxed);
        Ok(())
    }
}

impl StatCache for FileStatCache {
    fn get(&self, stat: &FileStat) -> Option<KnownFile> {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        let record = records.get(&(stat.dev, stat.ino)).filter(|record| record.stat == *stat)?;
        record.used.store(true, Ordering::Relaxed);
        Some(record.known)
    }

    fn put(&self, stat: &FileStat, known: KnownFile) {
        if !self.loaded_at.is_settled(stat.mtime_ns, stat.ctime_ns) {
            return;
        }
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        records.insert((stat.dev, stat.ino), Record::new(*stat, known, true));
        self.changed.store(true, Ordering::Relaxed);
    }
}

fn encode(records: &HashMap<(u64, u64), Record>) -> Vec<u8> {
    let mut sorted: Vec<_> = records.iter().collect();
    sorted.sort_unstable_by_key(|(key, _)| **key);
    let mut bytes = Vec::with_capacity(HEADER + sorted.len() * RECORD + CHECKSUM);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    for (_, Record { stat, known, .. }) in sorted {
        for number in [stat.dev, stat.ino, stat.size] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&stat.mtime_ns.to_le_bytes());
        bytes.extend_from_slice(&stat.ctime_ns.to_le_bytes());
        bytes.extend_from_slice(&stat.mode.to_le_bytes());
        bytes.extend_from_slice(&known.content);
        bytes.push(known.is_bare.into());
    }
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes
}

fn is_newer(bytes: &[u8]) -> bool {
    let version = bytes.strip_prefix(MAGIC).and_then(|rest| rest.first_chunk());
    version.is_some_and(|version| u32::from_le_bytes(*version) > VERSION)
}

/// `None` for anything but a whole file of this version.
fn decode(bytes: &[u8]) -> Option<HashMap<(u64, u64), Record>> {
    let (body, checksum) = bytes.split_last_chunk::<CHECKSUM>()?;
    if blake3::hash(body) != *checksum {
        return None;
    }
    let body = body.strip_prefix(MAGIC)?.strip_prefix(&VERSION.to_le_bytes())?;
    let (chunks, []) = body.as_chunks::<RECORD>() else { return None };
    let mut records = HashMap::with_capacity(chunks.len());
    for chunk in chunks {
        let mut rest = chunk.as_slice();
        let stat = FileStat {
            dev: u64::from_le_bytes(take(&mut rest)?),
            ino: u64::from_le_bytes(take(&mut rest)?),
            size: u64::from_le_bytes(take(&mut rest)?),
            mtime_ns: i128::from_le_bytes(take(&mut rest)?),
            ctime_ns: i128::from_le_bytes(take(&mut rest)?),
            mode: u32::from_le_bytes(take(&mut rest)?),
        };
        let known = KnownFile { content: take(&mut rest)?, is_bare: take(&mut rest)? == [1] };
        records.insert((stat.dev, stat.ino), Record::new(stat, known, false));
    }
    Some(records)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: FileStat = FileStat { dev: 1, ino: 2, size: 3, mtime_ns: -4, ctime_ns: 5, mode: 0o100644 };

    const KNOWN: KnownFile = KnownFile { content: [7; 32], is_bare: true };

    #[test]
    fn what_was_learned_is_there_after_loading() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/cache");
        let cache = FileStatCache::load(&path);
        cache.put(&OLD, KNOWN);
        cache.save(&path).unwrap();
        let cache = FileStatCache::load(&path);
        assert_eq!(cache.get(&OLD), Some(KNOWN));
        assert_eq!(cache.get(&FileStat { ctime_ns: 6, ..OLD }), None);
        let dressed = KnownFile { is_bare: false, ..KNOWN };
        cache.put(&OLD, dressed);
        cache.save(&path).unwrap();
        assert_eq!(FileStatCache::load(&path).get(&OLD), Some(dressed));
        assert_eq!(std::fs::read_dir(dir.path().join("sub")).unwrap().count(), 1);
    }

    #[test]
    fn a_file_changed_within_the_last_tick_is_not_remembered() {
        let cache = FileStatCache::load(Path::new("/nonexistent"));
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as i128;
        let fresh = FileStat { ctime_ns: now - 1_000_000, ..OLD };
        cache.put(&fresh, KNOWN);
        assert_eq!(cache.get(&fresh), None);
    }

    #[test]
    fn a_damaged_file_is_an_empty_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let cache = FileStatCache::load(&path);
        cache.put(&OLD, KNOWN);
        cache.save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert!(decode(&damaged).is_none(), "byte {at}");
            assert!(decode(&whole[..at]).is_none(), "cut at {at}");
        }
    }

    #[test]
    fn file_of_a_newer_kiln_is_neither_believed_nor_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let newer = [&MAGIC[..], &(VERSION + 1).to_le_bytes(), b"whatever it means"].concat();
        std::fs::write(&path, &newer).unwrap();
        let cache = FileStatCache::load(&path);
        cache.put(&OLD, KNOWN);
        assert_eq!(cache.get(&OLD), Some(KNOWN));
        cache.save(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), newer);
    }

    #[test]
    fn nothing_is_written_when_nothing_was_learned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        FileStatCache::load(&path).save(&path).unwrap();
        assert!(!path.exists());
    }
}
