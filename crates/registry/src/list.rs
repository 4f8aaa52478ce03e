//! Lists: the tags of a repository.

use reqwest::header::{HeaderMap, LINK};
use reqwest::{Method, Url};
use serde::Deserialize;

use crate::client::MAX_LIST_BYTES;
use crate::error::clean;
use crate::exchange::{Ask, protocol, shown_host, shown_path};
use crate::host::same_origin;
use crate::{Error, Repository};

/// More tags than anybody reads.
const MAX_TAGS: usize = 1_000_000;

#[derive(Deserialize)]
struct Tags {
    #[serde(default)]
    tags: Option<Vec<String>>,
}

impl Repository {
    /// All tags, in the registry's order. One request for each page.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::TooLarge`] and those of every request.
    pub async fn tags(&self) -> Result<Vec<String>, Error> {
        let host = self.host().await?;
        let scopes = self.pull();
        let mut url = self.url(&host, "tags/list?n=1000")?;
        let mut tags = Vec::new();
        loop {
            let ask = Ask::new(Method::GET, url.clone(), &scopes);
            let page = self.document(&host, &ask, MAX_LIST_BYTES).await?;
            let list: Tags = serde_json::from_slice(&page.body)
                .map_err(|_| protocol(&url, &Method::GET, "with something else than a list of tags"))?;
            let list = list.tags.unwrap_or_default();
            let is_empty = list.is_empty();
            tags.extend(list.iter().map(|tag| clean(tag)));
            if tags.len() > MAX_TAGS {
                let (host, path, limit_bytes) = (shown_host(&url), shown_path(&url), MAX_TAGS as u64);
                return Err(Error::TooLarge { host, path, limit_bytes });
            }
            match next(&url, &page.headers) {
                // A page without anything on it that leads on leads round in a circle.
                Some(target) if same_origin(&target, &host.base) && !is_empty && target != url => {
                    url = target
                }
                _ => return Ok(tags),
            }
        }
    }
}

/// The page that `Link: <…>; rel="next"` leads to.
pub(crate) fn next(url: &Url, headers: &HeaderMap) -> Option<Url> {
    let links = headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok());
    let mut links = links.flat_map(|line| line.split(',')).map(str::trim);
    links.find_map(|link| {
        let (target, parameters) = link.strip_prefix('<')?.split_once('>')?;
        let is_next = parameters.replace([' ', '"'], "").to_ascii_lowercase().contains("rel=next");
        if is_next { url.join(target).ok() } else { None }
    })
}
