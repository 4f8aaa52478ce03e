//! The store's images, in the words of the registry.

use std::collections::HashMap;
use std::error::Error;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_build::gc::{Policy, collect_sometimes};
use kiln_build::registry::{ArrivalError, Arrivals, Asked, Offered, Offers, Part, Parts};
use kiln_build::{BuildCancel, BuildError, Engine};
use kiln_oci::Digest;
use kiln_oci::image::Descriptor;
use kiln_registry_server::route::{Name, Tag, Which};
use kiln_registry_server::{
    Collection, FollowError, Found, FoundManifest, Images, ImagesError, NotTaken, Pushed, Takes,
    follow_offline,
};

use super::settings::PUSHED_GRACE;
use crate::config::GcConfig;
use crate::errors::say;
use crate::session::Session;

/// Images of the store, for a registry to give out, and to take.
pub(super) struct StoreImages {
    offers: Offers,
    arrivals: Arrivals,
    collecting: Option<Collecting>,
}

/// What others have pushed, and pushed something over, is collected as after builds.
struct Collecting {
    engine: Engine,
    cancel: BuildCancel,
    policy: Policy,
    /// There may be garbage since the last time.
    is_due: AtomicBool,
}

impl StoreImages {
    /// Those of the store of `engine`; packing and unpacking end when somebody cancels.
    pub(super) fn new(engine: Engine, cancel: BuildCancel) -> Self {
        let arrivals = Arrivals::new(engine.clone(), cancel.clone());
        Self { offers: Offers::new(engine, cancel), arrivals, collecting: None }
    }

    /// The same for who is pushed to: the store's garbage is collected, too, if the configuration has a policy.
    pub(super) fn collecting(mut self, session: &Session, config: &GcConfig) -> Self {
        self.collecting = config.is_automatic().then(|| Collecting {
            engine: session.engine.clone(),
            cancel: session.cancel.clone(),
            policy: config.policy(session.engine.store.root()),
            is_due: AtomicBool::new(false),
        });
        self
    }

    /// Something came, or was refused half-way, or lost its name.
    fn has_changed(&self) {
        if let Some(collecting) = &self.collecting {
            collecting.is_due.store(true, Ordering::Relaxed);
        }
    }
}

impl Collecting {
    fn collect(&self) {
        if !self.is_due.swap(false, Ordering::Relaxed) {
            return;
        }
        match collect_sometimes(&self.engine, &self.policy, &self.cancel) {
            Ok(Some(_)) => {}
            // Somebody else does, or has done so just now.
            Ok(None) => self.is_due.store(true, Ordering::Relaxed),
            Err(error) => say(&format!("warning: garbage was not collected: {error}\n")),
        }
    }
}

/// Where the store keeps what was pushed to it as it came.
pub(super) fn pushed_directory(session: &Session) -> PathBuf {
    session.engine.store.root().join("registry")
}

/// Removes what was pushed and has lost its name since, unless somebody serves the store, who does it himself; how many
/// bytes went.
pub(crate) fn follow_names(session: &Session) -> Result<u64, FollowError> {
    let images = StoreImages::new(session.engine.clone(), session.cancel.clone());
    let policy = Collection { every: None, grace: PUSHED_GRACE, untagged: true };
    let collected = follow_offline(&pushed_directory(session), Arc::new(images), &policy)?;
    Ok(collected.map_or(0, |collected| collected.bytes))
}

impl Images for StoreImages {
    fn repositories(&self) -> Result<Vec<Name>, ImagesError> {
        let names = self.offers.repositories().map_err(unavailable)?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn tags(&self, name: &Name) -> Result<Vec<Tag>, ImagesError> {
        let tags = self.offers.tags(name.as_str()).map_err(unavailable)?;
        Ok(tags.iter().filter_map(|tag| tag.parse().ok()).collect())
    }

    fn manifest(&self, name: &Name, which: &Which) -> Result<Found, ImagesError> {
        let asked = match which {
            Which::Tag(tag) => self.offers.by_tag(name.as_str(), tag.as_str()),
            Which::Digest(digest) => self.offers.by_digest(name.as_str(), digest),
        };
        asked.map(found).map_err(unavailable)
    }

    fn make_ready(&self, name: &Name, tag: &Tag) -> Result<Found, ImagesError> {
        self.offers.make_ready(name.as_str(), tag.as_str()).map(found).map_err(unavailable)
    }

    fn blob(&self, name: &Name, digest: &Digest) -> Result<Option<(File, u64)>, ImagesError> {
        self.offers.blob(name.as_str(), digest).map_err(unavailable)
    }

    fn tidy(&self) {
        self.offers.tidy();
        if let Some(collecting) = &self.collecting {
            collecting.collect();
        }
    }
}

impl Takes for StoreImages {
    fn take(&self, name: &Name, tag: &Tag, pushed: Pushed) -> Result<(), NotTaken> {
        let root = Descriptor::new(&pushed.media_type, pushed.digest, pushed.size_bytes);
        let parts = Arc::new(Came(pushed.parts));
        let taken = self.arrivals.take(name.as_str(), tag.as_str(), &root, &pushed.configs, parts);
        self.has_changed();
        taken.map_err(not_taken)
    }

    fn names(&self) -> Result<HashMap<Name, HashMap<Tag, Digest>>, ImagesError> {
        let all = self.arrivals.images().map_err(unavailable)?;
        let tags = |tags: HashMap<String, Digest>| -> HashMap<Tag, Digest> {
            tags.into_iter().filter_map(|(tag, image)| Some((tag.parse().ok()?, image))).collect()
        };
        Ok(all.into_iter().filter_map(|(name, named)| Some((name.parse().ok()?, tags(named)))).collect())
    }

    fn image(&self, name: &Name, tag: &Tag) -> Result<Option<Digest>, ImagesError> {
        self.arrivals.image(name.as_str(), tag.as_str()).map_err(unavailable)
    }

    fn can_forget(&self, name: &Name, tags: &[Tag]) -> Result<(), NotTaken> {
        let tags: Vec<String> = tags.iter().map(|tag| tag.as_str().to_owned()).collect();
        self.arrivals.can_forget(name.as_str(), &tags).map_err(not_taken)
    }

    fn called(&self, name: &Name) -> Name {
        Arrivals::repository(name.as_str()).and_then(|name| name.parse().ok()).unwrap_or_else(|| name.clone())
    }

    fn forget(&self, name: &Name, tag: &Tag) -> Result<bool, NotTaken> {
        let forgotten = self.arrivals.forget(name.as_str(), tag.as_str());
        self.has_changed();
        forgotten.map_err(not_taken)
    }
}

/// What came to the registry, in the words of the store.
struct Came(Arc<dyn kiln_registry_server::Parts>);

impl Parts for Came {
    fn document(&self, digest: &Digest) -> io::Result<Option<Vec<u8>>> {
        self.0.document(digest).map_err(io::Error::other)
    }

    fn blob(&self, digest: &Digest) -> io::Result<Option<Part>> {
        let part = self.0.blob(digest).map_err(io::Error::other)?;
        Ok(part.map(|part| Part { path: part.path, is_compared: part.is_compared }))
    }
}

fn not_taken(error: ArrivalError) -> NotTaken {
    match error {
        ArrivalError::Refused(error) => NotTaken::Refused(with_causes(&error)),
        ArrivalError::InUse { .. } => NotTaken::Needed(error.to_string()),
        ArrivalError::Failed(error) if is_full(&error) => NotTaken::Full,
        other => NotTaken::Failed(ImagesError(Box::new(other))),
    }
}

/// An error on one line, with what it comes from.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(&format!(": {next}"));
        cause = next.source();
    }
    text
}

fn is_full(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(this) = cause {
        let kind = this.downcast_ref::<io::Error>().map(io::Error::kind);
        if matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
            return true;
        }
        cause = this.source();
    }
    false
}

fn unavailable(error: BuildError) -> ImagesError {
    ImagesError(Box::new(error))
}

fn found(asked: Asked) -> Found {
    match asked {
        Asked::Ready(Offered { media_type, digest, bytes }) => {
            Found::Manifest(FoundManifest { media_type, digest, bytes })
        }
        Asked::Unready => Found::Unready,
        Asked::Missing => Found::Missing,
    }
}
