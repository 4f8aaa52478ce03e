//! What refers to an image, for users to see: signatures, bills of materials, whatever somebody has attached to it.

use std::sync::Arc;

use kiln_oci::document::DocumentError;
use kiln_oci::image::{Descriptor, media_type};
use kiln_oci::{Digest, document};

use super::source::Source;
use super::tree::Tree;
use super::{Place, Which};
use crate::load::blob_name;
use crate::load_oci::check_depth;
use crate::registry::Registries;
use crate::{BuildCancel, BuildError, Engine};

/// Looks at lists; nobody reads more. A registry may say of anything that it refers to anything.
const MAX_LOOKS: usize = 1000;

/// What refers to an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Referrers {
    /// Digest of the image's manifest or index.
    pub subject: Digest,
    /// What refers to that.
    pub referrers: Vec<Referrer>,
}

/// A manifest that refers to another one.
#[derive(Debug, Clone, PartialEq)]
pub struct Referrer {
    /// Points to it, and says what it is.
    pub descriptor: Descriptor,
    /// What refers to it in its turn: a signature of a bill of materials.
    pub referrers: Vec<Referrer>,
}

/// What refers to the image `of`, and what refers to that. [`Which::All`] and [`Which::Own`] are what the name leads to;
/// [`Which::Platform`] is the image of one platform in it.
///
/// Costs a request or two for each of them.
///
/// # Errors
/// [`BuildError::Registry`], [`BuildError::NoPlatform`], [`BuildError::Archive`]; for more than four that refer to
/// one another.
pub fn referrers(
    engine: &Engine,
    registries: &Arc<Registries>,
    (of, which): (&Place, &Which),
    cancel: &BuildCancel,
) -> Result<Referrers, BuildError> {
    let (mut source, _abort) = Source::open(engine, registries, of, cancel)?;
    let subject = match which {
        Which::All | Which::Own => source.root.digest,
        Which::Platform(_) => Tree::read(&source, which)?.root()?.digest,
    };
    source.look_for_referrers()?;
    let mut looks_left = MAX_LOOKS;
    Ok(Referrers { subject, referrers: look(&source, &subject, 0, &mut looks_left)? })
}

fn look(
    source: &Source,
    subject: &Digest,
    depth: usize,
    looks_left: &mut usize,
) -> Result<Vec<Referrer>, BuildError> {
    check_depth(&source.archive, &Descriptor::new(media_type::OCI_MANIFEST, *subject, 0), depth)?;
    *looks_left = looks_left.checked_sub(1).ok_or_else(|| {
        let too_many = DocumentError::TooMany { what: "referrers", limit: MAX_LOOKS };
        source.archive.refused(&blob_name(subject), too_many)
    })?;
    let mut found = Vec::new();
    for descriptor in source.referrers(subject)? {
        let kind = descriptor.media_type.as_str();
        let is_subject = document::is_manifest(kind) || document::is_index(kind);
        let referrers = match is_subject {
            true => look(source, &descriptor.digest, depth + 1, looks_left)?,
            false => Vec::new(),
        };
        found.push(Referrer { descriptor, referrers });
    }
    Ok(found)
}
