//! Carries what comes to published ports of the host into the container.
//!
//! One thread for all ports of a container. TCP: two connections and a buffer each way, until both
//! sides have said all. UDP: a socket towards the container for each sender, until nothing came or went
//! for a while.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kiln_executor::NetworkNamespace;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, accept_with, connect, recv, send,
    shutdown, socket_with, sockopt,
};

use super::datagrams;

/// A sender of datagrams who is silent for so long is forgotten.
const SILENCE: Duration = Duration::from_secs(90);
/// So many senders are remembered for each port.
const SENDERS: usize = 1024;
/// How long nobody is let in after descriptors have run out.
const PATIENCE: Duration = Duration::from_millis(100);
const BUFFER: usize = 64 << 10;
/// Tokens of epoll below this are sockets of ports, above it connections and senders.
const FIRST: u64 = 1 << 32;
const STOP: u64 = u64::MAX;

/// A socket of the host, and where what comes to it goes.
#[derive(Debug)]
pub(super) struct Door {
    pub(super) socket: OwnedFd,
    pub(super) udp: bool,
    /// The container's address, which may change.
    pub(super) address: Arc<AtomicU32>,
    pub(super) inside: u16,
}

impl Door {
    fn to(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.address.load(Ordering::Relaxed).into(), self.inside)
    }
}

/// The thread that carries; it ends with this.
#[derive(Debug)]
pub(super) struct Proxy {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts carrying, towards addresses in `network` where one is given. The doors' sockets do not
    /// block.
    pub(super) fn start(doors: Vec<Door>, network: Option<NetworkNamespace>) -> std::io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)?;
        for (at, door) in doors.iter().enumerate() {
            let token = epoll::EventData::new_u64(at as u64);
            epoll::add(&epoll, &door.socket, token, epoll::EventFlags::IN)?;
        }
        let carrier = Carrier {
            epoll,
            doors,
            pairs: HashMap::new(),
            senders: HashMap::new(),
            sessions: HashMap::new(),
            next: FIRST,
            shut_until: None,
            swept: Instant::now(),
            buffer: vec![0; BUFFER],
        };
        let carry = move || match network {
            // Sockets belong to the namespace of the thread that makes them; those of the doors are made.
            Some(network) => drop(network.within(|| {
                carrier.run();
                Ok(())
            })),
            None => carrier.run(),
        };
        let thread = std::thread::Builder::new().name("ports".to_owned()).spawn(carry)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One side of a connection.
struct Side {
    socket: OwnedFd,
    /// What epoll waits for here; `None`: this side is not there.
    waits: Option<epoll::EventFlags>,
    /// What this side has said and the other has not taken.
    said: Vec<u8>,
    taken: usize,
    /// It will say nothing more.
    ended: bool,
    /// And the other knows.
    told: bool,
}

impl Side {
    fn new(socket: OwnedFd) -> Self {
        Self { socket, waits: None, said: Vec::new(), taken: 0, ended: false, told: false }
    }

    fn pending(&self) -> &[u8] {
        &self.said[self.taken..]
    }
}

/// Two connections that are as one.
struct Pair {
    sides: [Side; 2],
    /// The container has not answered the call yet.
    connecting: bool,
}

/// Which door, who came to it, and by which address of the host.
type Session = (usize, SocketAddr, Option<IpAddr>);

/// A sender of datagrams, as the container sees it.
struct Sender {
    session: Session,
    socket: OwnedFd,
    last: Instant,
}

struct Carrier {
    epoll: OwnedFd,
    doors: Vec<Door>,
    pairs: HashMap<u64, Pair>,
    senders: HashMap<u64, Sender>,
    sessions: HashMap<Session, u64>,
    /// The next token; it grows by two: a connection has two sides.
    next: u64,
    /// Nobody is let in before.
    shut_until: Option<Instant>,
    swept: Instant,
    buffer: Vec<u8>,
}

impl Carrier {
    fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        loop {
            let timeout = match self.shut_until {
                Some(_) => Some(Timespec { tv_sec: 0, tv_nsec: 100_000_000 }),
                None if self.senders.is_empty() => None,
                None => Some(Timespec { tv_sec: 10, tv_nsec: 0 }),
            };
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
            for event in &events {
                match event.data.u64() {
                    STOP => return,
                    token if token < FIRST => self.knock(usize::try_from(token).unwrap_or(0)),
                    token if self.senders.contains_key(&token) => self.answer(token),
                    token => self.carry(token & !1, (token & 1) as usize),
                }
            }
            self.tidy();
        }
    }

    fn tidy(&mut self) {
        let now = Instant::now();
        if self.shut_until.is_some_and(|until| until <= now) {
            self.shut_until = None;
            self.set_doors(epoll::EventFlags::IN);
        }
        if now.duration_since(self.swept) > SILENCE / 9 {
            self.swept = now;
            let silent = |sender: &Sender| now.duration_since(sender.last) > SILENCE;
            let old: Vec<u64> =
                self.senders.iter().filter(|(_, sender)| silent(sender)).map(|(token, _)| *token).collect();
            old.into_iter().for_each(|token| self.forget(token));
        }
    }

    fn set_doors(&self, flags: epoll::EventFlags) {
        for (at, door) in self.doors.iter().enumerate().filter(|(_, door)| !door.udp) {
            let _ = epoll::modify(&self.epoll, &door.socket, epoll::EventData::new_u64(at as u64), flags);
        }
    }

    fn token(&mut self) -> u64 {
        self.next += 2;
        self.next
    }

    /// Somebody is at a door.
    fn knock(&mut self, at: usize) {
        let Some(door) = self.doors.get(at) else { return };
        if door.udp {
            return self.take_datagrams(at);
        }
        let to = door.to();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accepted = accept_with(&door.socket, flags);
        let made = accepted.and_then(|client| {
            let server = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
            Ok((client, server))
        });
        match made {
            Ok((client, server)) => {
                let _ = (sockopt::set_tcp_nodelay(&client, true), sockopt::set_tcp_nodelay(&server, true));
                match connect(&server, &to) {
                    Ok(()) | Err(Errno::INPROGRESS) => {}
                    Err(_) => return,
                }
                let token = self.token();
                let pair = Pair { sides: [Side::new(client), Side::new(server)], connecting: true };
                self.pairs.insert(token, pair);
                self.wait_for(token);
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                self.shut_until = Some(Instant::now() + PATIENCE);
                self.set_doors(epoll::EventFlags::empty());
            }
            // Whoever knocked has left.
            Err(_) => {}
        }
    }

    /// Carries what can be carried between the two sides of a connection.
    fn carry(&mut self, token: u64, side: usize) {
        let Some(pair) = self.pairs.get_mut(&token) else { return };
        if side == 1 && pair.connecting {
            match sockopt::socket_error(&pair.sides[1].socket) {
                Ok(Ok(())) => pair.connecting = false,
                _ => return drop(self.pairs.remove(&token)),
            }
        }
        let alive = (0..2).all(|from| pair.pass(from, &mut self.buffer).is_ok());
        if !alive || pair.sides.iter().all(|side| side.told) {
            self.pairs.remove(&token);
            return;
        }
        self.wait_for(token);
    }

    /// Has epoll wait for what this connection needs next.
    fn wait_for(&mut self, token: u64) {
        let Some(pair) = self.pairs.get_mut(&token) else { return };
        for at in 0..2 {
            let mut flags = epoll::EventFlags::empty();
            if pair.connecting {
                // What the client says until then waits in the kernel.
                flags.set(epoll::EventFlags::OUT, at == 1);
            } else {
                flags
                    .set(epoll::EventFlags::IN, !pair.sides[at].ended && pair.sides[at].pending().is_empty());
                flags.set(epoll::EventFlags::OUT, !pair.sides[1 - at].pending().is_empty());
            }
            let side = &mut pair.sides[at];
            let wanted = (!flags.is_empty()).then_some(flags);
            let data = epoll::EventData::new_u64(token + at as u64);
            // A side that waits for nothing is taken out: the end of a connection is always told.
            let _ = match (side.waits, wanted) {
                (old, new) if old == new => Ok(()),
                (None, Some(flags)) => epoll::add(&self.epoll, &side.socket, data, flags),
                (Some(_), Some(flags)) => epoll::modify(&self.epoll, &side.socket, data, flags),
                (_, None) => epoll::delete(&self.epoll, &side.socket),
            };
            side.waits = wanted;
        }
    }

    fn take_datagrams(&mut self, at: usize) {
        // Not for ever: others are waiting too.
        for _ in 0..64 {
            let door = &self.doors[at];
            let (length, from, local) = match datagrams::receive(&door.socket, &mut self.buffer) {
                Ok(received) => received,
                // What could not be delivered is told here as well.
                Err(nix::Error::ECONNREFUSED | nix::Error::EINTR) => continue,
                Err(_) => return,
            };
            let token = match self.sessions.get(&(at, from, local)) {
                Some(token) => *token,
                None => match self.welcome((at, from, local)) {
                    Some(token) => token,
                    None => continue,
                },
            };
            if let Some(sender) = self.senders.get_mut(&token) {
                sender.last = Instant::now();
                let _ =
                    send(&sender.socket, &self.buffer[..length], SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            }
        }
    }

    fn welcome(&mut self, session: Session) -> Option<u64> {
        let at = session.0;
        if self.sessions.keys().filter(|(door, ..)| *door == at).count() >= SENDERS {
            let of_door = self.senders.iter().filter(|(_, sender)| sender.session.0 == at);
            let oldest = of_door.min_by_key(|(_, sender)| sender.last).map(|(token, _)| *token)?;
            self.forget(oldest);
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None).ok()?;
        connect(&socket, &self.doors[at].to()).ok()?;
        let token = self.token();
        epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(token), epoll::EventFlags::IN).ok()?;
        self.sessions.insert(session, token);
        self.senders.insert(token, Sender { session, socket, last: Instant::now() });
        Some(token)
    }

    fn forget(&mut self, token: u64) {
        if let Some(sender) = self.senders.remove(&token) {
            self.sessions.remove(&sender.session);
        }
    }

    /// Carries the container's answers to a sender of datagrams.
    fn answer(&mut self, token: u64) {
        let Some(sender) = self.senders.get_mut(&token) else { return };
        for _ in 0..64 {
            match recv(&sender.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    sender.last = Instant::now();
                    let (door, to, from) = sender.session;
                    let _ = datagrams::answer(&self.doors[door].socket, &self.buffer[..length], to, from);
                }
                // Nobody listens inside; the sender finds out by itself.
                Err(Errno::CONNREFUSED | Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

impl Pair {
    /// Carries from one side to the other until one of them has to be waited for.
    fn pass(&mut self, from: usize, buffer: &mut [u8]) -> Result<(), Errno> {
        if self.connecting {
            return Ok(());
        }
        let [client, server] = &mut self.sides;
        let (from, to) = if from == 0 { (client, server) } else { (server, client) };
        // Not for ever: others are waiting too.
        for _ in 0..16 {
            if from.pending().is_empty() && !from.ended {
                match recv(&from.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                    Ok((0, _)) => from.ended = true,
                    Ok((length, _)) => {
                        from.said.clear();
                        from.said.extend_from_slice(&buffer[..length]);
                        from.taken = 0;
                    }
                    Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                    Err(errno) => return Err(errno),
                }
            }
            if !from.pending().is_empty() {
                match send(&to.socket, from.pending(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                    Ok(length) => from.taken += length,
                    Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                    Err(errno) => return Err(errno),
                }
            } else if from.ended {
                if !from.told {
                    from.told = true;
                    let _ = shutdown(to.socket.as_fd(), Shutdown::Write);
                }
                return Ok(());
            }
        }
        Ok(())
    }
}
