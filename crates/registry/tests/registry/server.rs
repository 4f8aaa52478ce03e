//! A registry on loopback whose every answer a test can replace. The tests of the binary use this file as
//! well.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_oci::Digest;
use kiln_oci::image::{Descriptor, media_type};

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Without the query.
    pub(crate) path: String,
    pub(crate) query: String,
    /// Names in small letters.
    headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub(crate) fn line(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    pub(crate) fn is_blob(&self) -> bool {
        self.method == "GET" && self.path.contains("/blobs/sha256:")
    }
}

/// What the server does.
pub(crate) enum Reply {
    /// Sends this and closes.
    Bytes(Vec<u8>),
    /// Sends this and then nothing, until the client goes away.
    Hang(Vec<u8>),
    /// Sends the first at once, and the second byte by byte, one a second.
    Trickle(Vec<u8>, Vec<u8>),
    /// Sends this and resets the connection.
    Reset(Vec<u8>),
    /// Sends the first, waits so long, and sends the second.
    Halting(Vec<u8>, Duration, Vec<u8>),
}

/// What becomes of a request whose body does not come to its end.
pub(crate) enum Ears {
    /// So much of it is read, and then nothing, until the client goes away.
    Deaf(usize),
    /// So much of it is read, and the connection is reset.
    Broken(usize),
}

/// How time passes where a server stands still.
pub(crate) trait Time: Send + Sync {
    /// Lets so long pass, or as much as somebody has patience for; false: nobody waits.
    fn pass(&self, how_long: Option<Duration>) -> bool;
}

/// A byte a second is what nobody should wait for.
const SLOW: Duration = Duration::from_secs(1);
/// The same where time is the machine's.
const SLOW_IN_TRUTH: Duration = Duration::from_millis(20);

/// So long a server that stands still looks whether its client goes away: before it lets time pass, and behind that.
const A_MOMENT: Duration = Duration::from_millis(1);
const A_WHILE: Duration = Duration::from_secs(1);

/// An answer with a length.
pub(crate) fn answer(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut bytes = head(status, headers, body.len());
    bytes.extend_from_slice(body);
    Reply::Bytes(bytes)
}

/// The beginning of an answer that says it has so many bytes.
pub(crate) fn head(status: u16, headers: &[(&str, &str)], length: usize) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {length}\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    (text + "\r\n").into_bytes()
}

type Script = dyn Fn(&Request, usize) -> Option<Reply> + Send + Sync;
type Hearing = dyn Fn(&Request, usize) -> Option<Ears> + Send + Sync;

/// A registry that lives as long as the process.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) port: u16,
    seen: Arc<Mutex<Vec<Request>>>,
    pub(crate) state: Arc<Mutex<State>>,
    /// `None`: the machine's.
    time: Arc<Mutex<Option<Arc<dyn Time>>>>,
}

/// What it has.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) blobs: BTreeMap<Digest, Vec<u8>>,
    /// By name and by digest.
    pub(crate) manifests: BTreeMap<String, (String, Vec<u8>)>,
    uploads: HashMap<String, Vec<u8>>,
}

impl Server {
    /// One that behaves.
    pub(crate) fn new() -> Self {
        Self::scripted(|_, _| None)
    }

    /// One that answers as `script` says, to the request and its number among those with the same method and
    /// path; where it says nothing, it behaves.
    pub(crate) fn scripted(
        script: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        Self::hearing(|_, _| None, script)
    }

    /// The same, and hears as `hearing` says, which gets the request without its body.
    pub(crate) fn hearing(
        hearing: impl Fn(&Request, usize) -> Option<Ears> + Send + Sync + 'static,
        script: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = Self { port, seen: Arc::default(), state: Arc::default(), time: Arc::default() };
        let (shared, script): (_, Arc<Script>) = (server.clone(), Arc::new(script));
        let hearing: Arc<Hearing> = Arc::new(hearing);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (server, script, hearing) = (shared.clone(), script.clone(), hearing.clone());
                std::thread::spawn(move || server.serve(stream.ok()?, &*hearing, &*script));
            }
        });
        server
    }

    /// Time passes here as it does there, from now on.
    pub(crate) fn keep_time(&self, time: Arc<dyn Time>) {
        *self.time.lock().unwrap() = Some(time);
    }

    fn serve(&self, mut stream: TcpStream, hearing: &Hearing, script: &Script) -> Option<()> {
        // TLS begins with 0x16: a server without it hangs up.
        let mut first = [0];
        stream.peek(&mut first).ok()?;
        if first[0] == 0x16 {
            return None;
        }
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let (mut request, length) = read_head(&mut reader)?;
        let so_far = self.like(&request);
        if let Some(ears) = hearing(&request, so_far) {
            let (Ears::Deaf(part) | Ears::Broken(part)) = ears;
            reader.take(part.min(length) as u64).read_to_end(&mut request.body).ok()?;
            self.note(&request);
            self.arrive(&request, request.body.len());
            match ears {
                Ears::Broken(_) => reset(&stream),
                Ears::Deaf(_) => self.stand_still(&mut stream, true),
            }
            return None;
        }
        reader.take(length as u64).read_to_end(&mut request.body).ok()?;
        if request.body.len() < length {
            // Its sender has thought better of it.
            return None;
        }
        let nth = self.note(&request);
        let reply = script(&request, nth).unwrap_or_else(|| self.behave(&request));
        let resets = matches!(reply, Reply::Reset(_));
        // A client that went away has what it wanted.
        match reply {
            Reply::Reset(bytes) => {
                drop(stream.write_all(&bytes));
                reset(&stream);
            }
            Reply::Trickle(head, body) => {
                drop(stream.write_all(&head));
                for byte in body {
                    self.pass_slowly();
                    if stream.write_all(&[byte]).is_err() {
                        break;
                    }
                }
            }
            Reply::Halting(first, pause, second) => {
                drop(stream.write_all(&first));
                // The pace is what this server is about.
                std::thread::park_timeout(pause);
                drop(stream.write_all(&second));
            }
            Reply::Bytes(bytes) => drop(stream.write_all(&bytes)),
            Reply::Hang(bytes) => {
                drop(stream.write_all(&bytes));
                self.stand_still(&mut stream, false);
            }
        }
        if resets {
            // With something unread behind it, a closed socket is a reset one.
            return None;
        }
        let _ = stream.shutdown(Shutdown::Write);
        // What the client still sends is read: a reset would take the answer from it.
        let _ = stream.set_read_timeout(None);
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
        Some(())
    }

    /// So many requests like this one have come.
    fn like(&self, request: &Request) -> usize {
        self.seen.lock().unwrap().iter().filter(|other| other.line() == request.line()).count()
    }

    /// Notes it down; its number among those like it.
    fn note(&self, request: &Request) -> usize {
        let mut seen = self.seen.lock().unwrap();
        seen.push(request.clone());
        seen.iter().filter(|other| other.line() == request.line()).count() - 1
    }

    fn time(&self) -> Option<Arc<dyn Time>> {
        self.time.lock().unwrap().clone()
    }

    /// Does nothing until the client goes away. `deaf`: what it sends is not read before it has lost patience.
    fn stand_still(&self, stream: &mut TcpStream, deaf: bool) {
        let Some(time) = self.time() else {
            if !deaf {
                let _ = stream.read(&mut [0; 64]);
            }
            return;
        };
        if deaf {
            // Once for what the kernel has taken of it, and once for the rest.
            for _ in 0..2 {
                let _ = (0..500).any(|_| time.pass(None));
            }
        }
        let mut look = A_MOMENT;
        loop {
            let _ = stream.set_read_timeout(Some(look));
            match stream.read(&mut [0; 64 << 10]) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    // Whose patience has ended goes away, and soon waits for somebody else.
                    look = if time.pass(None) { A_WHILE } else { A_MOMENT };
                }
                Err(_) => break,
            }
        }
    }

    /// The time between two bytes of a trickle.
    fn pass_slowly(&self) {
        match self.time() {
            // Whoever is still busy with the last byte will wait for the next one.
            Some(time) => {
                let _ = (0..50).any(|_| time.pass(Some(SLOW)));
            }
            // The pace is what this server is about.
            None => std::thread::park_timeout(SLOW_IN_TRUTH),
        }
    }

    /// What a registry answers.
    pub(crate) fn behave(&self, request: &Request) -> Reply {
        let mut state = self.state.lock().unwrap();
        let missing = || answer(404, &[], br#"{"errors":[{"code":"UNKNOWN","message":"not here"}]}"#);
        let Some((repository, kind, rest)) = split(&request.path) else { return answer(200, &[], b"{}") };
        match (request.method.as_str(), kind) {
            ("GET" | "HEAD", "manifests") => {
                let Some((kind, bytes)) = state.manifests.get(rest) else { return missing() };
                let digest = Digest::of(bytes).to_string();
                let headers = [("Content-Type", kind.as_str()), ("Docker-Content-Digest", &digest)];
                match request.method.as_str() {
                    "HEAD" => Reply::Bytes(head(200, &headers, bytes.len())),
                    _ => answer(200, &headers, bytes),
                }
            }
            ("PUT", "manifests") => {
                let kind = request.header("content-type").unwrap_or_default().to_owned();
                let digest = Digest::of(&request.body).to_string();
                for name in [rest, digest.as_str()] {
                    state.manifests.insert(name.to_owned(), (kind.clone(), request.body.clone()));
                }
                answer(201, &[("Docker-Content-Digest", &digest)], b"")
            }
            ("GET" | "HEAD", "blobs") => {
                let blob = rest.parse().ok().and_then(|digest: Digest| state.blobs.get(&digest));
                let Some(blob) = blob else { return missing() };
                let range = request.header("range").and_then(|range| range.strip_prefix("bytes="));
                match (request.method.as_str(), range.and_then(|range| range.split_once('-'))) {
                    ("HEAD", _) => Reply::Bytes(head(200, &[], blob.len())),
                    (_, None) => answer(200, &[("Accept-Ranges", "bytes")], blob),
                    (_, Some((from, last))) => {
                        let end = last.parse().map_or(blob.len(), |last: usize| last + 1);
                        let from: usize = from.parse().unwrap();
                        let range = format!("bytes {from}-{}/{}", end - 1, blob.len());
                        answer(206, &[("Content-Range", &range)], &blob[from..end])
                    }
                }
            }
            ("POST", "uploads") => {
                let query = |name: &str| request.query.split('&').find_map(|pair| pair.strip_prefix(name));
                let mounted = query("mount=").map(|digest| digest.replace("%3A", ":"));
                if let Some(digest) = mounted.and_then(|digest| digest.parse::<Digest>().ok())
                    && query("from=") == Some("other%2Fimage")
                    && let Some(blob) = state.manifests.get("mountable").map(|(_, bytes)| bytes.clone())
                {
                    state.blobs.insert(digest, blob);
                    return answer(201, &[], b"");
                }
                let id = format!("u{}", state.uploads.len());
                state.uploads.insert(id.clone(), Vec::new());
                answer(202, &[("Location", &format!("/v2/{repository}/blobs/uploads/{id}?state=s%3D0"))], b"")
            }
            ("PATCH" | "PUT" | "GET" | "DELETE", "uploads") => {
                let Some(upload) = state.uploads.get_mut(rest) else { return missing() };
                let whole = format!("/v2/{repository}/blobs/uploads/{rest}?state=s%3D{}", upload.len());
                if request.method == "PATCH" {
                    let expected = format!("{}-", upload.len());
                    if !request.header("content-range").unwrap_or("0-").starts_with(&expected) {
                        return answer(416, &[], b"");
                    }
                }
                upload.extend_from_slice(&request.body);
                let range = format!("0-{}", upload.len().saturating_sub(1));
                match request.method.as_str() {
                    "PATCH" => answer(202, &[("Location", &whole), ("Range", &range)], b""),
                    "GET" => answer(204, &[("Location", &whole), ("Range", &range)], b""),
                    "DELETE" => answer(204, &[], b""),
                    _ => {
                        let digest = Digest::of(upload);
                        let expected = request.query.replace("%3A", ":");
                        if !expected.ends_with(&format!("digest={digest}")) {
                            return answer(400, &[], br#"{"errors":[{"code":"DIGEST_INVALID"}]}"#);
                        }
                        let bytes = std::mem::take(upload);
                        state.blobs.insert(digest, bytes);
                        answer(201, &[], b"")
                    }
                }
            }
            _ => missing(),
        }
    }

    /// Begins an upload; where it goes on.
    pub(crate) fn begin_upload(&self) -> String {
        let uploads = &mut self.state.lock().unwrap().uploads;
        let id = format!("u{}", uploads.len());
        uploads.insert(id.clone(), Vec::new());
        format!("/v2/team/app/blobs/uploads/{id}?state=s%3D0")
    }

    /// What `part` of a body has arrived in an upload, as if its connection had broken there.
    pub(crate) fn arrive(&self, request: &Request, part: usize) {
        let id = request.path.rsplit('/').next().unwrap();
        if let Some(upload) = self.state.lock().unwrap().uploads.get_mut(id) {
            upload.extend_from_slice(&request.body[..part]);
        }
    }

    pub(crate) fn domain(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Gives it a blob.
    pub(crate) fn blob(&self, bytes: &[u8]) -> Descriptor {
        let digest = Digest::of(bytes);
        self.state.lock().unwrap().blobs.insert(digest, bytes.to_vec());
        Descriptor::new(media_type::OCI_LAYER_GZIP, digest, bytes.len() as u64)
    }

    /// Gives it a manifest under a tag and its digest.
    pub(crate) fn manifest(&self, tag: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let mut state = self.state.lock().unwrap();
        for name in [tag.to_owned(), digest.to_string()] {
            state.manifests.insert(name, (media_type::OCI_MANIFEST.to_owned(), bytes.to_vec()));
        }
        digest
    }

    /// The requests so far, without the greeting.
    pub(crate) fn seen(&self) -> Vec<Request> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|request| request.path != "/v2/").cloned().collect()
    }

    /// The same as `METHOD /path` each.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.seen().iter().map(Request::line).collect()
    }
}

fn split(path: &str) -> Option<(&str, &str, &str)> {
    let path = path.strip_prefix("/v2/")?;
    for (middle, kind) in [
        ("/blobs/uploads/", "uploads"),
        ("/manifests/", "manifests"),
        ("/blobs/", "blobs"),
        ("/tags/", "tags"),
    ] {
        if let Some((repository, rest)) = path.split_once(middle) {
            return Some((repository, kind, rest));
        }
    }
    (!path.is_empty()).then_some((path, "", ""))
}

/// The next thing that its client hears of it is that it is gone.
fn reset(stream: &TcpStream) {
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
}

/// A request without its body, and how long that is.
fn read_head(reader: &mut impl BufRead) -> Option<(Request, usize)> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let (path, query) = (path.to_owned(), query.to_owned());
    Some((Request { method, path, query, headers, body: Vec::new() }, length))
}
