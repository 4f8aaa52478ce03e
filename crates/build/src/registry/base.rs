//! The images that a build stands on: of the store, or of a registry, which may keep their layers for now.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use kiln_content::ImageRecord;
use kiln_oci::{Digest, Platform, Reference};
use kiln_registry::Which;

use super::Registries;
use super::pull::{Found, Naming, Root, look_up, pull_layers, remember, remembered};
use super::resolved::Resolved;
use super::stored::{Stored, behind_digest, stored};
use crate::engine::now_unix;
use crate::platforms::stored_platform;
use crate::{BuildCancel, BuildError, Engine};

/// When a build asks registries for the images that it stands on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// For each tag, each time.
    Always,
    /// For those that are not in the store.
    #[default]
    Missing,
    /// Not at all.
    Never,
}

impl FromStr for PullPolicy {
    type Err = String;

    /// docker's `true` and `false` are `always` and `missing`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "always" | "true" | "1" => Ok(Self::Always),
            "missing" | "false" | "0" => Ok(Self::Missing),
            "never" => Ok(Self::Never),
            _ => Err(format!("{text:?} is none of always, missing, never")),
        }
    }
}

/// Where a build takes the images from that it stands on.
#[derive(Debug, Clone, Default)]
pub struct Bases {
    /// When registries are asked.
    pub policy: PullPolicy,
    /// With [`PullPolicy::Missing`]: a tag that was pulled longer ago than this is looked up again. `None`:
    /// what is in the store is good for ever.
    pub tag_life: Option<Duration>,
    /// `None`: there is only the store.
    pub registries: Option<Arc<Registries>>,
}

impl Bases {
    /// The registries that may be asked; `None`: nobody.
    pub(crate) fn asked(&self) -> Option<&Arc<Registries>> {
        self.registries.as_ref().filter(|_| self.policy != PullPolicy::Never)
    }
}

/// What names led to when a build asked registries. Each is asked for once, and is one image for all platforms.
#[derive(Debug, Default)]
pub(crate) struct Led(BTreeMap<Reference, Digest>);

impl Led {
    pub(crate) fn of(&self, reference: &Reference) -> Option<Digest> {
        self.0.get(reference).copied()
    }

    fn note(&mut self, reference: &Reference, root: Digest) {
        self.0.insert(reference.clone(), root);
    }
}

/// An image that a build stands on.
#[derive(Clone)]
pub(crate) enum Base {
    /// It is in the store.
    Here(Stored),
    /// A registry has it, and what its documents say is known.
    There(Arc<Resolved>),
}

impl Base {
    /// What the name led to and when that was, if it came from a registry.
    pub(crate) fn led_to(
        &self,
        engine: &Engine,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<Option<(Digest, i64)>, BuildError> {
        match self {
            Self::Here(here) => remembered(engine, reference, platform, &here.image),
            Self::There(resolved) => Ok(Some((resolved.root, resolved.at_unix))),
        }
    }

    /// The name leads to it still.
    fn confirm(
        &self,
        engine: &Engine,
        reference: &Reference,
        platform: &Platform,
        digest: Digest,
    ) -> Result<(), BuildError> {
        match self {
            Self::Here(here) => remember(engine, reference, platform, &here.image, digest),
            Self::There(resolved) => {
                resolved.keep(engine);
                Ok(())
            }
        }
    }
}

/// How much of an image has to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// All of it.
    Files,
    /// What its documents say. The rest is pulled when somebody reads it.
    Documents,
}

/// The image that `reference` means to a build for `platform`, with its files; `None`: there is none, and nobody was
/// to be asked.
/// `note` hears what deserves a look.
///
/// With [`PullPolicy::Missing`] and no life of tags this costs one look-up for what is in the store.
///
/// # Errors
/// [`BuildError::Registry`] when the registry was asked in vain, and those of [`pull`](super::pull()).
pub fn base_image(
    engine: &Engine,
    bases: &Bases,
    reference: &Reference,
    platform: &Platform,
    cancel: &BuildCancel,
    note: &mut dyn FnMut(String),
) -> Result<Option<ImageRecord>, BuildError> {
    let known = stored(engine, reference, platform, cancel)?.map(Base::Here);
    let image = (reference, platform);
    match find(engine, bases, image, (known, Wanted::Files), &mut Led::default(), cancel, note)? {
        Some(Base::Here(here)) => Ok(Some(here.image)),
        Some(Base::There(_)) => Err(BuildError::Bug { what: "an image was not pulled".to_owned() }),
        None => Ok(None),
    }
}

/// The same, of which no more than the documents need be there: no layer comes for it, unless its name had another
/// image before. What the build has asked before is in `led`.
///
/// # Errors
/// As [`base_image`].
pub(crate) fn resolve_base(
    engine: &Engine,
    bases: &Bases,
    reference: &Reference,
    platform: &Platform,
    led: &mut Led,
    cancel: &BuildCancel,
    note: &mut dyn FnMut(String),
) -> Result<Option<Base>, BuildError> {
    let known = known_base(engine, reference, platform, cancel)?;
    find(engine, bases, (reference, platform), (known, Wanted::Documents), led, cancel, note)
}

/// The same for a name that stands for the manifest or index `digest`, whatever it leads to now. The registry is asked
/// only for what the store does not have, whatever the policy says.
///
/// # Errors
/// As [`base_image`].
pub(crate) fn pinned_base(
    engine: &Engine,
    bases: &Bases,
    (reference, digest): (&Reference, Digest),
    platform: &Platform,
    led: &mut Led,
    cancel: &BuildCancel,
    note: &mut dyn FnMut(String),
) -> Result<Option<Base>, BuildError> {
    let exact = reference.with_digest(digest);
    if let Some(known) = known_base(engine, &exact, platform, cancel)? {
        return Ok(Some(known));
    }
    // A tag of the store says what the tag led to when it was pulled, and this may be something else.
    if let Some(known) = known_base(engine, reference, platform, cancel)?
        && known.led_to(engine, reference, platform)?.is_some_and(|(root, _)| root == digest)
    {
        // Its own name stays with it when the tag moves on.
        if let Base::Here(here) = &known {
            naming(engine, &exact, platform)?.settle(engine, &exact, platform, &here.image, digest)?;
        }
        return Ok(Some(known));
    }
    resolve_base(engine, bases, &exact, platform, led, cancel, note)
}

/// What `reference` leads to in its registry now: one HEAD, and none for what the build has asked before.
///
/// # Errors
/// [`BuildError::Registry`].
pub(crate) fn newest(
    registries: &Registries,
    reference: &Reference,
    led: &mut Led,
    cancel: &BuildCancel,
) -> Result<Digest, BuildError> {
    if let Some(root) = led.of(reference) {
        return Ok(root);
    }
    let repository = registries.repository(reference);
    let root = registries.wait(cancel, repository.resolve(Which::from(reference)))?.digest;
    led.note(reference, root);
    Ok(root)
}

/// What is known of `reference` for `platform` without asking anybody. Costs what [`stored`] does, and a file for what
/// is not in the store; for what is named by a digest, some documents the first time.
///
/// # Errors
/// As [`stored`].
pub(crate) fn known_base(
    engine: &Engine,
    reference: &Reference,
    platform: &Platform,
    cancel: &BuildCancel,
) -> Result<Option<Base>, BuildError> {
    let stored = stored(engine, reference, platform, cancel)?.map(Base::Here);
    match stored.or_else(|| noted(engine, reference, platform)) {
        Some(known) => Ok(Some(known)),
        None => Ok(behind_digest(engine, reference, platform)?.map(Base::Here)),
    }
}

/// The same where nothing is to be made: the image that has the name, for whatever platform.
///
/// # Errors
/// Those of the store.
pub(crate) fn seen_base(
    engine: &Engine,
    reference: &Reference,
    platform: &Platform,
) -> Result<Option<Base>, BuildError> {
    let named = engine.store.resolve(reference)?.map(|image| Base::Here(Stored::unread(image)));
    Ok(named.or_else(|| noted(engine, reference, platform)))
}

fn noted(engine: &Engine, reference: &Reference, platform: &Platform) -> Option<Base> {
    Resolved::find(engine, reference, platform).map(|resolved| Base::There(Arc::new(resolved)))
}

/// What a name means to users does not change because a build needs it for another platform.
pub(super) fn naming(
    engine: &Engine,
    reference: &Reference,
    platform: &Platform,
) -> Result<Naming, BuildError> {
    Ok(match engine.store.resolve(reference)? {
        Some(named) if !stored_platform(engine, &named, platform)?.1 => Naming::Keep,
        None if *platform != Platform::host() => Naming::Keep,
        _ => Naming::Set,
    })
}

fn find(
    engine: &Engine,
    bases: &Bases,
    (reference, platform): (&Reference, &Platform),
    (known, wanted): (Option<Base>, Wanted),
    led: &mut Led,
    cancel: &BuildCancel,
    note: &mut dyn FnMut(String),
) -> Result<Option<Base>, BuildError> {
    let Some(registries) = bases.asked() else { return Ok(known) };
    // What a digest names is what it is.
    let fixed = reference.digest().is_some();
    let (may_be_old, known) = match (known, bases.policy) {
        (Some(known), _) if fixed => return Ok(Some(known)),
        (Some(known), PullPolicy::Always) => (false, Some(known)),
        (Some(known), _) => {
            let Some(life) = bases.tag_life else { return Ok(Some(known)) };
            // Made here, loaded or imported: no registry has it.
            let Some((_, when)) = known.led_to(engine, reference, platform)? else {
                return Ok(Some(known));
            };
            let age = now_unix().saturating_sub(when);
            if u64::try_from(age).is_ok_and(|age| age < life.as_secs()) {
                return Ok(Some(known));
            }
            (true, Some(known))
        }
        (None, _) => (false, None),
    };
    let found = ask(engine, registries, (reference, platform), (known.as_ref(), wanted), led, cancel);
    registries.client().take_notes().into_iter().for_each(&mut *note);
    match (found, known) {
        (Ok(image), _) => Ok(Some(image)),
        (Err(BuildError::Cancelled), _) => Err(BuildError::Cancelled),
        // Old is better than nothing where nobody insists.
        (Err(BuildError::Registry(error)), Some(known)) if may_be_old => {
            note(format!("{} may have changed since it was pulled: {error}", reference.familiar()));
            Ok(Some(known))
        }
        (Err(error), _) => Err(error),
    }
}

/// The image that the registry has now; it comes, as far as it is wanted, if `known` is another.
fn ask(
    engine: &Engine,
    registries: &Arc<Registries>,
    (reference, platform): (&Reference, &Platform),
    (known, wanted): (Option<&Base>, Wanted),
    led: &mut Led,
    cancel: &BuildCancel,
) -> Result<Base, BuildError> {
    let earlier = led.of(reference);
    if let Some(known) = known
        && let Some((digest, _)) = known.led_to(engine, reference, platform)?
        && newest(registries, reference, led, cancel)? == digest
    {
        known.confirm(engine, reference, platform, digest)?;
        return Ok(known.clone());
    }
    // A name of the store leads to one image: while the old one had it, the next build would stand on that again.
    let may_wait = wanted == Wanted::Documents && !matches!(known, Some(Base::Here(_)));
    let naming = naming(engine, reference, platform)?;
    // What another platform of the build stands on is what this one stands on, too, wherever the tag has gone meanwhile.
    let fixed = reference.digest().copied().or(earlier);
    let root = match &fixed {
        Some(digest) => Root::of_digest(engine, digest)?,
        None => Root::At(Which::from(reference)),
    };
    let found = look_up(engine, registries, reference, platform, naming, root, cancel)?;
    led.note(reference, found.root());
    match found {
        Found::Here(pulled) => Ok(Base::Here(Stored::unread(pulled.image))),
        Found::There(resolved) if may_wait && !resolved.is_here(engine)? => {
            resolved.keep(engine);
            Ok(Base::There(resolved))
        }
        Found::There(resolved) => {
            let pulled = pull_layers(engine, registries, &resolved, naming, cancel, &|_| {})?;
            Ok(Base::Here(Stored::read(pulled.image, resolved.config().clone())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_words_for_policies_are_known() {
        for (text, policy) in
            [("always", PullPolicy::Always), ("true", PullPolicy::Always), ("never", PullPolicy::Never)]
        {
            assert_eq!(text.parse(), Ok(policy));
        }
        assert_eq!("false".parse(), Ok(PullPolicy::default()));
        assert!("newer".parse::<PullPolicy>().is_err());
    }
}
