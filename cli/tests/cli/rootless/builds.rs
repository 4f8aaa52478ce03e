//! Images that a user builds are those that root builds.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use super::{BOTH, Ids, PATH, User, roots_layers};
use crate::harness::{Store, needs_root, text};

const DOCKERFILE: &str = "\
FROM busybox
COPY --chown=1000:1000 f /f
COPY --chown=42:43 f /dir/g
WORKDIR /work
RUN --network=none id -u > /made; mkdir d; chown 3:4 d; cd d; touch here; chown 9:8 here; \\
    chmod 4755 /made; chown 7:7 /made; rm /etc/owned; chmod 700 /srv
RUN --network=none cp /f /f.new && chown $(stat -c %u:%g /f) /f.new && mv /f.new /f && chown 0:0 /dir/g
RUN --network=none mkdir -p /gone/x && rm -r /root && mkdir /root && chown -R 11:12 /gone /work
USER node
RUN --network=none id -u > /tmp/who; mkdir /tmp/sub; echo x > /tmp/sub/y; chown 1000:1000 /tmp/sub/y
";

/// Fails with what is only in one of them.
#[track_caller]
fn same(found: &[Vec<String>], expected: &[Vec<String>], what: impl std::fmt::Debug) {
    assert_eq!(found.len(), expected.len(), "{what:?}");
    for (nth, (found, expected)) in found.iter().zip(expected).enumerate() {
        let extra: Vec<&String> = found.iter().filter(|entry| !expected.contains(entry)).collect();
        let missing: Vec<&String> = expected.iter().filter(|entry| !found.contains(entry)).collect();
        assert!(found == expected, "{what:?}, layer {nth}: {extra:#?} instead of {missing:#?}");
    }
}

/// Names and owners but for times: those differ from run to run.
#[test]
fn a_build_has_the_owners_that_root_gives() {
    needs_root!();
    let Some(first) = User::new(Ids::Range) else { return };
    let base = first.base();
    let files = [("Dockerfile", DOCKERFILE), ("f", "content")];
    let store = Store::empty();
    store.ok(&["import", text(&base), "busybox", "-c", PATH]);
    store.ok(&["build", "-t", "made", &first.context(&files)]);
    let expected = roots_layers(&store, "made");
    assert!(expected[4].iter().any(|entry| entry.starts_with("work/d/here Regular 9:8")), "{expected:#?}");
    for ids in BOTH {
        let user = User::new(ids).unwrap();
        user.ok(&["import", text(&base), "busybox", "-c", PATH]);
        user.ok(&["build", "-t", "made", &user.context(&files)]);
        same(&user.layers("made"), &expected, ids);
        // Again: nothing is left to do.
        let again = user.ok(&["build", "-t", "made", &user.context(&files)]);
        assert_eq!(again.ran(), Vec::<String>::new(), "{ids:?}");
        user.ok(&["fsck", "--deep"]);
        assert_eq!(user.processes(), Vec::<String>::new(), "{ids:?}");
    }
}

#[test]
fn on_disk_everything_belongs_to_the_user_or_his_range() {
    needs_root!();
    for ids in BOTH {
        let Some(user) = User::with_busybox(ids) else { return };
        let store = user.at("home/.local/share/kiln");
        let listed = Command::new("find").arg(&store).args(["-printf", "%U\n"]).output().unwrap();
        let mut owners: Vec<u32> =
            String::from_utf8_lossy(&listed.stdout).lines().map(|uid| uid.parse().unwrap()).collect();
        owners.sort_unstable();
        owners.dedup();
        assert_eq!(owners[0], user.uid());
        // /srv belongs to user 5, /etc/owned to 1000.
        assert_eq!(owners.len(), if ids == Ids::Range { 3 } else { 1 }, "{owners:?}");
        assert_eq!(fs::metadata(&store).unwrap().mode() & 0o777, 0o700);
    }
}

#[test]
fn an_archive_comes_out_as_it_went_in() {
    needs_root!();
    let store = Store::empty();
    let Some(first) = User::new(Ids::Range) else { return };
    let base = first.base();
    let tree = first.at("tree");
    let script = "cd $0 && mkdir dev && mknod dev/console c 5 1 && mknod dev/sda b 8 0 && mkfifo fifo && \
                  chown 1:2 dev/console fifo && echo x > big && mkdir vast && chown 3000000:70000 big vast && \
                  mknod dev/big c 1 9 && chown 5:70001 dev/big && ln -s x etc/link && chown -h 7:8 etc/link && \
                  tar --sort=name -cf $1 .";
    assert!(Command::new("sh").args(["-c", script, text(&tree), text(&base)]).status().unwrap().success());
    store.ok(&["import", text(&base), "odd", "-c", PATH]);
    let expected = roots_layers(&store, "odd");
    assert!(expected[0].iter().any(|entry| entry.starts_with("dev/console Char 1:2")), "{expected:#?}");
    assert!(expected[0].iter().any(|entry| entry.starts_with("etc/link Symlink 7:8")), "{expected:#?}");
    // Beyond any range.
    assert!(expected[0].iter().any(|entry| entry.starts_with("vast/ Directory 3000000:70000")));
    let archive = store.beside("saved.tar");
    for ids in BOTH {
        let user = User::new(ids).unwrap();
        let mine = user.at("odd.tar");
        fs::copy(&archive, &mine).unwrap();
        user.ok(&["load", "-i", text(&mine)]);
        same(&user.layers("odd"), &expected, ids);
        // Taken along by a copy, too.
        let context = user.context(&[("Dockerfile", "FROM scratch\nCOPY --from=odd /dev /d\n")]);
        user.ok(&["build", "-t", "copied", &context]);
        let devices = |layer: &[String]| -> Vec<String> {
            let all = layer.iter().filter(|entry| entry.contains(" Char ") || entry.contains(" Block "));
            all.filter_map(|entry| Some(entry.split_once('/')?.1.to_owned())).collect()
        };
        assert_eq!(devices(&user.layers("copied")[0]), devices(&expected[0]), "{ids:?}");
        // What a step does to them counts.
        let dockerfile = "FROM odd\nRUN --network=none chown 0:0 /big && touch /vast/x && chown 70002 /vast/x || \
                          touch /small\nCOPY --chown=70003:7 Dockerfile /\n";
        user.ok(&["build", "-t", "changed", &user.context(&[("Dockerfile", dockerfile)])]);
        let layers = user.layers("changed");
        let owner = |layer: &[String], name: &str| -> Option<String> {
            let entry = layer.iter().find(|entry| entry.split(' ').next() == Some(name))?;
            entry.split(' ').nth(2).map(str::to_owned)
        };
        assert_eq!(owner(&layers[1], "big").as_deref(), Some("0:0"), "{ids:?}");
        assert_eq!(owner(&layers[1], "vast/").as_deref(), Some("3000000:70000"), "{ids:?}");
        // There is no such user inside a range.
        assert_eq!(owner(&layers[1], "small").is_some(), ids == Ids::Range);
        assert_eq!(owner(&layers[2], "Dockerfile").as_deref(), Some("70003:7"), "{ids:?}");
        user.ok(&["fsck", "--deep"]);
    }
}

/// One after the other on the ladder.
#[test]
fn trees_are_kept_by_fuse_overlayfs_and_by_copies_too() {
    needs_root!();
    for ids in BOTH {
        let Some(mut user) = User::new(ids) else { return };
        user.give_device("fuse", "10 229");
        let base = user.base();
        let context = user.context(&[("Dockerfile", DOCKERFILE), ("f", "content")]);
        let mut found = Vec::new();
        for backend in ["overlay", "fuse-overlayfs", "copy"] {
            if backend == "fuse-overlayfs" && !std::path::Path::new("/usr/bin/fuse-overlayfs").exists() {
                eprintln!("SKIPPED ALOUD: needs fuse-overlayfs");
                continue;
            }
            let root = user.at("home").join(backend);
            let with = ["--root", text(&root), "--snapshotter", backend];
            let run = |args: &[&str]| user.ok(&[&with, args].concat());
            run(&["import", text(&base), "busybox", "-c", PATH]);
            run(&["build", "-t", "made", &context]);
            let saved = user.at("home").join("saved.tar");
            run(&["save", "-o", text(&saved), "made"]);
            run(&["fsck", "--deep"]);
            found.push((backend, super::layers_of(&saved)));
        }
        // fuse-overlayfs marks each new directory as opaque, which hides nothing, and copies up `/etc` when
        // something is mounted in it.
        let same_anyway = |entry: &str| entry.contains(".wh..wh..opq") || entry.starts_with("etc/ Directory");
        for (_, layers) in &mut found {
            layers.iter_mut().for_each(|layer| layer.retain(|entry| !same_anyway(entry)));
        }
        for (backend, layers) in &found[1..] {
            same(layers, &found[0].1, (ids, backend));
        }
    }
}

#[test]
fn a_store_of_somebody_else_is_refused() {
    needs_root!();
    let Some(user) = User::new(Ids::Range) else { return };
    let root = user.at("roots");
    fs::create_dir(&root).unwrap();
    user.kiln(&["--root", text(&root), "images"]).expect(7).says(&["belongs to user"]);
    let missing = user.at("no/place");
    let refused = user.kiln(&["--root", text(&missing), "images"]).expect(6);
    assert!(refused.stderr.contains("Permission denied"), "{}", refused.stderr);
}

#[test]
fn what_the_user_cannot_read_is_named() {
    needs_root!();
    for ids in BOTH {
        let Some(user) = User::with_busybox(ids) else { return };
        let context = user.context(&[("Dockerfile", "FROM busybox\nCOPY secret /\n"), ("secret", "root's")]);
        let secret = user.at("context/secret");
        fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let failed = user.kiln(&["build", &context]);
        assert_ne!(failed.code, Some(0), "{ids:?}");
        assert!(
            failed.stderr.contains("secret") && failed.stderr.contains("ermission denied"),
            "{}",
            failed.stderr
        );
    }
}

#[test]
fn an_id_beyond_the_range_is_named() {
    needs_root!();
    let Some(user) = User::with_busybox(Ids::Range) else { return };
    user.kiln(&["run", "--rm", "--network=none", "-u", "70000", "busybox", "true"])
        .expect(125)
        .says(&["70000", "beyond the range of ids"]);
}
