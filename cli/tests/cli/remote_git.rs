//! Git repositories: in `ADD`, and as build contexts.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::{Context, Outcome, Store, needs_root, text};
use crate::repo::{Origin, Repo};
use crate::web::{GitServer, Web};

/// Builds these instructions on busybox, as `x`.
#[track_caller]
fn add(store: &Store, instructions: &str) -> Outcome {
    let dockerfile = format!("FROM busybox\n{instructions}\n");
    store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &["-t", "x"])
}

/// What git asked the server for since the last call: lists of references, and objects.
fn asked(web: &Web) -> (usize, usize) {
    let seen = web.take_seen();
    let with = |word: &str| seen.iter().filter(|r| String::from_utf8_lossy(&r.body).contains(word)).count();
    (with("command=ls-refs"), with("command=fetch"))
}

/// `one` at the tag v1 and the branch old, `two` at main.
fn two_commits(origin: &Origin) -> (Repo, String, String) {
    let repo = origin.repo("a", &[]);
    repo.write("file", "one");
    repo.write("sub/deep/file", "deep");
    let one = repo.commit();
    repo.git(&["tag", "--annotate", "--message=t", "v1"]);
    repo.git(&["branch", "old"]);
    repo.write("file", "two");
    let two = repo.commit();
    (repo, one, two)
}

#[test]
fn branches_tags_commits_and_directories_are_added() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let (_repo, one, two) = two_commits(&origin);
    let web = origin.serve(GitServer::Today);
    let at = |what: &str| web.url(&format!("/a/.git{what}"));
    let instructions: String = [
        ("main", at("#main")),
        ("head", at("")),
        ("branch", at("#old")),
        ("tag", at("#v1")),
        ("query", at("?tag=v1")),
        ("commit", at(&format!("#{one}"))),
        ("sub", at("#main:sub/deep")),
        ("query-sub", at("?branch=old&subdir=sub")),
    ]
    .map(|(name, url)| format!("ADD {url} /{name}\n"))
    .concat();
    add(&store, &instructions).expect(0);
    let shown =
        store.shell("x", "for d in main head branch tag query commit sub; do cat /$d/file; echo; done");
    assert_eq!(shown, "two\ntwo\none\none\none\none\ndeep");
    assert_eq!(
        store.shell("x", "ls -A /main /sub /query-sub"),
        "/main:\nfile\nsub\n\n/query-sub:\ndeep\n\n/sub:\nfile"
    );
    assert_eq!(
        store.shell("x", "stat -c '%a %u:%g' /main/file /main/sub"),
        "644 0:0\n755 0:0",
        "whoever made the repository"
    );
    // Nothing new: a list of references for each name, no objects, and nothing runs.
    asked(&web);
    let again = add(&store, &instructions).expect(0);
    assert!(again.stdout.contains("everything from the cache"), "{}", again.stderr);
    assert_eq!(asked(&web), (7, 0));
    // A commit is known by its digits.
    let by_commit = format!("ADD {} /c", at(&format!("#{two}")));
    add(&store, &by_commit).expect(0).says(&[&format!("is commit {two}")]);
    assert_eq!(asked(&web), (0, 0));
}

#[test]
fn a_new_commit_is_seen() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let (repo, ..) = two_commits(&origin);
    let web = origin.serve(GitServer::Today);
    let instructions = format!("ADD {} /d", web.url("/a/.git#main"));
    add(&store, &instructions).expect(0);
    repo.write("file", "three");
    let commit = repo.commit();
    add(&store, &instructions)
        .expect(0)
        .says(&[&format!("main of {} is commit {commit}", web.url("/a/.git"))]);
    assert_eq!(store.shell("x", "cat /d/file"), "three");
    // A commit with the same files is the same content: the copy is not made again.
    repo.git(&["commit", "--quiet", "--allow-empty", "--message=empty"]);
    let outcome = add(&store, &format!("{instructions}\nWORKDIR /w")).expect(0);
    assert!(!outcome.steps().contains(&("WORKDIR /w".to_owned(), true)), "{}", outcome.stderr);
    repo.git(&["commit", "--quiet", "--allow-empty", "--message=empty"]);
    let outcome = add(&store, &format!("{instructions}\nWORKDIR /w")).expect(0);
    assert!(outcome.steps().contains(&("WORKDIR /w".to_owned(), true)), "{}", outcome.stderr);
}

#[test]
fn a_git_directory_is_kept_when_asked_for() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let (_repo, _, two) = two_commits(&origin);
    let web = origin.serve(GitServer::Today);
    let url = web.url("/a/.git");
    let instructions = format!(
        "ADD --keep-git-dir {url} /flag\nADD {url}?keep-git-dir=1 /query\nADD --keep-git-dir=false {url} /none"
    );
    add(&store, &instructions).expect(0);
    assert_eq!(
        store.shell("x", "cat /flag/.git/HEAD /query/.git/HEAD; ls -A /none"),
        format!("{two}\n{two}\nfile\nsub")
    );
    let both = format!("ADD --keep-git-dir=false {url}?keep-git-dir=1 /d");
    add(&store, &both).expect(3).says(&["contradict each other"]);
}

#[test]
fn submodules_come_along_unless_switched_off() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let lib = origin.repo("lib", &[]);
    lib.write("lib-file", "lib");
    let commit = lib.commit();
    let repo = origin.repo("a", &[]);
    repo.write("file", "top");
    repo.commit();
    repo.submodule("vendor/lib", "../../lib/.git", &commit);
    repo.commit_index();
    let web = origin.serve(GitServer::Today);
    let url = web.url("/a/.git");
    add(&store, &format!("ADD {url} /with\nADD {url}?submodules=0 /without")).expect(0);
    assert_eq!(store.shell("x", "cat /with/vendor/lib/lib-file; ls -A /without/vendor/lib"), "lib");
    // One that would read this machine's files does not come at all.
    let evil = origin.repo("evil", &[]);
    evil.submodule("lib", text(&lib.path), &commit);
    evil.commit_index();
    let outcome = add(&store, &format!("ADD {} /d", web.url("/evil/.git"))).expect(4);
    outcome.says(&["Dockerfile:2:1", "submodule \"lib\""]);
}

#[test]
fn a_commit_that_is_another_one_is_refused() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let (_repo, one, two) = two_commits(&origin);
    let web = origin.serve(GitServer::Today);
    let url = web.url("/a/.git");
    add(&store, &format!("ADD --checksum={two} {url}#main /d\nADD {url}?checksum={}#v1 /e", &one[..8]))
        .expect(0);
    for wrong in [format!("--checksum={one} {url}#main"), format!("{url}?checksum={}#main", &one[..8])] {
        let outcome = add(&store, &format!("ADD {wrong} /d")).expect(6);
        outcome.says(&["Dockerfile:2:1", &two, &one[..8], "is expected"]);
    }
    add(&store, &format!("ADD --checksum=main {url} /d")).expect(3).says(&["Dockerfile:2:", "no commit"]);
    for (absent, says) in [("#absent", "\"absent\""), ("#main:absent", "no directory \"absent\"")] {
        add(&store, &format!("ADD {url}{absent} /d")).expect(4).says(&["Dockerfile:2:1", says]);
    }
    let no_repository = web.url("/absent.git");
    add(&store, &format!("ADD {no_repository} /d")).expect(5).says(&["Dockerfile:2:1", "git could not list"]);
}

#[test]
fn what_would_reach_options_or_other_files_is_refused() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let (repo, ..) = two_commits(&origin);
    std::os::unix::fs::symlink("/etc", repo.path.join("out")).expect("ours to write");
    repo.commit();
    let web = origin.serve(GitServer::Today);
    let context = Context::new(&[("Dockerfile", "FROM busybox\n")]);
    let url = web.url("/a/.git");
    let refused = [
        format!("{url}#--upload-pack=id:sub"),
        format!("{url}#main:../.."),
        format!("{url}?subdir=../etc"),
        "git+ssh://-oProxyCommand=id/x".to_owned(),
        "ssh://-oProxyCommand=id/x".to_owned(),
    ];
    for url in refused {
        // Before anything is asked.
        add(&store, &format!("ADD {url} /d")).expect(7).says(&["Dockerfile:2:", "is refused"]);
        store.build_from(&url, &[]).expect(7).says(&["is refused"]);
        store
            .build_bounded(&context, &["--build-context", &format!("n={url}")])
            .expect(7)
            .says(&["is refused"]);
    }
    assert_eq!(web.take_seen().len(), 0);
    add(&store, &format!("ADD {url}#main:out /d")).expect(7).says(&["\"out\"", "a symbolic link"]);
    store.build_from(&format!("{url}#main:out"), &[]).expect(7).says(&["a symbolic link"]);
    // Transports that would run programs or read this machine's files.
    for other in ["git+file:///etc/x.git", "file:///etc/x.git"] {
        add(&store, &format!("ADD {other} /d")).expect(3).says(&["is not supported"]);
        store.build_from(other, &[]).expect(4).says(&["is not supported"]);
    }
}

/// A port of loopback where `git daemon` gives out what is beside `repo`; `None`, aloud, when this
/// git has no daemon. Lives as long as the process.
fn daemon_beside(repo: &Repo) -> Option<u16> {
    let found = Command::new("git").arg("--exec-path").output().expect("git runs").stdout;
    if !Path::new(String::from_utf8_lossy(&found).trim()).join("git-daemon").exists() {
        eprintln!("SKIPPED ALOUD: needs git daemon");
        return None;
    }
    let root = repo.path.parent().expect("repositories are below a directory").to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        // One for each connection, as inetd does: nobody has to wait until it listens.
        for stream in listener.incoming().flatten() {
            let stream = OwnedFd::from(stream);
            let mut daemon = Command::new("git");
            daemon.args(["daemon", "--inetd", "--export-all", "--log-destination=none"]);
            daemon.arg(format!("--base-path={}", root.display())).arg(&root);
            daemon.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
            daemon.stdin(stream.try_clone().expect("there are file descriptors left")).stdout(stream);
            let _ = daemon.stderr(Stdio::null()).status();
        }
    });
    Some(port)
}

#[test]
fn the_protocol_of_git_itself_is_spoken() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let (repo, one, _) = two_commits(&origin);
    let Some(port) = daemon_beside(&repo) else { return };
    let url = format!("git://127.0.0.1:{port}/a/.git");
    add(&store, &format!("ADD {url}#main:sub /sub\nADD {url}#{one} /one")).expect(0);
    assert_eq!(store.shell("x", "cat /sub/deep/file /one/file"), "deepone");
    let absent = format!("git://127.0.0.1:{port}/absent/.git");
    add(&store, &format!("ADD {absent} /d")).expect(5).says(&["git could not list", &absent]);
}
