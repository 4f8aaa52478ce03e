//! Extra certificates: what a step sees of them, and that nothing of them is left.

use kiln_executor::Authorities;

use super::*;

const IMAGE: &str = "-----BEGIN CERTIFICATE-----\nSW1hZ2U=\n-----END CERTIFICATE-----\n";
const EXTRA: &str = "-----BEGIN CERTIFICATE-----\nRXh0cmE=\n-----END CERTIFICATE-----\n";
const BUNDLE: &str = "etc/ssl/certs/ca-certificates.crt";

fn authorities(bench: &Bench) -> Authorities {
    let path = bench.temp.path().join("extra.pem");
    fs::write(&path, EXTRA).unwrap();
    let mut authorities = Authorities::default();
    authorities.add(&path).unwrap();
    authorities
}

/// A bench with an image that has certificates, and links to them where others look.
fn bench() -> Option<(Bench, VertexId)> {
    let mut bench = Bench::new()?;
    let plain = bench.tree(&[("/etc/ssl/certs/ca-certificates.crt", IMAGE), ("/etc/motd", "hello")]);
    let base = bench.step(Some(plain), &[], |exec| exec.args = vec!["links".to_owned()]);
    bench
        .solve(base, |inside| {
            symlink("certs/ca-certificates.crt", inside.root("etc/ssl/cert.pem")).unwrap();
            fs::create_dir_all(inside.root("etc/pki/tls/certs")).unwrap();
            symlink("/etc/ssl/cert.pem", inside.root("etc/pki/tls/certs/ca-bundle.crt")).unwrap();
            let certs = File::open(inside.root("etc/ssl/certs")).unwrap();
            std::os::unix::fs::fchown(&certs, Some(7), Some(8)).unwrap();
            certs.set_permissions(fs::Permissions::from_mode(0o711)).unwrap();
        })
        .ok();
    Some((bench, base))
}

/// Everything in a layer, and of what was there before whether its time is still the same.
fn listing(bench: &Bench, base: &SnapshotId, id: &SnapshotId) -> Vec<String> {
    let (changes, view) =
        (bench.engine.snapshots.open_changes(id).unwrap(), bench.engine.snapshots.open_view(base).unwrap());
    let (root, before) = (changes.dir.as_raw_fd(), view.as_raw_fd());
    let mut found = Vec::new();
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(format!("/proc/self/fd/{root}/{}", dir.display())).unwrap() {
            let entry = entry.unwrap();
            let path = dir.join(entry.file_name());
            let stat = entry.path().symlink_metadata().unwrap();
            let old = fs::symlink_metadata(format!("/proc/self/fd/{before}/{}", path.display()));
            let kept =
                old.is_ok_and(|old| (old.mtime(), old.mtime_nsec()) == (stat.mtime(), stat.mtime_nsec()));
            let content =
                if stat.is_file() { fs::read_to_string(entry.path()).unwrap() } else { String::new() };
            found.push(format!(
                "{} {:o} {}:{} {kept} {content}",
                path.display(),
                stat.mode(),
                stat.uid(),
                stat.gid()
            ));
            if stat.is_dir() {
                dirs.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Runs a step without the certificates and with them: what they leave is the same, and told.
#[track_caller]
fn check(script: impl Fn(&Inside<'_, '_>) + Send + Sync + Clone + 'static) -> Vec<String> {
    let Some((mut bench, base)) = bench() else { return Vec::new() };
    let before = bench.solve(base, |_| {}).ok();
    let [without, with] = ["without", "with"].map(|name| {
        if name == "with" {
            bench.request.authorities = authorities(&bench);
        }
        let step = bench.step(Some(base), &[], |exec| exec.hostname = name.to_owned());
        let solved = bench.solve(step, script.clone());
        assert_eq!(solved.ran, 1, "the base is there");
        listing(&bench, &before, &solved.ok())
    });
    assert_eq!(with, without);
    assert!(with.iter().all(|line| !line.contains("RXh0cmE=") && !line.contains("kiln")), "{with:#?}");
    assert_eq!(bench.leftovers(), [""; 0]);
    with
}

fn append(path: PathBuf, text: &str) {
    std::io::Write::write_all(&mut File::options().append(true).open(path).unwrap(), text.as_bytes())
        .unwrap();
}

#[test]
fn a_step_sees_the_images_certificates_and_the_extra_ones() {
    let Some((mut bench, base)) = bench() else { return };
    bench.request.authorities = authorities(&bench);
    let step = bench.step(Some(base), &[], |exec| {
        exec.env = vec![("PIP_CERT".to_owned(), "/mine".to_owned())];
    });
    let solved = bench.solve(step, |inside| {
        for path in [BUNDLE, "etc/ssl/cert.pem"] {
            let text = fs::read_to_string(inside.root(path)).unwrap();
            assert!(text.starts_with(IMAGE) && text.contains(EXTRA), "{path}: {text}");
        }
        let certs = fs::metadata(inside.root("etc/ssl/certs")).unwrap();
        assert_eq!((certs.mode() & 0o7777, certs.uid(), certs.gid()), (0o711, 7, 8));
        assert_eq!(fs::read_to_string(inside.root("etc/motd")).unwrap(), "hello");
        let file = inside.env("SSL_CERT_FILE").unwrap();
        assert_eq!(inside.env("NODE_EXTRA_CA_CERTS"), Some(file));
        assert_eq!(inside.env("PIP_CERT"), Some("/mine"));
        let Mount::File(mount) = inside.mount(file) else { panic!("no file") };
        let mut text = String::new();
        let content = inside.handles.inputs[mount.input].try_clone().unwrap();
        File::from(content).read_to_string(&mut text).unwrap();
        assert!(text.starts_with(IMAGE) && text.matches("RXh0cmE=").count() == 1, "{text}");
    });
    let before = bench.solve(base, |_| {}).ok();
    assert_eq!(listing(&bench, &before, &solved.ok()), [""; 0]);
    // They are no part of the key.
    bench.request.authorities = Authorities::default();
    assert_eq!(bench.solve(step, |_| {}).ran, 0);
}

#[test]
fn a_list_that_is_written_anew_is_what_was_written() {
    let left = check(|inside| {
        let new = inside.root("etc/ssl/certs/ca-certificates.crt.new");
        fs::write(&new, "made anew\n").unwrap();
        fs::rename(new, inside.root(BUNDLE)).unwrap();
    });
    assert!(
        left.is_empty() || left.iter().any(|line| line.starts_with(BUNDLE) && line.ends_with("made anew\n"))
    );
}

#[test]
fn what_a_step_changes_of_the_list_is_changed_and_nothing_else() {
    check(|inside| append(inside.root(BUNDLE), "more\n"));
    check(|inside| fs::set_permissions(inside.root(BUNDLE), fs::Permissions::from_mode(0o400)).unwrap());
    check(|inside| fs::write(inside.root(BUNDLE), "").unwrap());
    check(|inside| fs::remove_file(inside.root(BUNDLE)).unwrap());
    check(|inside| fs::write(inside.root("etc/ssl/certs/other.pem"), "x").unwrap());
    check(|inside| fs::rename(inside.root(BUNDLE), inside.root("etc/ssl/moved")).unwrap());
}

#[test]
fn what_was_touched_and_not_changed_is_not_in_the_layer() {
    let left = check(|inside| {
        let file = File::open(inside.root(BUNDLE)).unwrap();
        std::os::unix::fs::fchown(file, Some(0), Some(0)).unwrap();
    });
    assert!(left.iter().all(|line| !line.starts_with(BUNDLE)), "{left:#?}");
}

#[test]
fn copies_lose_what_was_not_the_images() {
    let left = check(|inside| {
        fs::create_dir_all(inside.root("app/deep")).unwrap();
        fs::copy(inside.root(BUNDLE), inside.root("app/deep/ca.pem")).unwrap();
        let text = fs::read_to_string(inside.root(BUNDLE)).unwrap();
        fs::write(inside.root("app/both"), format!("{text}between\n{text}")).unwrap();
        fs::set_permissions(inside.root("app/both"), fs::Permissions::from_mode(0o400)).unwrap();
    });
    assert!(left.is_empty() || left.iter().any(|line| line.ends_with(&format!("{IMAGE}between\n{IMAGE}"))));
}

#[test]
fn an_image_without_certificates_gets_a_file_and_no_more() {
    let Some(mut bench) = Bench::new() else { return };
    bench.request.authorities = authorities(&bench);
    let base = bench.tree(&[("/etc/motd", "hello")]);
    for base in [Some(base), None] {
        let step = bench.step(base, &[], |_| {});
        let solved = bench.solve(step, |inside| {
            assert!(inside.env("SSL_CERT_FILE").is_some() && inside.env("REQUESTS_CA_BUNDLE").is_none());
            assert!(!inside.root(BUNDLE).exists() && !inside.root("etc/ssl").exists());
        });
        let id = solved.ok();
        assert_eq!(bench.layer(&id), [""; 0]);
    }
}

#[test]
fn what_is_no_text_is_let_be() {
    let Some((mut bench, base)) = bench() else { return };
    bench.request.authorities = authorities(&bench);
    let step = bench.step(Some(base), &[], |_| {});
    let id = bench
        .solve(step, |inside| {
            let text = fs::read(inside.root(BUNDLE)).unwrap();
            fs::write(inside.root("archive"), [b"ustar\0", &text[..], b"\0"].concat()).unwrap();
        })
        .ok();
    let changes = bench.engine.snapshots.open_changes(&id).unwrap();
    let archive = fs::read(format!("/proc/self/fd/{}/archive", changes.dir.as_raw_fd())).unwrap();
    assert!(archive.len() > IMAGE.len() + EXTRA.len());
}

#[test]
fn a_hostile_list_is_passed_over() {
    let Some(mut bench) = Bench::new() else { return };
    bench.request.authorities = authorities(&bench);
    let plain = bench.tree(&[("/etc/ssl/certs/x", "x")]);
    let base = bench.step(Some(plain), &[], |exec| exec.hostname = "hostile".to_owned());
    bench
        .solve(base, |inside| {
            symlink("../../../../../../../etc/passwd", inside.root(BUNDLE)).unwrap();
            symlink("cert.pem", inside.root("etc/ssl/cert.pem")).unwrap();
            fs::create_dir_all(inside.root("etc/ssl/ca-bundle.pem")).unwrap();
        })
        .ok();
    let step = bench.step(Some(base), &[], |_| {});
    bench.solve(step, |inside| assert!(!inside.root("etc/passwd").exists())).ok();
}
