//! What containers are called.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use kiln_oci::ActiveKey;
use serde::{Deserialize, Serialize};

/// Name of a container that nobody chose: 64 hexadecimal digits, also the key of its writable layer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl ContainerId {
    /// A new one.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 32];
        random_bytes(&mut bytes)?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// All of it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As users see it: 12 digits.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }

    /// The key of the container's writable layer.
    pub fn key(&self) -> ActiveKey {
        self.0.parse().expect("64 hexadecimal digits are a key")
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ContainerId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if fits { Ok(Self(text.to_owned())) } else { Err(format!("{text:?} is no container ID")) }
    }
}

impl TryFrom<String> for ContainerId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> String {
        id.0
    }
}

pub(crate) fn random_bytes(bytes: &mut [u8]) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(bytes)
}

const ADJECTIVES: [&str; 48] = [
    "amber", "baked", "blue", "brisk", "bronze", "calm", "clear", "coarse", "cobalt", "copper", "crisp",
    "dry", "dusty", "early", "even", "fine", "firm", "fresh", "glazed", "glossy", "golden", "green",
    "hollow", "humble", "ivory", "keen", "late", "light", "lucid", "matte", "mellow", "mild", "neat",
    "ochre", "pale", "plain", "quick", "quiet", "round", "rustic", "sandy", "smooth", "solid", "steady",
    "tall", "tidy", "warm", "white",
];

const NOUNS: [&str; 48] = [
    "amphora", "anvil", "ash", "basin", "beaker", "bellows", "bisque", "bowl", "brick", "chalice",
    "charcoal", "clay", "cone", "crock", "cup", "dish", "ember", "ewer", "flagon", "flame", "flue", "forge",
    "glaze", "hearth", "jar", "jug", "kettle", "ladle", "loam", "mortar", "mug", "oven", "pestle", "pitcher",
    "plate", "pot", "saucer", "shard", "sherd", "slip", "spark", "spout", "stove", "tile", "tray", "urn",
    "vase", "wheel",
];

/// A name for a container that was given none; another one each time, though not surely.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn random_name(with_number: bool) -> io::Result<String> {
    let mut bytes = [0; 6];
    random_bytes(&mut bytes)?;
    let pick = |words: &[&'static str], byte: u8| words[usize::from(byte) % words.len()];
    let name = format!("{}_{}", pick(&ADJECTIVES, bytes[0]), pick(&NOUNS, bytes[1]));
    if !with_number {
        return Ok(name);
    }
    Ok(format!("{name}{}", u16::from_le_bytes([bytes[2], bytes[3]])))
}

/// Whether users may give this name: docker's rule.
pub fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && text.len() > 1
        && text.len() <= 255
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_keys_and_names_are_names() {
        let (one, other) = (ContainerId::random().unwrap(), ContainerId::random().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.key().as_str(), one.as_str());
        assert_eq!(one.as_str().parse::<ContainerId>().unwrap(), one);
        assert!("0123".parse::<ContainerId>().is_err());
        assert!(is_name(&random_name(true).unwrap()) && is_name(&random_name(false).unwrap()));
        for bad in ["", "a", "-ab", "a/b", "a b", ".ab", "ä1"] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
