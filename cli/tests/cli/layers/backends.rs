//! Every snapshotter through the binary, and images of many layers.

use std::fs;

use super::docker_archive;
use super::raw::{file, gzip, tar};
use crate::harness::{Context, Store, busybox_tar, needs_root, text};

/// A store that is used with this snapshotter, with busybox in it; `None`, aloud, where that is missing.
fn store_with(snapshotter: &str) -> Option<Store> {
    let store = Store::empty();
    let tar = busybox_tar(&store.beside(""));
    let outcome =
        store.kiln(&["--snapshotter", snapshotter, "import", text(&tar), "busybox", "-c", "CMD [\"sh\"]"]);
    if outcome.stderr.contains("fuse-overlayfs failed") {
        eprintln!("SKIPPED ALOUD: {}", outcome.stderr);
        return None;
    }
    outcome.expect(0);
    Some(store)
}

const DOCKERFILE: &str = r#"FROM busybox AS made
RUN mkdir /a /b && echo a > /a/file && ln /a/file /b/hard && ln -s file /a/soft
COPY file /b/
RUN rm /a/soft && rm -r /b && mkdir /b && echo new > /b/other && chown 7:8 /a/file && chmod 4755 /a/file
RUN mv /a /moved && touch /bin/added
FROM made
COPY --from=made /moved /again
RUN --mount=type=cache,target=/cache echo cached > /cache/x
"#;

#[test]
fn all_snapshotters_build_the_same_tree() {
    needs_root!();
    let context = Context::new(&[("Dockerfile", DOCKERFILE), ("file", "from the context")]);
    let list = "find / -xdev \\( -path /proc -o -path /sys -o -path /dev \\) -prune -o ! -type d -exec stat -c '%n %F %a %u:%g %s' {} + | grep -v '^/bin/\\|^/etc/' | sort; ls /bin/added; cat /moved/file";
    let trees: Vec<String> = ["overlay", "fuse-overlayfs", "copy"]
        .iter()
        .filter_map(|snapshotter| {
            let store = store_with(snapshotter)?;
            let args =
                ["--snapshotter", snapshotter, "build", "--progress", "plain", "-t", "made", context.path()];
            store.kiln(&args).expect(0);
            let again = store.kiln(&args).expect(0);
            assert_eq!(again.ran(), [""; 0], "{snapshotter}: {}", again.stderr);
            let run = ["run", "--rm", "--network", "none", "made", "/bin/sh", "-c", list];
            let tree = store.kiln(&[&["--snapshotter", snapshotter][..], &run].concat()).expect(0).stdout;
            assert!(tree.contains("/moved/file regular file 4755 7:8 2") && !tree.contains("soft"), "{tree}");
            // What is saved is loaded by any other.
            let saved = store.beside("saved.tar");
            store.kiln(&["--snapshotter", snapshotter, "save", "-o", text(&saved), "made"]).expect(0);
            let other = Store::empty();
            other.ok(&["load", "-i", text(&saved)]);
            assert_eq!(other.ok(&run).stdout, tree, "{snapshotter}");
            assert_eq!((store.active_snapshots(), store.mounts()), (vec![], vec![]), "{snapshotter}");
            Some(tree)
        })
        .collect();
    assert!(trees.windows(2).all(|pair| pair[0] == pair[1]), "{trees:#?}");
}

#[test]
fn a_store_keeps_its_form_and_says_so() {
    needs_root!();
    let Some(store) = store_with("copy") else { return };
    store.ok(&["run", "--rm", "--network", "none", "busybox", "true"]);
    store
        .kiln(&["--snapshotter", "overlay", "images"])
        .expect(6)
        .says(&["whole trees", "--snapshotter auto"]);
    store.kiln(&["--snapshotter", "btrfs", "images"]).expect(2).says(&["btrfs", "fuse-overlayfs"]);
    let mut command = store.command(&["images"]);
    command.env("KILN_SNAPSHOTTER", "overlay");
    store.bounded(command).expect(6);
}

/// An image archive of so many layers on top of busybox; each adds a file and hides one.
fn many_layers(store: &Store, count: usize) -> Vec<u8> {
    let base = fs::read(busybox_tar(&store.beside(""))).expect("busybox");
    let mut layers = vec![(base.clone(), base)];
    for nth in 1..=count {
        let above =
            tar(&[file(&format!("layers/{nth}"), "here"), file(&format!("layers/.wh.{}", nth / 2), "")]);
        let packed = if nth % 2 == 0 { gzip(&above) } else { above.clone() };
        layers.push((above, packed));
    }
    let layers: Vec<(&[u8], &[u8])> = layers.iter().map(|(a, b)| (a.as_slice(), b.as_slice())).collect();
    docker_archive("many:1", &layers)
}

#[test]
fn two_hundred_layers_are_loaded_built_upon_and_run() {
    needs_root!();
    let store = Store::empty();
    let archive = store.beside("many.tar");
    fs::write(&archive, many_layers(&store, 200)).expect("ours");
    store.ok(&["load", "-i", text(&archive)]);
    // Each layer hides the one of half its number: those from 101 on are left.
    assert_eq!(store.shell("many:1", "ls /layers | sort -n | head -n 1; ls /layers | wc -l"), "101\n100");
    let more = "RUN rm /layers/200 && echo more > /layers/more\nRUN true\nRUN true\n";
    store.image("more", &format!("FROM many:1\n{more}"));
    assert_eq!(store.shell("more", "ls /layers | wc -l; cat /layers/more"), "100\nmore");
}

#[test]
fn more_layers_than_the_kernel_stacks_are_an_error_that_says_what_to_do() {
    needs_root!();
    let store = Store::empty();
    let archive = store.beside("many.tar");
    fs::write(&archive, many_layers(&store, 505)).expect("ours");
    store.kiln(&["load", "-i", text(&archive)]).expect(8).says(&["500 layers"]);
    assert_eq!(store.ok(&["images", "-q"]).stdout, "");
    // As many as there can be: the next layer is one too many.
    fs::write(&archive, many_layers(&store, 499)).expect("ours");
    store.ok(&["load", "-i", text(&archive)]);
    let context = Context::new(&[("Dockerfile", "FROM many:1\nRUN true\n")]);
    let outcome = store.build(&context, &[]).expect(8);
    outcome.says(&["500 layers", "Dockerfile:2", "hint: ", "COPY --from"]);
    let before = store.ok(&["images", "-q"]).stdout;
    store.ok(&["fsck", "--deep", "--repair"]);
    assert_eq!(store.ok(&["images", "-q"]).stdout, before);
    assert_eq!(store.active_snapshots(), [""; 0]);
}
