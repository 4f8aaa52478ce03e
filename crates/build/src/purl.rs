//! Package URLs: names of packages that mean the same to every tool (purl-spec).

use kiln_oci::{Platform, Reference};

/// What a package URL is made of; parts that are empty are left out.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Purl<'a> {
    /// `deb`, `npm`, …
    pub(crate) kind: &'a str,
    /// Its parts stand between slashes.
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) version: &'a str,
    /// Sorted by name.
    pub(crate) qualifiers: &'a [(&'a str, &'a str)],
}

impl Purl<'_> {
    /// It as text.
    pub(crate) fn to_text(self) -> String {
        let mut text = format!("pkg:{}", self.kind);
        for part in self.namespace.split('/').chain([self.name]).filter(|part| !part.is_empty()) {
            text.push('/');
            push(&mut text, part);
        }
        if !self.version.is_empty() {
            text.push('@');
            push(&mut text, self.version);
        }
        let qualifiers = self.qualifiers.iter().filter(|(_, value)| !value.is_empty());
        for (nth, (name, value)) in qualifiers.enumerate() {
            text.push(if nth == 0 { '?' } else { '&' });
            text.push_str(name);
            text.push('=');
            push(&mut text, value);
        }
        text
    }
}

/// That of an image, as BuildKit writes it.
pub(crate) fn of_image(reference: &Reference, platform: &Platform) -> String {
    let (familiar, platform) = (reference.familiar_name(), platform.to_string());
    let (namespace, name) = familiar.rsplit_once('/').unwrap_or(("", &familiar));
    let digest = reference.digest().map(ToString::to_string).unwrap_or_default();
    let version = reference.tag().unwrap_or(if digest.is_empty() { "latest" } else { "" });
    let qualifiers = [("digest", digest.as_str()), ("platform", platform.as_str())];
    Purl { kind: "docker", namespace, name, version, qualifiers: &qualifiers }.to_text()
}

/// Escapes all that the specification does not leave as it is.
fn push(text: &mut String, part: &str) {
    for byte in part.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' => {
                text.push(char::from(byte));
            }
            other => text.push_str(&format!("%{other:02X}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_escaped_and_empty_ones_are_left_out() {
        let purl = Purl {
            kind: "deb",
            namespace: "debian",
            name: "libstdc++6",
            version: "1:12.2~rc1+b1",
            qualifiers: &[("arch", "amd64"), ("distro", "")],
        };
        assert_eq!(purl.to_text(), "pkg:deb/debian/libstdc%2B%2B6@1:12.2~rc1%2Bb1?arch=amd64");
        let scoped =
            Purl { kind: "npm", namespace: "@scope", name: "x", version: "1.0.0", ..Purl::default() };
        assert_eq!(scoped.to_text(), "pkg:npm/%40scope/x@1.0.0");
    }

    #[test]
    fn images_are_named_as_buildkit_names_them() {
        let platform: Platform = "linux/arm/v7".parse().unwrap();
        let of = |name: &str| of_image(&name.parse().unwrap(), &platform);
        assert_eq!(of("debian"), "pkg:docker/debian@latest?platform=linux%2Farm%2Fv7");
        assert_eq!(
            of("127.0.0.1:5000/team/app:v1"),
            "pkg:docker/127.0.0.1:5000/team/app@v1?platform=linux%2Farm%2Fv7"
        );
        let digest = kiln_oci::Digest::of(b"x");
        assert_eq!(
            of(&format!("ghcr.io/a/b@{digest}")),
            format!("pkg:docker/ghcr.io/a/b?digest={digest}&platform=linux%2Farm%2Fv7")
        );
    }
}
