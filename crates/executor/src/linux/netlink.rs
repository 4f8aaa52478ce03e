//! Netlink messages: an encoder, and a socket that asks and waits for the answer.
//!
//! Own code instead of a crate or the `ip` and `nft` programs: `docs/adr/0003-own-netlink.md`.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

/// `NLM_F_*` of netlink(7).
pub(super) mod flag {
    pub(in super::super) const REQUEST: u16 = 0x1;
    pub(in super::super) const ACK: u16 = 0x4;
    pub(in super::super) const DUMP: u16 = 0x300;
    pub(in super::super) const EXCL: u16 = 0x200;
    pub(in super::super) const CREATE: u16 = 0x400;
    pub(in super::super) const APPEND: u16 = 0x800;
}

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
/// `NLA_F_NESTED`, and the mask that leaves an attribute's type alone.
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// One netlink message under construction.
#[derive(Clone)]
pub(super) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// An empty message of `kind` with the fixed header of its family, `body`.
    pub(super) fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | flag::REQUEST).to_ne_bytes());
        bytes.extend_from_slice(body);
        let mut message = Self { bytes };
        message.align();
        message
    }

    /// The same message with more flags.
    pub(super) fn with_flags(mut self, flags: u16) -> Self {
        self.bytes[6] |= flags.to_ne_bytes()[0];
        self.bytes[7] |= flags.to_ne_bytes()[1];
        self
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds an attribute.
    pub(super) fn put(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).expect("attributes made here are short");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.align();
        self
    }

    /// Adds an integer in the byte order of this machine (rtnetlink).
    pub(super) fn put_u32(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Adds an integer in network byte order (nf_tables).
    pub(super) fn put_be32(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_be_bytes())
    }

    /// Adds a C string.
    pub(super) fn put_text(self, kind: u16, value: &str) -> Self {
        self.put(kind, &[value.as_bytes(), b"\0"].concat())
    }

    /// Adds an attribute that holds others.
    pub(super) fn nest(mut self, kind: u16, inside: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        let mut message = inside(self);
        let length = u16::try_from(message.bytes.len() - start).expect("messages made here are short");
        message.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        message.bytes[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
        message
    }

    /// Adds bytes without an attribute around them: a nested message's own header.
    pub(super) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self.align();
        self
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).expect("messages made here are short");
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// A netlink socket in the network namespace it was opened in.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    pub(super) fn open(protocol: Option<Protocol>) -> Result<Self, Errno> {
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { fd })
    }

    /// Sends one request and waits until the kernel did it.
    pub(super) fn request(&self, message: Message) -> Result<(), Errno> {
        self.exchange(&[message.finish(1)].concat(), 1).map(drop)
    }

    /// Sends several messages as one nf_tables transaction: all or none.
    pub(super) fn transaction(&self, messages: Vec<Message>) -> Result<(), Errno> {
        let last = u32::try_from(messages.len()).unwrap_or(u32::MAX);
        let numbered = messages.into_iter().zip(1..).map(|(message, sequence)| message.finish(sequence));
        let bytes: Vec<u8> = numbered.flatten().collect();
        // The last but one asks for an acknowledgement; NFNL_MSG_BATCH_END has none.
        self.exchange(&bytes, last - 1).map(drop)
    }

    /// Asks for a list; the bodies of all answers, behind the netlink header.
    pub(super) fn dump(&self, message: Message) -> Result<Vec<Vec<u8>>, Errno> {
        self.exchange(&message.finish(1), 1)
    }

    /// Sends, then reads until the message numbered `until` is acknowledged or the list is done.
    fn exchange(&self, bytes: &[u8], until: u32) -> Result<Vec<Vec<u8>>, Errno> {
        send(&self.fd, bytes, SendFlags::empty())?;
        let mut answers = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let received = match recv(&self.fd, &mut buffer[..], RecvFlags::empty()) {
                Err(Errno::INTR) => continue,
                other => other?.0,
            };
            let mut rest = &buffer[..received];
            while let Some((kind, sequence, body, after)) = split(rest) {
                rest = after;
                match kind {
                    NLMSG_ERROR => match i32::from_ne_bytes(word(body, 0)) {
                        0 if sequence >= until => return Ok(answers),
                        0 => {}
                        code => return Err(Errno::from_raw_os_error(-code)),
                    },
                    NLMSG_DONE => return Ok(answers),
                    _ => answers.push(body.to_vec()),
                }
            }
        }
    }
}

/// Four bytes at `at`; zeros where the kernel sent fewer.
pub(super) fn word(bytes: &[u8], at: usize) -> [u8; 4] {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).unwrap_or_default()
}

fn split(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(word(bytes, 0)) as usize;
    if length < HEADER_BYTES || length > bytes.len() {
        return None;
    }
    let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
    let after = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    Some((kind, u32::from_ne_bytes(word(bytes, 8)), &bytes[HEADER_BYTES..length], after))
}

/// The attributes in `bytes`: type without flags, and value.
pub(super) fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while bytes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        if length < 4 || length > bytes.len() {
            break;
        }
        let kind = u16::from_ne_bytes([bytes[2], bytes[3]]) & TYPE_MASK;
        found.push((kind, &bytes[4..length]));
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    found
}

/// The value of the first attribute of `kind`.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).into_iter().find(|(known, _)| *known == kind).map(|(_, value)| value)
}

/// A C string out of an attribute.
pub(super) fn text(value: &[u8]) -> &[u8] {
    value.strip_suffix(b"\0").unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let message = Message::new(16, flag::ACK, &[7; 16])
            .put_text(3, "eth0")
            .nest(18, |inside| inside.put_u32(1, 0x0102_0304).put(2, b"xyz"));
        let bytes = message.finish(9);
        let (kind, sequence, body, rest) = split(&bytes).unwrap();
        assert_eq!((kind, sequence, rest.len()), (16, 9, 0));
        assert_eq!(text(attribute(&body[16..], 3).unwrap()), b"eth0");
        let inside = attribute(&body[16..], 18).unwrap();
        assert_eq!(attribute(inside, 1), Some(&0x0102_0304u32.to_ne_bytes()[..]));
        assert_eq!(attribute(inside, 2), Some(&b"xyz"[..]));
    }

    #[test]
    fn cut_off_answers_end_the_list() {
        assert!(split(&[0; 3]).is_none());
        assert!(attributes(&[9, 0, 1, 0, 5]).is_empty());
    }
}
