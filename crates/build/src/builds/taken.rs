//! Which results were removed, by whom and when: for those who wonder why a step ran again.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use kiln_oci::SnapshotId;

use super::{append, dir, replace};
use crate::engine::now_unix;

/// Beyond this size the older half is forgotten.
const MAX_BYTES: u64 = 256 << 10;

fn path(root: &Path) -> PathBuf {
    dir(root).join("taken")
}

/// Writes down that `by` removed these snapshots.
pub(crate) fn note<'a>(root: &Path, by: &str, snapshots: impl IntoIterator<Item = &'a SnapshotId>) {
    let now = now_unix();
    let lines: String = snapshots.into_iter().map(|id| format!("\n{now} {by} {id}")).collect();
    if lines.is_empty() {
        return;
    }
    let path = path(root);
    let size = append(&path).and_then(|mut file| {
        file.write_all(lines.as_bytes())?;
        Ok(file.metadata()?.len())
    });
    if size.is_ok_and(|size| size > MAX_BYTES)
        && let Ok(bytes) = fs::read(&path)
    {
        let half = &bytes[bytes.len() / 2..];
        let from = half.iter().position(|&b| b == b'\n').unwrap_or(half.len());
        let _ = replace(&path, &half[from..]);
    }
}

/// Who removed a snapshot, and when; `None`: nobody who wrote it down, or too long ago.
pub(crate) fn find(root: &Path, snapshot: &str) -> Option<(String, i64)> {
    let text = fs::read_to_string(path(root)).ok()?;
    text.lines().rev().find_map(|line| {
        let mut words = line.split(' ');
        let (at, by, id) = (words.next()?, words.next()?, words.next()?);
        (id == snapshot).then_some((by.to_owned(), at.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removals_are_found_and_the_oldest_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let id = |nth: usize| format!("snapshot-{nth:06}").parse::<SnapshotId>().unwrap();
        assert_eq!(find(dir.path(), "snapshot-000000"), None);
        for nth in 0..200 {
            let batch: Vec<SnapshotId> = (nth * 100..nth * 100 + 100).map(id).collect();
            note(dir.path(), "gc", &batch);
        }
        assert_eq!(find(dir.path(), "snapshot-000000"), None);
        assert_eq!(find(dir.path(), "snapshot-019999").map(|(by, _)| by), Some("gc".to_owned()));
        assert!(fs::metadata(path(dir.path())).unwrap().len() <= MAX_BYTES);
    }
}
