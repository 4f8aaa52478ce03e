//! The networks that a container is in while it runs.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use kiln_executor::{Address, Bridge, Network, NetworkNamespace, Plug, ProcessSpec};

use super::Monitor;
use super::resolver::{Resolver, SERVER};
use crate::config::Attachment;
use crate::networks::{Held, Networks, USUAL_NETWORK};
use crate::state::Endpoint;
use crate::{Config, Container, Containers, Error};

/// A network namespace and what leads out of it; all of it goes with this.
pub(super) struct Joined {
    namespace: NetworkNamespace,
    places: Vec<Place>,
    resolver: Option<Resolver>,
}

/// One interface.
struct Place {
    endpoint: Endpoint,
    internal: bool,
    /// `None`: somebody else holds it.
    _address: Option<Address>,
    _held: Option<Held>,
}

impl Joined {
    /// Makes what `config` asks for. `None`: it asks for nothing but what the process's helper does.
    pub(super) fn make(
        containers: &Containers,
        container: &Container,
        config: &Config,
    ) -> Result<Option<Self>, Error> {
        if let Some(other) = &config.network_of {
            let other = containers.find(other.as_str())?;
            let (config, state) = (other.config()?, other.state()?);
            if state.pid == 0 {
                return Err(Error::NotRunning { name: config.name });
            }
            let namespace = NetworkNamespace::of_process(state.pid)?;
            return Ok(Some(Self { namespace, places: Vec::new(), resolver: None }));
        }
        if config.networks.is_empty() {
            return Ok(None);
        }
        let mut joined = Self { namespace: NetworkNamespace::new()?, places: Vec::new(), resolver: None };
        for attachment in &config.networks {
            joined.enter(containers, attachment)?;
        }
        if has_names(config) {
            let servers = &config.process.resolver.servers;
            joined.resolver = Some(Resolver::start(&joined.namespace, containers, container, servers)?);
        }
        Ok(Some(joined))
    }

    /// Of a process that runs with what its helper made.
    fn of_running(pid: i32, endpoints: &[Endpoint]) -> Result<Self, Error> {
        let place = |endpoint: &Endpoint| Place {
            endpoint: endpoint.clone(),
            internal: false,
            _address: None,
            _held: None,
        };
        let namespace = NetworkNamespace::of_process(pid)?;
        Ok(Self { namespace, places: endpoints.iter().map(place).collect(), resolver: None })
    }

    /// A descriptor of the namespace, for the process.
    pub(super) fn handle(&self) -> Result<OwnedFd, Error> {
        Ok(self.namespace.handle()?)
    }

    pub(super) fn endpoints(&self) -> Vec<Endpoint> {
        self.places.iter().map(|place| place.endpoint.clone()).collect()
    }

    /// Whether published ports lead into a network that nothing gets out of.
    pub(super) fn is_internal(&self) -> bool {
        self.places.first().is_some_and(|place| place.internal)
    }

    fn enter(&mut self, containers: &Containers, attachment: &Attachment) -> Result<(), Error> {
        let (bridge, id, held) = match attachment.network.as_str() {
            USUAL_NETWORK => (Bridge::usual()?, String::new(), None),
            name => {
                let (network, held) = Networks::open(containers.root()).hold(name)?;
                let bridge = network.bridge();
                bridge.ensure()?;
                (bridge, network.id, Some(held))
            }
        };
        if let Some(wanted) = attachment.address.filter(|wanted| !bridge.subnet.has_host(*wanted)) {
            let problem =
                format!("{wanted} is no address of network {}, {}", attachment.network, bridge.subnet);
            return Err(Error::NetworkTaken { problem });
        }
        let (address, lease) = bridge.lease(attachment.address)?;
        let taken = |name: &String| self.places.iter().any(|place| place.endpoint.interface == *name);
        let mut names = (0..).map(|number| format!("eth{number}"));
        let interface = names.find(|name| !taken(name)).unwrap_or_default();
        let is_way_out = !bridge.internal && self.places.iter().all(|place| place.internal);
        self.namespace.plug(&Plug {
            bridge: &bridge.name,
            interface: &interface,
            address,
            prefix: bridge.subnet.prefix(),
            gateway: is_way_out.then_some(bridge.gateway),
        })?;
        let endpoint = Endpoint {
            network: attachment.network.clone(),
            network_id: id,
            interface,
            address,
            subnet: bridge.subnet,
            gateway: bridge.gateway,
        };
        self.places.push(Place { endpoint, internal: bridge.internal, _address: Some(lease), _held: held });
        Ok(())
    }

    fn leave(&mut self, at: usize) -> Result<(), Error> {
        self.namespace.unplug(&self.places[at].endpoint.interface)?;
        self.places.remove(at);
        // The way out may have gone with it.
        if let Some(place) = self.places.iter().find(|place| !place.internal) {
            self.namespace.set_gateway(&place.endpoint.interface, place.endpoint.gateway)?;
        }
        Ok(())
    }

    /// Enters and leaves networks until it is in those that are wanted.
    fn adjust(&mut self, containers: &Containers, wanted: &[Attachment]) -> Result<(), Error> {
        let stays = |place: &Place| wanted.iter().any(|known| known.network == place.endpoint.network);
        while let Some(at) = self.places.iter().position(|place| !stays(place)) {
            self.leave(at)?;
        }
        for attachment in wanted {
            if self.places.iter().all(|place| place.endpoint.network != attachment.network) {
                self.enter(containers, attachment)?;
            }
        }
        Ok(())
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.resolver = None;
        // The kernel would do so some time after the last user of the namespace.
        for place in &self.places {
            let _ = self.namespace.unplug(&place.endpoint.interface);
        }
    }
}

/// Whether containers find each other by name: in networks that users made.
fn has_names(config: &Config) -> bool {
    config.networks.iter().any(|attachment| attachment.network != USUAL_NETWORK)
}

/// Tells the process what it cannot know of the network it gets: who it is there, and whom to ask.
pub(super) fn introduce(
    containers: &Containers,
    config: &Config,
    endpoints: &[Endpoint],
    process: &mut ProcessSpec,
) -> Result<(), Error> {
    process.network = Network::Given;
    let (endpoints, config) = match &config.network_of {
        Some(other) => {
            let other = containers.find(other.as_str())?;
            (other.state()?.endpoints, other.config()?)
        }
        None => (endpoints.to_vec(), config.clone()),
    };
    let own =
        endpoints.iter().map(|endpoint| (config.process.hostname.clone(), endpoint.address.to_string()));
    let gateway = endpoints.first().map(|endpoint| endpoint.gateway);
    for (_, address) in &mut process.extra_hosts {
        if let Some(gateway) = gateway.filter(|_| address == ProcessSpec::HOST_GATEWAY) {
            *address = gateway.to_string();
        }
    }
    process.extra_hosts.splice(0..0, own);
    if has_names(&config) {
        let resolver = &mut process.resolver;
        resolver.servers = vec![SERVER.into()];
        if !resolver.options.iter().any(|option| option.starts_with("ndots:")) {
            // Names of containers have no dots, and are none of anybody's domain.
            resolver.options.push("ndots:0".to_owned());
        }
    }
    Ok(())
}

impl Monitor {
    /// Has the running container in the networks that its config names; what could not be done leaves
    /// the rest as it is.
    pub(super) fn adjust_networks(&mut self) -> Result<(), Error> {
        let Some(run) = &mut self.run else { return Ok(()) };
        let (pid, before) = (self.state.pid, &self.state.endpoints);
        if self.config.network_of.is_some() || pid == 0 {
            return Ok(());
        }
        let names =
            |places: &[Endpoint]| places.iter().map(|place| place.network.clone()).collect::<Vec<_>>();
        let wanted: Vec<String> =
            self.config.networks.iter().map(|attachment| attachment.network.clone()).collect();
        // One that was never asked to be anywhere is where its helper put it.
        let unasked = wanted.is_empty() && self.config.process.network != Network::None;
        if unasked || names(before) == wanted {
            return Ok(());
        }
        if run.network.is_none() {
            run.network = Some(Joined::of_running(pid, before)?);
        }
        let Some(joined) = &mut run.network else { return Ok(()) };
        let adjusted = joined.adjust(&self.tools.containers, &self.config.networks);
        self.state.endpoints = joined.endpoints();
        self.state.address = self.state.endpoints.first().map(|endpoint| endpoint.address);
        if let Some(address) = self.state.address {
            let _ = run.ports.lead_to(address, joined.is_internal(), &self.config.id);
        }
        self.note();
        adjusted
    }

    /// Where the helper has put a process that asked for nothing else.
    pub(super) fn usual_endpoint(address: Ipv4Addr) -> Endpoint {
        let subnet = Bridge::usual_subnet(address);
        Endpoint {
            network: USUAL_NETWORK.to_owned(),
            network_id: String::new(),
            interface: "eth0".to_owned(),
            address,
            subnet,
            gateway: subnet.nth(1),
        }
    }
}
