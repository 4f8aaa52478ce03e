//! The tar of a layer as it is hashed, with states of the hash kept on the way.

use std::fs::File;
use std::io::{self, Sink, Write};
use std::sync::atomic::AtomicBool;

use kiln_oci::DiffId;

use super::states::{Chain, HashState, HashStates};
use super::{DiffError, Output, Writer, Written};
use crate::hashing::HashedOut;
use crate::member::copy_content;
use crate::tar_write::{Header, write_header};

pub(super) struct Recorded {
    out: HashedOut<Sink>,
    chain: Chain,
    /// Bytes from one state to the next.
    interval_bytes: u64,
    /// The states of the earlier tar that it began with.
    states: Vec<HashState>,
    /// Where the hash was told to keep its state since.
    marks: Vec<Mark>,
    /// The last state or mark.
    last: (u64, u64),
}

struct Mark {
    entries: u64,
    size_bytes: u64,
    chain: [u8; 32],
}

impl Recorded {
    /// A tar that has nothing in it yet.
    pub(super) fn new(interval_bytes: u64) -> Self {
        Self::of(HashedOut::new(io::sink()), Chain::new(), interval_bytes, Vec::new())
    }

    /// Goes on behind the last of `states`, where the chain was `chain`.
    pub(super) fn resume(states: Vec<HashState>, chain: Chain, interval_bytes: u64) -> Self {
        match states.last() {
            Some(last) => {
                let out = HashedOut::resume(io::sink(), &last.sha256, last.size_bytes);
                Self::of(out, chain, interval_bytes, states)
            }
            None => Self::new(interval_bytes),
        }
    }

    fn of(out: HashedOut<Sink>, chain: Chain, interval_bytes: u64, states: Vec<HashState>) -> Self {
        let last = states.last().map_or((0, 0), |last| (last.entries, last.size_bytes));
        Self { out, chain, interval_bytes, states, marks: Vec::new(), last }
    }

    /// Keeps the state of the hash between two members if the last one is far behind.
    pub(super) fn between(&mut self, entries: u64) -> io::Result<()> {
        let (_, last_bytes) = self.last;
        if self.out.size_bytes() - last_bytes >= self.interval_bytes { self.mark(entries) } else { Ok(()) }
    }

    fn mark(&mut self, entries: u64) -> io::Result<()> {
        let (last_entries, _) = self.last;
        let Some(chain) = self.chain.digest().filter(|_| entries > last_entries) else { return Ok(()) };
        let size_bytes = self.out.size_bytes();
        self.last = (entries, size_bytes);
        self.marks.push(Mark { entries, size_bytes, chain });
        self.out.mark()
    }
}

impl Writer<'_, Recorded> {
    /// What was written, and the states of its hash; `None`: the tar is empty, or the content of a file was
    /// not known.
    pub(super) fn finish_recorded(mut self) -> Result<(Written, Option<HashStates>), DiffError> {
        self.out.mark(self.entries).map_err(DiffError::Output)?;
        self.end()?;
        let is_known = self.out.chain.digest().is_some();
        let Recorded { out, mut states, marks, .. } = self.out;
        let hashed = out.finish_marked().map_err(DiffError::Output)?;
        states.extend(marks.into_iter().zip(hashed.marks).map(|(mark, sha256)| {
            let Mark { entries, size_bytes, chain } = mark;
            HashState { entries, size_bytes, chain, sha256 }
        }));
        let diff_id = DiffId(hashed.digest);
        let written = Written { diff_id, tar_size_bytes: hashed.size_bytes, entries: self.entries };
        // Else the last one is not that behind all members.
        Ok((written, HashStates::new(diff_id, states).filter(|_| is_known)))
    }
}

impl Output for Recorded {
    fn header(&mut self, header: &Header<'_>, content: Option<&[u8; 32]>) -> io::Result<()> {
        self.chain.add(header, content);
        write_header(&mut self.out, header)
    }

    fn content(
        &mut self,
        path: &[u8],
        file: File,
        size_bytes: u64,
        cancel: &AtomicBool,
    ) -> Result<(), DiffError> {
        copy_content(&mut self.out, path, file, size_bytes, cancel)
    }
}

impl Write for Recorded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
