//! What the steps of a build print: written beside the build, by a thread that packs it.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use super::{BUILDS, dir, has_room, with_dir};
use crate::why::forget_oldest;

/// What one step may print before the rest is left out.
const STEP_BYTES: usize = 64 << 20;

/// What all logs of all builds may take, packed.
const ALL_BYTES: u64 = 256 << 20;

/// Pieces of output that wait for the thread: a step that prints faster than they are packed waits.
const WAITING: usize = 256;

/// The logs of one build while it runs.
pub(crate) struct StepLogs {
    dir: PathBuf,
    writer: Mutex<Option<Writer>>,
}

struct Writer {
    pieces: SyncSender<(usize, Vec<u8>)>,
    thread: JoinHandle<Vec<usize>>,
}

fn logs_dir(root: &Path) -> PathBuf {
    dir(root).join("logs")
}

impl StepLogs {
    /// Logs for the build `id`; nothing is made before a step prints something.
    pub(crate) fn new(root: &Path, id: &str) -> Self {
        Self { dir: logs_dir(root).join(id), writer: Mutex::default() }
    }

    /// Step `step` printed this.
    pub(crate) fn write(&self, step: usize, bytes: &[u8]) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let writer = writer.get_or_insert_with(|| {
            let (pieces, waiting) = sync_channel(WAITING);
            let dir = self.dir.clone();
            Writer { pieces, thread: std::thread::spawn(move || pack_all(&dir, &waiting)) }
        });
        let pieces = writer.pieces.clone();
        // The thread ends only when nobody can send any more.
        let _ = pieces.send((step, bytes.to_vec()));
    }

    /// Waits until everything is written; which steps have a log.
    pub(crate) fn finish(&self) -> Vec<usize> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Writer { pieces, thread }) = writer else { return Vec::new() };
        drop(pieces);
        let written = thread.join().unwrap_or_default();
        if let Some(all) = self.dir.parent() {
            forget_oldest(all, BUILDS, ALL_BYTES);
        }
        written
    }
}

/// A step's log while it grows.
struct Log {
    encoder: zstd::Encoder<'static, File>,
    left: usize,
}

fn pack_all(dir: &Path, pieces: &Receiver<(usize, Vec<u8>)>) -> Vec<usize> {
    let mut logs: HashMap<usize, Option<Log>> = HashMap::new();
    for (step, bytes) in pieces {
        let log = logs.entry(step).or_insert_with(|| {
            let has_room = dir.ancestors().nth(3).is_some_and(has_room);
            has_room.then(|| Log::create(&dir.join(step.to_string())).ok()).flatten()
        });
        if let Some(open) = log
            && open.push(&bytes).is_err()
        {
            // A full disk: what is there by now is kept.
            *log = None;
        }
    }
    let finish = |(step, log): (usize, Option<Log>)| log?.encoder.finish().ok().map(|_| step);
    logs.into_iter().filter_map(finish).collect()
}

impl Log {
    fn create(path: &Path) -> io::Result<Self> {
        let open = || OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        let encoder = zstd::Encoder::new(with_dir(path, open)?, 1)?;
        Ok(Self { encoder, left: STEP_BYTES })
    }

    fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        let taken = bytes.len().min(self.left);
        self.encoder.write_all(&bytes[..taken])?;
        self.left -= taken;
        if self.left == 0 {
            self.encoder.write_all(b"\n(the rest is not kept)\n")?;
        }
        Ok(())
    }
}

/// Reads the log of a step of the build `id`; what is there of a damaged one.
///
/// # Errors
/// When it is not there.
pub fn read_log(root: &Path, id: &str, step: usize) -> io::Result<Vec<u8>> {
    let file = File::open(logs_dir(root).join(id).join(step.to_string()))?;
    let mut bytes = Vec::new();
    let mut decoder = zstd::Decoder::new(file)?.take(2 * STEP_BYTES as u64);
    match decoder.read_to_end(&mut bytes) {
        Err(_) if !bytes.is_empty() => Ok(bytes),
        other => other.map(|_| bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_has_a_log_of_its_own_that_ends_somewhere() {
        let dir = tempfile::tempdir().unwrap();
        let logs = StepLogs::new(dir.path(), "id");
        for nth in 0..1000 {
            logs.write(1, format!("line {nth}\n").as_bytes());
        }
        logs.write(2, b"other");
        let piece = vec![b'x'; 1 << 20];
        for _ in 0..70 {
            logs.write(3, &piece);
        }
        let mut written = logs.finish();
        written.sort_unstable();
        assert_eq!(written, [1, 2, 3]);
        let read = |step| read_log(dir.path(), "id", step).unwrap();
        assert_eq!(read(1).iter().filter(|&&b| b == b'\n').count(), 1000);
        assert_eq!(read(2), b"other");
        assert_eq!(read(3).len(), STEP_BYTES + b"\n(the rest is not kept)\n".len());
        assert!(read_log(dir.path(), "id", 4).is_err());
        assert!(StepLogs::new(dir.path(), "none").finish().is_empty());
    }
}
