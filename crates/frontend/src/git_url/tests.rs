//! Tables of references: what they mean, and why they are refused.

use super::*;

/// `remote`, then what is not the default.
fn show(git: &Git) -> String {
    let Git { remote, reference, checksum, subdir, keep_git_dir, submodules, mtime, fetch_by_commit } = git;
    let mut text = remote.clone();
    let mut add = |name: &str, value: &str| text.push_str(&format!(" {name}={value}"));
    if !reference.is_empty() {
        add("ref", reference);
    }
    if !subdir.is_empty() {
        add("subdir", subdir);
    }
    if let Some(checksum) = checksum {
        add("checksum", checksum);
    }
    if *keep_git_dir {
        add("keep", "yes");
    }
    if !*submodules {
        add("submodules", "no");
    }
    if *mtime == GitMtime::Commit {
        add("mtime", "commit");
    }
    if *fetch_by_commit {
        add("by-commit", "yes");
    }
    text
}

fn check(text: &str, expected: &str) {
    let git = parse(text).unwrap_or_else(|| panic!("{text} is no repository"));
    assert_eq!(show(&git.unwrap_or_else(|error| panic!("{text}: {error}"))), expected, "{text}");
}

fn error(text: &str) -> GitUrlError {
    match parse(text) {
        Some(Err(error)) => error,
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn every_way_to_write_a_repository_is_read() {
    check("https://host/a/b.git", "https://host/a/b.git");
    check("HTTPS://host:8443/a/b.git", "https://host:8443/a/b.git");
    check("http://[::1]:80/b.git", "http://[::1]:80/b.git");
    check("https://user:word@host/b.git#v1", "https://user:word@host/b.git ref=v1");
    check("git://host/b", "git://host/b");
    check("ssh://git@host:2222/a/b", "ssh://git@host:2222/a/b");
    check("git@github.com:moby/buildkit.git", "git@github.com:moby/buildkit.git");
    check("deploy_1@my-host.example:srv/x#main:docs", "deploy_1@my-host.example:srv/x ref=main subdir=docs");
    check("github.com/moby/buildkit", "https://github.com/moby/buildkit");
    check("github.com/moby/buildkit.git#v0.9", "https://github.com/moby/buildkit.git ref=v0.9");
}

#[test]
fn what_is_no_repository_is_left_to_others() {
    for text in [
        "https://host/archive.tar.gz",
        "https://host/x.git/file",
        "http://host",
        "./host.git",
        "../x.git",
        "/srv/x.git",
        "alpine:3.20",
        "host:path",
        "docker-image://alpine@sha256:00",
        "ext::sh -c id",
        "ftp://host/x.git",
        "a b@host:x",
        "file:///etc/passwd",
        "",
    ] {
        assert_eq!(parse(text), None, "{text}");
    }
}

#[test]
fn fragments_name_reference_and_directory() {
    check("https://h/x.git#", "https://h/x.git");
    check("https://h/x.git#:", "https://h/x.git");
    check("https://h/x.git#:/a/./b/", "https://h/x.git subdir=a/b");
    check("https://h/x.git#refs/pull/7/head:a", "https://h/x.git ref=refs/pull/7/head subdir=a");
    check("https://h/x.git#feature%2Fone", "https://h/x.git ref=feature/one");
    check("git@h:x.git#feature/one:a:b", "git@h:x.git ref=feature/one subdir=a:b");
}

#[test]
fn queries_say_the_rest() {
    check("https://h/x.git?ref=v1&subdir=a", "https://h/x.git ref=v1 subdir=a");
    check("https://h/x.git?tag=v1", "https://h/x.git ref=refs/tags/v1");
    check("https://h/x.git?tag=refs/tags/v1", "https://h/x.git ref=refs/tags/v1");
    check("https://h/x.git?branch=a%2Fb", "https://h/x.git ref=refs/heads/a/b");
    check("https://h/x.git?ref=v1#v1", "https://h/x.git ref=v1");
    check("https://h/x.git?checksum=ABCDEF12#v1", "https://h/x.git ref=v1 checksum=abcdef12");
    check("https://h/x.git?commit=abcdef1&checksum=abcdef1", "https://h/x.git checksum=abcdef1");
    check("git@h:x.git?keep-git-dir=1&submodules=false", "git@h:x.git keep=yes submodules=no");
    check("https://h/x.git?keep-git-dir&mtime=commit", "https://h/x.git keep=yes mtime=commit");
    check("https://h/x.git?mtime=checkout&", "https://h/x.git");
    let sha256 = "ab".repeat(32);
    check(
        &format!("https://h/x.git?fetch-by-commit=true&commit={sha256}"),
        &format!("https://h/x.git checksum={sha256} by-commit=yes"),
    );
}

#[test]
fn contradictions_are_errors() {
    for text in [
        "https://h/x.git?ref=a#b",
        "https://h/x.git?tag=a&branch=a",
        "https://h/x.git?tag=a&ref=b",
        "https://h/x.git?branch=a#a",
        "https://h/x.git?checksum=aaaaaaa&commit=bbbbbbb",
        "https://h/x.git?subdir=a#:b",
    ] {
        assert!(matches!(error(text), GitUrlError::Conflict { .. }), "{text}");
    }
    let repeated = error("https://h/x.git?ref=a&ref=a");
    assert_eq!(repeated, GitUrlError::Repeated { key: "ref".to_owned() });
}

#[test]
fn unknown_keys_get_the_nearest_name() {
    let text = error("https://h/x.git?sub-dir=a").to_string();
    assert_eq!(text, "unknown key \"sub-dir\" behind `?`; did you mean \"subdir\"?");
    let text = error("https://h/x.git?zzzzzzzzz=a").to_string();
    assert_eq!(text, "unknown key \"zzzzzzzzz\" behind `?`");
}

#[test]
fn values_are_checked() {
    for text in [
        "https://h/x.git?mtime=now",
        "https://h/x.git?keep-git-dir=maybe",
        "https://h/x.git?ref=",
        "https://h/x.git?checksum=xyz",
        "https://h/x.git?checksum=abc",
    ] {
        assert!(matches!(error(text), GitUrlError::Value { .. }), "{text}");
    }
    for text in ["a..b", "a b", "a~1", "a^{}", "@{u}", "+a", "a.lock", ".a", "a//b", "a/", "a*"] {
        let found = error(&format!("git@h:x?ref={}", text.replace('+', "%2b")));
        assert!(matches!(found, GitUrlError::Reference { .. }), "{text}: {found}");
    }
    assert!(matches!(error("https://h/x.git#a%2"), GitUrlError::Escape { .. }));
    assert!(matches!(error("https://h/x.git#%ff"), GitUrlError::Escape { .. }));
    assert!(matches!(error("https://h:x/x.git"), GitUrlError::Host { .. }));
    assert!(matches!(error("https:///x.git"), GitUrlError::Host { .. }));
    assert!(matches!(error("ssh://%2doProxyCommand/x"), GitUrlError::Host { .. }));
    assert!(matches!(error("file:///srv/x.git"), GitUrlError::Scheme { .. }));
    assert!(matches!(error("git+ssh://h/x.git"), GitUrlError::Scheme { .. }));
}

#[test]
fn options_in_disguise_and_ways_out_are_refused() {
    for text in [
        "git+ssh://-oProxyCommand=id/x.git",
        "ssh://-oProxyCommand=id/x.git",
        "ssh://user@-oProxyCommand=id/x.git",
        "ssh://-oProxyCommand=id@host/x.git",
        "ssh://%2doProxyCommand=id@host/x.git",
        "git@-oProxyCommand:x.git",
        "-oProxyCommand@host:x.git",
        "git@host:-x.git",
        "https://h/x.git#--upload-pack=id:sub",
        "https://h/x.git?ref=--upload-pack=id",
        "https://h/x.git?branch=-x",
        "https://h/x.git#ref:../..",
        "https://h/x.git#ref:a/../../b",
        "https://h/x.git?subdir=..",
        "https://h/x.git#a%0ab",
        "https://h/x.git#:a%00",
        "git@host:a\nb",
        "https://ho\x1bst/x.git",
    ] {
        assert!(matches!(error(text), GitUrlError::Refused { .. }), "{text:?}: {:?}", error(text));
    }
}

#[test]
fn messages_do_not_hold_credentials() {
    for text in ["https://user:canary@h:x/x.git", "ssh://-canary@h/x", "git+https://canary@h/x.git"] {
        assert!(!error(text).to_string().contains("canary"), "{text}");
    }
}

#[test]
fn addresses_of_submodules_are_never_local() {
    for text in
        ["https://host/lib", "http://host:80/lib.git", "git@host:lib", "ssh://git@host/lib", "git://h/x"]
    {
        assert_eq!(check_remote(text), Ok(()), "{text}");
    }
    for text in ["/srv/lib.git", "../lib", "file:///srv/lib.git", "ext::sh -c id", "lib", "ext://x/y", ""] {
        assert!(matches!(check_remote(text), Err(GitUrlError::Scheme { .. })), "{text}");
    }
    assert!(matches!(check_remote("ssh://-oX/y"), Err(GitUrlError::Refused { .. })));
}
