//! Trees that a step mounts, and where.

use super::*;

#[test]
fn a_stage_is_shown_read_only_from_its_source_on() {
    let Some(mut bench) = Bench::new() else { return };
    let stage = bench.tree(&[("/src/a", "content"), ("/src/sub/b", "")]);
    let target = bench.mounting(
        &[stage],
        vec![bind(Some(0), "src", "/mnt", false), bind(Some(0), "src/a", "/file", false)],
    );
    let solved = bench.solve(target, |inside| {
        assert_eq!(inside.read("/mnt", "a").unwrap(), "content");
        assert_eq!(inside.read("/file", "").unwrap(), "content");
        assert!(inside.read_only("/mnt") && inside.read_only("/file"));
    });
    solved.ok();
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn writes_to_a_writable_mount_are_thrown_away() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("dir/a", "context");
    let (stage, local) = (bench.tree(&[("/a", "stage")]), bench.local());
    let target = bench.mounting(
        &[stage, local],
        vec![
            bind(Some(0), "", "/stage", true),
            bind(Some(1), "dir", "/context", true),
            bind(None, "", "/none", true),
        ],
    );
    let id = bench
        .solve(target, |inside| {
            for (target, content) in
                [("/stage", Some("stage")), ("/context", Some("context")), ("/none", None)]
            {
                assert!(!inside.read_only(target));
                assert_eq!(inside.read(target, "a").as_deref(), content);
                fs::write(inside.at(target, "a"), "changed").unwrap();
                assert_eq!(inside.read(target, "a").unwrap(), "changed");
            }
        })
        .ok();
    assert_eq!(bench.layer(&id), [""; 0]);
    assert_eq!(fs::read_to_string(bench.temp.path().join("context/dir/a")).unwrap(), "context");
    let again = bench.mounting(&[stage], vec![bind(Some(0), "", "/again", false)]);
    bench.solve(again, |inside| assert_eq!(inside.read("/again", "a").unwrap(), "stage")).ok();
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_context_shows_what_is_not_ignored_as_roots_files() {
    let Some(mut bench) = Bench::new() else { return };
    bench.ignore =
        Patterns::from_lines(&["*.log".to_owned(), "out".to_owned(), "!out/keep".to_owned()]).unwrap();
    for path in ["main.go", "debug.log", "out/drop", "out/keep", "sub/x"] {
        bench.write(path, path);
    }
    rustix::fs::chown(bench.write("owned", ""), Some(rustix::fs::Uid::from_raw(1000)), None).unwrap();
    fs::set_permissions(bench.write("script", ""), fs::Permissions::from_mode(0o755)).unwrap();
    let _socket = UnixListener::bind(bench.temp.path().join("context/socket")).unwrap();
    symlink("/etc/passwd", bench.temp.path().join("context/link")).unwrap();
    let local = bench.local();
    let target =
        bench.mounting(&[local], vec![bind(Some(0), "", "/src", false), bind(Some(0), "sub/x", "/x", false)]);
    let solved = bench.solve(target, |inside| {
        for (path, there) in [
            ("main.go", true),
            ("debug.log", false),
            ("out/drop", false),
            ("out/keep", true),
            ("socket", false),
        ] {
            assert_eq!(inside.at("/src", path).exists(), there, "{path}");
        }
        assert_eq!(inside.read("/x", "").unwrap(), "sub/x");
        assert_eq!(fs::metadata(inside.at("/src", "owned")).unwrap().uid(), 0);
        assert_eq!(fs::metadata(inside.at("/src", "script")).unwrap().mode() & 0o7777, 0o755);
        assert!(fs::symlink_metadata(inside.at("/src", "link")).unwrap().is_symlink());
    });
    solved.ok();
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_context_is_copied_once_for_all_steps_of_a_build() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("a", "first");
    let local = bench.local();
    let mount = || vec![bind(Some(0), "", "/src", false)];
    let one = bench.mounting(&[local], mount());
    let two = bench.step(Some(one), &[local], |exec| {
        exec.mounts = vec![bind(Some(1), "", "/src", false)];
    });
    let places: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let seen = places.clone();
    let solved = bench.solve(two, move |inside| {
        let stat = fs::metadata(inside.at("/src", "a")).unwrap();
        seen.lock().unwrap().push((stat.dev(), stat.ino()));
    });
    assert_eq!(solved.ran, 2);
    solved.ok();
    let places = places.lock().unwrap();
    assert_eq!(places[0], places[1]);
}

#[test]
fn a_step_runs_again_when_what_it_mounts_changed_and_only_then() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("src/a", "first");
    let local = bench.local();
    let target = bench.mounting(&[local], vec![bind(Some(0), "src", "/src", false)]);
    assert_eq!(bench.solve(target, |_| {}).ran, 1);
    assert_eq!(bench.solve(target, |_| {}).ran, 0);
    bench.write("beside", "no part of it");
    assert_eq!(bench.solve(target, |_| {}).ran, 0);
    bench.write("src/a", "second");
    assert_eq!(bench.solve(target, |_| {}).ran, 1);
}

#[test]
fn a_stage_that_changed_where_nothing_is_mounted_from_changes_no_step() {
    let Some(mut bench) = Bench::new() else { return };
    let mut ran = |beside: &str| {
        bench.definition = llb::Definition::default();
        let stage = bench.tree(&[("/src/a", "same"), ("/beside", beside)]);
        let target = bench.mounting(&[stage], vec![bind(Some(0), "src", "/src", false)]);
        bench.solve(target, |_| {}).ran
    };
    assert_eq!([ran("first"), ran("second")], [1, 0]);
}

#[test]
fn a_base_that_is_mounted_too_counts_by_its_key() {
    let exec = |mounts| llb::Exec {
        base: Some(InputIndex(0)),
        args: Vec::new(),
        env: Vec::new(),
        unkeyed_env: Vec::new(),
        extra_hosts: Vec::new(),
        cwd: "/".to_owned(),
        user: None,
        hostname: String::new(),
        network: llb::Network::None,
        security: llb::Security::Sandbox,
        mounts,
        cache_ttl: None,
        foreign: None,
        secret_env: Vec::new(),
    };
    let seeded = cache("c", "/c", |cache| cache.from = Some(InputIndex(2)));
    let exec = exec(vec![bind(Some(0), "", "/a", false), bind(Some(1), "", "/b", false), seeded]);
    let uses = [0, 1, 2].map(|position| input_use(&exec, position));
    assert_eq!(uses, [InputUse::Definition, InputUse::Content, InputUse::Content]);
}

#[test]
fn a_missing_source_is_told_as_copy_tells_it() {
    let Some(mut bench) = Bench::new() else { return };
    bench.ignore = Patterns::from_lines(&["*.log".to_owned()]).unwrap();
    bench.write("main.go", "");
    bench.write("a.log", "");
    let (stage, local) = (bench.tree(&[("/source", "")]), bench.local());
    let mut missing = |input: VertexId, source: &str| {
        let target = bench.mounting(&[input], vec![bind(Some(0), source, "/mnt", false)]);
        match bench.solve(target, |_| panic!("it must not run")).error() {
            OpError::NoSource { path, ignored_by, similar, .. } => {
                (path, ignored_by.map(|rule| rule.line), similar)
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(missing(local, "mian.go"), ("mian.go".to_owned(), None, Some("main.go".to_owned())));
    assert_eq!(missing(local, "a.log").1, Some(1));
    assert_eq!(missing(stage, "sorce"), ("sorce".to_owned(), None, Some("source".to_owned())));
    let target = bench.mounting(&[], vec![bind(None, "x", "/mnt", false)]);
    assert!(matches!(bench.solve(target, |_| {}).error(), OpError::NoSource { .. }));
}

#[test]
fn a_source_is_a_plain_path_even_if_it_looks_like_a_pattern() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("a[1]/x", "bracket");
    bench.write("a1/x", "plain");
    bench.write("*/x", "star");
    bench.write("back\\[slash/x", "backslash");
    let local = bench.local();
    for (source, content) in [("a[1]", "bracket"), ("*", "star"), ("back\\[slash", "backslash")] {
        let target = bench.mounting(&[local], vec![bind(Some(0), source, "/mnt", false)]);
        bench.solve(target, move |inside| assert_eq!(inside.read("/mnt", "x").unwrap(), content)).ok();
    }
    let target = bench.mounting(&[local], vec![bind(Some(0), "b?", "/mnt", false)]);
    let error = bench.solve(target, |_| {}).error();
    assert!(matches!(&error, OpError::NoSource { path, .. } if path == "b?"), "{error:?}");
}

#[test]
fn a_source_that_leads_out_of_its_tree_leads_to_its_root() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("etc/passwd", "inside");
    symlink("/etc", bench.temp.path().join("context/link")).unwrap();
    symlink("../../../../../../etc/passwd", bench.temp.path().join("context/up")).unwrap();
    let local = bench.local();
    let target =
        bench.mounting(&[local], vec![bind(Some(0), "link", "/a", false), bind(Some(0), "up", "/b", false)]);
    let solved = bench.solve(target, |inside| {
        assert_eq!(inside.read("/a", "passwd").unwrap(), "inside");
        assert_eq!(inside.read("/b", "").unwrap(), "inside");
    });
    solved.ok();
}

#[test]
fn targets_stand_below_the_tree_and_leave_the_layer_alone() {
    let Some(mut bench) = Bench::new() else { return };
    bench.request.secrets = secrets(&bench, "hunter2hunter2");
    let base = bench.tree(&[("/run/x", "")]);
    let target = bench.step(Some(base), &[], |exec| {
        exec.mounts = vec![
            secret("token", "/run/secrets/token", true),
            cache("c", "/root/.cache/deep", |_| {}),
            secret("missing", "/run/secrets/missing", false),
        ];
    });
    let id = bench
        .solve(target, |inside| {
            assert!(inside.root("run/secrets/token").is_file() && inside.root("root/.cache/deep").is_dir());
            assert!(!inside.root("run/secrets/missing").exists());
            assert_eq!(fs::metadata(inside.root("run/secrets/token")).unwrap().len(), 0);
            fs::write(inside.root("made"), "").unwrap();
        })
        .ok();
    assert_eq!(bench.layer(&id), ["made"]);
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn parents_are_mounted_before_what_is_below_them() {
    let Some(mut bench) = Bench::new() else { return };
    let target = bench.mounting(
        &[],
        vec![cache("b", "/a/b/c", |_| {}), cache("a", "/a", |_| {}), cache("c", "/z", |_| {})],
    );
    let solved = bench.solve(target, |inside| {
        let order: Vec<&str> = inside.spec.mounts.iter().map(Mount::target).collect();
        assert_eq!(order, ["/a", "/z", "/a/b/c"]);
    });
    solved.ok();
}

#[test]
fn a_mount_over_the_sandbox_is_refused_before_anything_runs() {
    let Some(mut bench) = Bench::new() else { return };
    for at in ["/", "/proc", "/sys/fs", "/dev", "/dev/null"] {
        let target = bench.mounting(&[], vec![cache("c", at, |_| {})]);
        let error = bench.solve(target, |_| panic!("it must not run")).error();
        assert!(
            matches!(&error, OpError::Exec(ExecError::Refused { target, .. }) if target == at),
            "{error:?}"
        );
    }
}
