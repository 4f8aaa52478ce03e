//! What containers need: their directories below `containers/` are the truth, there is no table.

use std::fs;
use std::io;
use std::path::PathBuf;

use kiln_oci::{ActiveKey, Digest, SnapshotId};
use serde::Deserialize;

use crate::{Error, Store};

/// The store's directory of containers.
pub(crate) const DIR: &str = "containers";

/// What a container keeps alive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerUse {
    /// The container; also the key of its writable layer.
    pub id: String,
    /// What users call it.
    pub name: String,
    /// The image it was made of. It may be gone.
    pub image: Option<Digest>,
    /// What its writable layer stands on.
    pub snapshot: Option<SnapshotId>,
}

/// What of a container's `config.json` counts here; the rest is not this crate's.
#[derive(Deserialize)]
struct Config {
    id: String,
    name: String,
    image: Digest,
    snapshot: Option<SnapshotId>,
}

/// Whether a name in the directory is a container's: 64 hexadecimal digits. The keys of leases have a
/// dash.
fn is_id(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

impl Store {
    fn containers_dir(&self) -> PathBuf {
        self.root().join(DIR)
    }

    /// Whether `key` is that of a container that there is.
    pub(crate) fn is_container(&self, key: &ActiveKey) -> bool {
        is_id(key.as_str()) && self.containers_dir().join(key.as_str()).exists()
    }

    /// What all containers need. A container whose config cannot be read is among them with nothing
    /// but its ID.
    ///
    /// # Errors
    /// [`Error::Host`] when the directory cannot be read.
    pub fn container_uses(&self) -> Result<Vec<ContainerUse>, Error> {
        let dir = self.containers_dir();
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(Error::host("read", dir.clone()))?,
        };
        let mut uses = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::host("read", dir.clone()))?;
            let Some(id) = entry.file_name().to_str().filter(|name| is_id(name)).map(str::to_owned) else {
                continue;
            };
            let text = fs::read(entry.path().join("config.json")).unwrap_or_default();
            uses.push(match serde_json::from_slice::<Config>(&text) {
                Ok(config) if config.id == id => ContainerUse {
                    id,
                    name: config.name,
                    image: Some(config.image),
                    snapshot: config.snapshot,
                },
                _ => ContainerUse { name: id[..12].to_owned(), id, image: None, snapshot: None },
            });
        }
        uses.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(uses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_layer_lives_as_long_as_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let id = "0123456789abcdef".repeat(4);
        let key: ActiveKey = id.parse().unwrap();
        assert!(!store.is_key_live(&key));
        let place = dir.path().join("containers").join(&id);
        fs::create_dir_all(&place).unwrap();
        assert!(store.is_key_live(&key));
        assert_eq!(store.container_uses().unwrap()[0].snapshot, None);
        let image = Digest::of(b"image");
        let config =
            format!(r#"{{"id":"{id}","name":"web","image":"{image}","snapshot":"abc-1","more":true}}"#);
        fs::write(place.join("config.json"), config).unwrap();
        fs::create_dir(dir.path().join("containers/.new-x")).unwrap();
        let expected = ContainerUse {
            id,
            name: "web".to_owned(),
            image: Some(image),
            snapshot: Some("abc-1".parse().unwrap()),
        };
        assert_eq!(store.container_uses().unwrap(), [expected]);
        fs::remove_dir_all(&place).unwrap();
        assert!(!store.is_key_live(&key));
    }
}
