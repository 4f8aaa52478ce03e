//! Everything that goes wrong between a client and a registry, each while pulling and while pushing, in one go and
//! in pieces.
//!
//! A row says what the registry does and what has to come of it. Whatever that is: no wrong byte is taken, no
//! password reaches another host, and it ends soon.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use kiln_oci::Digest;
use kiln_oci::image::{Descriptor, media_type};
use kiln_registry::{Error, Fault, Settings, Which};

use crate::bench::{Bench, password, text};
use crate::growing::{made, steps};
use crate::pieces::ahead;
use crate::server::{Reply, Request, Server, answer, head};

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;
/// More simulated pauses than that are no bounded time.
const LONGEST: Duration = Duration::from_secs(120);
const MOST_REQUESTS: usize = 60;

fn content() -> Vec<u8> {
    (0..700_000u32).map(|n| (n ^ (n >> 8)) as u8).collect()
}

/// What is done beside such a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Pull,
    /// By several connections.
    PullPieces,
    Push,
    /// Of a blob that is still being made.
    PushGrowing,
}

const WAYS: [Way; 4] = [Way::Pull, Way::PullPieces, Way::Push, Way::PushGrowing];

impl Way {
    fn is_push(self) -> bool {
        matches!(self, Way::Push | Way::PushGrowing)
    }
}

/// What has to come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Good,
    Fails(Fault),
}

use End::{Fails, Good};
use Fault::{Integrity, Network, Refused};

/// One request that something may happen to.
struct Scene<'a> {
    request: &'a Request,
    /// Among those of the same method and path.
    nth: usize,
    server: &'a Server,
    /// Another host, without a password of ours.
    other: &'a Server,
}

impl Scene<'_> {
    fn is(&self, method: &str) -> bool {
        self.request.method == method
    }

    /// What a registry answers.
    fn good(&self) -> Vec<u8> {
        match self.server.behave(self.request) {
            Reply::Bytes(bytes) => bytes,
            _ => unreachable!("behaving means to answer"),
        }
    }

    /// The same, as headers and body.
    fn parts(&self) -> (Vec<u8>, Vec<u8>) {
        let whole = self.good();
        let end = whole.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
        (whole[..end].to_vec(), whole[end..].to_vec())
    }

    /// Only the first time.
    fn once(&self, reply: impl FnOnce() -> Reply) -> Option<Reply> {
        (self.nth == 0).then(reply)
    }

    /// Each time.
    fn status(&self, status: u16) -> Option<Reply> {
        Some(answer(status, &[], b""))
    }

    /// What comes at once of the answer to `self`, and no end.
    fn hangs_after(&self, part: impl Fn(&[u8], &[u8]) -> Vec<u8>) -> Option<Reply> {
        let (head, body) = self.parts();
        Some(Reply::Hang(part(&head, &body)))
    }

    /// Is it a blob, or a manifest, that is asked for?
    fn is_read(&self) -> bool {
        self.is("GET") && !self.request.path.contains("/uploads/")
    }
}

type Act = fn(&Scene<'_>) -> Option<Reply>;

/// What a registry does, and what comes of it when it does so to a pull and to a push.
struct Row {
    name: &'static str,
    act: Act,
    pull: End,
    push: End,
}

const fn row(name: &'static str, pull: End, push: End, act: Act) -> Row {
    Row { name, act, pull, push }
}

const LATER: &str = "Sun, 09 Sep 2001 01:46:49 GMT";

const ROWS: &[Row] = &[
    row("nothing", Good, Good, |_| None),
    row("401 without a challenge", Fails(Network), Fails(Network), |scene| scene.status(401)),
    row("401 for ever", Fails(Network), Fails(Network), |_| {
        Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""))
    }),
    row("403", Fails(Network), Fails(Network), |scene| scene.status(403)),
    // To a push it says that a blob is to be sent, and then that the upload is nowhere.
    row("404", Fails(Network), Fails(Network), |scene| scene.status(404)),
    row("405", Fails(Network), Fails(Network), |scene| scene.status(405)),
    row("408 once", Good, Good, |scene| scene.once(|| answer(408, &[], b""))),
    row("416, and where to go on", Fails(Network), Good, |scene| match scene.request.method.as_str() {
        "PATCH" => scene.once(|| answer(416, &[("Range", "0-0")], b"")),
        _ if scene.is_read() => scene.status(416),
        _ => None,
    }),
    row("429 once", Good, Good, |scene| scene.once(|| answer(429, &[], b""))),
    row("429 for seconds", Good, Good, |scene| scene.once(|| answer(429, &[("Retry-After", "3")], b""))),
    row("429 until a date", Good, Good, |scene| scene.once(|| answer(429, &[("Retry-After", LATER)], b""))),
    row("429 for a day", Fails(Network), Fails(Network), |_| {
        Some(answer(429, &[("Retry-After", "86400")], b"slow down"))
    }),
    row("500 once", Good, Good, |scene| scene.once(|| answer(500, &[], b""))),
    row("502 twice", Good, Good, |scene| (scene.nth < 2).then(|| answer(502, &[], b"<html>"))),
    row("503 with Retry-After", Good, Good, |scene| scene.once(|| answer(503, &[("Retry-After", "1")], b""))),
    row("504 once", Good, Good, |scene| scene.once(|| answer(504, &[], b""))),
    row("500 for ever", Fails(Network), Fails(Network), |scene| scene.status(500)),
    row("507", Fails(Network), Fails(Network), |scene| scene.status(507)),
    row("closed before the answer", Good, Good, |scene| scene.once(|| Reply::Bytes(Vec::new()))),
    row("reset before the answer", Good, Good, |scene| scene.once(|| Reply::Reset(Vec::new()))),
    row("reset in the headers", Good, Good, |scene| {
        scene.once(|| Reply::Reset(b"HTTP/1.1 200 OK\r\nContent-Le".to_vec()))
    }),
    // Of a push, the registry has what was sent, and nobody knows.
    row("reset behind the headers", Good, Good, |scene| {
        (scene.nth == 0 && !scene.is("PUT")).then(|| Reply::Reset(scene.parts().0))
    }),
    row("cut in the body, again and again", Good, Good, |scene| {
        if scene.nth > 2 || !scene.is_read() {
            return None;
        }
        let (mut head, body) = scene.parts();
        head.extend_from_slice(&body[..body.len() / 3]);
        Some(Reply::Bytes(head))
    }),
    row("bytes that come twice", Fails(Integrity), Good, |scene| {
        if !scene.is_read() {
            return None;
        }
        let (mut head, body) = scene.parts();
        let half = body.len() / 2;
        head.extend_from_slice(&[&body[..half], &body[..half], &body[2 * half..]].concat());
        Some(Reply::Bytes(head))
    }),
    row("a range that nobody asked for", Fails(Network), Fails(Network), |scene| match scene.nth {
        _ if scene.is("PATCH") => {
            let location = scene.request.path.clone();
            Some(answer(202, &[("Location", &location), ("Range", "0-99999999")], b""))
        }
        _ if !scene.request.is_blob() => None,
        0 => Some(Reply::Bytes([head(200, &[], 700_000), content()[..9].to_vec()].concat())),
        _ => Some(answer(206, &[("Content-Range", "bytes 0-699999/700000")], &content())),
    }),
    row("no ranges", Good, Good, |scene| match scene.nth {
        // Where an upload stands is not said, either.
        _ if scene.is("PATCH") => {
            scene.good();
            Some(answer(202, &[("Location", &scene.request.path)], b""))
        }
        _ if !scene.request.is_blob() => None,
        0 => Some(Reply::Bytes([head(200, &[], 700_000), content()[..300_000].to_vec()].concat())),
        _ => Some(answer(200, &[], &content())),
    }),
    row("chunks without end", Good, Good, |scene| {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n".as_bytes();
        match scene.request.method.as_str() {
            "GET" if scene.nth == 0 => Some(Reply::Bytes([head, &scene.parts().1[..9]].concat())),
            "POST" if scene.nth == 0 => Some(Reply::Bytes([head, b"{}"].concat())),
            _ => None,
        }
    }),
    row("one byte at a time", Fails(Network), Fails(Network), |scene| {
        let (head, body) = scene.parts();
        match body.is_empty() {
            true => Some(Reply::Trickle(Vec::new(), head)),
            false => Some(Reply::Trickle(head, body[..body.len().min(200)].to_vec())),
        }
    }),
    row("silence", Fails(Network), Fails(Network), |_| Some(Reply::Hang(Vec::new()))),
    row("silence in the headers", Fails(Network), Fails(Network), |scene| {
        scene.hangs_after(|head, _| head[..20].to_vec())
    }),
    row("silence in the body", Fails(Network), Good, |scene| match scene.is_read() {
        true => scene.hangs_after(|head, body| [head, &body[..body.len() / 2]].concat()),
        false => None,
    }),
    row("HTTP/1.0", Good, Good, |scene| {
        let whole = String::from_utf8_lossy(&scene.parts().0).replace("HTTP/1.1", "HTTP/1.0");
        Some(Reply::Bytes([whole.into_bytes(), scene_body(scene)].concat()))
    }),
    row("HTTP/1.0 that ends early", Good, Good, |scene| {
        let early = || [b"HTTP/1.0 200 OK\r\n\r\n", &content()[..1000]].concat();
        (scene.request.is_blob() && scene.nth == 0).then(|| Reply::Bytes(early()))
    }),
    row("what it knew is forgotten", Good, Good, |scene| {
        let path = &scene.request.path;
        match scene.request.method.as_str() {
            "PATCH" if path.ends_with("/u0") => Some(answer(404, &[], b"")),
            "GET" if path.ends_with("/u0") => Some(answer(404, &[], b"")),
            // A token that has run out between two requests.
            "GET" if scene.nth == 0 && scene.request.is_blob() => {
                Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""))
            }
            _ => None,
        }
    }),
    row("one bit is another", Fails(Integrity), Fails(Integrity), |scene| {
        if scene.is("PUT") {
            let other = Digest::of(b"other").to_string();
            return Some(answer(201, &[("Docker-Content-Digest", &other)], b""));
        }
        if !scene.is_read() {
            return None;
        }
        let (head, mut body) = scene.parts();
        let at = body.len() - 3;
        body[at] ^= 1;
        Some(Reply::Bytes([head, body].concat()))
    }),
    row("a byte more", Fails(Integrity), Good, |scene| {
        let one_more = || answer(200, &[], &[content(), b"x".to_vec()].concat());
        scene.request.is_blob().then(one_more)
    }),
    row("a byte less", Fails(Integrity), Good, |scene| {
        scene.request.is_blob().then(|| answer(200, &[], &content()[1..]))
    }),
    row("the tag leads elsewhere a moment later", Fails(Integrity), Good, |scene| {
        let other = MANIFEST.iter().copied().chain(*b" ").collect::<Vec<u8>>();
        let kind = ("Content-Type", media_type::OCI_MANIFEST);
        (scene.is_read() && scene.request.path.contains("/manifests/sha256:"))
            .then(|| answer(200, &[kind], &other))
    }),
    row("another host has it", Good, Good, |scene| {
        let target = format!("http://localhost:{}{}", scene.other.port, scene.request.path);
        match scene.request.method.as_str() {
            "GET" if scene.is_read() => Some(answer(307, &[("Location", &target)], b"")),
            "POST" => {
                let begun = scene.other.behave(scene.request);
                let Reply::Bytes(begun) = begun else { return None };
                let begun = String::from_utf8(begun).unwrap();
                let there = format!("Location: http://localhost:{}/", scene.other.port);
                Some(Reply::Bytes(begun.replace("Location: /", &there).into_bytes()))
            }
            _ => None,
        }
    }),
    row("redirects without end", Fails(Network), Fails(Network), |scene| {
        Some(answer(307, &[("Location", &scene.request.path)], b""))
    }),
    row("a redirect to a file", Fails(Refused), Fails(Refused), |scene| match scene.is("POST") {
        true => Some(answer(202, &[("Location", "file:///etc/passwd")], b"")),
        false if scene.is_read() => Some(answer(302, &[("Location", "file:///etc/passwd")], b"")),
        false => None,
    }),
    row("a redirect to the neighbours", Fails(Refused), Fails(Refused), |scene| {
        let secrets = [("Location", "http://169.254.169.254/latest/meta-data")];
        match scene.is("POST") {
            true => Some(answer(202, &secrets, b"")),
            false if scene.is_read() => Some(answer(307, &secrets, b"")),
            false => None,
        }
    }),
    row("packed for transport", Good, Good, |scene| {
        let (head, body) = scene.parts();
        let head = String::from_utf8_lossy(&head).replacen("\r\n", "\r\nContent-Encoding: gzip\r\n", 1);
        Some(Reply::Bytes([head.into_bytes(), body].concat()))
    }),
    row("a web page", Fails(Integrity), Fails(Network), |scene| match scene.is("HEAD") {
        true => None,
        false => Some(answer(200, &[("Content-Type", "text/html")], b"<html>who are you?</html>")),
    }),
    row("no HTTP", Good, Good, |scene| scene.once(|| Reply::Bytes(b"SSH-2.0-x\r\n".to_vec()))),
    row("headers without end", Fails(Network), Fails(Network), |_| {
        let mut reply = b"HTTP/1.1 200 OK\r\n".to_vec();
        (0..20_000).for_each(|n| reply.extend_from_slice(format!("X-{n}: y\r\n").as_bytes()));
        Some(Reply::Bytes(reply))
    }),
    row("hints before the answer", Good, Good, |scene| {
        Some(Reply::Bytes(
            [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n".to_vec(), scene.good()].concat(),
        ))
    }),
    row("an answer that nobody asked for behind it", Good, Good, |scene| {
        Some(Reply::Bytes([scene.good(), b"HTTP/1.1 500 X\r\n\r\n".to_vec()].concat()))
    }),
    row("digests that are none", Fails(Integrity), Good, |scene| {
        let headers = [("Content-Type", media_type::OCI_MANIFEST), ("Docker-Content-Digest", "sha256:../x")];
        (scene.is_read() && !scene.request.is_blob()).then(|| answer(200, &headers, b"[]"))
    }),
];

fn scene_body(scene: &Scene<'_>) -> Vec<u8> {
    match scene.is("HEAD") {
        true => Vec::new(),
        // What `parts` did to an upload it would do twice.
        false if scene.is_read() => scene.parts().1,
        false => Vec::new(),
    }
}

/// A registry that does what the row says, and the other host.
fn stage(act: Act) -> (Server, Server) {
    let other = Server::new();
    let own: Arc<OnceLock<Server>> = Arc::default();
    let (known, elsewhere) = (own.clone(), other.clone());
    let server = Server::scripted(move |request, nth| {
        if request.path == "/v2/" {
            return None;
        }
        let server = known.get().expect("set before the first request");
        act(&Scene { request, nth, server, other: &elsewhere })
    });
    own.set(server.clone()).ok().unwrap();
    (server, other)
}

/// Pauses cost nothing. Where something stands still, it is given up soon; elsewhere the machine may be slow.
fn bench(row: &Row, way: Way, expected: End) -> Bench {
    let stands = expected != Good && (row.name.starts_with("silence") || row.name.starts_with("one byte"));
    let stall = Duration::from_millis(if stands { 200 } else { 20_000 });
    let mut settings = Settings { stall, tries: 4, ..Settings::default() };
    match way {
        Way::Pull | Way::Push => {}
        Way::PullPieces => (settings.piece_bytes, settings.fast_bytes) = (80_000, u64::MAX),
        Way::PushGrowing => settings.chunk_bytes = Some(200_000),
    }
    Bench::with(settings, Arc::new(password()))
}

async fn pull(repository: &kiln_registry::Repository, blob: &Descriptor, way: Way) -> Result<Vec<u8>, Error> {
    let head = repository.resolve(Which::Tag("v1")).await?;
    let manifest = repository.manifest(Which::Digest(&head.digest)).await?;
    assert_eq!(manifest.bytes, MANIFEST, "other bytes");
    let mut out = Vec::new();
    match way {
        Way::PullPieces => {
            let mut sink = kiln_oci::Sha256Writer::new(&mut out);
            repository.fetch_blob_ahead(blob, &mut sink, Some(&ahead(3))).await?;
        }
        _ => repository.fetch_blob(blob, &mut out).await?,
    }
    Ok(out)
}

async fn push(repository: &kiln_registry::Repository, blob: &Descriptor, way: Way) -> Result<(), Error> {
    if way == Way::PushGrowing {
        let growing = made(content(), steps(content().len()));
        repository.push_growing(&growing, &|_| Vec::new()).await?;
    } else {
        repository.push_blob(blob, &content(), &[]).await?;
    }
    repository.put_manifest(Which::Tag("v1"), media_type::OCI_MANIFEST, MANIFEST).await?;
    Ok(())
}

/// What is wrong with how this row ends; nothing, as a rule.
fn check(row: &Row, way: Way) -> Vec<String> {
    let is_push = way.is_push();
    let expected = if is_push { row.push } else { row.pull };
    let ((server, other), bench, start) = (stage(row.act), bench(row, way, expected), Instant::now());
    let bytes = content();
    let blob = Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::of(&bytes), bytes.len() as u64);
    let mut wrong = Vec::new();
    let ended = if is_push {
        bench.run(push(&bench.repository(&server), &blob, way))
    } else {
        for there in [&server, &other] {
            there.blob(&bytes);
            there.manifest("v1", MANIFEST);
        }
        bench.run(pull(&bench.repository(&server), &blob, way)).map(|out| {
            if out != bytes {
                wrong.push("other bytes were taken".to_owned());
            }
        })
    };
    let end = ended.as_ref().map_or_else(|error| Fails(error.fault()), |()| Good);
    if end != expected {
        let said = ended.as_ref().map_or_else(|error| text(error), |()| String::new());
        wrong.push(format!("is {end:?}, not {expected:?}: {said} {:?}", server.lines()));
    }
    if is_push && ended.is_ok() {
        let there = [&server, &other]
            .iter()
            .any(|at| at.state.lock().unwrap().blobs.get(&blob.digest) == Some(&bytes));
        if !there {
            wrong.push("the blob is nowhere".to_owned());
        }
    }
    // A blob of another content never has its name.
    if is_push && server.state.lock().unwrap().blobs.iter().any(|(name, bytes)| *name != Digest::of(bytes)) {
        wrong.push("a blob of other bytes".to_owned());
    }
    if other.seen().iter().any(|request| request.header("authorization").is_some()) {
        wrong.push("the other host has seen credentials".to_owned());
    }
    if let Err(error) = &ended
        && text(error).contains("canary")
    {
        wrong.push(format!("a message has the password: {}", text(error)));
    }
    let paused: Duration = bench.pauses.taken.lock().unwrap().iter().sum();
    let requests = server.seen().len() + other.seen().len();
    if paused > LONGEST || start.elapsed() > Duration::from_secs(100) || requests > MOST_REQUESTS {
        wrong.push(format!("{paused:?} of pauses, {:?}, {requests} requests", start.elapsed()));
    }
    wrong.iter().map(|what| format!("{}, {way:?}: {what}", row.name)).collect()
}

#[test]
fn whatever_a_registry_does_nothing_wrong_is_taken_and_it_ends() {
    assert!(ROWS.len() >= 40);
    let next = Mutex::new(ROWS.iter().flat_map(|row| WAYS.map(|way| (row, way))));
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        // They wait more than they work.
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let Some((row, way)) = next.lock().unwrap().next() else { break };
                    wrong.lock().unwrap().extend(check(row, way));
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A server of TLS that answers the nth connection with `answers[n]`, the last again and again, and closes
/// without saying so: what was cut off looks like what has ended.
fn abrupt(answers: Vec<Vec<u8>>) -> u16 {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let certificate = CertificateDer::from_pem_slice(include_bytes!("testdata/certificate.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_slice(include_bytes!("testdata/key.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.unwrap().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let config = Arc::new(config);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut answers = answers.iter().peekable();
        let mut greeted = false;
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut tls = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut tls = rustls::Stream::new(&mut tls, &mut stream);
            let mut seen = Vec::new();
            let mut byte = [0];
            while !seen.ends_with(b"\r\n\r\n")
                && std::io::Read::read(&mut tls, &mut byte).is_ok_and(|n| n == 1)
            {
                seen.push(byte[0]);
            }
            if seen.is_empty() {
                continue;
            }
            let hello = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec();
            let answer = if std::mem::replace(&mut greeted, true) {
                let this = answers.next().unwrap();
                if answers.peek().is_none() {
                    return drop(std::io::Write::write_all(&mut tls, this));
                }
                this
            } else {
                &hello
            };
            let _ = std::io::Write::write_all(&mut tls, answer);
        }
    });
    port
}

#[test]
fn an_encrypted_connection_that_ends_without_a_word_is_cut_off() {
    let bytes = content();
    let blob = Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::of(&bytes), bytes.len() as u64);
    let fetch = |answers| {
        let ca =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/registry/testdata/certificate.pem");
        let bench = Bench::with(Settings { ca_files: vec![ca], ..Settings::default() }, Arc::new(password()));
        let name = format!("127.0.0.1:{}/team/app", abrupt(answers)).parse().unwrap();
        let mut out = Vec::new();
        bench.run(bench.client.repository(&name).fetch_blob(&blob, &mut out)).map(|()| out)
    };
    let unsized_head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
    let rest = |from: usize| {
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        [head(206, &[("Content-Range", &range)], bytes.len() - from), bytes[from..].to_vec()].concat()
    };
    // With a length, all of it has come.
    let whole = [head(200, &[], bytes.len()), bytes.clone()].concat();
    assert_eq!(fetch(vec![whole]).unwrap(), bytes);
    // Without one, half of it may be all, for all that anybody can tell.
    let half = [unsized_head, bytes[..300_000].to_vec()].concat();
    assert_eq!(fetch(vec![half, rest(300_000)]).unwrap(), bytes);
}
