//! Names of file trees.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Name of a committed snapshot: 1 to 64 characters of `a-z 0-9 -`, safe as a file name.
///
/// Layers are lazy, so a snapshot exists before anybody knows its diff ID; that is why it has a
/// name of its own instead of its chain ID (`docs/adr/0001-snapshot-ids.md`).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(String);

/// Name of a snapshot somebody is writing to; same alphabet as [`SnapshotId`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ActiveKey(String);

/// The text is not usable as a snapshot's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a snapshot name (1 to 64 of a-z, 0-9 and -)")]
pub struct SnapshotIdError(String);

fn check(text: &str) -> Result<(), SnapshotIdError> {
    let known = |b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-');
    if (1..=64).contains(&text.len()) && text.bytes().all(known) {
        Ok(())
    } else {
        Err(SnapshotIdError(text.chars().take(80).collect()))
    }
}

macro_rules! name {
    ($name:ident) => {
        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = SnapshotIdError;

            fn from_str(text: &str) -> Result<Self, SnapshotIdError> {
                check(text).map(|()| Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = SnapshotIdError;

            fn try_from(text: String) -> Result<Self, SnapshotIdError> {
                check(&text).map(|()| Self(text))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

name!(SnapshotId);
name!(ActiveKey);
