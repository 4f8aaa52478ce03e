//! SHA-256 beside the work that makes or uses the bytes.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use kiln_oci::{Digest, Sha256State, Sha256Writer};

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

enum Hash {
    InPlace(State),
    Beside {
        work: SyncSender<Work>,
        /// A message for every piece that is done.
        done: Receiver<()>,
        thread: JoinHandle<State>,
    },
}

struct State {
    hash: Sha256Writer<io::Sink>,
    marks: Vec<Sha256State>,
}

enum Work {
    Piece(Arc<Vec<u8>>),
    Mark,
}

/// What came out of a hash.
pub(crate) struct Hashed {
    pub(crate) digest: Digest,
    pub(crate) size_bytes: u64,
    /// The states at the marks, in order.
    pub(crate) marks: Vec<Sha256State>,
}

impl Hashing {
    pub(crate) fn new() -> Self {
        Self::of(Sha256Writer::new(io::sink()))
    }

    /// Goes on behind `size_bytes` that led to `state`.
    fn resume(state: &Sha256State, size_bytes: u64) -> Self {
        Self::of(Sha256Writer::resume(io::sink(), state, size_bytes))
    }

    fn of(hash: Sha256Writer<io::Sink>) -> Self {
        let size_bytes = hash.size_bytes();
        Self { hash: Hash::InPlace(State::of(hash)), size_bytes, used: VecDeque::new() }
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
            Hash::InPlace(state) => state.update(piece),
            // The thread ends early only by a panic, which `finish` hands on.
            Hash::Beside { work, .. } => drop(work.send(Work::Piece(piece.clone()))),
        }
    }

    /// Keeps the state behind all pieces so far.
    fn mark(&mut self) {
        match &mut self.hash {
            Hash::InPlace(state) => state.mark(),
            Hash::Beside { work, .. } => drop(work.send(Work::Mark)),
        }
    }

    /// Takes back a piece that nobody reads any more.
    pub(crate) fn give_back(&mut self, piece: Arc<Vec<u8>>) {
        self.used.push_back(piece);
    }

    /// The digest of all pieces, and their size.
    pub(crate) fn finish(self) -> (Digest, u64) {
        let hashed = self.finish_marked();
        (hashed.digest, hashed.size_bytes)
    }

    fn finish_marked(self) -> Hashed {
        let State { hash, marks } = match self.hash {
            Hash::InPlace(state) => state,
            Hash::Beside { work, thread, .. } => {
                drop(work);
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
        };
        let (_, digest, size_bytes) = hash.finish();
        Hashed { digest, size_bytes, marks }
    }

    /// Moves the hash to a thread of its own, if there is none yet and one can be had.
    fn go_beside(&mut self) {
        let Hash::InPlace(state) = &mut self.hash else { return };
        let (work, incoming) = sync_channel::<Work>(WAITING);
        let (finished, done) = sync_channel(WAITING * 2);
        let state = std::mem::replace(state, State::of(Sha256Writer::new(io::sink())));
        // Handed over as a message: when there is no thread, it is still ours.
        let (hand_over, handed) = sync_channel::<State>(1);
        let run = move || {
            let mut state = handed.recv().unwrap_or_else(|_| State::of(Sha256Writer::new(io::sink())));
            for work in incoming {
                let Work::Piece(piece) = work else {
                    state.mark();
                    continue;
                };
                state.update(&piece);
                drop(piece);
                // Full when nobody waits for room; then nobody needs to know.
                let _ = finished.try_send(());
            }
            state
        };
        match Builder::new().name("layer-hash".to_owned()).spawn(run) {
            Ok(thread) => {
                let _ = hand_over.send(state);
                self.hash = Hash::Beside { work, done, thread };
            }
            // No more threads: it takes longer then.
            Err(_) => self.hash = Hash::InPlace(state),
        }
    }
}

impl State {
    fn of(hash: Sha256Writer<io::Sink>) -> Self {
        Self { hash, marks: Vec::new() }
    }

    fn update(&mut self, piece: &[u8]) {
        self.hash.write_all(piece).expect("a sink takes everything");
    }

    fn mark(&mut self) {
        self.marks.push(self.hash.state());
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
        Self::of(out, Hashing::new())
    }

    /// Goes on behind `size_bytes` that led to `state`, and that `out` has or does not want.
    pub(crate) fn resume(out: W, state: &Sha256State, size_bytes: u64) -> Self {
        Self::of(out, Hashing::resume(state, size_bytes))
    }

    fn of(out: W, hashing: Hashing) -> Self {
        Self { out, hashing, piece: vec![0; PIECE], filled: 0 }
    }

    /// What passed so far, and was before if it goes on.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.hashing.size_bytes + self.filled as u64
    }

    /// Keeps the state of the hash here, for [`Hashed::marks`].
    pub(crate) fn mark(&mut self) -> io::Result<()> {
        if self.filled > 0 {
            self.pass_on()?;
        }
        self.hashing.mark();
        Ok(())
    }

    /// Writes what is left; the digest and size of everything.
    pub(crate) fn finish(self) -> io::Result<(Digest, u64)> {
        let hashed = self.finish_marked()?;
        Ok((hashed.digest, hashed.size_bytes))
    }

    /// The same with the states at the marks.
    pub(crate) fn finish_marked(mut self) -> io::Result<Hashed> {
        self.pass_on()?;
        self.out.flush()?;
        Ok(self.hashing.finish_marked())
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

    #[test]
    fn a_hash_goes_on_from_each_mark_in_place_and_beside() {
        for size in [1000, IN_PLACE as usize + 3 * PIECE] {
            let bytes: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
            let ends = [0, 1, 500, size / 2, size / 2, size];
            let mut out = HashedOut::new(io::sink());
            let mut at = 0;
            for end in ends {
                out.write_all(&bytes[at..end]).unwrap();
                assert_eq!(out.size_bytes(), end as u64);
                out.mark().unwrap();
                at = end;
            }
            let hashed = out.finish_marked().unwrap();
            assert_eq!((hashed.digest, hashed.marks.len()), (Digest::of(&bytes), ends.len()));
            for (end, mark) in ends.into_iter().zip(&hashed.marks) {
                let mut out = HashedOut::resume(io::sink(), mark, end as u64);
                out.write_all(&bytes[end..]).unwrap();
                assert_eq!(out.finish().unwrap(), (Digest::of(&bytes), size as u64), "{size} from {end}");
            }
        }
    }
}
