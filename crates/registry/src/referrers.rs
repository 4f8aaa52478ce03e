//! What refers to a manifest by its `subject`: signatures, bills of materials, whatever somebody attaches to an image.
//!
//! Registries of the specification 1.1 list it. For all others clients keep the list: an index under a tag that is made
//! of the subject's digest. Two clients that add to it at once may lose one entry; nobody can lock a tag.

use std::collections::{BTreeMap, HashSet};

use kiln_oci::image::{Descriptor, Extra, Index, media_type, to_json};
use kiln_oci::{Digest, document};
use reqwest::Method;
use reqwest::header::{ACCEPT, HeaderName};

use crate::client::MAX_LIST_BYTES;
use crate::exchange::{Ask, shown_host, shown_path};
use crate::host::same_origin;
use crate::list::next;
use crate::{Error, Repository, Which};

/// More than anybody attaches to one image.
const MAX_REFERRERS: usize = 10_000;

/// What a registry answers with that lists a manifest by its subject itself.
pub(crate) const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");

/// The tag of the list that clients keep.
fn kept_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

impl Repository {
    /// The manifests that refer to this one, each once; where the registry does not list them, those of the tag that
    /// clients keep in its place. Costs one request for each page, or two.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::TooLarge`] and those of every request.
    pub async fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, Error> {
        let found = match self.listed_referrers(subject).await? {
            Some(listed) => listed,
            None => match self.manifest(Which::Tag(&kept_tag(subject))).await {
                Ok(kept) => self.read_list(subject, &kept.bytes)?.manifests,
                Err(Error::NotFound { .. }) => Vec::new(),
                Err(error) => return Err(error),
            },
        };
        let mut seen = HashSet::new();
        Ok(found.into_iter().filter(|referrer| seen.insert(referrer.digest)).collect())
    }

    /// What the registry lists by itself; `None`: it knows nothing of subjects.
    async fn listed_referrers(&self, subject: &Digest) -> Result<Option<Vec<Descriptor>>, Error> {
        let host = self.host().await?;
        let scopes = self.pull();
        let mut url = self.url(&host, &format!("referrers/{subject}"))?;
        let mut all = Vec::new();
        loop {
            let mut ask = Ask::new(Method::GET, url.clone(), &scopes).header(ACCEPT, media_type::OCI_INDEX);
            ask.also = &[404, 405];
            let page = self.document(&host, &ask, MAX_LIST_BYTES).await?;
            if page.status != 200 {
                return Ok(None);
            }
            let refused = |source| Error::Document { host: shown_host(&url), path: shown_path(&url), source };
            let index = document::read_index(&page.body, media_type::OCI_INDEX).map_err(refused)?;
            let is_empty = index.manifests.is_empty();
            all.extend(index.manifests);
            if all.len() > MAX_REFERRERS {
                let (host, path, limit_bytes) = (shown_host(&url), shown_path(&url), MAX_REFERRERS as u64);
                return Err(Error::TooLarge { host, path, limit_bytes });
            }
            match next(&url, &page.headers) {
                // A page without anything on it that leads on leads round in a circle.
                Some(target) if same_origin(&target, &host.base) && !is_empty && target != url => {
                    url = target
                }
                _ => return Ok(Some(all)),
            }
        }
    }

    /// The list that clients keep of what refers to `subject`.
    fn read_list(&self, subject: &Digest, json: &[u8]) -> Result<Index, Error> {
        let path = format!("{}/manifests/{}", self.path(), kept_tag(subject));
        let refused = |source| Error::Document { host: self.domain().to_owned(), path, source };
        document::read_index(json, media_type::OCI_INDEX).map_err(refused)
    }

    /// Adds `referrer` to the list of what refers to `subject` that clients keep.
    pub(crate) async fn keep_referrer(&self, subject: &Digest, referrer: Descriptor) -> Result<(), Error> {
        let tag = kept_tag(subject);
        // Of the registry itself: what is read here is written back.
        let mut index = match self.manifest_here(Which::Tag(&tag)).await {
            Ok(kept) => self.read_list(subject, &kept.bytes)?,
            Err(Error::NotFound { .. }) => Index {
                schema_version: 2,
                media_type: Some(media_type::OCI_INDEX.to_owned()),
                manifests: Vec::new(),
                annotations: BTreeMap::new(),
                extra: Extra::new(),
            },
            Err(error) => return Err(error),
        };
        if index.manifests.iter().any(|known| known.digest == referrer.digest) {
            return Ok(());
        }
        index.manifests.push(referrer);
        self.put(Which::Tag(&tag), media_type::OCI_INDEX, &to_json(&index)).await.map(drop)
    }
}
