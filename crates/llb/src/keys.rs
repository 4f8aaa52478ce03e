//! Which fields of an op are in its keys: one row each.
//!
//! `table!` takes a sample apart without `..`: a field without a row does not compile. Enums go through a
//! `match` without `_`: a variant without a row fails the test.

use std::fmt::Debug;
use std::time::Duration;

use kiln_oci::image::{Extra, History, ImageConfig, RootFs, RunConfig};
use kiln_oci::{DiffId, Digest, Platform};

use crate::*;

/// What changing a field does to the op's two digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    /// Another op, whatever is known of its inputs.
    Both,
    /// Another op until it is known what it reads: content is the same wherever it was.
    Definition,
    /// The same op.
    Neither,
}
use Key::{Both, Definition, Neither};

struct Row {
    field: String,
    key: Key,
    changed: Op,
}

/// Rows of a sample: each field gets one or more other values.
macro_rules! table {
    ($op:expr, $sample:expr, $type:ident { $($field:ident: $key:expr => [$($value:expr),+ $(,)?]),+ $(,)? }) => {{
        let sample: $type = $sample;
        let $type { $($field: _),+ } = &sample;
        let mut rows = Vec::new();
        $($(
            let mut changed = sample.clone();
            changed.$field = $value;
            assert_ne!(changed, sample, "a row that changes nothing: {}", stringify!($field));
            let field = format!("{}.{} {:?}", stringify!($type), stringify!($field), changed.$field);
            rows.push(Row { field, key: $key, changed: $op(changed) });
        )+)+
        check(&$op(sample), &rows);
    }};
}

/// Every row does to both digests what it says, and no two rows that count for something meet.
#[track_caller]
fn check(sample: &Op, rows: &[Row]) {
    let mut seen = vec![("the sample".to_owned(), sample.digest())];
    for Row { field, key, changed } in rows {
        assert_eq!(changed.digest() != sample.digest(), *key != Neither, "{field}: the definition's key");
        let by_content = (changed.digest_by_content(), sample.digest_by_content());
        if let (Some(changed), Some(sample)) = by_content {
            assert_eq!(changed != sample, *key == Both, "{field}: the content's key");
        } else {
            assert_ne!(*key, Definition, "{field}: it reads nothing");
        }
        if *key != Neither {
            let digest = changed.digest();
            let same = seen.iter().find(|(_, known)| *known == digest);
            assert_eq!(same, None, "{field} makes the same op");
            seen.push((field.clone(), digest));
        }
    }
}

/// All values of an enum, or one of each variant: `place` gives each variant its number, in a `match` without `_`.
#[track_caller]
fn all<T: Debug, const N: usize>(values: [T; N], place: impl Fn(&T) -> usize) -> [T; N] {
    for (at, value) in values.iter().enumerate() {
        assert_eq!(place(value), at, "{value:?} stands in its place");
    }
    values
}

/// A mount of each kind.
fn mount_kinds() -> [MountKind; 5] {
    let (bind, cache) = (MountKind::Bind(bind()), MountKind::Cache(cache()));
    let (secret, ssh) = (MountKind::Secret(secret()), MountKind::Ssh(secret()));
    all([bind, cache, MountKind::Tmpfs { size_bytes: None }, secret, ssh], |kind| match kind {
        MountKind::Bind(_) => 0,
        MountKind::Cache(_) => 1,
        MountKind::Tmpfs { size_bytes: _ } => 2,
        MountKind::Secret(_) => 3,
        MountKind::Ssh(_) => 4,
    })
}

fn platform(text: &str) -> Platform {
    text.parse().expect("a platform")
}

fn text(text: &str) -> String {
    text.to_owned()
}

fn texts<const N: usize>(all: [&str; N]) -> Vec<String> {
    all.map(text).to_vec()
}

fn pairs<const N: usize>(all: [(&str, &str); N]) -> Vec<(String, String)> {
    all.map(|(name, value)| (text(name), text(value))).to_vec()
}

fn slot(at: usize) -> Option<InputIndex> {
    Some(InputIndex(at))
}

fn exec() -> Exec {
    Exec {
        base: slot(0),
        args: texts(["sh", "-c", "make"]),
        env: pairs([("A", "1"), ("B", "2")]),
        unkeyed_env: pairs([("http_proxy", "http://here")]),
        cwd: text("/w"),
        user: Some(text("me")),
        hostname: text("build"),
        extra_hosts: pairs([("db", "10.0.0.1")]),
        network: Network::Default,
        security: Security::Sandbox,
        mounts: vec![Mount { target: text("/a"), kind: MountKind::Bind(bind()) }],
        secret_env: vec![secret_env()],
        cache_ttl: None,
        foreign: None,
    }
}

fn bind() -> BindMount {
    BindMount { from: slot(1), source: text("src"), writable: false }
}

fn cache() -> CacheMount {
    let (from, source) = (slot(1), text("seed"));
    let (id, sharing) = (text("cache"), Sharing::Shared);
    CacheMount { id, sharing, from, source, mode: 0o755, uid: 0, gid: 0, read_only: false }
}

fn secret() -> SecretMount {
    SecretMount { id: text("token"), mode: 0o400, uid: 0, gid: 0, required: false }
}

fn secret_env() -> SecretEnv {
    SecretEnv { name: text("TOKEN"), id: text("token"), required: false }
}

fn with_mount(kind: MountKind) -> Op {
    Op::Exec(Exec { mounts: vec![Mount { target: text("/a"), kind }], ..exec() })
}

fn copy() -> Copy {
    Copy {
        from: InputIndex(1),
        sources: texts(["dir/file"]),
        destination: text("/to"),
        destination_is_dir: false,
        owner: Owner::Root,
        mode: None,
        parents: false,
        exclude: texts(["*.o"]),
        unpack: Unpack::Never,
    }
}

fn file(action: FileAction) -> Op {
    Op::File(File { base: slot(0), actions: vec![action] })
}

fn git() -> Git {
    Git {
        remote: text("https://host/repo.git"),
        reference: text("main"),
        checksum: None,
        subdir: String::new(),
        keep_git_dir: false,
        submodules: true,
        mtime: GitMtime::Checkout,
        fetch_by_commit: false,
    }
}

#[test]
fn run() {
    let bind = |from| Mount { target: text("/a"), kind: MountKind::Bind(BindMount { from, ..bind() }) };
    let [_, none, host] = all([Network::Default, Network::None, Network::Host], |network| match network {
        Network::Default => 0,
        Network::None => 1,
        Network::Host => 2,
    });
    let [_, insecure] = all([Security::Sandbox, Security::Insecure], |security| match security {
        Security::Sandbox => 0,
        Security::Insecure => 1,
    });
    table!(Op::Exec, exec(), Exec {
        base: Both => [None, slot(2)],
        args: Both => [texts(["sh", "-c", "make all"]), texts(["sh", "-cmake"]), Vec::new()],
        // In order, and whether it is used or not.
        env: Both => [
            pairs([("A", "1")]),
            pairs([("A", "1"), ("B", "3")]),
            pairs([("B", "2"), ("A", "1")]),
            pairs([("A", "1"), ("C", "2")]),
        ],
        unkeyed_env: Neither => [Vec::new(), pairs([("http_proxy", "http://there")])],
        cwd: Both => [text("/")],
        user: Both => [None, Some(text("you"))],
        hostname: Both => [text("other")],
        // The names; addresses are where the build happens to run.
        extra_hosts: Both => [Vec::new(), pairs([("cache", "10.0.0.1")])],
        network: Both => [none, host],
        security: Both => [insecure],
        mounts: Both => [Vec::new(), vec![bind(slot(1)), bind(slot(1))], vec![bind(slot(2))]],
        secret_env: Both => [Vec::new(), vec![secret_env(), secret_env()]],
        // It says which results count, not what they are.
        cache_ttl: Neither => [Some(Duration::from_secs(1))],
        // An emulator is another machine.
        foreign: Both => [Some(platform("linux/arm64")), Some(platform("linux/arm/v7"))],
    });
    let other_address = Exec { extra_hosts: pairs([("db", "10.0.0.2")]), ..exec() };
    let row = Row { field: text("the address of a host"), key: Neither, changed: Op::Exec(other_address) };
    check(&Op::Exec(exec()), &[row]);
    table!(|secret| Op::Exec(Exec { secret_env: vec![secret], ..exec() }), secret_env(), SecretEnv {
        name: Both => [text("OTHER")],
        id: Both => [text("other")],
        required: Both => [true],
    });
}

#[test]
fn mounts_of_run() {
    let [_, a_cache, a_tmpfs, a_secret, an_agent] = mount_kinds();
    table!(|mount| Op::Exec(Exec { mounts: vec![mount], ..exec() }),
        Mount { target: text("/a"), kind: MountKind::Bind(bind()) },
        Mount {
            target: Both => [text("/b")],
            kind: Both => [
                MountKind::Bind(BindMount { writable: true, ..bind() }),
                a_cache,
                a_tmpfs,
                a_secret,
                an_agent,
            ],
        }
    );
    table!(|bind| with_mount(MountKind::Bind(bind)), bind(), BindMount {
        from: Both => [None, slot(2)],
        source: Definition => [text(""), text("other/src")],
        writable: Both => [true],
    });
    let [_, private, locked] =
        all([Sharing::Shared, Sharing::Private, Sharing::Locked], |sharing| match sharing {
            Sharing::Shared => 0,
            Sharing::Private => 1,
            Sharing::Locked => 2,
        });
    table!(|cache| with_mount(MountKind::Cache(cache)), cache(), CacheMount {
        id: Neither => [text("other")],
        sharing: Neither => [private, locked],
        from: Both => [None, slot(2)],
        source: Definition => [text("")],
        mode: Both => [0o700],
        uid: Both => [1],
        gid: Both => [1],
        read_only: Both => [true],
    });
    for kind in [MountKind::Secret, MountKind::Ssh] {
        table!(|secret| with_mount(kind(secret)), secret(), SecretMount {
            id: Both => [text("other")],
            mode: Both => [0o440],
            uid: Both => [1],
            gid: Both => [1],
            required: Both => [true],
        });
    }
    let tmpfs = |size_bytes| with_mount(MountKind::Tmpfs { size_bytes });
    let row = |size| Row { field: format!("{size:?}"), key: Both, changed: tmpfs(size) };
    check(&tmpfs(Some(1)), &[row(None), row(Some(2))]);
}

#[test]
fn where_a_mount_of_what_the_process_runs_on_looks_is_never_left_out() {
    let of_base = |source: &str| {
        let of = |from, source| {
            let kind = MountKind::Bind(BindMount { from, source: text(source), writable: false });
            Mount { target: text("/a"), kind }
        };
        Op::Exec(Exec { mounts: vec![of(slot(0), source), of(slot(1), "src")], ..exec() })
    };
    assert_ne!(of_base("one").digest_by_content(), of_base("other").digest_by_content());
}

#[test]
fn file_actions() {
    let [_, kept, named] = all([Owner::Root, Owner::Keep, Owner::Named(text("me"))], |owner| match owner {
        Owner::Root => 0,
        Owner::Keep => 1,
        Owner::Named(_) => 2,
    });
    let [_, archives] = all([Unpack::Never, Unpack::Archives], |unpack| match unpack {
        Unpack::Never => 0,
        Unpack::Archives => 1,
    });
    let mode = |text: &str| Some(text.parse().expect("a mode"));
    table!(|copy| file(FileAction::Copy(copy)), copy(), Copy {
        from: Both => [InputIndex(2)],
        sources: Both => [texts(["dir/other"]), texts(["dir/*"]), texts(["dir/file", "file"])],
        destination: Both => [text("/there")],
        destination_is_dir: Both => [true],
        owner: Both => [kept, Owner::Named(text("0")), named],
        mode: Both => [mode("644"), mode("u=rw")],
        parents: Both => [true],
        exclude: Both => [Vec::new(), texts(["*.a"]), texts(["*.o", "*.a"])],
        unpack: Both => [archives],
    });
    let from =
        |source: &str, parents| file(FileAction::Copy(Copy { sources: texts([source]), parents, ..copy() }));
    let row = |key, changed| Row { field: text("the directory of a source"), key, changed };
    check(&from("dir/file", false), &[row(Definition, from("file", false))]);
    // There it becomes part of the destination.
    check(&from("dir/file", true), &[row(Both, from("file", true))]);

    let mkdir = Mkdir { path: text("/d"), mode: 0o755, owner: None, created: None };
    table!(|mkdir| file(FileAction::Mkdir(mkdir)), mkdir, Mkdir {
        path: Both => [text("/e")],
        mode: Both => [0o700],
        owner: Both => [Some(text("me"))],
        created: Both => [Some(0), Some(1)],
    });
    let mkfile = Mkfile { path: text("/f"), mode: 0o644, data: text("data") };
    table!(|mkfile| file(FileAction::Mkfile(mkfile)), mkfile.clone(), Mkfile {
        path: Both => [text("/g")],
        mode: Both => [0o600],
        data: Both => [String::new(), text("other")],
    });
    let actions = vec![FileAction::Copy(copy())];
    table!(Op::File, File { base: slot(0), actions }, File {
        base: Both => [None, slot(1)],
        actions: Both => [
            vec![FileAction::Copy(copy()), FileAction::Copy(copy())],
            vec![FileAction::Mkfile(mkfile.clone()), FileAction::Copy(copy())],
            vec![FileAction::Copy(copy()), FileAction::Mkfile(mkfile.clone())],
        ],
    });
}

#[test]
fn merge() {
    table!(Op::Merge, Merge { base: slot(0), layer: InputIndex(1) }, Merge {
        base: Both => [None, slot(2)],
        layer: Both => [InputIndex(2)],
    });
}

/// A directory, a web server's file and a checkout are known by what is read of them; their digests tell
/// vertices of one build apart.
#[test]
fn sources() {
    let (debian, sid) = ("debian".parse().expect("a name"), "debian:sid".parse().expect("a name"));
    let image = SourceImage { reference: debian, config: Digest::of(b"one"), rootfs: Digest::of(b"files") };
    table!(|image| Op::Source(Source::Image(image)), image, SourceImage {
        reference: Neither => [sid],
        config: Neither => [Digest::of(b"other")],
        rootfs: Both => [Digest::of(b"other")],
    });
    let local = Local { name: text("context"), ignore: texts(["*.o"]) };
    table!(|local| Op::Source(Source::Local(local)), local, Local {
        name: Both => [text("other")],
        ignore: Both => [Vec::new(), texts(["*.a"])],
    });
    let http = Http { url: text("https://host/f"), filename: text("f"), checksum: None, mode: 0o600 };
    table!(|http| Op::Source(Source::Http(http)), http, Http {
        url: Both => [text("https://host/g")],
        filename: Both => [text("g")],
        checksum: Both => [Some(Digest::of(b"f"))],
        mode: Both => [0o644],
    });
    let [_, commit] = all([GitMtime::Checkout, GitMtime::Commit], |mtime| match mtime {
        GitMtime::Checkout => 0,
        GitMtime::Commit => 1,
    });
    table!(|git| Op::Source(Source::Git(git)), git(), Git {
        remote: Both => [text("https://host/other.git")],
        reference: Both => [text("v1")],
        checksum: Both => [Some(text("0123abcd"))],
        subdir: Both => [text("sub")],
        keep_git_dir: Both => [true],
        submodules: Both => [false],
        mtime: Both => [commit],
        fetch_by_commit: Both => [true],
    });
}

/// Of an image count its layers and what says which machines run it: the rest is how to run it, and stands in the ops
/// that it matters to.
#[test]
fn files_of_images() {
    let source = |config: ImageConfig| {
        let reference = "debian".parse().expect("a name");
        let rootfs = SourceImage::rootfs(&config);
        Op::Source(Source::Image(SourceImage { reference, config: Digest::of(b"config"), rootfs }))
    };
    let rootfs = |layers: &[&str]| RootFs {
        kind: text("layers"),
        diff_ids: layers.iter().map(|layer| DiffId(Digest::of(layer.as_bytes()))).collect(),
    };
    let sample =
        || ImageConfig { rootfs: rootfs(&["a", "b"]), ..ImageConfig::empty(&platform("linux/arm/v7")) };
    table!(source, sample(), ImageConfig {
        architecture: Both => [text("arm64")],
        variant: Both => [None, Some(text("v6"))],
        os: Both => [text("windows")],
        rootfs: Both => [rootfs(&[]), rootfs(&["a"]), rootfs(&["b", "a"]), rootfs(&["a", "b", "c"])],
        author: Neither => [Some(text("me"))],
        created: Neither => [Some(text("2021-01-01T00:00:00Z"))],
        config: Neither => [RunConfig { user: text("me"), ..RunConfig::default() }],
        history: Neither => [vec![History::default()]],
        extra: Neither => [
            Extra::from([(text("docker_version"), "1".into())]),
            // What is not said, in other words.
            Extra::from([(text("os.version"), "".into())]),
            Extra::from([(text("os.features"), Vec::<String>::new().into())]),
        ],
    });
    let row = |name: &str, value: &str| {
        let extra = Extra::from([(text(name), value.into())]);
        let changed = source(ImageConfig { extra, ..sample() });
        Row { field: format!("{name} {value}"), key: Both, changed }
    };
    let rows = [row("os.version", "10.0.1"), row("os.version", "10.0.2"), row("os.features", "10.0.1")];
    check(&source(sample()), &rows);
}

/// Ops, sources, actions and mounts that have nothing but their kind in common.
#[test]
fn kinds() {
    let sources = all(
        [
            Source::Image(SourceImage {
                reference: "debian".parse().expect("a name"),
                config: Digest::of(b"one"),
                rootfs: Digest::of(b"files"),
            }),
            Source::Local(Local { name: text("context"), ignore: Vec::new() }),
            Source::Http(Http {
                url: text("https://host/f"),
                filename: text("f"),
                checksum: None,
                mode: 0o600,
            }),
            Source::Git(git()),
        ],
        |source| match source {
            Source::Image(_) => 0,
            Source::Local(_) => 1,
            Source::Http(_) => 2,
            Source::Git(_) => 3,
        },
    );
    let actions = all(
        [
            FileAction::Copy(copy()),
            FileAction::Mkdir(Mkdir { path: text("/d"), mode: 0o755, owner: None, created: None }),
            FileAction::Mkfile(Mkfile { path: text("/d"), mode: 0o755, data: String::new() }),
        ],
        |action| match action {
            FileAction::Copy(_) => 0,
            FileAction::Mkdir(_) => 1,
            FileAction::Mkfile(_) => 2,
        },
    );
    let [image, others @ ..] = sources;
    let ops = all(
        [
            Op::Exec(exec()),
            Op::File(File { base: slot(0), actions: actions[..1].to_vec() }),
            Op::Merge(Merge { base: slot(0), layer: InputIndex(1) }),
            Op::Source(image),
        ],
        |op| match op {
            Op::Exec(_) => 0,
            Op::File(_) => 1,
            Op::Merge(_) => 2,
            Op::Source(_) => 3,
        },
    );
    let mut every: Vec<Op> = ops.into();
    every.extend(others.map(Op::Source));
    every.extend(actions.map(file).into_iter().skip(1));
    every.extend(mount_kinds().map(with_mount).into_iter().skip(1));
    for (at, op) in every.iter().enumerate() {
        let reads = match op {
            Op::Exec(exec) => exec.mounts.iter().any(|mount| match &mount.kind {
                MountKind::Bind(_) | MountKind::Cache(_) => true,
                MountKind::Tmpfs { .. } | MountKind::Secret(_) | MountKind::Ssh(_) => false,
            }),
            Op::File(file) => matches!(file.actions[0], FileAction::Copy(_)),
            Op::Merge(_) | Op::Source(_) => false,
        };
        assert_eq!(op.digest_by_content().is_some(), reads, "what reads has a key by content: {op:?}");
        for other in &every[..at] {
            assert_ne!(op.digest(), other.digest(), "{op:?}");
        }
    }
}
