//! Large blobs over several connections.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kiln_oci::Sha256Writer;
use kiln_oci::image::Descriptor;
use kiln_registry::{Ahead, Error, NoCredentials, Settings};
use tokio::sync::Semaphore;

use crate::bench::{Bench, text};
use crate::server::{Reply, Request, Server, answer, head};

const PIECE: u64 = 64 << 10;
/// As long as nobody waits who is not about to fail.
const LONG: Duration = Duration::from_secs(60);

fn content() -> Vec<u8> {
    (0..1_300_000u32).map(|n| (n ^ (n >> 8)) as u8).collect()
}

/// Every connection is slow to it.
fn settings() -> Settings {
    Settings { piece_bytes: PIECE, fast_bytes: u64::MAX, ..Settings::default() }
}

pub(crate) fn ahead(room: usize) -> Ahead {
    let file = Arc::new(tempfile::tempfile().unwrap());
    Ahead { file, room: Arc::new(Semaphore::new(room)) }
}

/// `bytes=FIRST-LAST`
fn range(request: &Request) -> Option<(u64, u64)> {
    let (first, last) = request.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

fn fetch(
    settings: Settings,
    room: usize,
    server: &Server,
    blob: &Descriptor,
) -> (Result<(), Error>, Vec<u8>) {
    let bench = Bench::with(settings, Arc::new(NoCredentials));
    let mut out = Vec::new();
    let repository = bench.repository(server);
    let mut sink = Sha256Writer::new(&mut out);
    let came = bench.run(repository.fetch_blob_ahead(blob, &mut sink, Some(&ahead(room))));
    (came, out)
}

/// Fetches the blob of a server that answers requests for pieces as `script` says.
#[track_caller]
fn check(script: impl Fn(&Request, (u64, u64)) -> Option<Reply> + Send + Sync + 'static) -> Server {
    let server = Server::scripted(move |request, _| script(request, range(request)?));
    let blob = server.blob(&content());
    let (came, out) = fetch(settings(), 3, &server, &blob);
    came.unwrap_or_else(|error| panic!("{}", text(&error)));
    assert!(out == content(), "other bytes");
    server
}

fn pieces(server: &Server) -> Vec<(u64, u64)> {
    server.seen().iter().filter_map(range).collect()
}

/// What has happened so often, for those who wait for more.
#[derive(Default)]
struct Count(Mutex<usize>, Condvar);

impl Count {
    fn add(&self) -> usize {
        let mut count = self.0.lock().unwrap();
        *count += 1;
        self.1.notify_all();
        *count
    }

    fn wait_for(&self, wanted: usize, how_long: Duration) -> bool {
        let count = self.0.lock().unwrap();
        let (_count, ended) = self.1.wait_timeout_while(count, how_long, |count| *count < wanted).unwrap();
        !ended.timed_out()
    }
}

#[test]
fn a_slow_registry_is_asked_for_several_pieces_at_once() {
    let asked = Count::default();
    let server = check(move |_, _| {
        asked.add();
        // Nobody gets an answer before four have asked.
        (!asked.wait_for(4, LONG)).then(|| answer(500, &[], b""))
    });
    let mut came = pieces(&server);
    came.sort_unstable();
    // Each byte once, and nothing of what the first connection brought.
    assert!(came[0].0 >= PIECE && came.windows(2).all(|two| two[0].1 + 1 == two[1].0), "{came:?}");
    assert_eq!(came.last().unwrap().1, content().len() as u64 - 1);
    assert!(came.iter().all(|(first, last)| last - first < PIECE));
    assert!(server.seen()[0].header("range").is_none());
}

/// Tells how much it was given.
struct Front(Vec<u8>, Arc<AtomicU64>);

impl Write for Front {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        self.1.store(self.0.len() as u64, Ordering::SeqCst);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn pieces_wait_for_those_in_front_and_not_too_many_do() {
    let (front, others, held) = (Arc::new(AtomicU64::new(0)), Count::default(), AtomicBool::new(false));
    let given = front.clone();
    let server = Server::scripted(move |request, _| {
        let (first, _) = range(request)?;
        if first > given.load(Ordering::SeqCst) || held.swap(true, Ordering::SeqCst) {
            others.add();
            return None;
        }
        // The one that all wait for. Seven more are asked for meanwhile, and no eighth.
        let good = others.wait_for(7, LONG) && !others.wait_for(8, Duration::from_millis(500));
        (!good).then(|| answer(400, &[], b""))
    });
    let blob = server.blob(&content());
    let bench = Bench::with(settings(), Arc::new(NoCredentials));
    let mut out = Sha256Writer::new(Front(Vec::new(), front));
    bench.run(bench.repository(&server).fetch_blob_ahead(&blob, &mut out, Some(&ahead(3)))).unwrap();
    assert!(out.get_ref().0 == content());
    // All of it came in pieces, but for the beginning.
    assert_eq!(server.seen().iter().filter(|request| range(request).is_none()).count(), 1);
}

#[test]
fn one_connection_does_where_several_would_not_be_faster() {
    let one = |settings: Settings, room: usize, server: &Server| {
        let blob = server.blob(&content());
        let (came, out) = fetch(settings, room, server, &blob);
        came.unwrap();
        assert!(out == content());
        assert_eq!(server.seen().len(), 1);
    };
    one(Settings { fast_bytes: 0, ..settings() }, 3, &Server::new());
    one(Settings { piece_bytes: 1 << 20, ..settings() }, 3, &Server::new());
    one(settings(), 0, &Server::new());
    // A registry that does not say that it gives parts is not asked for any.
    let silent = Server::scripted(|request, _| request.is_blob().then(|| answer(200, &[], &content())));
    one(settings(), 3, &silent);
}

#[test]
fn a_connection_that_brings_little_in_its_time_gets_company() {
    let server = Server::scripted(|request, _| {
        let first = request.is_blob() && request.header("range").is_none();
        let head = || head(200, &[("Accept-Ranges", "bytes")], content().len());
        let begun = || [head(), content()[..1000].to_vec()].concat();
        // 64 KiB in a tenth of a second, or more.
        first.then(|| Reply::Halting(begun(), Duration::from_millis(100), content()[1000..].to_vec()))
    });
    let blob = server.blob(&content());
    let (came, out) = fetch(Settings { piece_bytes: PIECE, ..Settings::default() }, 3, &server, &blob);
    came.unwrap();
    assert!(out == content() && !pieces(&server).is_empty());
}

#[test]
fn a_piece_that_breaks_off_goes_on_at_the_byte() {
    let once = Mutex::new(true);
    let server = check(move |_, (first, last)| {
        if first < 5 * PIECE || !std::mem::take(&mut *once.lock().unwrap()) {
            return None;
        }
        let range = format!("bytes {first}-{last}/{}", content().len());
        let head = head(206, &[("Content-Range", &range)], (last - first + 1) as usize);
        Some(Reply::Bytes([head, content()[first as usize..][..1000].to_vec()].concat()))
    });
    let came = pieces(&server);
    let rest = came.iter().filter(|(first, last)| came.contains(&(first.wrapping_sub(1000), *last)));
    assert_eq!(rest.count(), 1, "{came:?}");
}

#[test]
fn a_registry_that_is_bad_at_pieces_is_asked_for_the_rest_in_one() {
    let whole = content().len();
    let tricks: [fn((u64, u64)) -> Reply; 6] = [
        |_| answer(200, &[], &content()),
        |_| answer(403, &[], b""),
        |_| answer(416, &[], b""),
        |_| answer(500, &[], b""),
        |(first, last)| {
            let range = format!("bytes {}-{}/{}", first + 1, last + 1, content().len());
            answer(206, &[("Content-Range", &range)], &content()[first as usize..=last as usize])
        },
        |(first, last)| {
            let range = format!("bytes {first}-{last}/{}", content().len());
            let more = content()[first as usize..].to_vec();
            Reply::Bytes(
                [
                    b"HTTP/1.0 206 X\r\nContent-Range: ".to_vec(),
                    range.into_bytes(),
                    b"\r\n\r\n".to_vec(),
                    more,
                ]
                .concat(),
            )
        },
    ];
    for (nth, trick) in tricks.into_iter().enumerate() {
        // The third piece and those behind it.
        let server = check(move |_, (first, last)| (first >= 3 * PIECE).then(|| trick((first, last))));
        let rests = |request: &Request| request.header("range").is_some_and(|range| range.ends_with('-'));
        assert_eq!(server.seen().iter().filter(|request| rests(request)).count(), 1, "trick {nth}");
        assert!(server.seen().len() < 30, "trick {nth}: {} requests of {whole} bytes", server.seen().len());
    }
}

#[test]
fn other_bytes_in_a_piece_are_noticed() {
    let server = Server::scripted(|request, _| {
        let (first, last) = range(request)?;
        let mut bytes = content()[first as usize..=last as usize].to_vec();
        bytes[7] ^= 1;
        let range = format!("bytes {first}-{last}/{}", content().len());
        Some(answer(206, &[("Content-Range", &range)], &bytes))
    });
    let blob = server.blob(&content());
    let (came, _) = fetch(settings(), 3, &server, &blob);
    assert!(matches!(came.unwrap_err(), Error::Mismatch { .. }));
}
