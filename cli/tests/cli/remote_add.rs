//! `ADD` of a file of a web server.

use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use crate::harness::{Context, Outcome, Running, Store, needs_root};
use crate::web::{Request, Web, response};

const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
const DATE_UNIX: u32 = 784_111_777;
/// `printf one | sha256sum`
const SHA256_OF_ONE: &str = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed";

/// A server whose one file can be changed, with an ETag, or only a date, or neither.
struct Changing {
    web: Web,
    content: Arc<Mutex<&'static str>>,
}

impl Changing {
    fn new(headers: &'static [&'static str]) -> Changing {
        let content = Arc::new(Mutex::new("one"));
        let now = content.clone();
        let web = Web::serve(move |request| {
            let now = *now.lock().expect("nobody panics");
            let etag = format!("\"{now}\"");
            let all = [("ETag", etag.as_str()), ("Last-Modified", DATE)];
            let sent: Vec<_> = all.into_iter().filter(|(name, _)| headers.contains(name)).collect();
            let known = |request: &Request| match request.header("if-none-match") {
                Some(tag) => tag == etag,
                None => request.header("if-modified-since") == Some(DATE),
            };
            if known(request) {
                return response("304 Not Modified", &sent, b"");
            }
            response("200 OK", &sent, now.as_bytes())
        });
        Changing { web, content }
    }

    fn change(&self, content: &'static str) {
        *self.content.lock().expect("nobody panics") = content;
    }

    /// How often it was asked for the file, whatever it is, and for a newer one, since the last call.
    fn asked(&self) -> (usize, usize) {
        let seen = self.web.take_seen();
        let known = |request: &&Request| {
            request.header("if-none-match").is_some() || request.header("if-modified-since").is_some()
        };
        let newer = seen.iter().filter(known).count();
        (seen.len() - newer, newer)
    }
}

/// Builds these instructions on busybox, as `x`.
#[track_caller]
fn add(store: &Store, instructions: &str) -> Outcome {
    let dockerfile = format!("FROM busybox\n{instructions}\n");
    store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &["-t", "x"])
}

#[test]
fn a_download_has_the_name_of_its_url_and_the_time_of_its_server() {
    needs_root!();
    let store = Store::with_busybox();
    let web = Web::serve(|request| {
        let dated = [("Last-Modified", DATE)];
        let headers = if request.target.contains("undated") { &[] } else { &dated[..] };
        response("200 OK", headers, request.target.as_bytes())
    });
    let at = |path: &str| web.url(path);
    let instructions = format!(
        "ADD {} {} {} /in/\nADD {} /as\nADD {} /new/dir/name\nWORKDIR /w\nADD {} .\nADD --link {} /linked/",
        at("/a/plain.txt"),
        at("/b/with%20blank?version=1"),
        at("/undated#part"),
        at("/d/e/f"),
        at("/g"),
        at("/relative"),
        at("/l"),
    );
    add(&store, &instructions).expect(0);
    let list = "cd / && for f in in/* as new/dir/name w/* linked/*; do stat -c '%n %a %u:%g %Y' \"$f\"; done";
    let expected = [
        ("in/plain.txt", DATE_UNIX),
        ("in/undated", 0),
        ("in/with blank", DATE_UNIX),
        ("as", DATE_UNIX),
        ("new/dir/name", DATE_UNIX),
        ("w/relative", DATE_UNIX),
        ("linked/l", DATE_UNIX),
    ];
    let expected = expected.map(|(name, time)| format!("{name} 600 0:0 {time}"));
    assert_eq!(store.shell("x", list), expected.join("\n"));
    assert_eq!(store.shell("x", "cat '/in/with blank' /as"), "/b/with%20blank?version=1/d/e/f");
    let step = format!("ADD {} /as", at("/d/e/f"));
    let history = store.config("x")["history"].to_string();
    assert!(history.contains(&format!("{step} # buildkit")), "{history}");
}

#[test]
fn flags_of_a_download() {
    needs_root!();
    let store = Store::with_busybox();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(6);
    header.set_mode(0o640);
    header.set_uid(55);
    header.set_gid(66);
    builder.append_data(&mut header, "inside/f", &b"packed"[..]).expect("in memory");
    let bytes = builder.into_inner().expect("in memory");
    let size = bytes.len();
    let web = Web::serve(move |_| response("200 OK", &[], &bytes));
    let url = web.url("/a.tar");
    let instructions = format!(
        "RUN echo svc:x:71:72::/:/bin/sh >> /etc/passwd\n\
         ADD --chown=svc --chmod=0751 {url} /flags\nADD {url} /kept/\nADD --unpack=false {url} /kept/two\n\
         ADD --unpack=true {url} /un/\nADD --unpack --chown=12:34 --chmod=600 {url} /owned/"
    );
    add(&store, &instructions).expect(0);
    // As in BuildKit: owners go to what was packed, modes do not.
    let list = "cd / && stat -c '%n %a %u:%g %s' flags kept/* un/inside/f owned/inside/f";
    let expected = format!(
        "flags 751 71:72 {size}\nkept/a.tar 600 0:0 {size}\nkept/two 600 0:0 {size}\n\
         un/inside/f 640 55:66 6\nowned/inside/f 640 12:34 6"
    );
    assert_eq!(store.shell("x", list), expected);
    add(&store, &format!("COPY {url} /f")).expect(3).says(&["COPY does not take a URL", "hint: use ADD"]);
    add(&store, &format!("ADD {url} {url} /f")).expect(3).says(&["must be a directory"]);
}

#[test]
fn an_unchanged_download_is_asked_for_but_not_sent_again() {
    needs_root!();
    let store = Store::with_busybox();
    // What the server says of its file, and what it is asked the second time.
    for (headers, asked) in [
        (&["ETag", "Last-Modified"][..], (0, 1)),
        (&["ETag"], (0, 1)),
        (&["Last-Modified"], (0, 1)),
        (&[], (1, 0)),
    ] {
        let server = Changing::new(headers);
        let url = server.web.url("/f");
        let build = || add(&store, &format!("ADD {url} /f\nWORKDIR /w")).expect(0);
        build();
        assert_eq!(server.asked(), (1, 0), "{headers:?}");
        let second = build();
        let third = build();
        assert_eq!(server.asked(), (2 * asked.0, 2 * asked.1), "{headers:?}");
        for outcome in [second, third] {
            let add = format!("ADD {url} /f");
            let cached = outcome.steps().into_iter().filter(|(title, cached)| *title == add && *cached);
            assert_eq!(cached.count(), 1, "{headers:?}:\n{}", outcome.stderr);
            assert!(outcome.stdout.contains("everything from the cache"), "{}", outcome.stdout);
        }
    }
}

#[test]
fn a_changed_download_runs_what_needs_it() {
    needs_root!();
    let store = Store::with_busybox();
    let server = Changing::new(&["ETag"]);
    let instructions = format!("ADD {} /f\nRUN --network=none cat /f > /g", server.web.url("/f"));
    add(&store, &instructions).expect(0);
    server.change("two");
    let outcome = add(&store, &instructions).expect(0);
    assert!(outcome.ran().iter().any(|title| title.starts_with("RUN")), "{}", outcome.stderr);
    assert_eq!((store.shell("x", "cat /f /g").as_str(), server.asked()), ("twotwo", (1, 1)));
    // The first content again: known, though not the newest.
    server.change("one");
    let outcome = add(&store, &instructions).expect(0);
    assert!(!outcome.ran().iter().any(|title| title.starts_with("RUN")), "{}", outcome.stderr);
    assert_eq!(store.shell("x", "cat /f /g"), "oneone");
}

#[test]
fn a_checksum_is_held_to() {
    needs_root!();
    let store = Store::with_busybox();
    let server = Changing::new(&["ETag"]);
    let url = server.web.url("/f");
    let right = format!("ARG SUM={SHA256_OF_ONE}\nADD --checksum=sha256:$SUM {url} /f");
    add(&store, &right).expect(0);
    assert_eq!((store.shell("x", "cat /f").as_str(), server.asked()), ("one", (1, 0)));
    // What is known needs no server at all.
    server.change("two");
    add(&store, &right).expect(0);
    assert_eq!(server.asked(), (0, 0));

    let before = store.holds();
    let other = Changing::new(&[]);
    other.change("two");
    let url = other.web.url("/f");
    let wrong = format!("ADD --checksum=sha256:{SHA256_OF_ONE} {url} /f");
    add(&store, &wrong).expect(6).says(&["Dockerfile:2:1", &url, SHA256_OF_ONE, "is expected"]);
    assert_eq!(store.holds(), before, "nothing of it is kept");
    for checksum in ["sha256:12", "md5:d41d8cd98f00b204e9800998ecf8427e", SHA256_OF_ONE] {
        let instructions = format!("ADD --checksum={checksum} {url} /f");
        add(&store, &instructions).expect(3).says(&["Dockerfile:2:", "--checksum"]);
    }
    add(&store, &format!("ADD --checksum=sha256:{SHA256_OF_ONE} {url} {url} /d/")).expect(3);
    assert_eq!(other.asked(), (1, 0), "what cannot be is not even asked for");
}

#[test]
fn a_file_that_does_not_come_is_said_with_where_and_why() {
    needs_root!();
    let store = Store::with_busybox();
    let web = Web::serve(|request| match request.target.as_str() {
        "/around" => response("302 Found", &[("Location", "/around")], b""),
        "/local" => response("302 Found", &[("Location", "file:///etc/passwd")], b""),
        "/near" => response("307 Temporary Redirect", &[("Location", "/other/name")], b""),
        "/other/name" => response("200 OK", &[], b"here"),
        "/secret" => response("403 Forbidden", &[], b""),
        "/cut" => b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\ncut".to_vec(),
        _ => response("404 Not Found", &[], b""),
    });
    let fails = |path: &str, code, says: &[&str]| {
        let outcome = add(&store, &format!("ADD {} /f", web.url(path))).expect(code);
        outcome.says(says).says(&["Dockerfile:2:1", "127.0.0.1"]);
        web.take_seen().len()
    };
    assert_eq!(fails("/absent", 5, &["404", "/absent"]), 1);
    assert_eq!(fails("/secret", 5, &["403"]), 1);
    assert_eq!(fails("/around", 5, &["redirects more than 10 times"]), 11);
    assert_eq!(fails("/local", 7, &["file:///etc/passwd", "only http and https are followed"]), 1);
    assert_eq!(fails("/cut", 5, &["the transfer from 127.0.0.1"]), 3);
    // The name is the one that was asked for.
    add(&store, &format!("ADD {} /d/", web.url("/near"))).expect(0);
    assert_eq!(store.shell("x", "cd /d && head *"), "here");
    assert_eq!(store.shell("x", "ls /d"), "near");
    // Nobody there at all: a port that was just given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    let closed = format!("http://{}/f", port.expect("loopback is there"));
    add(&store, &format!("ADD {closed} /f")).expect(5).says(&["the transfer from 127.0.0.1"]);
}

#[test]
fn a_build_that_waits_for_a_server_is_stopped_at_once() {
    needs_root!();
    let store = Store::with_busybox();
    let (asked, heard) = mpsc::channel();
    let (_release, held) = mpsc::channel::<()>();
    let (asked, held) = (Mutex::new(asked), Mutex::new(held));
    let web = Web::serve(move |_| {
        asked.lock().expect("nobody panics").send(()).expect("the test waits");
        // Ends with the test, which drops the other side.
        let _ = held.lock().expect("nobody panics").recv();
        response("200 OK", &[], b"late")
    });
    let context = Context::new(&[("Dockerfile", &format!("FROM busybox\nADD {} /f\n", web.url("/f")))]);
    // A step that waits, and a build that has not begun yet.
    for place in [context.path().to_owned(), web.url("/context.tar")] {
        let running = Running::start(store.command(&["build", "--progress", "plain", &place]));
        heard.recv().expect("the server lives");
        let signalled = Instant::now();
        running.signal(rustix::process::Signal::TERM);
        let outcome = running.end().expect(130);
        // The server says nothing before the test ends.
        assert!(signalled.elapsed() < Duration::from_secs(10), "{}", outcome.stderr);
        store.tidy_after(signalled.elapsed());
        assert_eq!(store.active_snapshots(), [""; 0]);
    }
}
