//! What a cache key was made of, by name: kept of every step that ran, so that the next time it runs
//! the difference can be told.

use kiln_llb::{Component, Op, Source};
use serde::{Deserialize, Serialize};

use super::listing::Listing;

/// Longer values are kept by their beginning and a digest.
const MAX_VALUE: usize = 2048;

/// The parts of one step's key, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PreImage {
    /// As the progress shows it: `[build 2/5] RUN make`.
    pub(crate) title: String,
    /// The op, inputs apart: the first digits of its digest.
    pub(crate) op: String,
    /// The content it reads: the first digits of a digest, or nothing.
    pub(crate) content: String,
    /// Its components as [`Op::components`] names them, without passwords in URLs.
    pub(crate) parts: Vec<(String, String)>,
    /// Variables of its environment that are `ARG`s.
    pub(crate) args: Vec<String>,
    /// What it stands on and reads, in order.
    pub(crate) inputs: Vec<InputImage>,
    /// In which build it ran; see [`crate::builds`].
    pub(crate) build: String,
    /// When; seconds since 1970.
    pub(crate) at_unix: i64,
    /// The snapshot it made; `None`: it failed.
    pub(crate) result: Option<String>,
}

/// One input of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "lowercase")]
pub(crate) enum InputImage {
    /// An image that was not built here.
    Image {
        name: String,
        config: String,
        /// Empty in what was written before it was kept.
        #[serde(default)]
        rootfs: String,
    },
    /// A step, by the snapshot that it left; `None`: no files.
    Step { title: String, result: Option<String> },
    /// Files of whatever they are in, by the list of them.
    Files { title: String, list: Option<String> },
}

impl InputImage {
    /// What is used of `op`, titled `title`, when its result as a whole counts.
    pub(crate) fn whole(op: &Op, title: &str, result: Option<String>) -> Self {
        match op {
            Op::Source(Source::Image(image)) => {
                let (config, rootfs) = (image.config.to_string(), image.rootfs.to_string());
                Self::Image { name: image.reference.familiar(), config, rootfs }
            }
            _ => Self::Step { title: title.to_owned(), result },
        }
    }

    /// The same to whoever uses it, however it is called.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Image { config: one, rootfs: files, .. },
                Self::Image { config: other, rootfs: other_files, .. },
            ) => one == other || (files == other_files && !files.is_empty()),
            (Self::Step { result: one, .. }, Self::Step { result: other, .. }) => one == other,
            (Self::Files { list: one, .. }, Self::Files { list: other, .. }) => one.is_some() && one == other,
            _ => false,
        }
    }
}

impl PreImage {
    /// Its instruction, without the place.
    pub(crate) fn text(&self) -> &str {
        text_of(&self.title)
    }

    /// Its stage and number; nothing and 0 for what has no place.
    pub(crate) fn place(&self) -> (&str, usize) {
        crate::shell::stage_of(&self.title).unwrap_or_default()
    }

    /// `exec`, `file`, `merge`.
    pub(crate) fn kind(&self) -> &str {
        self.parts.first().map_or("", |(_, kind)| kind)
    }

    /// The same key, as far as it is known here.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let inputs = || self.inputs.iter().zip(&other.inputs);
        self.op == other.op
            && self.content == other.content
            && self.inputs.len() == other.inputs.len()
            && inputs().all(|(one, other)| one.is_same(other))
    }
}

/// A title without `[stage n/m]`.
pub(crate) fn text_of(title: &str) -> &str {
    match crate::shell::stage_of(title) {
        Some(_) => title.split_once("] ").map_or(title, |(_, text)| text),
        None => title,
    }
}

/// The components of an op in the form that is kept.
pub(crate) fn parts(op: &Op) -> Vec<(String, String)> {
    let kept = |Component { name, value }| (name, kept(&value));
    op.components().into_iter().map(kept).collect()
}

fn kept(value: &str) -> String {
    let value = kiln_frontend::without_credentials(value);
    if value.len() <= MAX_VALUE {
        return value.into_owned();
    }
    let mut end = MAX_VALUE;
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}… ({})", &value[..end], Listing::name_of(value.as_bytes()))
}

/// The components under names of their own, those of one name together: what belongs to a mount or a
/// file action carries its name in front.
pub(crate) fn named(parts: &[(String, String)]) -> Vec<(String, Vec<&str>)> {
    let mut out: Vec<(String, Vec<&str>)> = Vec::new();
    let (mut group, mut copies) = (String::new(), 0);
    for (name, value) in parts {
        let key = match name.as_str() {
            "mkdir" | "mkfile" => {
                group = format!("{name} {value}");
                group.clone()
            }
            "copy from" => {
                copies += 1;
                group = if copies == 1 { "copy".to_owned() } else { format!("copy {copies}") };
                format!("{group} from")
            }
            _ if name.starts_with("mount ") => {
                group = format!("{name} {value}");
                group.clone()
            }
            _ if name.starts_with("secret env ") => {
                group.clone_from(name);
                name.clone()
            }
            _ if group.is_empty() => name.clone(),
            _ => format!("{group} {name}"),
        };
        match out.iter_mut().find(|(known, _)| *known == key) {
            Some((_, values)) => values.push(value),
            None => out.push((key, vec![value])),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_mounts_and_actions_carry_their_name() {
        let parts = [
            ("op", "exec"),
            ("arg", "sh"),
            ("arg", "-c"),
            ("env A", "1"),
            ("mount bind", "/a"),
            ("from", "1"),
            ("mount cache", "/b"),
            ("from", "2"),
            ("secret env S", "id"),
            ("required", "true"),
        ];
        let parts = parts.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let names: Vec<_> =
            named(&parts).into_iter().map(|(name, values)| (name, values.join(" "))).collect();
        let expected = [
            ("op", "exec"),
            ("arg", "sh -c"),
            ("env A", "1"),
            ("mount bind /a", "/a"),
            ("mount bind /a from", "1"),
            ("mount cache /b", "/b"),
            ("mount cache /b from", "2"),
            ("secret env S", "id"),
            ("secret env S required", "true"),
        ];
        assert_eq!(names, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn passwords_and_long_values_are_not_kept() {
        assert_eq!(kept("curl https://me:secret@host/x"), "curl https://***@host/x");
        let (one, other) = (kept(&"a".repeat(9000)), kept(&format!("{}b", "a".repeat(8999))));
        assert!(one.len() < MAX_VALUE + 50 && one != other);
        assert!(kept(&"ä".repeat(9000)).starts_with("ää"));
    }
}
