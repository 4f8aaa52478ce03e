//! Turns names of containers into addresses, for a container in networks that users made.
//!
//! It listens on a loopback address inside the container's network namespace, so that nothing on the
//! host, no rule of a firewall and no other container has anything to do with it. What it does not
//! know itself it asks the host's resolvers, from the host's network.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kiln_executor::{ExecError, NetworkNamespace, redirect_resolver};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::dns::{Known, NO_NAME, Question, SERVER_FAILED};
use crate::networks::{Networks, USUAL_NETWORK};
use crate::{Container, Containers};

/// Where a container finds it. docker's address: images know it.
pub(super) const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// How long one resolver of the host may think.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a connection may stay silent.
const SILENCE: Duration = Duration::from_secs(10);
/// So many questions are asked on at the same time.
const WORKERS: usize = 128;
const MAX_MESSAGE: usize = 64 << 10;

/// The thread that answers; it ends with this.
#[derive(Debug)]
pub(super) struct Resolver {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// What it takes to answer.
struct Answerer {
    containers: Containers,
    container: Container,
    /// Whom to ask instead of the host's resolvers.
    servers: Vec<IpAddr>,
    workers: AtomicUsize,
}

impl Resolver {
    /// Listens in this namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn start(
        namespace: &NetworkNamespace,
        containers: &Containers,
        container: &Container,
        servers: &[IpAddr],
    ) -> Result<Self, ExecError> {
        let (udp, tcp) = namespace.within(listen)?;
        let failed = |source| ExecError::Network { step: "resolver".to_owned(), source };
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stopped = rustix::io::fcntl_dupfd_cloexec(&stop, 3)?;
        let answerer = Arc::new(Answerer {
            containers: containers.clone(),
            container: container.clone(),
            servers: servers.to_vec(),
            workers: AtomicUsize::new(0),
        });
        let work = move || serve(&answerer, &Arc::new(udp), &tcp, &stopped);
        let thread = std::thread::Builder::new().name("resolver".to_owned()).spawn(work).map_err(failed)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Port 53 is left to the container's own servers where the kernel can send what is for it elsewhere.
fn listen() -> Result<(UdpSocket, TcpListener), ExecError> {
    let failed = |source| ExecError::Network { step: "resolver".to_owned(), source };
    let open = |port: u16| -> std::io::Result<(UdpSocket, TcpListener)> {
        let at = SocketAddr::from((SERVER, port));
        let (udp, tcp) = (UdpSocket::bind(at)?, TcpListener::bind(at)?);
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        Ok((udp, tcp))
    };
    let (udp, tcp) = open(0).map_err(failed)?;
    let port = |at: std::io::Result<SocketAddr>| at.map(|at| at.port()).map_err(failed);
    match redirect_resolver(SERVER, port(udp.local_addr())?, port(tcp.local_addr())?) {
        Ok(()) => Ok((udp, tcp)),
        Err(_) => open(53).map_err(failed),
    }
}

fn serve(answerer: &Arc<Answerer>, udp: &Arc<UdpSocket>, tcp: &TcpListener, stop: &OwnedFd) {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let mut fds = [
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(&**udp, PollFlags::IN),
            PollFd::new(tcp, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        let [stopped, asked, called] = fds.map(|fd| !fd.revents().is_empty());
        if stopped {
            return;
        }
        if asked && let Ok((length, from)) = udp.recv_from(&mut buffer) {
            let message = buffer[..length].to_vec();
            match answerer.know(&message) {
                Some(answer) => drop(udp.send_to(&answer, from)),
                None => {
                    let udp = udp.clone();
                    answerer.work(move |answerer| {
                        if let Some(answer) = answerer.ask_on(&message, ask_by_datagram) {
                            let _ = udp.send_to(&answer, from);
                        }
                    });
                }
            }
        }
        if called && let Ok((stream, _)) = tcp.accept() {
            answerer.work(move |answerer| drop(answerer.talk(stream)));
        }
    }
}

impl Answerer {
    /// Does something in a thread of its own, unless too much is being done: who asks asks again.
    fn work(self: &Arc<Self>, work: impl FnOnce(&Self) + Send + 'static) {
        if self.workers.fetch_add(1, Ordering::Relaxed) >= WORKERS {
            self.workers.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let own = self.clone();
        let started = std::thread::Builder::new().name("question".to_owned()).spawn(move || {
            work(&own);
            own.workers.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            self.workers.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The answer to a question for a container; `None`: somebody else has to be asked.
    fn know(&self, message: &[u8]) -> Option<Vec<u8>> {
        let question = Question::parse(message)?;
        let known = match question.reverse() {
            Some(address) => Known::Name(self.name_of(address)?),
            None => Known::Addresses(Some(self.addresses(&question.name)).filter(|found| !found.is_empty())?),
        };
        Some(question.answer(message, &known))
    }

    /// The networks that this container is in and that have names.
    fn networks(&self) -> Vec<String> {
        let state = self.container.state();
        let endpoints = state.map(|state| state.endpoints).unwrap_or_default();
        let names = endpoints.into_iter().map(|endpoint| endpoint.network);
        names.filter(|network| network != USUAL_NETWORK).collect()
    }

    /// Where the containers are that are called so in one of this one's networks.
    fn addresses(&self, name: &str) -> Vec<Ipv4Addr> {
        let mut found = Vec::new();
        self.each_neighbour(|config, endpoint| {
            let attachment = config.networks.iter().find(|known| known.network == endpoint.network);
            let aliases = attachment.map(|attachment| attachment.aliases.as_slice()).unwrap_or_default();
            let called = |known: &str| known.eq_ignore_ascii_case(name);
            if called(&config.name) || called(config.id.short()) || aliases.iter().any(|alias| called(alias))
            {
                found.push(endpoint.address);
            }
        });
        found
    }

    fn name_of(&self, address: Ipv4Addr) -> Option<String> {
        let mut found = None;
        self.each_neighbour(|config, endpoint| {
            if endpoint.address == address {
                found = Some(format!("{}.{}", config.name, endpoint.network));
            }
        });
        found
    }

    fn each_neighbour(&self, mut look: impl FnMut(&crate::Config, &crate::Endpoint)) {
        let networks = self.networks();
        for container in self.containers.list().unwrap_or_default() {
            let (Ok(config), Ok(state)) = (container.config(), container.state()) else { continue };
            // One that is just starting knows itself already.
            if state.pid == 0 && container.id() != self.container.id() {
                continue;
            }
            for endpoint in state.endpoints.iter().filter(|place| networks.contains(&place.network)) {
                look(&config, endpoint);
            }
        }
    }

    /// Asks the resolvers of the host one after the other.
    fn ask_on(
        &self,
        message: &[u8],
        ask: impl Fn(SocketAddr, &[u8]) -> std::io::Result<Vec<u8>>,
    ) -> Option<Vec<u8>> {
        let question = Question::parse(message);
        let refuse = |why| question.as_ref().map(|question| question.refuse(message, why));
        let all = Networks::open(self.containers.root());
        let open = |name: &String| all.find(name).is_ok_and(|network| !network.internal);
        let state = self.container.state();
        let is_usual =
            state.is_ok_and(|state| state.endpoints.iter().any(|endpoint| endpoint.network == USUAL_NETWORK));
        // Names would be a way out of networks that have none.
        if !is_usual && !self.networks().iter().any(open) {
            return refuse(NO_NAME);
        }
        let servers = if self.servers.is_empty() { host_servers() } else { self.servers.clone() };
        let answer = servers.into_iter().find_map(|server| ask(SocketAddr::new(server, 53), message).ok());
        answer.or_else(|| refuse(SERVER_FAILED))
    }

    /// Answers the questions that come over a connection.
    fn talk(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        loop {
            let message = read_message(&mut stream)?;
            let answer = self.know(&message).or_else(|| self.ask_on(&message, ask_by_connection));
            let Some(answer) = answer else { return Ok(()) };
            write_message(&mut stream, &answer)?;
        }
    }
}

/// Those of the host: what it asks itself, on loopback or not.
fn host_servers() -> Vec<IpAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    };
    text.lines().filter_map(server).collect()
}

fn ask_by_datagram(server: SocketAddr, message: &[u8]) -> std::io::Result<Vec<u8>> {
    let own: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((own, 0))?;
    // Connected: nobody else's answer is taken.
    socket.connect(server)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(message)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let length = socket.recv(&mut buffer)?;
        // An answer to this very question has its number.
        if buffer[..length].get(..2) == message.get(..2) {
            return Ok(buffer[..length].to_vec());
        }
    }
}

fn ask_by_connection(server: SocketAddr, message: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write_message(&mut stream, message)?;
    read_message(&mut stream)
}

fn read_message(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn write_message(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| std::io::ErrorKind::InvalidData)?;
    stream.write_all(&[&length.to_be_bytes()[..], message].concat())
}
