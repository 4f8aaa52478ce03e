//! Whether the records of containers, volumes and networks are what they should be.
//!
//! What says something that is plainly out of date, as a name whose container is gone, is put right
//! whenever it is found. What somebody may want to look at first is changed only when asked. No data of a
//! container or volume is ever removed here: that is for `rm`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use kiln_snapshotter::Snapshotter;

use crate::config::MountKind;
use crate::record::{Record, failed};
use crate::{
    Config, Container, ContainerId, Containers, Error, Network, Networks, State, Status, Time, Volume,
    Volumes,
};

/// Somebody may still be making a container that is no older.
const NEW: Duration = Duration::from_secs(60);

/// What was looked at and what was found.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Containers that are there.
    pub containers: usize,
    /// Volumes that are there.
    pub volumes: usize,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// What deserves a word, but is no damage.
    pub notes: Vec<String>,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What kind of thing: `container`, `container name`, `volume`, `network`.
    pub kind: &'static str,
    /// Which one.
    pub id: String,
    /// What is wrong with it.
    pub what: String,
    /// What was done about it; `None`: nothing.
    pub repaired: Option<&'static str>,
}

/// Looks at all records; with `repair`, makes anew what can be. Costs O(containers), no file of theirs is
/// read. Containers may run, start and end meanwhile.
///
/// # Errors
/// [`Error::Host`] when the check itself cannot go on; damage is no error, but in the report.
pub fn fsck(containers: &Containers, snapshots: &dyn Snapshotter, repair: bool) -> Result<Report, Error> {
    let mut check = Check { containers, repair, report: Report::default() };
    let configs = check.containers()?;
    check.layers(snapshots, &configs)?;
    check.names(&configs)?;
    check.passing();
    check.volumes(&configs)?;
    check.networks()?;
    Ok(check.report)
}

struct Check<'a> {
    containers: &'a Containers,
    repair: bool,
    report: Report,
}

/// Names in a directory, sorted; none when there is no such directory.
fn entries(dir: &Path) -> Result<Vec<String>, Error> {
    let list = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed("read", dir))?,
    };
    let mut names = Vec::new();
    for entry in list {
        names.push(entry.map_err(failed("read", dir))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn is_missing(error: &Error) -> bool {
    matches!(error, Error::Host { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

/// Whether a record was written by a kiln that knows more than this one.
fn is_newer(path: &Path, known: u32) -> bool {
    let text = fs::read(path).unwrap_or_default();
    let value: Option<serde_json::Value> = serde_json::from_slice(&text).ok();
    value.and_then(|value| value.get("version")?.as_u64()).is_some_and(|version| version > known.into())
}

/// What is wrong with a record, in a few words.
fn wrong(file: &str, error: &Error) -> String {
    match error {
        error if is_missing(error) => format!("its {file} is missing"),
        Error::Record { problem, .. } => format!("its {file} is damaged: {problem}"),
        error => format!("its {file} cannot be read: {error}"),
    }
}

impl Check<'_> {
    fn found(&mut self, kind: &'static str, id: &str, what: String, repaired: Option<&'static str>) {
        self.report.problems.push(Problem { kind, id: id.to_owned(), what, repaired });
    }

    fn note(&mut self, text: String) {
        self.report.notes.push(text);
    }

    /// Each container's directory; the configs that could be read.
    fn containers(&mut self) -> Result<BTreeMap<ContainerId, Config>, Error> {
        let dir = self.containers.dir();
        let mut configs = BTreeMap::new();
        for name in entries(dir)? {
            if name.starts_with('.') {
                continue;
            }
            let Ok(container) = Container::at(dir.join(&name)) else {
                self.note(format!("containers/{name} is no container's"));
                continue;
            };
            // Removed meanwhile.
            if !container.dir().is_dir() {
                continue;
            }
            self.report.containers += 1;
            self.state(&container);
            match container.config() {
                Ok(config) if config.id != *container.id() => {
                    let what = format!("its config.json is that of container {}", config.id.short());
                    self.found("container", container.id().short(), what, None);
                }
                Ok(config) => drop(configs.insert(config.id.clone(), config)),
                Err(Error::Gone { .. }) => {}
                Err(_) if is_newer(&container.dir().join("config.json"), Config::VERSION) => {
                    self.note(format!("container {} is a newer kiln's", container.id().short()));
                }
                Err(error) => {
                    let what = format!("{}: it can only be removed", wrong("config.json", &error));
                    self.found("container", container.id().short(), what, None);
                }
            }
        }
        Ok(configs)
    }

    /// The layers, which come after their container's directory and go before it.
    fn layers(
        &mut self,
        snapshots: &dyn Snapshotter,
        configs: &BTreeMap<ContainerId, Config>,
    ) -> Result<(), Error> {
        let active: BTreeSet<String> = snapshots.active()?.iter().map(ToString::to_string).collect();
        for (id, config) in configs {
            let is_there = || self.containers.dir().join(id.as_str()).is_dir();
            if active.contains(id.key().as_str()) || !is_there() {
                continue;
            }
            let id = id.short();
            if Time::now().since(config.created) < NEW {
                self.note(format!("container {id} has no layer yet"));
            } else {
                let what = "its layer is gone: it can only be removed".to_owned();
                self.found("container", id, what, None);
            }
        }
        Ok(())
    }

    fn state(&mut self, container: &Container) {
        let id = container.id().short();
        let before = container.recorded_status();
        let error = match container.state() {
            Ok(state) => {
                if before.is_some_and(Status::is_active) && !state.status.is_active() {
                    self.note(format!("container {id} has ended: its monitor died"));
                }
                return;
            }
            Err(Error::Gone { .. }) => return,
            Err(_) if is_newer(&container.dir().join("state.json"), State::VERSION) => {
                return self.note(format!("container {id} was last run by a newer kiln"));
            }
            Err(error) => error,
        };
        let what = wrong("state.json", &error);
        // A monitor would write its own over it at the next change, and this one until then is a lie.
        let repaired = match container.try_monitor() {
            Ok(Some(_lock)) if self.repair => {
                let ended = State {
                    status: Status::Exited,
                    exit_code: 255,
                    error: "what it had done was not to be read any more".to_owned(),
                    begun: true,
                    ..State::created()
                };
                container.write_state(&ended).ok().map(|()| "written anew: exited with 255")
            }
            _ => None,
        };
        self.found("container", id, what, repaired);
    }

    /// Names against containers. Whoever changes one has the lock.
    fn names(&mut self, configs: &BTreeMap<ContainerId, Config>) -> Result<(), Error> {
        if !self.containers.dir().is_dir() {
            return Ok(());
        }
        let _lock = self.containers.lock()?;
        let names = self.containers.names();
        for name in entries(&names)? {
            if name.starts_with('.') {
                continue;
            }
            let target = fs::read_link(names.join(&name)).ok();
            let id = target.and_then(|target| target.to_str()?.parse::<ContainerId>().ok());
            let container = id.as_ref().map(|id| Container::at(self.containers.dir().join(id.as_str())));
            let what = match container {
                None | Some(Err(_)) => "it leads to no container".to_owned(),
                Some(Ok(container)) if !container.dir().is_dir() => "its container is gone".to_owned(),
                Some(Ok(container)) => match container.config() {
                    // Renamed by a command that was killed.
                    Ok(config) if config.name != name => format!("its container is called {}", config.name),
                    _ => continue,
                },
            };
            let done = fs::remove_file(names.join(&name)).is_ok().then_some("removed");
            self.found("container name", &name, what, done);
        }
        for id in configs.keys() {
            let container = Container::at(self.containers.dir().join(id.as_str()));
            // Only what is true now: it may have been renamed or removed since the first look.
            let Some(mut config) = container.ok().and_then(|container| container.config().ok()) else {
                continue;
            };
            let holder = self.containers.by_name(&config.name)?;
            match holder {
                Some(holder) if holder == *id => {}
                None => {
                    let done = self.containers.take_name(&config.name, id).is_ok().then_some("put back");
                    let what = format!("it did not lead to container {}", id.short());
                    self.found("container name", &config.name, what, done);
                }
                Some(holder) => {
                    let what = format!("containers {} and {} both have it", holder.short(), id.short());
                    let name = config.name.clone();
                    let done = match self.repair {
                        true => self.rename_apart(&mut config).then_some("the second got its ID as well"),
                        false => None,
                    };
                    self.found("container name", &name, what, done);
                }
            }
        }
        Ok(())
    }

    /// Gives a container a name that nobody has; the lock on names is held.
    fn rename_apart(&self, config: &mut Config) -> bool {
        config.name = format!("{}-{}", config.name, config.id.short());
        let Ok(container) = Container::at(self.containers.dir().join(config.id.as_str())) else {
            return false;
        };
        self.containers.take_name(&config.name, &config.id).is_ok() && container.write_config(config).is_ok()
    }

    /// Marks of containers that go with their end, and that are gone.
    fn passing(&mut self) {
        let passing = self.containers.passing();
        for name in entries(&passing).unwrap_or_default() {
            if !self.containers.dir().join(&name).exists() {
                let _ = fs::remove_file(passing.join(name));
            }
        }
    }

    fn volumes(&mut self, configs: &BTreeMap<ContainerId, Config>) -> Result<(), Error> {
        let volumes = Volumes::open(self.containers.root());
        let mut there = BTreeSet::new();
        for name in entries(volumes.dir())? {
            if name.starts_with('.') {
                continue;
            }
            if !crate::is_name(&name) || !volumes.dir().join(&name).is_dir() {
                self.note(format!("volumes/{name} is no volume's"));
                continue;
            }
            self.report.volumes += 1;
            there.insert(name.clone());
            let data = volumes.dir().join(&name).join("_data");
            match volumes.find(&name) {
                Ok(_) => {}
                Err(_) if is_newer(&volumes.dir().join(&name).join("volume.json"), Volume::VERSION) => {
                    self.note(format!("volume {name} is a newer kiln's"));
                    continue;
                }
                Err(error) => {
                    let error = match error {
                        Error::NoVolume { .. } => "its volume.json is missing".to_owned(),
                        error => wrong("volume.json", &error),
                    };
                    let done = match self.repair && data.is_dir() {
                        true => volumes.record_anew(&name).ok().map(|()| "written anew, without labels"),
                        false => None,
                    };
                    self.found("volume", &name, error, done);
                    continue;
                }
            }
            if !data.is_dir() {
                let what = "its directory _data is gone: it can only be removed".to_owned();
                self.found("volume", &name, what, None);
            }
        }
        for config in configs.values() {
            for mount in &config.mounts {
                if let MountKind::Volume { name, .. } = &mount.kind
                    && !there.contains(name)
                    && volumes.find(name).is_err()
                {
                    let what = format!("container {} needs it, and it is gone", config.name);
                    self.found("volume", name, what, None);
                }
            }
        }
        Ok(())
    }

    fn networks(&mut self) -> Result<(), Error> {
        let networks = Networks::open(self.containers.root());
        for name in entries(networks.dir())? {
            if name.starts_with('.') {
                continue;
            }
            let record = networks.dir().join(&name).join("network.json");
            match networks.find(&name) {
                Ok(_) => {}
                Err(_) if !record.parent().is_some_and(Path::exists) => {}
                Err(_) if is_newer(&record, Network::VERSION) => {
                    self.note(format!("network {name} is a newer kiln's"))
                }
                Err(error) => {
                    let what = match error {
                        Error::NoNetwork { .. } => "its network.json is missing".to_owned(),
                        error => wrong("network.json", &error),
                    };
                    let done = match self.repair {
                        true => networks.forget(&name).ok().map(|()| "forgotten: it can be created again"),
                        false => None,
                    };
                    self.found("network", &name, what, done);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
