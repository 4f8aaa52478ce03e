//! Blobs that can be made again, and blobs that are kept for an image's sake.
//!
//! A layer that was packed for a push, save or export is remembered with its diff ID and the packing,
//! so that the next one finds the same bytes. An image that came with an index keeps the index, and
//! what it lists for other platforms.

use kiln_oci::{DiffId, Digest};
use rusqlite::types::Value;
use rusqlite::{OptionalExtension, Row};

use crate::records::{self, word};
use crate::tables::{Existing, Table, number, optional, text};
use crate::{Error, Store};

/// The tables' version of the index.
pub(crate) const MIGRATION: &str = "
CREATE TABLE packed (key TEXT PRIMARY KEY, diff_id TEXT NOT NULL, blob TEXT NOT NULL, size_bytes INTEGER NOT NULL, packed_diff_id TEXT NOT NULL, tar_size_bytes INTEGER NOT NULL, toc TEXT, boot TEXT) STRICT;
CREATE TABLE kept (key TEXT PRIMARY KEY, config TEXT NOT NULL, blob TEXT NOT NULL, root INTEGER NOT NULL, boot TEXT) STRICT;
CREATE INDEX layer_diff_id ON layer (diff_id);
CREATE INDEX packed_diff_id ON packed (diff_id);
CREATE INDEX packed_blob ON packed (blob);
CREATE INDEX kept_config ON kept (config);
CREATE INDEX kept_blob ON kept (blob);
CREATE INDEX packed_boot ON packed (boot) WHERE boot IS NOT NULL;
CREATE INDEX kept_boot ON kept (boot) WHERE boot IS NOT NULL;
";

pub(crate) static PACKED: Table = Table {
    name: "packed",
    columns: &["key", "diff_id", "blob", "size_bytes", "packed_diff_id", "tar_size_bytes", "toc"],
};
pub(crate) static KEPT: Table = Table { name: "kept", columns: &["key", "config", "blob", "root"] };

/// A layer as it was packed. The blob may be gone: then it is made again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedRecord {
    /// Digest of the layer's uncompressed tar.
    pub diff_id: DiffId,
    /// Digest of the packed layer.
    pub blob: Digest,
    /// Its size.
    pub size_bytes: u64,
    /// Digest of the tar inside: another one where the packing changes it.
    pub packed_diff_id: DiffId,
    /// Size of the tar inside.
    pub tar_size_bytes: u64,
    /// Digest of an eStargz layer's table of contents.
    pub toc: Option<Digest>,
}

/// A blob that stays as long as an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptBlob {
    /// The image.
    pub config: Digest,
    /// The blob: an index, or something that one leads to.
    pub blob: Digest,
    /// It is the index that the image came with.
    pub root: bool,
}

pub(crate) fn packed(row: &Row<'_>) -> Result<PackedRecord, rusqlite::Error> {
    let toc: Option<String> = row.get("toc")?;
    Ok(PackedRecord {
        diff_id: DiffId(word(row, "diff_id")?),
        blob: word(row, "blob")?,
        size_bytes: records::size(row, "size_bytes")?,
        packed_diff_id: DiffId(word(row, "packed_diff_id")?),
        tar_size_bytes: records::size(row, "tar_size_bytes")?,
        toc: toc.map(|_| word(row, "toc")).transpose()?,
    })
}

pub(crate) fn kept(row: &Row<'_>) -> Result<KeptBlob, rusqlite::Error> {
    Ok(KeptBlob { config: word(row, "config")?, blob: word(row, "blob")?, root: row.get("root")? })
}

fn key(diff_id: &DiffId, packing: &str) -> String {
    format!("{diff_id} {packing}")
}

impl Store {
    /// Remembers how a layer was packed; `packing` names everything that its bytes depend on besides
    /// the layer.
    ///
    /// # Errors
    /// [`Error::Db`]; so for all methods of this group.
    pub fn put_packed(&self, packing: &str, record: &PackedRecord) -> Result<(), Error> {
        let values = [
            text(key(&record.diff_id, packing)),
            text(record.diff_id),
            text(record.blob),
            number(record.size_bytes),
            text(record.packed_diff_id),
            number(record.tar_size_bytes),
            optional(record.toc),
        ];
        self.write(|db| Ok(db.put(&PACKED, Existing::Replace, values).map(drop)?))
    }

    /// A layer packed earlier, its blob there and pinned.
    pub fn packed(&self, diff_id: &DiffId, packing: &str) -> Result<Option<PackedRecord>, Error> {
        let find = "SELECT * FROM packed WHERE key = ?1";
        let found =
            self.read(|db| db.prepare_cached(find)?.query_row([key(diff_id, packing)], packed).optional())?;
        let Some(found) = found else { return Ok(None) };
        self.hold_blob(&found.blob)?;
        Ok(self.has_blob(&found.blob).then_some(found))
    }

    /// Whether the layer `diff_id` was once packed into `blob` here, as it is.
    pub fn was_packed_into(&self, diff_id: &DiffId, blob: &Digest) -> Result<bool, Error> {
        let find =
            "SELECT EXISTS (SELECT 1 FROM packed WHERE blob = ?1 AND diff_id = ?2 AND packed_diff_id = ?2)";
        let values = [blob.to_string(), diff_id.to_string()];
        self.read(|db| db.prepare_cached(find)?.query_row(values, |row| row.get(0)))
    }

    /// Forgets every layer that was packed into `blob`: the next one to need it packs it again.
    pub fn forget_packed(&self, blob: &Digest) -> Result<(), Error> {
        self.write(|db| Ok(db.delete(&PACKED, "blob", &blob.to_string()).map(drop)?))
    }

    /// Forgets the index that the image `config` came with, and what was kept for its sake. The image
    /// stays.
    pub fn forget_index(&self, config: &Digest) -> Result<(), Error> {
        self.write(|db| Ok(db.delete(&KEPT, "config", &config.to_string()).map(drop)?))
    }

    /// Keeps `blobs` as long as the image `config` is in the store; `index` is the one of them that
    /// leads to the others. Replaces what was kept for it.
    pub fn keep_index(&self, config: &Digest, index: &Digest, blobs: &[Digest]) -> Result<(), Error> {
        let id = config.to_string();
        self.write(|db| {
            db.delete(&KEPT, "config", &id)?;
            for blob in blobs.iter().chain([index]) {
                let root = Value::Integer((blob == index).into());
                let values = [text(format!("{config} {blob}")), text(&id), text(blob), root];
                db.put(&KEPT, Existing::Replace, values)?;
            }
            Ok(())
        })
    }

    /// The index that the image `config` came with, pinned with what is kept beside it.
    pub fn index_of(&self, config: &Digest) -> Result<Option<Digest>, Error> {
        let kept: Vec<KeptBlob> = self.read(|db| {
            let mut query = db.prepare_cached("SELECT * FROM kept WHERE config = ?1 ORDER BY blob")?;
            query.query_map([config.to_string()], kept)?.collect()
        })?;
        kept.iter().try_for_each(|kept| self.hold_blob(&kept.blob).map(drop))?;
        let root = kept.iter().find(|kept| kept.root).map(|kept| kept.blob);
        Ok(root.filter(|root| self.has_blob(root)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::new_store;
    use crate::{ImageRecord, Named};

    #[test]
    fn packed_layers_are_found_while_their_blob_is_there() {
        let (_dir, store) = new_store();
        let (diff_id, other) = (DiffId(Digest::of(b"tar")), DiffId(Digest::of(b"other")));
        let blob = store.put_blob(b"packed").unwrap();
        let record = PackedRecord {
            diff_id,
            blob,
            size_bytes: 6,
            packed_diff_id: other,
            tar_size_bytes: 3,
            toc: Some(Digest::of(b"toc")),
        };
        store.put_packed("gzip:6", &record).unwrap();
        assert_eq!(store.packed(&diff_id, "gzip:6").unwrap(), Some(record.clone()));
        assert_eq!(store.packed(&diff_id, "gzip:9").unwrap(), None);
        assert_eq!(store.packed(&other, "gzip:6").unwrap(), None);
        let gone = PackedRecord { blob: Digest::of(b"gone"), toc: None, ..record };
        store.put_packed("gzip:6", &gone).unwrap();
        assert_eq!(store.packed(&diff_id, "gzip:6").unwrap(), None);
        assert_eq!(store.survey().unwrap().packed.len(), 1);
        // Only what has the layer's own tar inside is the layer.
        assert!(!store.was_packed_into(&diff_id, &gone.blob).unwrap());
        let whole = PackedRecord { packed_diff_id: diff_id, ..gone };
        store.put_packed("gzip:6", &whole).unwrap();
        assert!(store.was_packed_into(&diff_id, &whole.blob).unwrap());
        assert!(!store.was_packed_into(&other, &whole.blob).unwrap());
        assert!(!store.was_packed_into(&diff_id, &blob).unwrap());
        store.forget_packed(&Digest::of(b"gone")).unwrap();
        assert_eq!(store.survey().unwrap().packed, []);
    }

    #[test]
    fn an_index_is_kept_with_what_it_lists() {
        let (_dir, store) = new_store();
        let config = Digest::of(b"config");
        let index = store.put_blob(b"index").unwrap();
        let others = [Digest::of(b"a"), Digest::of(b"b")];
        assert_eq!(store.index_of(&config).unwrap(), None);
        store.keep_index(&config, &index, &others).unwrap();
        assert_eq!(store.index_of(&config).unwrap(), Some(index));
        let image = ImageRecord { config, manifest: index, snapshot: None, size_bytes: 0, created_unix: 0 };
        let name = "app:1".parse().unwrap();
        assert_eq!(store.set_name(&name, &image).unwrap(), Named::Anew);
        assert_eq!(store.set_name(&name, &image).unwrap(), Named::Already { has_index: true });
        let other = "app:2".parse().unwrap();
        assert_eq!(store.set_name(&other, &image).unwrap(), Named::Anew);
        assert_eq!(store.survey().unwrap().kept.len(), 3);
        store.keep_index(&config, &index, &[]).unwrap();
        assert_eq!(store.survey().unwrap().kept.len(), 1);
        store.forget_index(&config).unwrap();
        assert_eq!(store.set_name(&name, &image).unwrap(), Named::Already { has_index: false });
        assert_eq!(store.survey().unwrap().kept, []);
        store.keep_index(&config, &index, &others).unwrap();
        for name in [&name, &other] {
            assert!(store.remove_name(name, &config).unwrap());
        }
        assert!(store.forget_image(&config).unwrap());
        assert_eq!(store.index_of(&config).unwrap(), None);
    }
}
