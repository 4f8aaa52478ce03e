//! Mirrors: other places that have what a registry has.

use std::collections::BTreeMap;
use std::str::FromStr;

use reqwest::Url;

use crate::{Error, Repository};

/// A place that has the images of a registry: `host[:port][/prefix]`, with `https://` before it or not;
/// with `http://`, it may speak plain http.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// `host[:port]`
    pub host: String,
    /// What its names of repositories begin with, without slashes at the ends; often nothing.
    pub prefix: String,
    /// It may speak plain http, and its certificate is not checked.
    pub insecure: bool,
}

/// What is no [`Mirror`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no mirror; one is HOST[:PORT][/PREFIX], with https:// or http:// before it or not")]
pub struct MirrorError {
    text: String,
}

impl FromStr for Mirror {
    type Err = MirrorError;

    fn from_str(text: &str) -> Result<Self, MirrorError> {
        let wrong = || MirrorError { text: text.to_owned() };
        let (insecure, rest) = match text.split_once("://") {
            Some(("https", rest)) => (false, rest),
            Some(("http", rest)) => (true, rest),
            Some(_) => return Err(wrong()),
            None => (false, text),
        };
        let (host, prefix) = rest.trim_end_matches('/').split_once('/').unwrap_or((rest, ""));
        let (host, prefix) = (host.trim_end_matches('/'), prefix.trim_matches('/'));
        let url = Url::parse(&format!("https://{host}/")).map_err(|_| wrong())?;
        let is_host = url.has_host() && url.username().is_empty() && url.path() == "/";
        let is_path = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c);
        if host.is_empty() || host.contains(['@', '?', '#', '\\']) || !is_host || !prefix.chars().all(is_path)
        {
            return Err(wrong());
        }
        if prefix.split('/').any(|part| part == "..") {
            return Err(wrong());
        }
        Ok(Self { host: host.to_owned(), prefix: prefix.to_owned(), insecure })
    }
}

impl Repository {
    /// Whether it is read from other places than its registry, too.
    pub fn has_mirrors(&self) -> bool {
        !self.mirrors().is_empty()
    }

    /// The same repository at the mirrors of its registry.
    pub(crate) fn mirrors(&self) -> Vec<Repository> {
        let mirrors: &BTreeMap<String, Vec<Mirror>> = &self.client.inner.settings.mirrors;
        let mirrors = mirrors.get(&self.domain).filter(|_| !self.is_mirror).into_iter().flatten();
        let at = |mirror: &Mirror| Repository {
            client: self.client.clone(),
            domain: mirror.host.clone(),
            path: match mirror.prefix.as_str() {
                "" => self.path.clone(),
                prefix => format!("{prefix}/{}", self.path),
            },
            is_mirror: true,
        };
        mirrors.map(at).collect()
    }

    /// What the first mirror gives that has it; `None`: none has, and the registry is to be asked.
    pub(crate) async fn ask_mirrors<T, F>(&self, ask: impl Fn(Repository) -> F) -> Option<T>
    where
        F: Future<Output = Result<T, Error>>,
    {
        for mirror in self.mirrors() {
            let host = mirror.domain.clone();
            match ask(mirror).await {
                Ok(found) => return Some(found),
                Err(error) => self.pass_over(&host, &error),
            }
        }
        None
    }

    /// A mirror has failed: another one does, and somebody may want to know.
    pub(crate) fn pass_over(&self, mirror: &str, error: &Error) {
        // That it does not have everything is what a mirror is like.
        if !matches!(error, Error::NotFound { .. } | Error::Tripped { .. }) {
            let mut text = format!("the mirror {mirror} of {} is passed over: {error}", self.domain);
            if let Some(cause) = std::error::Error::source(error) {
                text.push_str(&format!(": {cause}"));
            }
            self.client.inner.breakers.note(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_is_a_host_and_maybe_a_prefix() {
        let mirror = |text: &str| text.parse::<Mirror>().unwrap();
        let is = |text: &str, host: &str, prefix: &str, insecure| {
            assert_eq!(mirror(text), Mirror { host: host.to_owned(), prefix: prefix.to_owned(), insecure });
        };
        is("mirror.lan:5000", "mirror.lan:5000", "", false);
        is("https://mirror.gcr.io/", "mirror.gcr.io", "", false);
        is("http://m/dockerhub/proxy/", "m", "dockerhub/proxy", true);
        for wrong in ["", "ftp://x", "https://", "user@h", "h/../x", "h/x?y", "h /x", "/x", "h/A", "h\\x"] {
            assert!(wrong.parse::<Mirror>().is_err(), "{wrong:?}");
        }
    }
}
