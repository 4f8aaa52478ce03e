//! Layers whose paths go through directories, or links, that only lower layers have.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::docker_archive;
use super::raw::{Member, dir, file, gzip, symlink, tar};
use crate::harness::{Context, Store, busybox_tar, needs_root, text};
use crate::interop::{Tools, needs};

fn dated(name: &str, mode: u64, owner: u64, time: u64) -> Vec<u8> {
    Member::new(name, b'5').mode(mode).octal(108, 8, owner).octal(116, 8, owner).octal(136, 12, time).bytes()
}

/// busybox, a layer of directories and links, and layers that go through them.
fn layers(scratch: &Path) -> Vec<Vec<u8>> {
    let busybox = fs::read(busybox_tar(scratch)).expect("busybox");
    let below = tar(&[
        dated("spool", 0o1777, 7, 1000),
        dated("spool/deep", 0o2775, 8, 2000),
        dated("real", 0o711, 9, 3000),
        dated("real/lib", 0o751, 10, 4000),
        symlink("link", "real/lib"),
        symlink("absolute", "/real"),
    ]);
    let above = tar(&[
        file("spool/x", "x"),
        file("spool/deep/y", "y"),
        file("link/behind", "behind"),
        file("absolute/lib/also", "also"),
        file("new/dir/z", "z"),
    ]);
    // On top of a layer that went through links; one entry is a directory's own.
    let top = tar(&[
        file("link/.wh.behind", ""),
        dir("link/own"),
        file("spool/deep/.wh.y", ""),
        file("spool/top", ""),
    ]);
    vec![busybox, below, above, top]
}

const LIST: &str = "cd / && for f in spool spool/deep spool/x spool/top real real/lib real/lib/* link absolute new new/dir new/dir/z; \
                    do stat -c '%n %F %a %u:%g %Y' $f; done";

fn archive(layers: &[Vec<u8>]) -> Vec<u8> {
    let packed: Vec<Vec<u8>> = layers.iter().map(|layer| gzip(layer)).collect();
    let mut pairs: Vec<(&[u8], &[u8])> =
        layers.iter().zip(&packed).map(|(plain, packed)| (plain.as_slice(), packed.as_slice())).collect();
    // Plain ones too.
    pairs[2].1 = &layers[2];
    docker_archive("implied:1", &pairs)
}

/// Without the lines of what has the time of its making.
fn settled(list: &str) -> String {
    let lines = list.lines().filter(|line| !line.starts_with("link") && !line.starts_with("absolute"));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn directories_of_lower_layers_stay_as_they_are() {
    needs_root!();
    let mut trees = Vec::new();
    for snapshotter in ["overlay", "copy", "fuse-overlayfs"] {
        let store = Store::empty();
        let input = store.beside("implied.tar");
        fs::write(&input, archive(&layers(&store.beside("")))).expect("ours");
        let with = |args: &[&str]| store.kiln(&[&["--snapshotter", snapshotter], args].concat());
        let loaded = with(&["load", "-i", text(&input)]);
        if loaded.stderr.contains("fuse-overlayfs failed") {
            eprintln!("SKIPPED ALOUD: {}", loaded.stderr);
            continue;
        }
        loaded.expect(0);
        let run = ["run", "--rm", "--network", "none", "implied:1", "/bin/sh", "-c", LIST];
        let list = with(&run).expect(0).stdout;
        for line in [
            "spool directory 1777 7:7 1000",
            "spool/deep directory 2775 8:8 2000",
            "real directory 711 9:9 3000",
            "real/lib directory 751 10:10 4000",
            "real/lib/also regular file 644 0:0 1",
            "real/lib/own directory 755 0:0 1",
            "link symbolic link 777 0:0 1",
            "new directory 755 0:0 0",
            "new/dir directory 755 0:0 0",
        ] {
            // fuse-overlayfs drops this bit of a directory that it copies up, in RUN steps too.
            let line =
                if snapshotter == "fuse-overlayfs" { line.replace("2775", "775") } else { line.to_owned() };
            assert!(list.lines().any(|found| found == line), "{snapshotter}: {line} in {list}");
        }
        assert!(!list.contains("behind"), "{snapshotter}: {list}");
        with(&["fsck", "--deep"]).expect(0);
        let committed = fs::read_dir(store.root().join("snapshots/committed")).expect("ours");
        let places = committed.map(|entry| entry.expect("ours").path().join("fs/spool/deep"));
        for place in places.filter(|place| place.is_dir()) {
            fs::set_permissions(&place, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("ours");
        }
        let said = with(&["fsck", "--deep"]).expect(6).stdout;
        assert!(said.contains("files"), "{snapshotter}: {said}");
        trees.push(list.replace("2775", "775"));
    }
    assert!(trees.windows(2).all(|pair| pair[0] == pair[1]), "{trees:#?}");
}

#[test]
fn umoci_unpacks_what_kiln_loads_to_the_same_tree() {
    needs!("umoci", "skopeo");
    let (store, tools) = (Store::empty(), Tools::new());
    let input = store.beside("implied.tar");
    fs::write(&input, archive(&layers(&store.beside("")))).expect("ours");
    store.ok(&["load", "-i", text(&input)]);
    let ours = store.shell("implied:1", LIST);

    let (archive, layout, bundle) = (tools.path("a.tar"), tools.path("layout"), tools.path("bundle"));
    store.ok(&["save", "--format", "oci", "-o", text(&archive), "implied:1"]);
    let policy = tools.path("policy.json");
    let source = format!("oci-archive:{}", text(&archive));
    let image = format!("{}:implied", text(&layout));
    let finish = |command: &mut Command| {
        let output = command.output().expect("checked");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let copy = ["--policy", text(&policy), "copy", "--quiet", &source, &format!("oci:{image}")];
    finish(Command::new("skopeo").args(copy));
    finish(Command::new("umoci").args(["unpack", "--image", &image, text(&bundle)]));
    let mut chroot = Command::new("chroot");
    let output = chroot.arg(bundle.join("rootfs")).args(["/bin/sh", "-c", LIST]).output().expect("chroot");
    let theirs = String::from_utf8(output.stdout).expect("text");
    // umoci makes new directories with the time of now.
    let timeless = |list: &str| {
        let no_time = |line: &str| match line.starts_with("new") && line.contains("directory") {
            true => line.rsplit_once(' ').expect("a time").0.to_owned(),
            false => line.to_owned(),
        };
        settled(list).lines().map(no_time).collect::<Vec<_>>().join("\n")
    };
    assert_eq!(timeless(&ours), timeless(&theirs));
}

#[test]
fn appended_and_added_tars_leave_directories_alone_too() {
    needs_root!();
    let store = Store::empty();
    let input = store.beside("below.tar");
    let layers = layers(&store.beside(""));
    let plain: Vec<(&[u8], &[u8])> =
        layers[..2].iter().map(|layer| (layer.as_slice(), layer.as_slice())).collect();
    fs::write(&input, docker_archive("below:1", &plain)).expect("ours");
    store.ok(&["load", "-i", text(&input)]);
    let context = Context::new(&[("Dockerfile", "FROM below:1\nADD more.tar /\n")]);
    let more = tar(&[file("spool/deep/y", "y"), file("link/behind", "behind"), file("new/z", "z")]);
    fs::write(context.at("more.tar"), &more).expect("ours");
    store.build(&context, &["-t", "added:1"]).expect(0);
    store.ok(&["mutate", "below:1", "--append", text(&context.at("more.tar")), "-t", "appended:1"]);
    let list =
        "stat -c '%n %F %a %u:%g %Y' /spool /spool/deep /real/lib /real/lib/behind /link/behind /new /new/z";
    let expected = "/spool directory 1777 7:7 1000\n/spool/deep directory 2775 8:8 2000\n\
                    /real/lib directory 751 10:10 4000\n/real/lib/behind regular file 644 0:0 1\n\
                    /link/behind regular file 644 0:0 1\n/new directory 755 0:0 0\n/new/z regular file 644 0:0 1";
    for image in ["added:1", "appended:1"] {
        assert_eq!(store.shell(image, list), expected, "{image}");
    }
    store.ok(&["fsck", "--deep"]);
}
