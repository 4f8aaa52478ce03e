//! The address of a repository, and the credentials that go there and nowhere else.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_frontend::git_url;
use kiln_frontend::git_url::GitUrlError;

use super::{Fetcher, SourceError};

/// A checked address of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remote {
    /// What git gets: over http without credentials, so that it shows in no process list.
    pub(super) url: String,
    /// For messages: without credentials.
    pub(super) shown: String,
    /// Host without port.
    host: String,
    /// `http://host:port` and `https://host:port` only.
    origin: Option<String>,
    /// Nobody on the way can read or change what comes.
    secure: bool,
    /// `user:password` out of the URL.
    user: Option<String>,
}

impl Remote {
    /// Checks an address without fragment and query.
    pub(super) fn parse(text: &str) -> Result<Self, GitUrlError> {
        git_url::check_remote(text)?;
        let Some((scheme, rest)) = text.split_once("://") else {
            let host = text.split_once('@').map_or(text, |(_, rest)| rest);
            let host = host.split_once(':').map_or(host, |(host, _)| host).to_owned();
            let (url, shown) = (text.to_owned(), text.to_owned());
            return Ok(Self { url, shown, host, origin: None, secure: true, user: None });
        };
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let (user, address) = match authority.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, authority),
        };
        let host = match address.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((inner, _)) => inner,
            None => address.split_once(':').map_or(address, |(host, _)| host),
        };
        let bare = format!("{scheme}://{address}{path}");
        let web = matches!(scheme, "http" | "https");
        let (url, user, shown) = match user {
            Some(user) if !web => {
                let name = user.split_once(':').map_or(user, |(name, _)| name);
                let without_password = format!("{scheme}://{name}@{address}{path}");
                (without_password.clone(), None, without_password)
            }
            user => (bare.clone(), user.map(unescape), bare),
        };
        Ok(Self {
            url,
            shown,
            host: host.to_owned(),
            origin: web.then(|| format!("{scheme}://{address}")),
            secure: matches!(scheme, "https" | "ssh"),
            user,
        })
    }

    /// The address of a submodule, as `.gitmodules` of this repository writes it.
    ///
    /// # Errors
    /// Those of [`Remote::parse`]; a repository that came safely may not lead to one that does not.
    pub(super) fn submodule(&self, text: &str) -> Result<Self, GitUrlError> {
        let found = if text.starts_with("./") || text.starts_with("../") {
            Self { user: self.user.clone(), ..Self::parse(&relative(&self.url, text)?)? }
        } else {
            Self::parse(text)?
        };
        if self.secure && !found.secure {
            let why = "a repository that came encrypted leads to one that does not";
            return Err(GitUrlError::Refused { what: "submodule", value: found.shown, why });
        }
        Ok(found)
    }

    /// Whether credentials without a host's name, meant for `main`, may go here.
    fn shares_credentials_with(&self, main: &Remote) -> bool {
        self.origin.is_some() && self.origin == main.origin
    }
}

/// `text` seen from the repository at `base`, as git resolves it.
fn relative(base: &str, text: &str) -> Result<String, GitUrlError> {
    let refused =
        || GitUrlError::Refused { what: "submodule", value: text.to_owned(), why: "it leaves the host" };
    // Where the path begins: behind `scheme://host`, or behind `user@host:`.
    let start = match base.find("://") {
        Some(at) => base[at + 3..].find('/').map_or(base.len(), |slash| at + 3 + slash),
        None => base.find(':').map_or(base.len(), |colon| colon + 1),
    };
    let (place, path) = base.split_at(start);
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop().ok_or_else(refused)?;
            }
            part => parts.push(part),
        }
    }
    Ok(format!("{place}{}{}", if rooted { "/" } else { "" }, parts.join("/")))
}

fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = (*first == b'%')
            .then(|| tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escaped {
            Some(byte) => {
                out.push(byte);
                rest = &tail[2..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl Fetcher<'_> {
    /// The configuration that lets git log in at `remote`: a name that holds for its host alone,
    /// and a header. `main` is the repository that the user named.
    pub(super) fn git_credentials(
        &self,
        remote: &Remote,
        main: &Remote,
    ) -> Result<Option<(String, String)>, SourceError> {
        let Some(origin) = &remote.origin else { return Ok(None) };
        let mut names =
            vec![format!("GIT_AUTH_HEADER.{}", remote.host), format!("GIT_AUTH_TOKEN.{}", remote.host)];
        if remote.shares_credentials_with(main) {
            names.extend(["GIT_AUTH_HEADER".to_owned(), "GIT_AUTH_TOKEN".to_owned()]);
        }
        let basic = |text: &str| format!("Authorization: Basic {}", STANDARD.encode(text));
        let header = match (self.secret(&names)?, &remote.user) {
            (Some((at, text)), _) if names[at].starts_with("GIT_AUTH_HEADER") => {
                format!("Authorization: {text}")
            }
            (Some((_, token)), _) => basic(&format!("x-access-token:{token}")),
            (None, Some(user)) if user.contains(':') => basic(user),
            (None, Some(user)) => basic(&format!("{user}:")),
            (None, None) => return Ok(None),
        };
        Ok(Some((format!("http.{origin}/.extraHeader"), header)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_leave_the_address() {
        let remote = Remote::parse("https://me:p%40ss@host:8443/a.git").unwrap();
        assert_eq!(
            (remote.url.as_str(), remote.shown.as_str()),
            ("https://host:8443/a.git", "https://host:8443/a.git")
        );
        assert_eq!((remote.user.as_deref(), remote.host.as_str()), (Some("me:p@ss"), "host"));
        let remote = Remote::parse("ssh://git:word@host/a").unwrap();
        assert_eq!(remote.url, "ssh://git@host/a");
        assert_eq!(Remote::parse("git@host:a").unwrap().host, "host");
    }

    #[test]
    fn submodules_are_found_beside_their_repository() {
        let check = |base: &str, text: &str, expected: &str| {
            let base = Remote::parse(base).unwrap();
            assert_eq!(base.submodule(text).unwrap().url, expected);
        };
        check("https://h/a/b.git", "../c.git", "https://h/a/c.git");
        check("https://h/a/b.git", "./c", "https://h/a/b.git/c");
        check("git@h:a/b", "../../c", "git@h:c");
        check("ssh://git@h/a/b", "../c", "ssh://git@h/a/c");
        check("https://h/a", "https://i/b", "https://i/b");
    }

    #[test]
    fn submodules_stay_on_the_net_and_encrypted() {
        let base = Remote::parse("https://h/a/b.git").unwrap();
        for text in
            ["../../../c", "http://h/c", "git://h/c", "/srv/c", "file:///srv/c", "ext::id", "-x", "-o@h:x"]
        {
            assert!(base.submodule(text).is_err(), "{text}");
        }
        assert!(Remote::parse("http://h/a").unwrap().submodule("http://h/b").is_ok());
    }
}
