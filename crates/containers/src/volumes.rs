//! Named volumes: directories that outlive containers.
//!
//! ```text
//! volumes/<name>/{volume.json,_data/}
//! ```

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::MountKind;
use crate::id::random_bytes;
use crate::{Containers, Error, Time, is_name};

/// All volumes of a store.
#[derive(Debug, Clone)]
pub struct Volumes {
    dir: PathBuf,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Of this record: 1.
    pub version: u32,
    /// What it is called.
    pub name: String,
    /// When it was made.
    pub created: Time,
    /// What users gave.
    pub labels: BTreeMap<String, String>,
    /// It was made for a container that asked for one without a name.
    pub anonymous: bool,
}

fn failed(call: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Host { call, path, source }
}

impl Volumes {
    /// Those of the store at `root`. Nothing is made before there is one.
    pub fn open(root: &Path) -> Self {
        Self { dir: root.join("volumes") }
    }

    fn lock(&self) -> Result<File, Error> {
        DirBuilder::new().mode(0o711).recursive(true).create(&self.dir).map_err(failed("make", &self.dir))?;
        let path = self.dir.join(".lock");
        let file = File::create(&path).map_err(failed("create", &path))?;
        file.lock().map_err(failed("lock", &path))?;
        Ok(file)
    }

    /// A name for a volume that was given none.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn random_name() -> io::Result<String> {
        let mut bytes = [0; 32];
        random_bytes(&mut bytes)?;
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Makes a volume unless it is there; whether it was made.
    ///
    /// # Errors
    /// [`Error::Host`]; [`Error::NoVolume`] for what is no name.
    pub fn create(
        &self,
        name: &str,
        labels: &BTreeMap<String, String>,
        anonymous: bool,
    ) -> Result<bool, Error> {
        if !is_name(name) {
            return Err(Error::NoVolume { name: name.to_owned() });
        }
        let _lock = self.lock()?;
        let dir = self.dir.join(name);
        if dir.exists() {
            return Ok(false);
        }
        let new = self.dir.join(format!(".new-{name}"));
        let _ = fs::remove_dir_all(&new);
        let volume = Volume {
            version: 1,
            name: name.to_owned(),
            created: Time::now(),
            labels: labels.clone(),
            anonymous,
        };
        let fill = |text: &'static str| {
            move |data: &Path| {
                fs::write(data.join("x"), text).unwrap();
                Ok::<_, Error>(())
            }
        };
        let broken = |data: &Path| {
            fs::write(data.join("half"), "x").unwrap();
            Err(Error::NoVolume { name: "broken".to_owned() })
        };
        assert!(volumes.fill("empty", broken).is_err());
        volumes.fill("empty", fill("1")).unwrap();
        volumes.fill("empty", fill("2")).unwrap();
        let data = volumes.data("empty").unwrap();
        assert_eq!(fs::read_to_string(data.join("x")).unwrap(), "1");
        assert_eq!(fs::read_dir(data).unwrap().count(), 1);
        assert!(volumes.create("../up", &BTreeMap::new(), false).is_err());
    }
}
