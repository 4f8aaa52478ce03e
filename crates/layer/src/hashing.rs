//! SHA-256 beside the work that makes or uses the bytes.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use kiln_oci::{Digest, Sha256Writer};

use crate::member::Spare;

/// Large enough that calls and hand-overs do not count.
pub(crate) const PIECE: usize = 256 << 10;
/// Pieces that wait for the hash: a mebibyte and a half at most.
const WAITING: usize = 6;
/// What is hashed in place: for most layers a thread costs more than it saves.
const IN_PLACE: u64 = 1 << 20;

/// Hashes a stream that comes in pieces, whose memory is used again and again.
pub(crate) struct Hashing {
    hash: Hash,
    size_bytes: u64,
    /// Pieces given back; the hash may still be at work on them.
    used: VecDeque<Arc<Vec<u8>>>,
}

type State = Sha256Writer<io::Sink>;

enum Hash {
    InPlace(State),
    Beside {
        pieces: SyncSender<Arc<Vec<u8>>>,
        /// A message for every piece that is done.
        done: Receiver<()>,
        thread: JoinHandle<State>,
    },
}

impl Hashing {
    pub(crate) fn new() -> Self {
        let hash = Hash::InPlace(Sha256Writer::new(io::sink()));
        Self { hash, size_bytes: 0, used: VecDeque::new() }
    }

    /// Room for the next piece: as long as the last time, with what was in it.
    pub(crate) fn room(&mut self) -> Vec<u8> {
        while let Some(piece) = self.used.pop_front() {
            match Arc::try_unwrap(piece) {
                Ok(room) => return room,
                Err(piece) if self.used.len() + 1 < WAITING => {
                    self.used.push_front(piece);
                    break;
                }
                Err(piece) => {
                    self.used.push_front(piece);
                    let Hash::Beside { done, .. } = &self.hash else { break };
                    // An error: the thread is gone, and with it all that it held.
                    if done.recv().is_err() {
                        self.used.clear();
                    }
                }
            }
        }
        Vec::new()
    }

    /// Hashes `piece`, perhaps later.
    pub(crate) fn hash(&mut self, piece: &Arc<Vec<u8>>) {
        self.size_bytes += piece.len() as u64;
        if self.size_bytes > IN_PLACE {
            self.go_beside();
        }
        match &mut self.hash {
            Hash::InPlace(state) => update(state, piece),
            // The thread ends early only by a panic, which `finish` hands on.
            Hash::Beside { pieces, .. } => drop(pieces.send(piece.clone())),
        }
    }

    /// Takes back a piece that nobody reads any more.
    pub(crate) fn give_back(&mut self, piece: Arc<Vec<u8>>) {
        self.used.push_back(piece);
    }

    /// The digest of all pieces, and their size.
    pub(crate) fn finish(self) -> (Digest, u64) {
        let state = match self.hash {
            Hash::InPlace(state) => state,
            Hash::Beside { pieces, thread, .. } => {
                drop(pieces);
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
        };
        let (_, digest, _) = state.finish();
        (digest, self.size_bytes)
    }

    /// Moves the hash to a thread of its own, if there is none yet and one can be had.
    fn go_beside(&mut self) {
        let Hash::InPlace(state) = &mut self.hash else { return };
        let (pieces, incoming) = sync_channel::<Arc<Vec<u8>>>(WAITING);
        let (finished, done) = sync_channel(WAITING * 2);
        let state = std::mem::replace(state, Sha256Writer::new(io::sink()));
        // Handed over as a message: when there is no thread, it is still ours.
        let (hand_over, handed) = sync_channel::<State>(1);
        let work = move || {
            let mut state = handed.recv().unwrap_or_else(|_| Sha256Writer::new(io::sink()));
            for piece in incoming {
                update(&mut state, &piece);
                drop(piece);
                // Full when nobody waits for room; then nobody needs to know.
                let _ = finished.try_send(());
            }
            state
        };
        match Builder::new().name("layer-hash".to_owned()).spawn(work) {
            Ok(thread) => {
                let _ = hand_over.send(state);
                self.hash = Hash::Beside { pieces, done, thread };
            }
            // No more threads: it takes longer then.
            Err(_) => self.hash = Hash::InPlace(state),
        }
    }
}

/// A writer that hashes what passes, in large pieces.
pub(crate) struct HashedOut<W> {
    out: W,
    hashing: Hashing,
    /// Of [`PIECE`] bytes.
    piece: Vec<u8>,
    filled: usize,
}

impl<W: Write> HashedOut<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, hashing: Hashing::new(), piece: vec![0; PIECE], filled: 0 }
    }

    /// Writes what is left; the digest and size of everything.
    pub(crate) fn finish(mut self) -> io::Result<(Digest, u64)> {
        self.pass_on()?;
        self.out.flush()?;
        Ok(self.hashing.finish())
    }

    fn pass_on(&mut self) -> io::Result<()> {
        let mut piece = std::mem::take(&mut self.piece);
        piece.truncate(self.filled);
        let piece = Arc::new(piece);
        self.hashing.hash(&piece);
        self.out.write_all(&piece)?;
        self.hashing.give_back(piece);
        self.piece = self.hashing.room();
        self.piece.resize(PIECE, 0);
        self.filled = 0;
        Ok(())
    }
}

impl<W: Write> Spare for HashedOut<W> {
    fn spare(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == PIECE {
            self.pass_on()?;
        }
        Ok(&mut self.piece[self.filled..])
    }

    fn advance(&mut self, length: usize) {
        self.filled += length;
    }
}

impl<W: Write> Write for HashedOut<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.fill(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn update(state: &mut State, piece: &[u8]) {
    state.write_all(piece).expect("a sink takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_that_of_all_pieces_in_order_and_memory_is_used_again() {
        for count in [0, 1, 3, 100] {
            let mut hashing = Hashing::new();
            let mut all = Vec::new();
            let mut rooms = std::collections::HashSet::new();
            for nth in 0..count {
                let mut room = hashing.room();
                room.clear();
                room.resize(PIECE - nth, u8::try_from(nth).unwrap());
                rooms.insert(room.as_ptr());
                all.extend_from_slice(&room);
                let piece = Arc::new(room);
                hashing.hash(&piece);
                hashing.give_back(piece);
            }
            assert_eq!(hashing.finish(), (Digest::of(&all), all.len() as u64), "{count}");
            assert!(rooms.len() <= WAITING + 1, "{} rooms", rooms.len());
        }
    }
}
