//! Registries that speak TLS.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

use kiln_oci::Digest;
use kiln_oci::image::{Descriptor, media_type};
use kiln_registry::{Error, Repository, Settings, Which};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, Stream};

use crate::bench::{Bench, password, text};
use crate::server::{Request, Server, answer, head};

/// What [`password`] looks like on its way.
const BASIC: &str = "Basic dXNlcjpjYW5hcnktcGFzc3dvcmQ=";
const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;

fn content() -> Vec<u8> {
    (0..700_000u32).map(|n| (n ^ (n >> 8)) as u8).collect()
}

/// A client that knows the certificate of these servers.
fn trusting() -> Settings {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/registry/testdata/certificate.pem");
    Settings { ca_files: vec![file], ..Settings::default() }
}

/// A server that does with each connection what `serve` says, which hears what its client says in clear. It closes
/// without saying so.
fn listen(mut serve: impl FnMut(Stream<'_, ServerConnection, TcpStream>) + Send + 'static) -> u16 {
    let certificate = CertificateDer::from_pem_slice(include_bytes!("testdata/certificate.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_slice(include_bytes!("testdata/key.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.unwrap().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut tls = ServerConnection::new(config.clone()).unwrap();
            serve(Stream::new(&mut tls, &mut stream));
        }
    });
    port
}

/// A request's head; empty: there is none.
fn read_head(from: &mut impl Read) -> Vec<u8> {
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !seen.ends_with(b"\r\n\r\n") && from.read(&mut byte).is_ok_and(|count| count == 1) {
        seen.push(byte[0]);
    }
    seen
}

/// A server of TLS that answers the nth connection behind the greeting with `answers[n]`, and closes without saying
/// so: what was cut off looks like what has ended.
fn abrupt(answers: Vec<Vec<u8>>) -> u16 {
    let (mut answers, mut greeted) = (answers.into_iter(), false);
    listen(move |mut tls| {
        if read_head(&mut tls).is_empty() {
            return;
        }
        let hello = || b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec();
        let answer = if std::mem::replace(&mut greeted, true) { answers.next() } else { Some(hello()) };
        let _ = tls.write_all(&answer.unwrap_or_default());
    })
}

/// TLS in front of `server`.
fn front(server: &Server) -> u16 {
    let behind = server.port;
    listen(move |mut tls| {
        let request = read_head(&mut tls);
        if request.is_empty() {
            return;
        }
        let head = String::from_utf8_lossy(&request).to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        let _ = tls.read_exact(&mut body);
        let mut inner = TcpStream::connect(("127.0.0.1", behind)).unwrap();
        inner.write_all(&[request, body].concat()).unwrap();
        let mut reply = Vec::new();
        inner.read_to_end(&mut reply).unwrap();
        let _ = tls.write_all(&reply);
        tls.conn.send_close_notify();
        let _ = tls.flush();
    })
}

#[test]
fn an_encrypted_connection_that_ends_without_a_word_is_cut_off() {
    let bytes = content();
    let blob = Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::of(&bytes), bytes.len() as u64);
    let fetch = |answers| {
        let bench = Bench::with(trusting(), Arc::new(password()));
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

/// A registry that wants the password and then leads elsewhere, to plain http.
fn leading(other: &Server) -> Server {
    let elsewhere = other.clone();
    Server::scripted(move |request: &Request, _| {
        if request.path == "/v2/" {
            return None;
        }
        if request.header("authorization") != Some(BASIC) {
            return Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""));
        }
        let there = format!("http://{}", elsewhere.domain());
        match request.method.as_str() {
            "GET" => Some(answer(307, &[("Location", &format!("{there}{}", request.path))], b"")),
            "POST" => {
                let begun = elsewhere.begin_upload();
                Some(answer(202, &[("Location", &format!("{there}{begun}"))], b""))
            }
            _ => None,
        }
    })
}

#[test]
fn what_is_encrypted_leads_to_plain_http_only_where_somebody_has_said_so() {
    let bytes = content();
    let other = Server::new();
    let blob = other.blob(&bytes);
    let new = Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::of(b"new"), 3);
    let digest = other.manifest("v1", MANIFEST);
    for is_named in [false, true] {
        let server = leading(&other);
        let mut settings = trusting();
        if is_named {
            settings.insecure.insert(other.domain());
        }
        let bench = Bench::with(settings, Arc::new(password()));
        let name = format!("127.0.0.1:{}/team/app", front(&server)).parse().unwrap();
        let repository: Repository = bench.client.repository(&name);
        let mut out = Vec::new();
        let fetched = bench.run(repository.fetch_blob(&blob, &mut out));
        let read = bench.run(repository.manifest(Which::Digest(&digest)));
        let pushed = bench.run(repository.push_blob(&new, &b"new".to_vec(), &[]));
        // The password was there to be lost.
        assert!(server.seen().iter().any(|request| request.header("authorization") == Some(BASIC)));
        if is_named {
            fetched.unwrap();
            pushed.unwrap();
            assert_eq!((out, read.unwrap().digest), (bytes.clone(), digest));
            assert!(other.state.lock().unwrap().blobs.contains_key(&new.digest));
        } else {
            for error in [fetched.unwrap_err(), read.unwrap_err(), pushed.unwrap_err()] {
                assert!(matches!(error, Error::Refused { .. }), "{}", text(&error));
                assert!(text(&error).contains("without encryption"), "{}", text(&error));
            }
            assert_eq!(other.lines(), [""; 0]);
        }
    }
    assert!(other.seen().iter().all(|request| request.header("authorization").is_none()));
}

#[test]
fn a_token_server_of_an_encrypted_registry_is_encrypted_whatever_somebody_has_said() {
    let tokens = Server::new();
    let challenge = format!("Bearer realm=\"http://{}/token\"", tokens.domain());
    let server = Server::scripted(move |_, _| Some(answer(401, &[("WWW-Authenticate", &challenge)], b"")));
    let mut settings = trusting();
    settings.insecure.insert(tokens.domain());
    let bench = Bench::with(settings, Arc::new(password()));
    let name = format!("127.0.0.1:{}/team/app", front(&server)).parse().unwrap();
    let error = bench.run(bench.client.repository(&name).manifest(Which::Tag("v1"))).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{}", text(&error));
    assert_eq!(tokens.lines(), [""; 0]);
}
