//! `kiln inspect`

use kiln_build::registry::{StoredAttestation, said_of};
use kiln_oci::Reference;
use serde_json::{Value, json};

use super::print;
use crate::args::NamesArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &NamesArgs) -> Result<u8, Failure> {
    let shown = documents(session, args)?;
    let text = serde_json::to_string_pretty(&shown).map_err(|error| Failure::store(error.to_string()))?;
    print(&format!("{text}\n"))?;
    Ok(0)
}

/// What there is to be shown of images.
pub(super) fn documents(session: &Session, args: &NamesArgs) -> Result<Vec<Value>, Failure> {
    let mut shown = Vec::new();
    for name in &args.names {
        let image = session.find(name)?;
        let config = session.config(&image)?;
        let names: Vec<String> =
            session.engine.store.names_of(&image.config)?.iter().map(Reference::familiar).collect();
        // One that cannot be read is a matter of `kiln fsck`.
        let attested = said_of(&session.engine, &image).unwrap_or_default();
        let (index, said) = attested.map_or((None, Vec::new()), |said| (Some(said.root), said.all));
        let said: Vec<Value> = said.iter().map(attestation).collect();
        let mut document = json!({
            "Id": image.config,
            "RepoTags": names,
            "Created": config.created,
            "Author": config.author.unwrap_or_default(),
            "Architecture": config.architecture,
            "Os": config.os,
            "Size": image.size_bytes,
            "Config": config.config,
            "RootFS": { "Type": config.rootfs.kind, "Layers": config.rootfs.diff_ids },
            "Manifest": image.manifest,
        });
        // What most images have none of.
        if let (Some(index), Some(document)) = (index, document.as_object_mut()) {
            document.insert("Index".to_owned(), json!(index));
            document.insert("Attestations".to_owned(), json!(said));
        }
        shown.push(document);
    }
    Ok(shown)
}

/// A statement about the image, or about one that its index has beside it.
pub(super) fn attestation(said: &StoredAttestation) -> Value {
    json!({
        "Platform": said.platform.as_ref().map(ToString::to_string),
        "Manifest": said.manifest,
        "PredicateType": said.predicate_type,
        "Digest": said.statement.digest,
        "Size": said.statement.size,
    })
}
