//! The directory of containers.
//!
//! ```text
//! containers/<id>/{config.json,state.json,log,monitor,lock,socket}    containers/.names/<name> -> <id>
//! ```
//!
//! A container is there from the moment its directory has its name, complete with config and state. Its
//! writable layer comes after and goes before that; whoever removes a container half-way left one that
//! can be removed again.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use kiln_executor::{Authorities, AuthorityError};

use crate::record::{self, Record, failed};
use crate::{Config, ContainerId, Error, State, Status, Time};

/// All containers of a store.
#[derive(Debug, Clone)]
pub struct Containers {
    dir: PathBuf,
    /// The store's root.
    root: PathBuf,
    /// What containers that start trust beside what their image does.
    authorities: Authorities,
    /// The files those were read from.
    certificates: Vec<PathBuf>,
}

/// One container's directory.
#[derive(Debug, Clone)]
pub struct Container {
    id: ContainerId,
    dir: PathBuf,
}

/// How long a lock may be taken by somebody who only looks.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const NAMES: &str = ".names";
/// Has a file for each container that goes with its end.
const PASSING: &str = ".passing";
/// What a killed `create` left may be removed after so long.
const STALE: Duration = Duration::from_secs(60);

impl Containers {
    /// Those of the store at `root`. Nothing is made before there is one.
    pub fn open(root: &Path) -> Self {
        Self {
            dir: root.join("containers"),
            root: root.to_owned(),
            authorities: Authorities::default(),
            certificates: Vec::new(),
        }
    }

    /// Has processes that start trust the authorities of the certificates in these files, too. It is
    /// written down nowhere.
    ///
    /// # Errors
    /// The file that holds none, and why.
    pub fn trust(mut self, files: &[PathBuf]) -> Result<Self, (PathBuf, AuthorityError)> {
        for file in files {
            self.authorities.add(file).map_err(|error| (file.clone(), error))?;
        }
        self.certificates.extend_from_slice(files);
        Ok(self)
    }

    pub(crate) fn authorities(&self) -> &Authorities {
        &self.authorities
    }

    pub(crate) fn certificates(&self) -> &[PathBuf] {
        &self.certificates
    }

    /// The store's root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn names(&self) -> PathBuf {
        self.dir.join(NAMES)
    }

    pub(crate) fn passing(&self) -> PathBuf {
        self.dir.join(PASSING)
    }

    /// Keeps others from giving and taking names.
    pub(crate) fn lock(&self) -> Result<File, Error> {
        let make = |path: &Path| DirBuilder::new().mode(0o700).recursive(true).create(path);
        make(&self.names()).map_err(failed("make", &self.dir))?;
        let path = self.dir.join(".lock");
        let file = File::create(&path).map_err(failed("create", &path))?;
        file.lock().map_err(failed("lock", &path))?;
        Ok(file)
    }

    /// Makes the container that `config` describes; its volumes and its layer are the caller's affair.
    /// Until the file is closed it is locked as by [`Container::lock`]: nobody starts or removes what is
    /// not yet whole.
    ///
    /// # Errors
    /// [`Error::NameTaken`]; nothing is left behind then.
    pub fn create(&self, config: &Config) -> Result<(Container, File), Error> {
        let _lock = self.lock()?;
        if let Some(id) = self.by_name(&config.name)? {
            return Err(Error::NameTaken { name: config.name.clone(), id: id.short().to_owned() });
        }
        self.sweep();
        let new = self.dir.join(format!(".new-{}", config.id));
        DirBuilder::new().mode(0o700).create(&new).map_err(failed("make", &new))?;
        let fill = || {
            record::write(&new.join(CONFIG), config)?;
            record::write(&new.join(STATE), &State::created())?;
            let made = Container { id: config.id.clone(), dir: new.clone() };
            let lock = made.lock()?;
            let dir = self.dir.join(config.id.as_str());
            self.take_name(&config.name, &config.id)?;
            if config.auto_remove {
                let passing = self.dir.join(PASSING);
                let mark = || {
                    DirBuilder::new().mode(0o700).recursive(true).create(&passing)?;
                    File::create(passing.join(config.id.as_str())).map(drop)
                };
                mark().map_err(failed("make", &passing))?;
            }
            fs::rename(&new, &dir).map_err(failed("rename", &dir))?;
            Ok((Container { dir, ..made }, lock))
        };
        fill().inspect_err(|_| {
            let _ = fs::remove_dir_all(&new);
        })
    }

    /// Removes what killed commands left.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if !entry.file_name().as_encoded_bytes().starts_with(b".new-") {
                continue;
            }
            let changed = entry.metadata().and_then(|dir| dir.modified()).ok();
            if changed.and_then(|at| SystemTime::now().duration_since(at).ok()).is_some_and(|age| age > STALE)
            {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Lets a name, which nobody has, lead to a container.
    pub(crate) fn take_name(&self, name: &str, id: &ContainerId) -> Result<(), Error> {
        let (link, next) = (self.names().join(name), self.names().join(".next"));
        // One that is there leads to nothing.
        let _ = fs::remove_file(&next);
        symlink(id.as_str(), &next).and_then(|()| fs::rename(&next, &link)).map_err(failed("name", &link))
    }

    /// The container that has this very name.
    pub(crate) fn by_name(&self, name: &str) -> Result<Option<ContainerId>, Error> {
        let Ok(target) = fs::read_link(self.names().join(name)) else { return Ok(None) };
        let Some(id) = target.to_str().and_then(|id| id.parse::<ContainerId>().ok()) else { return Ok(None) };
        let container = Container { dir: self.dir.join(id.as_str()), id: id.clone() };
        // A name without its container is what a killed command left.
        match container.config() {
            Ok(config) if config.name == name => Ok(Some(id)),
            Ok(_) | Err(Error::Gone { .. }) => Ok(None),
            // A record that nobody can read keeps its name: so it can be removed by it.
            Err(_) => Ok(Some(id)),
        }
    }

    /// The containers that should have gone with their end and have not, because their monitor was
    /// killed. Costs one listing when there are none.
    pub(crate) fn left_behind(&self) -> Vec<Container> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.dir.join(PASSING)).into_iter().flatten().flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<ContainerId>().ok())
            else {
                continue;
            };
            let container = Container { dir: self.dir.join(id.as_str()), id };
            let ended = |state: State| match state.status {
                Status::Exited => true,
                // Whoever removes it finds the lock taken while a monitor lives.
                Status::Created => state.begun,
                _ => false,
            };
            if container.state().is_ok_and(ended) {
                found.push(container);
            }
        }
        found
    }

    /// Gives a container another name.
    ///
    /// # Errors
    /// [`Error::NameTaken`].
    pub fn rename(&self, container: &Container, name: &str) -> Result<(), Error> {
        let _lock = self.lock()?;
        if let Some(id) = self.by_name(name)? {
            return Err(Error::NameTaken { name: name.to_owned(), id: id.short().to_owned() });
        }
        let mut config = container.config()?;
        let old = std::mem::replace(&mut config.name, name.to_owned());
        self.take_name(name, &config.id)?;
        container.write_config(&config)?;
        let _ = fs::remove_file(self.names().join(old));
        Ok(())
    }

    /// All containers, youngest first. Those whose config cannot be read come last.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn list(&self) -> Result<Vec<Container>, Error> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed("read", &self.dir))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("read", &self.dir))?;
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let container = Container { id, dir: entry.path() };
            let created = match container.config() {
                Ok(config) => config.created,
                Err(Error::Gone { .. }) => continue,
                Err(_) => Time::NEVER,
            };
            found.push((std::cmp::Reverse(created), container));
        }
        found.sort_by(|one, other| one.0.cmp(&other.0).then_with(|| one.1.id.cmp(&other.1.id)));
        Ok(found.into_iter().map(|(_, container)| container).collect())
    }

    /// The container a user means: by name, by ID, or by the beginning of one.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`].
    pub fn find(&self, text: &str) -> Result<Container, Error> {
        let not_found = || Error::NotFound { text: text.to_owned() };
        let text = text.strip_prefix('/').unwrap_or(text);
        if text.is_empty() || text.contains('/') {
            return Err(not_found());
        }
        let at = |id: ContainerId| Container { dir: self.dir.join(id.as_str()), id };
        if let Ok(id) = text.parse::<ContainerId>() {
            return Some(at(id)).filter(|container| container.dir.is_dir()).ok_or_else(not_found);
        }
        if crate::is_name(text)
            && let Some(id) = self.by_name(text)?
        {
            return Ok(at(id));
        }
        let mut found: Vec<ContainerId> = Vec::new();
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            found.extend(name.to_str().filter(|name| name.starts_with(text)).and_then(|id| id.parse().ok()));
        }
        match found.len() {
            0 => Err(not_found()),
            1 => Ok(at(found.swap_remove(0))),
            count => Err(Error::Ambiguous { text: text.to_owned(), count }),
        }
    }

    /// Removes a container's directory and name; its layer must be gone.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn remove(&self, container: &Container) -> Result<(), Error> {
        let _lock = self.lock()?;
        match container.config().map(|config| config.name) {
            Ok(name) if self.by_name(&name)?.as_ref() == Some(&container.id) => {
                let _ = fs::remove_file(self.names().join(name));
            }
            Ok(_) => {}
            // Nobody can read what it is called: all that leads to it goes.
            Err(_) => self.remove_names(&container.id),
        }
        let _ = fs::remove_file(self.dir.join(PASSING).join(container.id.as_str()));
        // Out of sight in one step: what is left of it is no container.
        let gone = self.dir.join(format!(".new-gone-{}", container.id));
        match fs::rename(&container.dir, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(failed("rename", &container.dir))?,
        }
        fs::remove_dir_all(&gone).map_err(failed("remove", &gone))
    }
}

impl Containers {
    fn remove_names(&self, id: &ContainerId) {
        for entry in fs::read_dir(self.names()).into_iter().flatten().flatten() {
            if fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == id.as_str()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

impl Container {
    /// The one at `dir`, whose last name is its ID.
    pub(crate) fn at(dir: PathBuf) -> Result<Self, String> {
        let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        Ok(Self { id: name.parse()?, dir })
    }

    /// Which one.
    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it was asked to be.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::Record`] when it is damaged or of a newer kiln.
    pub fn config(&self) -> Result<Config, Error> {
        self.read(CONFIG)
    }

    /// Replaces what it was asked to be.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn write_config(&self, config: &Config) -> Result<(), Error> {
        record::write(&self.dir.join(CONFIG), config)
    }

    /// What it is doing. One whose monitor was killed is seen to have ended.
    ///
    /// # Errors
    /// As [`Container::config`].
    pub fn state(&self) -> Result<State, Error> {
        let state = self.read_state()?;
        if !state.status.is_active() {
            return Ok(state);
        }
        let Some(_mourning) = self.try_monitor()? else { return Ok(state) };
        // The lock is ours: nobody looks after it. It may have ended since the first look.
        let mut state = self.read_state()?;
        if state.status.is_active() {
            // The kernel killed its processes with the monitor (PDEATHSIG).
            state.status = Status::Exited;
            (state.pid, state.exit_code, state.finished) = (0, 137, Time::now());
            (state.address, state.endpoints, state.ports) = (None, Vec::new(), Vec::new());
            "its monitor died".clone_into(&mut state.error);
            // On a full disk it is so too; the next who looks notes it.
            let _ = self.write_state(&state);
        }
        Ok(state)
    }

    /// What its record says, true or not any more.
    pub(crate) fn recorded_status(&self) -> Option<Status> {
        self.read_state().ok().map(|state| state.status)
    }

    /// The same for whoever has the monitor's lock.
    pub(crate) fn state_under_lock(&self) -> Result<State, Error> {
        let mut state = self.read_state()?;
        if state.status.is_active() {
            (state.status, state.pid, state.exit_code) = (Status::Exited, 0, 137);
        }
        Ok(state)
    }

    fn read_state(&self) -> Result<State, Error> {
        self.read(STATE)
    }

    pub(crate) fn write_state(&self, state: &State) -> Result<(), Error> {
        record::write(&self.dir.join(STATE), state)
    }

    /// Takes the room that [`Container::write_state_somehow`] may need.
    pub(crate) fn keep_room(&self) {
        record::keep_spares(&self.dir.join(STATE));
    }

    /// As [`Container::write_state`], on a full disk too, if there is the room that
    /// [`Container::keep_room`] takes; whether that was needed.
    pub(crate) fn write_state_somehow(&self, state: &State) -> Result<bool, Error> {
        if self.write_state(state).is_ok() {
            return Ok(false);
        }
        let path = self.dir.join(STATE);
        record::write_into_spare(&path, state).or_else(|_| {
            // What checks have printed may be longer than the room is.
            let mut state = state.clone();
            state.health.iter_mut().for_each(|health| health.log.clear());
            record::write_into_spare(&path, &state)
        })?;
        Ok(true)
    }

    fn read<T: Record>(&self, file: &str) -> Result<T, Error> {
        let path = self.dir.join(file);
        match record::read(&path)? {
            Some(record) => Ok(record),
            None if !self.dir.exists() => Err(Error::Gone { id: self.id.short().to_owned() }),
            None => Err(failed("read", &path)(io::ErrorKind::NotFound.into())),
        }
    }

    /// Takes the monitor's lock; `None`: somebody looks after the container.
    pub(crate) fn try_monitor(&self) -> Result<Option<File>, Error> {
        let path = self.dir.join("monitor");
        let file = self.open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(failed("lock", &path)(error)),
        }
    }

    /// Keeps everybody from mounting the container's layer, as long as the file is open; `None`: it runs, or
    /// is about to.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn hold(&self) -> Result<Option<File>, Error> {
        self.try_monitor()
    }

    /// Waits for the monitor's lock, which whoever looks for one has for a moment.
    ///
    /// # Errors
    /// [`Error::AlreadyRuns`] when somebody looks after the container.
    pub(crate) fn lock_monitor(&self) -> Result<File, Error> {
        let begun = Instant::now();
        loop {
            match self.try_monitor()? {
                Some(lock) if self.dir.exists() => return Ok(lock),
                Some(_) => return Err(Error::Gone { id: self.id.short().to_owned() }),
                None if begun.elapsed() > PATIENCE => {
                    let name = self.id.short().to_owned();
                    return Err(Error::AlreadyRuns { name });
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Keeps others from starting, renaming, changing or removing the container.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn lock(&self) -> Result<File, Error> {
        self.wait_for("lock")
    }

    fn wait_for(&self, name: &str) -> Result<File, Error> {
        let path = self.dir.join(name);
        let file = self.open_lock(&path)?;
        file.lock().map_err(failed("lock", &path))?;
        if self.dir.exists() { Ok(file) } else { Err(Error::Gone { id: self.id.short().to_owned() }) }
    }

    fn open_lock(&self, path: &Path) -> Result<File, Error> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
        file.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Gone { id: self.id.short().to_owned() },
            _ => failed("open", path)(error),
        })
    }
}

#[cfg(test)]
mod tests;
