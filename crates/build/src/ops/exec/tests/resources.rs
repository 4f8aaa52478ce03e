//! Caches, secrets, agents, the environment and rights of a step.

use super::*;

#[test]
fn a_cache_outlives_its_step_and_is_no_part_of_the_layer() {
    let Some(mut bench) = Bench::new() else { return };
    let one = bench.mounting(&[], vec![cache("go", "/cache", |_| {})]);
    let two = bench.mounting(&[], vec![cache("go", "/elsewhere", |cache| cache.read_only = true)]);
    let id = bench.solve(one, |inside| fs::write(inside.at("/cache", "x"), "kept").unwrap()).ok();
    assert_eq!(bench.layer(&id), [""; 0]);
    let solved = bench.solve(two, |inside| {
        assert_eq!(inside.read("/elsewhere", "x").unwrap(), "kept");
        assert!(inside.read_only("/elsewhere"));
    });
    assert_eq!(solved.ran, 1);
    solved.ok();
    // Another cache is the same step: what a cache holds is no part of a result.
    let other = bench.mounting(&[], vec![cache("other", "/cache", |_| {})]);
    assert_eq!(bench.solve(other, |_| {}).ran, 0);
    bench.request.no_cache.all = true;
    bench.solve(two, |inside| assert_eq!(inside.read("/elsewhere", "x"), None)).ok();
}

#[test]
fn a_cache_starts_from_its_seed() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write("file", "");
    let (stage, local) = (bench.tree(&[("/seed/sub/x", "planted"), ("/other", "")]), bench.local());
    let seeded = |input: usize, source: &str| {
        let source = source.to_owned();
        vec![cache("go", "/cache", |cache| (cache.from, cache.source) = (Some(InputIndex(input)), source))]
    };
    let target = bench.mounting(&[stage], seeded(0, "seed"));
    let check = |inside: &Inside<'_, '_>| {
        assert_eq!(inside.read("/cache", "sub/x").unwrap(), "planted");
        assert!(!inside.at("/cache", "other").exists());
    };
    bench.solve(target, check).ok();
    let missing = bench.mounting(&[stage], seeded(0, "sead"));
    assert!(matches!(bench.solve(missing, |_| {}).error(), OpError::NoSource { .. }));
    bench.write("dir/x", "from the context");
    let context = bench.mounting(&[local], seeded(0, "dir"));
    bench.solve(context, |inside| assert_eq!(inside.read("/cache", "x").unwrap(), "from the context")).ok();
    let file = bench.mounting(&[local], seeded(0, "file"));
    assert!(matches!(bench.solve(file, |_| {}).error(), OpError::Read { .. }));
}

#[test]
fn secrets_reach_the_step_and_no_log_no_layer_and_no_key() {
    let Some(mut bench) = Bench::new() else { return };
    bench.request.secrets = secrets(&bench, "hunter2hunter2\n");
    let target = bench.step(None, &[], |exec| {
        exec.mounts = vec![secret("token", "/run/secrets/token", true)];
        let (name, id) = ("TOKEN".to_owned(), "token".to_owned());
        exec.secret_env = vec![llb::SecretEnv { name, id, required: true }];
        exec.env = vec![("TOKEN".to_owned(), "of the image".to_owned())];
    });
    let solved = bench.solve(target, |inside| {
        let Mount::File(file) = inside.mount("/run/secrets/token") else { panic!("no file") };
        assert_eq!((file.mode, file.uid, file.gid), (0o440, 1, 2));
        let mut content = File::from(inside.handles.inputs[file.input].try_clone().unwrap());
        content.rewind().unwrap();
        let mut text = String::new();
        content.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hunter2hunter2\n");
        assert_eq!(inside.env("TOKEN"), Some("hunter2hunter2\n"));
        for chunk in ["token is hun", "ter2hunt", "er2, says the step\nhunter2"] {
            inside.print(chunk.as_bytes());
        }
    });
    assert_eq!(solved.log, "token is ***, says the step\nhunter2");
    let id = solved.ok();
    assert_eq!(bench.layer(&id), [""; 0]);
    // Another value is the same step.
    bench.request.secrets = secrets(&bench, "another value");
    assert_eq!(bench.solve(target, |_| {}).ran, 0);
}

#[test]
fn a_required_secret_that_is_missing_stops_the_step() {
    let Some(mut bench) = Bench::new() else { return };
    let file = bench.mounting(&[], vec![secret("token", "/run/secrets/token", true)]);
    let env = bench.step(None, &[], |exec| {
        let (name, id) = ("TOKEN".to_owned(), "token".to_owned());
        exec.secret_env = vec![llb::SecretEnv { name, id, required: true }];
    });
    for target in [file, env] {
        let error = bench.solve(target, |_| panic!("it must not run")).error();
        assert!(matches!(&error, OpError::NoSecret { id } if id == "token"), "{error:?}");
    }
    let optional = bench.step(None, &[], |exec| {
        let (name, id) = ("TOKEN".to_owned(), "token".to_owned());
        exec.secret_env = vec![llb::SecretEnv { name, id, required: false }];
        exec.mounts = vec![secret("token", "/run/secrets/token", false)];
    });
    let solved = bench.solve(optional, |inside| {
        assert_eq!((inside.env("TOKEN"), inside.spec.mounts.len()), (None, 0));
    });
    solved.ok();
}

#[test]
fn a_step_gets_a_socket_that_leads_to_the_agent() {
    let Some(mut bench) = Bench::new() else { return };
    let path = bench.temp.path().join("agent");
    let _agent = UnixListener::bind(&path).unwrap();
    let spec = SshSpec::parse(&format!("default={}", path.display())).unwrap();
    bench.request.ssh = SshAgents::new([spec]).unwrap();
    let mount = |id: &str, required: bool| llb::Mount {
        target: "/run/buildkit/ssh_agent.0".to_owned(),
        kind: MountKind::Ssh(wanted(id, required)),
    };
    let target = bench.mounting(&[], vec![mount("default", true)]);
    let real = fs::metadata(&path).unwrap().ino();
    let solved = bench.solve(target, move |inside| {
        let stat = fs::metadata(inside.at("/run/buildkit/ssh_agent.0", "")).unwrap();
        assert!(stat.file_type().is_socket() && stat.ino() != real);
        assert_eq!((stat.mode() & 0o777, stat.uid(), stat.gid()), (0o440, 1, 2));
    });
    solved.ok();
    assert_eq!(bench.leftovers(), [""; 0]);
    let missing = bench.mounting(&[], vec![mount("other", true)]);
    assert!(matches!(bench.solve(missing, |_| {}).error(), OpError::NoAgent { .. }));
    let optional = bench.mounting(&[], vec![mount("other", false)]);
    bench.solve(optional, |inside| assert_eq!(inside.spec.mounts.len(), 0)).ok();
}

#[test]
fn the_environment_has_each_name_once_and_proxies_only_where_the_step_says_nothing() {
    let Some(mut bench) = Bench::new() else { return };
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let target = bench.step(None, &[], |exec| {
        exec.env = vec![pair("A", "1"), pair("HTTP_PROXY", "own"), pair("A", "2")];
        exec.unkeyed_env = vec![pair("HTTP_PROXY", "given"), pair("NO_PROXY", "given")];
        exec.hostname = "elsewhere".to_owned();
    });
    let solved = bench.solve(target, |inside| {
        let values = ["A", "HTTP_PROXY", "NO_PROXY"].map(|name| inside.env(name));
        assert_eq!(values, [Some("2"), Some("own"), Some("given")]);
        assert_eq!(inside.spec.hostname, "elsewhere");
    });
    solved.ok();
}

#[test]
fn what_was_not_allowed_does_not_run() {
    let Some(mut bench) = Bench::new() else { return };
    let host = bench.step(None, &[], |exec| exec.network = llb::Network::Host);
    let insecure = bench.step(None, &[], |exec| exec.security = llb::Security::Insecure);
    for (target, needed) in [(host, Entitlement::NetworkHost), (insecure, Entitlement::SecurityInsecure)] {
        let error = bench.solve(target, |_| panic!("it must not run")).error();
        assert!(matches!(error, OpError::NotAllowed { entitlement } if entitlement == needed), "{error:?}");
    }
    bench.request.allow.insert(Entitlement::SecurityInsecure);
    bench.solve(insecure, |inside| assert_eq!(inside.spec.security, Security::Insecure)).ok();
    assert!(bench.solve(host, |_| {}).result.is_err());
    bench.request.network = llb::Network::Host;
    bench.solve(host, |inside| assert_eq!(inside.spec.network, Network::Host)).ok();
}
