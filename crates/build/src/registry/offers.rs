//! Images of the store for others to pull, each as `kiln push` would send it.
//!
//! An image is packed when somebody asks for its manifest, which has to say how large its layers are. What was packed
//! is remembered by the store, so the same image has the same digest each time, by whichever process.
//!
//! Whoever has got a manifest asks for blobs next. So an image that was given out stays pinned, and can be asked for
//! by its digests, until nobody has asked for so long as [`PATIENCE`]; also when its tag leads elsewhere by then. Once
//! the name is gone nothing of it is given out.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_content::{ImageRecord, Pin, Pinnable, Store};
use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Reference};

use super::push::Load;
use crate::export::{Along, Assembled, Compress, Packing, Style, is_ready, make_ready, whole_index};
use crate::{BuildCancel, BuildError, Engine};

/// So long an image is kept ready after somebody has asked for a part of it.
const PATIENCE: Duration = Duration::from_secs(600);

/// The host of names that are written without one.
pub(super) const HUB: &str = "docker.io";

/// Images of one store, for as long as somebody gives them out.
pub struct Offers {
    engine: Engine,
    cancel: BuildCancel,
    compress: Compress,
    /// What the names have led to lately, the last one at the end.
    given: Mutex<HashMap<Reference, Vec<Given>>>,
}

/// An image that somebody has asked for.
struct Given {
    /// What its name led to.
    image: ImageRecord,
    offer: Arc<Offer>,
    made: Instant,
    asked: Instant,
}

/// An image that is ready to leave.
struct Offer {
    root: Digest,
    manifests: HashMap<Digest, Offered>,
    /// With their sizes in bytes.
    blobs: HashMap<Digest, u64>,
    /// Garbage collection leaves its blobs alone.
    _pins: Vec<Pin>,
}

/// A manifest or an index, as it leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offered {
    /// What it is.
    pub media_type: String,
    /// Digest of `bytes`.
    pub digest: Digest,
    /// The document.
    pub bytes: Vec<u8>,
}

/// What became of a manifest that somebody asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// There it is.
    Ready(Offered),
    /// Layers of the image have to be packed first.
    Unready,
    /// There is none.
    Missing,
}

impl Offers {
    /// Those of the store of `engine`; whoever cancels ends packing.
    pub fn new(engine: Engine, cancel: BuildCancel) -> Self {
        Self { engine, cancel, compress: Compress::new(Packing::GZIP), given: Mutex::default() }
    }

    /// The repositories that have a tag, sorted.
    ///
    /// # Errors
    /// Those of the store; so for all methods.
    pub fn repositories(&self) -> Result<Vec<String>, BuildError> {
        let names = self.engine.store.names()?;
        let tagged = names.iter().filter(|(name, _)| tag_of(name).is_some());
        let mut found: Vec<String> = tagged.map(|(name, _)| repository(name).to_owned()).collect();
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// The tags of a repository, sorted.
    pub fn tags(&self, repository: &str) -> Result<Vec<String>, BuildError> {
        let names = self.names(repository)?;
        let mut tags: Vec<String> =
            names.iter().filter_map(|(name, _)| tag_of(name).map(str::to_owned)).collect();
        tags.sort();
        tags.dedup();
        Ok(tags)
    }

    /// What a tag leads to, if that need not be packed first.
    pub fn by_tag(&self, repository: &str, tag: &str) -> Result<Asked, BuildError> {
        self.tagged(repository, tag, false)
    }

    /// What a tag leads to. Packs what has to be; may take as long as `kiln push` without the network.
    pub fn make_ready(&self, repository: &str, tag: &str) -> Result<Asked, BuildError> {
        self.tagged(repository, tag, true)
    }

    fn tagged(&self, repository: &str, tag: &str, pack: bool) -> Result<Asked, BuildError> {
        let names = self.names(repository)?;
        let Some((name, image)) = names.iter().find(|(name, _)| tag_of(name) == Some(tag)) else {
            return Ok(Asked::Missing);
        };
        let offer = match self.known(name, image) {
            Some(offer) => Some(offer),
            None => self.make(&self.engine.for_job()?, name, pack)?,
        };
        // What shall be packed and is not there has lost its name meanwhile.
        let none = if pack { Asked::Missing } else { Asked::Unready };
        Ok(offer.map_or(none, |offer| offer.manifest(&offer.root)))
    }

    /// A manifest of an image of this repository. One whose layers were never packed has no digest yet.
    pub fn by_digest(&self, repository: &str, digest: &Digest) -> Result<Asked, BuildError> {
        let found = self.find(repository, |offer| offer.manifests.contains_key(digest))?;
        Ok(found.map_or(Asked::Missing, |offer| offer.manifest(digest)))
    }

    /// A blob that an image of this repository needs, and its size in bytes. The file can be read to its end, whatever
    /// becomes of the image.
    pub fn blob(&self, repository: &str, digest: &Digest) -> Result<Option<(File, u64)>, BuildError> {
        // Whoever pushes asks for what nobody has: that costs nothing, however many images there are.
        if !self.engine.store.has_blob(digest) {
            return Ok(None);
        }
        match self.find(repository, |offer| offer.blobs.contains_key(digest))? {
            Some(_) => Ok(Some(self.engine.store.open_blob(digest)?)),
            None => Ok(None),
        }
    }

    /// Lets go of what nobody asks for any more, and of what has no name.
    pub fn tidy(&self) {
        let Ok(names) = self.engine.store.names() else { return };
        let names: HashSet<Reference> = names.into_iter().map(|(name, _)| name).collect();
        self.given().retain(|name, all| {
            all.retain(|given| given.asked.elapsed() < PATIENCE);
            !all.is_empty() && names.contains(name)
        });
    }

    fn given(&self) -> MutexGuard<'_, HashMap<Reference, Vec<Given>>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names in a repository; see [`names_in`]. What had a name here and has it no more is forgotten.
    fn names(&self, repository: &str) -> Result<Vec<(Reference, ImageRecord)>, BuildError> {
        let names = names_in(&self.engine.store, repository)?;
        let there: HashSet<&Reference> = names.iter().map(|(name, _)| name).collect();
        self.given().retain(|name, _| !is_in(name, repository) || there.contains(name));
        Ok(names)
    }

    /// The offer of what a name leads to. An index may have come to an image since; so it does not hold for ever.
    fn known(&self, name: &Reference, image: &ImageRecord) -> Option<Arc<Offer>> {
        let mut given = self.given();
        let mut all = given.get_mut(name)?.iter_mut();
        let found = all.find(|given| given.image == *image && given.made.elapsed() < PATIENCE)?;
        found.asked = Instant::now();
        Some(found.offer.clone())
    }

    /// Looks among what was given out, then among what could be without packing anything.
    fn find(
        &self,
        repository: &str,
        fits: impl Fn(&Offer) -> bool,
    ) -> Result<Option<Arc<Offer>>, BuildError> {
        let names = self.names(repository)?;
        let mut given = self.given();
        let all = given.iter_mut().filter(|(name, _)| is_in(name, repository));
        if let Some(found) = all.flat_map(|(_, all)| all).find(|given| fits(&given.offer)) {
            found.asked = Instant::now();
            return Ok(Some(found.offer.clone()));
        }
        drop(given);
        let mut damage = None;
        let job = self.engine.for_job()?;
        for (name, image) in &names {
            if self.known(name, image).is_some() {
                continue;
            }
            match self.make(&job, name, false) {
                Ok(Some(offer)) if fits(&offer) => return Ok(Some(offer)),
                Ok(_) => {}
                // It may be another image that is asked for.
                Err(error) => damage = Some(error),
            }
        }
        damage.map_or(Ok(None), Err)
    }

    /// Makes the image of a name ready to leave; `None`: it has no such name any more, or it would have to be packed and
    /// shall not be. What this pins is free again when `job` ends, but for what the offer keeps.
    fn make(&self, job: &Engine, name: &Reference, pack: bool) -> Result<Option<Arc<Offer>>, BuildError> {
        let Some(image) = job.store.resolve(name)? else { return Ok(None) };
        if !pack && !self.is_packed(job, &image)? {
            return Ok(None);
        }
        let assembled = Assembled::stored(job, &image)?;
        let style = Style::new(self.compress);
        let ready = make_ready(job, &assembled, &style, self.cancel.flag(), &mut Along::Nobody)?;
        let index = whole_index(job, &image, &ready.descriptor.digest)?;
        let root = index.map_or_else(|| ready.descriptor.clone(), |index| index.descriptor);
        let load = Load::of(job, &ready, Some(&root), &self.cancel)?;
        let offer = Arc::new(self.offer(&root, load)?);
        let now = Instant::now();
        let made = Given { image, offer: offer.clone(), made: now, asked: now };
        let mut given = self.given();
        let all = given.entry(name.clone()).or_default();
        all.retain(|given| given.image != made.image);
        all.push(made);
        Ok(Some(offer))
    }

    fn is_packed(&self, job: &Engine, image: &ImageRecord) -> Result<bool, BuildError> {
        let chain = image.snapshot.as_ref().map_or(Ok(Vec::new()), |top| job.snapshots.chain(top))?;
        for id in &chain {
            // One whose diff ID is not known yet was never packed.
            let Some(layer) = job.store.layer(id)? else { return Ok(false) };
            if !is_ready(job, &layer, &self.compress)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Pins what `load` consists of, all of which is in the store.
    fn offer(&self, root: &Descriptor, load: Load) -> Result<Offer, BuildError> {
        let store = &self.engine.store;
        let (mut blobs, mut pins) = (HashMap::new(), Vec::with_capacity(load.blobs.len()));
        for (blob, _) in load.blobs {
            pins.push(store.pin(&Pinnable::Blob(blob.digest))?);
            // A manifest that leads to nothing is worse than none.
            let (_, size_bytes) = store.open_blob(&blob.digest)?;
            blobs.insert(blob.digest, size_bytes);
        }
        let manifest = |(descriptor, bytes): (Descriptor, Vec<u8>)| {
            let Descriptor { media_type, digest, .. } = descriptor;
            (digest, Offered { media_type, digest, bytes })
        };
        let manifests = load.manifests.into_iter().map(manifest).collect();
        Ok(Offer { root: root.digest, manifests, blobs, _pins: pins })
    }
}

impl Offer {
    fn manifest(&self, digest: &Digest) -> Asked {
        self.manifests.get(digest).map_or(Asked::Missing, |found| Asked::Ready(found.clone()))
    }
}

/// The names in a repository, with what they lead to now. Where several have one tag, the first is meant: without a
/// host first, then by their hosts.
pub(super) fn names_in(
    store: &Store,
    repository: &str,
) -> Result<Vec<(Reference, ImageRecord)>, kiln_content::Error> {
    let mut names = store.names()?;
    names.retain(|(name, _)| is_in(name, repository));
    in_order(&mut names);
    Ok(names)
}

/// The tag that a name is for. One with a digest is for that: what it leads to stays when its tag goes elsewhere.
pub(super) fn tag_of(name: &Reference) -> Option<&str> {
    name.tag().filter(|_| name.digest().is_none())
}

/// Puts the name that is meant in front of others with the same tag.
pub(super) fn in_order(names: &mut [(Reference, ImageRecord)]) {
    names.sort_by_cached_key(|(name, _)| (name.domain() != HUB, name.to_string()));
}

/// The repositories that a name is in.
pub(super) fn repositories(name: &Reference) -> impl Iterator<Item = &str> {
    [Some(name.path()), official(name)].into_iter().flatten()
}

/// What a name's repository is called where its host is another one: as users write it.
pub(super) fn repository(name: &Reference) -> &str {
    official(name).unwrap_or(name.path())
}

/// Whether a name is in a repository: Docker Hub's official images have two names there as well.
fn is_in(name: &Reference, repository: &str) -> bool {
    name.path() == repository || official(name) == Some(repository)
}

/// `debian` of `docker.io/library/debian`.
fn official(name: &Reference) -> Option<&str> {
    let path = name.path().strip_prefix("library/").filter(|path| !path.contains('/'));
    path.filter(|_| name.domain() == HUB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_the_name_without_its_host() {
        let check = |name: &str, expected: &str, others: &[&str]| {
            let name: Reference = name.parse().unwrap();
            assert_eq!(repository(&name), expected, "{name}");
            for other in [expected].iter().chain(others) {
                assert!(is_in(&name, other), "{name} is in {other}");
            }
            let mut all: Vec<&str> = [expected].iter().chain(others).copied().collect();
            all.sort_unstable_by_key(|name| std::cmp::Reverse(name.len()));
            assert_eq!(repositories(&name).collect::<Vec<_>>(), all);
            assert!(!is_in(&name, "library") && !is_in(&name, "") && !is_in(&name, "other"), "{name}");
        };
        check("debian", "debian", &["library/debian"]);
        check("team/app:1", "team/app", &[]);
        check("localhost:5000/team/app:1", "team/app", &[]);
        check("localhost/library/app:1", "library/app", &[]);
        check("library/a/b:1", "library/a/b", &[]);
        assert!(!is_in(&"localhost/library/app".parse().unwrap(), "app"));
    }
}
