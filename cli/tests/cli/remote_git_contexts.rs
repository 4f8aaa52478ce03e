//! Git repositories as build contexts, and the times that images get from outside.

use crate::harness::{Context, Store, needs_root, text};
use crate::repo::{Origin, Repo};
use crate::web::{GitServer, Web, response};

/// When the commits of these tests were made.
const COMMITTED: &str = "2001-09-09T01:46:40Z";
const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

fn context(origin: &Origin) -> Repo {
    let repo = origin.repo("a", &[]);
    repo.write("Dockerfile", "FROM busybox\nCOPY . /all/\n");
    repo.write("sub/Dockerfile", "FROM busybox\nLABEL of=sub\nCOPY f /f\n");
    repo.write("sub/f", "f");
    repo.write("other", "FROM busybox\nLABEL of=other\nCOPY sub/f /f\n");
    // As in BuildKit, ignore files are for directories.
    repo.write(".dockerignore", "*\n");
    repo.commit();
    repo
}

#[test]
fn a_repository_is_a_context() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let repo = context(&origin);
    let web = origin.serve(GitServer::Today);
    let url = web.url("/a/.git");
    store.build_from(&url, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "ls -A /all; cat /all/sub/f"), ".dockerignore\nDockerfile\nother\nsub\nf");
    let label = |context: &str, args: &[&str]| {
        store.build_from(context, &[&["-t", "x"], args].concat()).expect(0);
        assert_eq!(store.shell("x", "cat /f"), "f");
        store.inspect("x")["Config"]["Labels"]["of"].clone()
    };
    assert_eq!(label(&format!("{url}#main:sub"), &[]), "sub");
    assert_eq!(label(&format!("{url}?branch=main&subdir=sub"), &[]), "sub");
    assert_eq!(label(&url, &["-f", "other"]), "other", "below the repository's root");
    assert_eq!(label(&format!("{url}#main:sub"), &["-f", "../Dockerfile"]), "sub", "`..` stops at the root");
    // What another directory would cache is the same file.
    assert_eq!(store.build_from(&format!("{url}#main:sub"), &[]).expect(0).ran(), [""; 0]);
    store.build_from(&url, &["-f", "absent"]).expect(4).says(&["no Dockerfile", "/a/.git/absent"]);
    store.build_from(&format!("{url}#absent"), &[]).expect(4).says(&["\"absent\""]);
    // A new commit is a new context.
    repo.write("sub/f", "f");
    repo.write("sub/Dockerfile", "FROM busybox\nLABEL of=new\nCOPY f /f\n");
    repo.commit();
    assert_eq!(label(&format!("{url}#main:sub"), &[]), "new");
}

#[test]
fn a_context_keeps_its_git_directory_when_told_to() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let commit = context(&origin).git(&["rev-parse", "HEAD"]);
    let web = origin.serve(GitServer::Today);
    let url = web.url("/a/.git");
    let kept = |url: &str, args: &[&str]| {
        let outcome = store.build_from(url, &[&["-t", "x"], args].concat()).expect(0);
        assert!(!outcome.stderr.contains("warning"), "{}", outcome.stderr);
        store.shell("x", "cat /all/.git/HEAD 2>/dev/null || echo none")
    };
    let argument = |value: &str| format!("BUILDKIT_CONTEXT_KEEP_GIT_DIR={value}");
    assert_eq!(kept(&url, &[]), "none");
    assert_eq!(kept(&url, &["--build-arg", &argument("1")]), commit);
    assert_eq!(kept(&url, &["--build-arg", &argument("0")]), "none");
    assert_eq!(kept(&format!("{url}?keep-git-dir=1"), &[]), commit);
    let wrong = argument("perhaps");
    store
        .build_from(&url, &["--build-arg", &wrong])
        .expect(2)
        .says(&["BUILDKIT_CONTEXT_KEEP_GIT_DIR", "\"perhaps\""]);
    // What speaks to other builders is nothing to warn of.
    let spoken = ["BUILDKIT_BUILD_NAME=x", "BUILDKIT_SYNTAX=docker/dockerfile:1", "BUILDKIT_INLINE_CACHE=1"];
    let args: Vec<&str> = spoken.iter().flat_map(|argument| ["--build-arg", argument]).collect();
    assert_eq!(kept(&url, &args), "none");
}

/// When `image` and its instructions were made; what is of busybox apart.
fn times(store: &Store, image: &str) -> Vec<String> {
    let inherited = store.config("busybox")["history"].as_array().expect("a list").len();
    let config = store.config(image);
    let own = config["history"].as_array().expect("a list").iter().skip(inherited);
    let mut times: Vec<_> = own.map(|entry| &entry["created"]).chain([&config["created"]]).collect();
    times.dedup();
    times.iter().map(|time| time.as_str().expect("a time").to_owned()).collect()
}

/// Two stores that have nothing in common but busybox.
struct Twins([Store; 2]);

impl Twins {
    fn new() -> Twins {
        let stores = [Store::with_busybox(), Store::empty()];
        let busybox = stores[0].beside("saved.tar");
        stores[0].ok(&["save", "-o", text(&busybox), "busybox"]);
        stores[1].ok(&["load", "-i", text(&busybox)]);
        Twins(stores)
    }

    /// Builds in both, as `x`: the images have the same digest. All times in them.
    #[track_caller]
    fn build(&self, context: &str, args: &[&str]) -> Vec<String> {
        let args = [&["-t", "x", "--network", "none"], args].concat();
        let [first, second] = self.0.each_ref().map(|store| {
            store.build_from(context, &args).expect(0);
            (store.inspect("x")["Id"].clone(), times(store, "x"))
        });
        assert_eq!(first, second);
        first.1
    }
}

#[test]
fn an_image_is_as_old_as_the_commit_of_its_context() {
    needs_root!();
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("f", "f");
    let dockerfile = "FROM busybox\nARG SOURCE_DATE_EPOCH\nCOPY f /f\nLABEL a=b\nRUN echo $SOURCE_DATE_EPOCH > /epoch && touch -d @1 /epoch\n";
    repo.write("Dockerfile", dockerfile);
    repo.write("default", &format!("ARG SOURCE_DATE_EPOCH=context\n{dockerfile}"));
    repo.commit();
    let web = origin.serve(GitServer::Today);
    // Files are as old as their checkout unless the URL says otherwise; as in BuildKit, the epoch is
    // for the image alone.
    let url = web.url("/a/.git?mtime=commit#main");
    let twins = Twins::new();
    let Twins([store, _]) = &twins;
    assert_eq!(twins.build(&url, &["--build-arg", "SOURCE_DATE_EPOCH=context"]), [COMMITTED]);
    assert_eq!(store.shell("x", "cat /epoch"), "1000000000", "an ARG sees the number");
    assert_eq!(twins.build(&url, &["-f", "default"]), [COMMITTED]);
    assert_eq!(store.shell("x", "cat /epoch"), "1000000000");
    assert_eq!(twins.build(&url, &["--build-arg", "SOURCE_DATE_EPOCH=0"]), ["1970-01-01T00:00:00Z"]);
    let directory = Context::new(&[("Dockerfile", "FROM busybox\n")]);
    let outcome = store.build_bounded(&directory, &["--build-arg", "SOURCE_DATE_EPOCH=context"]).expect(4);
    outcome.says(&["SOURCE_DATE_EPOCH=context: ", "says a time", "hint: "]);
    for (wrong, says) in [("contxt", "did you mean `context`?"), ("-1", "seconds since 1970")] {
        let argument = format!("SOURCE_DATE_EPOCH={wrong}");
        store.build_bounded(&directory, &["--build-arg", &argument]).expect(3).says(&[says]);
    }
}

#[test]
fn an_image_is_as_old_as_a_named_context_or_a_stage() {
    needs_root!();
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("f", "f");
    repo.commit();
    let git = origin.serve(GitServer::Today).url("/a/.git?mtime=commit");
    let web = Web::serve(|_| response("200 OK", &[("Last-Modified", DATE)], b"f"));
    let directory = Context::new(&[("Dockerfile", "FROM busybox\nCOPY --from=src / /\n")]);
    let twins = Twins::new();
    let epoch = |name: &str| format!("SOURCE_DATE_EPOCH={name}");
    let named = |place: &str| {
        let context = format!("src={place}");
        twins.build(directory.path(), &["--build-context", &context, "--build-arg", &epoch("src")])
    };
    assert_eq!(named(&git), [COMMITTED]);
    assert_eq!(named(&web.url("/f")), ["1994-11-06T08:49:37Z"]);
    let staged = |from: &str, add: &str| {
        directory
            .write("Dockerfile", &format!("FROM {from} AS src\n{add}\nFROM busybox\nCOPY --from=src / /\n"));
    };
    staged("scratch", &format!("ADD {git} /"));
    assert_eq!(twins.build(directory.path(), &["--build-arg", &epoch("src")]), [COMMITTED]);
    staged("scratch", &format!("ADD {} /", web.url("/f")));
    assert_eq!(twins.build(directory.path(), &["--build-arg", &epoch("src")]), ["1994-11-06T08:49:37Z"]);
    // What has more to it, or nothing that tells a time, has none.
    let Twins([store, _]) = &twins;
    for (from, add) in
        [("busybox", format!("ADD {git} /")), ("scratch", format!("ADD {git} /\nADD {git} /d"))]
    {
        staged(from, &add);
        let outcome = store.build_bounded(&directory, &["--build-arg", &epoch("src")]).expect(3);
        outcome.says(&["stage src has no time", "hint: "]);
    }
    let undated = Web::serve(|_| response("200 OK", &[], b"f"));
    staged("scratch", &format!("ADD {} /", undated.url("/f")));
    store
        .build_bounded(&directory, &["--build-arg", &epoch("src")])
        .expect(4)
        .says(&["SOURCE_DATE_EPOCH=src"]);
}
