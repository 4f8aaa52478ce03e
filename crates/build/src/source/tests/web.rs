//! A small web server on loopback, and git's own behind it. The tests of the binary use this file
//! as well.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With query.
    pub(crate) target: String,
    /// Names in small letters.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// A server that lives as long as the process; one answer a connection.
pub(crate) struct Web {
    port: u16,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Web {
    /// `answer` gives all bytes of an answer, status line included.
    pub(crate) fn serve(answer: impl Fn(&Request) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (answer, log) = (Arc::new(answer), seen.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (answer, log) = (answer.clone(), log.clone());
                std::thread::spawn(move || {
                    let Ok(mut stream) = stream else { return };
                    // TLS begins with 0x16; whoever tries it first hears at once that nobody speaks it.
                    let mut first = [0];
                    if stream.peek(&mut first).is_err() || first[0] == 0x16 {
                        return;
                    }
                    let Some(request) = read_request(&mut stream) else { return };
                    log.lock().unwrap().push(request.clone());
                    // A client that went away has what it wanted.
                    let _ = stream.write_all(&answer(&request));
                });
            }
        });
        Self { port, seen }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// The requests so far; forgotten afterwards.
    pub(crate) fn take_seen(&self) -> Vec<Request> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }

    /// Serves the repositories below `root` as `git http-backend` does.
    pub(crate) fn git(root: &Path, mode: GitServer) -> Self {
        let root = root.to_owned();
        Self::serve(move |request| match mode {
            GitServer::Token(expected) if request.header("authorization") != Some(expected) => {
                response("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=\"git\"")], b"")
            }
            GitServer::Old => backend(&root, request, None),
            GitServer::Today | GitServer::Token(_) => backend(&root, request, request.header("git-protocol")),
        })
    }
}

/// How a git server behaves.
#[derive(Clone, Copy)]
pub(crate) enum GitServer {
    Today,
    /// Only protocol version 0, and only commits that have a name.
    Old,
    /// Wants this header for `Authorization`.
    Token(&'static str),
}

/// An answer with its length.
pub(crate) fn response(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut out = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n", body.len());
    for (name, value) in headers {
        out.push_str(&format!("{name}: {value}\r\n"));
    }
    out.push_str("\r\n");
    [out.as_bytes(), body].concat()
}

fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.push((name.to_lowercase(), value.trim().to_owned()));
    }
    let mut request = Request { method, target, headers, body: Vec::new() };
    if request.header("expect").is_some() {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    if let Some(length) = request.header("content-length") {
        let length: u64 = length.parse().ok()?;
        reader.take(length).read_to_end(&mut request.body).ok()?;
    } else if request.header("transfer-encoding").is_some() {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let length = u64::from_str_radix(line.trim(), 16).ok()?;
            let mut piece = Vec::new();
            reader.by_ref().take(length + 2).read_to_end(&mut piece).ok()?;
            if length == 0 {
                break;
            }
            request.body.extend_from_slice(&piece[..piece.len() - 2]);
        }
    }
    Some(request)
}

/// CGI (RFC 3875) with `git http-backend`.
fn backend(root: &PathBuf, request: &Request, protocol: Option<&str>) -> Vec<u8> {
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    let mut command = Command::new("git");
    command.arg("http-backend").env("GIT_PROJECT_ROOT", root).env("GIT_HTTP_EXPORT_ALL", "1");
    command.env("PATH_INFO", path).env("QUERY_STRING", query).env("REQUEST_METHOD", &request.method);
    command.env("REMOTE_ADDR", "127.0.0.1").env("CONTENT_LENGTH", request.body.len().to_string());
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").env_remove("GIT_PROTOCOL");
    for (name, header) in [("CONTENT_TYPE", "content-type"), ("HTTP_CONTENT_ENCODING", "content-encoding")] {
        if let Some(value) = request.header(header) {
            command.env(name, value);
        }
    }
    if let Some(protocol) = protocol {
        command.env("GIT_PROTOCOL", protocol);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let body = request.body.clone();
    let feeder = std::thread::spawn(move || {
        // It may end before it has read everything.
        let _ = stdin.write_all(&body);
    });
    let output = child.wait_with_output().unwrap().stdout;
    feeder.join().unwrap();
    let end = output.windows(4).position(|part| part == b"\r\n\r\n").unwrap_or(output.len());
    let head = String::from_utf8_lossy(&output[..end]).into_owned();
    let headers: Vec<(&str, &str)> = head.lines().filter_map(|line| line.split_once(": ")).collect();
    let status = headers.iter().find(|(name, _)| *name == "Status").map_or("200 OK", |(_, value)| value);
    let headers: Vec<_> = headers.iter().copied().filter(|(name, _)| *name != "Status").collect();
    response(status, &headers, output.get(end + 4..).unwrap_or_default())
}
