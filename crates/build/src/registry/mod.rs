//! Images from and to registries.
//!
//! Read [`Registries`] first, then `pull.rs`, `base.rs` with `stored.rs` (which images a build looks for),
//! `resolved.rs` (those of which no layer has come), `push.rs` with `outbound.rs` (what is on its way), `growth.rs`
//! (what is sent while it is packed), `plain.rs` (what is not packed) and `checked.rs` (what was), `copy.rs` (from place to place), `lists.rs`
//! (images for several platforms under one name), `aliases.rs` (short names), `offers.rs` (what others pull from
//! here) and `arrivals.rs` (what they push here).
//! The protocol is the crate `kiln_registry`'s; here blobs meet the store.

mod aliases;
mod arrivals;
mod base;
mod checked;
mod coming;
mod copy;
mod growth;
mod lists;
mod offers;
mod outbound;
mod plain;
mod pull;
mod push;
mod resolved;
mod stored;

use std::borrow::Cow;
use std::fmt;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kiln_oci::Reference;
use kiln_registry::{Client, Repository};
use kiln_solver::Cancellation;
use tokio::runtime::Runtime;

use crate::{BuildCancel, BuildError};

pub use aliases::{AliasError, Aliases};
pub use arrivals::{ArrivalError, Arrivals, Part, Parts};
pub(crate) use base::{Base, Led, known_base, newest, pinned_base, resolve_base, seen_base};
pub use base::{Bases, PullPolicy, base_image};
pub use copy::{
    Copied, CopyRequest, Place, Referrer, Referrers, Said, Statement, StoredAttestation, Which as WhichImage,
    copy, copy_in, referrers, said_at, said_of,
};
pub(crate) use growth::Growth;
pub use lists::{Annotate, ListEntry, ListError, Lists};
pub use offers::{Asked, Offered, Offers};
pub(crate) use outbound::Outbound;
pub use pull::{Pulled, pull};
pub use push::{PushRequest, PushedName, push};
pub(crate) use push::{push_index, push_ready};
pub(crate) use resolved::{Resolved, Unpulled};
pub(crate) use stored::Stored;
pub use stored::stored_image;

/// How soon a cancelled command is noticed.
const POLL: Duration = Duration::from_millis(100);
/// Blobs on their way at once.
const AT_ONCE: usize = 4;

/// The way to registries, for threads that may wait. Nothing is opened before the first request.
pub struct Registries {
    client: Client,
    aliases: Aliases,
    runtime: OnceLock<Runtime>,
}

impl fmt::Debug for Registries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registries").finish_non_exhaustive()
    }
}

impl Registries {
    /// Registries by way of `client`, which nobody else has used.
    pub fn new(client: Client) -> Self {
        Self { client, aliases: Aliases::default(), runtime: OnceLock::new() }
    }

    /// The same with images of Docker Hub's names elsewhere.
    pub fn with_aliases(mut self, aliases: Aliases) -> Self {
        self.aliases = aliases;
        self
    }

    /// The client, for futures that [`Registries::wait`] gets.
    pub fn client(&self) -> &Client {
        &self.client
    }

    fn runtime(&self) -> Result<&Runtime, BuildError> {
        if let Some(runtime) = self.runtime.get() {
            return Ok(runtime);
        }
        let made = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("registry")
            .enable_all()
            .build()
            .map_err(|source| kiln_registry::Error::Local { what: "starting threads", source })?;
        // Whoever came first has made it; two that came at once drop one.
        if let Err(spare) = self.runtime.set(made) {
            spare.shutdown_background();
        }
        self.runtime.get().ok_or_else(|| BuildError::Bug { what: "no runtime for registries".to_owned() })
    }

    /// Waits for `future`, unless somebody cancels. Not for threads that drive futures themselves.
    ///
    /// # Errors
    /// [`BuildError::Cancelled`], and those of `future`.
    pub fn wait<T, E: Into<BuildError>>(
        &self,
        cancel: &BuildCancel,
        future: impl Future<Output = Result<T, E>>,
    ) -> Result<T, BuildError> {
        self.runtime()?.block_on(async {
            let mut future = pin!(future);
            loop {
                if let Ok(done) = tokio::time::timeout(POLL, future.as_mut()).await {
                    return done.map_err(Into::into);
                }
                if cancel.is_cancelled() {
                    return Err(BuildError::Cancelled);
                }
            }
        })
    }

    /// Where the image of this name is.
    fn place<'a>(&self, name: &'a Reference) -> Cow<'a, Reference> {
        self.aliases.place(name)
    }

    /// The repository of the image of this name.
    pub(crate) fn repository(&self, name: &Reference) -> Repository {
        self.client.repository(&self.place(name))
    }
}

impl Drop for Registries {
    fn drop(&mut self) {
        // It may be dropped where nobody may wait.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl From<kiln_registry::Error> for BuildError {
    fn from(error: kiln_registry::Error) -> Self {
        BuildError::Registry(Arc::new(error))
    }
}
