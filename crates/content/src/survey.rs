//! All records at once, for whoever weighs them: garbage collection, disk usage, fsck.

use std::collections::HashMap;

use kiln_oci::{ChainId, Digest, Reference, SnapshotId};
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::packed::{self, KEPT, KeptBlob, PackedRecord};
use crate::records::{self, word};
use crate::tables::{CACHE, CHAIN, IMAGE, LAYER, NAME, SOURCE, Writer};
use crate::{CacheRecord, Error, ImageRecord, LayerRecord, SourceRecord, Store};

/// A snapshot's use is written down at most this often.
const TOUCH_SECONDS: i64 = 3600;

/// What is known of the use of a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// What it alone takes on disk; `None` until somebody measures it.
    pub disk_bytes: Option<u64>,
    /// When a command last used it, to the hour; seconds since 1970. `None`: never since it was made.
    pub last_used_unix: Option<i64>,
    /// In how many different hours it was used.
    pub times_used: i64,
}

/// Every record of a store, as of one moment.
#[derive(Debug, Default)]
pub struct Survey {
    /// Images, newest first.
    pub images: Vec<ImageRecord>,
    /// Names and the images they lead to, sorted.
    pub names: Vec<(Reference, Digest)>,
    /// What snapshots are as layers.
    pub layers: Vec<LayerRecord>,
    /// Stacks of layers and the snapshots that hold them.
    pub chains: Vec<(ChainId, SnapshotId)>,
    /// Results of builds, by key.
    pub cache: Vec<(Digest, CacheRecord)>,
    /// Trees from outside, by key.
    pub sources: Vec<(Digest, SourceRecord)>,
    /// Layers packed for others.
    pub packed: Vec<PackedRecord>,
    /// Blobs that stay as long as their image.
    pub kept: Vec<KeptBlob>,
    /// Use of snapshots.
    pub usage: HashMap<SnapshotId, Usage>,
}

/// What may refer to a snapshot that is going to be removed; anything else keeps it.
#[derive(Debug, Clone, Default)]
pub struct Expected {
    /// Results of builds.
    pub cache: bool,
    /// Trees from outside.
    pub source: bool,
    /// Images without a name.
    pub images: Vec<Digest>,
}

fn all<T>(
    db: &Connection,
    sql: &str,
    record: impl FnMut(&Row<'_>) -> Result<T, rusqlite::Error>,
) -> Result<Vec<T>, rusqlite::Error> {
    db.prepare_cached(sql)?.query_map([], record)?.collect()
}

impl Store {
    /// Reads every record; nothing is pinned. Costs O(records).
    ///
    /// # Errors
    /// [`Error::Db`].
    pub fn survey(&self) -> Result<Survey, Error> {
        self.read(|db| {
            // One moment for all of them.
            let transaction = db.unchecked_transaction()?;
            let db = &transaction;
            Ok(Survey {
                images: all(db, "SELECT * FROM image ORDER BY created_unix DESC, config", records::image)?,
                names: all(db, "SELECT * FROM name ORDER BY reference", |row| {
                    Ok((word(row, "reference")?, word(row, "config")?))
                })?,
                layers: all(db, "SELECT * FROM layer ORDER BY snapshot", records::layer)?,
                chains: all(db, "SELECT * FROM chain ORDER BY chain", |row| {
                    Ok((ChainId(word(row, "chain")?), word(row, "snapshot")?))
                })?,
                cache: all(db, "SELECT * FROM cache ORDER BY key", |row| {
                    Ok((word(row, "key")?, records::cache(row)?))
                })?,
                sources: all(db, "SELECT * FROM source ORDER BY key", |row| {
                    Ok((word(row, "key")?, records::source(row)?))
                })?,
                packed: all(db, "SELECT * FROM packed ORDER BY key", packed::packed)?,
                kept: all(db, "SELECT * FROM kept ORDER BY key", packed::kept)?,
                usage: all(db, "SELECT * FROM usage", |row| {
                    let disk_bytes: Option<i64> = row.get("disk_bytes")?;
                    let usage = Usage {
                        disk_bytes: disk_bytes.and_then(|bytes| u64::try_from(bytes).ok()),
                        last_used_unix: row.get("last_used_unix")?,
                        times_used: row.get("times_used")?,
                    };
                    Ok((word(row, "snapshot")?, usage))
                })?
                .into_iter()
                .collect(),
            })
        })
    }

    /// Notes that what this handle has pinned was used. Writes at most once an hour for each
    /// snapshot; otherwise costs a look-up each.
    ///
    /// # Errors
    /// [`Error::Db`].
    pub fn note_use(&self, now_unix: i64) -> Result<(), Error> {
        let mut held = self.held_snapshots();
        self.read(|db| {
            // Locked once for all of them.
            let transaction = db.unchecked_transaction()?;
            let mut query =
                transaction.prepare_cached("SELECT last_used_unix FROM usage WHERE snapshot = ?1")?;
            let mut failed = None;
            held.retain(|id| {
                let last = query.query_row([id.as_str()], |row| row.get::<_, Option<i64>>(0)).optional();
                match last {
                    Ok(last) => last.flatten().is_none_or(|last| (now_unix - last).abs() >= TOUCH_SECONDS),
                    Err(error) => {
                        failed = Some(error);
                        false
                    }
                }
            });
            failed.map_or(Ok(()), Err)
        })?;
        if held.is_empty() {
            return Ok(());
        }
        self.write_aside(|db| {
            let mut query = db.prepare_cached(
                "INSERT INTO usage VALUES (?1, NULL, ?2, 1) ON CONFLICT (snapshot)
                 DO UPDATE SET last_used_unix = ?2, times_used = times_used + 1",
            )?;
            held.iter().try_for_each(|id| query.execute(params![id.as_str(), now_unix]).map(drop))
        })
    }

    /// Remembers what snapshots take on disk.
    ///
    /// # Errors
    /// [`Error::Db`].
    pub fn put_disk_bytes(&self, measured: &[(SnapshotId, u64)]) -> Result<(), Error> {
        if measured.is_empty() {
            return Ok(());
        }
        self.write_aside(|db| {
            let mut query = db.prepare_cached(
                "INSERT INTO usage (snapshot, disk_bytes) VALUES (?1, ?2) ON CONFLICT (snapshot)
                 DO UPDATE SET disk_bytes = ?2",
            )?;
            let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
            measured
                .iter()
                .try_for_each(|(id, size)| query.execute(params![id.as_str(), bytes(*size)]).map(drop))
        })
    }

    /// Forgets everything about a snapshot that nobody can pin meanwhile, unless something refers
    /// to it that is not `expected`; whether it did. Records first: then its data may go.
    ///
    /// # Errors
    /// [`Error::Db`].
    pub fn forget_snapshot(&self, id: &SnapshotId, expected: &Expected) -> Result<bool, Error> {
        let snapshot = id.as_str();
        self.write(|writer| {
            let db = writer.db();
            let exists = |sql: &str, key: &str| {
                db.prepare_cached(sql)?.query_row([key], |_| Ok(())).optional().map(|found| found.is_some())
            };
            if (!expected.cache && exists("SELECT 1 FROM cache WHERE snapshot = ?1", snapshot)?)
                || (!expected.source && exists("SELECT 1 FROM source WHERE snapshot = ?1", snapshot)?)
            {
                return Ok(false);
            }
            let configs: Vec<String> = db
                .prepare_cached("SELECT config FROM image WHERE snapshot = ?1")?
                .query_map([snapshot], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            for config in &configs {
                let known = expected.images.iter().any(|image| image.to_string() == *config);
                if !known || exists("SELECT 1 FROM name WHERE config = ?1", config)? {
                    return Ok(false);
                }
            }
            forget(writer, snapshot)?;
            Ok(true)
        })
    }

    /// Forgets everything about a snapshot, images and their names too: for one that is damaged or
    /// not there.
    ///
    /// # Errors
    /// [`Error::Db`].
    pub fn disown_snapshot(&self, id: &SnapshotId) -> Result<(), Error> {
        let sql = "SELECT config FROM image WHERE snapshot = ?1";
        self.write(|writer| {
            let configs: Vec<String> = writer
                .db()
                .prepare_cached(sql)?
                .query_map([id.as_str()], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            for config in &configs {
                writer.delete(&NAME, "config", config)?;
            }
            forget(writer, id.as_str())
        })
    }

    /// Forgets an image and its names: for one that is damaged.
    ///
    /// # Errors
    /// [`Error::Db`].
    pub fn disown_image(&self, config: &Digest) -> Result<(), Error> {
        let config = config.to_string();
        self.write(|writer| {
            writer.delete(&NAME, "config", &config)?;
            writer.delete(&KEPT, "config", &config)?;
            writer.delete(&IMAGE, "config", &config)?;
            Ok(())
        })
    }

    /// Forgets an image unless it has a name; whether it did.
    ///
    /// # Errors
    /// [`Error::Db`].
    pub fn forget_image(&self, config: &Digest) -> Result<bool, Error> {
        let config = config.to_string();
        self.write(|writer| {
            let sql = "SELECT 1 FROM name WHERE config = ?1";
            let named = writer.db().prepare_cached(sql)?.query_row([&config], |_| Ok(())).optional()?;
            if named.is_some() {
                return Ok(false);
            }
            let kept = writer.delete(&KEPT, "config", &config)?;
            Ok(writer.delete(&IMAGE, "config", &config)? + kept > 0)
        })
    }

    /// Whether a record refers to a blob.
    ///
    /// # Errors
    /// [`Error::Db`].
    pub fn is_blob_needed(&self, digest: &Digest) -> Result<bool, Error> {
        let sql = "SELECT EXISTS (SELECT 1 FROM image WHERE config = ?1 OR manifest = ?1)
                       OR EXISTS (SELECT 1 FROM layer WHERE blob = ?1)
                       OR EXISTS (SELECT 1 FROM packed JOIN layer USING (diff_id) WHERE packed.blob = ?1)
                       OR EXISTS (SELECT 1 FROM kept JOIN image USING (config) WHERE kept.blob = ?1)";
        self.read(|db| db.prepare_cached(sql)?.query_row([digest.to_string()], |row| row.get(0)))
    }

    /// Removes a blob that nobody can pin meanwhile and no record refers to; whether it was there.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn remove_blob(&self, digest: &Digest) -> Result<bool, Error> {
        let path = self.blob_path(digest);
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::host("unlink", path)(error)),
        }
    }

    /// Makes a layer's record one of a layer that is read out of its snapshot, for one whose blob is
    /// damaged.
    ///
    /// # Errors
    /// [`Error::Db`].
    pub fn forget_layer_blob(&self, snapshot: &SnapshotId) -> Result<(), Error> {
        match self.layer(snapshot)? {
            Some(record) => self.put_layer(&LayerRecord { blob: None, ..record }),
            None => Ok(()),
        }
    }
}

fn forget(writer: &mut Writer<'_>, snapshot: &str) -> Result<(), Error> {
    for table in [&IMAGE, &CACHE, &SOURCE, &CHAIN, &LAYER] {
        writer.delete(table, "snapshot", snapshot)?;
    }
    writer.forget_notes(snapshot);
    writer.db().execute("DELETE FROM usage WHERE snapshot = ?1", [snapshot])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::new_store;

    fn id(name: &str) -> SnapshotId {
        name.parse().unwrap()
    }

    fn cached(snapshot: &str) -> CacheRecord {
        let canonical = Digest::of(snapshot.as_bytes());
        CacheRecord { canonical, snapshot: id(snapshot), created_unix: 1, description: "RUN true".into() }
    }

    fn image(snapshot: &str) -> ImageRecord {
        let config = Digest::of(snapshot.as_bytes());
        let snapshot = Some(id(snapshot));
        ImageRecord { config, manifest: Digest::of(b"m"), snapshot, size_bytes: 5, created_unix: 6 }
    }

    #[test]
    fn snapshot_is_forgotten_only_when_nothing_unexpected_needs_it() {
        let (_dir, store) = new_store();
        store.cache_put(&[Digest::of(b"k")], &cached("s"), false).unwrap();
        store.put_image(&image("s")).unwrap();
        let config = image("s").config;
        let nothing = Expected::default();
        let cache = Expected { cache: true, ..nothing.clone() };
        let both = Expected { images: vec![config], ..cache.clone() };
        assert!(!store.forget_snapshot(&id("s"), &nothing).unwrap());
        assert!(!store.forget_snapshot(&id("s"), &cache).unwrap());
        store.set_name(&"app:1".parse().unwrap(), &image("s")).unwrap();
        assert!(!store.forget_snapshot(&id("s"), &both).unwrap(), "it has a name");
        assert!(!store.forget_image(&config).unwrap());
        store.remove_name(&"app:1".parse().unwrap(), &config).unwrap();
        assert!(store.forget_snapshot(&id("s"), &both).unwrap());
        let left = store.survey().unwrap();
        assert!(left.images.is_empty() && left.cache.is_empty());
        // Whoever still has it pinned may name it.
        store.set_name(&"app:1".parse().unwrap(), &image("s")).unwrap();
        assert_eq!(store.survey().unwrap().images.len(), 1);
    }

    #[test]
    fn damaged_snapshot_takes_its_images_and_their_names_along() {
        let (_dir, store) = new_store();
        for name in ["s", "t"] {
            store.put_image(&image(name)).unwrap();
            store.set_name(&name.parse().unwrap(), &image(name)).unwrap();
        }
        store.disown_snapshot(&id("s")).unwrap();
        let left = store.survey().unwrap();
        assert_eq!((left.images.len(), left.names.len()), (1, 1));
        store.disown_image(&image("t").config).unwrap();
        assert!(store.survey().unwrap().names.is_empty());
    }

    #[test]
    fn use_is_noted_once_an_hour() {
        let (_dir, store) = new_store();
        store.hold_snapshot(&id("s")).unwrap();
        store.put_disk_bytes(&[(id("s"), 4096)]).unwrap();
        let mut seen = Vec::new();
        for now in [10_000, 10_001, 13_599, 13_600, 50] {
            store.note_use(now).unwrap();
            let usage = store.survey().unwrap().usage[&id("s")];
            assert_eq!(usage.disk_bytes, Some(4096));
            seen.push((usage.last_used_unix.unwrap(), usage.times_used));
        }
        assert_eq!(seen, [(10_000, 1), (10_000, 1), (10_000, 1), (13_600, 2), (50, 3)]);
    }

    #[test]
    fn blobs_of_images_and_layers_are_needed() {
        let (_dir, store) = new_store();
        let blob = store.put_blob(b"blob").unwrap();
        assert!(!store.is_blob_needed(&blob).unwrap());
        let record = LayerRecord {
            snapshot: id("s"),
            diff_id: kiln_oci::DiffId(blob),
            size_bytes: 4,
            blob: Some(crate::LayerBlob { digest: blob, media_type: "x".into(), size_bytes: 4 }),
        };
        store.put_layer(&record).unwrap();
        assert!(store.is_blob_needed(&blob).unwrap());
        store.forget_layer_blob(&id("s")).unwrap();
        assert!(!store.is_blob_needed(&blob).unwrap());
        assert!(store.remove_blob(&blob).unwrap());
        assert!(!store.remove_blob(&blob).unwrap());
    }
}
