//! Bodies of answers: bytes, or a file in pieces.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A file is read in pieces of so many bytes, one at a time for each answer.
const PIECE_BYTES: u64 = 128 << 10;

/// What an answer consists of.
pub(crate) enum Body {
    Empty,
    Bytes(Bytes),
    File(FileBody),
}

/// Bytes of a file, some of which may still be to come.
pub(crate) struct FileBody {
    file: Arc<File>,
    at: u64,
    end: u64,
    /// How far the file is good to be read; `None`: to its end.
    grows: Option<watch::Receiver<Growth>>,
    state: State,
}

/// How far a file is that somebody else writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Growth {
    /// So many bytes can be read.
    To(u64),
    /// There will be no more, and it is not what it should be.
    Failed,
}

enum State {
    Idle,
    Reading(JoinHandle<io::Result<Bytes>>),
    Waiting(Pin<Box<dyn Future<Output = watch::Receiver<Growth>> + Send>>),
}

impl FileBody {
    /// The bytes from `at` to before `end`.
    pub(crate) fn new(file: File, at: u64, end: u64) -> Self {
        Self { file: Arc::new(file), at, end, grows: None, state: State::Idle }
    }

    /// The same of a file that is being written.
    pub(crate) fn growing(file: File, at: u64, end: u64, grows: watch::Receiver<Growth>) -> Self {
        Self { grows: Some(grows), ..Self::new(file, at, end) }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            match &mut self.state {
                State::Idle if self.at >= self.end => return Poll::Ready(None),
                State::Idle => {
                    let mut until = self.end.min(self.at + PIECE_BYTES);
                    if let Some(mut grows) = self.grows.take() {
                        let growth = *grows.borrow_and_update();
                        match growth {
                            Growth::To(there) if there > self.at => until = until.min(there),
                            Growth::To(_) => {
                                self.state = State::Waiting(Box::pin(async move {
                                    // Whoever wrote is gone without a word: as if it had said so.
                                    if grows.changed().await.is_err()
                                        && matches!(*grows.borrow(), Growth::To(_))
                                    {
                                        return watch::channel(Growth::Failed).1;
                                    }
                                    grows
                                }));
                                continue;
                            }
                            Growth::Failed => {
                                let text = "what another registry sent was not what it should be";
                                return Poll::Ready(Some(Err(io::Error::other(text))));
                            }
                        }
                        self.grows = Some(grows);
                    }
                    let (file, at) = (self.file.clone(), self.at);
                    let length = usize::try_from(until - at).unwrap_or(usize::MAX);
                    self.state = State::Reading(tokio::task::spawn_blocking(move || {
                        let mut piece = vec![0; length];
                        file.read_exact_at(&mut piece, at)?;
                        Ok(Bytes::from(piece))
                    }));
                }
                State::Reading(task) => {
                    let read = ready!(Pin::new(task).poll(cx));
                    self.state = State::Idle;
                    let piece = read.map_err(io::Error::other).flatten();
                    if let Ok(piece) = &piece {
                        self.at += piece.len() as u64;
                    }
                    return Poll::Ready(Some(piece));
                }
                State::Waiting(wait) => {
                    self.grows = Some(ready!(wait.as_mut().poll(cx)));
                    self.state = State::Idle;
                }
            }
        }
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Bytes(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Bytes(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::File(file) => file.poll(cx).map(|piece| piece.map(|piece| piece.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.size_hint().exact() == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Self::Empty => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(file) => file.end.saturating_sub(file.at),
        })
    }
}
