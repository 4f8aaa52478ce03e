//! Digests: the names of bytes.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::digest::typenum::Unsigned;
use sha2::{Digest as _, Sha256};

/// `sha256:<64 hex>` of bytes exactly as stored.
///
/// Only SHA-256 is accepted: it is the one algorithm that every registry and runtime must know
/// (OCI image-spec, descriptor.md, "Registered algorithms").
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// Why a string is not a [`Digest`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DigestError {
    /// Something other than `sha256:` stands in front.
    #[error("digest {0:?} does not start with sha256:")]
    Algorithm(String),
    /// Registered (OCI image-spec, descriptor.md), and nothing that is verified here.
    #[error("sha256 is the one algorithm that kiln verifies, and digest {0:?} is of another")]
    Unverified(String),
    /// Not exactly 64 lower-case hexadecimal digits.
    #[error("digest {0:?} is not sha256: and 64 lower-case hexadecimal digits")]
    Encoding(String),
}

impl Digest {
    /// Returns the digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Wraps a finished SHA-256.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The raw 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first 12 hexadecimal digits, as tables show them.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let Some(encoded) = text.strip_prefix("sha256:") else {
            return Err(match text.split_once(':') {
                Some(("sha512" | "blake3", _)) => DigestError::Unverified(clip(text)),
                _ => DigestError::Algorithm(clip(text)),
            });
        };
        let lower = encoded.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let mut bytes = [0; 32];
        if !lower || hex::decode_to_slice(encoded, &mut bytes).is_err() {
            return Err(DigestError::Encoding(clip(text)));
        }
        Ok(Self(bytes))
    }
}

/// Keeps hostile text out of messages beyond a line's length.
fn clip(text: &str) -> String {
    text.chars().take(100).collect()
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Digest of one layer's uncompressed tar. Listed in the image config.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiffId(pub Digest);

impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Digest naming a stack of layers (OCI image-spec, config.md, "Layer ChainID").
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChainId(pub Digest);

impl ChainId {
    /// The chain ID of `layers`, lowest first; `None` for no layers at all.
    pub fn of(layers: &[DiffId]) -> Option<Self> {
        let (first, rest) = layers.split_first()?;
        Some(rest.iter().fold(Self(first.0), |chain, layer| chain.push(layer)))
    }

    /// The chain ID of this stack with `layer` on top.
    pub fn push(&self, layer: &DiffId) -> Self {
        Self(Digest::of(format!("{} {}", self.0, layer.0).as_bytes()))
    }
}

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Passes bytes on to `inner` and knows their digest and count at the end.
pub struct Sha256Writer<W> {
    inner: W,
    hash: Sha256,
    size_bytes: u64,
}

impl<W: Write> Sha256Writer<W> {
    /// Starts an empty stream in front of `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), size_bytes: 0 }
    }

    /// The writer behind.
    pub fn get_ref(&self) -> &W {
        &self.inner
    }

    /// How many bytes were written so far.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The digest of what was written so far.
    pub fn digest(&self) -> Digest {
        Digest(self.hash.clone().finalize().into())
    }

    /// How far the digest has come.
    pub fn state(&self) -> Sha256State {
        Sha256State(self.hash.serialize())
    }

    /// Goes on in front of `inner` where another writer was when it had this state and so many bytes.
    pub fn resume(inner: W, state: &Sha256State, size_bytes: u64) -> Self {
        let hash = Sha256::deserialize(&state.0).expect("checked when it was made");
        Self { inner, hash, size_bytes }
    }

    /// Returns the writer behind, the digest of everything written, and the size in bytes.
    pub fn finish(self) -> (W, Digest, u64) {
        (self.inner, Digest(self.hash.finalize().into()), self.size_bytes)
    }
}

impl<W: Write> Write for Sha256Writer<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buf)?;
        self.hash.update(&buf[..written]);
        self.size_bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A SHA-256 that has come so far and can go on: [`Sha256Writer::resume`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sha256State(SerializedState<Sha256>);

impl Sha256State {
    /// Of [`Sha256State::as_bytes`].
    pub const LENGTH: usize = <Sha256 as SerializableState>::SerializedStateSize::USIZE;

    /// The state as bytes, for [`Sha256State::from_bytes`] of this or a later process.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// `None` for bytes that no state has.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let state = SerializedState::<Sha256>::try_from(bytes).ok()?;
        Sha256::deserialize(&state).is_ok().then_some(Self(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_prints_as_it_parses() {
        let text = format!("sha256:{}", "ab".repeat(32));
        assert_eq!(text.parse::<Digest>().unwrap().to_string(), text);
    }

    #[test]
    fn hostile_digests_are_refused() {
        let upper = format!("sha256:{}", "AB".repeat(32));
        for bad in ["", "sha256:", "sha256:../../etc/passwd", "md5:00", upper.as_str(), "sha512:00"] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_algorithm_that_is_not_verified_is_told_from_nonsense() {
        let digest = format!("sha512:{}", "ab".repeat(64));
        let error = digest.parse::<Digest>().unwrap_err();
        assert!(matches!(error, DigestError::Unverified(_)), "{error}");
        assert!(error.to_string().contains("sha256 is the one"), "{error}");
        assert!(matches!("md5:00".parse::<Digest>(), Err(DigestError::Algorithm(_))));
    }

    #[test]
    fn chain_of_one_layer_is_the_layer() {
        let layer = DiffId(Digest::of(b"a"));
        assert_eq!(ChainId::of(&[layer]).unwrap().0, layer.0);
        assert_eq!(ChainId::of(&[]), None);
    }

    #[test]
    fn writer_counts_and_hashes_what_passed() {
        let mut writer = Sha256Writer::new(Vec::new());
        writer.write_all(b"hel").unwrap();
        assert_eq!((writer.digest(), writer.size_bytes()), (Digest::of(b"hel"), 3));
        writer.write_all(b"lo").unwrap();
        let (bytes, digest, size) = writer.finish();
        assert_eq!((bytes.as_slice(), digest, size), (&b"hello"[..], Digest::of(b"hello"), 5));
    }

    #[test]
    fn a_writer_goes_on_from_a_state_wherever_it_was_taken() {
        let bytes: Vec<u8> = (0..200).collect();
        for at in 0..bytes.len() {
            let mut begun = Sha256Writer::new(io::sink());
            begun.write_all(&bytes[..at]).unwrap();
            let kept = begun.state().as_bytes().to_vec();
            assert_eq!(kept.len(), Sha256State::LENGTH);
            let state = Sha256State::from_bytes(&kept).unwrap();
            assert_eq!(state, begun.state());
            let mut resumed = Sha256Writer::resume(io::sink(), &state, begun.size_bytes());
            resumed.write_all(&bytes[at..]).unwrap();
            let (_, digest, size_bytes) = resumed.finish();
            assert_eq!((digest, size_bytes), (Digest::of(&bytes), 200), "{at}");
        }
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let state = Sha256Writer::new(io::sink()).state().as_bytes().to_vec();
        assert_eq!(Sha256State::from_bytes(&state[1..]), None);
        assert_eq!(Sha256State::from_bytes(&[&state[..], &[0]].concat()), None);
        // More bytes wait for their block than a block has.
        let mut overfull = state;
        overfull[40] = 64;
        assert_eq!(Sha256State::from_bytes(&overfull), None);
    }
}
