//! What is kept of the builds of one Dockerfile from one context for one target: the pre-images of the
//! steps that ran, and the lists of files that they read.
//!
//! ```text
//! builds/lineages/<name>   pre-images, oldest first: a version, JSON, zstd
//! builds/lists/<name>      a list of files under its own digest: zstd
//! ```
//! All of it only explains. What is missing, damaged or of another version is not known, and what cannot
//! be written is not kept.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::listing::Listing;
use super::pre_image::PreImage;
use crate::builds::{self, replace};

const MAGIC: &[u8; 8] = b"kilnlin1";

/// Generations of one step.
const GENERATIONS: usize = 4;

/// Pre-images of one lineage.
const PRE_IMAGES: usize = 400;

/// Lineages that are remembered, those built last.
const LINEAGES: usize = 50;

/// Lists of files that are kept, and what they may take together.
const LISTS: usize = 256;
const LISTS_BYTES: u64 = 64 << 20;

/// A file that claims to be larger once it is unpacked is damaged.
const MAX_BYTES: u64 = 256 << 20;

fn lineage_path(root: &Path, lineage: &str) -> PathBuf {
    builds::dir(root).join("lineages").join(lineage)
}

fn list_path(root: &Path, name: &str) -> PathBuf {
    builds::dir(root).join("lists").join(name)
}

/// The pre-images of a lineage, oldest first.
pub(crate) fn read(root: &Path, lineage: &str) -> Vec<PreImage> {
    let bytes = fs::read(lineage_path(root, lineage)).unwrap_or_default();
    let Some(packed) = bytes.strip_prefix(MAGIC) else { return Vec::new() };
    unpack(packed).and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default()
}

/// Adds pre-images to a lineage, and lets the oldest of each step go.
pub(crate) fn add(root: &Path, lineage: &str, new: Vec<PreImage>) {
    let path = lineage_path(root, lineage);
    let is_new = !path.exists();
    // Of two builds of a lineage that end at once one is forgotten.
    let mut all = read(root, lineage);
    all.extend(new);
    let mut seen: BTreeMap<(String, usize), usize> = BTreeMap::new();
    let mut keep: Vec<bool> = Vec::with_capacity(all.len());
    for (nth, image) in all.iter().rev().enumerate() {
        let (stage, number) = image.place();
        let step = format!("{stage}\n{}\n{}", image.kind(), image.text());
        let count = seen.entry((step, number)).or_default();
        *count += 1;
        keep.push(*count <= GENERATIONS && nth < PRE_IMAGES);
    }
    let mut keep = keep.into_iter().rev();
    all.retain(|_| keep.next().unwrap_or(true));
    let Ok(json) = serde_json::to_vec(&all) else { return };
    let Some(packed) = pack(&json) else { return };
    if replace(&path, &[&MAGIC[..], &packed].concat()).is_ok() && is_new {
        forget_oldest(&builds::dir(root).join("lineages"), LINEAGES, u64::MAX);
    }
}

/// Keeps a list of files.
pub(crate) fn add_list(root: &Path, name: &str, list: &Listing) {
    let path = list_path(root, name);
    // One that is there is used again, and so not among the oldest.
    let touched =
        File::options().write(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
    if touched.is_ok() {
        return;
    }
    if let Some(packed) = pack(list.bytes())
        && replace(&path, &packed).is_ok()
    {
        forget_oldest(&builds::dir(root).join("lists"), LISTS, LISTS_BYTES);
    }
}

/// A list of files; `None`: it is not kept any more.
pub(crate) fn read_list(root: &Path, name: &str) -> Option<Listing> {
    Listing::from_bytes(unpack(&fs::read(list_path(root, name)).ok()?)?)
}

/// Level 1: this stands on the way of a build.
fn pack(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).ok()?;
    encoder.write_all(bytes).ok()?;
    encoder.finish().ok()
}

fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let decoder = zstd::Decoder::new(packed).ok()?;
    decoder.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Removes the files of `dir` that were written first, until so many are left and take so much.
pub(crate) fn forget_oldest(dir: &Path, count: usize, bytes: u64) {
    let mut files: Vec<(SystemTime, u64, PathBuf)> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let stat = entry.metadata().ok()?;
            let size = if stat.is_dir() { dir_bytes(&entry.path()) } else { stat.len() };
            Some((stat.modified().ok()?, size, entry.path()))
        })
        .collect();
    files.sort();
    let (mut left, mut sum) = (files.len(), files.iter().map(|(_, bytes, _)| bytes).sum::<u64>());
    for (_, size, path) in files {
        if left <= count && sum <= bytes {
            return;
        }
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        if removed.is_ok() {
            left -= 1;
            sum -= size;
        }
    }
}

/// What the files right in a directory take.
fn dir_bytes(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|stat| stat.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(text: &str, number: usize, build: usize) -> PreImage {
        PreImage {
            title: format!("[{number}/9] {text}"),
            op: String::new(),
            content: String::new(),
            parts: vec![("op".to_owned(), "exec".to_owned())],
            args: Vec::new(),
            inputs: Vec::new(),
            build: build.to_string(),
            at_unix: 0,
            result: None,
        }
    }

    #[test]
    fn four_generations_of_each_step_are_kept_and_damaged_files_are_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for build in 0..7 {
            add(dir.path(), "x", vec![image("RUN a", 2, build), image("RUN b", 3, build)]);
        }
        let builds = |text| {
            let kept = read(dir.path(), "x").into_iter().filter(|image| image.text() == text);
            kept.map(|image| image.build).collect::<Vec<_>>()
        };
        assert_eq!(builds("RUN a"), ["3", "4", "5", "6"]);
        assert_eq!(builds("RUN b"), ["3", "4", "5", "6"]);
        assert_eq!(read(dir.path(), "y"), []);
        let path = lineage_path(dir.path(), "x");
        let whole = fs::read(&path).unwrap();
        for end in 0..whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            assert_eq!(read(dir.path(), "x"), [], "{end} bytes");
        }
    }

    #[test]
    fn lineages_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        for lineage in 0..LINEAGES + 5 {
            add(dir.path(), &lineage.to_string(), vec![image("RUN a", 2, 0)]);
        }
        assert_eq!(fs::read_dir(dir.path().join("builds/lineages")).unwrap().count(), LINEAGES);
    }
}
