//! The images that a build stands on: which they are, and what is said when there is none.

use std::sync::Arc;

use kiln_frontend::{Ast, BaseImage, Diagnostic, ImageKey, Need, Severity};
use kiln_llb::Location;
use kiln_oci::{Platform, Reference};

use crate::attest::Stood;
use crate::dockerfile::Dockerfile;
use crate::input::Reader;
use crate::lock::{Pins, Remark};
use crate::lowering::Purpose;
use crate::platforms::{serves, stored_platform};
use crate::registry::{Base, Resolved, Stored, known_base, newest, pinned_base, resolve_base, seen_base};
use crate::{BuildError, Engine};

/// What a build stands on.
#[derive(Default)]
pub(crate) struct StandsOn {
    /// The images of which no layer has come.
    pub(crate) unpulled: Vec<Arc<Resolved>>,
    /// All images; none where nobody asks.
    pub(crate) stood: Vec<Stood>,
}

/// Finds the images that a Dockerfile needs.
pub(crate) struct Finder<'a> {
    pub(crate) reader: &'a Reader<'a>,
    pub(crate) dockerfile: &'a Arc<Dockerfile>,
    pub(crate) ast: &'a Ast,
    pub(crate) purpose: Purpose,
    /// What was found.
    pub(crate) stands_on: StandsOn,
}

impl Finder<'_> {
    /// What the frontend has to know of an image; `pins` says which it is, and learns.
    pub(crate) fn image(
        &mut self,
        need: &Need,
        pins: &mut Pins,
        warnings: &mut Vec<Diagnostic>,
    ) -> Result<BaseImage, BuildError> {
        let Reader { engine, request, .. } = *self.reader;
        let key = &need.image;
        let found = match (&key.layout, self.purpose) {
            (Some(layout), _) => Some(Base::Here(Stored::unread(self.reader.layout(layout, &key.platform)?))),
            (None, Purpose::Build) => self.base(need, pins, warnings)?,
            (None, Purpose::Look | Purpose::Check) => {
                let seen = |name: &Reference| seen_base(engine, name, &key.platform);
                let exact = pins.exact(&key.reference);
                seen(&exact)?.map_or_else(|| seen(&key.reference), |base| Ok(Some(base)))?
            }
        };
        if self.purpose == Purpose::Build
            && request.attestations.provenance.is_some()
            && let Some(base) = &found
        {
            self.stands_on.stood.push(stood(engine, key, base, pins)?);
        }
        match found {
            Some(Base::Here(here)) => {
                let config_digest = here.image.config;
                let config = here.into_config(engine)?;
                // For this machine's own platform it is the frontend that warns.
                let is_asked = self.purpose == Purpose::Build && key.platform != Platform::host();
                if is_asked && !serves(&key.platform, &config) {
                    return Err(BuildError::OtherPlatform {
                        reference: Box::new(key.reference.clone()),
                        wanted: Box::new(key.platform.clone()),
                        actual: Box::new(config.platform()),
                        at: self.place(need),
                        source: None,
                    });
                }
                Ok(BaseImage { config_digest, config, unknown: false })
            }
            Some(Base::There(resolved)) => {
                let (config_digest, config) = (resolved.config_digest(), resolved.config().clone());
                self.stands_on.unpulled.push(resolved);
                Ok(BaseImage { config_digest, config, unknown: false })
            }
            None if self.purpose != Purpose::Build => Ok(BaseImage::unknown(&key.reference, &key.platform)),
            None => {
                let reference = pins.exact(&key.reference);
                // What is pinned was not misspelt.
                let is_pinned = pins.pinned(&key.reference).is_some();
                let similar = if is_pinned { None } else { similar_name(engine, self.ast, &reference)? };
                Err(BuildError::NoImage {
                    reference: Box::new(reference),
                    at: self.place(need),
                    stages: need.stages.clone(),
                    similar,
                })
            }
        }
    }

    /// The lines that need it.
    fn place(&self, need: &Need) -> Option<(Arc<Dockerfile>, Location)> {
        Some((self.dockerfile.clone(), lines_of(&self.dockerfile.text, need.span.start, need.span.end)))
    }

    /// The image that a FROM or a `from` means.
    fn base(
        &self,
        need: &Need,
        pins: &mut Pins,
        warnings: &mut Vec<Diagnostic>,
    ) -> Result<Option<Base>, BuildError> {
        let Reader { engine, cancel, .. } = *self.reader;
        let Need { image: ImageKey { reference, platform, .. }, span, stages } = need;
        let (span, at) = (*span, self.place(need));
        let mut remark = |(message, hint): Remark| {
            warnings.push(Diagnostic { severity: Severity::Warning, span, message, hint, rule: None });
        };
        // Whoever misspells a stage wants to hear that, not what a registry says.
        let bare = reference.familiar();
        let bare = bare.strip_suffix(":latest").unwrap_or(&bare);
        let stages = stages.iter().flatten().map(String::as_str);
        let is_locked = pins.lists(reference) || pins.pinned(reference).is_some();
        let is_stage = !is_locked && kiln_frontend::nearest(bare, stages).is_some();
        let found = if is_stage {
            let Some(known) = known_base(engine, reference, platform, cancel)? else { return Ok(None) };
            pins.demand(reference, at.clone())?;
            Ok(Some(known))
        } else {
            pins.demand(reference, at.clone())?;
            means(self.reader, &need.image, pins, &mut |message| remark((message, None)))
        };
        let found = match found {
            Err(BuildError::Cancelled) => return Err(BuildError::Cancelled),
            Ok(Some(found)) => {
                if pins.wants(reference) {
                    // Of one without files nobody notes down what led to it.
                    let root = match found.led_to(engine, reference, platform)? {
                        Some((root, _)) => Some(root),
                        None => pins.led.of(reference),
                    };
                    if let Some(said) = pins.found(reference, root) {
                        remark(said);
                    }
                }
                return Ok(Some(found));
            }
            found => found,
        };
        let locked = pins.file_of(reference);
        let reference = &pins.exact(reference);
        // There is one of this name, and it is not the right one.
        if let Some(named) = engine.store.resolve(reference)? {
            let (actual, is_right) = stored_platform(engine, &named, platform)?;
            if !is_right {
                return Err(BuildError::OtherPlatform {
                    reference: Box::new(reference.clone()),
                    wanted: Box::new(platform.clone()),
                    actual: Box::new(actual),
                    at,
                    source: found.err().map(Box::new),
                });
            }
        }
        match found {
            Err(error) => {
                let similar =
                    if locked.is_some() { None } else { similar_name(engine, self.ast, reference)? };
                let (reference, source) = (Box::new(reference.clone()), Box::new(error));
                Err(BuildError::Pull { reference, at, similar, locked, source })
            }
            found => found,
        }
    }
}

/// An image that the build stands on, as it was found.
fn stood(engine: &Engine, key: &ImageKey, base: &Base, pins: &Pins) -> Result<Stood, BuildError> {
    let ImageKey { reference, platform, layout } = key;
    // What a layout holds is not what a registry has under a name.
    let root = match (layout, pins.pinned(reference)) {
        (Some(_), _) => None,
        (None, Some(digest)) => Some(digest),
        (None, None) => base.led_to(engine, reference, platform)?.map(|(root, _)| root),
    };
    let config = match base {
        Base::Here(here) => here.image.config,
        Base::There(resolved) => resolved.config_digest(),
    };
    Ok(Stood { reference: reference.clone(), platform: platform.clone(), config, root })
}

/// The image that a name stands for: what it is pinned to, or what it leads to. `note` hears what deserves a look.
fn means(
    reader: &Reader<'_>,
    image: &ImageKey,
    pins: &mut Pins,
    note: &mut dyn FnMut(String),
) -> Result<Option<Base>, BuildError> {
    let Reader { engine, request, cancel } = *reader;
    let (bases, ImageKey { reference, platform, .. }) = (&request.bases, image);
    if let Some(registries) = bases.asked()
        && pins.renews(reference)
        && (pins.lists(reference) || !is_own(reader, image)?)
    {
        let root = newest(registries, reference, &mut pins.led, cancel);
        registries.client().take_notes().into_iter().for_each(&mut *note);
        pins.pin(reference, root?);
    }
    let pinned = pins.pinned(reference);
    let led = &mut pins.led;
    match pinned {
        Some(digest) => pinned_base(engine, bases, (reference, digest), platform, led, cancel, note),
        None => resolve_base(engine, bases, reference, platform, led, cancel, note),
    }
}

/// Whether an image of the store was built, loaded or imported here: no registry has it.
fn is_own(reader: &Reader<'_>, image: &ImageKey) -> Result<bool, BuildError> {
    let (engine, ImageKey { reference, platform, .. }) = (reader.engine, image);
    let Some(known) = known_base(engine, reference, platform, reader.cancel)? else { return Ok(false) };
    Ok(known.led_to(engine, reference, platform)?.is_none())
}

/// A stage or an image of the store whose name is close, or that has another tag.
fn similar_name(engine: &Engine, ast: &Ast, wanted: &Reference) -> Result<Option<String>, BuildError> {
    let bare = |name: String| name.strip_suffix(":latest").map(str::to_owned).unwrap_or(name);
    let mut known: Vec<String> =
        kiln_frontend::targets(ast).into_iter().filter_map(|target| target.name).collect();
    let mut other_tags = Vec::new();
    for image in engine.store.images()? {
        for name in engine.store.names_of(&image.config)? {
            if (name.domain(), name.path()) == (wanted.domain(), wanted.path()) {
                other_tags.push(name.familiar());
            }
            known.push(bare(name.familiar()));
        }
    }
    let near = kiln_frontend::nearest(&bare(wanted.familiar()), known.iter().map(String::as_str));
    Ok(near.map(str::to_owned).or_else(|| other_tags.into_iter().next()))
}

fn lines_of(text: &str, start: usize, end: usize) -> Location {
    let line = |at: usize| 1 + text.bytes().take(at).filter(|&b| b == b'\n').count();
    Location { first_line: line(start), last_line: line(end.max(start + 1) - 1) }
}
