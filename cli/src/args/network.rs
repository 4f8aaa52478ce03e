//! The command line: networks.

use std::net::{IpAddr, Ipv4Addr};

use clap::{Args, Subcommand};
use kiln_executor::Subnet;

// What `run` and `create` say of a container's networks.
#[derive(Args)]
pub(crate) struct JoinArgs {
    /// Network to be in: bridge, none, host, container:NAME or the name of one that was made; several of
    /// those may be given [default: bridge]
    #[arg(long = "network", visible_alias = "net", value_name = "NETWORK")]
    pub(crate) networks: Vec<String>,
    /// What others in the network may call the container as well
    #[arg(long, visible_alias = "net-alias", value_name = "NAME")]
    pub(crate) network_alias: Vec<String>,
    /// Address in the network
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) ip: Option<Ipv4Addr>,
    /// Publish all ports that the image exposes, on ports of the host that are free
    #[arg(short = 'P', long)]
    pub(crate) publish_all: bool,
    /// Address of a name server
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) dns: Vec<IpAddr>,
    /// Domain to look for names in; `.` for none
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) dns_search: Vec<String>,
    /// Option of resolv.conf(5)
    #[arg(long, visible_alias = "dns-opt", value_name = "OPTION")]
    pub(crate) dns_option: Vec<String>,
    /// Line for /etc/hosts; host-gateway is the host's own address
    #[arg(long, value_name = "NAME:ADDRESS")]
    pub(crate) add_host: Vec<String>,
}

#[derive(Args)]
pub(crate) struct NetworkArgs {
    #[command(subcommand)]
    pub(crate) command: NetworkCommand,
}

#[derive(Subcommand)]
#[command(defer = true)]
pub(crate) enum NetworkCommand {
    /// Make a network
    Create {
        /// Its addresses, such as 10.1.2.0/24 [default: some that the host does not use]
        #[arg(long, value_name = "NETWORK")]
        subnet: Option<Subnet>,
        /// The host's address in it [default: the first]
        #[arg(long, value_name = "ADDRESS")]
        gateway: Option<Ipv4Addr>,
        /// Let nothing out of it, and nothing in but from the host
        #[arg(long)]
        internal: bool,
        /// Refused: networks have IPv4 addresses only
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
        ipv6: Option<bool>,
        /// Label
        #[arg(long, value_name = "NAME[=VALUE]")]
        label: Vec<String>,
        /// What makes it: there is bridge
        #[arg(short, long, value_name = "DRIVER", default_value = "bridge")]
        driver: String,
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// List networks
    #[command(name = "ls", visible_alias = "list")]
    List {
        /// Only IDs
        #[arg(short, long)]
        quiet: bool,
        /// Whole IDs
        #[arg(long)]
        no_trunc: bool,
        /// WHAT=VALUE: id, name, label, driver, dangling, type
        #[arg(short, long, value_name = "WHAT=VALUE")]
        filter: Vec<String>,
        /// table, json, or a Go template
        #[arg(long, value_name = "FORMAT")]
        format: Option<String>,
    },
    /// Show networks as JSON
    Inspect {
        /// json, or a Go template
        #[arg(short, long, value_name = "FORMAT")]
        format: Option<String>,
        /// Network names or IDs
        #[arg(value_name = "NETWORK", required = true)]
        names: Vec<String>,
    },
    /// Remove networks that no running container is in
    Rm {
        /// Missing ones are no error
        #[arg(short, long)]
        force: bool,
        /// Network names or IDs
        #[arg(value_name = "NETWORK", required = true)]
        names: Vec<String>,
    },
    /// Remove all networks that no container is in
    Prune {
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
    /// Put a container into a network
    Connect {
        /// What others in the network may call the container as well
        #[arg(long, value_name = "NAME")]
        alias: Vec<String>,
        /// Its address
        #[arg(long, value_name = "ADDRESS")]
        ip: Option<Ipv4Addr>,
        /// Network name or ID
        #[arg(value_name = "NETWORK")]
        network: String,
        /// Container name or ID
        #[arg(value_name = "CONTAINER")]
        container: String,
    },
    /// Take a container out of a network
    Disconnect {
        /// A container that is not in it is no error
        #[arg(short, long)]
        force: bool,
        /// Network name or ID
        #[arg(value_name = "NETWORK")]
        network: String,
        /// Container name or ID
        #[arg(value_name = "CONTAINER")]
        container: String,
    },
}
