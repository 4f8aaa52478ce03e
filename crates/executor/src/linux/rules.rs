//! Rules of nf_tables that stand in tables of their own: networks that users make, published ports,
//! the resolver inside a container.

use std::net::Ipv4Addr;

use rustix::io::Errno;

use super::bridges::Bridge;
use super::netlink::{Message, Socket, flag};
use super::nft::{
    CHAIN_HOOK, CHAIN_NAME, CHAIN_POLICY, CHAIN_TABLE, CHAIN_TYPE, CMP_EQUAL, CMP_NOT_EQUAL, GETTABLE,
    HOOK_NUMBER, HOOK_PRIORITY, META_IIFNAME, META_OIFNAME, NEWCHAIN, NEWRULE, NEWTABLE, NF_ACCEPT, NF_DROP,
    NF_INET_FORWARD, NF_INET_POST_ROUTING, NFPROTO_IPV4, REGISTER, RULE_CHAIN, RULE_EXPRESSIONS, RULE_TABLE,
    SUBSYSTEM, TABLE_NAME, any_bridge, batch, compare, expression, header, interface, mask, socket, verdict,
};
use super::subnet::Subnet;
use crate::ExecError;

const DELTABLE: u16 = SUBSYSTEM | 2;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_LOCAL_OUT: u32 = 3;
const TABLE_FLAGS: u16 = 2;
/// The table goes with the socket that made it (Linux 5.12).
const TABLE_OWNER: u32 = 2;
const SECOND_REGISTER: u32 = 2;
const NAT_DESTINATION: u32 = 1;
const FIB_ADDRESS_TYPE: u32 = 3;
const FIB_BY_DESTINATION: u32 = 1 << 1;
const RTN_LOCAL: u32 = 2;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// Where chains hang (linux/netfilter_ipv4.h): destination translation, filters, source translation.
const BEFORE_ROUTING: i32 = -100;
const FILTER: i32 = 0;
const AFTER_ROUTING: i32 = 100;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// A chain on a hook; the name is the hook's.
struct Hook {
    name: &'static str,
    kind: &'static str,
    number: u32,
    priority: i32,
}

const FORWARD: Hook = Hook { name: "forward", kind: "filter", number: NF_INET_FORWARD, priority: FILTER };
const POSTROUTING: Hook =
    Hook { name: "postrouting", kind: "nat", number: NF_INET_POST_ROUTING, priority: AFTER_ROUTING };
const PREROUTING: Hook =
    Hook { name: "prerouting", kind: "nat", number: NF_INET_PRE_ROUTING, priority: BEFORE_ROUTING };
const OUTPUT: Hook =
    Hook { name: "output", kind: "nat", number: NF_INET_LOCAL_OUT, priority: BEFORE_ROUTING };

/// A table under construction; it comes into being in one step.
struct Table<'a> {
    name: &'a str,
    messages: Vec<Message>,
}

impl<'a> Table<'a> {
    fn new(name: &'a str, flags: u32) -> Self {
        // EXCL: one that is there is another's, or whole.
        let table = Message::new(NEWTABLE, flag::CREATE | flag::EXCL, &header(NFPROTO_IPV4, 0))
            .put_text(TABLE_NAME, name)
            .put_be32(TABLE_FLAGS, flags);
        Self { name, messages: vec![table] }
    }

    fn chain(&mut self, hook: &Hook) {
        let chain = Message::new(NEWCHAIN, flag::CREATE, &header(NFPROTO_IPV4, 0))
            .put_text(CHAIN_TABLE, self.name)
            .put_text(CHAIN_NAME, hook.name)
            .nest(CHAIN_HOOK, |nest| {
                nest.put_be32(HOOK_NUMBER, hook.number).put_be32(HOOK_PRIORITY, hook.priority.cast_unsigned())
            })
            .put_be32(CHAIN_POLICY, NF_ACCEPT)
            .put_text(CHAIN_TYPE, hook.kind);
        self.messages.push(chain);
    }

    fn rule(&mut self, hook: &Hook, expressions: impl FnOnce(Message) -> Message) {
        let rule = Message::new(NEWRULE, flag::CREATE | flag::APPEND, &header(NFPROTO_IPV4, 0))
            .put_text(RULE_TABLE, self.name)
            .put_text(RULE_CHAIN, hook.name)
            .nest(RULE_EXPRESSIONS, expressions);
        self.messages.push(rule);
    }

    fn commit(mut self, socket: &Socket) -> Result<(), Errno> {
        if let Some(last) = self.messages.pop() {
            self.messages.push(last.with_flags(flag::ACK));
        }
        socket.transaction(batch(self.messages))
    }
}

/// Loads bytes of a packet's header.
fn payload(rule: Message, base: u32, offset: u32, length: u32) -> Message {
    expression(rule, "payload", |payload| {
        payload.put_be32(1, REGISTER).put_be32(2, base).put_be32(3, offset).put_be32(4, length)
    })
}

fn from_subnet(rule: Message, subnet: Subnet) -> Message {
    let rule = payload(rule, NETWORK_HEADER, 12, 4);
    let bits = u32::MAX.checked_shl(32 - u32::from(subnet.prefix())).unwrap_or(0);
    compare(mask(rule, &bits.to_be_bytes()), CMP_EQUAL, &subnet.network().octets())
}

fn to_address(rule: Message, address: Ipv4Addr) -> Message {
    compare(payload(rule, NETWORK_HEADER, 16, 4), CMP_EQUAL, &address.octets())
}

/// Matches packets to one of this host's addresses.
fn to_this_host(rule: Message) -> Message {
    let rule = expression(rule, "fib", |fib| {
        fib.put_be32(1, REGISTER).put_be32(2, FIB_ADDRESS_TYPE).put_be32(3, FIB_BY_DESTINATION)
    });
    compare(rule, CMP_EQUAL, &RTN_LOCAL.to_ne_bytes())
}

fn to_port(rule: Message, protocol: u8, port: u16) -> Message {
    let rule = compare(payload(rule, NETWORK_HEADER, 9, 1), CMP_EQUAL, &[protocol]);
    compare(payload(rule, TRANSPORT_HEADER, 2, 2), CMP_EQUAL, &port.to_be_bytes())
}

fn translate_destination(rule: Message, address: Ipv4Addr, port: u16) -> Message {
    let load = |rule, register, bytes: &[u8]| {
        expression(rule, "immediate", |immediate| {
            immediate.put_be32(1, register).nest(2, |data| data.put(1, bytes))
        })
    };
    let rule = load(rule, REGISTER, &address.octets());
    let rule = load(rule, SECOND_REGISTER, &port.to_be_bytes());
    expression(rule, "nat", |nat| {
        nat.put_be32(1, NAT_DESTINATION)
            .put_be32(2, NFPROTO_IPV4.into())
            .put_be32(3, REGISTER)
            .put_be32(5, SECOND_REGISTER)
    })
}

fn has_table(socket: &Socket, name: &str) -> Result<bool, Errno> {
    let ask = Message::new(GETTABLE, flag::ACK, &header(NFPROTO_IPV4, 0)).put_text(TABLE_NAME, name);
    match socket.dump(ask) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Keeps a network apart from kiln's others, and lets it out with the host's address, unless it is to
/// stay inside.
pub(super) fn ensure_network(bridge: &Bridge) -> Result<(), ExecError> {
    let socket = socket()?;
    let name = bridge.name.as_str();
    let failed = || ExecError::network(format!("rules of {name}"));
    if has_table(&socket, name).map_err(failed())? {
        return Ok(());
    }
    let mut table = Table::new(name, 0);
    table.chain(&FORWARD);
    for (here, there) in [(META_IIFNAME, META_OIFNAME), (META_OIFNAME, META_IIFNAME)] {
        table.rule(&FORWARD, |rule| {
            let rule = interface(rule, here, CMP_EQUAL, name);
            let rule = if bridge.internal { rule } else { any_bridge(rule, there, CMP_EQUAL) };
            verdict(interface(rule, there, CMP_NOT_EQUAL, name), NF_DROP)
        });
    }
    if !bridge.internal {
        table.chain(&POSTROUTING);
        table.rule(&POSTROUTING, |rule| {
            let rule = interface(from_subnet(rule, bridge.subnet), META_OIFNAME, CMP_NOT_EQUAL, name);
            expression(rule, "masq", |masq| masq)
        });
    }
    match table.commit(&socket) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(failed()(errno)),
    }
}

/// Removes a table of kiln's; one that is not there is removed.
pub(super) fn remove_table(name: &str) -> Result<(), ExecError> {
    let delete = Message::new(DELTABLE, flag::ACK, &header(NFPROTO_IPV4, 0)).put_text(TABLE_NAME, name);
    match socket()?.transaction(batch(vec![delete])) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(ExecError::network(format!("remove rules of {name}"))(errno)),
    }
}

/// A port of the host that leads to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedPort {
    /// UDP; else TCP.
    pub udp: bool,
    /// Address of the host; `None`: all.
    pub address: Option<Ipv4Addr>,
    /// Port of the host.
    pub host: u16,
    /// Where it leads.
    pub to: (Ipv4Addr, u16),
}

/// Rules that take what other machines send to published ports straight to the container, which then
/// knows who sent it. The kernel removes them with this, however this process ends.
#[derive(Debug)]
pub struct PublishedPorts {
    _owner: Socket,
}

impl PublishedPorts {
    /// Adds the rules as the table `kiln-port-<name>`. `None`: this kernel cannot; somebody has to
    /// listen on the ports then. What comes from the host itself or from containers is left alone:
    /// somebody has to listen for that anyway.
    ///
    /// # Errors
    /// When netfilter cannot be asked.
    pub fn add(name: &str, ports: &[PublishedPort]) -> Result<Option<Self>, ExecError> {
        let socket = socket()?;
        let name = format!("kiln-port-{name}");
        let mut table = Table::new(&name, TABLE_OWNER);
        table.chain(&PREROUTING);
        for port in ports {
            table.rule(&PREROUTING, |rule| {
                let rule = any_bridge(rule, META_IIFNAME, CMP_NOT_EQUAL);
                let rule = interface(rule, META_IIFNAME, CMP_NOT_EQUAL, "lo");
                let rule = match port.address {
                    Some(address) => to_address(rule, address),
                    None => to_this_host(rule),
                };
                let rule = to_port(rule, if port.udp { UDP } else { TCP }, port.host);
                translate_destination(rule, port.to.0, port.to.1)
            });
        }
        Ok(table.commit(&socket).is_ok().then_some(Self { _owner: socket }))
    }
}

/// In the network namespace this thread is in: takes what is sent to `server`, port 53, to another port
/// of it, so that the container's own servers can have port 53.
///
/// # Errors
/// When the kernel refuses.
pub fn redirect_resolver(server: Ipv4Addr, udp: u16, tcp: u16) -> Result<(), ExecError> {
    let mut table = Table::new("kiln-resolver", 0);
    table.chain(&OUTPUT);
    for (protocol, port) in [(UDP, udp), (TCP, tcp)] {
        table.rule(&OUTPUT, |rule| {
            translate_destination(to_port(to_address(rule, server), protocol, 53), server, port)
        });
    }
    table.commit(&socket()?).map_err(ExecError::network("resolver"))
}
