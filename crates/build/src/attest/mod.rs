//! What a build says of an image, beside the image: where it comes from, and what is in it.
//!
//! Read [`Attestations`] first (what users ask for), then `materials.rs` and `provenance.rs` (where it comes from),
//! and `statement.rs` (what wraps both). What is in an image is found by `crate::sbom`; how statements stand beside
//! an image is in `export/attestation.rs`, and how they are read again in `registry/copy/said.rs`. Decided in
//! `docs/adr/0039-attestations.md`.
//!
//! # Invariants
//! - Who does not ask for it gets nothing of it, and pays nothing for it.
//! - The same build says the same: no clock, no random number, no path of this machine.
//! - All that provenance says has passed [`Mask`]: no secret, and no password out of a URL.

mod mask;
mod materials;
mod provenance;
mod spec;
mod statement;

pub use spec::{Attestations, Place, ProvenanceMode, ProvenanceSpec, SbomSpec};

pub(crate) use materials::{Found, Stood, of_git};
pub(crate) use spec::is_file_name;
pub(crate) use statement::{Body, Predicate, Subject, statement};

use kiln_llb::Definition;
use kiln_oci::Reference;

use self::mask::Mask;
use self::provenance::{Facts, provenance};
use crate::build::Plan;
use crate::platforms::{Product, Target};
use crate::sbom;
use crate::{BuildCancel, BuildError, BuildRequest, Engine};

/// What is to be said of `product`. Reads its files for what is in it, unless they were read before.
///
/// # Errors
/// [`BuildError::Unreadable`] when its files cannot be read; [`BuildError::Cancelled`].
pub(crate) fn predicates(
    engine: &Engine,
    request: &BuildRequest,
    plan: &Plan,
    (target, product): (&Target, &Product),
    cancel: &BuildCancel,
    notes: &mut Vec<String>,
) -> Result<Vec<Predicate>, BuildError> {
    let Attestations { provenance: asked, sbom } = &request.attestations;
    let mut said = Vec::new();
    if let Some(spec) = asked {
        let definition: &Definition = &plan.lowered.definition;
        let mask = Mask::of(request, definition)?;
        let (stood, found) = (&plan.stood, &plan.shared.found);
        let facts = Facts { request, plan, definition, target, stood, found, mask: &mask };
        let body = Body::Provenance(provenance(spec, &facts));
        said.push(Predicate { kind: provenance::KIND, body, place: spec.place.or("provenance.json") });
    }
    if let Some(SbomSpec { place }) = sbom {
        let contents = sbom::contents(engine, product.top.as_ref(), cancel)?;
        for note in &contents.notes {
            if !notes.contains(note) {
                notes.push(note.clone());
            }
        }
        let name = request.tags.first().map(Reference::familiar);
        let document = sbom::document(&contents, name.as_deref(), &product.platform, product.created_unix());
        let place = place.or("sbom.spdx.json");
        said.push(Predicate { kind: sbom::KIND, body: Body::Sbom(Box::new(document)), place });
    }
    Ok(said)
}
