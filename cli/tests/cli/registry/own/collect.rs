//! What is removed: by hand, by a signal, by time.

use std::path::Path;

use kiln_oci::Digest;
use rustix::process::Signal;
use serde_json::Value;

use super::{Own, write};
use crate::harness::{Outcome, text};

fn collect(dir: &Path, args: &[&str]) -> Outcome {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(["registry", "gc", text(dir)]).args(args);
    Outcome::of(command.output().expect("kiln starts"))
}

#[test]
fn garbage_is_told_with_reasons_and_then_removed() {
    let own = Own::start();
    let mut client = own.client();
    client.push_image("team/app", "kept", "kept");
    let (old, _) = client.push_image("team/app", "v1", "old");
    client.push_image("team/app", "v1", "new");
    let layer = Digest::of(b"layer of old");
    let dir = own.at("");
    // While it is served one may look; what is young stays unless somebody says otherwise.
    let told = collect(&dir, &["--dry-run", "--untagged"]).expect(0).stdout;
    assert!(
        told.contains("it is younger than the grace time") && told.contains("0 blobs would go"),
        "{told}"
    );
    let args = ["--untagged", "--grace", "0s"];
    let told = collect(&dir, &[&args[..], &["--dry-run"]].concat()).expect(0).stdout;
    for (digest, reason) in [
        (old, "no tag, index or subject leads to it"),
        (layer, "no manifest of its repository needs it"),
        (layer, "no repository has it"),
        (Digest::of(b"layer of kept"), "a manifest needs it"),
    ] {
        let short = &digest.hex()[..12];
        assert!(told.lines().any(|line| line.contains(short) && line.ends_with(reason)), "{reason}: {told}");
    }
    assert!(told.ends_with("1 manifests and 2 blobs would go, 65B\n"), "{told}");
    collect(&dir, &args).expect(6).says(&["another process serves", "SIGUSR1", "--dry-run"]);
    client.get(&format!("/v2/team/app/manifests/{old}")).expect(200);
    drop(client);
    own.signal(Signal::TERM);
    let (_, kept) = own.wait();

    let dir = kept.path().join("registry");
    let config = write(kept.path(), "registry.toml", &format!("dir = {dir:?}\ngc-untagged = true\n"));
    let by_config = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(["registry", "gc", "--config", &config, "--grace", "0s", "--format", "json"])
        .output()
        .unwrap();
    let told: Value = serde_json::from_str(&Outcome::of(by_config).expect(0).stdout).unwrap();
    assert_eq!((&told["manifests"], &told["blobs"], &told["dry_run"]), (&1.into(), &2.into(), &false.into()));
    let removed = told["objects"].as_array().unwrap().iter().filter(|it| it["removed"] == true);
    assert_eq!(removed.count(), 5, "a manifest, and two blobs with their shares: {told}");
    let told = collect(&dir, &args).expect(0).stdout;
    assert_eq!(told, "0 manifests and 0 blobs removed, 0B\n");
    collect(&kept.path().join("none"), &[]).expect(4).says(&["none is not the directory of a registry"]);

    let own = Own::on(kept, &[]);
    let mut client = own.client();
    client.get("/v2/team/app/manifests/v1").expect(200);
    client.get(&format!("/v2/team/app/manifests/{old}")).expect(404);
    client.get(&format!("/v2/team/app/blobs/{layer}")).expect(404);
    client.get(&format!("/v2/team/app/blobs/{}", Digest::of(b"layer of kept"))).expect(200);
}

#[test]
fn a_signal_collects_at_once() {
    let own = Own::logged(&[]);
    own.client().push_image("a", "v1", "x");
    own.signal(Signal::USR1);
    own.until(true, || own.counts("collections_total 1"));
    own.until(true, || own.log().contains("garbage collection removed 0 manifests and 0 blobs, 0B\n"));
    own.client().get("/v2/a/manifests/v1").expect(200);
}

#[test]
fn uploads_end_when_their_time_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let config = write(dir.path(), "registry.toml", "upload-life = \"5s\"\n");
    let own = Own::with(&["--config", &config]);
    let place = own.client().begin("a");
    own.client().send("PATCH", &place, &[], b"half").expect(202);
    own.until(404, || own.client().get(&place).status);
    own.until(true, || own.counts("expired_uploads_total 1"));
    assert_eq!(std::fs::read_dir(own.at("uploads")).unwrap().count(), 0);
}
