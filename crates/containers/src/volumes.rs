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
use crate::record::{self, Record, failed};
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

impl Record for Volume {
    const VERSION: u32 = 1;

    fn version(&self) -> u32 {
        self.version
    }
}

impl Volumes {
    /// Those of the store at `root`. Nothing is made before there is one.
    pub fn open(root: &Path) -> Self {
        Self { dir: root.join("volumes") }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes the record of a volume whose own is lost.
    pub(crate) fn record_anew(&self, name: &str) -> Result<(), Error> {
        let _lock = self.lock()?;
        let dir = self.dir.join(name);
        // The best that is known of it.
        let made = fs::metadata(&dir).and_then(|dir| dir.modified()).ok();
        let since = made.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        let nanos = since.and_then(|since| i64::try_from(since.as_nanos()).ok());
        let made = nanos.map_or_else(Time::now, Time::from_nanos);
        let volume = Volume {
            version: 1,
            name: name.to_owned(),
            created: made,
            labels: BTreeMap::new(),
            anonymous: false,
        };
        record::write(&dir.join("volume.json"), &volume)
    }

    fn lock(&self) -> Result<File, Error> {
        DirBuilder::new().mode(0o700).recursive(true).create(&self.dir).map_err(failed("make", &self.dir))?;
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
            version: Volume::VERSION,
            name: name.to_owned(),
            created: Time::now(),
            labels: labels.clone(),
            anonymous,
        };
        DirBuilder::new().mode(0o700).create(&new).map_err(failed("make", &new))?;
        record::write(&new.join("volume.json"), &volume)?;
        let fill = || {
            DirBuilder::new().mode(0o755).create(new.join("_data"))?;
            fs::rename(&new, &dir)
        };
        fill().map_err(failed("make", &dir))?;
        Ok(true)
    }

    /// A volume by its whole name.
    ///
    /// # Errors
    /// [`Error::NoVolume`], [`Error::Record`].
    pub fn find(&self, name: &str) -> Result<Volume, Error> {
        let missing = || Error::NoVolume { name: name.to_owned() };
        if !is_name(name) {
            return Err(missing());
        }
        let path = self.dir.join(name).join("volume.json");
        record::read(&path)?.ok_or_else(missing)
    }

    /// Where a volume's files are.
    ///
    /// # Errors
    /// As [`Volumes::find`].
    pub fn data(&self, name: &str) -> Result<PathBuf, Error> {
        self.find(name).map(|volume| self.dir.join(volume.name).join("_data"))
    }

    /// Has `fill` fill the volume's directory, if that is empty: one at a time, and anew after one that did
    /// not come to its end.
    ///
    /// # Errors
    /// As [`Volumes::find`]; those of `fill`.
    pub fn fill<E: From<Error>>(
        &self,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<(), E> {
        let data = self.data(name)?;
        let dir = self.dir.join(name);
        let lock = File::open(&dir).and_then(|dir| dir.lock().map(|()| dir));
        let _lock = lock.map_err(failed("lock", &dir))?;
        let filling = dir.join("filling");
        let clear = || {
            for entry in fs::read_dir(&data)? {
                let entry = entry?;
                match entry.file_type()?.is_dir() {
                    true => fs::remove_dir_all(entry.path())?,
                    false => fs::remove_file(entry.path())?,
                }
            }
            Ok(())
        };
        if filling.exists() {
            clear().map_err(failed("empty", &data))?;
        }
        if fs::read_dir(&data).map_err(failed("read", &data))?.next().is_some() {
            return Ok(());
        }
        File::create(&filling).map_err(failed("create", &filling))?;
        fill(&data)?;
        Ok(fs::remove_file(&filling).map_err(failed("remove", &filling))?)
    }

    /// All volumes, by name.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn list(&self) -> Result<Vec<Volume>, Error> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed("read", &self.dir))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("read", &self.dir))?;
            if let Some(name) = entry.file_name().to_str()
                && let Ok(volume) = self.find(name)
            {
                found.push(volume);
            }
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    /// Removes a volume with its files.
    ///
    /// # Errors
    /// [`Error::NoVolume`]; [`Error::VolumeInUse`] when a container has it, running or not.
    pub fn remove(&self, name: &str, containers: &Containers) -> Result<(), Error> {
        let _lock = self.lock()?;
        self.find(name)?;
        if let Some(container) = user_of(name, containers)? {
            return Err(Error::VolumeInUse { name: name.to_owned(), container });
        }
        let (dir, gone) = (self.dir.join(name), self.dir.join(format!(".gone-{name}")));
        let _ = fs::remove_dir_all(&gone);
        fs::rename(&dir, &gone).map_err(failed("rename", &dir))?;
        fs::remove_dir_all(&gone).map_err(failed("remove", &gone))
    }
}

/// A container that has this volume.
///
/// # Errors
/// [`Error::Host`].
pub fn user_of(name: &str, containers: &Containers) -> Result<Option<String>, Error> {
    for container in containers.list()? {
        let Ok(config) = container.config() else { continue };
        let has = |kind: &MountKind| matches!(kind, MountKind::Volume { name: known, .. } if known == name);
        if config.mounts.iter().any(|mount| has(&mount.kind)) {
            return Ok(Some(config.name));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MountPoint;
    use crate::testing::config;

    #[test]
    fn volumes_stay_while_a_container_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let (volumes, containers) = (Volumes::open(dir.path()), Containers::open(dir.path()));
        assert!(volumes.list().unwrap().is_empty());
        assert!(volumes.create("data", &BTreeMap::new(), false).unwrap());
        assert!(!volumes.create("data", &BTreeMap::new(), false).unwrap());
        fs::write(volumes.data("data").unwrap().join("x"), "x").unwrap();
        let mut user = config("web");
        user.mounts.push(MountPoint {
            kind: MountKind::Volume { name: "data".to_owned(), anonymous: false, fill: true },
            target: "/data".to_owned(),
            read_only: false,
        });
        let (container, _lock) = containers.create(&user).unwrap();
        assert!(matches!(volumes.remove("data", &containers), Err(Error::VolumeInUse { .. })));
        containers.remove(&container).unwrap();
        volumes.remove("data", &containers).unwrap();
        assert!(matches!(volumes.data("data"), Err(Error::NoVolume { .. })));
        volumes.create("empty", &BTreeMap::new(), false).unwrap();
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
