//! Chances that can be taken again.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// SplitMix64: a seed repeats a run.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts from `seed`.
    pub fn of(seed: u64) -> Self {
        Self(seed)
    }

    /// Starts from the number in the environment variable `KILN_SEED`; without one, anywhere.
    ///
    /// # Panics
    /// When the variable is no number.
    pub fn new() -> Self {
        let given = std::env::var("KILN_SEED").ok().map(|seed| seed.parse().expect("KILN_SEED is a number"));
        Self(given.unwrap_or_else(|| RandomState::new().hash_one(std::process::id())))
    }

    /// What repeats the rest.
    pub fn seed(&self) -> u64 {
        self.0
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.number() % bound as u64) as usize
    }

    /// At least 0, less than 1.
    pub fn fraction(&mut self) -> f64 {
        (self.number() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

impl Default for Random {
    fn default() -> Self {
        Self::new()
    }
}
