//! Containers, networks and the sandbox of a user.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::{BOTH, Ids, User};
use rustix::process::Signal;

use crate::harness::{Outcome, Running, Store, left, needs_root, text};

#[test]
fn containers_live_as_roots_do() {
    needs_root!();
    for ids in BOTH {
        let Some(user) = User::with_busybox(ids) else { return };
        let run = |args: &[&str]| user.ok(&[&["run", "--rm", "--network=none"], args].concat()).stdout;
        assert_eq!(run(&["busybox", "id", "-u"]), "0\n");
        assert_eq!(run(&["-u", "node", "busybox", "sh", "-c", "id -u; id -g"]), "1000\n1000\n");
        assert_eq!(run(&["-v", "vol:/v", "busybox", "sh", "-c", "touch /v/x; ls /v"]), "x\n");
        assert_eq!(run(&["busybox", "hostname", "-s"]).trim().len(), 12);
        user.kiln(&["run", "--rm", "--network=none", "busybox", "sh", "-c", "exit 7"]).expect(7);

        user.ok(&["run", "-d", "--network=none", "--name", "cc", "busybox", "sleep", "300"]);
        assert!(user.ok(&["ps"]).stdout.contains("sleep 300"));
        assert_eq!(user.ok(&["exec", "-u", "node", "cc", "id", "-u"]).stdout, "1000\n");
        user.ok(&["exec", "cc", "sh", "-c", "touch /added; chown 8:9 /added"]);
        // Commands see into it, which takes them into the namespace that it was started in.
        assert!(user.ok(&["top", "cc"]).stdout.contains("sleep 300"));
        std::fs::write(user.at("file"), "copied").unwrap();
        user.ok(&["cp", text(&user.at("file")), "cc:/copied"]);
        assert_eq!(user.ok(&["exec", "cc", "cat", "/copied"]).stdout, "copied");
        user.ok(&["commit", "cc", "kept"]);
        // Its monitor ends a moment after it has let the container go.
        user.ok(&["rm", "-f", "cc"]);
        let layers = user.layers("kept");
        let added = layers.last().unwrap().iter().find(|entry| entry.starts_with("added")).cloned();
        assert!(added.is_some_and(|entry| entry.contains(" 8:9 ")), "{ids:?}: {layers:#?}");
        assert_eq!(left(|| user.processes()), Vec::<String>::new(), "{ids:?}");
    }
}

#[test]
fn the_hosts_network_and_none_work() {
    needs_root!();
    for ids in BOTH {
        let Some(user) = User::with_busybox(ids) else { return };
        let inside = "readlink /proc/self/ns/net; ! touch /sys/x 2> /dev/null && test -d /sys/class/net";
        let host = user.ok(&["run", "--rm", "--network=host", "busybox", "sh", "-c", inside]).stdout;
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        assert_eq!(host.trim(), own.display().to_string());
        let none = user.ok(&["run", "--rm", "--network=none", "busybox", "ls", "/sys/class/net"]).stdout;
        assert_eq!(none, "lo\n", "{ids:?}");
    }
}

/// This host's address that others see; nothing is sent for it.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

/// Puts what nobody may open or execute in the place of a file.
fn hide(user: &mut User, program: &str) {
    let empty = user.at("empty");
    std::fs::write(&empty, "").unwrap();
    std::fs::set_permissions(&empty, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    let empty = text(&empty).to_owned();
    user.prepare(&format!("[ ! -e {program} ] || mount --bind {empty} {program} || exit 97"));
}

#[test]
fn a_step_reaches_the_outside_through_slirp4netns() {
    needs_root!();
    let Some(address) = own_address() else {
        eprintln!("SKIPPED ALOUD: this host has no address but loopback");
        return;
    };
    if !std::path::Path::new("/usr/bin/slirp4netns").exists() {
        eprintln!("SKIPPED ALOUD: needs slirp4netns");
        return;
    }
    for ids in BOTH {
        let Some(mut user) = User::with_busybox(ids) else { return };
        user.give_device("net/tun", "10 200");
        reaches_the_outside(&user, address, ids);
    }
}

fn reaches_the_outside(user: &User, address: IpAddr, what: Ids) {
    let server = TcpListener::bind((address, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let answers = std::thread::spawn(move || {
        let (mut client, _) = server.accept().unwrap();
        client.write_all(b"from outside\n").unwrap();
    });
    let dockerfile = format!(
        "FROM busybox\nRUN nc {address} {port} < /dev/null > /got; grep nameserver /etc/resolv.conf > /dns; \
         ls /sys/class/net > /links; ip addr show tap0 | grep -o 'inet [0-9.]*' > /address\n"
    );
    let context = user.context(&[("Dockerfile", &dockerfile)]);
    user.ok(&["build", "-t", "net", &context]);
    answers.join().unwrap();
    let files = ["cat", "/got", "/dns", "/links", "/address"];
    let got = user.ok(&[&["run", "--rm", "--network=none", "net"], &files[..]].concat()).stdout;
    assert_eq!(got, "from outside\nnameserver 10.0.2.3\nlo\ntap0\ninet 10.0.2.100\n", "{what:?}");
    // The host's own services on loopback are out of reach, as they are in root's containers.
    let local = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = local.local_addr().unwrap().port().to_string();
    for to in ["127.0.0.1", "10.0.2.2"] {
        let refused = user.kiln(&["run", "--rm", "busybox", "nc", "-w", "2", to, &port]);
        assert_ne!(refused.code, Some(0), "{to} {what:?}");
    }
    assert_eq!(left(|| user.processes()), Vec::<String>::new(), "{what:?}");
}

/// What a web server answers at an address of the host.
fn fetch(address: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer.rsplit_once("\r\n\r\n")?.1.trim().to_owned())
}

/// With a network of its own, and with loopback only.
#[test]
fn ports_of_the_host_lead_into_a_users_container() {
    needs_root!();
    for (ids, has_network) in [(Ids::Range, true), (Ids::Single, true), (Ids::Single, false)] {
        let Some(mut user) = User::with_busybox(ids) else { return };
        match has_network {
            true => user.give_device("net/tun", "10 200"),
            false => hide(&mut user, "/dev/net/tun"),
        }
        let serve = "mkdir /www; echo hello > /www/index.html; exec httpd -f -p 80 -h /www";
        let run = ["run", "-d", "--name", "web", "-p", "127.0.0.1::80", "busybox", "sh", "-c", serve];
        user.ok(&run);
        let until_it_answers = || {
            let address = user.ok(&["port", "web", "80"]).stdout.trim().to_owned();
            let begun = Instant::now();
            loop {
                match fetch(&address) {
                    Some(page) if !page.is_empty() => return (page, address),
                    _ => assert!(begun.elapsed() < Duration::from_secs(60), "{ids:?} {has_network}"),
                }
                std::thread::yield_now();
            }
        };
        assert_eq!(until_it_answers().0, "hello");
        user.ok(&["restart", "-t", "0", "web"]);
        let (page, address) = until_it_answers();
        assert_eq!(page, "hello");
        assert!(user.ok(&["ps"]).stdout.contains(&format!("{address}->80/tcp")));
        user.ok(&["rm", "-f", "web"]);
        TcpListener::bind(&address).expect("the port is free again");
        assert_eq!(left(|| user.processes()), Vec::<String>::new(), "{ids:?}");
    }
}

#[test]
fn a_port_that_only_root_may_take_is_told_with_the_reason() {
    needs_root!();
    let first = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    if first.trim().parse::<u16>().unwrap() <= 80 {
        eprintln!("SKIPPED ALOUD: on this host everybody may take port 80");
        return;
    }
    let Some(user) = User::with_busybox(Ids::Single) else { return };
    let text = format!("a user's begin at {}", first.trim());
    user.kiln(&["run", "--rm", "-p", "80:80", "busybox", "true"]).expect(125).says(&["port 80", &text]);
}

#[test]
fn without_a_device_there_is_a_warning_and_no_network() {
    needs_root!();
    let Some(mut user) = User::with_busybox(Ids::Range) else { return };
    hide(&mut user, "/dev/net/tun");
    let context = user.context(&[("Dockerfile", "FROM busybox\nRUN ls /sys/class/net > /links\n")]);
    user.ok(&["build", "-t", "net", &context])
        .says(&["warning: processes have no network", "--network host"]);
    let links = user.ok(&["run", "--rm", "--network=none", "net", "cat", "/links"]);
    assert_eq!(links.stdout, "lo\n");
    assert!(!links.stderr.contains("warning"), "{}", links.stderr);
}

#[test]
fn apt_is_told_of_the_one_id_and_the_layer_is_not() {
    needs_root!();
    for ids in BOTH {
        let Some(user) = User::with_busybox(ids) else { return };
        let dockerfile =
            "FROM busybox\nRUN --network=none cat /etc/apt/apt.conf.d/* > /seen 2> /dev/null || true\n";
        user.ok(&["build", "-t", "apt", &user.context(&[("Dockerfile", dockerfile)])]);
        let seen = user.ok(&["run", "--rm", "--network=none", "apt", "cat", "/seen"]).stdout;
        assert_eq!(seen, if ids == Ids::Single { "APT::Sandbox::User \"root\";\n" } else { "" });
        let layers = user.layers("apt");
        assert!(layers.iter().flatten().all(|entry| !entry.contains("etc/apt")), "{layers:#?}");
    }
}

#[test]
fn another_runtime_needs_a_range_of_ids() {
    needs_root!();
    for runtime in ["crun", "runc"] {
        if !std::path::Path::new("/usr/bin").join(runtime).exists() {
            eprintln!("SKIPPED ALOUD: needs {runtime}");
            continue;
        }
        let line = ["run", "--rm", "--runtime", runtime];
        let script = ["busybox", "sh", "-c", "chown 5:6 /etc/passwd; stat -c %u:%g /etc/passwd; exit 7"];
        let Some(user) = User::with_busybox(Ids::Range) else { return };
        for network in ["none", "host"] {
            let done = user.kiln(&[&line[..], &["--network", network], &script].concat()).expect(7);
            assert_eq!(done.stdout, "5:6\n", "{runtime}");
        }
        let limited = [&line[..], &["--network=none", "--memory=64m"], &script].concat();
        user.kiln(&limited).expect(125).says(&["has no control group for limits"]);
        let Some(user) = User::with_busybox(Ids::Single) else { return };
        let refused = user.kiln(&[&line[..], &["--network=none"], &script].concat());
        refused.expect(125).says(&["--runtime", "with one id", "kiln doctor"]);
    }
}

/// Neither the network's process nor any other outlives a command that is told to end, or is killed.
#[test]
fn nothing_outlives_an_interrupted_build() {
    needs_root!();
    for (ids, signal) in [(Ids::Range, Signal::TERM), (Ids::Single, Signal::INT), (Ids::Range, Signal::KILL)]
    {
        let Some(mut user) = User::with_busybox(ids) else { return };
        user.give_device("net/tun", "10 200");
        let context = user.context(&[("Dockerfile", "FROM busybox\nRUN echo started; sleep 300\n")]);
        let kiln = user.at("kiln");
        let words = [text(&kiln), "build", "--progress=plain", &context];
        let mut running = Running::start(user.command(&words));
        running.wait_for("started");
        running.signal(signal);
        let ended = running.end();
        assert_ne!(ended.code, Some(0), "{ended:?}");
        // After SIGKILL it is for the kernel to end the rest.
        assert_eq!(left(|| user.processes()), Vec::<String>::new(), "{ids:?} {signal:?}");
        user.ok(&["fsck"]);
        let active = user.at("home/.local/share/kiln/snapshots/active");
        assert_eq!(std::fs::read_dir(active).unwrap().count(), 0);
    }
}

/// What root's containers are refused, a user's are.
#[test]
fn the_sandbox_is_as_tight() {
    needs_root!();
    let failures = |shown: &Outcome| -> Vec<String> {
        let lines = shown.stdout.lines().filter(|line| line.starts_with("FAIL"));
        lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    let roots = failures(&Store::empty().kiln(&["selftest", "--security"]));
    for ids in BOTH {
        let Some(user) = User::new(ids) else { return };
        let shown = user.kiln(&["selftest", "--security"]);
        let failed = failures(&shown);
        assert!(shown.stdout.lines().filter(|line| line.starts_with("ok")).count() > 40, "{}", shown.stdout);
        // Without delegation a user has no control groups; that is said, and no hole. What root's sandbox
        // lacks here, a user's may.
        let bad: Vec<&String> =
            failed.iter().filter(|line| !line.contains("control groups") && !roots.contains(line)).collect();
        assert!(bad.is_empty(), "{ids:?}: {bad:#?}");
    }
}
