//! Who makes the result of a step: of several builds that share a store, one.
//!
//! A claim is a file below `locks/` with a lock on it; the kernel drops the lock when its holder dies, and
//! whoever waited takes over. In the file stands who holds it, for people. Files of the dead are swept
//! away with the leases.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_solver::{CacheKey, Claim, Scope, Stream};

use crate::BuildError;

/// A lock file that is removed when it is let go.
struct Held {
    path: PathBuf,
    _lock: File,
}

impl Drop for Held {
    fn drop(&mut self) {
        // Before the lock is let go: whoever waits notices that its file is gone and makes a new one.
        let _ = fs::remove_file(&self.path);
    }
}

/// A lock that is held is looked at this often: there is no waiting for it that can be given up.
const PAUSES_MS: [u64; 5] = [1, 5, 10, 25, 50];

/// Waits until nobody else makes what `key` names; `None`: given up.
pub(crate) fn claim(root: &Path, key: &CacheKey, scope: &Scope<'_>) -> Result<Option<Claim>, BuildError> {
    let name: String = key.0.as_bytes()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let path = root.join("locks").join(format!("step-{name}"));
    let failed = |call: &'static str| {
        let path = path.clone();
        move |source| BuildError::from(kiln_content::Error::Host { call, path, source })
    };
    let mut pauses = PAUSES_MS.iter();
    let mut pause = Duration::ZERO;
    let mut waited_for: Option<String> = None;
    loop {
        if scope.is_cancelled() {
            return Ok(None);
        }
        let mut open = OpenOptions::new();
        let mut file =
            open.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed("open"))?;
        match file.try_lock() {
            Ok(()) if is_at(&file, &path) => {
                let holder = std::process::id().to_string();
                file.set_len(0).and_then(|()| file.write_all(holder.as_bytes())).map_err(failed("write"))?;
                return Ok(Some(Claim::new(Held { path, _lock: file })));
            }
            // Its holder has just removed it.
            Ok(()) => continue,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(source)) => return Err(failed("lock")(source)),
        }
        // Empty for the moment between lock and write.
        let holder = fs::read_to_string(&path).unwrap_or_default();
        if !holder.is_empty() && waited_for.as_ref() != Some(&holder) {
            let line = format!("waiting for the build of process {holder}, which runs this step\n");
            scope.log(Stream::Stderr, line.as_bytes());
        }
        waited_for = Some(holder);
        pause = pauses.next().map_or(pause, |&pause| Duration::from_millis(pause));
        std::thread::sleep(pause);
    }
}

/// Whether `path` still names this very file.
fn is_at(file: &File, path: &Path) -> bool {
    let ids = |found: io::Result<fs::Metadata>| found.ok().map(|found| (found.dev(), found.ino()));
    let ours = ids(file.metadata());
    ours.is_some() && ours == ids(fs::metadata(path))
}
