//! References to git repositories: nothing that is accepted can be an option of git or ssh, or
//! leave the repository.
#![no_main]

use kiln_frontend::git_url::{parse, parse_checksum, parse_reference, parse_subdir};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let is_harmless = |part: &str| !part.starts_with('-') && !part.contains(char::is_control);
    if let Some(Ok(git)) = parse(text) {
        let remote = git.remote.as_str();
        assert!(!remote.is_empty() && is_harmless(remote), "{remote:?}");
        // `scheme://user@host:port/path` or `user@host:path`.
        let is_scheme = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'+');
        let url = remote.split_once("://").filter(|(scheme, _)| is_scheme(scheme));
        let authority = match url {
            Some((_, rest)) => rest.split('/').next().unwrap_or(""),
            None => remote.split(':').next().unwrap_or(""),
        };
        let host = authority.rsplit('@').next().unwrap_or("");
        assert!(is_harmless(authority) && is_harmless(host), "{remote:?}");
        assert!(is_harmless(&git.reference), "{:?}", git.reference);
        assert!(
            !git.subdir.starts_with('/') && !git.subdir.split('/').any(|name| name == ".."),
            "{:?}",
            git.subdir
        );
        let is_hex = |text: &String| text.bytes().all(|byte| byte.is_ascii_hexdigit());
        assert!(git.checksum.iter().all(is_hex), "{:?}", git.checksum);
    }
    if let Ok(reference) = parse_reference(text) {
        assert!(is_harmless(&reference), "{reference:?}");
    }
    if let Ok(subdir) = parse_subdir(text) {
        assert_eq!(parse_subdir(&subdir).as_ref(), Ok(&subdir), "a clean path stays as it is");
    }
    if let Ok(checksum) = parse_checksum(text) {
        assert!((4..=64).contains(&checksum.len()), "{checksum:?}");
    }
});
