//! Records: images, names, layers, chains, cached results.

use std::fmt::Display;
use std::str::FromStr;

use kiln_oci::{ChainId, DiffId, Digest, Reference, SnapshotId};
use rusqlite::{OptionalExtension, Row, named_params, params};

use crate::{Error, Store};

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// Digest of its config: the image ID. A blob.
    pub config: Digest,
    /// Digest of its manifest. A blob.
    pub manifest: Digest,
    /// Its files; `None` for an image without layers.
    pub snapshot: Option<SnapshotId>,
    /// Sum of its uncompressed layers.
    pub size_bytes: u64,
    /// When it came into the store; seconds since 1970.
    pub created_unix: i64,
}

/// What is known of a committed snapshot as a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRecord {
    /// Which snapshot.
    pub snapshot: SnapshotId,
    /// Digest of its uncompressed tar.
    pub diff_id: DiffId,
    /// Size of its uncompressed tar.
    pub size_bytes: u64,
    /// The blob it came as; `None` for one made here, whose tar is read out of the snapshot.
    pub blob: Option<LayerBlob>,
}

/// A layer's blob as it came from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerBlob {
    /// Digest of the blob, compressed as it is.
    pub digest: Digest,
    /// What it is.
    pub media_type: String,
    /// Its size.
    pub size_bytes: u64,
}

/// A result of an earlier build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheRecord {
    /// The key that users of the result build theirs from.
    pub canonical: Digest,
    /// The result.
    pub snapshot: SnapshotId,
    /// When it was made; seconds since 1970.
    pub created_unix: i64,
    /// The step as the user wrote it.
    pub description: String,
}

/// A tree that came from outside, and how to ask whether it is still the newest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceRecord {
    /// The tree.
    pub snapshot: SnapshotId,
    /// Digest of the one file in it; `None` for a tree of many.
    pub content: Option<Digest>,
    /// The server's `ETag`, as it was sent.
    pub etag: Option<String>,
    /// The server's `Last-Modified`, as it was sent; for a commit its time, in seconds since 1970.
    pub last_modified: Option<String>,
    /// When it came; seconds since 1970.
    pub created_unix: i64,
}

/// A column that holds one of our words as text.
fn word<T: FromStr<Err: Display>>(row: &Row<'_>, column: &str) -> Result<T, rusqlite::Error> {
    optional_word(row, column)?.ok_or_else(|| bad(column, "it is empty"))
}

fn optional_word<T: FromStr<Err: Display>>(
    row: &Row<'_>,
    column: &str,
) -> Result<Option<T>, rusqlite::Error> {
    let text: Option<String> = row.get(column)?;
    text.map(|text| text.parse().map_err(|error| bad(column, error))).transpose()
}

fn bad(column: &str, error: impl Display) -> rusqlite::Error {
    let error = Error::Damaged { what: format!("{column}: {error}") };
    rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, Box::new(error))
}

fn size(row: &Row<'_>, column: &str) -> Result<u64, rusqlite::Error> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|error| bad(column, error))
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn image(row: &Row<'_>) -> Result<ImageRecord, rusqlite::Error> {
    Ok(ImageRecord {
        config: word(row, "config")?,
        manifest: word(row, "manifest")?,
        snapshot: optional_word(row, "snapshot")?,
        size_bytes: size(row, "size_bytes")?,
        created_unix: row.get("created_unix")?,
    })
}

fn layer(row: &Row<'_>) -> Result<LayerRecord, rusqlite::Error> {
    let blob = match optional_word(row, "blob")? {
        None => None,
        Some(digest) => Some(LayerBlob {
            digest,
            media_type: row.get("media_type")?,
            size_bytes: size(row, "blob_bytes")?,
        }),
    };
    let diff_id = DiffId(word(row, "diff_id")?);
    Ok(LayerRecord { snapshot: word(row, "snapshot")?, diff_id, size_bytes: size(row, "size_bytes")?, blob })
}

impl Store {
    /// Records an image whose blobs and snapshot are in the store.
    ///
    /// # Errors
    /// [`Error::Db`]; so for all methods of this group.
    pub fn put_image(&self, record: &ImageRecord) -> Result<(), Error> {
        let ImageRecord { config, manifest, snapshot, size_bytes, created_unix } = record;
        self.write(|db| {
            db.execute(
                "INSERT OR REPLACE INTO image VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![
                    config.to_string(),
                    manifest.to_string(),
                    snapshot.as_ref().map(SnapshotId::as_str),
                    signed(*size_bytes),
                    created_unix,
                    self.boot
                ],
            )
            .map(drop)
        })
    }

    /// The image with this ID.
    pub fn image(&self, config: &Digest) -> Result<Option<ImageRecord>, Error> {
        let db = self.db();
        let mut query = db.prepare_cached("SELECT * FROM image WHERE config = ?1")?;
        Ok(query.query_row([config.to_string()], image).optional()?)
    }

    /// All images, newest first.
    pub fn images(&self) -> Result<Vec<ImageRecord>, Error> {
        let db = self.db();
        let mut query = db.prepare_cached("SELECT * FROM image ORDER BY created_unix DESC, config")?;
        Ok(query.query_map([], image)?.collect::<Result<_, _>>()?)
    }

    /// Forgets an image; its blobs and snapshots stay for the build cache.
    pub fn remove_image(&self, config: &Digest) -> Result<(), Error> {
        self.write(|db| db.execute("DELETE FROM image WHERE config = ?1", [config.to_string()]).map(drop))
    }

    /// Lets `reference` lead to an image that is in the store.
    pub fn set_name(&self, reference: &Reference, config: &Digest) -> Result<(), Error> {
        let (reference, config) = (reference.to_string(), config.to_string());
        let known = {
            let db = self.db();
            let mut query = db.prepare_cached("SELECT config FROM name WHERE reference = ?1")?;
            query.query_row([&reference], |row| row.get::<_, String>(0)).optional()?
        };
        if known.as_ref() == Some(&config) {
            return Ok(());
        }
        self.write(|db| {
            db.execute(
                "INSERT OR REPLACE INTO name VALUES (?1, ?2, ?3)",
                params![reference, config, self.boot],
            )
            .map(drop)
        })
    }

    /// The image `reference` leads to.
    pub fn resolve(&self, reference: &Reference) -> Result<Option<ImageRecord>, Error> {
        let db = self.db();
        let sql = "SELECT image.* FROM name JOIN image USING (config) WHERE reference = ?1";
        Ok(db.prepare_cached(sql)?.query_row([reference.to_string()], image).optional()?)
    }

    /// Removes a name; whether it was there.
    pub fn remove_name(&self, reference: &Reference) -> Result<bool, Error> {
        let removed =
            self.write(|db| db.execute("DELETE FROM name WHERE reference = ?1", [reference.to_string()]))?;
        Ok(removed > 0)
    }

    /// The names of an image, sorted.
    pub fn names_of(&self, config: &Digest) -> Result<Vec<Reference>, Error> {
        let db = self.db();
        let mut query =
            db.prepare_cached("SELECT reference FROM name WHERE config = ?1 ORDER BY reference")?;
        let names = query.query_map([config.to_string()], |row| word(row, "reference"))?;
        Ok(names.collect::<Result<_, _>>()?)
    }

    /// Images whose ID starts with these hexadecimal digits.
    pub fn find_by_prefix(&self, hex: &str) -> Result<Vec<ImageRecord>, Error> {
        if hex.is_empty() || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(Vec::new());
        }
        let db = self.db();
        let mut query = db.prepare_cached("SELECT * FROM image WHERE config GLOB ?1")?;
        Ok(query.query_map([format!("sha256:{hex}*")], image)?.collect::<Result<_, _>>()?)
    }

    /// Records a layer whose snapshot is committed.
    pub fn put_layer(&self, record: &LayerRecord) -> Result<(), Error> {
        let blob = record.blob.as_ref();
        self.write(|db| {
            db.execute(
                "INSERT OR REPLACE INTO layer VALUES (:snapshot, :diff, :size, :blob, :media, :bytes, :boot)",
                named_params! {
                    ":snapshot": record.snapshot.as_str(),
                    ":diff": record.diff_id.to_string(),
                    ":size": signed(record.size_bytes),
                    ":blob": blob.map(|blob| blob.digest.to_string()),
                    ":media": blob.map(|blob| blob.media_type.as_str()),
                    ":bytes": blob.map(|blob| signed(blob.size_bytes)),
                    ":boot": self.boot,
                },
            )
            .map(drop)
        })
    }

    /// What is known of a snapshot as a layer; `None` while its diff ID is pending.
    pub fn layer(&self, snapshot: &SnapshotId) -> Result<Option<LayerRecord>, Error> {
        let db = self.db();
        let mut query = db.prepare_cached("SELECT * FROM layer WHERE snapshot = ?1")?;
        Ok(query.query_row([snapshot.as_str()], layer).optional()?)
    }

    /// Records which snapshot holds a stack of layers; the first one stays.
    pub fn put_chain(&self, chain: &ChainId, snapshot: &SnapshotId) -> Result<(), Error> {
        let values = params![chain.to_string(), snapshot.as_str(), self.boot];
        self.write(|db| db.execute("INSERT OR IGNORE INTO chain VALUES (?1, ?2, ?3)", values).map(drop))
    }

    /// The snapshot that holds a stack of layers.
    pub fn snapshot_by_chain(&self, chain: &ChainId) -> Result<Option<SnapshotId>, Error> {
        let db = self.db();
        let mut query = db.prepare_cached("SELECT snapshot FROM chain WHERE chain = ?1")?;
        Ok(query.query_row([chain.to_string()], |row| word(row, "snapshot")).optional()?)
    }

    /// Records a tree from outside whose snapshot is committed; replaces an older one of this key.
    ///
    /// `key` is a digest of where it came from and how it was asked for.
    pub fn put_source(&self, key: &Digest, record: &SourceRecord) -> Result<(), Error> {
        let SourceRecord { snapshot, content, etag, last_modified, created_unix } = record;
        self.write(|db| {
            db.execute(
                "INSERT OR REPLACE INTO source VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                params![
                    key.to_string(),
                    snapshot.as_str(),
                    content.map(|content| content.to_string()),
                    etag,
                    last_modified,
                    created_unix,
                    self.boot
                ],
            )
            .map(drop)
        })
    }

    /// The tree from outside with this key.
    pub fn source(&self, key: &Digest) -> Result<Option<SourceRecord>, Error> {
        let db = self.db();
        let mut query = db.prepare_cached("SELECT * FROM source WHERE key = ?1")?;
        let record = |row: &Row<'_>| {
            Ok(SourceRecord {
                snapshot: word(row, "snapshot")?,
                content: optional_word(row, "content")?,
                etag: row.get("etag")?,
                last_modified: row.get("last_modified")?,
                created_unix: row.get("created_unix")?,
            })
        };
        Ok(query.query_row([key.to_string()], record).optional()?)
    }

    /// The result saved under `key`.
    pub fn cache_get(&self, key: &Digest) -> Result<Option<CacheRecord>, Error> {
        let db = self.db();
        let mut query = db.prepare_cached("SELECT * FROM cache WHERE key = ?1")?;
        let record = |row: &Row<'_>| {
            Ok(CacheRecord {
                canonical: word(row, "canonical")?,
                snapshot: word(row, "snapshot")?,
                created_unix: row.get("created_unix")?,
                description: row.get("description")?,
            })
        };
        Ok(query.query_row([key.to_string()], record).optional()?)
    }

    /// Saves a result under all `keys` at once. Without `replace` the first result stays, so that
    /// two builds at once agree.
    pub fn cache_put(&self, keys: &[Digest], record: &CacheRecord, replace: bool) -> Result<(), Error> {
        let how = if replace { "REPLACE" } else { "IGNORE" };
        let sql = format!("INSERT OR {how} INTO cache VALUES (?1, ?2, ?3, ?4, ?5, ?6)");
        self.write(|db| {
            for key in keys {
                db.execute(
                    &sql,
                    params![
                        key.to_string(),
                        record.canonical.to_string(),
                        record.snapshot.as_str(),
                        record.created_unix,
                        record.description,
                        self.boot
                    ],
                )?;
            }
            Ok(())
        })
    }

    /// Forgets all results that are this snapshot.
    pub fn cache_forget_snapshot(&self, snapshot: &SnapshotId) -> Result<(), Error> {
        self.write(|db| db.execute("DELETE FROM cache WHERE snapshot = ?1", [snapshot.as_str()]).map(drop))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(text: &str) -> ImageRecord {
        let digest = Digest::of(text.as_bytes());
        let snapshot = Some("s-1".parse().unwrap());
        ImageRecord { config: digest, manifest: digest, snapshot, size_bytes: 7, created_unix: 9 }
    }

    #[test]
    fn names_lead_to_images_and_move() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let name: Reference = "app:1".parse().unwrap();
        let (old, new) = (record("old"), record("new"));
        store.put_image(&old).unwrap();
        store.put_image(&new).unwrap();
        store.set_name(&name, &old.config).unwrap();
        assert_eq!(store.resolve(&name).unwrap(), Some(old.clone()));
        store.set_name(&name, &new.config).unwrap();
        assert_eq!(store.names_of(&new.config).unwrap(), std::slice::from_ref(&name));
        assert!(store.names_of(&old.config).unwrap().is_empty());
        assert_eq!(store.find_by_prefix(&old.config.hex()[..8]).unwrap(), [old]);
        assert!(store.remove_name(&name).unwrap());
        assert!(!store.remove_name(&name).unwrap());
        assert_eq!(store.resolve(&name).unwrap(), None);
    }

    #[test]
    fn first_cached_result_stays_unless_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let key = Digest::of(b"key");
        let result = |name: &str| CacheRecord {
            canonical: key,
            snapshot: name.parse().unwrap(),
            created_unix: 1,
            description: "RUN true".to_owned(),
        };
        store.cache_put(&[key], &result("first"), false).unwrap();
        store.cache_put(&[key], &result("second"), false).unwrap();
        assert_eq!(store.cache_get(&key).unwrap(), Some(result("first")));
        store.cache_put(&[key], &result("third"), true).unwrap();
        assert_eq!(store.cache_get(&key).unwrap(), Some(result("third")));
        store.cache_forget_snapshot(&"third".parse().unwrap()).unwrap();
        assert_eq!(store.cache_get(&key).unwrap(), None);
    }

    #[test]
    fn newest_tree_from_outside_replaces_the_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let key = Digest::of(b"https://host/file");
        let record = |etag: Option<&str>| SourceRecord {
            snapshot: "s".parse().unwrap(),
            content: etag.map(|etag| Digest::of(etag.as_bytes())),
            etag: etag.map(str::to_owned),
            last_modified: None,
            created_unix: 3,
        };
        store.put_source(&key, &record(Some("\"1\""))).unwrap();
        assert_eq!(store.source(&key).unwrap(), Some(record(Some("\"1\""))));
        store.put_source(&key, &record(None)).unwrap();
        assert_eq!(store.source(&key).unwrap(), Some(record(None)));
        assert_eq!(store.source(&Digest::of(b"other")).unwrap(), None);
    }

    #[test]
    fn two_processes_worth_of_handles_write_side_by_side() {
        let dir = tempfile::tempdir().unwrap();
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let root = dir.path().to_owned();
                std::thread::spawn(move || {
                    let store = Store::open(&root).unwrap();
                    for number in 0..50 {
                        store.put_image(&record(&format!("{thread}-{number}"))).unwrap();
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(Store::open(dir.path()).unwrap().images().unwrap().len(), 200);
    }
}
