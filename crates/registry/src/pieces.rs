//! Large blobs over several connections at once.
//!
//! What is ahead of the front goes into a file and from there to the reader in its turn, so that whoever reads
//! along, and the digest, meet the bytes in order. See `docs/adr/0030-large-blobs-in-pieces.md`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_oci::image::Descriptor;
use reqwest::Method;
use reqwest::header::{CONTENT_RANGE, HeaderValue, RANGE};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::download::{PROGRESS_BYTES, Sink, is_range, local};
use crate::exchange::{Ask, Tries, shown_host, shown_path};
use crate::host::Host;
use crate::{Error, Repository, Settings};

/// Connections for one blob.
const AT_ONCE: usize = 4;
/// Pieces that are on their way or there, and not the reader's yet.
const PIECES_AHEAD: u64 = 8;
/// Tries for a piece; after them one connection tries the rest of the blob, as often as any.
const PIECE_TRIES: u32 = 3;
/// What is given on at a time.
const COPY_BYTES: usize = 256 << 10;

/// Where pieces of a blob wait for those in front of them, and how many connections may bring them.
#[derive(Debug, Clone)]
pub struct Ahead {
    /// A file that may have any bytes from the front on: best the very file that the blob is written to, so
    /// that no byte is on the disk twice.
    pub file: Arc<File>,
    /// Of connections beside the one that each blob has.
    pub room: Arc<Semaphore>,
}

impl Ahead {
    /// Whether several connections would bring the `left` bytes sooner than one of this pace.
    pub(crate) fn pays(&self, pace: &mut Pace, left: u64) -> bool {
        pace.is_slow() && left >= 2 * pace.window_bytes && self.room.available_permits() > 0
    }
}

/// How fast a connection is, told again after each piece's worth of bytes. Only what is waited for the server
/// counts.
pub(crate) struct Pace {
    window_bytes: u64,
    fast_bytes: u64,
    waited: Duration,
    came_bytes: u64,
}

impl Pace {
    pub(crate) fn of(settings: &Settings) -> Self {
        let window_bytes = settings.piece_bytes.max(1);
        Self { window_bytes, fast_bytes: settings.fast_bytes, waited: Duration::ZERO, came_bytes: 0 }
    }

    /// Waits for what `chunk` gives, and counts it.
    pub(crate) async fn measure<B: AsRef<[u8]>>(
        &mut self,
        chunk: impl Future<Output = Result<Option<B>, Error>>,
    ) -> Result<Option<B>, Error> {
        let start = Instant::now();
        let piece = chunk.await?;
        self.waited += start.elapsed();
        self.came_bytes += piece.as_ref().map_or(0, |piece| piece.as_ref().len() as u64);
        Ok(piece)
    }

    /// Whether a window has ended, and was slow.
    fn is_slow(&mut self) -> bool {
        if self.came_bytes < self.window_bytes {
            return false;
        }
        let bytes_per_second = self.came_bytes as f64 / self.waited.as_secs_f64().max(1e-9);
        (self.waited, self.came_bytes) = (Duration::ZERO, 0);
        bytes_per_second < self.fast_bytes as f64
    }
}

/// A piece that has come, and the room that its connection had; `None`: that which each blob has.
type Came = (Range<u64>, Option<OwnedSemaphorePermit>);

impl Repository {
    /// Writes what `writer` does not have of the blob, by as many connections as there is room for.
    ///
    /// # Errors
    /// That of the first piece that did not come. No other one is being written then, and what `writer` has
    /// is good.
    pub(crate) async fn fetch_pieces(
        &self,
        blob: &Descriptor,
        writer: &mut dyn Sink,
        ahead: &Ahead,
        tries: &Tries,
    ) -> Result<(), Error> {
        let mut tasks = JoinSet::new();
        let outcome = self.give_pieces(blob, writer, ahead, tries, &mut tasks).await;
        // None may write where the next connection does.
        tasks.shutdown().await;
        outcome
    }

    async fn give_pieces(
        &self,
        blob: &Descriptor,
        writer: &mut dyn Sink,
        ahead: &Ahead,
        tries: &Tries,
        tasks: &mut JoinSet<Result<Came, Error>>,
    ) -> Result<(), Error> {
        let piece_bytes = self.client.inner.settings.piece_bytes.max(1);
        let mut there: BTreeMap<u64, u64> = BTreeMap::new();
        let (mut next, mut own_is_free) = (writer.size_bytes(), true);
        loop {
            while next < blob.size
                && next - writer.size_bytes() < PIECES_AHEAD * piece_bytes
                && tasks.len() < AT_ONCE
            {
                let room = match std::mem::replace(&mut own_is_free, false) {
                    true => None,
                    false => match ahead.room.clone().try_acquire_owned() {
                        Ok(room) => Some(room),
                        Err(_) => break,
                    },
                };
                let piece = next..blob.size.min(next + piece_bytes);
                next = piece.end;
                let (repository, blob, file) = (self.clone(), blob.clone(), ahead.file.clone());
                tasks.spawn(async move {
                    repository.fetch_piece(&blob, &piece, &file).await?;
                    Ok((piece, room))
                });
            }
            let ended = tries.in_time(async { Ok(tasks.join_next().await) });
            let Some(ended) = ended.await? else { return Ok(()) };
            let joined = |error| Error::Local { what: "fetching a blob", source: io::Error::other(error) };
            let (piece, room) = ended.map_err(joined)??;
            own_is_free |= room.is_none();
            there.insert(piece.start, piece.end);
            while let Some(end) = there.remove(&writer.size_bytes()) {
                give(&ahead.file, writer, end).map_err(local)?;
            }
            tries.check()?;
        }
    }

    /// Writes one piece into `file`, where it belongs, going on at the byte where a connection breaks.
    async fn fetch_piece(&self, blob: &Descriptor, piece: &Range<u64>, file: &File) -> Result<(), Error> {
        let host = self.host().await?;
        let url = self.url(&host, &format!("blobs/{}", blob.digest))?;
        let mut tries = Tries::of_blob(&self.client, &shown_host(&url), &shown_path(&url));
        tries.at_most(Some(self.most_tries().unwrap_or(PIECE_TRIES).min(PIECE_TRIES)));
        let scopes = self.pull();
        let mut ask = Ask::new(Method::GET, url, &scopes);
        let mut at = piece.start;
        while at < piece.end {
            let before = at;
            if let Err(error) = self.fetch_range(&host, &mut ask, blob, &mut at, piece.end, file).await {
                if at - before >= PROGRESS_BYTES {
                    tries.progress();
                }
                tries.again(error).await?;
            }
            tries.check()?;
        }
        Ok(())
    }

    /// What is missing up to `end`, over one connection; `at` says how far it came.
    async fn fetch_range(
        &self,
        host: &Host,
        ask: &mut Ask<'_>,
        blob: &Descriptor,
        at: &mut u64,
        end: u64,
        file: &File,
    ) -> Result<(), Error> {
        let range = HeaderValue::from_str(&format!("bytes={at}-{}", end - 1));
        ask.headers.insert(RANGE, range.expect("digits are fit for a header"));
        let mut answer = self.client.ask(host, ask).await?;
        if answer.status() != 206 {
            return Err(answer.protocol(format!("with {}, not with a part of the blob", answer.status())));
        }
        if !is_range(answer.header(CONTENT_RANGE).unwrap_or_default(), *at, end, blob.size) {
            return Err(answer.protocol("with another range than it was asked for"));
        }
        while let Some(bytes) = answer.chunk().await? {
            if bytes.len() as u64 > end - *at {
                return Err(answer.protocol("with more than the range that it was asked for"));
            }
            file.write_all_at(&bytes, *at).map_err(local)?;
            *at += bytes.len() as u64;
        }
        if *at < end {
            let url = answer.response.url();
            let (host, path) = (shown_host(url), shown_path(url));
            return Err(Error::CutOff { host, path, expected: blob.size, actual: *at });
        }
        Ok(())
    }
}

/// Gives `writer` what `file` has from its front up to `end`.
fn give(file: &File, writer: &mut dyn Sink, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    while writer.size_bytes() < end {
        let most = usize::try_from(end - writer.size_bytes()).unwrap_or(usize::MAX).min(COPY_BYTES);
        file.read_exact_at(&mut buffer[..most], writer.size_bytes())?;
        writer.write_all(&buffer[..most])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slow(settings: Settings, bytes: usize, waited: Duration) -> bool {
        let mut pace = Pace::of(&settings);
        (pace.came_bytes, pace.waited) = (bytes as u64, waited);
        pace.is_slow()
    }

    #[test]
    fn a_connection_is_slow_by_what_it_brings_while_it_is_waited_for() {
        let settings = || Settings { piece_bytes: 1000, fast_bytes: 10_000, ..Settings::default() };
        assert!(slow(settings(), 1000, Duration::from_secs(1)));
        assert!(!slow(settings(), 1000, Duration::from_millis(99)));
        assert!(slow(settings(), 1000, Duration::from_millis(101)));
        // Too little has come to tell.
        assert!(!slow(settings(), 999, Duration::from_secs(1)));
        assert!(!slow(settings(), 1000, Duration::ZERO));
    }

    #[test]
    fn several_connections_pay_for_much_and_where_there_is_room() {
        let settings = Settings { piece_bytes: 1000, fast_bytes: u64::MAX, ..Settings::default() };
        let ahead = |room| {
            let file = Arc::new(tempfile::tempfile().unwrap());
            Ahead { file, room: Arc::new(Semaphore::new(room)) }
        };
        let pays = |room, left| {
            let mut pace = Pace::of(&settings);
            (pace.came_bytes, pace.waited) = (1000, Duration::from_secs(1));
            ahead(room).pays(&mut pace, left)
        };
        assert!(pays(1, 2000));
        assert!(!pays(1, 1999));
        assert!(!pays(0, 2000));
    }
}
