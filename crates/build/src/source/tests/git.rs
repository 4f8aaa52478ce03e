//! Checkouts against a real git server.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use kiln_frontend::git_url::{self, GitUrlError};
use kiln_llb as llb;
use kiln_oci::SnapshotId;

use super::repo::{Origin, Repo};
use super::web::{GitServer, Web};
use super::{Bench, chain};
use crate::SourceError;
use crate::source::error::Fault;
use crate::source::git_command::Git;

fn op(text: &str) -> llb::Git {
    git_url::parse(text).unwrap().unwrap()
}

fn get(bench: &Bench, op: &llb::Git) -> Result<SnapshotId, SourceError> {
    bench.fetch(|fetcher| fetcher.git(op)).map(|found| found.snapshot)
}

fn check_out(bench: &Bench, url: &str) -> PathBuf {
    let snapshot = get(bench, &op(url)).unwrap_or_else(|error| panic!("{url}: {}", chain(&error)));
    bench.path(&snapshot)
}

fn error(bench: &Bench, url: &str) -> SourceError {
    match get(bench, &op(url)) {
        Err(error) => error,
        Ok(_) => panic!("{url} was checked out"),
    }
}

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn read(path: &Path, file: &str) -> String {
    fs::read_to_string(path.join(file)).unwrap()
}

/// The shared repositories in the store.
fn shared(bench: &Bench) -> Vec<PathBuf> {
    let entries = fs::read_dir(bench.dir.path().join("store/git")).unwrap();
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect()
}

#[test]
fn a_checkout_is_plain_files_owned_by_root() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("run.sh", "#!/bin/sh\n");
    fs::set_permissions(repo.path.join("run.sh"), fs::Permissions::from_mode(0o700)).unwrap();
    repo.write("dir/file", "text");
    symlink("/etc/passwd", repo.path.join("link")).unwrap();
    repo.commit();
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    let path = check_out(&bench, &web.url("/a/.git"));
    assert_eq!(names(&path), ["dir", "link", "run.sh"]);
    let mode = |name: &str| {
        let stat = fs::symlink_metadata(path.join(name)).unwrap();
        assert_eq!((stat.uid(), stat.gid()), (0, 0), "{name}");
        stat.mode() & 0o7777
    };
    assert_eq!((mode("run.sh"), mode("dir/file"), mode("dir")), (0o755, 0o644, 0o755));
    assert_eq!(fs::read_link(path.join("link")).unwrap(), Path::new("/etc/passwd"));
}

#[test]
fn an_unchanged_commit_costs_one_listing_and_a_new_one_only_what_is_new() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("file", "one");
    repo.commit();
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    let url = web.url("/a/.git#main");
    let first = get(&bench, &op(&url)).unwrap();
    let fetches = |web: &Web| {
        let seen = web.take_seen();
        seen.iter().filter(|r| String::from_utf8_lossy(&r.body).contains("command=fetch")).count()
    };
    assert_eq!(fetches(&web), 1);
    assert_eq!(get(&bench, &op(&url)).unwrap(), first);
    assert_eq!(fetches(&web), 0);

    repo.write("file", "two");
    let commit = repo.commit();
    let second = get(&bench, &op(&url)).unwrap();
    assert_ne!(first, second);
    assert_eq!(read(&bench.path(&second), "file"), "two");
    assert_eq!((fetches(&web), shared(&bench).len()), (1, 1));
    let log = bench.log.lock().unwrap().last().unwrap().clone();
    assert_eq!(log, format!("main of {} is commit {commit}", web.url("/a/.git")));
    // Asked for by its digits, a known commit needs no server at all.
    web.take_seen();
    assert_eq!(get(&bench, &op(&web.url(&format!("/a/.git#{commit}")))).unwrap(), second);
    assert_eq!(web.take_seen().len(), 0);
}

#[test]
fn branches_tags_and_commits_are_found() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("file", "one");
    let one = repo.commit();
    repo.git(&["tag", "--annotate", "--message=t", "v1"]);
    repo.git(&["tag", "light"]);
    repo.write("file", "two");
    let two = repo.commit();
    repo.git(&["tag", "both"]);
    repo.git(&["branch", "both", &one]);
    repo.git(&["update-ref", "refs/pull/7/head", &one]);
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    let content =
        |reference: &str| read(&check_out(&bench, &web.url(&format!("/a/.git{reference}"))), "file");
    assert_eq!(content(""), "two");
    assert_eq!(content("#v1"), "one");
    assert_eq!(content("#light"), "one");
    assert_eq!(content("#refs/pull/7/head"), "one");
    assert_eq!(content(&format!("#{one}")), "one");
    assert_eq!(content("#both"), "one", "a branch goes before a tag");
    assert_eq!(content("?tag=both"), "two");
    assert_eq!(content("?branch=main"), "two");
    assert_eq!(content(&format!("?fetch-by-commit=1&commit={one}#main")), "one");
    let missing = error(&bench, &web.url("/a/.git#absent"));
    assert!(matches!(&missing, SourceError::NoReference { reference, .. } if reference == "absent"));
    assert_eq!(missing.fault(), Fault::Source);
    let short = error(&bench, &web.url(&format!("/a/.git?fetch-by-commit=1&commit={}", &two[..8])));
    assert!(matches!(short, SourceError::NeedsCommit), "{short}");
}

#[test]
fn a_checksum_is_the_commit_or_begins_it() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("file", "one");
    let commit = repo.commit();
    repo.git(&["tag", "--annotate", "--message=t", "v1"]);
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    check_out(&bench, &web.url(&format!("/a/.git?checksum={commit}")));
    check_out(&bench, &web.url(&format!("/a/.git?checksum={}#v1", &commit[..8])));
    let wrong = error(&bench, &web.url("/a/.git?checksum=00000000#v1"));
    assert_eq!(wrong.fault(), Fault::Integrity);
    let text = wrong.to_string();
    assert!(text.contains(&commit) && text.contains("00000000"), "{text}");
}

#[test]
fn a_subdirectory_becomes_the_root() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("a/b/file", "text");
    repo.write("a/b/.hidden", "");
    repo.write("other", "");
    symlink("a/b", repo.path.join("link")).unwrap();
    symlink("/etc", repo.path.join("out")).unwrap();
    repo.commit();
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    let path = check_out(&bench, &web.url("/a/.git#main:a/b"));
    assert_eq!(names(&path), [".hidden", "file"]);
    assert_eq!(names(&check_out(&bench, &web.url("/a/.git#:a"))), ["b"]);
    for (subdir, fault) in [
        ("link", Fault::Refused),
        ("out", Fault::Refused),
        ("other", Fault::Refused),
        ("link/file", Fault::Source),
        ("absent", Fault::Source),
        ("*", Fault::Source),
    ] {
        let found = error(&bench, &web.url(&format!("/a/.git#:{subdir}")));
        assert_eq!(found.fault(), fault, "{subdir}: {found}");
    }
    assert_eq!(bench.leftovers(), 2);
}

#[test]
fn a_kept_git_directory_knows_its_commit_and_tag() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("file", "one");
    repo.commit();
    repo.write("file", "two");
    let commit = repo.commit();
    repo.git(&["tag", "--annotate", "--message=t", "v1"]);
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    for reference in ["#main", "#v1"] {
        let url =
            web.url(&format!("/a/.git?keep-git-dir=1{reference}")).replace("http://", "http://me:canary@");
        let kept = Repo { path: check_out(&bench, &url) };
        assert_eq!(names(&kept.path), [".git", "file"]);
        assert_eq!(kept.git(&["rev-parse", "HEAD"]), commit);
        assert_eq!(kept.git(&["status", "--porcelain"]), "");
        assert_eq!(kept.git(&["rev-list", "--count", "HEAD"]), "1");
        assert_eq!(kept.git(&["remote", "get-url", "origin"]), web.url("/a/.git"));
        assert_eq!(kept.git(&["tag"]), if reference == "#v1" { "v1" } else { "" });
        assert!(!kept.git(&["fsck", "--full"]).contains("missing"));
        assert!(!read(&kept.path, ".git/config").contains("canary"));
    }
    // Without it, `#v1` and `#main` are the same checkout.
    assert_eq!(
        get(&bench, &op(&web.url("/a/.git#v1"))).unwrap(),
        get(&bench, &op(&web.url("/a/.git"))).unwrap()
    );
}

#[test]
fn files_are_as_old_as_their_commit_when_asked_for() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("dir/file", "one");
    symlink("dir", repo.path.join("link")).unwrap();
    repo.commit();
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    let path = check_out(&bench, &web.url("/a/.git?mtime=commit"));
    for name in ["", "dir", "dir/file", "link"] {
        assert_eq!(fs::symlink_metadata(path.join(name)).unwrap().mtime(), 1_000_000_000, "{name}");
    }
    let path = check_out(&bench, &web.url("/a/.git"));
    assert_ne!(fs::metadata(path.join("dir/file")).unwrap().mtime(), 1_000_000_000);
}

#[test]
fn submodules_come_with_their_own() {
    let origin = Origin::new();
    let inner = origin.repo("inner", &[]);
    inner.write("inner-file", "deep");
    let inner_commit = inner.commit();
    let lib = origin.repo("lib", &[]);
    lib.write("lib-file", "lib");
    lib.commit();
    lib.submodule("vendor/inner", "../../inner/.git", &inner_commit);
    let lib_commit = lib.commit_index();
    let repo = origin.repo("a", &[]);
    repo.write("file", "top");
    repo.write("sub/file", "sub");
    repo.commit();
    repo.submodule("sub/lib", "../../lib/.git", &lib_commit);
    repo.commit_index();
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    let path = check_out(&bench, &web.url("/a/.git"));
    assert_eq!(read(&path, "sub/lib/lib-file"), "lib");
    assert_eq!(read(&path, "sub/lib/vendor/inner/inner-file"), "deep");
    assert_eq!(names(&path.join("sub/lib")), [".gitmodules", "lib-file", "vendor"]);
    let path = check_out(&bench, &web.url("/a/.git?submodules=false"));
    assert!(names(&path.join("sub/lib")).is_empty());
    let path = check_out(&bench, &web.url("/a/.git#:sub"));
    assert_eq!(read(&path, "lib/vendor/inner/inner-file"), "deep");
}

#[test]
fn submodules_do_not_reach_this_machine() {
    let origin = Origin::new();
    let victim = origin.repo("victim", &[]);
    victim.write("secret", "");
    let commit = victim.commit();
    let path = victim.path.to_str().unwrap().to_owned();
    for (number, url) in [path.clone(), format!("file://{path}"), "ext::sh -c id".to_owned(), "-x".to_owned()]
        .iter()
        .enumerate()
    {
        let repo = origin.repo(&format!("a{number}"), &[]);
        repo.submodule("lib", url, &commit);
        repo.commit_index();
        let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
        let found = error(&bench, &web.url(&format!("/a{number}/.git")));
        assert!(matches!(&found, SourceError::Submodule { path, .. } if path == "lib"), "{url}: {found}");
        assert_eq!(bench.leftovers(), 0);
    }
    let repo = origin.repo("b", &[]);
    repo.submodule("lib", "../victim", &commit);
    repo.git(&["commit", "--quiet", "--message=m"]);
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    let found = error(&bench, &web.url("/b/.git"));
    assert!(chain(&found).contains("no usable entry"), "{}", chain(&found));
}

#[test]
fn repositories_of_sha256_are_read() {
    let origin = Origin::new();
    let repo = origin.repo("a", &["--object-format=sha256"]);
    repo.write("file", "one");
    let commit = repo.commit();
    assert_eq!(commit.len(), 64);
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    assert_eq!(read(&check_out(&bench, &web.url("/a/.git#main")), "file"), "one");
    let kept =
        Repo { path: check_out(&bench, &web.url(&format!("/a/.git?keep-git-dir=1&checksum={commit}"))) };
    assert_eq!(kept.git(&["rev-parse", "HEAD"]), commit);
}

#[test]
fn old_servers_give_commits_without_a_name_too() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("file", "one");
    let one = repo.commit();
    repo.write("file", "two");
    repo.commit();
    let (web, bench) = (origin.serve(GitServer::Old), Bench::new());
    assert_eq!(read(&check_out(&bench, &web.url("/a/.git")), "file"), "two");
    assert_eq!(read(&check_out(&bench, &web.url(&format!("/a/.git#{one}"))), "file"), "one");
    let absent = "1".repeat(40);
    let found = error(&bench, &web.url(&format!("/a/.git#{absent}")));
    assert!(matches!(found, SourceError::NoReference { .. }), "{found}");
}

#[test]
fn a_token_opens_its_host_and_is_never_shown() {
    const HEADER: &str = "Basic eC1hY2Nlc3MtdG9rZW46Y2FuYXJ5";
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("file", "one");
    repo.commit();
    let web = origin.serve(GitServer::Token(HEADER));
    let url = web.url("/a/.git");
    for name in ["GIT_AUTH_TOKEN", "GIT_AUTH_TOKEN.127.0.0.1"] {
        let bench = Bench::with_secrets(&[(name, "canary")]);
        assert_eq!(read(&check_out(&bench, &url), "file"), "one");
    }
    let bench = Bench::with_secrets(&[("GIT_AUTH_HEADER", HEADER)]);
    check_out(&bench, &url);
    let bench = Bench::new();
    check_out(&bench, &url.replace("http://", "http://x-access-token:canary@"));
    for bench in [Bench::new(), Bench::with_secrets(&[("GIT_AUTH_TOKEN", "dead-canary")])] {
        let found = error(&bench, &url.replace("http://", "http://me:dead-canary@"));
        assert_eq!(found.fault(), Fault::Network);
        assert!(!chain(&found).contains("canary"), "{}", chain(&found));
    }
}

#[test]
fn a_token_without_a_host_stays_with_the_first_repository() {
    let origin = Origin::new();
    let lib = origin.repo("lib", &[]);
    lib.write("file", "lib");
    let commit = lib.commit();
    let other = origin.serve(GitServer::Today);
    let repo = origin.repo("a", &[]);
    repo.submodule("near", "../../lib/.git", &commit);
    repo.submodule("far", &other.url("/lib/.git"), &commit);
    repo.commit_index();
    let web = origin.serve(GitServer::Today);
    let bench = Bench::with_secrets(&[("GIT_AUTH_TOKEN", "canary")]);
    let path = check_out(&bench, &web.url("/a/.git"));
    assert_eq!((read(&path, "near/file"), read(&path, "far/file")), ("lib".to_owned(), "lib".to_owned()));
    assert!(web.take_seen().iter().all(|request| request.header("authorization").is_some()));
    assert!(other.take_seen().iter().all(|request| request.header("authorization").is_none()));
}

#[test]
fn attributes_set_line_ends_and_run_nothing() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write(".gitattributes", "*.bat text eol=crlf\n*.x filter=evil\n");
    repo.write("a.bat", "one\n");
    repo.write("b.x", "plain");
    repo.commit();
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    let path = check_out(&bench, &web.url("/a/.git"));
    assert_eq!((read(&path, "a.bat"), read(&path, "b.x")), ("one\r\n".to_owned(), "plain".to_owned()));
}

#[test]
fn a_damaged_shared_repository_is_made_anew() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("dir/file", "one");
    repo.commit();
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    check_out(&bench, &web.url("/a/.git"));
    let [path] = shared(&bench).try_into().unwrap();
    let packs = path.join("objects/pack");
    for name in names(&packs) {
        fs::remove_file(packs.join(name)).unwrap();
    }
    for name in names(&path.join("objects")).into_iter().filter(|name| name.len() == 2) {
        fs::remove_dir_all(path.join("objects").join(name)).unwrap();
    }
    fs::write(path.join("shallow.lock"), "").unwrap();
    assert_eq!(read(&check_out(&bench, &web.url("/a/.git#:dir")), "file"), "one");
}

#[test]
fn a_repository_without_commits_or_without_a_server_is_said() {
    let origin = Origin::new();
    origin.repo("empty", &[]);
    let (web, bench) = (origin.serve(GitServer::Today), Bench::new());
    let found = error(&bench, &web.url("/empty/.git"));
    assert!(matches!(found, SourceError::NoHead { .. }), "{found}");
    let found = error(&bench, &web.url("/absent/.git"));
    assert_eq!(found.fault(), Fault::Network);
    assert!(found.to_string().contains("not found"), "{found}");
    for url in ["http://127.0.0.1:1/a.git", "git://127.0.0.1:1/a", "ssh://git@127.0.0.1:1/a"] {
        let found = error(&bench, url);
        assert_eq!(found.fault(), Fault::Network);
        assert!(found.to_string().starts_with(&format!("git could not list {url}: ")), "{found}");
    }
}

#[test]
fn ops_that_no_text_made_are_checked_too() {
    let bench = Bench::new();
    let good = op("http://127.0.0.1:1/a.git");
    let refused = |op: llb::Git| match get(&bench, &op) {
        Err(SourceError::GitUrl(error)) => error,
        other => panic!("{other:?}"),
    };
    let option = llb::Git { reference: "--upload-pack=id".to_owned(), ..good.clone() };
    assert!(matches!(refused(option), GitUrlError::Refused { .. }));
    let above = llb::Git { subdir: "a/../..".to_owned(), ..good.clone() };
    assert!(matches!(refused(above), GitUrlError::Refused { .. }));
    for remote in ["/srv/a.git", "file:///srv/a.git", "ext::sh -c id", "--upload-pack=id"] {
        let local = llb::Git { remote: remote.to_owned(), ..good.clone() };
        assert!(matches!(refused(local), GitUrlError::Scheme { .. }), "{remote}");
    }
}

#[test]
fn git_itself_knows_no_transport_but_ours() {
    let origin = Origin::new();
    let repo = origin.repo("a", &[]);
    repo.write("file", "one");
    repo.commit();
    let (bench, path) = (Bench::new(), repo.path.to_str().unwrap().to_owned());
    let marker = origin.dir.path().join("ran");
    for remote in [path.clone(), format!("file://{path}"), format!("ext::touch {}", marker.display())] {
        let output = bench.fetch(|fetcher| {
            let git = Git::new(fetcher, bench.dir.path(), None);
            let mut command = git.command(None);
            command.args(["ls-remote", "--end-of-options", &remote]);
            git.run(command).unwrap()
        });
        assert!(!output.success && output.said.contains("not allowed"), "{remote}: {}", output.said);
    }
    assert!(!marker.exists());
}

#[test]
fn a_cancelled_build_stops_git() {
    let bench = Bench::new();
    let (cancel, origin) = (bench.cancel.clone(), Origin::new());
    let repo = origin.repo("a", &[]);
    repo.write("file", "one");
    repo.commit();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    let web = Web::serve(move |_| {
        kiln_solver::Cancellation::cancel(&cancel);
        // Ends with the test, which drops the other side.
        let _ = held.lock().unwrap().recv();
        Vec::new()
    });
    let found = error(&bench, &web.url("/a/.git"));
    assert!(matches!(found, SourceError::Cancelled), "{found}");
    drop(release);
}
