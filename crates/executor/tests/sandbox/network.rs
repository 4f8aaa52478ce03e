//! Whose network namespace a process is in.

use kiln_executor::{Cancel, Capabilities, Exit, Network, ProcessSpec, SystemPaths};

use crate::harness::{Sandbox, shell};

/// Where the script's process was, and its output.
#[track_caller]
fn namespace(sandbox: &Sandbox, script: &str, change: impl FnOnce(&mut ProcessSpec)) -> (String, String) {
    let mut spec = shell(&format!("readlink /proc/self/ns/net; {script}"));
    change(&mut spec);
    let (result, out, err) = sandbox.run_spec(&spec, &Cancel::new().unwrap());
    assert_eq!(result.unwrap(), Exit::Code(0), "{out}{err}");
    let (first, rest) = out.split_once('\n').unwrap();
    (first.to_owned(), rest.to_owned())
}

#[test]
fn a_namespace_that_is_as_good_as_new_is_used_again() {
    let Some(sandbox) = Sandbox::new() else { return };
    for network in [Network::None, Network::Default] {
        let look = "ip addr show; ip route; cat /etc/hosts";
        let (first, own) = namespace(&sandbox, look, |spec| spec.network = network);
        let (second, same) = namespace(&sandbox, look, |spec| spec.network = network);
        assert_eq!((&first, &own), (&second, &same), "{network:?}");
        assert!(own.contains("127.0.0.1/8"), "{own}");
        assert_eq!(own.contains("eth0"), network == Network::Default, "{own}");
    }
}

/// Waits until so many sockets are open.
fn until_open(count: usize) -> String {
    let lines = "$(cat /proc/net/tcp /proc/net/tcp6 /proc/net/udp /proc/net/udp6 2>/dev/null | while read -r n rest; \
                 do case $n in *:) echo; esac; done | wc -l)";
    format!("n=0; until [ {lines} -ge {count} ] || [ $n = 600 ]; do n=$((n+1)); sleep 0.05; done")
}

#[test]
fn what_listened_and_what_was_not_read_is_gone_with_its_process() {
    let Some(sandbox) = Sandbox::new() else { return };
    // Not every busybox has an nc that takes datagrams.
    let listen = format!("nc -u -l -p 4000 >/dev/null & nc -l -p 4000 >/dev/null & {}", until_open(1));
    let (first, _) = namespace(&sandbox, &listen, |_| {});
    let (second, out) = namespace(&sandbox, "cat /proc/net/tcp /proc/net/udp | wc -l", |_| {});
    assert_eq!(out, "2\n", "two headings and no socket");
    assert_eq!(first, second);
}

#[test]
fn a_socket_that_nobody_can_close_is_left_to_nobody() {
    let Some(sandbox) = Sandbox::new() else { return };
    // Two sockets that hold each other are freed when the kernel gets round to it.
    let source = r#"
        #include <string.h>
        #include <sys/socket.h>
        #include <sys/un.h>
        int main(void) {
            int pair[2], named = socket(AF_UNIX, SOCK_STREAM, 0);
            struct sockaddr_un address = { AF_UNIX, "\0left" };
            if (bind(named, (void *)&address, 8) || listen(named, 1)) return 1;
            if (socketpair(AF_UNIX, SOCK_DGRAM, 0, pair)) return 2;
            int fds[2] = { named, pair[0] };
            char byte = 0, control[CMSG_SPACE(sizeof fds)];
            struct iovec bytes = { &byte, 1 };
            struct msghdr message = { 0, 0, &bytes, 1, control, sizeof control, 0 };
            struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
            *rights = (struct cmsghdr){ CMSG_LEN(sizeof fds), SOL_SOCKET, SCM_RIGHTS };
            memcpy(CMSG_DATA(rights), fds, sizeof fds);
            return sendmsg(pair[1], &message, 0) != 1;
        }"#;
    if !sandbox.compile("leave", source) {
        return;
    }
    for _ in 0..5 {
        namespace(&sandbox, "leave", |_| {});
        let (_, out) = namespace(&sandbox, "cat /proc/net/unix | wc -l", |_| {});
        assert_eq!(out, "1\n", "a heading and no socket");
    }
}

#[test]
fn a_namespace_with_a_connection_that_lingers_is_nobody_elses() {
    let Some(sandbox) = Sandbox::new() else { return };
    let talk = format!(
        "nc -l -p 4000 >/dev/null & {}; echo hi | nc 127.0.0.1 4000; wait; n=0; \
         while [ $n -lt 600 ]; do n=$((n+1)); case $(cat /proc/net/sockstat) in *'tw 0'*) sleep 0.05;; *) break;; esac; done; \
         cat /proc/net/sockstat",
        until_open(1)
    );
    let (first, counts) = namespace(&sandbox, &talk, |_| {});
    assert!(!counts.contains("tw 0"), "it was to leave one: {counts}");
    let (second, counts) = namespace(&sandbox, "cat /proc/net/sockstat", |_| {});
    assert_ne!(first, second);
    assert!(counts.contains("tw 0"), "{counts}");
}

#[test]
fn who_may_configure_the_network_shares_it_with_nobody() {
    let Some(sandbox) = Sandbox::new() else { return };
    let capable = Capabilities::changed(&[Capabilities::parse("NET_ADMIN").unwrap()], &[]);
    let changes: [fn(&mut ProcessSpec, Capabilities); 3] = [
        |spec, capable| spec.capabilities = capable,
        |spec, _| spec.system_paths = SystemPaths::Open,
        |spec, _| spec.sysctls = vec![("net.ipv4.ip_default_ttl".to_owned(), "9".to_owned())],
    ];
    let (plain, _) = namespace(&sandbox, "true", |_| {});
    for change in changes {
        let (other, _) = namespace(&sandbox, "true", |spec| change(spec, capable));
        // The plain one is held. Those of the others are gone, and their numbers may come again.
        assert_ne!(other, plain);
        let (next, _) = namespace(&sandbox, "true", |_| {});
        assert_eq!(next, plain, "the plain one is still there, and no other");
    }
    let (_, ttl) = namespace(&sandbox, "cat /proc/sys/net/ipv4/ip_default_ttl", |_| {});
    assert_eq!(ttl, "64\n");
}

#[test]
fn processes_at_once_share_no_network() {
    let Some(sandbox) = Sandbox::new() else { return };
    // Each waits for the other.
    let here = |own: &str, other: &str| {
        let meet = format!(
            "echo > /tmp/{own}; n=0; until [ -e /tmp/{other} ]; do n=$((n+1)); [ $n -lt 1200 ] || exit 1; sleep 0.05; done"
        );
        namespace(&sandbox, &meet, |_| {}).0
    };
    let both = std::thread::scope(|scope| {
        let all = [scope.spawn(|| here("one", "other")), scope.spawn(|| here("other", "one"))];
        all.map(|one| one.join().unwrap())
    });
    assert_ne!(both[0], both[1]);
}
