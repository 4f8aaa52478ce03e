//! What deflate makes no smaller, told in a fraction of the time that deflate takes to find out: archives,
//! pictures, whatever is compressed or encrypted.
//!
//! Integers alone: the answer decides about the bytes of a layer, which are the same on any machine.

/// What is looked at as one, and stored or compressed as one.
pub(super) const GRAIN_BYTES: usize = 64 << 10;

/// Too little to be worth a member of its own, and to be judged.
const LEAST_BYTES: usize = 4 << 10;

/// How far back deflate finds something again (RFC 1951, section 2).
const WINDOW_BYTES: usize = 32 << 10;

/// Places that begin with a byte below this are looked at for what comes again: of noise one in 32.
const BELOW: u8 = 8;

/// Whether nothing is won by compressing `bytes`, at most [`GRAIN_BYTES`]: neither by giving frequent bytes
/// shorter codes nor by naming what comes again, not more than about one percent each.
///
/// Text and programs take 5 to 10 microseconds to be told from it, noise takes 160; deflate takes 600 to
/// 1,300 for either.
pub(super) fn is_noise(bytes: &[u8]) -> bool {
    bytes.len() >= LEAST_BYTES && spread(sample(bytes)) && spread([bytes]) && !comes_again(bytes)
}

/// A sixteenth, from everywhere.
fn sample(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (slice, step) = (bytes.len() / 256, bytes.len() / 16);
    bytes.chunks(step.max(1)).map(move |piece| &piece[..slice.min(piece.len())])
}

/// Whether all bytes are about as frequent: their collision entropy (Rényi's of order 2) is at least 7.9 bits,
/// so Shannon's is, too, and no code for single bytes saves more than a tenth of a bit in eight.
fn spread<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> bool {
    // Four tables: a byte that follows itself does not wait for its own count.
    let mut counts = [[0_u32; 256]; 4];
    let mut count = 0;
    for piece in pieces {
        count += piece.len() as u64;
        let (fours, rest) = piece.as_chunks::<4>();
        for four in fours {
            for (table, byte) in counts.iter_mut().zip(four) {
                table[usize::from(*byte)] += 1;
            }
        }
        for byte in rest {
            counts[0][usize::from(*byte)] += 1;
        }
    }
    let of = |byte: usize| counts.iter().map(|table| u64::from(table[byte])).sum::<u64>();
    let squares: u64 = (0..256).map(|byte| of(byte).pow(2)).sum();
    // Of `n` even dice of 256 sides the squares sum to n²/256 + n or so; 2^7.9 = 238.9.
    squares.saturating_sub(count) * 239 <= count * count
}

/// Whether one in a hundred places, or more, begins with four bytes that stood within reach before.
fn comes_again(bytes: &[u8]) -> bool {
    // Where such bytes were seen last, with one added.
    let mut seen = [0_u32; 4096];
    let (mut looked, mut found) = (0_u32, 0_u32);
    for (at, first) in bytes.iter().enumerate() {
        if *first >= BELOW {
            continue;
        }
        let Some(&four) = bytes[at..].first_chunk::<4>() else { break };
        // Knuth's multiplicative hash; its high bits depend on all that went in.
        let hash = u32::from_le_bytes(four).wrapping_mul(2_654_435_761);
        looked += 1;
        let before = std::mem::replace(&mut seen[(hash >> 20) as usize], at as u32 + 1) as usize;
        if let Some(before) = before.checked_sub(1)
            && at - before <= WINDOW_BYTES
            && bytes[before..before + 4] == four
        {
            found += 1;
        }
    }
    // Where few places were to be looked at, the bytes are not even.
    found * 100 > looked || (looked as usize) < bytes.len() / 64
}

#[cfg(test)]
mod tests {
    use libdeflater::{CompressionLvl, Compressor};

    use super::*;

    /// xorshift64 (Marsaglia).
    fn random(length: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    fn deflated(bytes: &[u8]) -> usize {
        let mut compressor = Compressor::new(CompressionLvl::new(9).unwrap());
        let mut out = vec![0; compressor.deflate_compress_bound(bytes.len())];
        compressor.deflate_compress(bytes, &mut out).unwrap()
    }

    /// What is stored would have lost this much at most.
    #[track_caller]
    fn noise(bytes: &[u8]) {
        assert!(is_noise(bytes));
        assert!(deflated(bytes) * 100 > bytes.len() * 97, "{} of {}", deflated(bytes), bytes.len());
    }

    #[test]
    fn what_is_random_or_compressed_is_noise() {
        for length in [LEAST_BYTES, LEAST_BYTES + 1, 40_000, GRAIN_BYTES - 1, GRAIN_BYTES] {
            noise(&random(length));
        }
        let words: Vec<u8> =
            random(1 << 20).iter().flat_map(|byte| format!("{} ", byte % 100).into_bytes()).collect();
        let packed = zstd::encode_all(words.as_slice(), 3).unwrap();
        let grains = packed.chunks_exact(GRAIN_BYTES);
        assert!(grains.len() > 5);
        grains.for_each(noise);
        let mut deflate = vec![0; words.len()];
        let mut compressor = Compressor::new(CompressionLvl::new(6).unwrap());
        let length = compressor.deflate_compress(&words, &mut deflate).unwrap();
        deflate[..length].chunks_exact(GRAIN_BYTES).for_each(noise);
    }

    #[test]
    fn what_deflate_makes_smaller_is_none() {
        let noise = random(GRAIN_BYTES);
        // All bytes are as frequent, but come again: soon, late, and in a part only.
        let soon: Vec<u8> = noise[..1000].iter().copied().cycle().take(GRAIN_BYTES).collect();
        let late: Vec<u8> = noise[..30_000].iter().copied().cycle().take(GRAIN_BYTES).collect();
        let mut part = noise.clone();
        part.copy_within(10_000..13_000, 20_000);
        let counted: Vec<u8> = (0..GRAIN_BYTES).map(|at| at as u8).collect();
        // Nothing comes again, but some bytes are more frequent.
        let base64: Vec<u8> = noise.iter().map(|byte| b'0' + byte % 64).collect();
        let seven: Vec<u8> = noise.iter().map(|byte| byte % 128).collect();
        // The same, and nothing is looked at.
        let high: Vec<u8> = noise.iter().filter(|byte| **byte >= BELOW).copied().collect();
        let high: Vec<u8> = high[..8000].iter().copied().cycle().take(GRAIN_BYTES).collect();
        let mut zeros = noise.clone();
        zeros.iter_mut().step_by(8).for_each(|byte| *byte = 0);
        for (what, bytes) in [
            ("soon", soon),
            ("late", late),
            ("part", part),
            ("counted", counted),
            ("base64", base64),
            ("seven", seven),
            ("high", high),
            ("zeros", zeros),
        ] {
            assert!(!is_noise(&bytes), "{what}");
            assert!(deflated(&bytes) * 100 <= bytes.len() * 98, "{what}: {}", deflated(&bytes));
        }
        // Beyond deflate's reach.
        let far = [&noise[..], &noise[..]].concat();
        assert!(is_noise(&far[30_000..30_000 + GRAIN_BYTES]));
    }

    #[test]
    fn little_is_not_judged() {
        assert!(!is_noise(&random(LEAST_BYTES - 1)) && !is_noise(b""));
    }
}
