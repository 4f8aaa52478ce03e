//! A cached result in words: what its files consist of.

use std::collections::BTreeSet;

use kiln_oci::image::media_type;
use kiln_oci::{DiffId, Digest};
use serde::{Deserialize, Serialize};

/// Version of the format; others are not read.
const VERSION: u32 = 1;

/// Records beyond this size are refused unread.
pub const MAX_RECORD_BYTES: u64 = 256 << 10;

/// Records of more layers are refused: nothing could stack them.
pub const MAX_LAYERS: usize = 512;

/// Longer titles are cut.
const MAX_TITLE_BYTES: usize = 1000;

/// A blob or layer beyond this size (8 EiB) is no size.
const MAX_SIZE_BYTES: u64 = i64::MAX as u64;

/// A result, as one machine tells another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    version: u32,
    /// What it is the answer to: an object that was copied to another name answers nothing.
    key: Digest,
    /// The key that users of the result build theirs from.
    pub canonical: Digest,
    /// When it was made; seconds since 1970.
    pub created_unix: i64,
    /// The step as the user wrote it.
    pub title: String,
    /// What its files consist of, lowest first; none: no files.
    pub layers: Vec<RecordLayer>,
}

/// A layer of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecordLayer {
    /// Digest of its tar.
    pub diff_id: DiffId,
    /// Size of its tar.
    pub size_bytes: u64,
    /// Digest of its blob.
    pub blob: Digest,
    /// Size of its blob.
    pub blob_bytes: u64,
    /// What the blob is.
    pub media_type: String,
    /// When a step made it; seconds since 1970. `None`: it is part of an image from elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_unix: Option<i64>,
}

/// Why a record is not believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// More bytes than a record has.
    #[error("it is larger than {MAX_RECORD_BYTES} bytes")]
    Large,
    /// Not what we write.
    #[error("it is not a record")]
    Json(#[from] serde_json::Error),
    /// Of another version of kiln.
    #[error("it has version {0}, not {VERSION}")]
    Version(u32),
    /// The answer to another question.
    #[error("it is the record of another key")]
    OtherKey,
    /// A field is what it cannot be.
    #[error("its {0} cannot be right")]
    Field(&'static str),
}

impl Record {
    /// The record of `key`. A long `title` is cut.
    pub fn new(
        key: Digest,
        canonical: Digest,
        created_unix: i64,
        title: &str,
        layers: Vec<RecordLayer>,
    ) -> Self {
        let mut end = title.len().min(MAX_TITLE_BYTES);
        while !title.is_char_boundary(end) {
            end -= 1;
        }
        Self { version: VERSION, key, canonical, created_unix, title: title[..end].to_owned(), layers }
    }

    /// The key that it answers to.
    pub fn key(&self) -> &Digest {
        &self.key
    }

    /// Its bytes: the same record, the same bytes.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers, strings and lists always have a JSON form")
    }

    /// Reads what was found under `key`, and checks all that can be checked without the blobs.
    ///
    /// # Errors
    /// [`RecordError`]: it is as if it were not there.
    pub fn decode(bytes: &[u8], key: &Digest) -> Result<Self, RecordError> {
        if bytes.len() as u64 > MAX_RECORD_BYTES {
            return Err(RecordError::Large);
        }
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(bytes)?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let record: Self = serde_json::from_slice(bytes)?;
        if record.key != *key {
            return Err(RecordError::OtherKey);
        }
        record.check()?;
        Ok(record)
    }

    fn check(&self) -> Result<(), RecordError> {
        // The year 9999: what image configs can say.
        let is_time = |unix: i64| (0..253_402_300_800).contains(&unix);
        if !is_time(self.created_unix) {
            return Err(RecordError::Field("time"));
        }
        if self.title.len() > MAX_TITLE_BYTES || self.title.chars().any(|c| c == '\u{1b}' || c == '\0') {
            return Err(RecordError::Field("title"));
        }
        if self.layers.len() > MAX_LAYERS {
            return Err(RecordError::Field("number of layers"));
        }
        let kinds = [media_type::OCI_LAYER, media_type::OCI_LAYER_GZIP, media_type::OCI_LAYER_ZSTD];
        let mut total: u64 = 0;
        for layer in &self.layers {
            if !kinds.contains(&layer.media_type.as_str()) {
                return Err(RecordError::Field("media type"));
            }
            if layer.media_type == media_type::OCI_LAYER
                && (layer.blob != layer.diff_id.0 || layer.blob_bytes != layer.size_bytes)
            {
                return Err(RecordError::Field("plain layer"));
            }
            if !layer.created_unix.is_none_or(is_time) {
                return Err(RecordError::Field("time"));
            }
            total = total.saturating_add(layer.size_bytes).saturating_add(layer.blob_bytes);
        }
        if total > MAX_SIZE_BYTES {
            return Err(RecordError::Field("sizes"));
        }
        Ok(())
    }

    /// The blobs that its layers are in, with their sizes, each once.
    pub fn blobs(&self) -> BTreeSet<(Digest, u64)> {
        self.layers.iter().map(|layer| (layer.blob, layer.blob_bytes)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let layer = RecordLayer {
            diff_id: DiffId(Digest::of(b"tar")),
            size_bytes: 1024,
            blob: Digest::of(b"blob"),
            blob_bytes: 100,
            media_type: media_type::OCI_LAYER_ZSTD.to_owned(),
            created_unix: Some(1_700_000_000),
        };
        let canonical = Digest::of(b"canonical");
        Record::new(Digest::of(b"key"), canonical, 1_700_000_000, "RUN true", vec![layer])
    }

    fn decode(record: &Record) -> Result<Record, String> {
        Record::decode(&record.encode(), &Digest::of(b"key")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        assert_eq!(decode(&record()), Ok(record()));
        assert_eq!(
            Record::new(Digest::of(b"key"), Digest::of(b"c"), 0, &"ü".repeat(501), Vec::new()).title.len(),
            1000
        );
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        let refused = |change: &dyn Fn(&mut Record)| {
            let mut changed = record();
            change(&mut changed);
            decode(&changed).unwrap_err()
        };
        assert_eq!(refused(&|r| r.version = 2), "it has version 2, not 1");
        assert_eq!(refused(&|r| r.key = Digest::of(b"other")), "it is the record of another key");
        assert_eq!(refused(&|r| r.created_unix = -1), "its time cannot be right");
        assert_eq!(refused(&|r| r.title = "\u{1b}[31m".to_owned()), "its title cannot be right");
        assert_eq!(
            refused(&|r| r.layers[0].media_type = "text/plain".to_owned()),
            "its media type cannot be right"
        );
        assert_eq!(refused(&|r| r.layers[0].created_unix = Some(i64::MAX)), "its time cannot be right");
        assert_eq!(refused(&|r| r.layers[0].size_bytes = u64::MAX), "its sizes cannot be right");
        assert_eq!(
            refused(&|r| r.layers[0].media_type = media_type::OCI_LAYER.to_owned()),
            "its plain layer cannot be right"
        );
        let many = |r: &mut Record| r.layers = vec![r.layers[0].clone(); MAX_LAYERS + 1];
        assert_eq!(refused(&many), "its number of layers cannot be right");
    }

    #[test]
    fn damage_is_never_taken_for_a_record_of_something_else() {
        let bytes = record().encode();
        let key = Digest::of(b"key");
        for end in 0..bytes.len() {
            assert!(Record::decode(&bytes[..end], &key).is_err(), "{end} bytes");
        }
        for at in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[at / 8] ^= 1 << (at % 8);
            // A flipped digest or number is still one: the blobs tell.
            if let Ok(read) = Record::decode(&flipped, &key) {
                assert_eq!(read.key, key);
            }
        }
        assert!(matches!(Record::decode(&vec![b' '; 300 << 10], &key), Err(RecordError::Large)));
    }
}
