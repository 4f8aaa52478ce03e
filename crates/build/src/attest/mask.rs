//! Keeps secrets out of what is said of an image: everybody who has the image can read it.

use kiln_frontend::{looks_like_secret, without_credentials};
use kiln_llb::{Definition, Op};
use serde_json::Value;

use crate::redact::Redactor;
use crate::{BuildError, BuildRequest};

/// What stands in the place of a value.
pub(super) const MASKED: &str = "***";

/// Shorter values are left where they are part of a text: everything would be full of them.
const MIN_BYTES: usize = 4;

/// Keys whose values are kiln's own words and digests: a short secret may look like a piece of them.
const OURS: [&str; 7] =
    ["buildType", "builderPlatform", "digest", "frontend", "inputs", "language", "mediaType"];

/// The values that nobody may see.
pub(super) struct Mask {
    values: Vec<Vec<u8>>,
}

impl Mask {
    /// Those of `--secret`, and of build arguments and variables whose names are those of secrets.
    ///
    /// # Errors
    /// When a secret cannot be read.
    pub(super) fn of(request: &BuildRequest, definition: &Definition) -> Result<Self, BuildError> {
        let mut values = request.secrets.all_values()?;
        let variables = definition.vertices().iter().flat_map(|vertex| match &vertex.op {
            Op::Exec(exec) => exec.env.as_slice(),
            Op::Source(_) | Op::File(_) | Op::Merge(_) => &[],
        });
        let named = request.build_args.iter().chain(variables.map(|(name, value)| (name, value)));
        let named = named.filter(|(name, _)| looks_like_secret(name));
        values.extend(named.map(|(_, value)| value.as_bytes().to_vec()));
        values.iter_mut().for_each(|value| value.truncate(value.trim_ascii_end().len()));
        Ok(Self { values })
    }

    /// `text` without them, and without the passwords of its URLs.
    pub(super) fn text(&self, text: &str) -> String {
        let fitting = self.values.iter().map(Vec::as_slice).filter(|value| value.len() <= text.len());
        let mut redactor = Redactor::of_at_least(MIN_BYTES, fitting);
        let mut out = Vec::with_capacity(text.len());
        redactor.push(text.as_bytes(), &mut |bytes| out.extend_from_slice(bytes));
        redactor.finish(&mut |bytes| out.extend_from_slice(bytes));
        without_credentials(&String::from_utf8_lossy(&out)).into_owned()
    }

    /// Masks every text in `value` that somebody else may have written.
    pub(super) fn apply(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.text(text),
            Value::Array(all) => all.iter_mut().for_each(|value| self.apply(value)),
            Value::Object(all) => {
                let said = all.iter_mut().filter(|(name, _)| !OURS.contains(&name.as_str()));
                said.for_each(|(_, value)| self.apply(value));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_and_passwords_are_masked_wherever_they_stand() {
        let mask = Mask { values: vec![b"hunter2".to_vec(), b"abc".to_vec()] };
        let mut value = json!({ "a": ["x hunter2 y", { "b": "https://u:pw@host/p" }], "n": 7, "s": "abc" });
        mask.apply(&mut value);
        assert_eq!(value, json!({ "a": ["x *** y", { "b": "https://***@host/p" }], "n": 7, "s": "abc" }));
    }

    #[test]
    fn what_kiln_says_itself_stays_whole() {
        let mask = Mask { values: vec![b"beef".to_vec()] };
        let mut value = json!({ "uri": "x/beef", "digest": { "sha256": "deadbeef" }, "buildType": "beef" });
        mask.apply(&mut value);
        assert_eq!(value, json!({ "uri": "x/***", "digest": { "sha256": "deadbeef" }, "buildType": "beef" }));
    }
}
