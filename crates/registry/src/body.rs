//! The body of an upload: read on a thread that may wait, in pieces.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use reqwest::Body;
use tokio::sync::mpsc;

use crate::exchange::{Answer, Ask, Once};
use crate::host::Host;
use crate::{BlobSource, Error, Repository};

/// What is read and sent at a time.
const PIECE_BYTES: usize = 256 << 10;

impl Repository {
    /// Sends `length` bytes of `source` from `offset` on.
    pub(crate) async fn send_body(
        &self,
        host: &Host,
        ask: &Ask<'_>,
        source: &dyn BlobSource,
        offset: u64,
        length: u64,
    ) -> Result<Answer, Error> {
        let sent_bytes = Arc::new(AtomicU64::new(0));
        if length == 0 {
            let once = Once { body: Body::from(Bytes::new()), sent_bytes: &sent_bytes };
            return self.client.ask_once(host, ask, once).await;
        }
        let failed = |source| Error::Local { what: "reading a blob", source };
        let reader = source.open(offset).map_err(failed)?.take(length);
        let (pieces, failure) = read_aside(reader, length);
        let body = Body::wrap(Pieces { pieces, left: length, sent_bytes: sent_bytes.clone() });
        let sent = self.client.ask_once(host, ask, Once { body, sent_bytes: &sent_bytes }).await;
        // The reader is gone with the body, and has said why.
        match failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
            Some(error) if sent.is_err() => Err(failed(error)),
            _ => sent,
        }
    }
}

type Failure = Arc<std::sync::Mutex<Option<io::Error>>>;

/// Reads on a thread that may wait, as far ahead as there is room for.
fn read_aside(
    mut reader: impl Read + Send + 'static,
    length: u64,
) -> (mpsc::Receiver<Option<Bytes>>, Failure) {
    let (sender, pieces) = mpsc::channel(4);
    let failure = Failure::default();
    let note = failure.clone();
    tokio::task::spawn_blocking(move || {
        let mut left = length;
        while left > 0 {
            let mut piece = vec![0; PIECE_BYTES.min(usize::try_from(left).unwrap_or(PIECE_BYTES))];
            let read = match reader.read(&mut piece) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read,
            };
            match read {
                Ok(count) => {
                    piece.truncate(count);
                    left -= count as u64;
                    // Nobody wants it any more.
                    if sender.blocking_send(Some(piece.into())).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    *note.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                    let _ = sender.blocking_send(None);
                    return;
                }
            }
        }
    });
    (pieces, failure)
}

/// A body of known length, in pieces that another thread reads.
struct Pieces {
    /// `None`: reading failed.
    pieces: mpsc::Receiver<Option<Bytes>>,
    left: u64,
    sent_bytes: Arc<AtomicU64>,
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        match std::task::ready!(self.pieces.poll_recv(context)) {
            Some(Some(piece)) => {
                self.left = self.left.saturating_sub(piece.len() as u64);
                self.sent_bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
            _ => Poll::Ready(Some(Err(io::Error::other("the blob cannot be read")))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
