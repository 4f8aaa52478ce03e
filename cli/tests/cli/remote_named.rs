//! `--build-context`: what `FROM`, `COPY --from` and mounts may mean by a name.

use std::path::PathBuf;
use std::process::Command;

use crate::harness::{Context, Outcome, Store, needs_root, text};
use crate::repo::Origin;
use crate::web::{GitServer, Web, response};

/// Builds a Dockerfile as `x`, with these named contexts.
#[track_caller]
fn build(store: &Store, dockerfile: &str, contexts: &[&str]) -> Outcome {
    let mut args = vec!["-t", "x"];
    args.extend(contexts.iter().flat_map(|context| ["--build-context", context]));
    store.build_bounded(&Context::new(&[("Dockerfile", dockerfile), ("of", "main context")]), &args)
}

/// A layout with `image`, as kiln saves it, unpacked.
fn layout(store: &Store, image: &str) -> PathBuf {
    let (tar, dir) =
        (store.beside("layout.tar"), store.beside(&format!("layout-{}", image.replace(':', "-"))));
    store.ok(&["save", "--format", "oci", "--compression", "uncompressed", "-o", text(&tar), image]);
    std::fs::create_dir(&dir).expect("ours to write");
    let unpacked = Command::new("tar").arg("-C").arg(&dir).arg("-xf").arg(&tar).status();
    assert!(unpacked.expect("tar runs").success());
    dir
}

#[test]
fn a_directory_comes_with_its_own_rules() {
    needs_root!();
    let store = Store::with_busybox();
    let other = Context::new(&[("a", "a"), ("b.log", "b"), ("d/c", "c"), (".dockerignore", "*.log\n")]);
    crate::harness::give_away(&other.at("a"), 12, 34);
    let place = format!("src={}", other.path());
    let dockerfile = "FROM busybox\nCOPY --from=src . /all/\nCOPY of /of\n\
        RUN --network=none --mount=from=src,target=/m ls /m > /listed\n";
    build(&store, dockerfile, &[&place]).expect(0);
    assert_eq!(
        store.shell("x", "ls /all /all/d; cat /listed /of"),
        "/all:\na\nd\n\n/all/d:\nc\na\nd\nmain context"
    );
    assert_eq!(store.shell("x", "stat -c %u:%g /all/a"), "0:0", "a build context's files are root's");
    assert_eq!(build(&store, dockerfile, &[&place]).expect(0).ran(), [""; 0]);
    other.write("b.log", "changed");
    assert_eq!(
        build(&store, dockerfile, &[&place]).expect(0).ran(),
        [""; 0],
        "what is ignored does not count"
    );
    other.write("a", "changed");
    assert_eq!(build(&store, dockerfile, &[&place]).expect(0).ran().len(), 3);
    let ignored = build(&store, "FROM busybox\nCOPY --from=src b.log /\n", &[&place]).expect(4);
    ignored.says(&["\"b.log\" does not exist", "Dockerfile:2:1"]);
}

#[test]
fn files_without_an_image_are_something_to_stand_on() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let files = Context::new(&[("f", "files")]);
    let repo = origin.repo("a", &[]);
    repo.write("f", "files");
    repo.commit();
    let git = origin.serve(GitServer::Today).url("/a/.git");
    let web = Web::serve(|_| response("200 OK", &[], b"files"));
    for (place, file) in [(files.path().to_owned(), "f"), (git, "f"), (web.url("/f"), "context")] {
        let context = format!("src={place}");
        // With more on top, alone, under a stage, and in the place of one.
        for (dockerfile, layers) in [
            ("FROM src\nCOPY of /of\n", 2),
            ("FROM src\n", 1),
            (&format!("FROM src AS first\nFROM first\nCOPY --from=src {file} /g\n"), 2),
            ("FROM absent AS src\nRUN false\nFROM src\nLABEL a=b\n", 1),
            ("FROM absent AS src\nRUN false\n", 1),
        ] {
            build(&store, dockerfile, &[&context]).expect(0);
            let config = store.config("x");
            let history = config["history"].as_array().expect("a list").iter();
            let told = history.filter(|entry| entry["empty_layer"] != true).count();
            assert_eq!(
                (told, &config["rootfs"]["diff_ids"].as_array().expect("a list").len()),
                (layers, &layers)
            );
        }
        store.image("y", "FROM busybox\nCOPY --from=x / /x/\n");
        assert_eq!(store.shell("y", &format!("cat /x/{file}")), "files", "{place}");
        let again = build(&store, "FROM src\nCOPY of /of\n", &[&context]).expect(0);
        assert!(again.stdout.contains("everything from the cache"), "{}", again.stderr);
    }
    files.write("f", "changed");
    let context = format!("src={}", files.path());
    build(&store, "FROM src\nCOPY of /of\n", &[&context]).expect(0);
    store.image("y", "FROM busybox\nCOPY --from=x / /x/\n");
    assert_eq!(store.shell("y", "cat /x/f /x/of"), "changedmain context");
}

#[test]
fn a_name_goes_before_a_stage_and_an_image() {
    needs_root!();
    let store = Store::with_busybox();
    store.image("other", "FROM busybox\nLABEL of=other\n");
    let label = |store: &Store| store.inspect("x")["Config"]["Labels"]["of"].clone();
    // An image, however it is written: the same one is meant.
    for written in ["absent", "absent:latest", "docker.io/library/absent"] {
        for named in ["absent", "docker.io/library/absent:latest"] {
            let context = format!("{named}=docker-image://other");
            build(&store, &format!("FROM {written}\n"), &[&context]).expect(0);
            assert_eq!(label(&store), "other", "{written} {named}");
        }
    }
    // A directory under such a name, too.
    let files = Context::new(&[("f", "named")]);
    for (written, named) in [
        ("absent", "docker.io/library/absent"),
        ("absent:latest", "absent"),
        ("docker.io/library/absent", "absent"),
    ] {
        let context = format!("{named}={}", files.path());
        build(&store, &format!("FROM busybox\nCOPY --from={written} f /{named}/f\n"), &[&context]).expect(0);
        assert_eq!(store.shell("x", &format!("cat /{named}/f")), "named", "{written} {named}");
    }
    // A stage: it is not built at all.
    let staged = "FROM absent AS tools\nRUN false\nFROM busybox\nCOPY --from=tools f /f\n";
    let tools = format!("tools={}", files.path());
    let outcome = build(&store, staged, &[&tools]).expect(0);
    assert_eq!(outcome.ran(), ["COPY --from=tools f /f"]);
    build(&store, "FROM absent AS tools\nFROM tools\n", &["tools=docker-image://other"]).expect(0);
    assert_eq!(label(&store), "other");
    // Of two the later one counts.
    build(&store, "FROM n\n", &["n=docker-image://absent", "n=docker-image://other"]).expect(0);
    assert_eq!(label(&store), "other");
}

#[test]
fn a_name_may_be_for_one_platform() {
    needs_root!();
    let store = Store::with_busybox();
    store.image("mine", "FROM busybox\nLABEL of=mine\n");
    let config = store.inspect("busybox");
    let host = format!(
        "{}/{}",
        config["Os"].as_str().expect("text"),
        config["Architecture"].as_str().expect("text")
    );
    let other = if host.ends_with("amd64") { "linux/riscv64" } else { "linux/amd64" };
    let mine = format!("base::{host}=docker-image://mine");
    let theirs = format!("base::{other}=docker-image://absent");
    build(&store, "FROM base\n", &[&mine, &theirs]).expect(0);
    assert_eq!(store.inspect("x")["Config"]["Labels"]["of"], "mine");
    build(&store, "FROM base\n", &[&theirs]).expect(4).says(&["base image base:latest is not in the store"]);
    let files = Context::new(&[("f", "mine")]);
    let place = format!("src::{host}={}", files.path());
    build(&store, "FROM busybox\nCOPY --from=src f /f\n", &[&place]).expect(0);
    assert_eq!(store.shell("x", "cat /f"), "mine");
}

#[test]
fn a_layout_is_an_image_by_tag_or_digest() {
    needs_root!();
    let store = Store::with_busybox();
    store.image("a:1", "FROM busybox\nRUN --network=none echo a > /a\nENV FROM_LAYOUT=yes\nUSER 12\n");
    let dir = layout(&store, "a:1");
    let manifest = store.inspect("a:1")["Manifest"].as_str().expect("a digest").to_owned();
    let dockerfile = "FROM base\nRUN --network=none cat /a && [ $FROM_LAYOUT = yes ] && [ $(id -u) = 12 ]\n";
    // In a store that has never seen it.
    let fresh = Store::empty();
    let path = text(&dir);
    for place in [path.to_owned(), format!("{path}:1"), format!("{path}@{manifest}")] {
        build(&fresh, dockerfile, &[&format!("base=oci-layout://{place}")]).expect(0);
        assert_eq!(
            fresh.inspect("x")["RootFS"]["Layers"][0],
            store.inspect("busybox")["RootFS"]["Layers"][0]
        );
    }
    build(&store, "FROM busybox\nCOPY --from=l /a /copied\n", &[&format!("l=oci-layout://{path}")]).expect(0);
    assert_eq!(store.shell("x", "cat /copied"), "a");
    for (wrong, code, says) in [
        (format!("{path}:2"), 4, "no image with the tag \"2\""),
        (format!("{path}/absent"), 4, "cannot read"),
        (format!("{path}@sha256:{}", "0".repeat(64)), 4, "is missing"),
        (format!("{path}@sha256:12"), 2, "is not a reference to an image"),
    ] {
        build(&store, "FROM base\n", &[&format!("base=oci-layout://{wrong}")]).expect(code).says(&[says]);
    }
}

#[test]
fn a_layout_that_skopeo_made_is_an_image() {
    needs_root!();
    if Command::new("skopeo").arg("--version").output().is_err() {
        eprintln!("SKIPPED ALOUD: needs skopeo");
        return;
    }
    let store = Store::with_busybox();
    store.image("a:1", "FROM busybox\nENV A=1\n");
    let (tar, dir) = (store.beside("a.tar"), store.beside("skopeo"));
    store.ok(&["save", "-o", text(&tar), "a:1"]);
    let policy = store.beside("policy.json");
    std::fs::write(&policy, r#"{"default": [{"type": "insecureAcceptAnything"}]}"#).expect("ours to write");
    for tag in ["one", "two"] {
        let mut skopeo = Command::new("skopeo");
        skopeo.arg("--policy").arg(&policy).args(["copy", "--quiet"]);
        skopeo.args([format!("docker-archive:{}", text(&tar)), format!("oci:{}:{tag}", text(&dir))]);
        let output = skopeo.output().expect("checked to be installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    // skopeo compresses what kiln saved as it was.
    let fresh = Store::empty();
    let place = format!("base=oci-layout://{}", text(&dir));
    build(&fresh, "FROM base\n", &[&format!("{place}:two")]).expect(0);
    assert_eq!(fresh.shell("x", "echo $A"), "1");
    assert_eq!(fresh.inspect("x")["RootFS"]["Layers"], store.inspect("a:1")["RootFS"]["Layers"]);
    build(&fresh, "FROM base\n", &[&format!("{place}:three")])
        .expect(4)
        .says(&["no image with the tag \"three\""]);
}

#[test]
fn a_repository_and_files_of_a_web_server_have_names() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let repo = origin.repo("a", &[]);
    repo.write("sub/f", "git");
    // As in BuildKit, ignore files are for directories.
    repo.write("sub/.dockerignore", "*\n");
    repo.commit();
    let git = origin.serve(GitServer::Today);
    let mut header = tar::Header::new_gnu();
    header.set_size(6);
    header.set_mode(0o644);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut header, "d/f", &b"packed"[..]).expect("in memory");
    let archive = builder.into_inner().expect("in memory");
    let web = Web::serve(move |request| match request.target.as_str() {
        "/archive" => response("200 OK", &[("ETag", "\"1\"")], &archive),
        "/file" => response("200 OK", &[], b"plain"),
        _ => response("404 Not Found", &[], b""),
    });
    let contexts = [
        format!("repo={}", git.url("/a/.git#main:sub")),
        format!("packed={}", web.url("/archive")),
        format!("plain={}", web.url("/file")),
    ];
    let contexts: Vec<&str> = contexts.iter().map(String::as_str).collect();
    let dockerfile = "FROM busybox\nCOPY --from=repo . /repo/\nCOPY --from=packed / /packed/\nCOPY --from=plain / /plain/\n\
        RUN --network=none --mount=from=repo,target=/m cat /m/f > /mounted\n";
    build(&store, dockerfile, &contexts).expect(0);
    assert_eq!(store.shell("x", "cat /repo/f /plain/context /mounted"), "gitplaingit");
    assert_eq!(store.shell("x", "stat -c %a /plain/context"), "600");
    // An archive is a file like another, for ADD to unpack or not.
    assert_eq!(store.shell("x", "tar -xOf /packed/context d/f"), "packed");
    let again = build(&store, dockerfile, &contexts).expect(0);
    assert!(again.stdout.contains("everything from the cache"), "{}", again.stderr);
    // What no stage needs is not fetched.
    drop((git.take_seen(), web.take_seen()));
    build(&store, "FROM busybox\n", &[contexts[0], contexts[1], &format!("no={}", web.url("/absent"))])
        .expect(0);
    assert_eq!((git.take_seen().len(), web.take_seen().len()), (0, 0));
    let absent = format!("no={}", web.url("/absent"));
    build(&store, "FROM busybox\nCOPY --from=no / /\n", &[&absent]).expect(5).says(&["404"]);
}

#[test]
fn names_that_mean_nothing_are_said() {
    needs_root!();
    let store = Store::with_busybox();
    for (context, code, says) in [
        ("name", 2, "is not of the form NAME=PLACE"),
        ("=x", 2, "is not of the form NAME=PLACE"),
        ("n=", 2, "is not of the form NAME=PLACE"),
        ("Bad Name=x", 2, "is not a possible name"),
        ("n=docker-image://Bad Name", 2, "is not a reference to an image"),
        ("n=/no/such/directory", 4, "/no/such/directory"),
        ("n=/etc/passwd", 4, "/etc/passwd"),
    ] {
        build(&store, "FROM busybox\n", &[context]).expect(code).says(&[says]);
    }
    let absent = "n=docker-image://absent";
    build(&store, "FROM n\n", &[absent])
        .expect(4)
        .says(&["absent:latest is not in the store", "Dockerfile:1:1"]);
    let context = Context::new(&[]);
    let place = format!("sources={}", context.path());
    let outcome = build(&store, "FROM busybox\nCOPY --from=source / /\n", &[&place]).expect(3);
    outcome.says(&["source:latest is neither a stage nor an image in the store"]);
}
