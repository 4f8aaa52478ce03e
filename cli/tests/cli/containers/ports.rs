//! Ports of the host that lead into containers.

use std::net::{TcpListener, UdpSocket};

use super::machines::{HOST, Host, NEIGHBOUR, datagram, within};
use crate::harness::needs_root;

/// A web server that says hello, and in `/cgi-bin/who` whom it sees.
const WEB: &str = "mkdir -p /www/cgi-bin; echo hello > /www/index.html; \
                   printf '#!/bin/sh\necho; echo $REMOTE_ADDR\n' > /www/cgi-bin/who; chmod 755 /www/cgi-bin/who; \
                   exec httpd -f -p 80 -h /www";

#[test]
fn published_ports_are_reached_from_everywhere() {
    needs_root!();
    let Some(docker) = Host::new() else { return };
    docker.start("web", &["-p", "8080:80", "-p", "80"], WEB);
    let inside = docker.field("web", "{{.NetworkSettings.IPAddress}}");
    let bridge = docker.field("web", "{{.NetworkSettings.Gateway}}");
    docker.until("the server comes up", || docker.host.get(&format!("{inside}:80"), "/"));
    for address in ["127.0.0.1:8080", "[::1]:8080", &format!("{HOST}:8080"), &format!("{bridge}:8080")] {
        assert_eq!(docker.host.get(address, "/").as_deref(), Some("hello"), "{address}");
    }
    // Another machine, which the container sees as what it is.
    let outside = format!("{HOST}:8080");
    assert_eq!(docker.neighbour.get(&outside, "/").as_deref(), Some("hello"));
    assert!(docker.neighbour.get(&outside, "/cgi-bin/who").unwrap().contains(NEIGHBOUR));
    // Another container by way of the host, and the container itself: for it the way to the host is the one
    // that it was before the other came and went.
    let bridge_link = || docker.host.sh("ip -o link show kiln0 | grep -o 'ether [0-9a-f:]*'");
    let before = bridge_link();
    assert!(before.starts_with("ether 02:42:"), "{before}");
    let fetch = format!("wget -q -O - http://{outside}/");
    assert_eq!(docker.ok(&["run", "--rm", "busybox", "sh", "-c", &fetch]), "hello");
    assert_eq!(docker.exec("web", &fetch).expect(0).stdout, "hello\n");
    assert_eq!(bridge_link(), before);

    let random = docker.ok(&["port", "web", "80"]);
    let random = random.lines().find_map(|line| line.strip_prefix("0.0.0.0:").filter(|port| *port != "8080"));
    let random = format!("127.0.0.1:{}", random.expect("a random port is shown"));
    assert_eq!(docker.host.get(&random, "/").as_deref(), Some("hello"));
    let ports = docker.ok(&["ps", "--format", "{{.Ports}}"]);
    assert!(ports.contains("0.0.0.0:8080->80/tcp, [::]:8080->80/tcp"), "{ports}");
    assert_eq!(docker.field("web", "{{(index .NetworkSettings.Ports \"80/tcp\" 0).HostPort}}"), "8080");
    assert_eq!(docker.ok(&["ps", "-q", "--filter", "publish=8080"]).len(), 12);

    docker.ok(&["stop", "-t", "0", "web"]);
    assert_eq!(docker.host.get("127.0.0.1:8080", "/"), None, "nobody listens");
    assert_eq!(docker.ok(&["port", "web"]), "");
    docker.ok(&["start", "web"]);
    docker.until("it comes up again", || docker.neighbour.get(&outside, "/"));
    docker.ok(&["rm", "-f", "web"]);
    docker.is_clean();
}

#[test]
fn datagrams_go_in_and_come_back() {
    needs_root!();
    let Some(docker) = Host::new() else { return };
    docker.start("echo", &["-p", "9000:9000/udp"], "exec sleep 31536201");
    // No busybox answers datagrams; the container's network is entered for it.
    let namespace = format!("/proc/{}/ns/net", docker.field("echo", "{{.State.Pid}}"));
    let server = within(&namespace, || UdpSocket::bind("0.0.0.0:9000").unwrap());
    let echo = std::thread::spawn(move || {
        let (mut senders, mut buffer) = (Vec::new(), [0; 100]);
        while senders.len() < 5 {
            let (length, from) = server.recv_from(&mut buffer).unwrap();
            server.send_to(&buffer[..length], from).unwrap();
            senders.push(from.ip().to_string());
        }
        senders
    });
    let outside = format!("{HOST}:9000");
    for address in ["127.0.0.1:9000", &outside] {
        assert_eq!(docker.host.datagram(address, "ping").as_deref(), Some("ping"), "{address}");
    }
    for text in ["one", "two"] {
        assert_eq!(docker.neighbour.datagram(&outside, text).as_deref(), Some(text));
    }
    // Another container by the host's other address: the answer comes from there.
    docker.start("other", &[], "exec sleep 31536201");
    let other = format!("/proc/{}/ns/net", docker.field("other", "{{.State.Pid}}"));
    assert_eq!(datagram(&other, &outside, "three").as_deref(), Some("three"));
    let gateway = docker.field("echo", "{{.NetworkSettings.Gateway}}");
    assert_eq!(echo.join().unwrap(), [&gateway, &gateway, NEIGHBOUR, NEIGHBOUR, &gateway]);
    docker.ok(&["rm", "-f", "other"]);
    docker.ok(&["rm", "-f", "echo"]);
    docker.is_clean();
}

#[test]
fn a_port_in_use_is_named_before_anything_starts() {
    needs_root!();
    let Some(docker) = Host::new() else { return };
    let taken = docker.host.within(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    let args = ["run", "--name", "web", "-p", "8080:80", "busybox", "touch", "/started"];
    docker.run(&args).expect(125).says(&["port 8080 of the host is in use"]);
    assert_eq!(docker.field("web", "{{.State.Status}}"), "created");
    drop(taken);
    docker.ok(&["start", "web"]);
    docker.ok(&["rm", "-f", "web"]);
    // What a container has no other gets, and a range has a free one.
    docker.start("web", &["-p", "127.0.0.1:8080:80"], "exec sleep 31536201");
    docker.run(&["run", "--rm", "-p", "8080:80", "busybox", "true"]).expect(125).says(&["port 8080"]);
    docker.host.within(|| assert!(TcpListener::bind("127.0.0.1:8080").is_err()));
    docker.start("other", &["-p", "127.0.0.1:8080-8082:80"], "exec sleep 31536201");
    assert_eq!(docker.ok(&["port", "other"]), "80/tcp -> 127.0.0.1:8081");
    docker.start("all", &["-P", "--network", "bridge"], "exec sleep 31536201");
    assert_eq!(docker.ok(&["port", "all"]), "", "the image exposes nothing");
    docker.ok(&["rm", "-f", "web", "other", "all"]);
    docker.is_clean();
}

#[test]
fn a_firewall_that_forwards_nothing_is_lived_with() {
    needs_root!();
    let Some(docker) = Host::new() else { return };
    // As docker leaves it on a host, and firewalld in a table of another family.
    docker.host.sh("nft add table ip filter
         nft add chain ip filter DOCKER-USER
         nft add rule ip filter DOCKER-USER counter return
         nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'
         nft add rule ip filter FORWARD jump DOCKER-USER
         nft add table inet firewalld
         nft add chain inet firewalld filter_FORWARD '{ type filter hook forward priority 10; policy drop; }'
         nft add rule inet firewalld filter_FORWARD ct state established,related accept");
    docker.neighbour.sh("ip route add default via 198.51.100.1");
    docker.start("web", &["-p", "8080:80"], WEB);
    let outside = format!("{HOST}:8080");
    docker.until("it is reached from outside", || docker.neighbour.get(&outside, "/"));
    assert!(docker.neighbour.get(&outside, "/cgi-bin/who").unwrap().contains(NEIGHBOUR));
    // Out, from both kinds of network.
    docker.ok(&["network", "create", "mine"]);
    let ping = format!("ping -c 1 -W 20 {NEIGHBOUR}");
    docker.ok(&["run", "--rm", "busybox", "sh", "-c", &ping]);
    docker.ok(&["run", "--rm", "--network", "mine", "busybox", "sh", "-c", &ping]);
    // But not in past the published port: a packet that nobody asked for stays outside.
    let inside = docker.field("web", "{{.NetworkSettings.IPAddress}}");
    assert_eq!(docker.neighbour.get(&format!("{inside}:80"), "/"), None);
    // What was there is there, and what was added is about kiln's bridges only.
    let rules = docker.host.sh("nft list table ip filter; nft list table inet firewalld");
    assert!(rules.contains("jump DOCKER-USER") && rules.contains("ct state established,related accept"));
    let added: Vec<&str> = rules.lines().filter(|line| line.contains("kiln")).map(str::trim).collect();
    assert_eq!(added.len(), 6, "{rules}");
    docker.ok(&["rm", "-f", "web"]);
    docker.ok(&["network", "rm", "mine"]);
    docker.is_clean();
}

#[test]
fn a_killed_monitor_leaves_no_port_rule_or_interface() {
    needs_root!();
    let Some(docker) = Host::new() else { return };
    docker.ok(&["network", "create", "mine"]);
    docker.start("web", &["-p", "8080:80", "--network", "mine"], WEB);
    let outside = format!("{HOST}:8080");
    docker.until("the server comes up", || docker.neighbour.get(&outside, "/"));
    let tables = || docker.host.sh("nft list tables");
    assert!(tables().contains("kiln-port-"));
    let pid: i32 = docker.field("web", "{{.State.Pid}}").parse().unwrap();
    let monitor = monitor_of(pid);
    rustix::process::kill_process(monitor, rustix::process::Signal::KILL).unwrap();
    // No command has looked yet: the kernel itself has cleaned up.
    docker.until("the rules go", || (!tables().contains("kiln-port-")).then_some(()));
    docker.until("the interfaces go", || {
        docker.host.links().iter().all(|name| !name.starts_with("kilnv")).then_some(())
    });
    docker.until("the port is free", || {
        docker.host.within(|| TcpListener::bind("0.0.0.0:8080").is_ok()).then_some(())
    });
    assert_eq!(docker.field("web", "{{.State.Status}} {{.State.ExitCode}}"), "exited 137");
    assert_eq!(docker.ok(&["port", "web"]), "");
    docker.ok(&["network", "rm", "mine"]);
    docker.run(&["start", "web"]).expect(1).says(&["there is no network \"mine\""]);
    docker.ok(&["rm", "web"]);
    docker.is_clean();
}

/// The monitor is the parent of the helper, which is the parent of process 1.
fn monitor_of(pid: i32) -> rustix::process::Pid {
    let parent = |pid: i32| -> i32 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
    };
    rustix::process::Pid::from_raw(parent(parent(pid))).unwrap()
}
