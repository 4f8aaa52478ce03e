//! Records: JSON files that say which version of kiln's they are, replaced in one step.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;

/// What stands in a file of its own.
pub(crate) trait Record: Serialize + DeserializeOwned {
    /// The version that this kiln writes, and the only one that it reads.
    const VERSION: u32;

    /// The version of what was read.
    fn version(&self) -> u32;
}

pub(crate) fn failed(call: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Host { call, path, source }
}

/// Reads a record; `None`: there is no such file.
///
/// # Errors
/// [`Error::Record`] when it is damaged or of another version.
pub(crate) fn read<T: Record>(path: &Path) -> Result<Option<T>, Error> {
    let text = match read_whole(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed("read", path))?,
    };
    let wrong = |problem| Error::Record { path: path.to_owned(), problem };
    let record: T = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    match record.version() {
        version if version == T::VERSION => Ok(Some(record)),
        other => Err(wrong(format!("it has version {other}, and this kiln knows {}", T::VERSION))),
    }
}

/// Reads a file as it was at one moment, although [`write_into_spare`] may write to it as soon as it has
/// another name.
fn read_whole(path: &Path) -> io::Result<Vec<u8>> {
    let of = |file: fs::Metadata| (file.dev(), file.ino(), file.ctime(), file.ctime_nsec());
    let mut tries = 0;
    loop {
        let mut file = File::open(path)?;
        let before = of(file.metadata()?);
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        tries += 1;
        // One that is gone was complete before: a name goes with all that it names.
        if tries == 100 || fs::metadata(path).map_or(true, |now| of(now) == before) {
            return Ok(text);
        }
    }
}

/// Replaces a record in one step. Not synced: after a power cut it is the old or the new one on the file
/// systems that order renames (ext4, xfs, btrfs do for replaced files), as the rest of the store.
///
/// # Errors
/// [`Error::Host`]; the old one stays then.
pub(crate) fn write<T: Record>(path: &Path, record: &T) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let next = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let written = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        fs::rename(&next, path)
    };
    written().map_err(|error| {
        let _ = fs::remove_file(&next);
        failed("write", path)(error)
    })
}

/// Room for a record that has to be written although the disk is full.
const SPARE_BYTES: u64 = 8 << 10;

/// Two: one takes the name of the record, the other is for the next time.
fn spares(path: &Path) -> [PathBuf; 2] {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    ["a", "b"].map(|which| path.with_file_name(format!(".{name}.spare-{which}")))
}

/// Takes room beside a record for [`write_into_spare`]. Where there is none, there is none.
pub(crate) fn keep_spares(path: &Path) {
    for spare in spares(path) {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(spare);
        let Ok(file) = file else { continue };
        if file.metadata().is_ok_and(|file| file.len() < SPARE_BYTES)
            && fallocate(&file, FallocateFlags::empty(), 0, SPARE_BYTES).is_err()
        {
            // A file system that knows no such call.
            let _ = file.write_all_at(&[0; SPARE_BYTES as usize], 0);
        }
    }
}

/// Replaces a record as [`write`] does, and takes nothing from the disk for it. A file system that writes
/// everything to a new place (btrfs, zfs) may want something all the same.
///
/// # Errors
/// [`Error::Host`]; when it is larger than the room there is, too.
pub(crate) fn write_into_spare<T: Record>(path: &Path, record: &T) -> Result<(), Error> {
    let written = || {
        let mut text = serde_json::to_vec(record)?;
        let fits = |file: &File| file.metadata().is_ok_and(|file| file.len() >= text.len() as u64);
        let open = |spare: PathBuf| {
            let file = OpenOptions::new().write(true).open(&spare).ok()?;
            fits(&file).then_some((spare, file))
        };
        let (spare, file) = spares(path).into_iter().find_map(open).ok_or(io::ErrorKind::StorageFull)?;
        // Blanks behind JSON are nothing to who reads it.
        text.resize(usize::try_from(file.metadata()?.len()).unwrap_or(0), b' ');
        file.write_all_at(&text, 0)?;
        match renameat_with(CWD, &spare, CWD, path, RenameFlags::EXCHANGE) {
            // A file system that cannot; then there is one spare less.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => fs::rename(&spare, path),
            other => Ok(other?),
        }
    };
    written().map_err(failed("write", path))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Note {
        version: u32,
        text: String,
    }

    impl Record for Note {
        const VERSION: u32 = 1;

        fn version(&self) -> u32 {
            self.version
        }
    }

    fn note(text: &str) -> Note {
        Note { version: 1, text: text.to_owned() }
    }

    #[test]
    fn records_come_back_and_others_are_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("note.json");
        assert_eq!(read::<Note>(&path).unwrap(), None);
        write(&path, &note("one")).unwrap();
        assert_eq!(read(&path).unwrap(), Some(note("one")));
        write(&path, &Note { version: 2, ..note("two") }).unwrap();
        let error = read::<Note>(&path).unwrap_err().to_string();
        assert!(error.contains("version 2, and this kiln knows 1"), "{error}");
        fs::write(&path, "{").unwrap();
        assert!(matches!(read::<Note>(&path), Err(Error::Record { .. })));
    }

    #[test]
    fn spares_take_one_record_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("note.json");
        write(&path, &note("first")).unwrap();
        assert!(write_into_spare(&path, &note("no spare")).is_err());
        keep_spares(&path);
        for round in 0..5 {
            let text = "x".repeat(1000 * (5 - round));
            write_into_spare(&path, &note(&text)).unwrap();
            assert_eq!(read(&path).unwrap(), Some(note(&text)), "{round}");
        }
        assert!(write_into_spare(&path, &note(&"x".repeat(10_000))).is_err());
        // No name has been added.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn what_is_read_while_it_is_written_is_one_of_the_two() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("note.json");
        write(&path, &note(&"0".repeat(3000))).unwrap();
        keep_spares(&path);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for round in 1..300_u32 {
                    let text = char::from_digit(round % 10, 10).unwrap().to_string().repeat(3000);
                    write_into_spare(&path, &note(&text)).unwrap();
                }
            });
            while !writer.is_finished() {
                let text = read::<Note>(&path).unwrap().unwrap().text;
                assert!(text.len() == 3000 && text.bytes().all(|byte| byte == text.as_bytes()[0]), "{text}");
            }
        });
    }
}
