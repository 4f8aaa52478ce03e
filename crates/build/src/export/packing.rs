//! How layers are packed for others.

use std::fmt;
use std::str::FromStr;

use kiln_layer::{Codec, CodecError};

/// How a layer is written: everything its bytes depend on besides its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Packing {
    /// A tar through a compressor.
    Stream(Codec),
    /// Gzip whose files can be fetched one by one. The tar inside is another one, and so is the image.
    Estargz {
        /// As gzip's.
        level: u32,
    },
}

/// A packing that there is not, or a level that it has not.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PackingError {
    /// No such name.
    #[error("{0:?} is none of uncompressed, gzip, zstd, estargz")]
    Name(String),
    /// Beyond its levels.
    #[error(transparent)]
    Level(#[from] CodecError),
}

impl Packing {
    /// What most registries and runtimes expect.
    pub const GZIP: Self = Self::Stream(Codec::GZIP);
    /// As gzip is, cut for lazy pulls.
    const ESTARGZ: Self = Self::Estargz { level: Codec::GZIP_LEVEL };
    /// What a cache is packed with: smaller than gzip, and several times faster both ways.
    pub(crate) const ZSTD: Self = Self::Stream(Codec::ZSTD);
    /// No compression.
    pub const UNCOMPRESSED: Self = Self::Stream(Codec::Uncompressed);

    fn with_level(self, level: i64) -> Result<Self, PackingError> {
        Ok(match self {
            // zstd's own word for "as when nobody says".
            Self::Stream(Codec::Zstd { .. }) if level == 0 => Self::Stream(Codec::ZSTD),
            Self::Stream(codec) => Self::Stream(codec.with_level(level)?),
            Self::Estargz { .. } => match Codec::GZIP.with_level(level)? {
                Codec::Gzip { level } => Self::Estargz { level },
                _ => self,
            },
        })
    }

    /// Whether docker's media types have no word for it.
    pub(crate) fn needs_oci(self) -> bool {
        matches!(self, Self::Stream(Codec::Zstd { .. }) | Self::Estargz { .. })
    }
}

impl FromStr for Packing {
    type Err = PackingError;

    fn from_str(name: &str) -> Result<Self, PackingError> {
        match name {
            "estargz" => Ok(Self::ESTARGZ),
            _ => name.parse().map(Self::Stream).map_err(|_| PackingError::Name(name.to_owned())),
        }
    }
}

/// `gzip:6`.
impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream(codec) => codec.fmt(f),
            Self::Estargz { level } => write!(f, "estargz:{level}"),
        }
    }
}

/// What somebody asks of the layers that leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compress {
    /// For layers made here, and with `force` for all.
    pub packing: Packing,
    /// The level was asked for, not taken by default.
    pub level_given: bool,
    /// Layers that came from elsewhere are packed anew when they are packed in another way. Without
    /// it they leave as they came, byte for byte.
    pub force: bool,
}

impl Compress {
    /// `packing` as nobody asked for anything.
    pub fn new(packing: Packing) -> Self {
        Self { packing, level_given: false, force: false }
    }

    /// Out of options; `default` stands for a name that was not given.
    ///
    /// # Errors
    /// [`PackingError`].
    pub fn of_options(
        name: Option<&str>,
        level: Option<i64>,
        force: bool,
        default: Packing,
    ) -> Result<Self, PackingError> {
        let packing = name.map_or(Ok(default), str::parse)?;
        let packing = level.map_or(Ok(packing), |level| packing.with_level(level))?;
        Ok(Self { packing, level_given: level.is_some(), force })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_levels_make_a_packing() {
        let of = |name, level| Compress::of_options(name, level, false, Packing::GZIP);
        let shown = |name, level| of(name, level).map(|compress| compress.packing.to_string());
        assert_eq!(shown(None, None).unwrap(), Packing::GZIP.to_string());
        assert_eq!(shown(None, Some(9)).unwrap(), "gzip:9");
        assert_eq!(shown(Some("estargz"), Some(3)).unwrap(), "estargz:3");
        assert_eq!(shown(Some("zstd"), Some(0)).unwrap(), "zstd:3");
        assert_eq!(shown(Some("uncompressed"), Some(5)).unwrap(), "uncompressed");
        let wrong = shown(Some("gzip"), Some(12)).unwrap_err().to_string();
        assert_eq!(wrong, "gzip has levels 0 to 9, not 12");
        let wrong = shown(Some("lz4"), None).unwrap_err().to_string();
        assert_eq!(wrong, "\"lz4\" is none of uncompressed, gzip, zstd, estargz");
        assert!(of(None, Some(1)).unwrap().level_given && !of(None, None).unwrap().level_given);
    }
}
