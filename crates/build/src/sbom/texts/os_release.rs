//! `os-release`: what an image says that it is.

use super::word;

/// What an image says that it is.
#[derive(Debug, Default)]
pub(crate) struct System {
    /// `debian`; empty: it does not say.
    pub(crate) id: String,
    /// `debian-12`
    pub(crate) distro: String,
}

impl System {
    pub(crate) fn of_text(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            word(line.unwrap_or_default().trim().trim_matches(['"', '\'']))
        };
        let id = value("ID").map(|id| id.to_ascii_lowercase()).unwrap_or_default();
        let distro = match value("VERSION_ID") {
            Some(version) if !id.is_empty() => format!("{id}-{version}"),
            _ => id.clone(),
        };
        Self { id, distro }
    }

    /// Whose packages they are; `usual` where nobody says.
    pub(crate) fn id_or(&self, usual: &str) -> String {
        if self.id.is_empty() { usual.to_owned() } else { self.id.clone() }
    }
}
