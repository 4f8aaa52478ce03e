//! Images of hand-made layers, and screens that can be compared.

use std::fs;
use std::io::{Read, Seek, Write};
use std::process::Command;

use wait4::Wait4;

use crate::harness::{Outcome, Store, text};

/// When all files of these images were changed.
const TIME: u64 = 1_000_000_000;

/// A layer, written entry by entry.
pub(crate) struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Layer {
        Layer(tar::Builder::new(Vec::new()))
    }

    /// Any entry: names and targets are bytes that nobody has looked at.
    pub(crate) fn raw(
        mut self,
        name: &[u8],
        kind: tar::EntryType,
        mode: u32,
        owner: (u64, u64),
        link: &[u8],
        content: &[u8],
    ) -> Layer {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        header.set_mtime(TIME);
        header.set_size(content.len() as u64);
        if kind == tar::EntryType::Char {
            header.set_device_major(1).and_then(|()| header.set_device_minor(3)).expect("small numbers");
        }
        header.set_cksum();
        self.0.append(&header, content).expect("into memory");
        self
    }

    pub(crate) fn dir(self, name: &str) -> Layer {
        self.raw(name.as_bytes(), tar::EntryType::Directory, 0o755, (0, 0), b"", b"")
    }

    pub(crate) fn file(self, name: &str, content: &str) -> Layer {
        self.raw(name.as_bytes(), tar::EntryType::Regular, 0o644, (0, 0), b"", content.as_bytes())
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Layer {
        self.raw(name.as_bytes(), tar::EntryType::Symlink, 0o777, (0, 0), target.as_bytes(), b"")
    }

    pub(crate) fn hard(self, name: &str, target: &str) -> Layer {
        self.raw(name.as_bytes(), tar::EntryType::Link, 0o644, (0, 0), target.as_bytes(), b"")
    }

    /// A whiteout.
    pub(crate) fn gone(self, name: &str) -> Layer {
        let (dir, name) = name.rsplit_once('/').map_or(("", name), |(dir, name)| (dir, name));
        let slash = if dir.is_empty() { "" } else { "/" };
        self.file(&format!("{dir}{slash}.wh.{name}"), "")
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().expect("into memory")
    }
}

/// Makes an image of these layers: the lowest is imported, the others are appended.
#[track_caller]
pub(crate) fn image<const N: usize>(store: &Store, name: &str, layers: [Layer; N]) {
    for (nth, layer) in layers.into_iter().enumerate() {
        let bytes = layer.bytes();
        if nth == 0 {
            let mut file = tempfile::tempfile().expect("temporary files can be made");
            file.write_all(&bytes).and_then(|()| file.rewind()).expect("ours to write");
            let mut command = store.command(&["import", "-", name]);
            let imported = command.stdin(file).output().expect("kiln starts");
            assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));
        } else {
            let path = store.beside(&format!("layer-{}.tar", nth + 1));
            fs::write(&path, bytes).expect("ours to write");
            store.ok(&["mutate", name, "--append", text(&path), "-t", name]);
        }
    }
}

/// Compares a screen, digests left out. Expected lines stand below each other, the first one empty.
#[track_caller]
pub(crate) fn check_screen(outcome: Outcome, code: i32, expected: &str) {
    let outcome = outcome.expect(code);
    let shown = without_digests(&outcome.stdout);
    assert_eq!(shown, expected.trim_start_matches('\n'), "\n{shown}");
    assert_eq!(outcome.stderr, "");
}

/// Short digests become as many dots.
fn without_digests(screen: &str) -> String {
    let is_hex = |word: &str| word.len() == 12 && word.bytes().all(|b| b.is_ascii_hexdigit());
    let lines = screen.split('\n').map(|line| {
        let words = line.split(' ').map(|word| if is_hex(word) { "............" } else { word });
        words.collect::<Vec<_>>().join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// What is on standard output, as JSON.
#[track_caller]
pub(crate) fn json(outcome: &Outcome) -> serde_json::Value {
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {}", outcome.stdout))
}

/// Runs a command to its end and holds it to 256 MiB of memory, however long it takes.
#[track_caller]
pub(crate) fn in_little_memory(mut command: Command) -> Outcome {
    // A file, because wait4(2) reaps the child: nobody may be left to empty a pipe.
    let mut stdout = tempfile::tempfile().expect("temporary files can be made");
    command.stdout(stdout.try_clone().expect("there are file descriptors left"));
    let used = command.spawn().expect("kiln starts").wait4().expect("our child");
    let rss_mib = used.rusage.maxrss >> 20;
    assert!(rss_mib < 256, "{rss_mib} MiB of memory");
    let mut text = String::new();
    stdout.rewind().and_then(|()| stdout.read_to_string(&mut text)).expect("ours to read");
    Outcome { code: used.status.code(), stdout: text, stderr: String::new() }
}
