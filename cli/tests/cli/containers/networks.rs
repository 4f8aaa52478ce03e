//! Networks that users make.

use super::machines::{HOST, Host, NEIGHBOUR};
use crate::harness::{Context, Running, needs_root, processes_with};

const SLEEP: &str = "exec sleep 31536202";

#[test]
fn containers_find_each_other_by_name() {
    needs_root!();
    let Some(docker) = Host::new() else { return };
    docker.ok(&["network", "create", "mine"]);
    docker.start("one", &["--network", "mine", "--network-alias", "first"], SLEEP);
    docker.start("two", &["--network", "mine"], SLEEP);
    let address = docker.field("one", "{{.NetworkSettings.Networks.mine.IPAddress}}");
    let id = docker.field("one", "{{.Id}}");
    for name in ["one", "first", "ONE", &id[..12]] {
        let found = docker.exec("two", &format!("ping -c 1 -W 20 {name}")).expect(0).stdout;
        assert!(found.contains(&format!("({address})")), "{name}: {found}");
    }
    docker.exec("one", "ping -c 1 -W 20 two").expect(0);
    docker.exec("one", "ping -c 1 -W 20 one").expect(0);
    let reverse = docker.exec("two", &format!("nslookup {address}")).stdout;
    assert!(reverse.contains("one.mine"), "{reverse}");
    docker.exec("two", "ping -c 1 -W 20 nobody").expect(1).says(&["bad address"]);
    // The usual network has no names, and is another one.
    docker.start("apart", &[], SLEEP);
    docker.exec("apart", "ping -c 1 -W 20 one").expect(1);
    docker.exec("apart", &format!("ping -c 1 -W 1 {address}")).expect(1);
    let apart = docker.field("apart", "{{.NetworkSettings.IPAddress}}");
    docker.exec("one", &format!("ping -c 1 -W 1 {apart}")).expect(1);

    docker.run(&["network", "rm", "mine"]).expect(1).says(&["is used by", "container one"]);
    docker.ok(&["network", "disconnect", "mine", "one"]);
    docker.exec("two", "ping -c 1 -W 20 one").expect(1);
    assert_eq!(docker.exec("one", "ls /sys/class/net; ip -o link | wc -l").stdout.lines().last(), Some("1"));
    docker.ok(&["network", "connect", "--alias", "again", "mine", "one"]);
    docker.exec("two", "ping -c 1 -W 20 again").expect(0);
    docker.ok(&["network", "connect", "mine", "apart"]);
    docker.exec("two", "ping -c 1 -W 20 apart").expect(0);
    assert_eq!(docker.ok(&["ps", "-q", "--filter", "network=mine"]).lines().count(), 3);
    // It is where it was put when it starts again, and has names now.
    docker.ok(&["restart", "-t", "0", "apart"]);
    docker.exec("apart", "ping -c 1 -W 20 two").expect(0);
    docker.ok(&["rename", "two", "three"]);
    docker.exec("one", "ping -c 1 -W 20 three").expect(0);

    let script = "ip -o -4 addr show eth0; ping -c 1 -W 20 three; hostname";
    let shared = docker.ok(&["run", "--rm", "--network", "container:apart", "busybox", "sh", "-c", script]);
    assert!(shared.contains(&apart_address(&docker)), "{shared}");
    assert!(shared.ends_with(&docker.field("apart", "{{.Config.Hostname}}")), "{shared}");

    docker.ok(&["rm", "-f", "one", "three", "apart"]);
    docker.run(&["run", "--rm", "--network", "other", "busybox", "true"]).expect(125).says(&["\"other\""]);
    assert_eq!(docker.ok(&["network", "ls", "-q", "--filter", "type=custom"]).lines().count(), 1);
    assert!(docker.ok(&["network", "prune", "--force"]).contains("mine"));
    assert_eq!(docker.ok(&["network", "ls", "--format", "{{.Name}}"]), "bridge\nhost\nnone");
    docker.is_clean();
}

fn apart_address(docker: &Host) -> String {
    docker.field("apart", "{{.NetworkSettings.Networks.bridge.IPAddress}}")
}

#[test]
fn networks_are_as_they_were_asked_to_be() {
    needs_root!();
    let Some(docker) = Host::new() else { return };
    let wanted =
        ["network", "create", "--subnet", "203.0.113.0/28", "--gateway", "203.0.113.14", "--label", "a=1"];
    docker.ok(&[&wanted[..], &["mine"]].concat());
    docker.run(&[&wanted[..], &["other"]].concat()).expect(2).says(&["overlaps 203.0.113.0/28"]);
    let args = ["network", "create", "--subnet", "198.51.100.128/25", "other"];
    docker.run(&args).expect(2).says(&["the host has routes into 198.51.100.128/25"]);
    docker.start("one", &["--network", "mine", "--ip", "203.0.113.5"], SLEEP);
    let route = docker.exec("one", "ip -4 -o addr show eth0; ip route").stdout;
    assert!(route.contains("203.0.113.5/28") && route.contains("default via 203.0.113.14"), "{route}");
    let taken = ["run", "--rm", "--network", "mine", "--ip", "203.0.113.5", "busybox", "true"];
    docker.run(&taken).expect(125).says(&["203.0.113.5"]);
    let outside = ["run", "--rm", "--network", "mine", "--ip", "203.0.113.55", "busybox", "true"];
    docker.run(&outside).expect(125).says(&["203.0.113.55 is no address of network mine"]);
    let format = "{{(index .IPAM.Config 0).Subnet}} {{.Labels.a}} {{range .Containers}}{{.Name}}{{end}}";
    assert_eq!(docker.ok(&["network", "inspect", "-f", format, "mine"]), "203.0.113.0/28 1 one");
    // Out of one that may, and not out of one that may not.
    docker.exec("one", &format!("ping -c 1 -W 20 {NEIGHBOUR}")).expect(0);
    docker.ok(&["network", "create", "--internal", "cellar"]);
    docker.start("two", &["--network", "cellar", "-p", "8080:80"], &format!("httpd -p 80; {SLEEP}"));
    docker.exec("two", &format!("ping -c 1 -W 1 {NEIGHBOUR}")).expect(1);
    docker.exec("two", "ip route | grep default").expect(1);
    docker.exec("one", "ping -c 1 -W 1 two").expect(1);
    docker.ok(&["network", "connect", "cellar", "one"]);
    docker.exec("one", "ping -c 1 -W 20 two").expect(0);
    docker.exec("one", &format!("ping -c 1 -W 20 {NEIGHBOUR}")).expect(0);
    // The host leads in all the same.
    docker.until("it is reached from outside", || docker.neighbour.get(&format!("{HOST}:8080"), "/"));
    docker.ok(&["network", "disconnect", "mine", "one"]);
    docker.exec("one", &format!("ping -c 1 -W 1 {NEIGHBOUR}")).expect(1);
    docker.ok(&["rm", "-f", "one", "two"]);
    docker.ok(&["network", "rm", "mine", "cellar"]);
    docker.is_clean();
}

#[test]
fn of_ipv6_there_is_loopback_and_a_word() {
    needs_root!();
    let Some(docker) = Host::new() else { return };
    docker.run(&["network", "create", "--ipv6", "six"]).expect(2).says(&["--ipv6", "IPv4", "--network host"]);
    let subnet = ["network", "create", "--subnet", "fd00:1::/64", "six"];
    docker.run(&subnet).expect(2).says(&["fd00:1::/64", "IPv6"]);
    docker.ok(&["network", "create", "--ipv6=false", "four"]);
    // The server goes into the background once it listens.
    let script = "cat /proc/net/if_inet6; mkdir /w; echo six > /w/index.html; httpd -p [::1]:80 -h /w; \
                  wget -q -O - http://[::1]:80/";
    if std::path::Path::new("/proc/net/if_inet6").exists() {
        for network in ["none", "bridge", "four"] {
            let said = docker.ok(&["run", "--rm", "--network", network, "busybox", "sh", "-c", script]);
            assert!(said.contains(" lo\n") && said.ends_with("six"), "{network}: {said}");
        }
    } else {
        eprintln!("SKIPPED ALOUD: this kernel has no IPv6");
    }
    docker.ok(&["network", "rm", "four"]);
    docker.is_clean();
}

#[test]
fn a_killed_build_leaves_no_interface_and_its_address_is_free() {
    needs_root!();
    let Some(docker) = Host::new() else { return };
    let context =
        Context::new(&[("Dockerfile", "FROM busybox\nRUN ip -4 -o addr show eth0; sleep 31536035\n")]);
    let command = docker.command(&["build", "--progress", "plain", "--no-cache", context.path()]);
    let mut build = Running::start(command);
    build.wait_for("inet 10.");
    let own = |name: &String| name.starts_with("kiln") && name != "kiln0";
    assert_eq!(docker.host.links().iter().filter(|name| own(name)).count(), 1);
    build.signal(rustix::process::Signal::KILL);
    build.end();
    docker.until("the process goes", || processes_with("31536035").is_empty().then_some(()));
    docker.until("the interface goes", || (!docker.host.links().iter().any(own)).then_some(()));
    let again = Context::new(&[("Dockerfile", "FROM busybox\nRUN ip -4 -o addr show eth0 | grep inet\n")]);
    docker.run(&["build", "--no-cache", again.path()]).expect(0);
    docker.is_clean();
}

#[test]
fn names_servers_and_proxies_are_what_was_asked_for() {
    needs_root!();
    let Some(docker) = Host::new() else { return };
    let flags = ["--dns", "192.0.2.1", "--dns-search", "a.test", "--dns-option", "ndots:3"];
    let run = |more: &[&str], script: &str| {
        let args = [&["run", "--rm"], &flags[..], more, &["busybox", "sh", "-c", script]].concat();
        docker.ok(&args)
    };
    let text = run(&[], "grep -v ^# /etc/resolv.conf");
    for line in ["nameserver 192.0.2.1", "search a.test", "options ndots:3"] {
        assert!(text.lines().any(|found| found == line), "{text}");
    }
    assert_eq!(text.matches("nameserver").count(), 1, "{text}");
    let hosts = ["--add-host", "db:192.0.2.7", "--add-host", "up=host-gateway"];
    let text = run(&hosts, "cat /etc/hosts; ip route | grep default");
    let gateway = text.split("default via ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    assert!(text.contains("192.0.2.7\tdb\n") && text.contains(&format!("{gateway}\tup\n")), "{text}");

    // A resolver of the host's that only the host reaches is asked on by the one inside.
    docker.ok(&["network", "create", "mine"]);
    let socket = docker.host.within(|| std::net::UdpSocket::bind("127.0.0.53:53").unwrap());
    let server = std::thread::spawn(move || {
        let mut buffer = [0; 512];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            let mut answer = buffer[..length].to_vec();
            if answer.len() < 12 {
                return;
            }
            // No such name, but for one.
            let known = answer.windows(7).any(|part| part == b"\x07outside")
                || answer.windows(8).any(|part| part == b"\x07outside");
            (answer[2], answer[3]) = (0x81, if known { 0x80 } else { 0x83 });
            if known && answer[length - 4..length] == [0, 1, 0, 1] {
                answer[7] = 1;
                answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 192, 0, 2, 99]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    let args =
        ["run", "--rm", "--network", "mine", "--dns", "127.0.0.53", "busybox", "nslookup", "outside.test"];
    let found = docker.run(&args);
    assert!(found.stdout.contains("192.0.2.99"), "{found:?}");
    docker.host.within(|| {
        std::net::UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"end", "127.0.0.53:53").unwrap();
    });
    server.join().unwrap();

    docker.ok(&["network", "rm", "mine"]);
    docker.is_clean();
}
