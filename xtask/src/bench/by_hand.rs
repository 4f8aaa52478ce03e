//! What a push and a pull cost when programs that everybody has do the same work beside each other: the floor that kiln is
//! compared with where its time is that of hashing and of somebody else's codec.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::{Row, images, timed};
use crate::packages::find_program;
use crate::step::{self, Failure};

/// Samples of each: as many as of kiln.
const SAMPLES: usize = 3;

/// `$1`: a repository's address. `$2`: the packer. `$3`: where digests go. Then files and directories, each of which becomes a
/// layer. The manifest is left out.
const PUSH: &str = r#"
set -eu -o pipefail
written() { for turn in {1..1000}; do [ ! -s "$1" ] || return 0; sleep 0.01; done; return 1; }
repository=$1 pack=$2 digests=$3; shift 3
origin=${repository%/v2/*}
send() {
  at=$(curl -sSf -o /dev/null -w '%header{location}' -X POST "$repository/blobs/uploads/")
  case $at in /*) at=$origin$at ;; esac
  at=$(tar -c "$1" | tee >(openssl dgst -sha256 -r > "$digests/$1.plain") | $pack |
    tee >(openssl dgst -sha256 -r > "$digests/$1.packed") |
    curl -sSf -o /dev/null -w '%header{location}' -X PATCH -H 'Content-Type: application/octet-stream' -T - "$at")
  case $at in /*) at=$origin$at ;; esac
  written "$digests/$1.packed"
  written "$digests/$1.plain"
  case $at in *\?*) at="$at&" ;; *) at="$at?" ;; esac
  curl -sSf -o /dev/null -X PUT "${at}digest=sha256:$(cut -c1-64 "$digests/$1.packed")"
}
running=
for part; do send "$part" & running="$running $!"; done
for one in $running; do wait "$one"; done
"#;

/// `$1`: a repository's address. `$2`: an empty directory. Then a digest and what unpacks it, for each layer.
const PULL: &str = r#"
set -eu -o pipefail
written() { for turn in {1..1000}; do [ ! -s "$1" ] || return 0; sleep 0.01; done; return 1; }
repository=$1; cd "$2"; shift 2
bring() {
  mkdir "$1"
  curl -sSf "$repository/blobs/sha256:$1" | tee >(openssl dgst -sha256 -r > "$1.packed") "$1.blob" | $2 |
    tee >(openssl dgst -sha256 -r > "$1.plain") | tar -x --numeric-owner -C "$1"
  written "$1.packed"
  written "$1.plain"
  [ "$(cut -c1-64 "$1.packed")" = "$1" ]
}
running=
while [ $# -gt 0 ]; do bring "$1" "$2" & running="$running $!"; shift 2; done
for one in $running; do wait "$one"; done
sync -f .
"#;

/// The programs of one packing: what packs, and what unpacks.
fn programs(packing: &str) -> (&'static str, &'static str) {
    match packing {
        "zstd" => ("zstd -q -3 -T0 -c", "zstd -dcq"),
        // It packs on all cores.
        _ if find_program("pigz").is_some() => ("pigz -5 -c", "pigz -dc"),
        _ => ("gzip -5 -c", "gzip -dc"),
    }
}

/// Whether the programs are there; what is missing is told.
pub(super) fn is_possible() -> bool {
    let missing =
        ["bash", "curl", "openssl", "tar", "zstd"].into_iter().find(|name| find_program(name).is_none());
    if let Some(name) = missing {
        step::note(&format!("{name} is missing: nothing is measured by hand"));
    }
    missing.is_none()
}

fn bash(script: &str, args: &[&str]) -> Command {
    let mut command = Command::new("bash");
    command.args(["-c", script, "by-hand"]).args(args);
    command
}

/// Sends the `parts` of the directory `from` as layers, to `http://PLACE/v2/NAME`.
pub(super) fn push(
    repository: &str,
    packing: &str,
    from: &Path,
    parts: &[&str],
    temp: &Path,
) -> Result<Row, Failure> {
    let (pack, _) = programs(packing);
    let digests = temp.to_string_lossy();
    let times = (0..SAMPLES).map(|_| {
        images::write_mixed(&from.join("big"))?;
        fresh(temp)?;
        timed(bash(PUSH, &[&[repository, pack, &*digests], parts].concat()).current_dir(from))
    });
    let times = times.collect::<Result<Vec<Duration>, Failure>>()?;
    Ok(Row { builder: format!("by hand: tar, openssl, {pack}, curl"), times })
}

/// Brings the image `http://PLACE/v2/NAME` and `tag` into an empty directory.
pub(super) fn pull(repository: &str, tag: &str, packing: &str, temp: &Path) -> Result<Row, Failure> {
    let (_, unpack) = programs(packing);
    let accept = "Accept: application/vnd.oci.image.manifest.v1+json";
    let manifest = format!("{repository}/manifests/{tag}");
    let manifest = step::read(Command::new("curl").args(["-sSf", "-H", accept, &manifest]))?;
    let layers = layers(&manifest, unpack)?;
    let into = temp.to_string_lossy();
    let mut args = vec![repository, &*into];
    layers.iter().for_each(|(hex, unpack)| args.extend([hex.as_str(), unpack]));
    let times = (0..SAMPLES).map(|_| {
        fresh(temp)?;
        timed(&mut bash(PULL, &args))
    });
    let times = times.collect::<Result<Vec<Duration>, Failure>>()?;
    Ok(Row { builder: format!("by hand: curl, openssl, {unpack}, tar, sync"), times })
}

/// The layers of a manifest, and what unpacks each of them.
fn layers<'a>(manifest: &str, unpack: &'a str) -> Result<Vec<(String, &'a str)>, Failure> {
    let manifest: Value = serde_json::from_str(manifest).unwrap_or_default();
    let layers = manifest["layers"].as_array().into_iter().flatten().map(|layer| {
        let digest = layer["digest"].as_str().unwrap_or_default();
        let is_packed =
            layer["mediaType"].as_str().is_some_and(|kind| kind.contains("zip") || kind.contains("zstd"));
        (digest.trim_start_matches("sha256:").to_owned(), if is_packed { unpack } else { "cat" })
    });
    match layers.collect::<Vec<_>>() {
        layers if layers.is_empty() => {
            Err(Failure::Output { line: "curl".to_owned(), expected: "the manifest of an image with layers" })
        }
        layers => Ok(layers),
    }
}

/// Makes the directory new and waits for the disk.
fn fresh(temp: &Path) -> Result<(), Failure> {
    super::remove(temp)?;
    std::fs::create_dir_all(temp).map_err(Failure::io("create", temp))?;
    images::settle()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_is_unpacked_by_what_it_was_packed_with() {
        let manifest = r#"{ "layers": [
            { "digest": "sha256:aa", "mediaType": "application/vnd.oci.image.layer.v1.tar" },
            { "digest": "sha256:bb", "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd" }
        ] }"#;
        let expected = [("aa".to_owned(), "cat"), ("bb".to_owned(), "zstd -dcq")];
        assert_eq!(layers(manifest, "zstd -dcq").unwrap(), expected);
        for none in ["no JSON", "{}", r#"{ "layers": [] }"#] {
            assert!(layers(none, "cat").is_err(), "{none}");
        }
    }
}
