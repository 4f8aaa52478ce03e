//! Images that others keep, and that are pushed to.

use std::collections::BTreeSet;
use std::sync::Arc;

use hyper::header::RETRY_AFTER;
use kiln_oci::Digest;

use super::lists::{listed, part};
use super::manifests::shown;
use super::{Answer, Ask, Registry, empty};
use crate::directory::{Manifest, NotPut, Page, Reads};
use crate::images::{Images, ImagesError, NotTaken};
use crate::pushed::{Pushing, Trouble};
use crate::refusal::Refusal;
use crate::rights::Right;
use crate::route::{Name, Route, Tag, Which};

impl Registry {
    /// Answers what is asked with GET or HEAD: what was pushed as it came, all else as its keeper gives it out.
    pub(super) async fn answer_pushed(
        self: &Arc<Self>,
        pushing: &Arc<Pushing>,
        ask: Ask,
        route: &Route,
    ) -> Answer {
        let images: Arc<dyn Images> = pushing.images.clone();
        match route {
            Route::Catalog => self.pushed_names(pushing, &ask).await,
            Route::Tags(name) => self.pushed_tags(pushing, &ask, name).await,
            Route::Referrers(name, subject) => self.referrers(&ask, name, subject).await,
            Route::Manifest(name, which) => {
                let (at, asked) = (name.clone(), which.clone());
                let found = self
                    .of_pushed(pushing, move |pushing| match &asked {
                        Which::Tag(tag) => pushing.tagged(&at, tag),
                        Which::Digest(digest) => pushing.by_digest(&at, *digest),
                    })
                    .await?;
                match found {
                    Some(it) => shown(&ask, &it.media_type, &it.digest, it.bytes),
                    None => self.answer_with(&images, ask, route).await,
                }
            }
            Route::Blob(name, digest) => {
                let (at, wanted) = (name.clone(), *digest);
                match self.disk(move |directory| Ok(directory.open_blob(&at, &wanted)?)).await? {
                    Some(_) => self.get_blob(&ask, name, digest).await,
                    None => self.answer_with(&images, ask, route).await,
                }
            }
            Route::Upload(name, id) => self.upload_status(&ask, name, id).await,
            _ => Err(Refusal::unsupported("this cannot be done here")),
        }
    }

    async fn pushed_names(&self, pushing: &Arc<Pushing>, ask: &Ask) -> Answer {
        let (count, last) = part(ask)?;
        let names = self
            .of_pushed(pushing, |pushing| {
                let mut names: BTreeSet<Name> = pushing.images.repositories()?.into_iter().collect();
                let named = pushing.images.names()?;
                for name in pushing.directory.repositories()? {
                    if !names.contains(&name) && !pushing.tags(&name, &named)?.is_empty() {
                        names.insert(name);
                    }
                }
                Ok(names)
            })
            .await?;
        let is_seen = |name: &&Name| {
            self.lets(&ask.who, name, Right::Pull)
                && self.lets(&ask.who, &pushing.images.called(name), Right::Pull)
        };
        let seen = names.iter().filter(is_seen);
        let page = Page::of(seen.map(|name| name.as_str().to_owned()), count, last.as_deref());
        let body = serde_json::json!({ "repositories": page.entries });
        listed(body, "/v2/_catalog", count, &page)
    }

    async fn pushed_tags(&self, pushing: &Arc<Pushing>, ask: &Ask, name: &Name) -> Answer {
        let (count, last) = part(ask)?;
        let at = name.clone();
        let tags = self
            .of_pushed(pushing, move |pushing| {
                let mut tags: BTreeSet<Tag> = pushing.images.tags(&at)?.into_iter().collect();
                tags.extend(pushing.tags(&at, &pushing.images.names()?)?);
                Ok(tags)
            })
            .await?;
        if tags.is_empty() {
            return Err(Refusal::no_repository());
        }
        let page = Page::of(tags.iter().map(|tag| tag.as_str().to_owned()), count, last.as_deref());
        let body = serde_json::json!({ "name": name.as_str(), "tags": page.entries });
        listed(body, &format!("/v2/{name}/tags/list"), count, &page)
    }

    /// Puts a manifest; once it has a tag its image can be run.
    pub(super) async fn put_pushed(
        &self,
        pushing: &Arc<Pushing>,
        name: &Name,
        tag: Option<Tag>,
        manifest: Manifest,
        reads: Reads,
    ) -> Result<(), Refusal> {
        let too_many = || {
            let refusal = Refusal::new(429, "TOOMANYREQUESTS", "too many manifests wait for their turn");
            refusal.with(RETRY_AFTER, "5")
        };
        let place = pushing.wait(manifest.bytes.len()).ok_or_else(too_many)?;
        if tag.is_none() && pushing.directory.lacks_room(manifest.bytes.len() as u64).is_some() {
            let text = "too much waits here for a tag that leads to it";
            return Err(Refusal::new(429, "TOOMANYREQUESTS", text).with(RETRY_AFTER, "60"));
        }
        let mut turn = None;
        if let Some(tag) = &tag {
            if pushing.directory.lacks_room_for_tag(manifest.bytes.len() as u64) {
                return Err(too_many());
            }
            turn = Some(pushing.turn_to_put(name, tag, manifest.bytes.len()).await.ok_or_else(too_many)?);
        }
        let is_unpacked = tag.is_some() && (reads.is_image() || !reads.manifests.is_empty());
        let room = pushing.room(is_unpacked).await;
        let room = room.ok_or_else(|| Refusal::new(503, "UNKNOWN", "the registry ends"))?;
        let name = name.clone();
        self.of_pushed(pushing, move |pushing| {
            // Name and tag, also when the client has gone in between.
            let _held = (place, turn, room);
            pushing.put(&name, tag.as_ref(), manifest, &reads)
        })
        .await
    }

    pub(super) async fn delete_pushed(&self, pushing: &Arc<Pushing>, name: &Name, which: &Which) -> Answer {
        let removed = match which {
            Which::Tag(tag) => {
                let turn = pushing.turn(name, tag).await;
                let (name, tag) = (name.clone(), tag.clone());
                let remove = move |pushing: &Pushing| {
                    let _turn = turn;
                    pushing.remove_tagged(&name, &tag)
                };
                self.of_pushed(pushing, remove).await?
            }
            Which::Digest(digest) => self.delete_digest(pushing, name, *digest).await?,
        };
        match removed {
            true => Ok(empty(202)),
            false => Err(Refusal::no_manifest()),
        }
    }

    /// Takes a manifest away with all tags that lead to it; whether there was one. Each tag in its turn: what is pushed
    /// meanwhile stays.
    async fn delete_digest(
        &self,
        pushing: &Arc<Pushing>,
        name: &Name,
        digest: Digest,
    ) -> Result<bool, Refusal> {
        /// Whoever pushes it again and again wants it to be there.
        const ROUNDS: usize = 8;
        let mut found = false;
        for _ in 0..ROUNDS {
            let at = name.clone();
            let tags = self.of_pushed(pushing, move |pushing| pushing.leading_to(&at, &digest)).await?;
            for tag in tags {
                let turn = pushing.turn(name, &tag).await;
                let at = name.clone();
                let remove = move |pushing: &Pushing| {
                    let _turn = turn;
                    pushing.remove_if_leads(&at, &tag, &digest)
                };
                found |= self.of_pushed(pushing, remove).await?;
            }
            let at = name.clone();
            let gone = self.of_pushed(pushing, move |pushing| pushing.remove_untagged(&at, &digest)).await?;
            if let Some(was_there) = gone {
                return Ok(found || was_there);
            }
            found = true;
        }
        Ok(found)
    }

    /// Lets `name` have a blob of an image that was never pushed.
    pub(super) async fn mount_image_blob(
        &self,
        pushing: &Arc<Pushing>,
        name: &Name,
        from: &Name,
        digest: &Digest,
    ) -> Result<bool, Refusal> {
        let (at, theirs, wanted) = (name.clone(), from.clone(), *digest);
        if self.disk(move |directory| Ok(directory.mount(&at, &theirs, &wanted)?)).await? {
            return Ok(true);
        }
        // It is read, or copied.
        let room = pushing.room(false).await;
        if pushing.directory.lacks_room(0).is_some() {
            return Ok(false);
        }
        let (name, from, digest) = (name.clone(), from.clone(), *digest);
        let adopt = move |pushing: &Pushing| {
            let _room = room;
            pushing.adopt_blob(&name, &from, &digest)
        };
        self.of_pushed(pushing, adopt).await
    }

    async fn of_pushed<T: Send + 'static>(
        &self,
        pushing: &Arc<Pushing>,
        work: impl FnOnce(&Pushing) -> Result<T, Trouble> + Send + 'static,
    ) -> Result<T, Refusal> {
        let pushing = pushing.clone();
        match tokio::task::spawn_blocking(move || work(&pushing)).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(trouble)) => Err(self.refusal(trouble)),
            Err(_) => Err(Refusal::new(500, "UNKNOWN", "the registry made a mistake")),
        }
    }

    fn refusal(&self, trouble: Trouble) -> Refusal {
        let failed = |error: ImagesError| {
            self.reports.error("a request was refused", &error);
            Refusal::new(500, "UNKNOWN", "the registry could not read or write what it has")
        };
        match trouble {
            Trouble::Directory(error) | Trouble::Lacks(NotPut::Directory(error)) => error.into(),
            Trouble::Lacks(lacks) => lacks.into(),
            Trouble::Images(error) | Trouble::NotTaken(NotTaken::Failed(error)) => failed(error),
            Trouble::NotTaken(NotTaken::Full) => Refusal::new(507, "UNKNOWN", "the registry's disk is full"),
            Trouble::NotTaken(NotTaken::Needed(why)) => Refusal::new(409, "DENIED", why),
            Trouble::NotTaken(NotTaken::Refused(why)) => Refusal::new(400, "MANIFEST_INVALID", why),
            Trouble::IsImage => Refusal::new(
                409,
                "DENIED",
                "this tag is an image's name, and what was pushed is no image: delete the tag first",
            ),
        }
    }
}
