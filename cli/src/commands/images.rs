//! `kiln images`, `kiln image ls`

use kiln_content::ImageRecord;
use kiln_oci::Reference;
use serde_json::json;

use super::{ago, human_size, print, table};
use crate::args::images::ImagesArgs;
use crate::args::store::Format;
use crate::errors::Failure;
use crate::session::Session;

/// One image under one of its names.
struct Listed {
    image: ImageRecord,
    name: Option<Reference>,
}

impl Listed {
    fn repository(&self) -> String {
        self.name.as_ref().map_or("<none>".to_owned(), Reference::familiar_name)
    }

    fn tag(&self) -> &str {
        self.name.as_ref().and_then(Reference::tag).unwrap_or("<none>")
    }

    fn id(&self, whole: bool) -> String {
        if whole { self.image.config.to_string() } else { self.image.config.short() }
    }
}

pub(crate) fn run(session: &Session, args: &ImagesArgs) -> Result<u8, Failure> {
    let mut filters =
        args.filter.iter().map(|text| Filter::parse(session, text)).collect::<Result<Vec<_>, _>>()?;
    filters.extend(args.name.clone().map(Filter::Reference));
    let mut listed = Vec::new();
    for image in session.engine.store.images()? {
        let names = session.engine.store.names_of(&image.config)?;
        let nameless = names.is_empty().then_some(None);
        for name in names.into_iter().map(Some).chain(nameless) {
            let found = Listed { image: image.clone(), name };
            if filters
                .iter()
                .map(|filter| filter.fits(session, &found))
                .collect::<Result<Vec<_>, _>>()?
                .iter()
                .all(|fits| *fits)
            {
                listed.push(found);
            }
        }
    }
    print(&match args.format {
        _ if args.quiet => quiet(&listed, args.no_trunc),
        Format::Json => lines(&listed, args),
        Format::Table => shown(&listed, args),
    })?;
    Ok(0)
}

/// Every ID once.
fn quiet(listed: &[Listed], whole: bool) -> String {
    let mut ids: Vec<String> = listed.iter().map(|found| found.id(whole)).collect();
    ids.dedup();
    ids.iter().map(|id| format!("{id}\n")).collect()
}

fn shown(listed: &[Listed], args: &ImagesArgs) -> String {
    let mut head = ["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"].map(str::to_owned).to_vec();
    if args.digests {
        head.insert(2, "DIGEST".to_owned());
    }
    let mut rows = vec![head];
    for found in listed {
        let mut row = vec![
            found.repository(),
            found.tag().to_owned(),
            found.id(args.no_trunc),
            ago(found.image.created_unix),
            human_size(found.image.size_bytes),
        ];
        if args.digests {
            row.insert(2, found.image.manifest.to_string());
        }
        rows.push(row);
    }
    table(&rows)
}

/// An object a line, as docker prints them.
fn lines(listed: &[Listed], args: &ImagesArgs) -> String {
    let line = |found: &Listed| {
        let object = json!({
            "Repository": found.repository(),
            "Tag": found.tag(),
            "ID": found.id(args.no_trunc),
            "Digest": found.image.manifest,
            "CreatedAt": found.image.created_unix,
            "CreatedSince": ago(found.image.created_unix),
            "Size": human_size(found.image.size_bytes),
        });
        format!("{object}\n")
    };
    listed.iter().map(line).collect()
}

/// `--filter`
enum Filter {
    Dangling(bool),
    Reference(String),
    Label(String, Option<String>),
    /// Older than this image, in seconds since 1970.
    Before(i64),
    /// Younger.
    Since(i64),
}

impl Filter {
    fn parse(session: &Session, text: &str) -> Result<Self, Failure> {
        let wrong = |reason: &str| Failure::usage(format!("--filter {text}: {reason}"));
        let (what, value) = text.split_once('=').ok_or_else(|| wrong("it is not WHAT=VALUE"))?;
        Ok(match what {
            "dangling" => Self::Dangling(match value {
                "true" | "1" => true,
                "false" | "0" => false,
                _ => return Err(wrong("it takes true or false")),
            }),
            "reference" => Self::Reference(value.to_owned()),
            "label" => match value.split_once('=') {
                Some((name, value)) => Self::Label(name.to_owned(), Some(value.to_owned())),
                None => Self::Label(value.to_owned(), None),
            },
            "before" => Self::Before(session.find(value)?.created_unix),
            "since" => Self::Since(session.find(value)?.created_unix),
            _ => return Err(wrong("there are dangling, reference, label, before and since")),
        })
    }

    fn fits(&self, session: &Session, found: &Listed) -> Result<bool, Failure> {
        Ok(match self {
            Self::Dangling(wanted) => found.name.is_none() == *wanted,
            Self::Reference(pattern) => found.name.as_ref().is_some_and(|name| {
                let names = [name.familiar(), name.familiar_name(), name.to_string()];
                names.iter().any(|name| matches(pattern.as_bytes(), name.as_bytes()))
            }),
            Self::Label(name, value) => {
                let config = session.config(&found.image)?;
                let label = config.config.labels.get(name);
                label.is_some_and(|label| value.as_ref().is_none_or(|value| value == label))
            }
            Self::Before(created_unix) => found.image.created_unix < *created_unix,
            Self::Since(created_unix) => found.image.created_unix > *created_unix,
        })
    }
}

/// Shell patterns as docker has them for names: neither `*` nor `?` stands for a slash. Costs
/// O(pattern × text).
pub(super) fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
                continue;
            }
            Some(b'?') if text[t] != b'/' => {}
            Some(c) if *c == text[t] => {}
            _ => match star {
                Some((at, from)) if text[from] != b'/' => {
                    star = Some((at, from + 1));
                    (p, t) = (at + 1, from + 1);
                    continue;
                }
                _ => return false,
            },
        }
        p += 1;
        t += 1;
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_stay_within_a_component() {
        for (pattern, text, expected) in [
            ("app", "app", true),
            ("app*", "app:1", true),
            ("*:1", "app:1", true),
            ("*", "team/app:1", false),
            ("*/*", "team/app:1", true),
            ("a?p", "app", true),
            ("a?p", "a/p", false),
            ("*a*b*c", "xaxbxbxc", true),
            ("*a*b*c", "xaxbxbx", false),
            ("", "", true),
            ("", "a", false),
            ("**", "ab", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} {text}");
        }
    }
}
