//! A host of a test's own: a network namespace in which kiln runs, and another that is its neighbour.
//! Nothing a test does there is seen by, or depends on, the machine's own network.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::harness::{Outcome, Store};

/// The host's address towards its neighbour, and the neighbour's.
pub(super) const HOST: &str = "198.51.100.1";
pub(super) const NEIGHBOUR: &str = "198.51.100.2";

/// Does something in a network namespace.
pub(super) fn within<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(namespace).expect("the namespace is there");
    let enter = || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("it is entered");
        work()
    };
    std::thread::scope(|scope| scope.spawn(enter).join().expect("the thread ends"))
}

/// What comes back for a datagram that is sent in a network namespace; `None`: nothing.
pub(super) fn datagram(namespace: &str, address: &str, text: &str) -> Option<String> {
    let address: SocketAddr = address.parse().expect("an address");
    within(namespace, || {
        let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect(address).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
        socket.send(text.as_bytes()).ok()?;
        let mut buffer = [0; 100];
        let length = socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    })
}

/// A network namespace, as long as a process sits in it.
pub(super) struct Machine(Child);

impl Machine {
    fn new() -> Machine {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "ip link set lo up; echo up; exec sleep 31536200"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("unshare starts");
        let mut said = [0; 2];
        child.stdout.as_mut().unwrap().read_exact(&mut said).expect("a network namespace can be made");
        Machine(child)
    }

    fn namespace(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    /// Runs a script there.
    #[track_caller]
    pub(super) fn sh(&self, script: &str) -> String {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace())).args(["sh", "-ec", script]);
        Outcome::of(command.output().expect("nsenter starts")).expect(0).stdout
    }

    /// Does something there.
    pub(super) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(&self.namespace(), work)
    }

    /// What a web server answers; `None`: it does not.
    pub(super) fn get(&self, address: &str, path: &str) -> Option<String> {
        let address: SocketAddr = address.parse().expect("an address");
        self.within(|| {
            // Where nobody answers, tests wait so long for that.
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
            stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            text.split_once("\r\n\r\n").or(text.split_once("\n\n")).map(|(_, body)| body.trim().to_owned())
        })
    }

    /// What comes back for a datagram; `None`: nothing.
    pub(super) fn datagram(&self, address: &str, text: &str) -> Option<String> {
        datagram(&self.namespace(), address, text)
    }

    /// The interfaces beside loopback.
    pub(super) fn links(&self) -> Vec<String> {
        let all = self.sh("ls /sys/class/net 2> /dev/null; ip -o link");
        let names = all.lines().filter_map(|line| line.split(": ").nth(1));
        names
            .map(|name| name.split('@').next().unwrap_or(name).to_owned())
            .filter(|name| name != "lo")
            .collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A host with kiln and a neighbour.
pub(super) struct Host {
    store: Store,
    pub(super) host: Machine,
    pub(super) neighbour: Machine,
}

impl Host {
    /// `None`, aloud: this machine lacks a program that makes one.
    pub(super) fn new() -> Option<Host> {
        for program in ["unshare", "nsenter", "ip", "nft"] {
            if Command::new(program).arg("-V").output().is_err() {
                eprintln!("SKIPPED ALOUD: there is no {program}");
                return None;
            }
        }
        let (host, neighbour) = (Machine::new(), Machine::new());
        host.sh(&format!(
            "ip link add out type veth peer name eth0 netns {}; ip addr add {HOST}/24 dev out; ip link set out up",
            neighbour.0.id()
        ));
        neighbour.sh(&format!("ip addr add {NEIGHBOUR}/24 dev eth0; ip link set eth0 up"));
        Some(Host { store: Store::with_busybox(), host, neighbour })
    }

    /// A command line of kiln on that host.
    pub(super) fn command(&self, args: &[&str]) -> Command {
        let plain = self.store.command(args);
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.host.namespace()))
            .arg(plain.get_program())
            .args(plain.get_args());
        for (name, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.stdin(Stdio::null());
        command
    }

    pub(super) fn run(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(args).output().expect("kiln starts"))
    }

    #[track_caller]
    pub(super) fn ok(&self, args: &[&str]) -> String {
        self.run(args).expect(0).stdout.trim_end().to_owned()
    }

    /// Starts a container in the background.
    #[track_caller]
    pub(super) fn start(&self, name: &str, flags: &[&str], script: &str) {
        let mut args = vec!["run", "-d", "--name", name];
        args.extend_from_slice(flags);
        args.extend_from_slice(&["busybox", "sh", "-c", script]);
        self.ok(&args);
    }

    /// Runs a script in a container.
    pub(super) fn exec(&self, name: &str, script: &str) -> Outcome {
        self.run(&["exec", name, "sh", "-c", script])
    }

    #[track_caller]
    pub(super) fn field(&self, name: &str, format: &str) -> String {
        self.ok(&["inspect", "-f", format, name])
    }

    /// Looks again and again, as there is nothing to be woken by, until `look` finds something.
    #[track_caller]
    pub(super) fn until<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Fails the test unless nothing is left but the usual network.
    #[track_caller]
    pub(super) fn is_clean(&self) {
        assert_eq!(self.ok(&["ps", "-aq"]), "");
        assert_eq!(self.store.active_snapshots(), [""; 0]);
        assert_eq!(self.store.mounts(), [""; 0]);
        self.store.sound().expect("the store is sound");
        // The kernel takes interfaces away some time after the last process.
        self.until("interfaces are left", || {
            let left = self.host.links();
            left.iter().all(|name| matches!(name.as_str(), "out" | "kiln0")).then_some(())
        });
        let tables = self.host.sh("nft list tables");
        let kilns: Vec<&str> = tables.lines().filter(|line| line.contains("kiln")).collect();
        assert!(kilns.iter().all(|line| *line == "table ip kiln"), "{kilns:?}");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for id in self.run(&["ps", "-aq"]).stdout.lines() {
            self.run(&["rm", "-f", id]);
        }
    }
}
