//! What is shown to a registry: a password, or a token that its token server gave for one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Url};
use serde::Deserialize;

use crate::challenge::Challenge;
use crate::error::clean;
use crate::exchange::{protocol, shown_host, shown_path};
use crate::host::{Host, bare, credential_key, is_link_local, is_loopback, same_origin};
use crate::settings::within;
use crate::{Client, Credential, Error};

/// A token server's answer.
const MAX_TOKEN_BYTES: u64 = 1 << 20;
/// How long a token holds whose server does not say.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// So many secrets are kept out of messages.
const MAX_SECRETS: usize = 64;
/// Scopes of a challenge beyond this are left out.
const MAX_SCOPE_BYTES: usize = 2000;

/// What a request does with a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scope {
    pub(crate) path: String,
    /// Read and write; otherwise read.
    pub(crate) push: bool,
}

impl Scope {
    fn text(&self) -> String {
        format!("repository:{}:{}", self.path, if self.push { "pull,push" } else { "pull" })
    }
}

/// What registries were shown and took.
#[derive(Default)]
pub(crate) struct Authority {
    shown: Mutex<HashMap<(String, String), Shown>>,
    /// One asks a token server; the others then have its token.
    turn: tokio::sync::Mutex<()>,
    secrets: Mutex<Vec<String>>,
    /// Registries that there are credentials for.
    has_credential: Mutex<HashMap<String, bool>>,
    /// What registries asked for last, without the scopes.
    asked: Mutex<HashMap<String, Vec<Challenge>>>,
    refresh: Mutex<Refresh>,
}

/// A token that stands for a password from now on.
#[derive(Default)]
enum Refresh {
    #[default]
    Unwanted,
    /// Token servers are asked for one.
    Wanted,
    Given(String),
}

#[derive(Clone)]
struct Shown {
    header: HeaderValue,
    /// As the client's clock has it; `None`: always.
    until: Option<Duration>,
}

/// A token server's answer (docker's token specification).
#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
    #[serde(default)]
    refresh_token: Option<String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Authority {
    /// Words that no message may hold.
    pub(crate) fn secrets(&self) -> Vec<String> {
        lock(&self.secrets).clone()
    }

    fn keep_secret(&self, secret: &str) {
        let mut secrets = lock(&self.secrets);
        if !secret.is_empty() && !secrets.iter().any(|known| known == secret) {
            if secrets.len() >= MAX_SECRETS {
                secrets.remove(1);
            }
            secrets.push(secret.to_owned());
        }
    }
}

/// Which token is meant: those of different scopes are different tokens. A password is for all.
fn key(host: &Host, scopes: &[Scope]) -> (String, String) {
    let texts: Vec<String> = scopes.iter().map(Scope::text).collect();
    (host.name.clone(), texts.join(" "))
}

impl Client {
    /// What the registry took before for these scopes.
    pub(crate) fn authorization(&self, host: &Host, scopes: &[Scope]) -> Option<HeaderValue> {
        let shown = lock(&self.inner.authority.shown);
        let any = || shown.get(&(host.name.clone(), "*".to_owned()));
        let found = shown.get(&key(host, scopes)).or_else(any)?;
        let is_good = found.until.is_none_or(|until| self.inner.clock.now() < until);
        is_good.then(|| found.header.clone())
    }

    /// The same for a request that can be sent once: what has run out is replaced before.
    pub(crate) async fn fresh_authorization(
        &self,
        host: &Host,
        scopes: &[Scope],
    ) -> Result<Option<HeaderValue>, Error> {
        if let Some(shown) = self.authorization(host, scopes) {
            return Ok(Some(shown));
        }
        let asked = lock(&self.inner.authority.asked).get(&host.name).cloned();
        if let Some(challenges) = asked {
            self.authenticate(host, &challenges, scopes, None).await?;
        }
        Ok(self.authorization(host, scopes))
    }

    /// Token servers shall give tokens that stand for the password from now on.
    pub(crate) fn want_refresh_token(&self) {
        *lock(&self.inner.authority.refresh) = Refresh::Wanted;
    }

    /// The token that stands for the password, if a token server has given one.
    pub(crate) fn take_refresh_token(&self) -> Option<String> {
        match std::mem::take(&mut *lock(&self.inner.authority.refresh)) {
            Refresh::Given(token) => Some(token),
            Refresh::Unwanted | Refresh::Wanted => None,
        }
    }

    pub(crate) fn has_credential(&self, host: &Host) -> bool {
        lock(&self.inner.authority.has_credential).get(&host.name).copied().unwrap_or(false)
    }

    /// Finds out what to show for a challenge after `refused` was not taken; whether there is something.
    pub(crate) async fn authenticate(
        &self,
        host: &Host,
        challenges: &[Challenge],
        scopes: &[Scope],
        refused: Option<&HeaderValue>,
    ) -> Result<bool, Error> {
        let authority = &self.inner.authority;
        let _turn = authority.turn.lock().await;
        // Another request may have come first.
        if self.authorization(host, scopes).is_some_and(|now| Some(&now) != refused) {
            return Ok(true);
        }
        lock(&authority.shown).remove(&key(host, scopes));
        let asked = challenges.iter().cloned().map(Challenge::without_scope).collect();
        lock(&authority.asked).insert(host.name.clone(), asked);
        let credential = self.credential(host).await?;
        let bearer = challenges.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
        let made = match (bearer, &credential) {
            (_, Some(Credential::Registry(token))) => {
                Some((("Bearer ".to_owned() + token), "*".to_owned(), None))
            }
            (Some(Challenge::Bearer { realm, service, scope }), _) => {
                let scope = scope.as_deref();
                let (token, life) =
                    self.token(host, realm, service.as_deref(), scope, scopes, credential.as_ref()).await?;
                authority.keep_secret(&token);
                let until = self.inner.clock.now() + life;
                Some(("Bearer ".to_owned() + &token, key(host, scopes).1, Some(until)))
            }
            (_, Some(Credential::Password { user, password })) if challenges.contains(&Challenge::Basic) => {
                Some((basic(user, password), "*".to_owned(), None))
            }
            _ => None,
        };
        let Some((text, scopes, until)) = made else { return Ok(false) };
        let Ok(mut header) = HeaderValue::from_str(&text) else {
            return Err(protocol(&host.base, &Method::GET, "with a token that is none"));
        };
        header.set_sensitive(true);
        if refused == Some(&header) {
            return Ok(false);
        }
        lock(&authority.shown).insert((host.name.clone(), scopes), Shown { header, until });
        Ok(true)
    }

    async fn credential(&self, host: &Host) -> Result<Option<Credential>, Error> {
        let (source, key) = (self.inner.credentials.clone(), credential_key(&host.name).to_owned());
        let asked = tokio::task::spawn_blocking(move || source.credential(&key)).await;
        let found = asked.map_err(|error| Error::Local {
            what: "asking for credentials",
            source: std::io::Error::other(error),
        })??;
        let authority = &self.inner.authority;
        lock(&authority.has_credential).insert(host.name.clone(), found.is_some());
        if let Some(found) = &found {
            authority.keep_secret(found.secret());
            if let Credential::Password { user, password } = found {
                authority.keep_secret(&STANDARD.encode(format!("{user}:{password}")));
            }
        }
        Ok(found)
    }

    /// A token, and how long it holds.
    async fn token(
        &self,
        host: &Host,
        realm: &str,
        service: Option<&str>,
        asked: Option<&str>,
        scopes: &[Scope],
        credential: Option<&Credential>,
    ) -> Result<(String, Duration), Error> {
        let mut url = self.realm(host, realm)?;
        let credential = credential.filter(|_| self.may_know(host, &url));
        let mut wanted: Vec<String> = scopes.iter().map(Scope::text).collect();
        // What the registry asks for in words of its own.
        let others = asked.unwrap_or_default().split_whitespace();
        let others = others.filter(|scope| scope.len() <= MAX_SCOPE_BYTES && !covers(scopes, scope));
        wanted.extend(others.take(10).map(str::to_owned));
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        pairs.extend(service.map(|service| ("service", service)));
        let client = if bare(&host.name) == url.host_str().unwrap_or_default() {
            host.client.clone()
        } else {
            self.elsewhere()?
        };
        let request = if let Some(Credential::Identity(token)) = credential {
            let scope = wanted.join(" ");
            pairs.extend([("grant_type", "refresh_token"), ("refresh_token", token), ("client_id", "kiln")]);
            pairs.push(("scope", &scope));
            let mut form = url.clone();
            form.set_query(None);
            form.query_pairs_mut().extend_pairs(pairs);
            let body = Bytes::from(form.query().unwrap_or_default().to_owned());
            let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
            client.post(url.clone()).headers(HeaderMap::from_iter([(CONTENT_TYPE, kind)])).body(body)
        } else {
            pairs.extend(wanted.iter().map(|scope| ("scope", scope.as_str())));
            let mut request_headers = HeaderMap::new();
            if let Some(Credential::Password { user, password }) = credential {
                pairs.push(("account", user));
                if matches!(*lock(&self.inner.authority.refresh), Refresh::Wanted) {
                    pairs.extend([("offline_token", "true"), ("client_id", "kiln")]);
                }
                if let Ok(mut value) = HeaderValue::from_str(&basic(user, password)) {
                    value.set_sensitive(true);
                    request_headers.insert(AUTHORIZATION, value);
                }
            }
            url.query_pairs_mut().extend_pairs(pairs);
            client.get(url.clone()).headers(request_headers)
        };
        let body = self.token_answer(host, &url, request, credential.is_some()).await?;
        let token: Token = serde_json::from_slice(&body)
            .map_err(|_| protocol(&url, &Method::GET, "with something else than a token"))?;
        let text = token.token.filter(|text| !text.is_empty()).or(token.access_token).unwrap_or_default();
        if text.is_empty() {
            return Err(protocol(&url, &Method::GET, "without a token"));
        }
        if let Some(refresh) = token.refresh_token.filter(|refresh| !refresh.is_empty()) {
            self.inner.authority.keep_secret(&refresh);
            let mut wanted = lock(&self.inner.authority.refresh);
            if matches!(*wanted, Refresh::Wanted) {
                *wanted = Refresh::Given(refresh);
            }
        }
        // None has no life at all: that is a server that does not say.
        let life = token
            .expires_in
            .filter(|seconds| *seconds > 0)
            .map_or(TOKEN_LIFE, Duration::from_secs)
            .min(Duration::from_secs(86_400));
        // It is on its way for a while, and clocks differ.
        Ok((text, life.mul_f64(0.9)))
    }

    async fn token_answer(
        &self,
        registry: &Host,
        url: &Url,
        request: reqwest::RequestBuilder,
        known: bool,
    ) -> Result<Vec<u8>, Error> {
        let response = self.wait(url, &Method::GET, request.send(), None).await?;
        let (host, path, status) = (shown_host(url), shown_path(url), response.status().as_u16());
        let mut response = response;
        let mut body = Vec::new();
        // All that wants a token waits for it: a small document may not take longer than one piece of a large one.
        let (stall, clock) = (self.inner.settings.stall, &*self.inner.clock);
        let until = clock.now() + stall;
        loop {
            let stalled = || Error::Stalled { host: host.clone(), path: path.clone(), after: stall };
            let left = until.saturating_sub(clock.now());
            let piece = within(clock, left, response.chunk()).await.ok_or_else(stalled)?;
            let piece = piece.map_err(|error| Error::Transfer {
                host: host.clone(),
                method: "GET".to_owned(),
                path: path.clone(),
                source: error.without_url(),
            })?;
            let Some(piece) = piece else { break };
            if (body.len() + piece.len()) as u64 > MAX_TOKEN_BYTES {
                return Err(Error::TooLarge { host, path, limit_bytes: MAX_TOKEN_BYTES });
            }
            body.extend_from_slice(&piece);
        }
        if response.status().is_success() {
            return Ok(body);
        }
        let said = crate::error::said(&body, false, &self.inner.authority.secrets());
        let method = "GET".to_owned();
        if matches!(status, 400 | 401 | 403) {
            let registry = registry.name.as_str().into();
            return Err(Error::Denied { host, method, path, status, said, registry, known });
        }
        Err(Error::Status { host, method, path, status, said })
    }

    /// The token server, if it is one that may be asked.
    fn realm(&self, host: &Host, realm: &str) -> Result<Url, Error> {
        let refused = |reason| Error::Refused {
            host: host.name.clone(),
            target: format!("{:?} for a token", clean(realm.split('?').next().unwrap_or_default())),
            reason,
        };
        let mut url = Url::parse(realm).map_err(|_| refused("which is no URL"))?;
        let server = url.host_str().unwrap_or_default().to_owned();
        let is_plain = match url.scheme() {
            "https" => false,
            "http" => true,
            _ => return Err(refused("where only https is asked")),
        };
        let insecure = &self.inner.settings.insecure;
        let may_be_plain = host.base.scheme() == "http"
            && (server == bare(&host.name) || is_loopback(&server) || insecure.contains(&shown_host(&url)));
        if is_plain && !may_be_plain {
            return Err(refused("which would be without encryption"));
        }
        if is_link_local(&url) && server != bare(&host.name) {
            return Err(refused("an address that only this machine's neighbours have"));
        }
        let _ = url.set_username("");
        let _ = url.set_password(None);
        Ok(url)
    }

    /// Whether the server at `url` may see the credentials for `host`: it goes with the registry by its name,
    /// or it is named in the settings.
    fn may_know(&self, host: &Host, url: &Url) -> bool {
        let (registry, server) = (bare(&host.name), url.host_str().unwrap_or_default());
        let below = |inner: &str, outer: &str| {
            inner.strip_suffix(outer).is_some_and(|rest| rest.ends_with('.')) && outer.contains('.')
        };
        let ip = registry.parse::<std::net::IpAddr>().is_ok() || registry.starts_with('[');
        same_origin(url, &host.base)
            || server == registry
            || (!ip && (below(server, registry) || below(registry, server)))
            || (registry == "docker.io" && server == "auth.docker.io")
            || self.inner.settings.token_hosts.contains(server)
    }
}

/// Whether `scopes` ask for what the challenge's scope does.
fn covers(scopes: &[Scope], asked: &str) -> bool {
    let mut parts = asked.splitn(2, ':');
    let (kind, rest) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let Some((path, actions)) = rest.rsplit_once(':') else { return false };
    kind == "repository"
        && scopes.iter().any(|scope| {
            let has = |action: &str| action == "pull" || (action == "push" && scope.push);
            scope.path == path && actions.split(',').all(has)
        })
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{NoCredentials, Settings, host};

    fn host(domain: &str, plain: bool) -> Host {
        let client = host::client(&Settings::default(), None).unwrap();
        Host { name: domain.to_owned(), base: host::base(domain, plain).unwrap(), client }
    }

    fn client() -> Client {
        let token_hosts = ["tokens.example".to_owned()].into();
        Client::new(Settings { token_hosts, ..Settings::default() }, Arc::new(NoCredentials))
    }

    #[test]
    fn a_token_server_gets_credentials_only_when_it_goes_with_the_registry() {
        let client = client();
        let may =
            |domain: &str, realm: &str| client.may_know(&host(domain, false), &Url::parse(realm).unwrap());
        assert!(may("docker.io", "https://auth.docker.io/token"));
        assert!(may("registry.gitlab.com", "https://gitlab.com/jwt/auth"));
        assert!(may("ghcr.io", "https://ghcr.io/token"));
        assert!(may("ghcr.io", "https://auth.ghcr.io/token"));
        assert!(may("h.example:5000", "https://h.example:5001/token"));
        assert!(may("h.example", "https://tokens.example/"));
        for (domain, realm) in [
            ("h.example", "https://evil.example/token"),
            ("h.example", "https://notH.exampleh.example.evil/"),
            ("ghcr.io", "https://evil.io/"),
            ("ghcr.io", "https://io/"),
            ("10.0.0.1", "https://0.0.1/"),
            ("docker.io", "https://evil.docker.io.example/"),
        ] {
            assert!(!may(domain, realm), "{domain} {realm}");
        }
    }

    #[test]
    fn a_token_server_without_encryption_is_refused() {
        let client = client();
        let realm = |domain: &str, plain, realm: &str| client.realm(&host(domain, plain), realm);
        assert!(realm("h.example", false, "https://auth.h.example/t").is_ok());
        assert!(realm("127.0.0.1:1", true, "http://127.0.0.1:2/t").is_ok());
        for (domain, plain, url) in [
            ("h.example", false, "http://h.example/t"),
            ("127.0.0.1:1", true, "http://elsewhere.example/t"),
            ("h.example", false, "https://169.254.169.254/t"),
            ("h.example", false, "file:///etc/passwd"),
            ("h.example", false, "nonsense"),
        ] {
            assert!(matches!(realm(domain, plain, url), Err(Error::Refused { .. })), "{url}");
        }
    }

    #[test]
    fn scopes_that_are_asked_for_already_are_not_asked_for_twice() {
        let scopes = [Scope { path: "a/b".to_owned(), push: true }];
        assert!(covers(&scopes, "repository:a/b:pull,push") && covers(&scopes, "repository:a/b:push,pull"));
        assert!(!covers(&scopes, "repository:a/c:pull") && !covers(&scopes, "registry:catalog:*"));
        assert!(!covers(&scopes, "repository:a/b:delete") && !covers(&scopes, "x"));
    }
}
