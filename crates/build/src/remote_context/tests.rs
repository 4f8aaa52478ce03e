//! Contexts from everywhere.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use kiln_layer::Codec;

use super::*;
use crate::source::Fault;
use crate::source::tests::Bench;
use crate::source::tests::web::{GitServer, Web, response};

fn open(bench: &Bench, source: &ContextSource, stdin: &[u8]) -> Result<MainContext, BuildError> {
    let stdin = StandardInput::new(std::io::Cursor::new(stdin.to_vec()));
    opener(bench, |opener| opener.open(source, &stdin))
}

fn opener<T>(bench: &Bench, work: impl FnOnce(&ContextOpener<'_>) -> T) -> T {
    let Bench { engine, options, cancel, .. } = bench;
    work(&ContextOpener { engine, options, cancel, log: &|_| {} })
}

fn tree(context: MainContext) -> TreeContext {
    match context {
        MainContext::Tree(tree) => tree,
        other => panic!("no tree: {other:?}"),
    }
}

fn text(context: MainContext) -> String {
    match context {
        MainContext::DockerfileOnly { bytes, .. } => String::from_utf8(bytes).unwrap(),
        other => panic!("no Dockerfile: {other:?}"),
    }
}

/// A tar of files; a target after `->` makes a link.
fn tar(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        match content.strip_prefix("-> ") {
            Some(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                builder.append_link(&mut header, path, target).unwrap();
            }
            None => {
                header.set_size(content.len() as u64);
                builder.append_data(&mut header, path, content.as_bytes()).unwrap();
            }
        }
    }
    builder.into_inner().unwrap()
}

/// `bytes` through a program of the machine; `None` when it is not there.
fn through(program: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut child =
        Command::new(program).arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    child.stdin.take()?.write_all(bytes).ok()?;
    Some(child.wait_with_output().ok()?.stdout)
}

#[test]
fn the_text_on_the_command_line_says_what_it_is() {
    let parse = |text: &str| ContextSource::parse(text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let existing = dir.path().to_str().unwrap();
    assert_eq!(parse("-"), ContextSource::Stdin);
    assert_eq!(parse(existing), ContextSource::Directory(existing.into()));
    assert_eq!(parse("absent"), ContextSource::Directory("absent".into()));
    assert_eq!(parse("https://h/x.tar.gz"), ContextSource::Http("https://h/x.tar.gz".to_owned()));
    assert!(matches!(parse("https://h/x.git#main:sub"), ContextSource::Git(git) if git.subdir == "sub"));
    assert!(matches!(parse("github.com/a/b"), ContextSource::Git(_)));
    for refused in ["https://h/x.git#--upload-pack=id:sub", "https://h/x.git#ref:../..", "git+ssh://-oX/y"] {
        assert_eq!(ContextSource::parse(refused).unwrap_err().fault(), Fault::Refused, "{refused}");
    }
}

#[test]
fn a_directory_must_be_one() {
    let bench = Bench::new();
    let file = bench.dir.path().join("file");
    fs::write(&file, "").unwrap();
    let kind = open(&bench, &ContextSource::Directory(file), b"");
    assert!(matches!(kind, Err(BuildError::ContextKind { .. })));
    let absent = open(&bench, &ContextSource::Directory("/absent".into()), b"");
    assert!(matches!(absent, Err(BuildError::Unreadable { .. })));
    let here = open(&bench, &ContextSource::Directory(bench.dir.path().into()), b"");
    assert!(matches!(here, Ok(MainContext::Directory(_))));
}

#[test]
fn an_archive_on_standard_input_is_the_context_however_it_is_compressed() {
    let bench = Bench::new();
    let plain = tar(&[("Dockerfile", "FROM scratch\n"), ("dir/file", "text")]);
    let mut gzip = Codec::GZIP.encoder(Vec::new()).unwrap();
    gzip.write_all(&plain).unwrap();
    let mut streams = vec![("tar", plain.clone()), ("gzip", gzip.finish().unwrap())];
    for program in ["bzip2", "xz", "zstd"] {
        match through(program, &plain) {
            Some(bytes) => streams.push((program, bytes)),
            None => eprintln!("skipped: there is no {program} here"),
        }
    }
    for (what, bytes) in streams {
        let tree = tree(open(&bench, &ContextSource::Stdin, &bytes).unwrap());
        assert_eq!(
            fs::read_to_string(bench.path(&tree.snapshot).join("dir/file")).unwrap(),
            "text",
            "{what}"
        );
        let (name, text) = tree.dockerfile(&bench.engine, None).unwrap();
        assert_eq!((name.as_str(), text.as_slice()), ("Dockerfile", &b"FROM scratch\n"[..]), "{what}");
    }
}

#[test]
fn anything_else_on_standard_input_is_the_dockerfile() {
    let bench = Bench::new();
    let file = "FROM scratch\n".repeat(100);
    assert_eq!(text(open(&bench, &ContextSource::Stdin, file.as_bytes()).unwrap()), file);
    let nothing = open(&bench, &ContextSource::Stdin, b"");
    assert!(matches!(nothing, Err(BuildError::Unreadable { .. })), "{nothing:?}");
    let large = vec![b'#'; (dockerfile::MAX_BYTES + 1) as usize];
    let refused = open(&bench, &ContextSource::Stdin, &large);
    assert!(matches!(refused, Err(BuildError::TooLarge { .. })));
}

#[test]
fn broken_archives_leave_nothing() {
    let bench = Bench::new();
    let mut cut = tar(&[("file", &"x".repeat(5000))]);
    cut.truncate(2000);
    assert!(matches!(open(&bench, &ContextSource::Stdin, &cut), Err(BuildError::Extract(_))));
    let junk = [&[0x1f, 0x8b, 8, 0][..], b"no gzip"].concat();
    assert!(matches!(open(&bench, &ContextSource::Stdin, &junk), Err(BuildError::Extract(_))));
    let (committed, active) = bench.engine.snapshots.list().unwrap();
    assert!(committed.is_empty() && active.is_empty());
}

#[test]
fn archives_that_reach_outside_stay_inside() {
    let bench = Bench::new();
    let victim = bench.dir.path().join("victim");
    fs::write(&victim, "whole").unwrap();
    let mut bytes = tar(&[("aa/file", "x"), ("link", "-> ../../../../../.."), ("link/victim", "y")]);
    bytes[..2].copy_from_slice(b"..");
    let sum: u32 = bytes[..148].iter().chain(&bytes[156..512]).map(|&b| u32::from(b)).sum::<u32>() + 256;
    bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let path = bench.path(&tree(open(&bench, &ContextSource::Stdin, &bytes).unwrap()).snapshot);
    assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "x");
    assert_eq!(fs::read_to_string(path.join("victim")).unwrap(), "y");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "whole");
}

#[test]
fn a_dockerfile_in_a_tree_is_found_and_stays_inside() {
    let bench = Bench::new();
    let large = "#".repeat((dockerfile::MAX_BYTES + 1) as usize);
    let bytes = tar(&[
        ("dockerfile", "lower"),
        ("sub/x.Dockerfile", "named"),
        ("link", "-> /sub/x.Dockerfile"),
        ("out", "-> ../../../../../../etc/passwd"),
        ("dir/file", ""),
        ("large", &large),
    ]);
    let tree = tree(open(&bench, &ContextSource::Stdin, &bytes).unwrap());
    let read = |path: Option<&str>| tree.dockerfile(&bench.engine, path.map(Path::new));
    assert_eq!(read(None).unwrap(), ("dockerfile".to_owned(), b"lower".to_vec()));
    for inside in ["sub/x.Dockerfile", "link", "../sub/x.Dockerfile", "/sub/x.Dockerfile"] {
        assert_eq!(read(Some(inside)).unwrap().1, b"named", "{inside}");
    }
    for absent in ["out", "absent", "dockerfile/x"] {
        assert!(matches!(read(Some(absent)), Err(BuildError::NoDockerfile { .. })), "{absent}");
    }
    assert!(matches!(read(Some("dir")), Err(BuildError::Unreadable { .. })));
    assert!(matches!(read(Some("large")), Err(BuildError::TooLarge { .. })));
}

#[test]
fn a_url_is_an_archive_or_a_dockerfile() {
    let archive = tar(&[("Dockerfile", "FROM scratch\n")]);
    let web = Web::serve(move |request| match request.target.as_str() {
        "/x.tar" if request.header("if-none-match").is_some() => response("304 Not Modified", &[], b""),
        "/x.tar" => response("200 OK", &[("ETag", "\"1\"")], &archive),
        "/Dockerfile" => response("200 OK", &[], b"FROM scratch\n"),
        _ => response("404 Not Found", &[], b""),
    });
    let bench = Bench::new();
    let url = |path: &str| ContextSource::Http(web.url(path));
    let first = tree(open(&bench, &url("/x.tar"), b"").unwrap());
    assert_eq!(first.origin, web.url("/x.tar"));
    assert_eq!(first.dockerfile(&bench.engine, None).unwrap().1, b"FROM scratch\n");
    // Neither sent nor unpacked again.
    assert_eq!(tree(open(&bench, &url("/x.tar"), b"").unwrap()).snapshot, first.snapshot);
    assert_eq!(text(open(&bench, &url("/Dockerfile"), b"").unwrap()), "FROM scratch\n");
    let remote = opener(&bench, |opener| opener.dockerfile_at(&web.url("/Dockerfile"))).unwrap();
    assert_eq!(remote, b"FROM scratch\n");
    let missing = open(&bench, &url("/absent"), b"");
    assert!(matches!(missing, Err(BuildError::Source(SourceError::Status { status: 404, .. }))));
}

#[test]
fn a_repository_is_a_context() {
    let dir = tempfile::tempdir().unwrap();
    let script = "git init --quiet --initial-branch=main a && cd a && mkdir sub \
        && echo FROM scratch > sub/Dockerfile && git add . \
        && git -c user.name=A -c user.email=a@b commit --quiet -m m";
    let made = Command::new("sh").args(["-c", script]).current_dir(dir.path()).status().unwrap();
    assert!(made.success());
    let (web, bench) = (Web::git(dir.path(), GitServer::Today), Bench::new());
    let source = ContextSource::parse(&web.url("/a/.git#main:sub")).unwrap();
    let tree = tree(open(&bench, &source, b"").unwrap());
    assert_eq!(tree.dockerfile(&bench.engine, None).unwrap().1, b"FROM scratch\n");
    assert_eq!(tree.origin, web.url("/a/.git"));
}
