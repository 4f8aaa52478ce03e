//! Gzip whose members say how long they are, inflated on several cores.

use std::collections::VecDeque;
use std::io::{self, BufRead, Chain, Cursor, Read};
use std::sync::mpsc::Receiver;

use flate2::bufread::MultiGzDecoder;
use flate2::{Crc, Decompress, FlushDecompress, Status};

use super::estargz::CHUNK_BYTES;
use super::gzip::{HEADER, HEADER_BYTES, TRAILER_BYTES, in_pool, wait};

/// Most that a member may hold to be inflated as a whole: a piece of a file in eStargz, with room for
/// what stands before it. Whoever says more wants our memory.
const MOST_PLAIN_BYTES: usize = CHUNK_BYTES as usize;
/// Longest such member. Deflate makes of what it cannot compress at most five bytes more a block of
/// some KiB.
const MOST_BYTES: usize = MOST_PLAIN_BYTES + MOST_PLAIN_BYTES / 64;

/// Members held at once, however many threads there are: 64 MiB of the largest.
const MOST_PENDING: usize = 16;

/// The plain bytes of members as [`super::gzip`] makes them. From the first that is another on, one
/// after the other is inflated, as any gzip is.
///
/// Holds at most two members a thread, compressed or plain, and [`MOST_PENDING`] in all.
pub(super) struct GunzipMembers<R> {
    /// Nothing when all was read, or handed to `rest`.
    reader: Option<R>,
    pending: VecDeque<Receiver<io::Result<Vec<u8>>>>,
    most_pending: usize,
    current: Cursor<Vec<u8>>,
    /// What is no member of ours, and all behind it.
    rest: Option<MultiGzDecoder<Chain<Cursor<Vec<u8>>, R>>>,
}

/// Whether a stream begins with a member that says how long it is.
pub(super) fn says_its_length(head: &[u8]) -> bool {
    head.starts_with(&HEADER)
}

impl<R: BufRead> GunzipMembers<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader: Some(reader),
            pending: VecDeque::new(),
            most_pending: (rayon::current_num_threads() * 2).min(MOST_PENDING),
            current: Cursor::default(),
            rest: None,
        }
    }

    /// Reads a member and has it inflated. At the end of the stream, or before something else, there is
    /// no reader afterwards.
    fn ahead(&mut self) -> io::Result<()> {
        let Some(reader) = &mut self.reader else { return Ok(()) };
        let mut member = Vec::with_capacity(HEADER_BYTES);
        reader.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut member)?;
        if member.is_empty() {
            self.reader = None;
            return Ok(());
        }
        match length(&member) {
            Some(length) => {
                member.reserve_exact(length - HEADER_BYTES);
                reader.by_ref().take((length - HEADER_BYTES) as u64).read_to_end(&mut member)?;
                if member.len() < length {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.pending.push_back(in_pool(move || inflate(&member)));
            }
            None => {
                let Some(reader) = self.reader.take() else { return Ok(()) };
                self.rest = Some(MultiGzDecoder::new(Cursor::new(member).chain(reader)));
            }
        }
        Ok(())
    }
}

/// Of a member as ours are, all of it; `None` of any other.
fn length(header: &[u8]) -> Option<usize> {
    let length = header.strip_prefix(&HEADER)?.first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    (HEADER_BYTES + TRAILER_BYTES..=MOST_BYTES).contains(&length).then_some(length)
}

/// A whole member. Its length has to be what it says, to the byte: other readers go by where deflate ends.
fn inflate(member: &[u8]) -> io::Result<Vec<u8>> {
    let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("gzip: {what}"));
    let (body, trailer) = member[HEADER_BYTES..].split_at(member.len() - HEADER_BYTES - TRAILER_BYTES);
    let number =
        |at: usize| u32::from_le_bytes([trailer[at], trailer[at + 1], trailer[at + 2], trailer[at + 3]]);
    let (sum, size) = (number(0), number(4));
    let room = usize::try_from(size).ok().filter(|size| *size <= MOST_PLAIN_BYTES);
    let room = room.ok_or_else(|| damaged("a member is longer than members with their length are"))?;
    // One byte more, so that one that is too long is noticed.
    let mut plain = Vec::with_capacity(room + 1);
    let mut inflater = Decompress::new(false);
    let status = inflater.decompress_vec(body, &mut plain, FlushDecompress::Finish);
    let status = status.map_err(|error| damaged(&error.to_string()))?;
    if status != Status::StreamEnd || inflater.total_in() != body.len() as u64 || plain.len() != room {
        return Err(damaged("a member is not as long as it says"));
    }
    let mut crc = Crc::new();
    crc.update(&plain);
    if crc.sum() != sum {
        return Err(damaged("a member's checksum does not match"));
    }
    Ok(plain)
}

impl<R: BufRead> Read for GunzipMembers<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let taken = self.current.read(out)?;
            if taken > 0 || out.is_empty() {
                return Ok(taken);
            }
            while self.reader.is_some() && self.pending.len() < self.most_pending {
                self.ahead()?;
            }
            match (self.pending.pop_front(), &mut self.rest) {
                (Some(member), _) => self.current = Cursor::new(wait(&member)??),
                (None, Some(rest)) => return rest.read(out),
                (None, None) => return Ok(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::gzip::member;
    use super::*;

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        assert!(says_its_length(bytes));
        let mut plain = Vec::new();
        GunzipMembers::new(bytes).read_to_end(&mut plain)?;
        Ok(plain)
    }

    /// As other programs write them.
    fn foreign(text: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[track_caller]
    fn refused(bytes: &[u8], why: &str) {
        let error = read(bytes).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn members_of_all_kinds_follow_each_other() {
        let ours = |text: &[u8]| member(text, 5).unwrap();
        assert_eq!(read(&[ours(b"one "), ours(b""), ours(b"two")].concat()).unwrap(), b"one two");
        let mixed = [ours(b"one "), foreign(b"two "), ours(b"three")].concat();
        assert_eq!(read(&mixed).unwrap(), b"one two three");
        // One that claims too much is read as any other is.
        let mut long = ours(b"two");
        long[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(read(&[ours(b"one "), long].concat()).unwrap(), b"one two");
    }

    #[test]
    fn random_bytes_fit_into_the_longest_member() {
        let text: Vec<u8> =
            (0..MOST_PLAIN_BYTES as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for level in 0..=9 {
            let bytes = member(&text, level).unwrap();
            assert!(bytes.len() <= MOST_BYTES, "level {level}: {}", bytes.len());
            assert!(read(&bytes).unwrap() == text);
        }
    }

    #[test]
    fn damage_is_noticed() {
        let good = [member(b"first", 5).unwrap(), member(&[7; 5000], 5).unwrap()].concat();
        for cut in 1..good.len() {
            let text = read(&good[..cut.max(HEADER.len())]);
            assert!(text.is_err() || text.unwrap() == b"first", "cut at {cut}");
        }
        for at in HEADER_BYTES..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                // Fields that say nothing of the content may change (time, system, hints).
                assert!(read(&bad).is_err() || read(&bad).unwrap() == read(&good).unwrap(), "{at}.{bit}");
            }
        }
        refused(&[member(b"x", 5).unwrap(), b"no header of gzip".to_vec()].concat(), "header");
    }

    /// What a member hides behind its end would be seen by readers that go by where deflate ends.
    #[test]
    fn nothing_hides_within_the_length() {
        let (first, hidden) = (member(b"first", 5).unwrap(), member(b"hidden", 5).unwrap());
        let mut both = [first.clone(), hidden].concat();
        let length = u32::try_from(both.len()).unwrap();
        both[16..20].copy_from_slice(&length.to_le_bytes());
        refused(&both, "not as long as it says");
        let mut size = first.clone();
        let at = size.len() - 4;
        size[at] += 1;
        refused(&size, "not as long as it says");
        size[at + 3] = 0xff;
        refused(&size, "longer than members");
        let mut sum = first;
        sum[at - 1] ^= 1;
        refused(&sum, "checksum");
    }
}
