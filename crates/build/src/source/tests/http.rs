//! Downloads against a real server.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use kiln_llb as llb;
use kiln_oci::Digest;
use kiln_solver::Cancellation;

use super::web::{Web, response};
use super::{Bench, chain};
use crate::SourceError;
use crate::source::error::Fault;
use crate::source::http::Downloaded;

const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

fn op(url: &str) -> llb::Http {
    llb::Http { url: url.to_owned(), filename: "file".to_owned(), checksum: None, mode: 0o640 }
}

fn get(bench: &Bench, op: &llb::Http) -> Result<Downloaded, SourceError> {
    bench.fetch(|fetcher| fetcher.http(op))
}

fn read(bench: &Bench, file: &Downloaded) -> String {
    fs::read_to_string(bench.path(&file.snapshot).join("file")).unwrap()
}

/// Serves what is in the cell, with an ETag of its own.
fn versioned(content: &Arc<Mutex<&'static str>>) -> Web {
    let content = content.clone();
    Web::serve(move |request| {
        let now = *content.lock().unwrap();
        let etag = format!("\"{now}\"");
        if request.header("if-none-match") == Some(&etag) {
            return response("304 Not Modified", &[("ETag", &etag)], b"");
        }
        response("200 OK", &[("ETag", &etag), ("Last-Modified", DATE)], now.as_bytes())
    })
}

#[test]
fn a_file_has_its_name_mode_owner_and_time() {
    let web = versioned(&Arc::new(Mutex::new("one")));
    let bench = Bench::new();
    let file = get(&bench, &op(&web.url("/a/b"))).unwrap();
    assert_eq!((read(&bench, &file).as_str(), file.content), ("one", Digest::of(b"one")));
    let stat = fs::metadata(bench.path(&file.snapshot).join("file")).unwrap();
    assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (0o640, 0, 0));
    assert_eq!(stat.mtime(), 784_111_777);
    assert_eq!(web.take_seen()[0].header("accept-encoding"), Some("identity"));
}

#[test]
fn an_unchanged_file_is_asked_for_but_not_sent_again() {
    let content = Arc::new(Mutex::new("one"));
    let (web, bench) = (versioned(&content), Bench::new());
    let first = get(&bench, &op(&web.url("/f"))).unwrap();
    let second = get(&bench, &op(&web.url("/f"))).unwrap();
    assert_eq!(first, second);
    assert_eq!(web.take_seen()[1].header("if-modified-since"), Some(DATE));
    *content.lock().unwrap() = "two";
    let third = get(&bench, &op(&web.url("/f"))).unwrap();
    assert_eq!(read(&bench, &third), "two");
    assert_eq!(get(&bench, &op(&web.url("/f"))).unwrap(), third);
}

#[test]
fn a_record_without_its_snapshot_is_fetched_anew() {
    let (web, bench) = (versioned(&Arc::new(Mutex::new("one"))), Bench::new());
    let first = get(&bench, &op(&web.url("/f"))).unwrap();
    bench.engine.snapshots.remove(&first.snapshot).unwrap();
    let again = get(&bench, &op(&web.url("/f"))).unwrap();
    assert_eq!(read(&bench, &again), "one");
}

#[test]
fn a_server_without_etags_sends_again_but_nothing_is_kept_twice() {
    let web = Web::serve(|_| response("200 OK", &[], b"same"));
    let bench = Bench::new();
    let first = get(&bench, &op(&web.url("/f"))).unwrap();
    assert_eq!(get(&bench, &op(&web.url("/f"))).unwrap(), first);
    assert_eq!(bench.leftovers(), 1);
    assert_eq!(fs::metadata(bench.path(&first.snapshot).join("file")).unwrap().mtime(), 0);
}

#[test]
fn a_wrong_checksum_names_both_and_keeps_nothing() {
    let (web, bench) = (versioned(&Arc::new(Mutex::new("one"))), Bench::new());
    let wrong = llb::Http { checksum: Some(Digest::of(b"other")), ..op(&web.url("/f")) };
    let error = get(&bench, &wrong).unwrap_err();
    assert_eq!(error.fault(), Fault::Integrity);
    let text = error.to_string();
    assert!(text.contains(&Digest::of(b"one").hex()) && text.contains(&Digest::of(b"other").hex()), "{text}");
    assert_eq!(bench.leftovers(), 0);
}

#[test]
fn a_known_checksum_needs_no_request() {
    let (web, bench) = (versioned(&Arc::new(Mutex::new("one"))), Bench::new());
    let right = llb::Http { checksum: Some(Digest::of(b"one")), ..op(&web.url("/f")) };
    let first = get(&bench, &right).unwrap();
    assert_eq!(web.take_seen().len(), 1);
    assert_eq!(get(&bench, &right).unwrap(), first);
    assert_eq!(web.take_seen().len(), 0);
    let wrong = llb::Http { checksum: Some(Digest::of(b"other")), ..op(&web.url("/f")) };
    assert!(matches!(get(&bench, &wrong), Err(SourceError::Checksum { .. })));
}

#[test]
fn an_answer_that_is_no_file_names_host_and_status() {
    let web = Web::serve(|_| response("404 Not Found", &[], b"<html>"));
    let bench = Bench::new();
    let url = web.url("/f?x").replace("http://", "http://me:canary@");
    let error = get(&bench, &op(&url)).unwrap_err();
    assert_eq!(error.fault(), Fault::Network);
    let host = web.url("").replace("http://", "");
    assert_eq!(error.to_string(), format!("{host} answered 404 to the request for {}", web.url("/f?x")));
    assert_eq!((web.take_seen().len(), bench.leftovers()), (1, 0));
}

#[test]
fn a_transfer_that_breaks_off_is_tried_three_times() {
    let web = Web::serve(|_| b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf".to_vec());
    let bench = Bench::new();
    let error = get(&bench, &op(&web.url("/f"))).unwrap_err();
    assert!(matches!(error, SourceError::Transfer { .. }), "{error}");
    assert_eq!((web.take_seen().len(), bench.leftovers()), (3, 0));
}

#[test]
fn a_server_that_recovers_is_forgiven() {
    let count = AtomicUsize::new(0);
    let web = Web::serve(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        0 => response("503 Service Unavailable", &[], b""),
        1 => b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf".to_vec(),
        _ => response("200 OK", &[], b"whole"),
    });
    let bench = Bench::new();
    assert_eq!(read(&bench, &get(&bench, &op(&web.url("/f"))).unwrap()), "whole");
    assert_eq!(bench.leftovers(), 1);
}

#[test]
fn nobody_there_is_said_with_the_host() {
    let bench = Bench::new();
    let error = get(&bench, &op("http://127.0.0.1:1/f")).unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    assert_eq!(error.fault(), Fault::Network);
}

#[test]
fn redirects_are_followed_ten_times_and_only_on_the_web() {
    let web = Web::serve(|request| match request.target.strip_prefix("/hop/") {
        Some("0") => response("200 OK", &[], b"here"),
        Some(number) => {
            let next = format!("/hop/{}", number.parse::<u32>().unwrap() - 1);
            response("302 Found", &[("Location", &next)], b"")
        }
        None => response("301 Moved Permanently", &[("Location", "file:///etc/passwd")], b""),
    });
    let bench = Bench::new();
    assert_eq!(read(&bench, &get(&bench, &op(&web.url("/hop/10"))).unwrap()), "here");
    let error = get(&bench, &op(&web.url("/hop/11"))).unwrap_err();
    assert!(matches!(error, SourceError::Redirects { limit: 10, .. }), "{error}");
    let error = get(&bench, &op(&web.url("/local"))).unwrap_err();
    assert_eq!(error.fault(), Fault::Refused);
}

#[test]
fn what_is_too_large_is_given_up() {
    let endless = "4\r\nabcd\r\n".repeat(100) + "0\r\n\r\n";
    let endless = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{endless}");
    let web = Web::serve(move |request| match request.target.as_str() {
        "/said" => response("200 OK", &[], &[b'x'; 101]),
        "/fits" => response("200 OK", &[], &[b'x'; 100]),
        _ => endless.clone().into_bytes(),
    });
    let mut bench = Bench::new();
    bench.options.max_download_bytes = 100;
    for path in ["/said", "/unsaid"] {
        let error = get(&bench, &op(&web.url(path))).unwrap_err();
        assert!(matches!(error, SourceError::TooLarge { limit_bytes: 100, .. }), "{path}: {error}");
        assert_eq!(error.fault(), Fault::Limit);
    }
    assert_eq!(bench.leftovers(), 0);
    get(&bench, &op(&web.url("/fits"))).unwrap();
}

#[test]
fn credentials_reach_their_host_and_no_other() {
    let other = Web::serve(|_| response("200 OK", &[], b"other"));
    let target = other.url("/f");
    let web = Web::serve(move |request| match request.target.as_str() {
        "/away" => response("302 Found", &[("Location", &target)], b""),
        "/near" => response("302 Found", &[("Location", "/f")], b""),
        _ => response("200 OK", &[], b"here"),
    });
    let bench = Bench::with_secrets(&[("HTTP_AUTH_TOKEN_127.0.0.1", "canary\n")]);
    get(&bench, &op(&web.url("/near"))).unwrap();
    get(&bench, &op(&web.url("/away"))).unwrap();
    for request in web.take_seen() {
        assert_eq!(request.header("authorization"), Some("Bearer canary"), "{}", request.target);
    }
    // Same host, but another port: another server.
    assert_eq!(other.take_seen()[0].header("authorization"), None);

    let bench = Bench::with_secrets(&[("HTTP_AUTH_HEADER_127.0.0.1", "Digest canary")]);
    get(&bench, &op(&web.url("/f"))).unwrap();
    assert_eq!(web.take_seen()[0].header("authorization"), Some("Digest canary"));

    let bench = Bench::with_secrets(&[("HTTP_AUTH_TOKEN_127.0.0.1", "canary\r\nX-Other: 1")]);
    let error = get(&bench, &op(&web.url("/f"))).unwrap_err();
    assert!(matches!(error, SourceError::Secret { .. }) && !chain(&error).contains("canary"), "{error}");

    let bench = Bench::new();
    get(&bench, &op(&web.url("/f").replace("http://", "http://me:word@"))).unwrap();
    assert_eq!(web.take_seen()[0].header("authorization"), Some("Basic bWU6d29yZA=="));
}

#[test]
fn bytes_are_kept_as_they_are_on_the_server() {
    let packed = [0x1f, 0x8b, 8, 0, 1, 2, 3];
    let web = Web::serve(move |_| response("200 OK", &[("Content-Encoding", "gzip")], &packed));
    let bench = Bench::new();
    assert_eq!(get(&bench, &op(&web.url("/f"))).unwrap().content, Digest::of(&packed));
}

#[test]
fn only_urls_and_names_of_files_are_taken() {
    let bench = Bench::new();
    for url in ["file:///etc/passwd", "ftp://h/x", "http://", "/etc/passwd", "http://me:canary@"] {
        let error = get(&bench, &op(url)).unwrap_err();
        assert!(matches!(error, SourceError::Url { .. }), "{url}: {error}");
        assert!(!error.to_string().contains("canary"), "{error}");
    }
    for name in ["", "..", "a/b", ".wh.x", "a\nb"] {
        let op = llb::Http { filename: name.to_owned(), ..op("http://127.0.0.1:1/") };
        assert_eq!(get(&bench, &op).unwrap_err().fault(), Fault::Refused, "{name:?}");
    }
}

#[test]
fn a_cancelled_build_does_not_wait_for_the_server() {
    let (release, held) = mpsc::channel::<()>();
    let held = Mutex::new(held);
    let bench = Bench::new();
    let cancel = bench.cancel.clone();
    let web = Web::serve(move |_| {
        cancel.cancel();
        // Ends with the test, which drops the other side.
        let _ = held.lock().unwrap().recv();
        response("200 OK", &[], b"late")
    });
    let error = get(&bench, &op(&web.url("/f"))).unwrap_err();
    assert!(matches!(error, SourceError::Cancelled), "{error}");
    drop(release);
    assert_eq!(bench.leftovers(), 0);
}
