//! `--cache-to` and `--cache-from` with `type=s3`: a server of somebody else's making, and what becomes of a
//! build when it dies.

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::harness::{Context, needs_root};
use crate::remote_cache::{Cache, build, id, list, small, warnings};
use crate::remote_cache_deltas::{self as deltas, Side};
use crate::remote_cache_ends::Ends;

/// A server with a bucket `cache`; it dies with this value.
struct S3 {
    child: Child,
    address: SocketAddr,
    /// A line for each request.
    log: Arc<Mutex<Vec<String>>>,
}

impl S3 {
    /// `None`: it is not installed. `cargo xtask test` does that.
    fn start() -> Option<Self> {
        let packages = PathBuf::from(env::var_os("KILN_TEST_BASES")?).join("s3-server-1");
        if !packages.is_dir() {
            return None;
        }
        let mut command = Command::new("python3");
        command.args(["-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]);
        command.env("PYTHONPATH", packages).env("PYTHONDONTWRITEBYTECODE", "1");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().ok()?;
        let mut lines = BufReader::new(child.stderr.take().expect("piped above")).lines();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
            line.split_once("Running on http://").and_then(|(_, address)| address.trim().parse().ok())
        });
        // It writes a line a request, and waits when nobody reads them.
        let log: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = log.clone();
        thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| seen.lock().expect("ours").push(line))
        });
        let server = Self { child, address: address.expect("the server says where it is"), log };
        server.ask("PUT", "/cache");
        Some(server)
    }

    /// A request as far as a test needs one; the answer's head and body.
    fn ask(&self, method: &str, path: &str) -> String {
        let mut stream = TcpStream::connect(self.address).expect("it listens");
        let key = "AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x";
        let head = format!(
            "{method} {path} HTTP/1.0\r\nHost: {}\r\nAuthorization: {key}\r\nContent-Length: 0\r\n\r\n",
            self.address
        );
        stream.write_all(head.as_bytes()).expect("it reads");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("it answers");
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.lines().next().is_some_and(|line| line.contains(" 200 ")), "{answer}");
        answer
    }

    /// The blobs that were read since there were `from` lines, each once.
    fn blobs_read(&self, from: usize) -> Vec<String> {
        // Its lines come in the order of its answers: behind this one are all before it.
        let mark = format!("/cache?list-type=2&max-keys={from}1");
        self.ask("GET", &mark);
        while !self.log.lock().expect("ours").iter().any(|line| line.contains(&mark)) {
            thread::yield_now();
        }
        let log = self.log.lock().expect("ours");
        let read = log.iter().skip(from).filter_map(|line| {
            let (_, path) = line.split_once("\"GET ")?;
            path.split(' ').next().filter(|path| path.contains("/blobs/")).map(str::to_owned)
        });
        let mut read: Vec<String> = read.collect();
        read.sort();
        read.dedup();
        read
    }

    /// Names of what is in the bucket.
    fn names(&self) -> Vec<String> {
        let list = self.ask("GET", "/cache?list-type=2");
        list.split("<Key>").skip(1).filter_map(|rest| Some(rest.split_once('<')?.0.to_owned())).collect()
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

macro_rules! server {
    () => {{
        needs_root!();
        match S3::start() {
            Some(server) => server,
            None => {
                eprintln!("SKIPPED ALOUD: there is no S3 server; `cargo xtask test` installs one");
                return;
            }
        }
    }};
}

/// What both flags take.
fn place(address: SocketAddr, more: &str) -> String {
    format!(
        "type=s3,bucket=cache,region=us-east-1,endpoint_url=http://{address},access_key_id=ID,\
         secret_access_key=SECRET{more}"
    )
}

fn files_below(dir: &std::path::Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    list(dir, &mut files);
    files
}

#[test]
fn an_empty_store_runs_nothing_with_a_bucket() {
    let server = server!();
    let (context, base) = (small(), Cache::new());
    // Large enough for several parts, and nothing that compresses.
    let mut bytes = vec![0; 20 << 20];
    let mut state: u64 = 12;
    for byte in &mut bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    std::fs::write(context.at("large"), &bytes).expect("ours");
    let dockerfile = std::fs::read_to_string(context.at("Dockerfile")).expect("ours");
    context.write("Dockerfile", &format!("{dockerfile}COPY large /large\n"));
    let to = place(server.address, ",prefix=some/where,mode=max,scope=feature/x");
    let first = build(&base.store(), &context, &["--cache-to", &to]);
    assert_eq!((first.ran().len(), warnings(&first)), (5, vec![]));
    let names = server.names();
    assert!(names.iter().all(|name| name.starts_with("some/where/kiln-cache-1/")), "{names:?}");
    assert!(names.iter().any(|name| name.contains("/records/feature=2Fx/")), "{names:?}");

    let store = base.store();
    let from = place(server.address, ",prefix=some/where,scope=feature/x");
    let again = build(&store, &context, &["-t", "app", "--cache-from", &from, "--cache-to", &to]);
    assert_eq!((again.ran(), warnings(&again), id(&again)), (vec![], vec![], id(&first)));
    assert_eq!(server.names(), names);
    assert_eq!(store.sound(), Ok(()));
    let size = store.shell("app", "wc -c < /large");
    assert_eq!(size.trim(), bytes.len().to_string());
    // Nothing remembers the keys.
    let known = store.ok(&["why"]).stdout + &store.ok(&["history", "builds", "--json"]).stdout;
    assert!(known.contains("cached, from s3://cache/some/where"), "{known}");
    assert!(!known.contains("SECRET") && !again.stderr.contains("SECRET"));
    for part in ["state", "builds"] {
        for file in files_below(&store.root().join(part)) {
            let bytes = std::fs::read(&file).expect("ours");
            assert!(!String::from_utf8_lossy(&bytes).contains("SECRET"), "{}", file.display());
        }
    }
}

#[test]
fn an_empty_store_gets_whole_layers_from_a_bucket() {
    let server = server!();
    let (context, base) = (deltas::project("busybox"), Cache::new());
    let (one, other) = (base.store(), base.store());
    let sender = Side { store: &one, build: &|flags| one.build(&context, flags) };
    let taker = Side { store: &other, build: &|flags| other.build(&context, flags) };
    let place = place(server.address, "");
    deltas::check(&context, &sender, &taker, &format!("{place},mode=max"), &place);
}

#[test]
fn layers_that_nobody_reads_stay_in_the_bucket() {
    let server = server!();
    let (base, scope) = (Cache::new(), ",scope=lazy");
    let dockerfile =
        "FROM busybox AS made\nCOPY src /src\nCOPY more /more\nFROM busybox\nCOPY --from=made /src /app\n";
    let context = Context::new(&[("Dockerfile", dockerfile), ("src", "src\n"), ("more", "more\n")]);
    let to = place(server.address, &format!("{scope},mode=max"));
    let first = build(&base.store(), &context, &["--cache-to", &to]);
    assert_eq!((first.ran().len(), warnings(&first)), (3, vec![]));
    let (store, seen) = (base.store(), server.log.lock().expect("ours").len());
    let from = place(server.address, scope);
    let again = build(&store, &context, &["-t", "app", "--cache-from", &from]);
    assert_eq!((again.ran(), warnings(&again), id(&again)), (vec![], vec![], id(&first)));
    let read = server.blobs_read(seen);
    assert_eq!(read.len(), 1, "{read:?}");
    assert_eq!(store.sound(), Ok(()));
}

#[test]
fn a_server_that_dies_costs_time_and_nothing_else() {
    let server = server!();
    Ends::of(server.address, &place).die_at_every(13);
}
