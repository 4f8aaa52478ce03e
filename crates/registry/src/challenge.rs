//! `WWW-Authenticate`: what a registry wants to see.

/// One challenge of a header (RFC 9110, section 11.6.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The same for whatever is done next.
    pub(crate) fn without_scope(self) -> Self {
        match self {
            Self::Bearer { realm, service, .. } => Self::Bearer { realm, service, scope: None },
            Self::Basic => Self::Basic,
        }
    }
}

/// The challenges that this client knows, in the order they came. A header may hold several, and there
/// may be several headers; parts that do not parse end theirs.
pub(crate) fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut scheme: Option<String> = None;
    let mut parameters: Vec<(String, String)> = Vec::new();
    let mut rest = header.trim_start_matches([' ', ',', '\t']);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !is_token(c)).unwrap_or(rest.len());
        if end == 0 {
            break;
        }
        let (word, after) = rest.split_at(end);
        let behind = after.trim_start();
        match behind.strip_prefix('=') {
            // `name=value` belongs to the scheme before it.
            Some(value) if scheme.is_some() => {
                let Some((value, after)) = take_value(value.trim_start()) else { break };
                parameters.push((word.to_ascii_lowercase(), value));
                rest = after;
            }
            _ => {
                challenges.extend(finish(scheme.replace(word.to_ascii_lowercase()), &mut parameters));
                rest = after;
            }
        }
        rest = rest.trim_start_matches([' ', ',', '\t']);
    }
    challenges.extend(finish(scheme, &mut parameters));
    challenges
}

fn finish(scheme: Option<String>, parameters: &mut Vec<(String, String)>) -> Option<Challenge> {
    let parameters = std::mem::take(parameters);
    let find = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    match scheme?.as_str() {
        "basic" => Some(Challenge::Basic),
        "bearer" => {
            Some(Challenge::Bearer { realm: find("realm")?, service: find("service"), scope: find("scope") })
        }
        _ => None,
    }
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

/// A token or a quoted string, and what stands behind it.
fn take_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|c: char| !is_token(c) && !":/".contains(c)).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Challenge::Bearer { realm: realm.to_owned(), service: owned(service), scope: owned(scope) }
    }

    #[test]
    fn challenges_are_read_as_registries_write_them() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/debian:pull,push""#;
        let scope = Some("repository:library/debian:pull,push");
        assert_eq!(parse(hub), [bearer("https://auth.docker.io/token", Some("registry.docker.io"), scope)]);
        assert_eq!(parse(r#"Basic realm="a \"quoted\", one""#), [Challenge::Basic]);
        assert_eq!(parse("basic"), [Challenge::Basic]);
        let both = r#"Negotiate, bearer Realm = https://h/t , Basic realm="x""#;
        assert_eq!(parse(both), [bearer("https://h/t", None, None), Challenge::Basic]);
    }

    #[test]
    fn any_header_is_read_to_its_end() {
        let words =
            ["Bearer", "basic", "realm", "=", "\"", "\\", ",", " ", "https://h/t", "é", "a/b:c", "\t"];
        let mut seed = 7_u64;
        for _ in 0..20_000 {
            let mut header = String::new();
            for _ in 0..12 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                header.push_str(words[(seed >> 33) as usize % words.len()]);
            }
            assert!(parse(&header).len() <= 12, "{header}");
        }
    }

    #[test]
    fn what_is_no_challenge_is_none() {
        for header in
            ["", ",,,", "Bearer", "Bearer realm=\"unfinished", "=x", "\u{e9}", "Bearer service=\"x\""]
        {
            assert_eq!(parse(header), [], "{header}");
        }
    }
}
