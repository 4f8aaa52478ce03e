//! Lists, page by page.

use std::sync::Arc;

use hyper::header::{CONTENT_TYPE, HeaderName, LINK};
use kiln_oci::Digest;
use kiln_oci::image::{Descriptor, Index, media_type, to_json};

use super::{Answer, Ask, Registry, json, put};
use crate::directory::Page;
use crate::refusal::Refusal;
use crate::rights::Right;
use crate::route::{Name, parameter};

const FILTERS: HeaderName = HeaderName::from_static("oci-filters-applied");

impl Registry {
    pub(super) async fn catalog(self: &Arc<Self>, ask: Ask) -> Answer {
        let (count, last) = part(&ask)?;
        let registry = self.clone();
        let who = ask.who;
        let page = self
            .disk(move |directory| {
                let may = |name: &Name| registry.lets(&who, name, Right::Pull);
                Ok(directory.catalog(count, last.as_deref(), may)?)
            })
            .await?;
        let body = serde_json::json!({ "repositories": page.entries });
        listed(body, "/v2/_catalog", count, &page)
    }

    pub(super) async fn tags(&self, ask: &Ask, name: &Name) -> Answer {
        let (count, last) = part(ask)?;
        let at = name.clone();
        let page = self.disk(move |directory| Ok(directory.tags(&at, count, last.as_deref())?)).await?;
        let page = page.ok_or_else(Refusal::no_repository)?;
        let body = serde_json::json!({ "name": name.as_str(), "tags": page.entries });
        listed(body, &format!("/v2/{name}/tags/list"), count, &page)
    }

    pub(super) async fn referrers(&self, ask: &Ask, name: &Name, subject: &Digest) -> Answer {
        let kind = artifact_type(ask);
        let last = parameter(&ask.query, "last").and_then(|last| last.parse::<Digest>().ok());
        let (at, of, wanted) = (name.clone(), *subject, kind.clone());
        let (manifests, more) = self
            .disk(move |directory| Ok(directory.referrers(&at, &of, wanted.as_deref(), last.as_ref())?))
            .await?;
        let next = manifests.last().filter(|_| more).map(|last| last.digest);
        let index = index(manifests);
        let mut response = referrers(&index, kind.as_deref())?;
        if let Some(next) = next {
            let filter = kind.map(|kind| format!("&artifactType={}", encode(&kind))).unwrap_or_default();
            let link = format!("</v2/{name}/referrers/{subject}?last={next}{filter}>; rel=\"next\"");
            put(&mut response, LINK, &link);
        }
        Ok(response)
    }
}

/// What a list of referrers shall be of.
pub(super) fn artifact_type(ask: &Ask) -> Option<String> {
    parameter(&ask.query, "artifactType").filter(|kind| !kind.is_empty())
}

pub(super) fn index(manifests: Vec<Descriptor>) -> Index {
    Index {
        schema_version: 2,
        media_type: Some(media_type::OCI_INDEX.to_owned()),
        manifests,
        annotations: Default::default(),
        extra: Default::default(),
    }
}

/// A list of referrers, of those of a `kind` alone if there is one.
pub(super) fn referrers(list: &Index, kind: Option<&str>) -> Answer {
    let mut response = json(200, to_json(list))?;
    put(&mut response, CONTENT_TYPE, media_type::OCI_INDEX);
    if kind.is_some() {
        put(&mut response, FILTERS, "artifactType");
    }
    Ok(response)
}

/// `n` and `last`
pub(super) fn part(ask: &Ask) -> Result<(Option<usize>, Option<String>), Refusal> {
    let count = match parameter(&ask.query, "n") {
        None => None,
        Some(text) => {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty();
            let wrong = || Refusal::new(400, "PAGINATION_NUMBER_INVALID", "n is no number");
            if !digits {
                return Err(wrong());
            }
            // More than there is are all.
            Some(text.parse().unwrap_or(usize::MAX))
        }
    };
    Ok((count, parameter(&ask.query, "last").filter(|last| !last.is_empty())))
}

pub(super) fn listed(body: serde_json::Value, path: &str, count: Option<usize>, page: &Page) -> Answer {
    let mut response = json(200, body.to_string().into_bytes())?;
    if let Some(last) = page.entries.last().filter(|_| page.more) {
        let count = count.unwrap_or(page.entries.len());
        put(&mut response, LINK, &format!("<{path}?last={}&n={count}>; rel=\"next\"", encode(last)));
    }
    Ok(response)
}

/// For the value of a query's parameter.
fn encode(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    text.bytes()
        .map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
