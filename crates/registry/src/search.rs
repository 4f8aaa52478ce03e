//! Search: Docker Hub's own form, and a filtered catalogue elsewhere.

use reqwest::{Method, Url};
use serde::Deserialize;

use crate::client::MAX_LIST_BYTES;
use crate::error::clean;
use crate::exchange::{Ask, Document, protocol};
use crate::host::same_origin;
use crate::list::next;
use crate::{Client, Error};

/// Pages of a catalogue that are looked at: a registry without end has no end here.
const MAX_PAGES: usize = 100;

/// A repository that was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Found {
    /// At its registry: `library/debian`.
    pub name: String,
    /// What its owner says about it.
    #[serde(default)]
    pub description: String,
    /// How many like it.
    #[serde(default, rename = "star_count")]
    pub stars: u64,
    /// Docker itself vouches for it.
    #[serde(default, rename = "is_official")]
    pub official: bool,
}

#[derive(Deserialize)]
struct Results {
    #[serde(default)]
    results: Vec<Found>,
}

#[derive(Deserialize)]
struct Catalogue {
    #[serde(default)]
    repositories: Option<Vec<String>>,
}

impl Client {
    /// At most `limit` repositories of the registry `domain` that have `term` in their names. Docker Hub is asked
    /// as it wants to be; others for their catalogue, and those without one as Docker Hub is.
    ///
    /// # Errors
    /// [`Error::Protocol`] for an answer that is none, and those of every request.
    pub async fn search(&self, domain: &str, term: &str, limit: usize) -> Result<Vec<Found>, Error> {
        if domain == "docker.io" {
            return self.search_v1("index.docker.io", term, limit).await;
        }
        match self.catalogue(domain, term, limit).await {
            Err(Error::NotFound { .. } | Error::Status { status: 400 | 405 | 501, .. }) => {
                self.search_v1(domain, term, limit).await
            }
            found => found,
        }
    }

    async fn search_v1(&self, domain: &str, term: &str, limit: usize) -> Result<Vec<Found>, Error> {
        let host = self.host(domain, None).await?;
        let mut url = join(&host.base, "/v1/search")?;
        url.query_pairs_mut().append_pair("q", term).append_pair("n", &limit.clamp(1, 100).to_string());
        let ask = Ask::new(Method::GET, url.clone(), &[]);
        let page = self.document(&host, &ask, MAX_LIST_BYTES, None).await?;
        let found: Results = read(&page, &url)?;
        let mut found = found.results;
        found.truncate(limit);
        for one in &mut found {
            (one.name, one.description) = (clean(&one.name), clean(&one.description));
        }
        Ok(found)
    }

    async fn catalogue(&self, domain: &str, term: &str, limit: usize) -> Result<Vec<Found>, Error> {
        let host = self.host(domain, None).await?;
        let mut url = join(&host.base, "_catalog?n=1000")?;
        let mut found = Vec::new();
        for _ in 0..MAX_PAGES {
            let ask = Ask::new(Method::GET, url.clone(), &[]);
            let page = self.document(&host, &ask, MAX_LIST_BYTES, None).await?;
            let names = read::<Catalogue>(&page, &url)?.repositories.unwrap_or_default();
            let is_empty = names.is_empty();
            let fits = names.iter().filter(|name| name.contains(term));
            found.extend(fits.map(|name| Found { name: clean(name), ..Found::default() }));
            match next(&url, &page.headers) {
                Some(target)
                    if same_origin(&target, &host.base)
                        && !is_empty
                        && target != url
                        && found.len() < limit =>
                {
                    url = target;
                }
                _ => break,
            }
        }
        found.truncate(limit);
        Ok(found)
    }
}

fn join(base: &Url, rest: &str) -> Result<Url, Error> {
    base.join(rest).map_err(|_| Error::Host { host: base.to_string() })
}

fn read<T: for<'de> Deserialize<'de>>(page: &Document, url: &Url) -> Result<T, Error> {
    serde_json::from_slice(&page.body)
        .map_err(|_| protocol(url, &Method::GET, "with something else than a list of repositories"))
}
