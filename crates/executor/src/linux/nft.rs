//! Address translation and forwarding, told to nf_tables directly.

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::net::netlink;

use super::net::{BRIDGE, BRIDGES, PREFIX};
use super::netlink::{Message, Socket, attribute, flag, text, word};
use crate::ExecError;

/// nf_tables message types (linux/netfilter/nf_tables.h), behind their subsystem number.
pub(super) const SUBSYSTEM: u16 = 10 << 8;
pub(super) const NEWTABLE: u16 = SUBSYSTEM;
pub(super) const GETTABLE: u16 = SUBSYSTEM | 1;
pub(super) const NEWCHAIN: u16 = SUBSYSTEM | 3;
const GETCHAIN: u16 = SUBSYSTEM | 4;
pub(super) const NEWRULE: u16 = SUBSYSTEM | 6;
const GETRULE: u16 = SUBSYSTEM | 7;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

const NFPROTO_INET: u8 = 1;
pub(super) const NFPROTO_IPV4: u8 = 2;
pub(super) const NF_INET_FORWARD: u32 = 2;
pub(super) const NF_INET_POST_ROUTING: u32 = 4;
pub(super) const NF_DROP: u32 = 0;
pub(super) const NF_ACCEPT: u32 = 1;

pub(super) const TABLE_NAME: u16 = 1;
pub(super) const CHAIN_TABLE: u16 = 1;
pub(super) const CHAIN_NAME: u16 = 3;
pub(super) const CHAIN_HOOK: u16 = 4;
pub(super) const CHAIN_POLICY: u16 = 5;
pub(super) const CHAIN_TYPE: u16 = 7;
pub(super) const HOOK_NUMBER: u16 = 1;
pub(super) const HOOK_PRIORITY: u16 = 2;
pub(super) const RULE_TABLE: u16 = 1;
pub(super) const RULE_CHAIN: u16 = 2;
pub(super) const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;

pub(super) const REGISTER: u32 = 1;
const REGISTER_VERDICT: u32 = 0;
pub(super) const META_IIFNAME: u32 = 6;
pub(super) const META_OIFNAME: u32 = 7;
pub(super) const CMP_EQUAL: u32 = 0;
pub(super) const CMP_NOT_EQUAL: u32 = 1;
const CT_STATE: u32 = 0;
/// ESTABLISHED and RELATED in a connection's state bits.
const CT_KNOWN: u32 = 0b110;
const CT_STATUS: u32 = 2;
/// `IPS_DST_NAT`: a published port led here.
const CT_PUBLISHED: u32 = 1 << 5;

/// Our own table, and the mark on rules we add to other people's chains.
const TABLE: &str = "kiln";
const MARK: &[u8] = b"kiln bridges";

/// `struct nfgenmsg`.
pub(super) fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

pub(super) fn socket() -> Result<Socket, ExecError> {
    Socket::open(Some(netlink::NETFILTER)).map_err(ExecError::network("netfilter socket"))
}

pub(super) fn batch(messages: Vec<Message>) -> Vec<Message> {
    let edge = |kind| Message::new(kind, 0, &header(0, 10));
    let mut all = vec![edge(BATCH_BEGIN)];
    all.extend(messages);
    all.push(edge(BATCH_END));
    all
}

/// Adds one expression to a rule.
pub(super) fn expression(rule: Message, name: &str, data: impl FnOnce(Message) -> Message) -> Message {
    rule.nest(LIST_ELEMENT, |element| element.put_text(EXPRESSION_NAME, name).nest(EXPRESSION_DATA, data))
}

pub(super) fn compare(rule: Message, how: u32, value: &[u8]) -> Message {
    expression(rule, "cmp", |cmp| {
        cmp.put_be32(1, REGISTER).put_be32(2, how).nest(3, |data| data.put(DATA_VALUE, value))
    })
}

/// Matches packets whose interface (by `key`) is, or is not, the one called `name`.
pub(super) fn interface(rule: Message, key: u32, how: u32, name: &str) -> Message {
    let rule = load_interface(rule, key);
    // Names are compared with their padding: IFNAMSIZ bytes.
    let mut padded = [0; 16];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    compare(rule, how, &padded)
}

/// Matches packets whose interface (by `key`) is, or is not, one of kiln's bridges.
pub(super) fn any_bridge(rule: Message, key: u32, how: u32) -> Message {
    compare(load_interface(rule, key), how, BRIDGES.as_bytes())
}

fn load_interface(rule: Message, key: u32) -> Message {
    expression(rule, "meta", |meta| meta.put_be32(2, key).put_be32(1, REGISTER))
}

/// Ends a rule with a verdict.
pub(super) fn verdict(rule: Message, code: u32) -> Message {
    expression(rule, "immediate", |immediate| {
        immediate
            .put_be32(1, REGISTER_VERDICT)
            .nest(2, |data| data.nest(DATA_VERDICT, |verdict| verdict.put_be32(VERDICT_CODE, code)))
    })
}

pub(super) fn mask(rule: Message, mask: &[u8; 4]) -> Message {
    expression(rule, "bitwise", |bitwise| {
        bitwise
            .put_be32(1, REGISTER)
            .put_be32(2, REGISTER)
            .put_be32(3, 4)
            .nest(4, |data| data.put(DATA_VALUE, mask))
            .nest(5, |data| data.put(DATA_VALUE, &[0; 4]))
    })
}

/// Packets from containers to elsewhere leave with the host's address.
pub(super) fn ensure_translation(network: Ipv4Addr) -> Result<(), ExecError> {
    let socket = socket()?;
    let ask = Message::new(GETTABLE, flag::ACK, &header(NFPROTO_IPV4, 0)).put_text(TABLE_NAME, TABLE);
    match socket.dump(ask) {
        Ok(_) => return Ok(()),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(ExecError::network("look up table kiln")(errno)),
    }
    let create = flag::CREATE;
    let table = Message::new(NEWTABLE, create, &header(NFPROTO_IPV4, 0)).put_text(TABLE_NAME, TABLE);
    let chain = Message::new(NEWCHAIN, create, &header(NFPROTO_IPV4, 0))
        .put_text(CHAIN_TABLE, TABLE)
        .put_text(CHAIN_NAME, "postrouting")
        .nest(CHAIN_HOOK, |hook| {
            // Priority 100 is source translation (NF_IP_PRI_NAT_SRC).
            hook.put_be32(HOOK_NUMBER, NF_INET_POST_ROUTING).put_be32(HOOK_PRIORITY, 100)
        })
        .put_be32(CHAIN_POLICY, NF_ACCEPT)
        .put_text(CHAIN_TYPE, "nat");
    let rule = Message::new(NEWRULE, create | flag::APPEND | flag::ACK, &header(NFPROTO_IPV4, 0))
        .put_text(RULE_TABLE, TABLE)
        .put_text(RULE_CHAIN, "postrouting")
        .nest(RULE_EXPRESSIONS, |rule| {
            // ip saddr: 4 bytes at offset 12 of the network header.
            let rule = expression(rule, "payload", |payload| {
                payload.put_be32(1, REGISTER).put_be32(2, 1).put_be32(3, 12).put_be32(4, 4)
            });
            let bits = u32::MAX << (32 - u32::from(PREFIX));
            let rule = mask(rule, &bits.to_be_bytes());
            let rule = compare(rule, CMP_EQUAL, &network.octets());
            let rule = interface(rule, META_OIFNAME, CMP_NOT_EQUAL, BRIDGE);
            expression(rule, "masq", |masq| masq)
        });
    match socket.transaction(batch(vec![table, chain, rule])) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(ExecError::network("address translation")(errno)),
    }
}

/// A base chain of somebody else that drops what is forwarded.
struct Dropping {
    family: u8,
    table: Vec<u8>,
    chain: Vec<u8>,
}

/// Lets containers' packets through where docker, podman or an administrator set the policy of
/// forwarding to drop. An accept in our own table would not do: every base chain must agree.
pub(super) fn ensure_forwarding() -> Result<(), ExecError> {
    if std::fs::read_to_string("/proc/net/ip_tables_names").is_ok_and(|names| names.contains("filter")) {
        allow_with_iptables(&["iptables-legacy", "iptables"])?;
    }
    let socket = socket()?;
    for chain in dropping_chains(&socket)? {
        if has_our_rule(&socket, &chain)? {
            continue;
        }
        // iptables-nft owns this one and shows only rules it wrote itself.
        let is_iptables =
            chain.family == NFPROTO_IPV4 && chain.table == b"filter" && chain.chain == b"FORWARD";
        if is_iptables && allow_with_iptables(&["iptables-nft", "iptables"])? {
            continue;
        }
        let rules = [Through::Out, Through::Answers, Through::Published];
        let rules = rules.map(|what| forward_rule(&chain, what)).to_vec();
        socket.transaction(batch(rules)).map_err(ExecError::network("allow forwarding"))?;
    }
    Ok(())
}

fn dropping_chains(socket: &Socket) -> Result<Vec<Dropping>, ExecError> {
    let chains = match socket.dump(Message::new(GETCHAIN, flag::DUMP, &header(0, 0))) {
        Err(Errno::OPNOTSUPP | Errno::NOENT) => Vec::new(),
        other => other.map_err(ExecError::network("list of chains"))?,
    };
    Ok(chains.iter().filter_map(|body| parse_dropping(body)).collect())
}

fn parse_dropping(body: &[u8]) -> Option<Dropping> {
    let (family, attributes) = (*body.first()?, body.get(4..)?);
    let hook = attribute(attributes, CHAIN_HOOK)?;
    let number = u32::from_be_bytes(word(attribute(hook, HOOK_NUMBER)?, 0));
    let policy = u32::from_be_bytes(word(attribute(attributes, CHAIN_POLICY)?, 0));
    let ours = matches!(family, NFPROTO_INET | NFPROTO_IPV4);
    (ours && number == NF_INET_FORWARD && policy == NF_DROP).then_some(())?;
    Some(Dropping {
        family,
        table: text(attribute(attributes, CHAIN_TABLE)?).to_vec(),
        chain: text(attribute(attributes, CHAIN_NAME)?).to_vec(),
    })
}

fn has_our_rule(socket: &Socket, chain: &Dropping) -> Result<bool, ExecError> {
    let ask = Message::new(GETRULE, flag::DUMP, &header(chain.family, 0))
        .put(RULE_TABLE, &[&chain.table[..], b"\0"].concat())
        .put(RULE_CHAIN, &[&chain.chain[..], b"\0"].concat());
    let rules = socket.dump(ask).map_err(ExecError::network("list of rules"))?;
    let marked = |body: &Vec<u8>| body.get(4..).and_then(|rest| attribute(rest, RULE_USERDATA)) == Some(MARK);
    Ok(rules.iter().any(marked))
}

/// What kiln's rules in somebody else's chain let through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Through {
    /// Out of a bridge: anything.
    Out,
    /// Into one: answers.
    Answers,
    /// And what a published port has led there.
    Published,
}

fn forward_rule(chain: &Dropping, what: Through) -> Message {
    // Without NLM_F_APPEND a rule goes to the head of its chain.
    let last = if what == Through::Published { flag::ACK } else { 0 };
    Message::new(NEWRULE, flag::CREATE | last, &header(chain.family, 0))
        .put(RULE_TABLE, &[&chain.table[..], b"\0"].concat())
        .put(RULE_CHAIN, &[&chain.chain[..], b"\0"].concat())
        .nest(RULE_EXPRESSIONS, |rule| {
            let key = if what == Through::Out { META_IIFNAME } else { META_OIFNAME };
            let rule = any_bridge(rule, key, CMP_EQUAL);
            let rule = match what {
                Through::Out => rule,
                Through::Answers => connection(rule, CT_STATE, CT_KNOWN),
                Through::Published => connection(rule, CT_STATUS, CT_PUBLISHED),
            };
            verdict(rule, NF_ACCEPT)
        })
        .put(RULE_USERDATA, MARK)
}

/// Matches packets of connections that have one of these bits.
fn connection(rule: Message, key: u32, bits: u32) -> Message {
    let rule = expression(rule, "ct", |ct| ct.put_be32(2, key).put_be32(1, REGISTER));
    compare(mask(rule, &bits.to_ne_bytes()), CMP_NOT_EQUAL, &[0; 4])
}

/// Adds the three rules through the first of `programs` that is installed; false when none is.
fn allow_with_iptables(programs: &[&str]) -> Result<bool, ExecError> {
    let any = format!("{BRIDGES}+");
    let out: &[&str] = &["-i", &any, "-j", "ACCEPT"];
    let answers: &[&str] =
        &["-o", &any, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"];
    let published: &[&str] = &["-o", &any, "-m", "conntrack", "--ctstate", "DNAT", "-j", "ACCEPT"];
    let run = |program: &str, action: &str, rule: &[&str]| {
        Command::new(program)
            // Users' paths often lack the administrator's; monitors have none.
            .env("PATH", "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin")
            .args(["-w", "5", action, "FORWARD"])
            .args(rule)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
    };
    for program in programs {
        let mut installed = true;
        for rule in [out, answers, published] {
            match run(program, "-C", rule) {
                Ok(status) if status.success() => continue,
                Ok(_) => {}
                Err(_) => {
                    installed = false;
                    break;
                }
            }
            let added = run(program, "-I", rule);
            if !added.is_ok_and(|status| status.success()) {
                let step = format!("{program} -I FORWARD {}", rule.join(" "));
                return Err(ExecError::network(step)(Errno::PERM));
            }
        }
        if installed {
            return Ok(true);
        }
    }
    Ok(false)
}
