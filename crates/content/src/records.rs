//! Records: images, names, layers, chains, cached results.

use std::fmt::Display;
use std::str::FromStr;

use kiln_oci::{ChainId, DiffId, Digest, Reference, SnapshotId};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row};

use crate::tables::{CACHE, CHAIN, Existing, IMAGE, LAYER, NAME, SOURCE, Writer, number, optional, text};
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

/// What [`Store::set_name`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// The name led elsewhere, or was none.
    Anew,
    /// The name led to the image.
    Already {
        /// An index is kept beside the image.
        has_index: bool,
    },
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
pub(crate) fn word<T: FromStr<Err: Display>>(row: &Row<'_>, column: &str) -> Result<T, rusqlite::Error> {
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

pub(crate) fn size(row: &Row<'_>, column: &str) -> Result<u64, rusqlite::Error> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|error| bad(column, error))
}

pub(crate) fn image(row: &Row<'_>) -> Result<ImageRecord, rusqlite::Error> {
    Ok(ImageRecord {
        config: word(row, "config")?,
        manifest: word(row, "manifest")?,
        snapshot: optional_word(row, "snapshot")?,
        size_bytes: size(row, "size_bytes")?,
        created_unix: row.get("created_unix")?,
    })
}

pub(crate) fn layer(row: &Row<'_>) -> Result<LayerRecord, rusqlite::Error> {
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

pub(crate) fn source(row: &Row<'_>) -> Result<SourceRecord, rusqlite::Error> {
    Ok(SourceRecord {
        snapshot: word(row, "snapshot")?,
        content: optional_word(row, "content")?,
        etag: row.get("etag")?,
        last_modified: row.get("last_modified")?,
        created_unix: row.get("created_unix")?,
    })
}

pub(crate) fn cache(row: &Row<'_>) -> Result<CacheRecord, rusqlite::Error> {
    Ok(CacheRecord {
        canonical: word(row, "canonical")?,
        snapshot: word(row, "snapshot")?,
        created_unix: row.get("created_unix")?,
        description: row.get("description")?,
    })
}

fn one<T>(
    db: &Connection,
    sql: &str,
    key: &str,
    record: impl FnOnce(&Row<'_>) -> Result<T, rusqlite::Error>,
) -> Result<Option<T>, rusqlite::Error> {
    db.prepare_cached(sql)?.query_row([key], record).optional()
}

fn image_row(image: &ImageRecord) -> [Value; 5] {
    let ImageRecord { config, manifest, snapshot, size_bytes, created_unix } = image;
    [
        text(config),
        text(manifest),
        optional(snapshot.as_ref()),
        number(*size_bytes),
        Value::Integer(*created_unix),
    ]
}

impl Store {
    /// Records an image whose blobs and snapshot are in the store.
    ///
    /// # Errors
    /// [`Error::Db`]; so for all methods of this group.
    pub fn put_image(&self, record: &ImageRecord) -> Result<(), Error> {
        self.write(|db| Ok(db.put(&IMAGE, Existing::Replace, image_row(record)).map(drop)?))
    }

    /// The image with this ID, pinned with its files.
    pub fn image(&self, config: &Digest) -> Result<Option<ImageRecord>, Error> {
        let find =
            || self.read(|db| one(db, "SELECT * FROM image WHERE config = ?1", &config.to_string(), image));
        self.held(find()?, find)
    }

    /// Pins a found image; looks again, because it may have gone before the pin was there.
    fn held(
        &self,
        found: Option<ImageRecord>,
        again: impl Fn() -> Result<Option<ImageRecord>, Error>,
    ) -> Result<Option<ImageRecord>, Error> {
        let mut found = found;
        while let Some(image) = &found {
            let mut is_new = self.hold_blob(&image.config)? | self.hold_blob(&image.manifest)?;
            if let Some(snapshot) = &image.snapshot {
                is_new |= self.hold_snapshot(snapshot)?;
            }
            if !is_new {
                break;
            }
            let now = again()?;
            if now == found {
                break;
            }
            found = now;
        }
        Ok(found)
    }

    /// All images, newest first; nothing is pinned.
    pub fn images(&self) -> Result<Vec<ImageRecord>, Error> {
        self.read(|db| {
            let mut query = db.prepare_cached("SELECT * FROM image ORDER BY created_unix DESC, config")?;
            query.query_map([], image)?.collect()
        })
    }

    /// All names with what they lead to, sorted; nothing is pinned.
    pub fn names(&self) -> Result<Vec<(Reference, ImageRecord)>, Error> {
        self.read(|db| {
            let sql = "SELECT reference, image.* FROM name JOIN image USING (config) ORDER BY reference";
            let mut query = db.prepare_cached(sql)?;
            query.query_map([], |row| Ok((word(row, "reference")?, image(row)?)))?.collect()
        })
    }

    /// Lets `reference` lead to `image`, whose blobs and files the caller has pinned. Its record is
    /// made again if somebody took away its last name meanwhile, and with it the record.
    pub fn set_name(&self, reference: &Reference, image: &ImageRecord) -> Result<Named, Error> {
        let (reference, id) = (reference.to_string(), image.config.to_string());
        let sql = "SELECT config, coalesce(name.boot, image.boot) IS NOT NULL, \
                       EXISTS (SELECT 1 FROM kept WHERE kept.config = name.config) \
                       FROM name JOIN image USING (config) WHERE reference = ?1";
        let known = |row: &Row<'_>| Ok((row.get::<_, String>(0)?, row.get(1)?, row.get(2)?));
        let known = self.read(|db| one(db, sql, &reference, known))?;
        if let Some((known, is_loose, has_index)) = known
            && known == id
        {
            if is_loose {
                self.needs_barrier();
            }
            return Ok(Named::Already { has_index });
        }
        self.write(|db| {
            db.put(&IMAGE, Existing::Keep, image_row(image))?;
            db.put(&NAME, Existing::Replace, [text(&reference), text(&id)])?;
            Ok(Named::Anew)
        })
    }

    /// The image `reference` leads to, pinned with its files.
    pub fn resolve(&self, reference: &Reference) -> Result<Option<ImageRecord>, Error> {
        let sql = "SELECT image.* FROM name JOIN image USING (config) WHERE reference = ?1";
        let find = || self.read(|db| one(db, sql, &reference.to_string(), image));
        self.held(find()?, find)
    }

    /// The config of the image `reference` leads to; nothing is pinned.
    pub fn config_of(&self, reference: &Reference) -> Result<Option<Digest>, Error> {
        let sql = "SELECT config FROM name JOIN image USING (config) WHERE reference = ?1";
        self.read(|db| one(db, sql, &reference.to_string(), |row| word(row, "config")))
    }

    /// Removes a name that leads to `config`; whether it was there and did.
    pub fn remove_name(&self, reference: &Reference, config: &Digest) -> Result<bool, Error> {
        let (reference, config) = (reference.to_string(), config.to_string());
        let known = "SELECT config FROM name WHERE reference = ?1";
        self.write(|db| {
            let leads_to: Option<String> = one(db.db(), known, &reference, |row| row.get(0))?;
            Ok(leads_to == Some(config) && db.delete(&NAME, "reference", &reference)? > 0)
        })
    }

    /// The names of an image, sorted.
    pub fn names_of(&self, config: &Digest) -> Result<Vec<Reference>, Error> {
        self.read(|db| {
            let mut query =
                db.prepare_cached("SELECT reference FROM name WHERE config = ?1 ORDER BY reference")?;
            query.query_map([config.to_string()], |row| word(row, "reference"))?.collect()
        })
    }

    /// Images whose ID starts with these hexadecimal digits; the only one is pinned with its files.
    pub fn find_by_prefix(&self, hex: &str) -> Result<Vec<ImageRecord>, Error> {
        if hex.is_empty() || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(Vec::new());
        }
        let found: Vec<ImageRecord> = self.read(|db| {
            let mut query = db.prepare_cached("SELECT * FROM image WHERE config GLOB ?1")?;
            query.query_map([format!("sha256:{hex}*")], image)?.collect()
        })?;
        match found.as_slice() {
            [only] => Ok(self.image(&only.config)?.into_iter().collect()),
            _ => Ok(found),
        }
    }

    /// Records a layer whose snapshot is committed.
    pub fn put_layer(&self, record: &LayerRecord) -> Result<(), Error> {
        let blob = record.blob.as_ref();
        let values = [
            text(&record.snapshot),
            text(record.diff_id),
            number(record.size_bytes),
            optional(blob.map(|blob| blob.digest)),
            optional(blob.map(|blob| &blob.media_type)),
            blob.map_or(Value::Null, |blob| number(blob.size_bytes)),
        ];
        self.write(|db| Ok(db.put(&LAYER, Existing::Replace, values).map(drop)?))
    }

    /// What is known of a snapshot as a layer; `None` while its diff ID is pending.
    pub fn layer(&self, snapshot: &SnapshotId) -> Result<Option<LayerRecord>, Error> {
        self.read(|db| one(db, "SELECT * FROM layer WHERE snapshot = ?1", snapshot.as_str(), layer))
    }

    /// Records which snapshot holds a stack of layers; the first one stays.
    pub fn put_chain(&self, chain: &ChainId, snapshot: &SnapshotId) -> Result<(), Error> {
        let values = [text(chain), text(snapshot)];
        self.write(|db| Ok(db.put(&CHAIN, Existing::Keep, values).map(drop)?))
    }

    /// The snapshot that holds a stack of layers, pinned; it may be gone.
    pub fn snapshot_by_chain(&self, chain: &ChainId) -> Result<Option<SnapshotId>, Error> {
        let sql = "SELECT snapshot FROM chain WHERE chain = ?1";
        let found = self.read(|db| one(db, sql, &chain.to_string(), |row| word(row, "snapshot")))?;
        found.iter().try_for_each(|snapshot| self.hold_snapshot(snapshot).map(drop))?;
        Ok(found)
    }

    /// Records a tree from outside whose snapshot is committed; replaces an older one of this key.
    ///
    /// `key` is a digest of where it came from and how it was asked for.
    pub fn put_source(&self, key: &Digest, record: &SourceRecord) -> Result<(), Error> {
        let SourceRecord { snapshot, content, etag, last_modified, created_unix } = record;
        let values = [
            text(key),
            text(snapshot),
            optional(content.as_ref()),
            optional(etag.as_ref()),
            optional(last_modified.as_ref()),
            Value::Integer(*created_unix),
        ];
        self.write(|db| Ok(db.put(&SOURCE, Existing::Replace, values).map(drop)?))
    }

    /// The tree from outside with this key, pinned; its snapshot may be gone.
    pub fn source(&self, key: &Digest) -> Result<Option<SourceRecord>, Error> {
        let sql = "SELECT * FROM source WHERE key = ?1";
        let found = self.read(|db| one(db, sql, &key.to_string(), source))?;
        found.iter().try_for_each(|found| self.hold_snapshot(&found.snapshot).map(drop))?;
        Ok(found)
    }

    /// The result saved under `key`, pinned; its snapshot may be gone.
    pub fn cache_get(&self, key: &Digest) -> Result<Option<CacheRecord>, Error> {
        let sql = "SELECT * FROM cache WHERE key = ?1";
        let found = self.read(|db| one(db, sql, &key.to_string(), cache))?;
        found.iter().try_for_each(|found| self.hold_snapshot(&found.snapshot).map(drop))?;
        Ok(found)
    }

    /// Saves a result under all `keys` at once. Without `replace` the first result stays, so that
    /// two builds at once agree.
    pub fn cache_put(&self, keys: &[Digest], record: &CacheRecord, replace: bool) -> Result<(), Error> {
        let existing = if replace { Existing::Replace } else { Existing::Keep };
        self.write(|db| {
            for key in keys {
                let values = [
                    text(key),
                    text(record.canonical),
                    text(&record.snapshot),
                    Value::Integer(record.created_unix),
                    text(&record.description),
                ];
                db.put(&CACHE, existing, values)?;
            }
            Ok(())
        })
    }

    /// Forgets all results that are this snapshot.
    pub fn cache_forget_snapshot(&self, snapshot: &SnapshotId) -> Result<(), Error> {
        self.write(|db: &mut Writer<'_>| Ok(db.delete(&CACHE, "snapshot", snapshot.as_str()).map(drop)?))
    }
}

#[cfg(test)]
mod tests;
