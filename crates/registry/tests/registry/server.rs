//! A registry on loopback whose every answer a test can replace. The tests of the binary use this file as
//! well.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
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
    /// Sends the first at once, and the second byte by byte, as slowly as nobody should.
    Trickle(Vec<u8>, Vec<u8>),
    /// Sends this and resets the connection.
    Reset(Vec<u8>),
    /// Sends the first, waits so long, and sends the second.
    Halting(Vec<u8>, Duration, Vec<u8>),
}

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

/// A registry that lives as long as the process.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) port: u16,
    seen: Arc<Mutex<Vec<Request>>>,
    pub(crate) state: Arc<Mutex<State>>,
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
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = Self { port, seen: Arc::default(), state: Arc::default() };
        let (shared, script): (_, Arc<Script>) = (server.clone(), Arc::new(script));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (server, script) = (shared.clone(), script.clone());
                std::thread::spawn(move || server.serve(stream.ok()?, &*script));
            }
        });
        server
    }

    fn serve(&self, mut stream: TcpStream, script: &Script) -> Option<()> {
        // TLS begins with 0x16: a server without it hangs up.
        let mut first = [0];
        stream.peek(&mut first).ok()?;
        if first[0] == 0x16 {
            return None;
        }
        let request = read_request(&mut stream)?;
        let nth = {
            let mut seen = self.seen.lock().unwrap();
            seen.push(request.clone());
            seen.iter().filter(|other| other.line() == request.line()).count() - 1
        };
        let reply = script(&request, nth).unwrap_or_else(|| self.behave(&request));
        let resets = matches!(reply, Reply::Reset(_));
        // A client that went away has what it wanted.
        match reply {
            Reply::Reset(bytes) => {
                drop(stream.write_all(&bytes));
                let linger = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
                linger.unwrap();
            }
            Reply::Trickle(head, body) => {
                drop(stream.write_all(&head));
                for byte in body {
                    // The pace is what this server is about.
                    std::thread::park_timeout(Duration::from_millis(20));
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
                drop(stream.read(&mut [0; 64]));
            }
        }
        if resets {
            // With something unread behind it, a closed socket is a reset one.
            return None;
        }
        let _ = stream.shutdown(Shutdown::Write);
        // What the client still sends is read: a reset would take the answer from it.
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
        Some(())
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

    /// What `part` of a body has arrived in an upload, as if its connection had broken there.
    pub(crate) fn arrive(&self, request: &Request, part: usize) {
        let id = request.path.rsplit('/').next().unwrap().to_owned();
        self.state.lock().unwrap().uploads.get_mut(&id).unwrap().extend_from_slice(&request.body[..part]);
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

fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
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
    let mut body = Vec::new();
    reader.take(length).read_to_end(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    Some(Request { method, path: path.to_owned(), query: query.to_owned(), headers, body })
}
