//! Networks that users make: records of bridges.
//!
//! ```text
//! networks/<name>/{network.json,lock}
//! ```
//!
//! The bridge itself is made when the first container comes and goes with the network. A container that
//! runs holds `lock` for reading: who has it alone knows that nobody is in the network, however those
//! that were ended.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use kiln_executor::{Bridge, Subnet, free_subnet, is_subnet_routed};
use serde::{Deserialize, Serialize};

use crate::id::random_bytes;
use crate::record::{self, Record, failed};
use crate::state::Endpoint;
use crate::{Config, Containers, Error, State, Time, is_name};

/// The name of the network of all containers that ask for none.
pub const USUAL_NETWORK: &str = "bridge";
/// Names that mean something else.
const RESERVED: [&str; 5] = [USUAL_NETWORK, "host", "none", "default", "container"];
/// Letters of the ID that a bridge has in its name: the kernel takes 15.
const BRIDGE_DIGITS: usize = 10;

/// All networks of a store that users made.
#[derive(Debug, Clone)]
pub struct Networks {
    dir: PathBuf,
}

/// A network that a user made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Of this record: 1.
    pub version: u32,
    /// 64 hexadecimal digits.
    pub id: String,
    /// What it is called.
    pub name: String,
    /// When it was made.
    pub created: Time,
    /// Its addresses.
    pub subnet: Subnet,
    /// The host's address in it.
    pub gateway: Ipv4Addr,
    /// Nothing gets out of it, and nothing in but from the host.
    pub internal: bool,
    /// What users gave.
    pub labels: BTreeMap<String, String>,
}

/// What a new network is asked to be.
#[derive(Debug, Clone, Default)]
pub struct NewNetwork {
    /// Its addresses; `None`: any that the host does not use.
    pub subnet: Option<Subnet>,
    /// The host's address; `None`: the first.
    pub gateway: Option<Ipv4Addr>,
    /// Nothing gets out of it.
    pub internal: bool,
    /// What users gave.
    pub labels: BTreeMap<String, String>,
}

/// Keeps a network from being removed.
#[derive(Debug)]
pub(crate) struct Held {
    _lock: File,
}

impl Network {
    /// What it is on the host.
    pub fn bridge(&self) -> Bridge {
        Bridge {
            name: format!("kiln-{}", &self.id[..BRIDGE_DIGITS.min(self.id.len())]),
            subnet: self.subnet,
            gateway: self.gateway,
            internal: self.internal,
        }
    }

    /// As users see it: 12 digits.
    pub fn short(&self) -> &str {
        &self.id[..12.min(self.id.len())]
    }
}

impl Record for Network {
    const VERSION: u32 = 1;

    fn version(&self) -> u32 {
        self.version
    }
}

impl Networks {
    /// Those of the store at `root`. Nothing is made before there is one.
    pub fn open(root: &Path) -> Self {
        Self { dir: root.join("networks") }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Removes a network whose record cannot be read, and so not its bridge either: nobody knows any more
    /// which one that was. It has no address that another network would be kept from.
    pub(crate) fn forget(&self, name: &str) -> Result<(), Error> {
        let _lock = self.lock()?;
        let dir = self.dir.join(name);
        let gone = self.dir.join(format!(".gone-{name}"));
        let _ = fs::remove_dir_all(&gone);
        fs::rename(&dir, &gone).map_err(failed("rename", &dir))?;
        fs::remove_dir_all(&gone).map_err(failed("remove", &gone))
    }

    fn lock(&self) -> Result<File, Error> {
        DirBuilder::new().mode(0o700).recursive(true).create(&self.dir).map_err(failed("make", &self.dir))?;
        let path = self.dir.join(".lock");
        let file = File::create(&path).map_err(failed("create", &path))?;
        file.lock().map_err(failed("lock", &path))?;
        Ok(file)
    }

    /// Makes a network. The host's bridge comes with the first container.
    ///
    /// # Errors
    /// [`Error::NetworkTaken`] when name or addresses are; [`Error::Exec`] when none are free.
    pub fn create(&self, name: &str, wanted: NewNetwork) -> Result<Network, Error> {
        let taken = |problem: String| Error::NetworkTaken { problem };
        if !is_name(name) || RESERVED.contains(&name) {
            return Err(taken(format!("{name:?} is no name for a network")));
        }
        let _lock = self.lock()?;
        let known = self.list()?;
        if known.iter().any(|network| network.name == name) {
            return Err(taken(format!("there is a network {name:?} already")));
        }
        let subnets: Vec<Subnet> = known.iter().map(|network| network.subnet).collect();
        let subnet = match wanted.subnet {
            None => free_subnet(&subnets)?,
            Some(subnet) => {
                if let Some(other) = known.iter().find(|network| network.subnet.overlaps(subnet)) {
                    return Err(taken(format!(
                        "{subnet} overlaps {} of network {}",
                        other.subnet, other.name
                    )));
                }
                if is_subnet_routed(subnet)? {
                    return Err(taken(format!("the host has routes into {subnet}")));
                }
                subnet
            }
        };
        if subnet.hosts() < 2 {
            return Err(taken(format!("{subnet} has no room for containers")));
        }
        let gateway = wanted.gateway.unwrap_or(subnet.nth(1));
        if !subnet.has_host(gateway) {
            return Err(taken(format!("no host of {subnet} has the address {gateway}")));
        }
        let mut bytes = [0; 32];
        random_bytes(&mut bytes).map_err(failed("name", &self.dir))?;
        let network = Network {
            version: Network::VERSION,
            id: bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
            name: name.to_owned(),
            created: Time::now(),
            subnet,
            gateway,
            internal: wanted.internal,
            labels: wanted.labels,
        };
        let (dir, new) = (self.dir.join(name), self.dir.join(format!(".new-{name}")));
        let _ = fs::remove_dir_all(&new);
        DirBuilder::new().mode(0o700).create(&new).map_err(failed("make", &new))?;
        record::write(&new.join("network.json"), &network)?;
        let fill = || {
            File::create(new.join("lock"))?;
            fs::rename(&new, &dir)
        };
        fill().map_err(failed("make", &dir))?;
        Ok(network)
    }

    fn read(&self, name: &str) -> Result<Network, Error> {
        let path = self.dir.join(name).join("network.json");
        record::read(&path)?.ok_or_else(|| Error::NoNetwork { text: name.to_owned() })
    }

    /// The network a user means: by name, by ID, or by the beginning of one.
    ///
    /// # Errors
    /// [`Error::NoNetwork`], [`Error::Record`].
    pub fn find(&self, text: &str) -> Result<Network, Error> {
        let missing = || Error::NoNetwork { text: text.to_owned() };
        if !is_name(text) {
            return Err(missing());
        }
        match self.read(text) {
            Err(Error::NoNetwork { .. }) => {}
            other => return other,
        }
        let mut found = self.list()?;
        found.retain(|network| network.id.starts_with(text));
        if found.len() == 1 { Ok(found.swap_remove(0)) } else { Err(missing()) }
    }

    /// All networks, by name.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn list(&self) -> Result<Vec<Network>, Error> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed("read", &self.dir))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("read", &self.dir))?;
            if let Some(name) = entry.file_name().to_str().filter(|name| is_name(name))
                && let Ok(network) = self.read(name)
            {
                found.push(network);
            }
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    /// Keeps a network while the answer lives.
    ///
    /// # Errors
    /// [`Error::NoNetwork`].
    pub(crate) fn hold(&self, name: &str) -> Result<(Network, Held), Error> {
        let path = self.dir.join(name).join("lock");
        let missing = || Error::NoNetwork { text: name.to_owned() };
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
            other => other.map_err(failed("open", &path))?,
        };
        file.lock_shared().map_err(failed("lock", &path))?;
        // Whoever had it alone may have removed it meanwhile.
        let network = self.read(name)?;
        if same_file(&file, &path) { Ok((network, Held { _lock: file })) } else { Err(missing()) }
    }

    /// Removes a network: its bridge and rules first, so that what was removed half-way can be removed
    /// again.
    ///
    /// # Errors
    /// [`Error::NoNetwork`]; [`Error::NetworkInUse`] when a running container is in it.
    pub fn remove(&self, text: &str, containers: &Containers) -> Result<Network, Error> {
        let _lock = self.lock()?;
        let network = self.find(text)?;
        let dir = self.dir.join(&network.name);
        let path = dir.join("lock");
        let file = File::options().write(true).open(&path).map_err(failed("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let users = members(&network.name, containers)?;
                let users = users.into_iter().map(|(config, ..)| format!("container {}", config.name));
                let mut users: Vec<String> = users.collect();
                if users.is_empty() {
                    users.push("a container that starts".to_owned());
                }
                return Err(Error::NetworkInUse { name: network.name, users });
            }
            Err(TryLockError::Error(error)) => return Err(failed("lock", &path)(error)),
        }
        network.bridge().remove()?;
        let gone = self.dir.join(format!(".gone-{}", network.name));
        let _ = fs::remove_dir_all(&gone);
        fs::rename(&dir, &gone).map_err(failed("rename", &dir))?;
        fs::remove_dir_all(&gone).map_err(failed("remove", &gone))?;
        Ok(network)
    }
}

fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let at = |file: fs::Metadata| (file.dev(), file.ino());
    let (one, other) = (file.metadata().map(at), fs::metadata(path).map(at));
    matches!((one, other), (Ok(one), Ok(other)) if one == other)
}

/// The running containers in a network, and where in it they are.
///
/// # Errors
/// [`Error::Host`].
pub fn members(network: &str, containers: &Containers) -> Result<Vec<(Config, State, Endpoint)>, Error> {
    let mut found = Vec::new();
    for container in containers.list()? {
        let (Ok(config), Ok(state)) = (container.config(), container.state()) else { continue };
        let endpoint = state.endpoints.iter().find(|endpoint| endpoint.network == network).cloned();
        if let Some(endpoint) = endpoint.filter(|_| state.pid != 0) {
            found.push((config, state, endpoint));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_have_names_ids_and_addresses_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let networks = Networks::open(dir.path());
        assert!(networks.list().unwrap().is_empty());
        let wanted =
            |subnet: &str| NewNetwork { subnet: Some(subnet.parse().unwrap()), ..NewNetwork::default() };
        let one = networks.create("one", wanted("203.0.113.0/25")).unwrap();
        assert_eq!(one.gateway, Ipv4Addr::new(203, 0, 113, 1));
        assert_eq!(one.bridge().name.len(), 15);
        for (name, subnet) in
            [("one", "203.0.113.128/25"), ("two", "203.0.113.64/26"), ("two", "203.0.113.200/31")]
        {
            let refused = networks.create(name, wanted(subnet));
            assert!(matches!(refused, Err(Error::NetworkTaken { .. })), "{name} {subnet}");
        }
        for name in ["bridge", "host", "none", "../up", ""] {
            assert!(networks.create(name, NewNetwork::default()).is_err(), "{name}");
        }
        let outside = NewNetwork { gateway: Some(Ipv4Addr::new(1, 1, 1, 1)), ..wanted("203.0.113.128/25") };
        assert!(networks.create("two", outside).is_err());
        assert_eq!(networks.find(&one.id[..7]).unwrap(), one);
        assert!(matches!(networks.find("two"), Err(Error::NoNetwork { .. })));
        // What a killed command left is no network.
        fs::create_dir(dir.path().join("networks/.new-three")).unwrap();
        assert_eq!(networks.list().unwrap(), [one]);
    }

    #[test]
    fn a_network_that_is_held_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (networks, containers) = (Networks::open(dir.path()), Containers::open(dir.path()));
        let wanted = NewNetwork { subnet: Some("203.0.113.0/25".parse().unwrap()), ..NewNetwork::default() };
        networks.create("one", wanted).unwrap();
        let first = networks.hold("one").unwrap();
        let second = networks.hold("one").unwrap();
        drop(first);
        assert!(matches!(networks.remove("one", &containers), Err(Error::NetworkInUse { .. })));
        drop(second);
        assert!(matches!(networks.hold("two"), Err(Error::NoNetwork { .. })));
    }
}
