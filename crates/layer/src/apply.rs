//! A layer tar becomes files below a root.

use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kiln_oci::DiffId;

use crate::beneath::BeneathError;
use crate::density::DensityError;
use crate::path::{self, EntryPath, PathError};
use crate::shape::Shape;
use crate::tar_read::TarReader;
use crate::unpack::{ImpliedDir, Meaning, Owner, Rules, Unpacker};

/// What becomes of whiteouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteouts {
    /// The root is an overlayfs upperdir: a 0:0 device hides a lower file,
    /// `trusted.overlay.opaque=y` a lower directory's content.
    Overlay,
    /// The root holds the lower files too: they are removed.
    Remove,
}

/// How much a tar may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Members.
    pub entries: u64,
    /// Bytes of the uncompressed tar.
    pub tar_size_bytes: u64,
    /// Bytes of one member's extension header.
    pub pax_size_bytes: u64,
    /// Bytes that may come out of a compressed stream before it is asked how small it was.
    pub free_bytes: u64,
}

/// What [`Limits::tar_size_bytes`] is the limit of.
pub const TAR_BYTES: &str = "bytes of tar";
/// What [`Limits::tar_size_bytes`] is the limit of, too: sparse files are longer than their tar.
pub const CONTENT_BYTES: &str = "bytes of content and holes";

impl Limits {
    /// For what somebody vouched for: a tar of up to so many bytes, however well it was packed.
    pub fn vouched(tar_size_bytes: u64) -> Self {
        let usual = Self::default();
        Self { tar_size_bytes, free_bytes: usual.free_bytes.max(tar_size_bytes), ..usual }
    }

    /// For what was checked before.
    pub fn checked() -> Self {
        // Sizes are added up.
        Self { entries: u64::MAX, ..Self::vouched(u64::MAX >> 1) }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 10_000_000, tar_size_bytes: 64 << 30, pax_size_bytes: 1 << 20, free_bytes: 1 << 30 }
    }
}

/// How to unpack.
pub struct ApplyOptions<'a> {
    /// What becomes of whiteouts.
    pub whiteouts: Whiteouts,
    /// Give files the owners in the tar; otherwise they belong to this process.
    pub keep_owner: bool,
    /// How much the tar may ask for.
    pub limits: Limits,
    /// Who reads the tar.
    pub reading: Reading,
    /// Set by somebody else to stop.
    pub cancel: &'a AtomicBool,
}

/// Who reads a tar, and with that decompresses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// Whoever unpacks it.
    InPlace,
    /// From the second mebibyte on a thread of its own, at most two mebibytes ahead. After an error the end waits for the
    /// read that it is in: for what does not stall.
    Ahead,
}

/// What was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Digest of the whole stream, bytes behind the end of the archive included.
    pub diff_id: DiffId,
    /// Size of the whole stream.
    pub tar_size_bytes: u64,
    /// Number of members.
    pub entries: u64,
    /// A member set mode and owner of the root directory itself.
    pub has_root: bool,
    /// The tar but for the content of files.
    pub shape: Shape,
    /// Of an upperdir: the directories that paths went through without an entry of their own, parents
    /// first, as far as the layers below may have something there. See [`inherit`](crate::inherit).
    pub implied: Vec<ImpliedDir>,
}

/// Why a tar was not unpacked. The root is left half done: throw it away.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The tar asks for something no layer may have: hostile, never retry.
    #[error("layer entry {entry} is refused: it {refusal}")]
    Refused {
        /// The member.
        entry: EntryPath,
        /// What it asks for.
        refusal: Refusal,
    },
    /// The tar is damaged or malformed.
    #[error("layer entry {entry} is broken: it {defect}")]
    Broken {
        /// The member; empty between members.
        entry: EntryPath,
        /// What is wrong.
        defect: Defect,
    },
    /// The tar asks for too much.
    #[error("the layer has {actual} {what}, {limit} are allowed")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
        /// How much there is.
        actual: u64,
    },
    /// The stream grows out of all proportion, or needs too much memory: hostile, never retry.
    #[error("the layer is not decompressed")]
    Density(#[source] DensityError),
    /// The stream could not be read or decompressed.
    #[error("cannot read the layer")]
    Input(#[source] io::Error),
    /// The kernel refused.
    #[error("{call} failed for layer entry {entry}")]
    Host {
        /// The system call.
        call: &'static str,
        /// The member.
        entry: EntryPath,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What no layer may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A path above the root.
    #[error("points outside the root file system")]
    Escapes,
    /// A link or file in place of the root.
    #[error("replaces the root directory")]
    ReplacesRoot,
    /// A whiteout of nothing, `.` or `..`.
    #[error("is a whiteout without a name")]
    Whiteout,
    /// A character device 0:0, overlayfs's own whiteout.
    #[error("is a device that hides files")]
    OverlayDevice,
}

/// What is wrong with a tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Defect {
    /// The stream ends too early.
    #[error("is cut off")]
    Truncated,
    /// The header's checksum is wrong.
    #[error("has a wrong checksum")]
    Checksum,
    /// A zero block that is not the end.
    #[error("follows a zero block")]
    LoneZeroBlock,
    /// A number that is none, or out of range.
    #[error("has an unusable {0}")]
    Number(&'static str),
    /// Malformed PAX records.
    #[error("has malformed extension records")]
    Pax,
    /// An attribute name the kernel does not take.
    #[error("has an unusable attribute name")]
    XattrName,
    /// An attribute value the kernel does not take.
    #[error("has an unusable attribute value")]
    XattrValue,
    /// A sparse file in a format after those that GNU tar is known to write.
    #[error("is a sparse file of an unknown format")]
    SparseFormat,
    /// A sparse file whose segments overlap, are out of order or do not fit its sizes; or a map of
    /// them that cannot be read.
    #[error("has an unusable map of its segments")]
    SparseMap,
    /// A member type nobody knows.
    #[error("has the unknown type {}", .0.escape_ascii())]
    Type(u8),
    /// A path that cannot be used.
    #[error("{0}")]
    Path(PathError),
    /// A symbolic link that leads nowhere: empty, too long, or with a NUL.
    #[error("has an unusable link target")]
    LinkTarget,
    /// A hard link to something not unpacked before it.
    #[error("is a hard link to something that is not there")]
    LinkMissing,
    /// A hard link to a directory.
    #[error("is a hard link to a directory")]
    LinkToDirectory,
    /// A parent that is a file.
    #[error("has a parent that is not a directory")]
    ParentNotDirectory,
}

/// Unpacks the uncompressed `tar` below `root` and returns its digest.
///
/// Members replace what is there, the last one of a name wins; missing parents are made 0755 0:0 with
/// the time 0.
/// Of extended attributes `security.capability`, `user.*` and POSIX ACLs are kept, never
/// overlayfs's own. With [`Whiteouts::Overlay`] the root should be fresh and reachable by nobody
/// else.
pub fn apply(
    tar: impl Read + Send,
    root: BorrowedFd<'_>,
    options: &ApplyOptions<'_>,
) -> Result<Applied, ApplyError> {
    let rules = Rules {
        meaning: Meaning::Layer(options.whiteouts),
        owner: if options.keep_owner { Owner::Tar } else { Owner::Process },
        cancel: options.cancel,
    };
    let unpacker = Unpacker::new(root, rules);
    match options.reading {
        Reading::InPlace => unpack(tar, unpacker, options.limits),
        Reading::Ahead => thread::scope(|scope| {
            unpack_members(TarReader::ahead(scope, tar, options.limits), unpacker, options.limits)
        }),
    }
}

/// Unpacks with any rules: a layer, or an archive.
pub(crate) fn unpack(tar: impl Read, unpacker: Unpacker<'_>, limits: Limits) -> Result<Applied, ApplyError> {
    unpack_members(TarReader::new(tar, limits), unpacker, limits)
}

fn unpack_members(
    mut reader: TarReader<'_>,
    mut unpacker: Unpacker<'_>,
    limits: Limits,
) -> Result<Applied, ApplyError> {
    let rules = unpacker.rules();
    let (mut entries, mut has_root) = (0, false);
    while let Some(mut member) = reader.next()? {
        if rules.cancel.load(Ordering::Relaxed) {
            return Err(ApplyError::Cancelled);
        }
        entries += 1;
        if entries > limits.entries {
            return Err(ApplyError::Limit { what: "entries", limit: limits.entries, actual: entries });
        }
        let path = rules.clean(&member.path, &member.path)?;
        has_root |= path.is_empty();
        member.xattrs.retain(|name, _| is_kept_xattr(name));
        let (parent, name) = path::split(&path);
        let marker = match rules.meaning {
            Meaning::Layer(_) => whiteout(&path, name)?,
            Meaning::Archive => None,
        };
        match marker {
            None => unpacker.unpack(&mut reader, &path, &member)?,
            Some(Marker::Ignored) => {}
            Some(Marker::Opaque) => unpacker.make_opaque(parent)?,
            Some(Marker::Hides(hidden)) => unpacker.hide(parent, hidden)?,
        }
    }
    let implied = unpacker.finish()?;
    let (digest, tar_size_bytes, shape) = reader.finish()?;
    Ok(Applied { diff_id: DiffId(digest), tar_size_bytes, entries, has_root, implied, shape })
}

enum Marker<'n> {
    Opaque,
    Hides(&'n [u8]),
    /// aufs left `.wh..wh.plnk` and its like in old images.
    Ignored,
}

/// What a name means by `.wh.` (OCI image-spec, layer.md, "Whiteouts").
fn whiteout<'n>(path: &[u8], name: &'n [u8]) -> Result<Option<Marker<'n>>, ApplyError> {
    let Some(hidden) = name.strip_prefix(b".wh.") else { return Ok(None) };
    match hidden {
        b".wh..opq" => Ok(Some(Marker::Opaque)),
        b"" | b"." | b".." => Err(ApplyError::Refused { entry: path.into(), refusal: Refusal::Whiteout }),
        _ if hidden.starts_with(b".wh.") => Ok(Some(Marker::Ignored)),
        hidden => Ok(Some(Marker::Hides(hidden))),
    }
}

/// Whether layers carry this attribute.
pub(crate) fn is_kept_xattr(name: &[u8]) -> bool {
    let allowed = name.starts_with(b"user.")
        || matches!(name, b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default");
    allowed && !crate::node::is_private_xattr(name)
}

impl ApplyError {
    /// What it means that the stream could not be read.
    pub(crate) fn input(error: io::Error) -> Self {
        match DensityError::of(&error) {
            Some(density) => Self::Density(density),
            None => Self::Input(error),
        }
    }
}

impl From<BeneathError> for ApplyError {
    fn from(error: BeneathError) -> Self {
        match error {
            BeneathError::Path { path, source } => Self::Broken { entry: path, defect: Defect::Path(source) },
            BeneathError::Host { path, source, .. } if source.kind() == io::ErrorKind::NotADirectory => {
                Self::Broken { entry: path, defect: Defect::ParentNotDirectory }
            }
            BeneathError::Host { call, path, source } => Self::Host { call, entry: path, source },
        }
    }
}

#[cfg(test)]
mod tests;
