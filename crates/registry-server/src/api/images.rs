//! The same questions about images that others keep.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kiln_oci::Digest;

use super::blobs::partly;
use super::lists::{artifact_type, index, listed, part, referrers};
use super::manifests::shown;
use super::{Answer, Ask, Registry};
use crate::body::FileBody;
use crate::directory::Page;
use crate::images::{Found, Images, ImagesError};
use crate::refusal::Refusal;
use crate::rights::Right;
use crate::route::{Name, Route, Which};

impl Registry {
    /// Answers what is asked with GET or HEAD, by whoever may.
    pub(super) async fn answer_with(
        self: &Arc<Self>,
        images: &Arc<dyn Images>,
        ask: Ask,
        route: &Route,
    ) -> Answer {
        match route {
            Route::Catalog => self.image_names(images, &ask).await,
            Route::Tags(name) => self.image_tags(images, &ask, name).await,
            // None of them has a subject.
            Route::Referrers(..) => referrers(&index(Vec::new()), artifact_type(&ask).as_deref()),
            Route::Manifest(name, which) => self.image_manifest(images, &ask, name, which).await,
            Route::Blob(name, digest) => self.image_blob(images, &ask, name, digest).await,
            _ => Err(Refusal::unsupported("this registry is for pulling only")),
        }
    }

    async fn image_names(&self, images: &Arc<dyn Images>, ask: &Ask) -> Answer {
        let (count, last) = part(ask)?;
        let names = self.of_images(images, |images| images.repositories()).await?;
        let seen = names.iter().filter(|name| self.lets(&ask.who, name, Right::Pull));
        let page = Page::of(seen.map(|name| name.as_str().to_owned()), count, last.as_deref());
        let body = serde_json::json!({ "repositories": page.entries });
        listed(body, "/v2/_catalog", count, &page)
    }

    async fn image_tags(&self, images: &Arc<dyn Images>, ask: &Ask, name: &Name) -> Answer {
        let (count, last) = part(ask)?;
        let at = name.clone();
        let tags = self.of_images(images, move |images| images.tags(&at)).await?;
        if tags.is_empty() {
            return Err(Refusal::no_repository());
        }
        let page = Page::of(tags.iter().map(|tag| tag.as_str().to_owned()), count, last.as_deref());
        let body = serde_json::json!({ "name": name.as_str(), "tags": page.entries });
        listed(body, &format!("/v2/{name}/tags/list"), count, &page)
    }

    async fn image_manifest(
        &self,
        images: &Arc<dyn Images>,
        ask: &Ask,
        name: &Name,
        which: &Which,
    ) -> Answer {
        let (at, asked) = (name.clone(), which.clone());
        let mut found = self.of_images(images, move |images| images.manifest(&at, &asked)).await?;
        if let (Found::Unready, Which::Tag(tag)) = (&found, which) {
            // Waiting costs no thread. Whoever comes to his turn finds what those before him have made.
            let Ok(turn) = self.packing.clone().acquire_owned().await else {
                return Err(Refusal::no_manifest());
            };
            let (at, tag, metrics) = (name.clone(), tag.clone(), self.metrics.clone());
            let work = move |images: &dyn Images| {
                // Also when nobody waits for it any more: he will ask again.
                let _turn = turn;
                match images.manifest(&at, &Which::Tag(tag.clone()))? {
                    Found::Unready => {
                        metrics.made_ready.fetch_add(1, Ordering::Relaxed);
                        images.make_ready(&at, &tag)
                    }
                    found => Ok(found),
                }
            };
            found = self.of_images(images, work).await?;
        }
        match found {
            Found::Manifest(it) => shown(ask, &it.media_type, &it.digest, it.bytes),
            Found::Unready | Found::Missing => Err(Refusal::no_manifest()),
        }
    }

    async fn image_blob(&self, images: &Arc<dyn Images>, ask: &Ask, name: &Name, digest: &Digest) -> Answer {
        let (at, wanted) = (name.clone(), *digest);
        let found = self.of_images(images, move |images| images.blob(&at, &wanted)).await?;
        let (file, size) = found.ok_or_else(Refusal::no_blob)?;
        if !ask.has(digest) && !self.is_good(&self.verified, digest, &file).await? {
            return Err(Refusal::no_blob());
        }
        partly(ask, digest, size, |from, to| Ok(FileBody::new(file, from, to)))
    }

    async fn of_images<T: Send + 'static>(
        &self,
        images: &Arc<dyn Images>,
        work: impl FnOnce(&dyn Images) -> Result<T, ImagesError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let images = images.clone();
        match tokio::task::spawn_blocking(move || work(&*images)).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => {
                self.reports.error("a request was refused", &error);
                Err(Refusal::new(500, "UNKNOWN", "the registry could not read or pack what it has"))
            }
            Err(_) => Err(Refusal::new(500, "UNKNOWN", "the registry made a mistake")),
        }
    }
}
