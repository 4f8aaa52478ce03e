//! A client that sends what it is told to, right or wrong.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use kiln_oci::Digest;
use serde_json::Value;

/// One connection.
pub(crate) struct Client {
    stream: BufReader<TcpStream>,
    address: SocketAddr,
    authorization: Option<String>,
    /// The registry said that this was the last answer.
    is_over: bool,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { stream: BufReader::new(connect(address)), address, authorization: None, is_over: false }
    }

    /// The same with this header.
    pub(crate) fn with_authorization(address: SocketAddr, value: &str) -> Self {
        Self { authorization: Some(value.to_owned()), ..Self::new(address) }
    }

    /// The socket.
    pub(crate) fn raw(&mut self) -> &mut TcpStream {
        self.stream.get_mut()
    }

    /// Sends a request with a body of known length and reads the answer.
    #[track_caller]
    pub(crate) fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.head(method, path, headers, Some(body.len()));
        // Who refuses need not read to the end.
        let _ = self.raw().write_all(body);
        self.read(method == "HEAD")
    }

    /// The head alone.
    pub(crate) fn head(&mut self, method: &str, path: &str, headers: &[(&str, &str)], length: Option<usize>) {
        if std::mem::take(&mut self.is_over) {
            self.stream = BufReader::new(connect(self.address));
        }
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n", self.address);
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if let Some(authorization) = &self.authorization {
            head.push_str(&format!("authorization: {authorization}\r\n"));
        }
        if let Some(length) = length {
            head.push_str(&format!("content-length: {length}\r\n"));
        }
        head.push_str("\r\n");
        self.raw().write_all(head.as_bytes()).expect("the registry listens");
    }

    #[track_caller]
    pub(crate) fn get(&mut self, path: &str) -> Reply {
        self.send("GET", path, &[], b"")
    }

    #[track_caller]
    pub(crate) fn read(&mut self, is_head: bool) -> Reply {
        self.try_read(is_head).expect("there is an answer")
    }

    /// `None`: the connection ended.
    pub(crate) fn try_read(&mut self, is_head: bool) -> Option<Reply> {
        let mut line = String::new();
        self.stream.read_line(&mut line).ok().filter(|read| *read > 0)?;
        let status = line.split(' ').nth(1)?.parse().ok()?;
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        let mut reply = Reply { status, headers, body: Vec::new() };
        if status == 100 {
            return self.try_read(is_head);
        }
        let length = reply.header("content-length").map_or(0, |length| length.parse().expect("a number"));
        if !is_head {
            reply.body = vec![0; length];
            self.stream.read_exact(&mut reply.body).ok()?;
        }
        if reply.header("connection") == Some("close") {
            self.is_over = true;
        }
        Some(reply)
    }

    /// Pushes a blob at once.
    #[track_caller]
    pub(crate) fn push_blob(&mut self, name: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let path = format!("/v2/{name}/blobs/uploads/?digest={digest}");
        self.send("POST", &path, &[], bytes).expect(201);
        digest
    }

    /// Begins an upload; where it goes on.
    #[track_caller]
    pub(crate) fn begin(&mut self, name: &str) -> String {
        let reply = self.send("POST", &format!("/v2/{name}/blobs/uploads/"), &[], b"").expect(202);
        reply.header("location").expect("uploads have a place").to_owned()
    }

    /// Pushes a manifest of this config and these layers under a tag or its digest.
    #[track_caller]
    pub(crate) fn push_image(&mut self, name: &str, tag: &str, content: &str) -> (Digest, Vec<u8>) {
        let config = format!("{{\"architecture\":\"amd64\",\"os\":\"linux\",\"content\":\"{content}\"}}");
        let layer = format!("layer of {content}");
        self.push_blob(name, config.as_bytes());
        self.push_blob(name, layer.as_bytes());
        let manifest = manifest(config.as_bytes(), &[layer.as_bytes()], &Value::Null);
        let digest = self.push_manifest(name, tag, &manifest);
        (digest, manifest)
    }

    /// Pushes a manifest under a tag, or its digest when the tag is empty.
    #[track_caller]
    pub(crate) fn push_manifest(&mut self, name: &str, tag: &str, manifest: &[u8]) -> Digest {
        let digest = Digest::of(manifest);
        let which = if tag.is_empty() { digest.to_string() } else { tag.to_owned() };
        let kind: Value = serde_json::from_slice(manifest).expect("JSON");
        let kind = [("content-type", kind["mediaType"].as_str().expect("a media type"))];
        self.send("PUT", &format!("/v2/{name}/manifests/{which}"), &kind, manifest).expect(201);
        digest
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the registry listens");
    // A test that waits longer has failed.
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("sockets have timeouts");
    stream.set_nodelay(true).expect("sockets have options");
    stream
}

impl Reply {
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{:?}: {}", self.headers, String::from_utf8_lossy(&self.body));
        self
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("the body is JSON")
    }

    /// The code of the first error.
    #[track_caller]
    pub(crate) fn code(&self) -> String {
        self.json()["errors"][0]["code"].as_str().expect("errors have a code").to_owned()
    }
}

/// An image manifest; what `more` has is added.
pub(crate) fn manifest(config: &[u8], layers: &[&[u8]], more: &Value) -> Vec<u8> {
    let blob = |bytes: &[u8], kind: &str| serde_json::json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() });
    let layer = "application/vnd.oci.image.layer.v1.tar+gzip";
    let mut manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(config, "application/vnd.oci.image.config.v1+json"),
        "layers": layers.iter().map(|bytes| blob(bytes, layer)).collect::<Vec<_>>(),
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        manifest[key] = value.clone();
    }
    serde_json::to_vec(&manifest).expect("JSON")
}
