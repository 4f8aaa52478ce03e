//! `kiln du`: sizes that agree with those of `du`.

use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Context, Running, Store, base, needs_root, text};

fn du(store: &Store) -> Value {
    serde_json::from_str(&store.ok(&["du", "--format", "json"]).stdout).expect("du prints JSON")
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} in {value:#}"))
}

/// What `du -s` says of the store.
fn real(store: &Store) -> u64 {
    let output = Command::new("du").args(["-s", "-B1"]).arg(store.root()).output().expect("du runs");
    let output = String::from_utf8(output.stdout).expect("numbers");
    output.split('\t').next().and_then(|bytes| bytes.parse().ok()).expect("a number")
}

#[track_caller]
fn agrees(store: &Store) {
    let (told, real) = (number(&du(store), "total_bytes"), real(store));
    assert!(told.abs_diff(real) * 100 <= real, "kiln says {told}, du says {real}");
}

const DOCKERFILE: &str = "FROM busybox
RUN mkdir /d && for i in $(seq 200); do echo $i > /d/$i; done
RUN ln /d/1 /d/linked && dd if=/dev/zero of=/sparse bs=1 count=1 seek=100M 2> /dev/null
RUN --mount=type=cache,id=things,target=/c dd if=/dev/urandom of=/c/x bs=1k count=300 2> /dev/null
COPY f /f
";

#[test]
fn sizes_agree_with_du_to_one_percent() {
    needs_root!();
    let store = Store::with_busybox();
    agrees(&store);
    let context = Context::new(&[("Dockerfile", DOCKERFILE), ("f", "one")]);
    store.build(&context, &["-t", "app:1"]).expect(0);
    context.write("f", "two");
    store.build(&context, &["-t", "app:2"]).expect(0);
    agrees(&store);
    if let Some(debian) = base("debian-bookworm.tar") {
        store.ok(&["import", text(&debian), "debian:1"]);
        let archive = store.beside("debian.tar");
        store.ok(&["save", "-o", text(&archive), "debian:1"]);
        agrees(&store);
        let other = Store::empty();
        other.ok(&["load", "-i", text(&archive)]);
        agrees(&other);
    }
}

#[test]
fn every_image_layer_mount_and_container_is_listed() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", DOCKERFILE), ("f", "one")]);
    store.build(&context, &["-t", "app:1"]).expect(0);
    context.write("f", "two");
    store.build(&context, &["-t", "app:2"]).expect(0);
    store.ok(&["rmi", "app:1"]);
    let script = "dd if=/dev/zero of=/grown bs=1k count=500 2> /dev/null; echo ready >&2; sleep 600";
    let run = store.command(&["run", "--rm", "--network", "none", "app:2", "sh", "-c", script]);
    let mut container = Running::start(run);
    container.wait_for("ready");

    let usage = du(&store);
    let images = usage["images"].as_array().expect("a list");
    assert_eq!(images.len(), 2, "{usage:#}");
    let app = images.iter().find(|image| image["names"][0] == "app:2").expect("it is listed");
    assert_eq!(number(app, "layers"), 5);
    assert!(number(app, "unique_bytes") < number(app, "disk_bytes"));
    let step = |title: &str| {
        let mut layers = usage["layers"].as_array().expect("a list").iter();
        layers.find(|layer| layer["step"].as_str().is_some_and(|step| step.contains(title))).cloned()
    };
    let made = step("mkdir /d").expect("the step is listed");
    assert_eq!(made["images"][0], "app:2");
    assert_eq!(made["reclaimable"], false);
    assert!(number(&made, "disk_bytes") >= 200 * 4096, "{made}");
    assert!(number(&step("/sparse").expect("listed"), "disk_bytes") < 1 << 20, "holes take nothing");
    assert_eq!(usage["cache_mounts"][0]["id"], "things");
    assert!(number(&usage["cache_mounts"][0], "disk_bytes") >= 300 << 10);
    assert!(number(&usage["containers"][0], "disk_bytes") >= 500 << 10, "{:#}", usage["containers"]);
    let told = store.ok(&["du", "--verbose"]).stdout;
    for part in ["app:2", "things", "mkdir /d", "CONTAINER", "Total"] {
        assert!(told.contains(part), "{told}");
    }
    container.signal(Signal::TERM);
    container.end();
}

#[test]
fn what_is_told_to_be_reclaimable_is_what_prune_frees() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", DOCKERFILE), ("f", "one")]);
    store.build(&context, &["-t", "app:1"]).expect(0);
    context.write("f", "two");
    store.build(&context, &["-t", "app:1"]).expect(0);
    for (flags, key) in
        [(&["prune", "--force"][..], "reclaimable_bytes"), (&["prune", "-af"], "reclaimable_all_bytes")]
    {
        let (before, told) = (du(&store), number(&du(&store), key));
        assert!(told > 0, "{before:#}");
        store.ok(flags);
        let freed = number(&before, "total_bytes") - number(&du(&store), "total_bytes");
        // Directories of blobs and such go or stay as they like.
        assert!(freed.abs_diff(told) <= 64 << 10, "told {told}, freed {freed}");
        assert_eq!(number(&du(&store), key), 0);
    }
}
