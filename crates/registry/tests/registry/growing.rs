//! Blobs that are sent while they are made.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};

use kiln_oci::Digest;
use kiln_oci::image::{Descriptor, media_type};
use kiln_registry::{BlobSource, Error, Growing, Grown, NoCredentials, Pushed, Settings};

use crate::bench::{Bench, password, text};
use crate::server::{Request, Server, answer};

/// What is not worth an early beginning, and what a piece has at least.
const LEAST: usize = 8 << 20;

pub(crate) fn content(length: usize) -> Vec<u8> {
    (0..length as u32).map(|n| (n ^ (n >> 7) ^ (n >> 15)) as u8).collect()
}

fn blob(bytes: &[u8]) -> Descriptor {
    Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::of(bytes), bytes.len() as u64)
}

/// A blob that is as far as a test says each time somebody waits for more.
pub(crate) struct Made<F> {
    pub(crate) bytes: Vec<u8>,
    /// What the waits so far wanted.
    pub(crate) wanted: Mutex<Vec<u64>>,
    /// How far it is at the nth wait; `None`: whole.
    pub(crate) far: F,
}

impl<F> BlobSource for Made<F>
where
    F: Send + Sync,
{
    fn open(&self, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        self.bytes.open(offset)
    }
}

impl<F> Growing for Made<F>
where
    F: Fn(usize, u64) -> io::Result<Option<u64>> + Send + Sync,
{
    fn grown(&self, wanted: u64) -> Pin<Box<dyn Future<Output = io::Result<Grown>> + Send + '_>> {
        let mut waits = self.wanted.lock().unwrap();
        waits.push(wanted);
        let far = (self.far)(waits.len() - 1, wanted);
        let grown = far.map(|far| far.map_or_else(|| Grown::Whole(blob(&self.bytes)), Grown::Part));
        Box::pin(std::future::ready(grown))
    }
}

pub(crate) fn made<F>(bytes: Vec<u8>, far: F) -> Made<F>
where
    F: Fn(usize, u64) -> io::Result<Option<u64>> + Send + Sync,
{
    Made { bytes, wanted: Mutex::default(), far }
}

/// Just as far as somebody waits for, until it is whole.
pub(crate) fn steps(length: usize) -> impl Fn(usize, u64) -> io::Result<Option<u64>> + Send + Sync {
    move |_, wanted| Ok((wanted < length as u64).then_some(wanted))
}

fn push<F>(bench: &Bench, server: &Server, source: &Made<F>) -> Result<Pushed, Error>
where
    F: Fn(usize, u64) -> io::Result<Option<u64>> + Send + Sync,
{
    let nowhere = |_: &Digest| Vec::new();
    let (known, pushed) = bench.run(bench.repository(server).push_growing(source, &nowhere))?;
    assert_eq!(known, blob(&source.bytes));
    Ok(pushed)
}

fn methods(server: &Server) -> Vec<String> {
    server.seen().iter().map(|request| request.method.clone()).collect()
}

fn ranges(server: &Server) -> Vec<String> {
    let seen = server.seen();
    seen.iter().filter_map(|request| request.header("content-range").map(str::to_owned)).collect()
}

#[track_caller]
fn check_there(server: &Server, bytes: &[u8]) {
    let state = server.state.lock().unwrap();
    assert!(state.blobs.get(&Digest::of(bytes)).is_some_and(|there| there == bytes));
}

#[test]
fn the_registry_has_a_piece_before_the_next_one_is_made() {
    let (bench, server) = (Bench::new(), Server::new());
    let watched = server.clone();
    let source = made(content(20 << 20), move |_, wanted| {
        let arrived: usize = watched.seen().iter().map(|request| request.body.len()).sum();
        // What was there at the wait before has arrived by now.
        let (before, now) = match wanted >> 20 {
            8 => (0, Some(9 << 20)),
            17 => (9 << 20, Some(17 << 20)),
            _ => (17 << 20, None),
        };
        assert_eq!(arrived, before);
        Ok(now)
    });
    assert_eq!(push(&bench, &server, &source).unwrap(), Pushed::Sent);
    check_there(&server, &source.bytes);
    assert_eq!(methods(&server), ["POST", "PATCH", "PATCH", "PATCH", "PUT"]);
    assert_eq!(ranges(&server), ["0-9437183", "9437184-17825791", "17825792-20971519"]);
    let least = LEAST as u64;
    assert_eq!(*source.wanted.lock().unwrap(), [least, least, (9 << 20) + least, (17 << 20) + least]);
}

#[test]
fn what_is_whole_soon_is_looked_for_first() {
    let (bench, server) = (Bench::new(), Server::new());
    let source = made(content(1 << 20), steps(1 << 20));
    assert_eq!(push(&bench, &server, &source).unwrap(), Pushed::Sent);
    assert_eq!(methods(&server), ["HEAD", "POST", "PATCH", "PUT"]);
    assert_eq!(push(&bench, &server, &source).unwrap(), Pushed::Known);
    let source = made(content(2 << 20), steps(2 << 20));
    server.manifest("mountable", &source.bytes);
    let near = |_: &Digest| vec!["other/image".to_owned()];
    let pushed = bench.run(bench.repository(&server).push_growing(&source, &near)).unwrap().1;
    assert_eq!(pushed, Pushed::Mounted("other/image".to_owned()));
}

#[test]
fn what_the_registry_turns_out_to_have_is_not_sent_to_its_end() {
    let (bench, server) = (Bench::new(), Server::new());
    let source = made(content(24 << 20), |_, wanted| Ok((wanted == LEAST as u64).then_some(wanted)));
    server.blob(&source.bytes);
    assert_eq!(push(&bench, &server, &source).unwrap(), Pushed::Known);
    assert_eq!(methods(&server), ["POST", "PATCH", "HEAD", "DELETE"]);
    // The last piece is sent sooner than anybody answers.
    let (bench, server) = (Bench::new(), Server::new());
    let source = made(content(16 << 20), |_, wanted| Ok((wanted == LEAST as u64).then_some(wanted)));
    server.blob(&source.bytes);
    assert_eq!(push(&bench, &server, &source).unwrap(), Pushed::Sent);
    assert_eq!(methods(&server), ["POST", "PATCH", "PATCH", "PUT"]);
}

#[test]
fn what_comes_to_nothing_is_given_back() {
    let (bench, server) = (Bench::new(), Server::new());
    let source = made(content(20 << 20), |_, wanted| match wanted == LEAST as u64 {
        true => Ok(Some(wanted)),
        false => Err(io::Error::other("no space left")),
    });
    let error = push(&bench, &server, &source).unwrap_err();
    assert!(matches!(error, Error::Local { .. }) && text(&error).contains("no space left"), "{error}");
    assert_eq!(methods(&server), ["POST", "PATCH", "DELETE"]);
    // Before anything was sent, there is nothing to give back.
    let server = Server::new();
    let source = made(Vec::new(), |_, _| Err(io::Error::other("no space left")));
    push(&bench, &server, &source).unwrap_err();
    assert_eq!(methods(&server), [""; 0]);
}

#[test]
fn a_registry_that_takes_no_pieces_gets_the_blob_when_it_is_whole() {
    for (status, expected) in [
        (405, &["POST", "PATCH", "HEAD", "PUT"][..]),
        (501, &["POST", "PATCH", "HEAD", "PUT"]),
        (404, &["POST", "PATCH", "POST", "PATCH", "HEAD", "POST", "PUT"]),
        (416, &["POST", "PATCH", "GET", "PATCH", "HEAD", "POST", "PUT"]),
    ] {
        let server =
            Server::scripted(move |request, _| (request.method == "PATCH").then(|| answer(status, &[], b"")));
        let bench = Bench::new();
        let source = made(content(20 << 20), steps(20 << 20));
        assert_eq!(push(&bench, &server, &source).unwrap(), Pushed::Sent, "{status}");
        check_there(&server, &source.bytes);
        assert_eq!(methods(&server), expected, "{status}");
    }
}

#[test]
fn a_registry_that_takes_one_piece_gets_one() {
    let server = Server::scripted(|request, _| {
        let is_later = request.header("content-range").is_some_and(|range| !range.starts_with("0-"));
        is_later.then(|| answer(416, &[], b""))
    });
    let bench = Bench::new();
    let source = made(content(20 << 20), steps(20 << 20));
    assert_eq!(push(&bench, &server, &source).unwrap(), Pushed::Sent);
    check_there(&server, &source.bytes);
    assert_eq!(ranges(&server).last().unwrap(), "0-20971519");
    assert!(methods(&server).contains(&"DELETE".to_owned()));
}

/// A server that behaves, but for what `script` says, which may use it.
fn with_server(
    script: impl Fn(&Server, &Request, usize) -> Option<crate::server::Reply> + Send + Sync + 'static,
) -> Server {
    let own: Arc<OnceLock<Server>> = Arc::default();
    let known = own.clone();
    let server = Server::scripted(move |request, nth| script(known.get()?, request, nth));
    own.set(server.clone()).ok().unwrap();
    server
}

#[test]
fn a_broken_piece_goes_on_at_the_byte() {
    let server = with_server(|server, request, _| {
        if request.header("content-range") != Some("8388608-16777215") {
            return None;
        }
        server.arrive(request, 1_000_000);
        Some(answer(502, &[], b""))
    });
    let bench = Bench::new();
    let source = made(content(20 << 20), steps(20 << 20));
    assert_eq!(push(&bench, &server, &source).unwrap(), Pushed::Sent);
    check_there(&server, &source.bytes);
    assert_eq!(ranges(&server), ["0-8388607", "8388608-16777215", "9388608-17777215", "17777216-20971519"]);
}

#[test]
fn a_token_may_run_out_again_and_again() {
    let server = Server::scripted(|request, nth| {
        (request.method == "PATCH" && [1, 3].contains(&nth)).then(|| answer(401, &[], b""))
    });
    let bench = Bench::with(Settings::default(), Arc::new(password()));
    let source = made(content(30 << 20), steps(30 << 20));
    let known = bench.run(async {
        let nowhere = |_: &Digest| Vec::new();
        bench.repository(&server).push_growing(&source, &nowhere).await
    });
    // Without a challenge nobody shows a password: then 401 is no passing thing.
    let error = known.unwrap_err();
    assert!(matches!(error, Error::Denied { status: 401, .. }), "{error}");
    let server = Server::scripted(|request, nth| {
        let asks = ("WWW-Authenticate", "Basic realm=\"x\"");
        let runs_out = request.method == "PATCH" && [1, 3].contains(&nth);
        (runs_out || request.header("authorization").is_none()).then(|| answer(401, &[asks], b""))
    });
    let source = made(content(30 << 20), steps(30 << 20));
    assert_eq!(push(&bench, &server, &source).unwrap(), Pushed::Sent);
    check_there(&server, &source.bytes);
}

#[test]
fn pieces_are_as_large_as_the_registry_and_the_settings_want_them() {
    let server = Server::scripted(|request, _| {
        let begun = [("Location", "/v2/team/app/blobs/uploads/u0"), ("OCI-Chunk-Min-Length", "12582912")];
        (request.method == "POST").then(|| answer(202, &begun, b""))
    });
    let bench = Bench::new();
    let source = made(content(30 << 20), steps(30 << 20));
    // Nobody keeps that upload: what counts is what was sent.
    push(&bench, &server, &source).unwrap_err();
    assert_eq!(ranges(&server)[0], "0-12582911");
    let settings = Settings { chunk_bytes: Some(400_000), ..Settings::default() };
    let bench = Bench::with(settings, Arc::new(NoCredentials));
    let server = Server::new();
    let source = made(content(1_000_000), steps(1_000_000));
    assert_eq!(push(&bench, &server, &source).unwrap(), Pushed::Sent);
    assert_eq!(ranges(&server), ["0-399999", "400000-799999", "800000-999999"]);
}

#[test]
fn what_nobody_may_push_fails_while_it_is_made() {
    let server =
        Server::scripted(|request, _| (request.method == "POST").then(|| answer(403, &[], b"denied")));
    let bench = Bench::new();
    let source = made(content(20 << 20), |nth, wanted| {
        assert_eq!(nth, 0, "it goes on without an upload");
        Ok(Some(wanted))
    });
    let error = push(&bench, &server, &source).unwrap_err();
    assert!(matches!(error, Error::Denied { status: 403, .. }), "{error}");
    assert_eq!(methods(&server), ["POST"]);
}
