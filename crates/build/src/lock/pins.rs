//! What a build makes of its lock file: which digests count, and which names it pins.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use kiln_llb::Location;
use kiln_oci::{Digest, Reference};

use super::place::{LockPlace, merge};
use super::text::Locked;
use super::{LockError, LockMode, NAME};
use crate::registry::Led;
use crate::{BuildCancel, BuildError, Dockerfile, Engine};

/// The names that are pinned, as one build sees them.
#[derive(Debug)]
pub(crate) struct Pins {
    mode: LockMode,
    place: LockPlace,
    /// `None`: there is none, or it does not count.
    file: Option<Locked>,
    /// What this build pins.
    added: BTreeMap<Reference, Digest>,
    /// Names that something was said about.
    told: BTreeSet<Reference>,
    /// What registries have said to this build.
    pub(crate) led: Led,
}

/// What has become of a lock file that was to be written.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    /// It is new, or another one.
    pub(crate) written: Option<PathBuf>,
    /// What deserves a look.
    pub(crate) notes: Vec<String>,
}

/// Something to be said about a name: the message, and what helps.
pub(crate) type Remark = (String, Option<String>);

impl Pins {
    /// For what builds nothing: a file that is wrong does not count.
    pub(crate) fn seen(engine: &Engine, place: &LockPlace, mode: LockMode) -> Self {
        let mode = mode.reading();
        Self::open(engine, place, mode).unwrap_or_else(|_| Self::new(mode, LockPlace::Nowhere, None))
    }

    fn new(mode: LockMode, place: LockPlace, file: Option<Locked>) -> Self {
        let (added, told, led) = Default::default();
        Self { mode, place, file, added, told, led }
    }

    /// Reads the lock file, if there is one and it counts.
    ///
    /// # Errors
    /// [`LockError`], [`LockError::NoPlace`] where it should be written and cannot.
    pub(crate) fn open(engine: &Engine, place: &LockPlace, mode: LockMode) -> Result<Self, BuildError> {
        if mode.writes() {
            place.directory()?;
        }
        let file = if mode == LockMode::Off { None } else { place.read(engine)? };
        Ok(Self::new(mode, place.clone(), file))
    }

    /// What `reference` is pinned to; `None`: what it leads to counts.
    pub(crate) fn pinned(&self, reference: &Reference) -> Option<Digest> {
        let of_file = || self.file.as_ref().filter(|_| self.mode != LockMode::Update)?.get(reference);
        self.added.get(reference).copied().or_else(of_file)
    }

    /// `reference` with the digest that it is pinned to, if it is.
    pub(crate) fn exact(&self, reference: &Reference) -> Reference {
        self.pinned(reference).map_or_else(|| reference.clone(), |digest| reference.with_digest(digest))
    }

    /// The file that pins `reference`.
    pub(crate) fn file_of(&self, reference: &Reference) -> Option<String> {
        let is_pinned = self.mode != LockMode::Update && self.file.as_ref()?.get(reference).is_some();
        is_pinned.then(|| self.place.file()).flatten()
    }

    /// The file that made some name mean `exact`, which has a digest.
    pub(crate) fn file_behind(&self, exact: &Reference) -> Option<String> {
        let pins = self.mode != LockMode::Update && self.file.as_ref()?.pins(exact);
        pins.then(|| self.place.file()).flatten()
    }

    /// Whether `reference` is to be looked up anew.
    pub(crate) fn renews(&self, reference: &Reference) -> bool {
        self.mode == LockMode::Update && reference.digest().is_none() && !self.added.contains_key(reference)
    }

    /// Whether the file has a line for `reference`, whatever becomes of that.
    pub(crate) fn lists(&self, reference: &Reference) -> bool {
        self.file.as_ref().is_some_and(|file| file.get(reference).is_some())
    }

    /// Pins `reference`: from here on it stands for this.
    pub(crate) fn pin(&mut self, reference: &Reference, digest: Digest) {
        self.added.insert(reference.clone(), digest);
    }

    /// A name that is not pinned is not looked for where all have to be.
    ///
    /// # Errors
    /// [`LockError::Missing`].
    pub(crate) fn demand(
        &self,
        reference: &Reference,
        at: Option<(Arc<Dockerfile>, Location)>,
    ) -> Result<(), LockError> {
        let is_free = reference.digest().is_some() || self.pinned(reference).is_some();
        if self.mode != LockMode::Strict || is_free {
            return Ok(());
        }
        let file = self.file.as_ref().and_then(|_| self.place.file());
        Err(LockError::Missing { file, reference: Box::new(reference.clone()), at })
    }

    /// Whether it matters here what `reference` leads to.
    pub(crate) fn wants(&self, reference: &Reference) -> bool {
        let is_of_use = self.mode.writes() || (self.mode == LockMode::Read && self.file.is_some());
        is_of_use && reference.digest().is_none() && self.pinned(reference).is_none()
    }

    /// `reference` was found: its registry has it under the digest `root`; `None`: it came from no registry. What is
    /// to be said about it.
    pub(crate) fn found(&mut self, reference: &Reference, root: Option<Digest>) -> Option<Remark> {
        if !self.wants(reference) {
            return None;
        }
        let name = reference.familiar();
        let said = match (self.mode.writes(), root) {
            (true, Some(digest)) => {
                self.pin(reference, digest);
                return None;
            }
            (true, None) => (
                format!("{NAME} cannot pin {name}: it was made or loaded here, and no registry has it"),
                None,
            ),
            (false, Some(_)) => {
                (format!("{NAME} does not pin {name}"), Some("`kiln build --lock` adds it".to_owned()))
            }
            (false, None) => return None,
        };
        self.told.insert(reference.clone()).then_some(said)
    }

    /// Writes the names that this build has pinned, where that was asked for.
    ///
    /// # Errors
    /// [`LockError`] and [`BuildError::Cancelled`]; the file is as it was then.
    pub(crate) fn save(&self, cancel: &BuildCancel) -> Result<Saved, BuildError> {
        if !self.mode.writes() {
            return Ok(Saved::default());
        }
        let dir = self.place.directory()?;
        let merged = merge(dir, &self.added, self.mode == LockMode::Update, cancel.flag())?;
        let (is_written, others) = merged.ok_or(BuildError::Cancelled)?;
        let note = |(reference, digest): (Reference, Digest)| {
            let name = reference.familiar();
            format!(
                "{NAME}: another build has pinned {name} to {digest} meanwhile, and this one stands on another"
            )
        };
        let notes = others.into_iter().map(note).collect();
        Ok(Saved { written: is_written.then(|| dir.join(NAME)), notes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pins(mode: LockMode, of: &[(&str, &[u8])]) -> Pins {
        let mut file = Locked::default();
        let of = of.iter().map(|(name, content)| (name.parse().unwrap(), Digest::of(content))).collect();
        file.take(&of, false);
        Pins::new(mode, LockPlace::Directory(PathBuf::from(".")), Some(file))
    }

    fn name(text: &str) -> Reference {
        text.parse().unwrap()
    }

    #[test]
    fn an_update_does_not_go_by_what_was_pinned() {
        let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
        assert_eq!(pins(LockMode::Add, &[("a", b"old")]).pinned(&name("a")), Some(old));
        let mut update = pins(LockMode::Update, &[("a", b"old")]);
        assert!(update.renews(&name("a")) && update.pinned(&name("a")).is_none());
        update.pin(&name("a"), new);
        assert!(!update.renews(&name("a")));
        assert_eq!(update.exact(&name("a")), name(&format!("a:latest@{new}")));
    }

    #[test]
    fn what_names_its_digest_needs_no_pin() {
        let exact = name(&format!("a@{}", Digest::of(b"x")));
        let mut strict = pins(LockMode::Strict, &[]);
        assert!(strict.demand(&exact, None).is_ok());
        assert!(strict.found(&exact, Some(Digest::of(b"x"))).is_none());
        let missing = strict.demand(&name("a"), None).unwrap_err();
        assert_eq!(missing.to_string(), "kiln.lock does not pin a:latest");
    }

    #[test]
    fn each_name_is_told_about_once() {
        let mut pins = pins(LockMode::Read, &[("a", b"a")]);
        assert!(pins.found(&name("a"), Some(Digest::of(b"a"))).is_none());
        assert!(pins.found(&name("b"), Some(Digest::of(b"b"))).is_some());
        assert!(pins.found(&name("b"), Some(Digest::of(b"b"))).is_none());
        // What was made here is nobody's to pin.
        assert!(pins.found(&name("own"), None).is_none());
    }
}
