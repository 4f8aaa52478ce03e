//! Questions and answers of the domain name system (RFC 1035), as far as a resolver for containers
//! needs to understand them.

use std::net::Ipv4Addr;

const HEADER: usize = 12;
const CLASS_IN: u16 = 1;
const TYPE_A: u16 = 1;
const TYPE_PTR: u16 = 12;
/// How long an answer may be remembered, in seconds: containers come and go.
const TIME_TO_LIVE: u32 = 5;

/// There is no such name.
pub(crate) const NO_NAME: u8 = 3;
/// Nobody could be asked.
pub(crate) const SERVER_FAILED: u8 = 2;

/// A question for one name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Question {
    /// In lower case, without a dot at the end.
    pub(crate) name: String,
    kind: u16,
    /// Where the question ends.
    end: usize,
}

/// What is known of a name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Known {
    Addresses(Vec<Ipv4Addr>),
    Name(String),
}

impl Question {
    /// The question in a message; `None`: it is none, or none that this can answer.
    pub(crate) fn parse(message: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
        // A standard query, not an answer, with a single question.
        let (flags, questions) = (word(2)?, word(4)?);
        if flags & 0xf800 != 0 || questions != 1 {
            return None;
        }
        let (mut name, mut at) = (String::new(), HEADER);
        loop {
            let length = usize::from(*message.get(at)?);
            if length == 0 {
                break;
            }
            // No pointers: there is nothing before that they could point to.
            if length > 63 || name.len() > 255 {
                return None;
            }
            let label = message.get(at + 1..at + 1 + length)?;
            if !name.is_empty() {
                name.push('.');
            }
            name.push_str(&std::str::from_utf8(label).ok()?.to_ascii_lowercase());
            at += 1 + length;
        }
        let (kind, class) = (word(at + 1)?, word(at + 3)?);
        (class == CLASS_IN).then_some(Self { name, kind, end: at + 5 })
    }

    /// The address whose name is asked for.
    pub(crate) fn reverse(&self) -> Option<Ipv4Addr> {
        let text = self.name.strip_suffix(".in-addr.arpa").filter(|_| self.kind == TYPE_PTR)?;
        let address: Ipv4Addr = text.parse().ok()?;
        Some(u32::from(address).swap_bytes().into())
    }

    /// The answer to `message`, whose question this is. Without what is asked for, it says that the
    /// name is there, but nothing of this kind.
    pub(crate) fn answer(&self, message: &[u8], known: &Known) -> Vec<u8> {
        let mut records: Vec<Vec<u8>> = Vec::new();
        match known {
            Known::Addresses(addresses) if self.kind == TYPE_A => {
                records.extend(addresses.iter().map(|address| address.octets().to_vec()));
            }
            Known::Name(name) if self.kind == TYPE_PTR => {
                let mut bytes = Vec::new();
                for label in name.split('.').map(str::as_bytes) {
                    bytes.push(u8::try_from(label.len().min(63)).unwrap_or(63));
                    bytes.extend_from_slice(&label[..label.len().min(63)]);
                }
                bytes.push(0);
                records.push(bytes);
            }
            _ => {}
        }
        let mut answer = reply(message, self.end, 0);
        answer[6..8].copy_from_slice(&u16::try_from(records.len()).unwrap_or(0).to_be_bytes());
        for record in records {
            // A pointer to the name in the question.
            answer.extend_from_slice(&[0xc0, 0x0c]);
            answer.extend_from_slice(&self.kind.to_be_bytes());
            answer.extend_from_slice(&CLASS_IN.to_be_bytes());
            answer.extend_from_slice(&TIME_TO_LIVE.to_be_bytes());
            answer.extend_from_slice(&u16::try_from(record.len()).unwrap_or(0).to_be_bytes());
            answer.extend_from_slice(&record);
        }
        answer
    }

    /// The answer that there is none.
    pub(crate) fn refuse(&self, message: &[u8], why: u8) -> Vec<u8> {
        reply(message, self.end, why)
    }
}

/// The head of an answer, with the question up to `end`.
fn reply(message: &[u8], end: usize, code: u8) -> Vec<u8> {
    let mut answer = message[..end].to_vec();
    // An answer; recursion as it was asked for, and available.
    answer[2] = 0x80 | (message[2] & 0x01);
    answer[3] = 0x80 | code;
    answer[6..HEADER].fill(0);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&[0, 1]);
        // An EDNS record behind it.
        bytes.extend_from_slice(&[0, 0, 41, 4, 0, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn questions_are_read_and_answered() {
        let message = query("Web.Example", TYPE_A);
        let question = Question::parse(&message).unwrap();
        assert_eq!(question.name, "web.example");
        let known = Known::Addresses(vec![Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)]);
        let answer = question.answer(&message, &known);
        assert_eq!(answer[..12], [0x12, 0x34, 0x81, 0x80, 0, 1, 0, 2, 0, 0, 0, 0]);
        let record = [0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 0, 0, 2];
        assert!(answer.ends_with(&record));
        // IPv6: the name is there, no address is.
        let message = query("web", 28);
        let answer = Question::parse(&message).unwrap().answer(&message, &known);
        assert_eq!((answer[3], &answer[4..8]), (0x80, &[0, 1, 0, 0][..]));
        assert_eq!(Question::parse(&message).unwrap().refuse(&message, NO_NAME)[3], 0x83);
    }

    #[test]
    fn addresses_have_names() {
        let message = query("4.3.2.10.in-addr.arpa", TYPE_PTR);
        let question = Question::parse(&message).unwrap();
        assert_eq!(question.reverse(), Some(Ipv4Addr::new(10, 2, 3, 4)));
        let answer = question.answer(&message, &Known::Name("web.net".to_owned()));
        assert!(answer.ends_with(b"\x00\x09\x03web\x03net\x00"));
    }

    #[test]
    fn nothing_is_read_where_nothing_is() {
        let whole = query("web.example", TYPE_A);
        for length in 0..HEADER + 17 {
            assert_eq!(Question::parse(&whole[..length]), None, "{length}");
        }
        for (at, byte) in [(2, 0x81), (5, 2), (12, 0xc0), (12, 63)] {
            let mut bad = whole.clone();
            bad[at] = byte;
            assert_eq!(Question::parse(&bad), None, "{at}");
        }
    }
}
