//! Writing beside the work that makes what is written.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

/// Bytes that travel at once. Compressors give what they have, which is little at a time.
const PIECE_BYTES: usize = 512 << 10;
/// So many pieces wait before whoever makes them does.
const WAITING: usize = 8;

/// Lets `make` write to `sink`, whose work is done on a thread of its own; what `make` returns.
///
/// # Errors
/// Those of `sink`. Whatever `make` says then comes of that.
pub(crate) fn write_behind<T>(
    sink: &mut (impl Write + Send),
    make: impl FnOnce(&mut dyn Write) -> T,
) -> io::Result<T> {
    let (full, pieces) = sync_channel::<Vec<u8>>(WAITING);
    let (spent, empty) = channel();
    thread::scope(|scope| {
        let writer = thread::Builder::new().name("layer-write".to_owned());
        let writer = writer.spawn_scoped(scope, move || write_all(sink, &pieces, &spent))?;
        let mut out = Pieces { piece: Vec::with_capacity(PIECE_BYTES), full, empty };
        let made = make(&mut out);
        // Where it cannot be handed on, the writer says why.
        let _ = out.hand_on();
        drop(out);
        writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(|()| made)
    })
}

fn write_all(sink: &mut impl Write, pieces: &Receiver<Vec<u8>>, spent: &Sender<Vec<u8>>) -> io::Result<()> {
    for mut piece in pieces {
        sink.write_all(&piece)?;
        piece.clear();
        // At the end nobody wants it back.
        let _ = spent.send(piece);
    }
    sink.flush()
}

/// Hands on what is written, a piece at a time.
struct Pieces {
    piece: Vec<u8>,
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
}

impl Pieces {
    fn hand_on(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let next = self.empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(PIECE_BYTES));
        let piece = std::mem::replace(&mut self.piece, next);
        self.full.send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(PIECE_BYTES - self.piece.len());
        self.piece.extend_from_slice(&bytes[..length]);
        if self.piece.len() == PIECE_BYTES {
            self.hand_on()?;
        }
        Ok(length)
    }

    /// Pieces go when they are full.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_arrives_in_order() {
        for length in [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 20 * PIECE_BYTES + 7] {
            let bytes: Vec<u8> = (0..length).map(|at| (at / 3 % 251) as u8).collect();
            let mut out = Vec::new();
            let made = write_behind(&mut out, |to| {
                bytes.chunks(100_003).try_for_each(|chunk| to.write_all(chunk)).is_ok()
            });
            assert!(made.unwrap());
            assert!(out == bytes, "{length}: {}", out.len());
        }
    }

    #[test]
    fn a_sink_that_fails_says_why_and_stops_the_work() {
        let mut small = [0; 3 * PIECE_BYTES];
        let mut sink = &mut small[..];
        let mut taken = 0;
        let failed = write_behind(&mut sink, |to| {
            taken = (0..1000).take_while(|_| to.write_all(&[1; PIECE_BYTES]).is_ok()).count();
        });
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::WriteZero);
        assert!(taken < 1000, "{taken}");
    }
}
