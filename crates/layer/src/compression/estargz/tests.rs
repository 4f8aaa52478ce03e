//! What is written is read again as a lazy snapshotter reads it: from the end.

use std::sync::atomic::AtomicBool;

use flate2::read::GzDecoder;
use serde_json::Value;

use super::*;
use crate::apply::Limits;
use crate::decoder;
use crate::repack::Times;

const BIG: usize = (9 << 20) + 5;

fn big() -> Vec<u8> {
    (0..BIG).map(|at| (at.wrapping_mul(at) >> 7) as u8).collect()
}

/// A directory, an empty file, a file of three pieces, a link and what an earlier conversion left.
fn tar() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mtime(1_500_000_000);
    header.set_mode(0o755);
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(0);
    tar.append_data(&mut header, "dir/", &b""[..]).unwrap();
    header.set_entry_type(tar::EntryType::Regular);
    for (name, content) in [
        ("dir/empty", Vec::new()),
        ("dir/big", big()),
        ("small", b"hello".to_vec()),
        ("stargz.index.json", b"{}".to_vec()),
        (".no.prefetch.landmark", b"\x0f".to_vec()),
    ] {
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, name, &content[..]).unwrap();
    }
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    tar.append_link(&mut header, "link", "small").unwrap();
    tar.into_inner().unwrap()
}

fn converted(tar: &[u8]) -> (Estargz, Vec<u8>) {
    let cancel = AtomicBool::new(false);
    let options =
        RepackOptions { times: Times::Keep, below: None, limits: Limits::default(), cancel: &cancel };
    let mut blob = Vec::new();
    let (source, written) = estargz(tar, &mut blob, 6, &options).unwrap();
    assert_eq!(source.0, Digest::of(tar));
    (written, blob)
}

/// Finds the table from the blob's end.
fn toc(blob: &[u8], written: &Estargz) -> Value {
    let footer = &blob[blob.len() - 51..];
    assert_eq!((&footer[12..16], &footer[32..38]), (&b"SG\x16\0"[..], &b"STARGZ"[..]));
    let offset = u64::from_str_radix(std::str::from_utf8(&footer[16..32]).unwrap(), 16).unwrap();
    let mut tar = tar::Archive::new(GzDecoder::new(&blob[usize::try_from(offset).unwrap()..]));
    let mut entry = tar.entries().unwrap().next().unwrap().unwrap();
    assert_eq!(&*entry.path_bytes(), TOC_NAME);
    let mut json = Vec::new();
    entry.read_to_end(&mut json).unwrap();
    assert_eq!(Digest::of(&json), written.toc);
    serde_json::from_slice(&json).unwrap()
}

#[test]
fn every_piece_is_found_by_the_table_and_is_what_it_says() {
    let (written, blob) = converted(&tar());
    let toc = toc(&blob, &written);
    assert_eq!(toc["version"], 1);
    let entries = toc["entries"].as_array().unwrap();
    let names: Vec<(&str, &str)> =
        entries.iter().map(|e| (e["name"].as_str().unwrap(), e["type"].as_str().unwrap())).collect();
    let expected = [
        (".no.prefetch.landmark", "reg"),
        ("dir/", "dir"),
        ("dir/empty", "reg"),
        ("dir/big", "reg"),
        ("dir/big", "chunk"),
        ("dir/big", "chunk"),
        ("small", "reg"),
        ("link", "symlink"),
    ];
    assert_eq!(names, expected);
    assert_eq!(entries[1]["modtime"], "2017-07-14T02:40:00Z");
    assert_eq!(entries[7]["linkName"], "small");
    let (whole, small) = (big(), b"hello".to_vec());
    for (nth, content) in [(0, LANDMARK_BYTES), (3, &whole), (4, &whole), (5, &whole), (6, &small)] {
        let entry = &entries[nth];
        let number = |key: &str| usize::try_from(entry[key].as_u64().unwrap_or(0)).unwrap();
        let size =
            if number("chunkSize") > 0 { number("chunkSize") } else { content.len() - number("chunkOffset") };
        let piece = &content[number("chunkOffset")..][..size];
        let mut read = vec![0; size];
        GzDecoder::new(&blob[number("offset")..]).read_exact(&mut read).unwrap();
        assert!(read == piece, "{entry}");
        assert_eq!(entry["chunkDigest"], Digest::of(piece).to_string());
        if entry["type"] == "reg" {
            assert_eq!(entry["digest"], Digest::of(content).to_string());
            assert_eq!(entry["size"], content.len());
        }
    }
}

#[test]
fn readers_of_gzip_layers_read_it_too_and_its_diff_id_is_that_of_the_tar_inside() {
    let (written, blob) = converted(&tar());
    let (_, mut plain) = decoder(&blob[..]).unwrap();
    let mut inside = Vec::new();
    plain.read_to_end(&mut inside).unwrap();
    assert_eq!((Digest::of(&inside), inside.len() as u64), (written.diff_id.0, written.tar_size_bytes));
    let mut archive = tar::Archive::new(&inside[..]);
    let names: Vec<String> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().to_string_lossy().into_owned())
        .collect();
    let expected =
        [".no.prefetch.landmark", "dir/", "dir/empty", "dir/big", "small", "link", "stargz.index.json"];
    assert_eq!(names, expected);
    // Converted again, it is the same layer.
    assert!(converted(&inside).1 == blob);
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let tar = tar();
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    assert!(pool(1).install(|| converted(&tar)).1 == pool(3).install(|| converted(&tar)).1);
}
