//! Digests of unchanged files, kept from one build to the next.
//!
//! ```text
//! magic, version, pieces = number of records, records, BLAKE3 of the piece
//! ```
//! Numbers are little-endian. A build that learns of few files adds a piece with those; of two records of
//! one file the later one counts. What is behind a piece that is not whole does not count.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::hash::BuildHasher;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::index::{FileStat, KnownFile, StatCache};
use crate::looked_at::LookedAt;

const MAGIC: &[u8; 8] = b"kilnstat";
const VERSION: u32 = 3;
/// Magic and version.
const HEADER: usize = 12;
/// dev, ino.
const KEY: usize = 8 + 8;
/// The same, size, mtime, ctime, mode.
const STAT: usize = KEY + 8 + 16 + 16 + 4;
/// The same, content, whether it is bare.
const RECORD: usize = STAT + 32 + 1;
const COUNT: usize = 8;
const CHECKSUM: usize = 32;
/// Files not seen lately are kept up to this many beyond twice those seen.
const SPARE: usize = 10_000;
/// All is written anew once the pieces that were added have more than this part of the first one's records.
const ADDED_PART: usize = 8;

/// A [`StatCache`] in one file.
///
/// A file that changed about when this cache was loaded is not remembered ([`LookedAt`]): it may change
/// again without its times showing it. Loading it costs a look at each record, and nothing is made of them
/// but a table of their places.
pub struct FileStatCache {
    loaded_at: LookedAt,
    kept: Kept,
    /// What the file does not have yet, by device and inode.
    learned: RwLock<HashMap<(u64, u64), (FileStat, KnownFile)>>,
    has_learned: AtomicBool,
    /// The file is a newer kiln's: not ours to replace.
    newer: bool,
}

impl FileStatCache {
    /// Reads the cache at `path`; a missing or damaged file is an empty cache.
    pub fn load(path: &Path) -> Self {
        // The clock is read before any file is looked at.
        let loaded_at = LookedAt::now();
        let (bytes, file) = read(path).unwrap_or_default();
        let newer = is_newer(&bytes);
        let kept = Kept::new(bytes, file);
        Self { loaded_at, kept, learned: RwLock::default(), has_learned: AtomicBool::new(false), newer }
    }

    /// Writes to `path` what was learned since it was loaded, if there is something.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        if self.newer || !self.has_learned.load(Ordering::Relaxed) {
            return Ok(());
        }
        let learned = self.learned.read().unwrap_or_else(PoisonError::into_inner);
        let new = || learned.values().map(|(stat, known)| record(stat, known));
        let added = self.kept.added + learned.len();
        let used = learned.len() + self.kept.used();
        let is_mostly_unused = self.kept.len() + learned.len() > 2 * used + SPARE;
        if added * ADDED_PART <= self.kept.first && !is_mostly_unused && self.kept.add(path, &piece(new()))? {
            self.has_learned.store(false, Ordering::Relaxed);
            return Ok(());
        }
        let old = self.kept.records(is_mostly_unused);
        let old = old.filter(|record| !learned.contains_key(&key_of(record)));
        let whole = [&header()[..], &piece(old.copied().chain(new()))].concat();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent {
            fs::create_dir_all(parent)?;
        }
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}.tmp", std::process::id()));
        // No fsync: the checksum tells a torn file, and that costs only time.
        fs::write(&temporary, whole)?;
        fs::rename(&temporary, path).inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })?;
        self.has_learned.store(false, Ordering::Relaxed);
        Ok(())
    }
}

impl StatCache for FileStatCache {
    fn get(&self, stat: &FileStat) -> Option<KnownFile> {
        let kept = self.kept.get(stat);
        if kept.is_some() || !self.has_learned.load(Ordering::Relaxed) {
            return kept;
        }
        let learned = self.learned.read().unwrap_or_else(PoisonError::into_inner);
        let (then, known) = learned.get(&(stat.dev, stat.ino))?;
        (then == stat).then_some(*known)
    }

    fn put(&self, stat: &FileStat, known: KnownFile) {
        if !self.loaded_at.is_settled(stat.mtime_ns, stat.ctime_ns) {
            return;
        }
        let mut learned = self.learned.write().unwrap_or_else(PoisonError::into_inner);
        learned.insert((stat.dev, stat.ino), (*stat, known));
        self.has_learned.store(true, Ordering::Relaxed);
    }
}

/// What a file has, as it stands there.
#[derive(Default)]
struct Kept {
    /// Device and inode of the file that was read, if all of it was understood.
    file: Option<(u64, u64)>,
    bytes: Vec<u8>,
    /// Where the records begin.
    places: Vec<usize>,
    /// By the hash of device and inode, or behind that: which of `places`, counted from 1. One that is 0 ends
    /// the search.
    slots: Vec<u32>,
    /// Nobody who makes inodes knows it, so nobody makes all of them meet in one slot.
    factor: u64,
    /// Which of `places` were found.
    used: Vec<AtomicBool>,
    /// Records in the first piece, and in the others.
    first: usize,
    added: usize,
}

impl Kept {
    /// As much of `bytes` as is whole.
    fn new(bytes: Vec<u8>, file: (u64, u64)) -> Self {
        let Some((pieces, is_whole)) = pieces(&bytes) else { return Self::default() };
        let count: usize = pieces.iter().map(|(_, count)| count).sum();
        let first = pieces.first().map_or(0, |(_, count)| *count);
        let mut kept = Self {
            file: is_whole.then_some(file),
            bytes,
            places: Vec::with_capacity(count),
            // Half of them empty: a search is short.
            slots: vec![0; (2 * count).next_power_of_two()],
            factor: std::hash::RandomState::new().hash_one(count) | 1,
            used: Vec::new(),
            first,
            added: count - first,
        };
        for (begin, count) in pieces {
            (0..count).for_each(|nth| kept.learn(begin + nth * RECORD));
        }
        kept.used = kept.places.iter().map(|_| AtomicBool::new(false)).collect();
        kept
    }

    /// Takes the record at `place`, in the place of an earlier one of the same file.
    fn learn(&mut self, place: usize) {
        let slot = self.slot(key_bytes(&self.bytes[place..]));
        match self.slots[slot] {
            0 => {
                self.places.push(place);
                self.slots[slot] = u32::try_from(self.places.len()).expect("a file of 400 GB was not read");
            }
            nth => self.places[nth as usize - 1] = place,
        }
    }

    /// The slot of a file, or the empty one where it would be.
    fn slot(&self, key: &[u8; KEY]) -> usize {
        let (dev, ino) = numbers(key);
        let hash = (ino ^ dev.rotate_left(40)).wrapping_mul(self.factor);
        // The upper bits: what is multiplied has no say in the lower ones.
        let mut slot = (hash >> 32) as usize & (self.slots.len() - 1);
        loop {
            match self.slots[slot] {
                0 => return slot,
                nth if self.bytes[self.places[nth as usize - 1]..].starts_with(key) => return slot,
                _ => slot = (slot + 1) & (self.slots.len() - 1),
            }
        }
    }

    fn get(&self, stat: &FileStat) -> Option<KnownFile> {
        if self.places.is_empty() {
            return None;
        }
        let stat = stat_bytes(stat);
        let nth = (self.slots[self.slot(key_bytes(&stat))] as usize).checked_sub(1)?;
        let rest = self.bytes[self.places[nth]..].strip_prefix(&stat)?;
        let (content, rest) = rest.split_first_chunk()?;
        self.used[nth].store(true, Ordering::Relaxed);
        Some(KnownFile { content: *content, is_bare: rest.first() == Some(&1) })
    }

    /// How many files it has.
    fn len(&self) -> usize {
        self.places.len()
    }

    fn used(&self) -> usize {
        self.used.iter().filter(|used| used.load(Ordering::Relaxed)).count()
    }

    /// The last record of each file, or of each that was found.
    fn records(&self, only_used: bool) -> impl Iterator<Item = &[u8; RECORD]> {
        let all = self.places.iter().zip(&self.used);
        let wanted = all.filter(move |(_, used)| !only_used || used.load(Ordering::Relaxed));
        wanted.map(|(place, _)| self.bytes[*place..].first_chunk().expect("pieces are whole"))
    }

    /// Adds a piece to the file at `path`; whether that is the file that was read, and it was whole.
    fn add(&self, path: &Path, piece: &[u8]) -> io::Result<bool> {
        let Some(known) = self.file else { return Ok(false) };
        let Ok(mut file) = OpenOptions::new().read(true).append(true).open(path) else { return Ok(false) };
        let stat = file.metadata()?;
        let mut version = [0; HEADER];
        // Of a file that was replaced twice the inode may be the same again.
        if (stat.dev(), stat.ino()) != known || file.read_exact(&mut version).is_err() || version != header()
        {
            return Ok(false);
        }
        // In one call: of two builds that end at once, both pieces are there.
        file.write_all(piece)?;
        Ok(true)
    }
}

/// The content of a file, its device and its inode.
fn read(path: &Path) -> io::Result<(Vec<u8>, (u64, u64))> {
    let mut file = File::open(path)?;
    let stat = file.metadata()?;
    let mut bytes = Vec::with_capacity(usize::try_from(stat.len()).unwrap_or_default());
    file.read_to_end(&mut bytes)?;
    Ok((bytes, (stat.dev(), stat.ino())))
}

fn header() -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..MAGIC.len()].copy_from_slice(MAGIC);
    header[MAGIC.len()..].copy_from_slice(&VERSION.to_le_bytes());
    header
}

fn is_newer(bytes: &[u8]) -> bool {
    let version = bytes.strip_prefix(MAGIC).and_then(|rest| rest.first_chunk());
    version.is_some_and(|version| u32::from_le_bytes(*version) > VERSION)
}

/// Where the records of each whole piece begin, how many they are, and whether nothing else is there; `None`
/// for a file that is none of this version, or has no whole piece.
fn pieces(bytes: &[u8]) -> Option<(Vec<(usize, usize)>, bool)> {
    let mut rest = bytes.strip_prefix(&header())?;
    let mut pieces = Vec::new();
    while let Some((piece, behind)) = split_piece(rest) {
        pieces.push((bytes.len() - rest.len() + COUNT, (piece.len() - COUNT) / RECORD));
        rest = behind;
    }
    (!pieces.is_empty()).then_some((pieces, rest.is_empty()))
}

/// A whole piece without its checksum, and what is behind it.
fn split_piece(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let count = usize::try_from(u64::from_le_bytes(*bytes.first_chunk()?)).ok()?;
    let length = count.checked_mul(RECORD)?.checked_add(COUNT)?;
    let (piece, rest) = bytes.split_at_checked(length)?;
    let (checksum, rest) = rest.split_first_chunk::<CHECKSUM>()?;
    (blake3::hash(piece) == *checksum).then_some((piece, rest))
}

/// A piece of these records.
fn piece(records: impl Iterator<Item = [u8; RECORD]>) -> Vec<u8> {
    let mut records: Vec<[u8; RECORD]> = records.collect();
    records.sort_unstable_by_key(key_of);
    let mut bytes = Vec::with_capacity(COUNT + records.len() * RECORD + CHECKSUM);
    bytes.extend_from_slice(&(records.len() as u64).to_le_bytes());
    bytes.extend_from_slice(records.as_flattened());
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes
}

fn record(stat: &FileStat, known: &KnownFile) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    bytes[..STAT].copy_from_slice(&stat_bytes(stat));
    bytes[STAT..STAT + 32].copy_from_slice(&known.content);
    bytes[STAT + 32] = known.is_bare.into();
    bytes
}

fn stat_bytes(stat: &FileStat) -> [u8; STAT] {
    let mut bytes = [0; STAT];
    let mut rest = &mut bytes[..];
    let mut field = |field: &[u8]| {
        rest.split_off_mut(..field.len())
            .expect("the fields are as long as the record")
            .copy_from_slice(field);
    };
    for number in [stat.dev, stat.ino, stat.size] {
        field(&number.to_le_bytes());
    }
    field(&stat.mtime_ns.to_le_bytes());
    field(&stat.ctime_ns.to_le_bytes());
    field(&stat.mode.to_le_bytes());
    bytes
}

/// What a record begins with.
fn key_bytes(record: &[u8]) -> &[u8; KEY] {
    record.first_chunk().expect("records are longer than that")
}

fn key_of(record: &[u8; RECORD]) -> (u64, u64) {
    numbers(key_bytes(record))
}

/// Device and inode.
fn numbers(key: &[u8; KEY]) -> (u64, u64) {
    let (dev, ino) = key.split_at(KEY / 2);
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("half of sixteen bytes"));
    (number(dev), number(ino))
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
            assert!(pieces(&damaged).is_none(), "byte {at}");
            assert!(pieces(&whole[..at]).is_none(), "cut at {at}");
        }
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let cache = FileStatCache::load(&path);
        assert_eq!(cache.get(&OLD), None);
        cache.put(&OLD, KNOWN);
        cache.save(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
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

    /// The state of a file that has this inode.
    fn stat(ino: u64) -> FileStat {
        FileStat { ino, dev: ino % 3, ..OLD }
    }

    /// What is known of it the `turn`th time.
    fn known(ino: u64, turn: u8) -> KnownFile {
        KnownFile {
            content: *blake3::hash(&[&ino.to_le_bytes()[..], &[turn]].concat()).as_bytes(),
            is_bare: true,
        }
    }

    fn learn(path: &Path, inos: impl IntoIterator<Item = u64>, turn: u8) {
        let cache = FileStatCache::load(path);
        inos.into_iter().for_each(|ino| {
            cache.put(&FileStat { ctime_ns: turn.into(), ..stat(ino) }, known(ino, turn));
        });
        cache.save(path).unwrap();
    }

    fn check(path: &Path, inos: impl IntoIterator<Item = u64>, turn: u8) {
        let cache = FileStatCache::load(path);
        for ino in inos {
            let now = FileStat { ctime_ns: turn.into(), ..stat(ino) };
            assert_eq!(cache.get(&now), Some(known(ino, turn)), "{ino}");
            assert_eq!(cache.get(&FileStat { ctime_ns: 99, ..now }), None);
            assert_eq!(cache.get(&FileStat { dev: 7, ..now }), None);
        }
    }

    #[test]
    fn of_many_files_each_is_found_and_few_new_ones_are_added_behind_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        learn(&path, 0..1000, 1);
        check(&path, 0..1000, 1);
        let (first, inode) = (std::fs::read(&path).unwrap(), std::fs::metadata(&path).unwrap().ino());
        // Some are others now, and some are new.
        learn(&path, 990..1020, 2);
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.starts_with(&first));
        assert_eq!(bytes.len(), first.len() + COUNT + 30 * RECORD + CHECKSUM);
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode);
        check(&path, 0..990, 1);
        check(&path, 990..1020, 2);
        // With too many of them all is written anew, each file once.
        learn(&path, 0..100, 3);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), HEADER + COUNT + 1020 * RECORD + CHECKSUM);
        check(&path, 0..100, 3);
        check(&path, 100..990, 1);
        check(&path, 990..1020, 2);
    }

    #[test]
    fn a_piece_that_is_not_whole_is_forgotten_with_all_behind_it_and_then_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        learn(&path, 0..1000, 1);
        let first = std::fs::read(&path).unwrap();
        learn(&path, [5], 2);
        let second = std::fs::read(&path).unwrap().len();
        learn(&path, [6], 2);
        let whole = std::fs::read(&path).unwrap();
        for at in [first.len(), first.len() + COUNT, second - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            check(&path, 0..1000, 1);
            let cache = FileStatCache::load(&path);
            for ino in [5, 6] {
                assert_eq!(cache.get(&FileStat { ctime_ns: 2, ..stat(ino) }), None);
            }
            // Behind what is damaged nobody would find it.
            learn(&path, [7], 3);
            check(&path, [7], 3);
            assert_eq!(std::fs::read(&path).unwrap().len(), first.len());
        }
    }

    #[test]
    fn a_file_that_another_build_replaced_meanwhile_is_not_added_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        learn(&path, 0..1000, 1);
        let cache = FileStatCache::load(&path);
        std::fs::rename(&path, dir.path().join("before")).unwrap();
        std::fs::write(&path, "another build's").unwrap();
        cache.put(&stat(1), known(1, 2));
        cache.save(&path).unwrap();
        check(&path, 2..1000, 1);
        assert_eq!(FileStatCache::load(&path).get(&stat(1)), Some(known(1, 2)));
    }

    #[test]
    fn of_files_that_nobody_sees_any_more_a_bounded_number_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let many = SPARE as u64 + 100;
        learn(&path, 0..many, 1);
        let cache = FileStatCache::load(&path);
        (0..10).for_each(|ino| assert!(cache.get(&FileStat { ctime_ns: 1, ..stat(ino) }).is_some()));
        cache.put(&stat(many), known(many, 1));
        cache.save(&path).unwrap();
        check(&path, 0..10, 1);
        assert_eq!(std::fs::read(&path).unwrap().len(), HEADER + COUNT + 11 * RECORD + CHECKSUM);
    }

    #[test]
    fn a_file_of_an_older_kiln_is_an_empty_cache_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        learn(&path, [2], 1);
        let mut older = std::fs::read(&path).unwrap();
        older[MAGIC.len()] = 2;
        std::fs::write(&path, &older).unwrap();
        let cache = FileStatCache::load(&path);
        assert_eq!(cache.get(&FileStat { ctime_ns: 1, ..stat(2) }), None);
        cache.put(&OLD, KNOWN);
        cache.save(&path).unwrap();
        assert_eq!(FileStatCache::load(&path).get(&OLD), Some(KNOWN));
    }
}
