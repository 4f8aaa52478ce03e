//! Sparse files in tars: where the pieces that are in the archive belong in the file.
//!
//! GNU tar has four ways to say it. The old one has a type of its own, `S`, and puts the map into
//! the header and into blocks behind it; PAX 0.0 and 0.1 use records; PAX 1.0 puts the map, as
//! text, in front of the content. Each comes down to a row of numbers, offset and length in turn,
//! which [`SparseMap::new`] checks. What is in the archive has no gaps between the pieces (as in Go).

use std::ops::Range;

use crate::apply::Defect;
use crate::tar_header::{Record, decimal, unsigned};
use crate::tar_write::BLOCK;

/// Offsets are signed in the kernel.
const OFFSET_MAX: u64 = u64::MAX >> 1;
/// Offset and length of a piece in old headers.
const OLD_ENTRY: usize = 24;

/// One piece of a file that is in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// A file's pieces; everything between and behind them is zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SparseMap {
    /// Of the whole file, holes included.
    pub(crate) size: u64,
    /// None of them empty; sorted, apart from each other and inside `size`.
    pub(crate) segments: Vec<Segment>,
}

/// What a header tells of a sparse file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct SparseHeader {
    /// The file's real name; `None`: the member has it.
    pub(crate) name: Option<Vec<u8>>,
    /// Of the whole file.
    pub(crate) size: u64,
    /// Offset and length of the pieces in turn, those that the header has itself.
    pub(crate) numbers: Vec<u64>,
    /// Where the others are.
    pub(crate) rest: MapRest,
}

/// Where the part of a map is that is not in the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapRest {
    /// There is none.
    Nothing,
    /// In blocks between header and content.
    Blocks,
    /// In the first blocks of the content.
    Content,
}

impl SparseMap {
    /// A file of `size` bytes whose pieces, `stored` bytes together, are in the archive.
    ///
    /// # Errors
    /// [`Defect::SparseMap`] when pieces overlap, are not sorted, reach behind the end, or are not
    /// exactly what is stored.
    pub(crate) fn new(size: u64, numbers: &[u64], stored: u64) -> Result<Self, Defect> {
        let mut segments = Vec::new();
        let (mut end, mut total) = (0_u64, 0_u64);
        let (pairs, odd) = numbers.as_chunks::<2>();
        for &[offset, length] in pairs {
            if offset < end {
                return Err(Defect::SparseMap);
            }
            end = offset.checked_add(length).filter(|&end| end <= size).ok_or(Defect::SparseMap)?;
            // Cannot overflow: pieces that do not overlap are together no longer than `end`.
            total += length;
            // GNU tar marks the end of a file that ends in a hole by an empty piece.
            if length > 0 {
                segments.push(Segment { offset, length });
            }
        }
        if total != stored || !odd.is_empty() || size > OFFSET_MAX {
            return Err(Defect::SparseMap);
        }
        Ok(Self { size, segments })
    }
}

/// The part of a map in a header of type `S`.
pub(crate) fn old_header(block: &[u8; BLOCK]) -> Result<SparseHeader, Defect> {
    // In other formats the names' prefix is there.
    if &block[257..265] != b"ustar  \0" {
        return Err(Defect::SparseMap);
    }
    let size = unsigned(&block[483..495], OFFSET_MAX).ok_or(Defect::SparseMap)?;
    let mut numbers = Vec::new();
    add_old_entries(block, 386..482, &mut numbers)?;
    let rest = if block[482] == 0 { MapRest::Nothing } else { MapRest::Blocks };
    Ok(SparseHeader { name: None, size, numbers, rest })
}

/// Adds the numbers in a block behind a header of type `S`; whether another block follows.
pub(crate) fn add_old_block(block: &[u8; BLOCK], numbers: &mut Vec<u64>) -> Result<bool, Defect> {
    add_old_entries(block, 0..504, numbers)?;
    Ok(block[504] != 0)
}

fn add_old_entries(block: &[u8; BLOCK], at: Range<usize>, numbers: &mut Vec<u64>) -> Result<(), Defect> {
    let (entries, _) = block[at].as_chunks::<OLD_ENTRY>();
    for entry in entries.iter().take_while(|entry| entry[0] != 0) {
        for field in [&entry[..12], &entry[12..]] {
            numbers.push(unsigned(field, OFFSET_MAX).ok_or(Defect::SparseMap)?);
        }
    }
    Ok(())
}

/// What PAX records tell of a sparse file; `None` when they do not speak of one.
pub(crate) fn pax_header(pax: &[Record<'_>]) -> Result<Option<SparseHeader>, Defect> {
    let records = || pax.iter().filter_map(|(key, value)| Some((key.strip_prefix(b"GNU.sparse.")?, *value)));
    if records().next().is_none() {
        return Ok(None);
    }
    let value =
        |name: &[u8]| records().rfind(|(key, text)| *key == name && !text.is_empty()).map(|(_, text)| text);
    let number = |name: &[u8]| value(name).map(|text| decimal(text).ok_or(Defect::SparseMap)).transpose();
    let (numbers, rest) = match (value(b"major"), value(b"minor")) {
        (Some(b"1"), Some(b"0")) => (Vec::new(), MapRest::Content),
        (None, None) | (Some(b"0"), Some(b"0" | b"1")) => {
            let numbers = match value(b"map") {
                Some(map) => map.split(|&b| b == b',').map(offset).collect::<Result<_, _>>()?,
                None => loose_numbers(records())?,
            };
            if number(b"numblocks")?.and_then(|count| count.checked_mul(2)) != Some(numbers.len() as u64) {
                return Err(Defect::SparseMap);
            }
            (numbers, MapRest::Nothing)
        }
        _ => return Err(Defect::SparseFormat),
    };
    let size = match number(b"size")? {
        Some(size) => Some(size),
        None => number(b"realsize")?,
    };
    let name = value(b"name").map(<[u8]>::to_vec);
    Ok(Some(SparseHeader { name, size: size.ok_or(Defect::SparseMap)?, numbers, rest }))
}

/// The map of PAX 0.0, where each number is a record and the same keys come again and again.
fn loose_numbers<'r>(records: impl Iterator<Item = Record<'r>>) -> Result<Vec<u64>, Defect> {
    let mut numbers = Vec::new();
    for (key, value) in records {
        let is_length = match key {
            b"offset" => false,
            b"numbytes" => true,
            _ => continue,
        };
        if is_length != (numbers.len() % 2 == 1) {
            return Err(Defect::SparseMap);
        }
        numbers.push(offset(value)?);
    }
    Ok(numbers)
}

fn offset(text: &[u8]) -> Result<u64, Defect> {
    decimal(text).ok_or(Defect::SparseMap)
}

/// The map of PAX 1.0, line by line: how many pieces, then offset and length of each.
#[derive(Debug, Default)]
pub(crate) struct MapText {
    /// How many numbers come, once that is read.
    expected: Option<u64>,
    numbers: Vec<u64>,
    /// The line that is not at its end; `None` before its first digit.
    line: Option<u64>,
}

impl MapText {
    /// Whether every number is there. What follows in the same block is padding.
    pub(crate) fn is_complete(&self) -> bool {
        self.expected == Some(self.numbers.len() as u64)
    }

    /// Reads on; may be cut anywhere.
    pub(crate) fn add(&mut self, text: &[u8]) -> Result<(), Defect> {
        for &byte in text {
            if self.is_complete() {
                break;
            }
            match byte {
                b'0'..=b'9' => {
                    let line = self.line.unwrap_or_default();
                    let line = line.checked_mul(10).and_then(|n| n.checked_add(u64::from(byte - b'0')));
                    self.line = Some(line.ok_or(Defect::SparseMap)?);
                }
                b'\n' => {
                    let number = self.line.take().ok_or(Defect::SparseMap)?;
                    match self.expected {
                        Some(_) => self.numbers.push(number),
                        None => self.expected = Some(number.checked_mul(2).ok_or(Defect::SparseMap)?),
                    }
                }
                _ => return Err(Defect::SparseMap),
            }
        }
        Ok(())
    }

    /// Offset and length in turn.
    pub(crate) fn into_numbers(self) -> Vec<u64> {
        self.numbers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_bad(size: u64, numbers: &[u64], stored: u64) {
        assert_eq!(SparseMap::new(size, numbers, stored), Err(Defect::SparseMap));
    }

    #[test]
    fn segments_are_sorted_apart_inside_and_exactly_what_is_stored() {
        let map = SparseMap::new(20, &[0, 2, 2, 0, 2, 3, 10, 10, 20, 0], 15).unwrap();
        let pairs: Vec<_> = map.segments.iter().map(|s| (s.offset, s.length)).collect();
        assert_eq!(pairs, [(0, 2), (2, 3), (10, 10)]);
        assert_eq!(SparseMap::new(7, &[], 0).unwrap().segments, []);
        check_bad(20, &[0, 5, 4, 5], 10);
        check_bad(20, &[10, 5, 0, 5], 10);
        check_bad(20, &[0, 21], 21);
        check_bad(20, &[21, 0], 0);
        check_bad(20, &[20, u64::MAX], 19);
        check_bad(20, &[0, 5], 4);
        check_bad(20, &[0, 5], 6);
        check_bad(20, &[0, 5, 7], 5);
        check_bad(1 << 63, &[0, 5], 5);
    }

    #[test]
    fn a_map_in_front_of_the_content_is_read_line_by_line() {
        let read = |pieces: &[&[u8]]| {
            let mut text = MapText::default();
            for piece in pieces {
                text.add(piece)?;
            }
            Ok(text.is_complete().then(|| text.into_numbers()))
        };
        assert_eq!(read(&[b"2\n0\n5\n1", b"0\n7\n", b"\0\0 padding"]), Ok(Some(vec![0, 5, 10, 7])));
        assert_eq!(read(&[b"0\n\0\0"]), Ok(Some(vec![])));
        assert_eq!(read(&[b"2\n0\n5\n1"]), Ok(None));
        for bad in
            [&b"\n"[..], b"1\n\n1\n", b"-1\n", b"\0", b"99999999999999999999\n", b"9999999999999999999\n"]
        {
            assert_eq!(read(&[bad]), Err(Defect::SparseMap), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn records_hold_the_map_one_by_one_or_in_a_row() {
        let read = |text: &[(&'static str, &'static str)]| {
            let records: Vec<_> = text.iter().map(|(k, v)| (k.as_bytes(), v.as_bytes())).collect();
            pax_header(&records).map(|header| header.map(|header| (header.size, header.numbers)))
        };
        assert_eq!(read(&[("path", "x")]), Ok(None));
        let (size, one) = (("GNU.sparse.size", "9"), ("GNU.sparse.numblocks", "1"));
        let (offset, length) = (("GNU.sparse.offset", "1"), ("GNU.sparse.numbytes", "3"));
        let expected = Ok(Some((9, vec![1, 3])));
        assert_eq!(read(&[size, one, offset, length]), expected);
        assert_eq!(read(&[size, one, ("GNU.sparse.map", "1,3")]), expected);
        for bad in [
            &[size, one][..],
            &[size, one, length, offset],
            &[size, one, offset, offset],
            &[size, one, offset, length, offset, length],
            &[size, one, offset],
            &[one, offset, length],
            &[size, offset, length],
            &[size, one, ("GNU.sparse.map", "1,")],
            &[size, one, ("GNU.sparse.map", "1,-3")],
            &[size, ("GNU.sparse.numblocks", "9223372036854775809"), offset, length],
        ] {
            assert_eq!(read(bad), Err(Defect::SparseMap), "{bad:?}");
        }
        assert_eq!(read(&[("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0")]), Err(Defect::SparseFormat));
    }
}
