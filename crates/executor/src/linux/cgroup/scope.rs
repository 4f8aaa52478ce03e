//! A user's own part of the control groups: asked of the service manager of his session.
//!
//! A login shell is in a group that belongs to root, and so is everything that it starts. The user's
//! service manager has a part of the tree that is his, and gives pieces of it away: a *scope* is such a
//! piece, with processes that somebody else has started in it. It is asked for over D-Bus, with the one
//! call that this takes (`org.freedesktop.systemd1.Manager.StartTransientUnit`), and is gone with the
//! last process in it.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kiln_oci::IdMap;

/// How long the service manager may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// A message may be so long; answers have some hundred bytes.
const LONGEST: u32 = 1 << 20;

/// Where the user's D-Bus is, if there is one.
pub(super) fn bus() -> Option<PathBuf> {
    let given = std::env::var("DBUS_SESSION_BUS_ADDRESS").unwrap_or_default();
    let given = given.split(';').find_map(|address| {
        let path = address.strip_prefix("unix:")?.split(',').find_map(|part| part.strip_prefix("path="));
        path.map(PathBuf::from)
    });
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("bus"));
    // In a user namespace, this process's own number is another one than the directory's name.
    let own = outer_uid().map(|uid| PathBuf::from(format!("/run/user/{uid}/bus")));
    [given, runtime, own].into_iter().flatten().find(|path| path.exists())
}

/// The number of the user outside of this process's user namespace.
fn outer_uid() -> Option<u32> {
    let own = fs::metadata("/proc/self").ok()?.uid();
    let map = fs::read_to_string("/proc/self/uid_map").ok()?;
    IdMap::parse(&map).outside(own)
}

/// Moves this process to a scope of its own, of which it may make a tree of groups. Costs some
/// milliseconds.
///
/// # Errors
/// When there is no bus, or the service manager says no; its words are in the error.
pub(super) fn enter() -> io::Result<()> {
    let bus = bus().ok_or_else(|| io::Error::other("there is no service manager of this user's"))?;
    let name = format!("kiln-{}.scope", std::process::id());
    request(UnixStream::connect(bus)?, &name, std::process::id())?;
    // The answer says that the manager has begun.
    let since = Instant::now();
    loop {
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        if groups.lines().any(|line| line.starts_with("0::") && line.contains(&name)) {
            return Ok(());
        }
        if since.elapsed() > PATIENCE {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the service manager made no scope"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Asks for a scope of this name with a process in it.
fn request(mut stream: UnixStream, name: &str, pid: u32) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    // Who this is, the socket says: a number would have to be that outside of the user namespace.
    stream.write_all(b"\0AUTH EXTERNAL\r\n")?;
    expect(&mut stream, "DATA")?;
    stream.write_all(b"DATA\r\n")?;
    expect(&mut stream, "OK")?;
    stream.write_all(b"BEGIN\r\n")?;

    let bus = ["/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus", "Hello"];
    stream.write_all(&call(1, bus, "", &[]))?;
    answer(&mut stream, 1)?;
    let manager = [
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1",
        "org.freedesktop.systemd1.Manager",
        "StartTransientUnit",
    ];
    stream.write_all(&call(2, manager, "ssa(sv)a(sa(sv))", &unit(name, pid)))?;
    answer(&mut stream, 2)
}

/// Reads a line of the greeting, byte by byte: what follows is for others to read.
fn expect(stream: &mut UnixStream, word: &str) -> io::Result<()> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\r\n") {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
        if line.len() > 4096 {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    if line.starts_with(word.as_bytes()) {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&line).trim_end().to_owned();
    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("the user's D-Bus answers {said}")))
}

/// Values in D-Bus's own form, each at an offset that its size divides.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn pad(&mut self, size: usize) {
        self.0.resize(self.0.len().next_multiple_of(size), 0);
    }

    fn number(&mut self, number: u32) {
        self.pad(4);
        self.0.extend(number.to_le_bytes());
    }

    fn string(&mut self, text: &str) {
        self.number(u32::try_from(text.len()).unwrap_or(0));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.0.push(u8::try_from(text.len()).unwrap_or(0));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// An array of what `fill` writes, whose elements begin at multiples of `size`.
    fn array(&mut self, size: usize, fill: impl FnOnce(&mut Self)) {
        self.number(0);
        let length_at = self.0.len() - 4;
        self.pad(size);
        let begin = self.0.len();
        fill(self);
        let length = u32::try_from(self.0.len() - begin).unwrap_or(0);
        self.0[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// A property: its name, and a value of this type.
    fn property(&mut self, name: &str, kind: &str, value: impl FnOnce(&mut Self)) {
        self.pad(8);
        self.string(name);
        self.signature(kind);
        value(self);
    }
}

/// The arguments of the call: name, what to do with another of that name, properties, other units.
fn unit(name: &str, pid: u32) -> Vec<u8> {
    let mut body = Message::default();
    body.string(name);
    body.string("fail");
    body.array(8, |all| {
        all.property("Description", "s", |value| value.string("kiln and its containers"));
        all.property("Delegate", "b", |value| value.number(1));
        all.property("CollectMode", "s", |value| value.string("inactive-or-failed"));
        all.property("PIDs", "au", |value| value.array(4, |pids| pids.number(pid)));
    });
    body.array(8, |_| {});
    body.0
}

/// A method call; `to` is object, destination, interface and method.
fn call(serial: u32, to: [&str; 4], signature: &str, body: &[u8]) -> Vec<u8> {
    // Little-endian, a call, no flags, version 1.
    let mut message = Message(vec![b'l', 1, 0, 1]);
    message.number(u32::try_from(body.len()).unwrap_or(0));
    message.number(serial);
    message.array(8, |fields| {
        for (code, kind, value) in [(1, "o", to[0]), (6, "s", to[1]), (2, "s", to[2]), (3, "s", to[3])] {
            fields.pad(8);
            fields.0.push(code);
            fields.signature(kind);
            fields.string(value);
        }
        if !signature.is_empty() {
            fields.pad(8);
            fields.0.push(8);
            fields.signature("g");
            fields.signature(signature);
        }
    });
    message.pad(8);
    message.0.extend(body);
    message.0
}

/// Reads messages up to the answer to a call.
fn answer(stream: &mut UnixStream, serial: u32) -> io::Result<()> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "the user's D-Bus speaks another language");
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (length, fields) = (number(4), number(12));
        if head[0] != b'l' || length > LONGEST || fields > LONGEST {
            return Err(wrong());
        }
        let mut rest = vec![0; (fields as usize).next_multiple_of(8) + length as usize];
        stream.read_exact(&mut rest)?;
        let body = rest.split_off((fields as usize).next_multiple_of(8));
        rest.truncate(fields as usize);
        if reply_serial(&rest) != Some(serial) {
            continue;
        }
        if head[1] == 2 {
            return Ok(());
        }
        // An error's first value is what is to be said of it.
        let text = text_at(&body, 0).map(|(text, _)| text);
        let text = text.unwrap_or_else(|| "the user's service manager refuses".to_owned());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// A text and where it ends.
fn text_at(bytes: &[u8], at: usize) -> Option<(String, usize)> {
    let at = at.next_multiple_of(4);
    let length = u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize;
    let text = bytes.get(at + 4..(at + 4).checked_add(length)?)?;
    Some((String::from_utf8_lossy(text).into_owned(), at + 4 + length + 1))
}

/// Of a message's header, the field that says which call it answers.
fn reply_serial(fields: &[u8]) -> Option<u32> {
    // The fields begin at an offset of 16, so that multiples of 8 are multiples of 8 here.
    let mut at = 0;
    loop {
        at = usize::next_multiple_of(at, 8);
        let (code, length) = (*fields.get(at)?, usize::from(*fields.get(at + 1)?));
        let kind = fields.get(at + 2..at + 2 + length)?;
        let value = at + 2 + length + 1;
        at = match kind {
            b"u" => {
                let value = value.next_multiple_of(4);
                let number = u32::from_le_bytes(fields.get(value..value + 4)?.try_into().ok()?);
                if code == 5 {
                    return Some(number);
                }
                value + 4
            }
            b"s" | b"o" => text_at(fields, value)?.1,
            b"g" => value + 1 + usize::from(*fields.get(value)?) + 1,
            _ => return None,
        };
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Answers as a bus does; what the client has said.
    fn bus_that(answers: Vec<Vec<u8>>) -> (UnixStream, thread::JoinHandle<Vec<u8>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut said = Vec::new();
            let mut take = |until: &[u8], stream: &mut UnixStream| {
                let mut byte = [0];
                while !said.ends_with(until) && stream.read(&mut byte).is_ok_and(|read| read > 0) {
                    said.push(byte[0]);
                }
            };
            take(b"EXTERNAL\r\n", &mut theirs);
            theirs.write_all(b"DATA\r\n").unwrap();
            take(b"DATA\r\n", &mut theirs);
            theirs.write_all(b"OK 0123\r\n").unwrap();
            take(b"BEGIN\r\n", &mut theirs);
            // Who has seen enough hangs up.
            answers.iter().for_each(|answer| drop(theirs.write_all(answer)));
            drop(theirs.shutdown(std::net::Shutdown::Write));
            drop(theirs.read_to_end(&mut said));
            said
        });
        (ours, server)
    }

    /// An answer to a call, or a signal when it answers none.
    fn message(kind: u8, answers: Option<u32>, body: &[u8]) -> Vec<u8> {
        let mut message = Message(vec![b'l', kind, 1, 1]);
        message.number(u32::try_from(body.len()).unwrap());
        message.number(7);
        message.array(8, |fields| {
            fields.pad(8);
            fields.0.push(6);
            fields.signature("s");
            fields.string(":1.42");
            fields.pad(8);
            fields.0.push(8);
            fields.signature("g");
            fields.signature("s");
            if let Some(serial) = answers {
                fields.pad(8);
                fields.0.push(5);
                fields.signature("u");
                fields.number(serial);
            }
        });
        message.pad(8);
        message.0.extend(body);
        message.0
    }

    fn text(text: &str) -> Vec<u8> {
        let mut body = Message::default();
        body.string(text);
        body.0
    }

    #[test]
    fn a_scope_is_asked_for_with_the_process_in_it() {
        let answers = vec![
            message(4, None, &text("NameAcquired")),
            message(2, Some(1), &text(":1.42")),
            message(4, None, &text("JobNew")),
            message(2, Some(2), &text("/org/freedesktop/systemd1/job/1")),
        ];
        let (stream, server) = bus_that(answers);
        request(stream, "kiln-5.scope", 0x0102_0304).unwrap();
        let said = server.join().unwrap();
        let has = |part: &[u8]| said.windows(part.len()).any(|window| window == part);
        // At last, an array of one number: its length, and the process.
        for part in
            [&b"StartTransientUnit\0"[..], b"kiln-5.scope\0", b"Delegate\0", b"\x04\0\0\0\x04\x03\x02\x01"]
        {
            assert!(has(part), "{}", String::from_utf8_lossy(&said));
        }
    }

    #[test]
    fn what_the_service_manager_says_is_passed_on() {
        let answers = vec![message(2, Some(1), &[]), message(3, Some(2), &text("Unit exists already."))];
        let (stream, server) = bus_that(answers);
        assert_eq!(request(stream, "kiln-5.scope", 1).unwrap_err().to_string(), "Unit exists already.");
        server.join().unwrap();
    }

    #[test]
    fn nonsense_is_an_error_and_no_panic() {
        for answers in [
            vec![],
            vec![vec![0; 16]],
            vec![vec![0xff; 64]],
            vec![message(2, Some(1), &[]), message(3, Some(2), &[0xff; 3])],
            vec![
                message(2, Some(1), &[]),
                b"l\x03\x01\x01\0\0\0\0\x07\0\0\0\x05\0\0\0\x05\x01u\0\xff\0\0\0".to_vec(),
            ],
        ] {
            let (stream, server) = bus_that(answers);
            assert!(request(stream, "kiln-5.scope", 1).is_err());
            server.join().unwrap();
        }
    }
}
