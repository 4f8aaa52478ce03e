//! Build contexts that are no directory: archives and Dockerfiles, from standard input or from a
//! web server.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::harness::{Context, Store, needs_root};
use crate::web::{Web, response};

/// An entry of a tar; its path is written as it is, whatever it says.
struct Entry {
    path: &'static str,
    content: &'static str,
    mode: u32,
    owner: (u64, u64),
}

/// A file of root's.
fn file(path: &'static str, content: &'static str) -> Entry {
    Entry { path, content, mode: 0o644, owner: (0, 0) }
}

/// A tar of files, and of links where the content begins with `-> `.
fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for Entry { path, content, mode, owner } in entries {
        let mut header = tar::Header::new_gnu();
        // `set_path` would refuse what these tests are about.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_mode(*mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        header.set_mtime(1_000_000_000);
        let data = match content.strip_prefix("-> ") {
            Some(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_link_name_literal(target).expect("short");
                ""
            }
            None => content,
        };
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data.as_bytes()).expect("in memory");
    }
    builder.into_inner().expect("in memory")
}

/// `bytes` through a program of the machine; `None`, aloud, when it is not there.
fn through(program: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let child = Command::new(program).arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let Ok(mut child) = child else {
        eprintln!("SKIPPED ALOUD: needs {program}");
        return None;
    };
    // Little enough for the pipe.
    child.stdin.take().expect("piped above").write_all(bytes).expect("it reads");
    Some(child.wait_with_output().expect("our child").stdout)
}

#[test]
fn an_archive_on_standard_input_is_the_context_however_it_is_compressed() {
    needs_root!();
    let store = Store::with_busybox();
    for program in [None, Some("gzip"), Some("bzip2"), Some("xz"), Some("zstd")] {
        // Different for each: nothing may come out of the cache.
        let name = program.unwrap_or("plain");
        let dockerfile = "FROM busybox\nCOPY d /d\n";
        let plain = tar(&[file("Dockerfile", dockerfile), file("d/f", name)]);
        let Some(bytes) = program.map_or(Some(plain.clone()), |program| through(program, &plain)) else {
            continue;
        };
        let outcome = store.build_piped(&bytes, "-", &["-t", "x"]).expect(0);
        assert_eq!(outcome.ran().len(), 1, "{name}:\n{}", outcome.stderr);
        assert_eq!(store.shell("x", "cat /d/f"), name);
    }
    // Where it came from and how it was packed makes no difference to what came out of it.
    let bytes = tar(&[file("Dockerfile", "FROM busybox\nCOPY d /d\n"), file("d/f", "plain")]);
    assert_eq!(store.build_piped(&bytes, "-", &[]).expect(0).ran(), [""; 0]);
}

#[test]
fn files_of_an_archive_keep_their_owner_mode_and_time() {
    needs_root!();
    let store = Store::with_busybox();
    let bytes = tar(&[
        file("Dockerfile", "FROM busybox\nCOPY f /f\nCOPY --chown=7:8 --chmod=600 f /g\n"),
        Entry { path: "f", content: "f", mode: 0o4751, owner: (1234, 5678) },
    ]);
    let seen = |store: &Store| store.shell("x", "stat -c '%u:%g %a %Y' /f /g");
    let expected = "1234:5678 4751 1000000000\n7:8 600 1000000000";
    store.build_piped(&bytes, "-", &["-t", "x"]).expect(0);
    assert_eq!(seen(&store), expected);
    let web = Web::serve(move |_| response("200 OK", &[], &bytes));
    store.build_from(&web.url("/context.tar"), &["-t", "x"]).expect(0);
    assert_eq!(seen(&store), expected);
}

#[test]
fn an_archive_that_climbs_stays_inside() {
    needs_root!();
    let store = Store::with_busybox();
    std::fs::write(store.beside("victim"), "whole").expect("ours to write");
    let bytes = tar(&[
        file("Dockerfile", "FROM busybox\nCOPY . /all/\nCOPY ../../up /by-name\n"),
        file("../../../../../up", "up"),
        file("/rooted", "rooted"),
        file("link", "-> ../../../../../.."),
        file("link/victim", "through"),
    ]);
    store.build_piped(&bytes, "-", &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cd /all && cat up rooted victim /by-name"), "uprootedthroughup");
    assert_eq!(std::fs::read_to_string(store.beside("victim")).expect("ours"), "whole");
    assert!(!std::path::Path::new("/up").exists() && !std::path::Path::new("/rooted").exists());
    // Nor does the Dockerfile come from outside of it.
    let bytes = tar(&[file("Dockerfile", "-> ../../../../../../etc/passwd"), file("f", "")]);
    store.build_piped(&bytes, "-", &[]).expect(4).says(&["no Dockerfile"]);
    for path in ["/etc/passwd", "../../../../etc/passwd"] {
        store.build_piped(&bytes, "-", &["-f", path]).expect(4).says(&["no Dockerfile", "etc/passwd"]);
    }
}

#[test]
fn the_dockerfile_of_an_archive_is_chosen_inside_it() {
    needs_root!();
    let store = Store::with_busybox();
    let bytes = tar(&[
        file("Dockerfile", "FROM busybox\nLABEL of=usual\n"),
        file("sub/other", "FROM busybox\nLABEL of=other\nCOPY . /all/\n"),
        // As in BuildKit, ignore files are for directories.
        file(".dockerignore", "*\n"),
    ]);
    let label = |store: &Store| store.inspect("x")["Config"]["Labels"]["of"].clone();
    for (args, expected) in [(&["-t", "x"][..], "usual"), (&["-t", "x", "-f", "sub/other"], "other")] {
        store.build_piped(&bytes, "-", args).expect(0);
        assert_eq!(label(&store), expected);
    }
    assert_eq!(
        store.shell("x", "cd /all && find . -type f | sort"),
        "./.dockerignore\n./Dockerfile\n./sub/other"
    );
    store.build_piped(&bytes, "-", &["-f", "absent"]).expect(4).says(&["no Dockerfile", "absent", "hint: "]);
    let none = tar(&[file("f", "")]);
    store.build_piped(&none, "-", &[]).expect(4).says(&["error: no Dockerfile at standard input"]);
    // Errors in it are shown as errors of any Dockerfile.
    let wrong = tar(&[file("d/x", "FROM busybox\nRNU true\n")]);
    store.build_piped(&wrong, "-", &["-f", "d/x"]).expect(3).says(&["d/x:2:1", "RNU"]);
}

#[test]
fn standard_input_is_one_thing() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = b"FROM busybox\nLABEL of=stdin\n";
    let refused = |input: &[u8], context: &str, args: &[&str], code, says: &[&str]| {
        store.build_piped(input, context, args).expect(code).says(says);
    };
    refused(dockerfile, "-", &["-f", "-"], 2, &["standard input cannot be both"]);
    refused(dockerfile, "-", &["-f", "other"], 2, &["the context is a single Dockerfile"]);
    refused(dockerfile, ".", &["--build-context", "x=-"], 2, &["\"x\" cannot be standard input"]);
    refused(b"", "-", &[], 4, &["nothing came"]);
    let mut cut = tar(&[file("Dockerfile", "FROM busybox\n"), file("f", "some text")]);
    cut.truncate(1400);
    refused(&cut, "-", &[], 6, &["cannot unpack the build context"]);
    refused(b"\x1f\x8b\x08\0junk that is no gzip", "-", &[], 6, &["cannot unpack the build context"]);
    assert_eq!(store.ok(&["images", "--quiet"]).stdout.lines().count(), 1, "only busybox");
}

/// Serves one content with an ETag, and says how often it was sent and how often it was not.
struct Tagged {
    web: Web,
}

impl Tagged {
    fn new(content: Vec<u8>) -> Tagged {
        let web = Web::serve(move |request| match request.target.as_str() {
            "/absent" => response("404 Not Found", &[], b"<html>"),
            _ if request.header("if-none-match") == Some("\"1\"") => {
                response("304 Not Modified", &[("ETag", "\"1\"")], b"")
            }
            _ => response("200 OK", &[("ETag", "\"1\"")], &content),
        });
        Tagged { web }
    }

    /// Since the last call: requests for all of it, and requests for what is newer.
    fn requests(&self) -> (usize, usize) {
        let seen = self.web.take_seen();
        let conditional = seen.iter().filter(|request| request.header("if-none-match").is_some()).count();
        (seen.len() - conditional, conditional)
    }
}

#[test]
fn an_archive_of_a_web_server_is_fetched_once() {
    needs_root!();
    let store = Store::with_busybox();
    let plain = tar(&[
        file("Dockerfile", "FROM busybox\nCOPY d /d\n"),
        file("sub/x.Dockerfile", "FROM busybox\nCOPY d/f /f\n"),
        file("d/f", "f"),
    ]);
    let Some(bytes) = through("gzip", &plain) else { return };
    let server = Tagged::new(bytes);
    // The name says nothing: content does.
    let url = server.web.url("/download?id=7");
    assert_eq!(store.build_from(&url, &["-t", "x"]).expect(0).ran(), ["COPY d /d"]);
    assert_eq!((store.shell("x", "cat /d/f").as_str(), server.requests()), ("f", (1, 0)));
    assert_eq!(store.build_from(&url, &[]).expect(0).ran(), [""; 0]);
    assert_eq!(server.requests(), (0, 1));
    store.build_from(&url, &["-f", "sub/x.Dockerfile", "-t", "y"]).expect(0);
    assert_eq!((store.shell("y", "cat /f").as_str(), server.requests()), ("f", (0, 1)));
    let absent = server.web.url("/absent");
    store.build_from(&absent, &[]).expect(5).says(&["404", "/absent"]);
}

#[test]
fn a_dockerfile_of_a_web_server_is_the_context_or_goes_with_one() {
    needs_root!();
    let store = Store::with_busybox();
    let server = Tagged::new(b"FROM busybox\nCOPY f /f\n".to_vec());
    let url = server.web.url("/x/Dockerfile");
    let context = Context::new(&[("f", "f")]);
    store.build_bounded(&context, &["-f", &url, "-t", "x"]).expect(0);
    assert_eq!((store.shell("x", "cat /f").as_str(), server.requests()), ("f", (1, 0)));
    assert_eq!(store.build_bounded(&context, &["-f", &url]).expect(0).ran(), [""; 0]);
    // Alone it has no files to copy, and says where it stands.
    store.build_from(&url, &[]).expect(4).says(&[&format!("{url}:2:1"), "\"f\""]);
    assert_eq!(server.requests(), (0, 2), "it is known under this URL");
    store.build_from(&url, &["-f", "other"]).expect(2).says(&["the context is a single Dockerfile"]);
    let archive = tar(&[file("f", "of the archive")]);
    store.build_piped(&archive, "-", &["-f", &url, "-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cat /f"), "of the archive");
    store.build_bounded(&context, &["-f", &server.web.url("/absent")]).expect(5).says(&["404"]);
    // What is no Dockerfile is one with errors.
    let page = Web::serve(|_| response("200 OK", &[], b"<html><body>Sign in</body></html>"));
    store.build_from(&page.url("/x.tar.gz"), &[]).expect(3).says(&["/x.tar.gz:1:1"]);
}
