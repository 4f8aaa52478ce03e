//! What steps took in earlier builds: time and memory, by what they do and whatever they do it with.
//!
//! One small file in the store's `state/`: advice for the order of steps. What cannot be read or written
//! is not known.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kiln_oci::Digest;
use kiln_solver::Cost;

use crate::engine::now_unix;

/// Steps that are remembered at most; the file has 40 bytes for each.
const LIMIT: usize = 4096;

const VERSION: &[u8; 8] = b"kilnstp1";

type Name = [u8; 16];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Measured {
    nanos: u64,
    peak_memory_bytes: u64,
    /// Seconds since 1970.
    at: u64,
}

/// What is known, and what this build found out.
pub(crate) struct StepCosts {
    path: PathBuf,
    known: BTreeMap<Name, Measured>,
    new: Mutex<BTreeMap<Name, Measured>>,
}

fn name(op: &Digest) -> Name {
    op.as_bytes()[..16].try_into().expect("a digest has 32 bytes")
}

impl StepCosts {
    /// Reads what the store at `root` knows. One read of a file of 160 KiB at most.
    pub(crate) fn open(root: &Path) -> Self {
        let path = root.join("state/step-costs");
        let known = read(&path);
        Self { path, known, new: Mutex::default() }
    }

    /// What `op` took last time.
    pub(crate) fn of(&self, op: &Digest) -> Cost {
        self.known.get(&name(op)).map_or(Cost::default(), |measured| Cost {
            took: Some(Duration::from_nanos(measured.nanos)),
            peak_memory_bytes: measured.peak_memory_bytes,
        })
    }

    /// `op` took this now.
    pub(crate) fn note(&self, op: &Digest, took: Duration, peak_memory_bytes: u64) {
        let measured = Measured {
            nanos: u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
            peak_memory_bytes,
            at: u64::try_from(now_unix()).unwrap_or_default(),
        };
        self.new.lock().unwrap_or_else(PoisonError::into_inner).insert(name(op), measured);
    }

    /// Writes down what this build found out, beside what others did meanwhile.
    pub(crate) fn save(&self) {
        let new = std::mem::take(&mut *self.new.lock().unwrap_or_else(PoisonError::into_inner));
        if new.is_empty() {
            return;
        }
        let mut all = read(&self.path);
        all.extend(new);
        let mut oldest: Vec<(u64, Name)> = all.iter().map(|(name, measured)| (measured.at, *name)).collect();
        oldest.sort_unstable();
        for (_, name) in &oldest[..oldest.len().saturating_sub(LIMIT)] {
            all.remove(name);
        }
        let mut bytes = VERSION.to_vec();
        for (name, Measured { nanos, peak_memory_bytes, at }) in &all {
            bytes.extend_from_slice(name);
            for number in [nanos, peak_memory_bytes, at] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        // Of two builds that end at once one forgets: advice only. Half a file is not seen.
        let new_path = self.path.with_extension(format!("{}.new", std::process::id()));
        let written = fs::File::create(&new_path).and_then(|mut file| file.write_all(&bytes));
        if written.and_then(|()| fs::rename(&new_path, &self.path)).is_err() {
            let _ = fs::remove_file(&new_path);
        }
    }
}

fn read(path: &Path) -> BTreeMap<Name, Measured> {
    let bytes = fs::read(path).unwrap_or_default();
    let Some(records) = bytes.strip_prefix(VERSION) else { return BTreeMap::new() };
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    let record = |bytes: &[u8]| {
        let (name, numbers) = bytes.split_at(16);
        let measured = Measured {
            nanos: number(&numbers[..8]),
            peak_memory_bytes: number(&numbers[8..16]),
            at: number(&numbers[16..]),
        };
        (name.try_into().expect("sixteen bytes"), measured)
    };
    // What is left of a torn end is no record.
    records.chunks_exact(40).map(record).collect()
}

/// Memory that steps may use together: what is free now; no limit where that cannot be told.
pub(crate) fn free_memory_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_build_knows_what_a_step_took() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        let (make, test) = (Digest::of(b"make"), Digest::of(b"test"));
        let first = StepCosts::open(dir.path());
        assert_eq!(first.of(&make), Cost::default());
        first.note(&make, Duration::from_millis(1500), 4096);
        first.save();
        let second = StepCosts::open(dir.path());
        second.note(&test, Duration::from_secs(9), 1);
        second.save();
        let third = StepCosts::open(dir.path());
        assert_eq!(
            third.of(&make),
            Cost { took: Some(Duration::from_millis(1500)), peak_memory_bytes: 4096 }
        );
        assert_eq!(third.of(&test).took, Some(Duration::from_secs(9)));
    }

    #[test]
    fn a_torn_or_foreign_file_is_no_advice() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        let make = Digest::of(b"make");
        let costs = StepCosts::open(dir.path());
        costs.note(&make, Duration::from_secs(1), 0);
        costs.save();
        let path = dir.path().join("state/step-costs");
        let whole = fs::read(&path).unwrap();
        for end in 0..whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            assert_eq!(StepCosts::open(dir.path()).of(&make), Cost::default(), "{end} bytes");
        }
        fs::write(&path, b"something else entirely, and longer than a record of it would be").unwrap();
        assert_eq!(StepCosts::open(dir.path()).of(&make), Cost::default());
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        let costs = StepCosts::open(dir.path());
        for number in 0..LIMIT + 10 {
            costs.note(&Digest::of(&number.to_le_bytes()), Duration::from_secs(1), 0);
        }
        costs.save();
        assert_eq!(StepCosts::open(dir.path()).known.len(), LIMIT);
    }
}
