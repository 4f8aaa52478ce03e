//! The package mirror that this machine's apt uses, so that base trees use the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::step::{self, Failure};

/// Where Debian itself can be had when the machine's configuration does not tell.
const PUBLIC: &str = "http://deb.debian.org/debian";

/// Suites whose mirror certainly carries bookworm.
const DEBIAN_SUITES: &[&str] = &["bookworm", "trixie", "forky", "sid", "stable", "testing", "unstable"];

/// How to reach Debian's packages from here.
pub(crate) struct Mirror {
    /// Base address, as debootstrap takes it.
    pub(crate) uri: String,
    /// Lines for a file in `/etc/apt/apt.conf.d` of a base tree: proxy and date checks.
    pub(crate) apt_options: String,
}

impl Mirror {
    /// Reads this machine's apt configuration.
    pub(crate) fn of_this_machine() -> Mirror {
        let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let is_debian = os_release.lines().any(|line| line == "ID=debian");
        let sources = if is_debian { source_files(Path::new("/etc/apt")) } else { Vec::new() };
        let uri = sources.iter().find_map(|(path, text)| debian_uri(path, text));
        let dump = step::read(Command::new("apt-config").arg("dump")).unwrap_or_default();
        Mirror { uri: uri.unwrap_or_else(|| PUBLIC.to_owned()), apt_options: options(&dump) }
    }

    /// Makes apt inside `tree` reach packages as this machine does.
    pub(crate) fn configure(&self, tree: &Path) -> Result<(), Failure> {
        let etc = tree.join("etc/apt");
        write(&etc.join("sources.list"), &format!("deb {} bookworm main\n", self.uri))?;
        if !self.apt_options.is_empty() {
            write(&etc.join("apt.conf.d/90machine"), &self.apt_options)?;
        }
        if self.uri.starts_with("https:") {
            let bundle = Path::new("etc/ssl/certs/ca-certificates.crt");
            let to = tree.join(bundle);
            fs::create_dir_all(to.parent().unwrap_or(tree)).map_err(Failure::io("create", &to))?;
            fs::copy(Path::new("/").join(bundle), &to).map_err(Failure::io("copy the CA bundle to", &to))?;
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).map_err(Failure::io("write", path))
}

// In apt's own order: sources.list, then the parts by name.
fn source_files(etc_apt: &Path) -> Vec<(PathBuf, String)> {
    let mut parts: Vec<PathBuf> = fs::read_dir(etc_apt.join("sources.list.d"))
        .map(|dir| dir.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    parts.retain(|path| path.extension().is_some_and(|ext| ext == "list" || ext == "sources"));
    parts.sort();
    let files = std::iter::once(etc_apt.join("sources.list")).chain(parts);
    files.filter_map(|path| fs::read_to_string(&path).ok().map(|text| (path, text))).collect()
}

fn debian_uri(path: &Path, text: &str) -> Option<String> {
    let entries =
        if path.extension().is_some_and(|ext| ext == "sources") { deb822(text) } else { one_line(text) };
    let found = entries.into_iter().find(|entry| {
        entry.components.iter().any(|word| word == "main")
            && entry.suites.iter().any(|suite| DEBIAN_SUITES.contains(&suite.as_str()))
            && (entry.uri.starts_with("http://") || entry.uri.starts_with("https://"))
    });
    found.map(|entry| entry.uri.trim_end_matches('/').to_owned())
}

/// One binary package source.
#[derive(Debug, PartialEq)]
struct Entry {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
}

// `deb [options] URI SUITE COMPONENT...`
fn one_line(text: &str) -> Vec<Entry> {
    let entry = |line: &str| {
        let line = line.split('#').next()?.trim().strip_prefix("deb ")?.trim_start();
        let line = if line.starts_with('[') { line.split_once(']')?.1 } else { line };
        let mut words = line.split_whitespace().map(str::to_owned);
        Some(Entry { uri: words.next()?, suites: vec![words.next()?], components: words.collect() })
    };
    text.lines().filter_map(entry).collect()
}

// Stanzas of `Field: words`, continuation lines indented, `#` lines dropped.
fn deb822(text: &str) -> Vec<Entry> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).filter_map(stanza).collect()
}

fn stanza(lines: &[&str]) -> Option<Entry> {
    let field = |name: &str| -> Vec<String> {
        let mut words = Vec::new();
        let mut inside = false;
        for line in lines {
            let value = if line.starts_with([' ', '\t']) {
                inside.then_some(*line)
            } else {
                let (key, value) = line.split_once(':').unwrap_or((line, ""));
                inside = key.trim().eq_ignore_ascii_case(name);
                inside.then_some(value)
            };
            words.extend(value.unwrap_or("").split_whitespace().map(str::to_owned));
        }
        words
    };
    let off = field("Enabled").first().is_some_and(|word| word == "no");
    if off || !field("Types").iter().any(|kind| kind == "deb") {
        return None;
    }
    let uri = field("URIs").into_iter().next()?;
    Some(Entry { uri, suites: field("Suites"), components: field("Components") })
}

// Of `apt-config dump`, what decides whether a mirror can be reached from this network. Nothing
// that runs programs or names files of this machine.
fn options(dump: &str) -> String {
    let wanted = |line: &&str| {
        let name = line.split_whitespace().next().unwrap_or("").to_ascii_lowercase();
        let proxy = name.ends_with("::proxy") && name.starts_with("acquire::http");
        let date = ["acquire::check-valid-until", "acquire::check-date", "acquire::forceipv4"];
        (proxy || date.contains(&name.as_str())) && !line.contains('@') && !line.ends_with(" \"\";")
    };
    dump.lines().filter(wanted).map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_debian_source_with_main_wins() {
        let text = "# a mirror\ndeb-src http://mirror.example/debian bookworm main\n\
                    deb http://mirror.example/security bookworm-security main\n\
                    deb [arch=amd64 signed-by=/k.gpg] https://mirror.example/debian/ bookworm main contrib # near\n";
        assert_eq!(
            debian_uri(Path::new("sources.list"), text).as_deref(),
            Some("https://mirror.example/debian")
        );
    }

    #[test]
    fn deb822_stanzas_are_read_with_comments_and_continuations() {
        let text = "Types: deb\n# moved\nURIs: https://other.example/node\nSuites: nodistro\nComponents: main\n\n\
                    Types: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm\n  bookworm-updates\nComponents: main\n";
        assert_eq!(debian_uri(Path::new("a.sources"), text).as_deref(), Some("http://mirror.example/debian"));
    }

    #[test]
    fn a_disabled_stanza_is_no_source() {
        let text = "Types: deb\nEnabled: no\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n";
        assert_eq!(debian_uri(Path::new("a.sources"), text), None);
    }

    #[test]
    fn only_options_that_reach_the_mirror_are_taken_over() {
        let dump = "Acquire::http::Proxy \"http://proxy.example:3128\";\nAcquire::https::Proxy \"http://me:secret@proxy.example\";\n\
                    Acquire::Check-Date \"false\";\nAcquire::ForceIPv4 \"\";\nDPkg::Post-Invoke:: \"rm -rf x\";\n";
        assert_eq!(
            options(dump),
            "Acquire::http::Proxy \"http://proxy.example:3128\";\nAcquire::Check-Date \"false\";\n"
        );
    }
}
