//! The images that a build stands on: of the store, or of a registry.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use kiln_content::ImageRecord;
use kiln_oci::{Platform, Reference};
use kiln_registry::Which;

use super::Registries;
use super::pull::{Naming, pull_as, remember, remembered};
use super::stored::stored_image;
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

/// The image that `reference` means to a build for `platform`; `None`: there is none, and nobody was to be asked.
/// `note` hears what deserves a look.
///
/// With [`PullPolicy::Missing`] and no life of tags this costs one look-up for what is in the store.
///
/// # Errors
/// [`BuildError::Pull`] when the registry was asked in vain.
pub fn base_image(
    engine: &Engine,
    bases: &Bases,
    reference: &Reference,
    platform: &Platform,
    cancel: &BuildCancel,
    note: &mut dyn FnMut(String),
) -> Result<Option<ImageRecord>, BuildError> {
    let known = stored_image(engine, reference, platform, cancel)?;
    let Some(registries) = bases.registries.as_ref().filter(|_| bases.policy != PullPolicy::Never) else {
        return Ok(known);
    };
    // What a digest names is what it is.
    let fixed = reference.digest().is_some();
    let (may_be_old, known) = match (known, bases.policy) {
        (Some(known), _) if fixed => return Ok(Some(known)),
        (Some(known), PullPolicy::Always) => (false, Some(known)),
        (Some(known), _) => {
            let Some(life) = bases.tag_life else { return Ok(Some(known)) };
            // Made here, loaded or imported: no registry has it.
            let Some((_, when)) = remembered(engine, reference, platform, &known)? else {
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
    let found = look_up(engine, registries, reference, platform, known.as_ref(), cancel);
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

/// The image that the registry has now, pulled if `known` is another.
fn look_up(
    engine: &Engine,
    registries: &Arc<Registries>,
    reference: &Reference,
    platform: &Platform,
    known: Option<&ImageRecord>,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    if let Some(known) = known
        && let Some((digest, _)) = remembered(engine, reference, platform, known)?
    {
        let repository = registries.repository(reference);
        let now = registries.wait(cancel, repository.resolve(Which::from(reference)))?;
        if now.digest == digest {
            remember(engine, reference, platform, known, digest)?;
            return Ok(known.clone());
        }
    }
    // What a name means to users does not change because a build needs it for another platform.
    let naming = match engine.store.resolve(reference)? {
        Some(named) if !stored_platform(engine, &named, platform)?.1 => Naming::Keep,
        None if *platform != Platform::host() => Naming::Keep,
        _ => Naming::Set,
    };
    Ok(pull_as(engine, registries, reference, platform, naming, cancel, &|_| {})?.image)
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
