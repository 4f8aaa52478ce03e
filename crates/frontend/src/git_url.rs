//! References to git repositories, as `ADD` and build contexts take them.
//!
//! ```text
//! https://host/path.git   git://host/path   ssh://user@host/path   user@host:path   github.com/path
//!     [?tag= branch= ref= subdir= checksum= commit= keep-git-dir= submodules= mtime= fetch-by-commit=]
//!     [#ref[:subdir]]
//! ```
//! What comes out is later put on git's and ssh's command lines, so nothing that begins with `-`
//! and nothing that leaves the repository passes here.

use kiln_llb::{Git, GitMtime};

use crate::nearest;

/// What may stand behind `?`.
const KEYS: [&str; 10] = [
    "ref",
    "tag",
    "branch",
    "subdir",
    "checksum",
    "commit",
    "keep-git-dir",
    "submodules",
    "mtime",
    "fetch-by-commit",
];

/// Object ids are 40 (SHA-1) or 64 (SHA-256) digits; git itself takes no prefix shorter than this.
const MIN_CHECKSUM: usize = 4;
const MAX_CHECKSUM: usize = 64;

/// Why a reference to a git repository is unusable. Never holds credentials.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GitUrlError {
    /// An attempt to reach git's options, ssh's options, or files outside the repository.
    #[error("{what} {value:?} is refused: {why}")]
    Refused {
        /// Which part.
        what: &'static str,
        /// Its text.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A way of transport that is not supported.
    #[error("git over {scheme:?} is not supported; use https, ssh or git")]
    Scheme {
        /// What stands before `://`.
        scheme: String,
    },
    /// No host, or no possible host name or port.
    #[error("{host:?} is not a host")]
    Host {
        /// Host and port.
        host: String,
    },
    /// A key behind `?` that has no meaning.
    #[error("unknown key {key:?} behind `?`{}", hint(nearest.as_ref()))]
    UnknownKey {
        /// The key.
        key: String,
        /// The known one that is close to it.
        nearest: Option<String>,
    },
    /// A key behind `?` stands there twice.
    #[error("{key:?} is given twice")]
    Repeated {
        /// The key.
        key: String,
    },
    /// A value that its key does not take.
    #[error("{value:?} is not a value for {key:?}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
    },
    /// Two parts say different things.
    #[error("{first:?} and {second:?} contradict each other")]
    Conflict {
        /// One value.
        first: String,
        /// The other.
        second: String,
    },
    /// No branch, tag or commit can be called this.
    #[error("{reference:?} is not a possible name of a branch, tag or commit")]
    Reference {
        /// The name.
        reference: String,
    },
    /// `%` not followed by two hexadecimal digits, or bytes that are no text.
    #[error("{text:?} is not properly escaped")]
    Escape {
        /// The part.
        text: String,
    },
}

fn hint(nearest: Option<&String>) -> String {
    nearest.map(|name| format!("; did you mean {name:?}?")).unwrap_or_default()
}

/// Parses a reference to a git repository; `None`: it is none (a path, a download, an image).
///
/// An `http` or `https` URL is one only if its path ends in `.git`. Submodules are on unless
/// switched off.
pub fn parse(text: &str) -> Option<Result<Git, GitUrlError>> {
    if text.starts_with('/') || text.starts_with("./") || text.starts_with("../") {
        return None;
    }
    if is_schemeless(text) {
        return parse_url("https", text, true);
    }
    if let Some((scheme, rest)) = split_scheme(text) {
        return parse_url(&scheme, rest, false);
    }
    parse_scp(text)
}

/// Checks the address of a repository alone, as a submodule names it: no fragment, no query, and a
/// path of any form.
///
/// # Errors
/// [`GitUrlError::Scheme`] for local paths and other transports, [`GitUrlError::Refused`].
pub fn check_remote(text: &str) -> Result<(), GitUrlError> {
    let checked = match split_scheme(text) {
        Some((scheme, rest)) => parse_url(&scheme, rest, true),
        None => parse_scp(text),
    };
    let local = || GitUrlError::Scheme { scheme: "a local path".to_owned() };
    checked.ok_or_else(local)?.map(drop)
}

/// Whether `text` is a repository only by convention (`github.com/…`): a directory of that name
/// goes first where paths are possible.
pub fn is_schemeless(text: &str) -> bool {
    text.starts_with("github.com/")
}

/// Checks a commit, or the first digits of one, and writes it in small letters.
///
/// # Errors
/// [`GitUrlError::Value`].
pub fn parse_checksum(text: &str) -> Result<String, GitUrlError> {
    let fits = (MIN_CHECKSUM..=MAX_CHECKSUM).contains(&text.len());
    if fits && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(text.to_ascii_lowercase());
    }
    Err(GitUrlError::Value { key: "checksum".to_owned(), value: text.to_owned() })
}

/// Whether `text` is a complete object id.
pub fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Checks a directory of a repository and cleans it: no leading `/`, no `.`.
///
/// # Errors
/// [`GitUrlError::Refused`] for `..` and control characters.
pub fn parse_subdir(text: &str) -> Result<String, GitUrlError> {
    refuse_control("subdirectory", text)?;
    let parts: Vec<&str> = text.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    if parts.contains(&"..") {
        return Err(refused("subdirectory", text, "it leaves the repository"));
    }
    Ok(parts.join("/"))
}

/// Checks what is asked for: a branch, tag, `refs/…` or commit; empty: the remote's HEAD.
///
/// # Errors
/// [`GitUrlError::Refused`] for what git would take as an option, [`GitUrlError::Reference`].
pub fn parse_reference(text: &str) -> Result<String, GitUrlError> {
    refuse_control("reference", text)?;
    if text.starts_with('-') {
        return Err(refused("reference", text, "it would be an option of git"));
    }
    // git-check-ref-format(1); `:` and a leading `+` would make it a refspec.
    let odd = |c: char| matches!(c, ' ' | '~' | '^' | ':' | '?' | '*' | '[' | '\\');
    let bad_part = |part: &str| part.is_empty() || part.starts_with('.') || part.ends_with(".lock");
    let bad = text.contains(odd)
        || text.contains("..")
        || text.contains("@{")
        || text.starts_with('+')
        || text.ends_with('.')
        || text == "@"
        || (!text.is_empty() && text.split('/').any(bad_part));
    if bad { Err(GitUrlError::Reference { reference: text.to_owned() }) } else { Ok(text.to_owned()) }
}

fn refused(what: &'static str, value: &str, why: &'static str) -> GitUrlError {
    GitUrlError::Refused { what, value: value.to_owned(), why }
}

fn refuse_control(what: &'static str, text: &str) -> Result<(), GitUrlError> {
    if text.chars().any(char::is_control) {
        return Err(refused(what, text, "it holds control characters"));
    }
    Ok(())
}

fn split_scheme(text: &str) -> Option<(String, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let valid =
        !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    valid.then(|| (scheme.to_ascii_lowercase(), rest))
}

/// The three parts of what stands behind `://`, or of `host:path`.
struct Split<'a> {
    place: &'a str,
    query: Option<&'a str>,
    fragment: Option<&'a str>,
}

fn split(rest: &str) -> Split<'_> {
    let (rest, fragment) = match rest.split_once('#') {
        Some((rest, fragment)) => (rest, Some(fragment)),
        None => (rest, None),
    };
    let (place, query) = match rest.split_once('?') {
        Some((place, query)) => (place, Some(query)),
        None => (rest, None),
    };
    Split { place, query, fragment }
}

fn parse_url(scheme: &str, rest: &str, any_path: bool) -> Option<Result<Git, GitUrlError>> {
    let parts = split(rest);
    let (authority, path) = match parts.place.find('/') {
        Some(at) => parts.place.split_at(at),
        None => (parts.place, ""),
    };
    let supported = match scheme {
        "http" | "https" if any_path || path.ends_with(".git") => true,
        "git" | "ssh" => true,
        "git+ssh" | "ssh+git" | "git+http" | "git+https" | "git+file" => false,
        "file" if path.ends_with(".git") => false,
        _ => return None,
    };
    Some((|| {
        check_authority(authority, scheme)?;
        refuse_control("path", path)?;
        if !supported {
            return Err(GitUrlError::Scheme { scheme: scheme.to_owned() });
        }
        let fragment = parts.fragment.map(|text| unescape(text, Plus::Itself)).transpose()?;
        finish(format!("{scheme}://{authority}{path}"), fragment.as_deref(), parts.query)
    })())
}

/// `user@host:path`; the user must stand there, else `image:tag` and `C:\dir` would be repositories.
fn parse_scp(text: &str) -> Option<Result<Git, GitUrlError>> {
    let (user, rest) = text.split_once('@')?;
    let (host, rest) = rest.split_once(':')?;
    let word = |text: &str, more: &[u8]| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || more.contains(&b))
    };
    if !word(user, b"-_") || !word(host, b"-.") {
        return None;
    }
    let parts = split(rest);
    Some((|| {
        check_authority(&format!("{user}@{host}"), "ssh")?;
        refuse_control("path", parts.place)?;
        if parts.place.starts_with('-') {
            return Err(refused("path", parts.place, "it would be an option on the other side"));
        }
        // No URL: nothing is escaped in the fragment.
        finish(format!("{user}@{host}:{}", parts.place), parts.fragment, parts.query)
    })())
}

/// `[user[:password]@]host[:port]`. The user is checked, but never part of a message.
fn check_authority(authority: &str, scheme: &str) -> Result<(), GitUrlError> {
    let (user, address) = match authority.rsplit_once('@') {
        Some((user, address)) => (Some(user), address),
        None => (None, authority),
    };
    let dash = "it would be an option of ssh";
    if user.is_some_and(|user| user.starts_with('-')) {
        return Err(refused("user", "-…", dash));
    }
    if user.is_some_and(|user| user.chars().any(char::is_control)) {
        return Err(refused("user", "…", "it holds control characters"));
    }
    // git undoes the escaping of an ssh URL before it starts ssh.
    if scheme == "ssh" && user.is_some_and(|user| user.contains('%')) {
        return Err(refused("user", "…", "it is escaped"));
    }
    refuse_control("host", address)?;
    if address.starts_with('-') {
        return Err(refused("host", address, dash));
    }
    let (host, port) = match address.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((inner, rest)) => (inner, rest.strip_prefix(':').or((!rest.is_empty()).then_some("?"))),
        None => match address.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        },
    };
    let bracketed = address.starts_with('[');
    let fits = |b: u8| {
        b.is_ascii_alphanumeric()
            || if bracketed { matches!(b, b':' | b'.') } else { matches!(b, b'-' | b'.' | b'_') }
    };
    let good_host = !host.is_empty() && host.bytes().all(fits);
    let good_port = port.is_none_or(|port| port.is_empty() || port.parse::<u16>().is_ok());
    if scheme.ends_with("file") || (good_host && good_port) {
        Ok(())
    } else {
        Err(GitUrlError::Host { host: address.to_owned() })
    }
}

/// What `+` means in escaped text.
#[derive(Clone, Copy, PartialEq)]
enum Plus {
    Itself,
    /// In a query.
    Blank,
}

fn unescape(text: &str, plus: Plus) -> Result<String, GitUrlError> {
    let bad = || GitUrlError::Escape { text: text.to_owned() };
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(bad);
                let value = digit()? * 16 + digit()?;
                out.push(u8::try_from(value).map_err(|_| bad())?);
            }
            b'+' if plus == Plus::Blank => out.push(b' '),
            other => out.push(other),
        }
    }
    String::from_utf8(out).map_err(|_| bad())
}

fn finish(remote: String, fragment: Option<&str>, query: Option<&str>) -> Result<Git, GitUrlError> {
    let mut git = Git {
        remote,
        reference: String::new(),
        checksum: None,
        subdir: String::new(),
        keep_git_dir: false,
        submodules: true,
        mtime: GitMtime::default(),
        fetch_by_commit: false,
    };
    if let Some(fragment) = fragment {
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        git.reference = parse_reference(reference)?;
        git.subdir = parse_subdir(subdir)?;
    }
    apply_query(&mut git, query.unwrap_or(""))?;
    Ok(git)
}

fn apply_query(git: &mut Git, query: &str) -> Result<(), GitUrlError> {
    let mut seen: Vec<String> = Vec::new();
    let (mut tag, mut branch): (Option<String>, Option<String>) = (None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (key, value) = (unescape(key, Plus::Blank)?, unescape(value, Plus::Blank)?);
        if seen.contains(&key) {
            return Err(GitUrlError::Repeated { key });
        }
        let wrong = || GitUrlError::Value { key: key.clone(), value: value.clone() };
        let flag = || if value.is_empty() { Some(true) } else { parse_bool(&value) }.ok_or_else(wrong);
        let given = || if value.is_empty() { Err(wrong()) } else { Ok(value.as_str()) };
        match key.as_str() {
            "ref" => agree(&mut git.reference, parse_reference(given()?)?)?,
            "tag" => tag = Some(prefixed("refs/tags/", given()?)?),
            "branch" => branch = Some(prefixed("refs/heads/", given()?)?),
            "subdir" => agree(&mut git.subdir, parse_subdir(given()?)?)?,
            "checksum" | "commit" => {
                let mut known = git.checksum.take().unwrap_or_default();
                agree(&mut known, parse_checksum(given()?).map_err(|_| wrong())?)?;
                git.checksum = Some(known);
            }
            "keep-git-dir" => git.keep_git_dir = flag()?,
            "submodules" => git.submodules = flag()?,
            "fetch-by-commit" => git.fetch_by_commit = flag()?,
            "mtime" => {
                git.mtime = match value.as_str() {
                    "checkout" => GitMtime::Checkout,
                    "commit" => GitMtime::Commit,
                    _ => return Err(wrong()),
                };
            }
            _ => {
                let nearest = nearest(&key, KEYS).map(str::to_owned);
                return Err(GitUrlError::UnknownKey { key, nearest });
            }
        }
        seen.push(key);
    }
    if let (Some(first), Some(second)) = (&tag, &branch) {
        return Err(GitUrlError::Conflict { first: first.clone(), second: second.clone() });
    }
    match tag.or(branch) {
        Some(name) => agree(&mut git.reference, name),
        None => Ok(()),
    }
}

/// Sets `known`, or finds it said the same before.
fn agree(known: &mut String, value: String) -> Result<(), GitUrlError> {
    if known.is_empty() || *known == value {
        *known = value;
        return Ok(());
    }
    Err(GitUrlError::Conflict { first: known.clone(), second: value })
}

fn prefixed(prefix: &str, name: &str) -> Result<String, GitUrlError> {
    let name = parse_reference(name)?;
    Ok(if name.starts_with(prefix) { name } else { format!("{prefix}{name}") })
}

/// Reads a switch as Go's `strconv.ParseBool` does.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
