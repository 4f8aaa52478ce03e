//! What COPY and ADD put into the image: which file a path means, what is kept of it, what an
//! archive is.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::harness::{Context, Store, give_away, needs_root};

#[test]
fn symlinks_are_followed_on_the_way_and_kept_inside() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        (
            "Dockerfile",
            "FROM busybox\n\
             RUN mkdir -p /var/real && ln -s /var/real /absolute && ln -s ../../../var/real /climbing\n\
             COPY link/deep/f /by-way\n\
             COPY link /contents/\n\
             COPY tolink /followed\n\
             COPY tree /tree/\n\
             COPY real/deep/f /absolute/a\n\
             COPY real/deep/f /climbing/b\n\
             COPY real/deep/f /absolute/new/\n",
        ),
        ("real/deep/f", "f"),
        ("tree/f", "t"),
    ]);
    symlink("real", context.at("link")).expect("ours to write");
    symlink("real/deep/f", context.at("tolink")).expect("ours to write");
    symlink("../real/deep/f", context.at("tree/out")).expect("ours to write");
    symlink("nowhere", context.at("tree/dangling")).expect("ours to write");
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    // On the way to a source, and as the source itself, a link is followed.
    assert_eq!(store.shell("x", "cat /by-way /contents/deep/f; test ! -L /followed && cat /followed"), "fff");
    // Below a directory that is copied it stays a link.
    assert_eq!(
        store.shell("x", "for l in out dangling; do readlink /tree/$l; done"),
        "../real/deep/f\nnowhere"
    );
    // In the destination it is followed, inside the root.
    assert_eq!(
        store.shell("x", "ls /var/real /var/real/new; readlink /absolute"),
        "/var/real:\na\nb\nnew\n\n/var/real/new:\nf\n/var/real"
    );
}

#[test]
fn a_link_to_nothing_is_named_with_where_it_leads() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY gone /f\n")]);
    symlink("no/such", context.at("gone")).expect("ours to write");
    let outcome = store.build_bounded(&context, &[]).expect(4);
    outcome.says(&[
        "Dockerfile:2:1",
        "\"gone\" is a link to \"no/such\", which does not exist in the build context",
    ]);
}

#[test]
fn owner_mode_time_and_hard_links_of_a_copy() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        (
            "Dockerfile",
            "FROM busybox AS first\n\
             RUN echo svc:x:71:72::/:/bin/sh >> /etc/passwd && echo ops:x:73: >> /etc/group\n\
             COPY d /plain/\n\
             COPY --chown=12 d/f /number\n\
             COPY --chown=svc d/f /user\n\
             COPY --chown=svc:ops d/f /both\n\
             COPY --chmod=0711 d /octal/\n\
             COPY --chmod=go= d/f /symbolic\n\
             FROM busybox\n\
             COPY --from=first /user /plain/f /from/\n\
             COPY --from=first / /all/\n",
        ),
        ("d/f", "f"),
        ("d/sub/s", "s"),
    ]);
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::hard_link(context.at("d/f"), context.at("d/g")).expect("ours to write");
    fs::set_permissions(context.at("d/f"), fs::Permissions::from_mode(0o4751)).expect("ours");
    give_away(&context.at("d/f"), 1234, 5678);
    // chown(2) takes the setuid bit away.
    fs::set_permissions(context.at("d/f"), fs::Permissions::from_mode(0o4751)).expect("ours");
    fs::set_permissions(context.at("d/sub"), fs::Permissions::from_mode(0o750)).expect("ours");
    let file = fs::File::options().write(true).open(context.at("d/f")).expect("ours to write");
    file.set_modified(then).expect("ours");
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    let stat = |format: &str, paths: &str| {
        store.shell("x", &format!("cd /all && stat -c '{format}' {paths}")).replace('\n', " ")
    };
    assert_eq!(stat("%u:%g %a %h %Y", "plain/f"), "0:0 4751 2 1000000000");
    assert_eq!(stat("%u:%g %a", "plain/sub plain"), "0:0 750 0:0 755");
    // A number alone is its own group, a name has that of /etc/passwd in the image that is built.
    assert_eq!(stat("%u:%g", "number user both"), "12:12 71:72 71:73");
    assert_eq!(stat("%a", "octal octal/f octal/sub octal/sub/s symbolic"), "711 711 711 711 4700");
    // Between stages everything is kept, owners too.
    assert_eq!(
        store.shell("x", "stat -c '%u:%g %a %Y' /from/user /from/f"),
        "71:72 4751 1000000000\n0:0 4751 1000000000"
    );
}

#[test]
fn an_unknown_owner_is_an_error_and_never_root() {
    needs_root!();
    let store = Store::with_busybox();
    for owner in ["nobody-knows", "0:nobody-knows"] {
        let dockerfile = format!("FROM busybox\nCOPY --chown={owner} f /f\n");
        let context = Context::new(&[("Dockerfile", dockerfile.as_str()), ("f", "f")]);
        let outcome = store.build_bounded(&context, &["-t", "x"]).expect(3);
        outcome.says(&["Dockerfile:2:1", "nobody-knows"]);
    }
}

/// A tar of `inside/file`, packed with this program, or `false` aloud when it is not there.
fn pack(context: &Context, name: &str, program: Option<&str>) -> bool {
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(context.at("from")).arg("-cf").arg(context.at(name));
    if let Some(program) = program {
        if Command::new(program).arg("--version").output().is_err() {
            eprintln!("SKIPPED ALOUD: needs {program}");
            return false;
        }
        tar.args(["--use-compress-program", program]);
    }
    assert!(tar.arg("inside").status().expect("tar runs").success());
    true
}

#[test]
fn archives_are_told_by_content() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("from/inside/file", "packed\n"), ("no.tar.gz", "no archive\n")]);
    for (name, program) in [
        ("plain.txt", None),
        ("a", Some("gzip")),
        ("b.jpg", Some("bzip2")),
        ("c.tar", Some("xz")),
        ("d.gz", Some("zstd")),
    ] {
        if !pack(&context, name, program) {
            continue;
        }
        let dockerfile = format!(
            "FROM busybox\nADD {name} /added/\nCOPY {name} /copied/\nADD --unpack=false {name} /kept/\nADD --chown=12:34 {name} /owned/\n"
        );
        context.write("Dockerfile", &dockerfile);
        store.build_bounded(&context, &["-t", "x"]).expect(0);
        let shown = store
            .shell("x", "cat /added/inside/file; ls /added /copied /kept; stat -c %u:%g /owned/inside/file");
        assert_eq!(shown, format!("packed\n/added:\ninside\n\n/copied:\n{name}\n\n/kept:\n{name}\n12:34"));
    }
    // A name makes no archive, and compression alone makes none either.
    let gzip = Command::new("gzip").arg("-c").arg(context.at("no.tar.gz")).output().expect("gzip runs");
    fs::write(context.at("text.gz"), gzip.stdout).expect("ours to write");
    fs::write(context.at("broken.gz"), b"\x1f\x8b\x08\0broken").expect("ours to write");
    context.write("Dockerfile", "FROM busybox\nADD no.tar.gz text.gz broken.gz /added/\n");
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    assert_eq!(
        store.shell("x", "cd /added && ls && cat no.tar.gz && zcat text.gz"),
        "broken.gz\nno.tar.gz\ntext.gz\nno archive\nno archive"
    );
}

#[test]
fn an_archive_that_ends_too_soon_is_named() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        ("from/inside/file", &"packed\n".repeat(2000)),
        ("Dockerfile", "FROM busybox\nADD cut /d/\n"),
    ]);
    assert!(pack(&context, "cut", None));
    fs::File::options()
        .write(true)
        .open(context.at("cut"))
        .and_then(|file| file.set_len(2048))
        .expect("ours");
    let outcome = store.build_bounded(&context, &["-t", "x"]).expect(6);
    outcome.says(&["Dockerfile:2:1", "cannot unpack \"cut\""]);
}

/// How many files of committed layers have so many names.
fn files_with_names(store: &Store, names: u64) -> usize {
    let mut open = vec![store.root().join("snapshots/committed")];
    let mut inodes = std::collections::HashSet::new();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).expect("layers are readable").flatten() {
            let stat = fs::symlink_metadata(entry.path()).expect("layers do not change");
            if stat.is_dir() {
                open.push(entry.path());
            } else if stat.is_file() && stat.nlink() == names {
                inodes.insert(stat.ino());
            }
        }
    }
    inodes.len()
}

#[test]
fn a_copy_with_one_changed_file_shares_the_others_with_the_last_one() {
    needs_root!();
    let (store, cold) = (Store::with_busybox(), Store::with_busybox());
    // /etc is there, and a link to it.
    let dockerfile = "FROM busybox\nRUN --network=none ln -s /etc /there\nCOPY files /there/app\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    for nth in 0..100 {
        context.write(&format!("files/d{}/{nth}", nth % 3), &format!("content {nth}"));
    }
    let tagged = |store: &Store, tag: &str| {
        store.build(&context, &["-t", tag, "--build-arg", "SOURCE_DATE_EPOCH=1000"]).expect(0);
    };
    let layer = |store: &Store, tag: &str| {
        let layers = store.inspect(tag)["RootFS"]["Layers"].as_array().expect("a list").clone();
        layers.last().expect("a COPY has one").clone()
    };
    let listing = |tag: &str| {
        store.shell(tag, "cd /etc/app && find . | sort | xargs stat -c '%n %a %u %g %s %Y' && cat d*/*")
    };
    let linked = || files_with_names(&store, 2);
    tagged(&store, "one");
    let before = (listing("one"), layer(&store, "one"), linked());
    context.write("files/d1/1", "CONTENT 1");
    fs::remove_file(context.at("files/d0/0")).expect("ours");
    context.write("files/d2/new", "new");
    tagged(&store, "two");
    if crate::harness::test_as().is_none() {
        assert_eq!((before.2, linked()), (0, 98));
    }
    let two = listing("two");
    assert!(two.contains("CONTENT 1") && two.contains("new") && !two.contains("content 1\n"), "{two}");
    // What a step does to such a file it does to a copy of its own.
    store.shell("two", "echo more >> /etc/app/d1/4 && chmod 600 /etc/app/d1/7");
    store
        .image("three", "FROM two\nRUN --network=none echo more >> /etc/app/d1/4; chmod 600 /etc/app/d1/7\n");
    assert_eq!((listing("one"), layer(&store, "one")), (before.0, before.1));
    assert_eq!(listing("two"), two);
    // The layer is that of a builder that has never seen the first one.
    let stand_at = |tag: &str, store: &Store| {
        store
            .build(
                &context,
                &[
                    "-o",
                    "type=image,rewrite-timestamp=true",
                    "-t",
                    tag,
                    "--build-arg",
                    "SOURCE_DATE_EPOCH=1000",
                ],
            )
            .expect(0);
        layer(store, tag)
    };
    assert_eq!(stand_at("warm", &store), stand_at("cold", &cold));
    store.sound().expect("sound");
    // Without the first one all is there still.
    store.ok(&["rmi", "one"]);
    store.ok(&["prune", "--force"]);
    assert_eq!(listing("two"), two);
    store.sound().expect("sound");
}

#[test]
fn a_copy_does_not_hide_a_directory_behind_a_file_nor_a_file_behind_a_directory() {
    needs_root!();
    let store = Store::with_busybox();
    let base = "FROM busybox\nRUN --network=none mkdir -p /d/file && echo x > /d/dir && chmod 750 /d && touch -d @77 /d\n";
    let context = Context::new(&[("a/file", "1"), ("b/dir/x", "2"), ("c/new", "3")]);
    let build = |copy: &str| {
        context.write("Dockerfile", &format!("{base}{copy}\n"));
        store.build(&context, &["-t", "x"])
    };
    build("COPY a /d/").expect(4).says(&["cannot replace directory \"d/file\" with a file"]);
    build("COPY b /d/").expect(4).says(&["cannot copy to non-directory \"d/dir\""]);
    build("COPY c /d/dir/").expect(4).says(&["cannot copy to non-directory \"/d/dir\""]);
    build("COPY c /d/dir/below/").expect(4).says(&["cannot copy to non-directory"]);
    // What is there keeps owner, mode and files; parents that nothing was put into keep their time.
    build("COPY c /d/more/").expect(0);
    build("COPY c /d/file/").expect(0);
    let shown = store.shell("x", "stat -c '%a %Y' /d; ls /d /d/file; cat /d/file/new /d/dir");
    assert_eq!(shown, "750 77\n/d:\ndir\nfile\n\n/d/file:\nnew\n3x");
}
