//! The sidecar beside a snapshot's files: from it the index can be rebuilt.

use std::fs;
use std::path::Path;

use kiln_oci::SnapshotId;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Version of the record below.
const VERSION: u32 = 1;

/// What is known of a snapshot without reading its files.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Meta {
    version: u32,
    pub(crate) parent: Option<SnapshotId>,
}

impl Meta {
    pub(crate) fn new(parent: Option<&SnapshotId>) -> Self {
        Self { version: VERSION, parent: parent.cloned() }
    }

    pub(crate) fn write(&self, path: &Path) -> Result<(), Error> {
        let text = serde_json::to_vec(self).expect("the record has only strings and numbers");
        fs::write(path, text).map_err(Error::host("write", path))
    }

    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let text = fs::read(path).map_err(Error::host("read", path))?;
        let damaged = |reason| Error::Damaged { path: path.to_owned(), reason };
        let meta: Self = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if meta.version == VERSION {
            Ok(meta)
        } else {
            Err(damaged(format!("its version is {}, this kiln knows {VERSION}", meta.version)))
        }
    }
}
