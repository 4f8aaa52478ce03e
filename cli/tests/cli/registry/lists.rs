//! `kiln manifest`: lists of images for several platforms.

use serde_json::Value;

use super::server::{Bench, Registry, digest_in, needs_programs};
use crate::harness::{Context, needs_root};

#[test]
fn repositories_of_a_registry_are_found_by_name() {
    needs_root!();
    needs_programs!("docker-registry");
    let (registry, bench) = (Registry::open(), Bench::empty());
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    for name in ["team/app", "team/other", "app-two"] {
        bench.build(&context, &["--push", "-t", &registry.name(name)]).expect(0);
    }
    let host = registry.host();
    let found = bench.ok(&["search", "-q", &format!("{host}/app")]);
    assert_eq!(found, format!("{host}/app-two\n{host}/team/app\n"));
    let table = bench.ok(&["search", "--limit", "1", &format!("{host}/app")]);
    assert_eq!(table.lines().count(), 2, "{table}");
    drop(registry);
    bench.kiln(&["search", &format!("{host}/app")]).expect(5).says(&["Connection refused"]);
}

#[test]
fn a_list_is_made_changed_and_pushed_as_an_index() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (registry, other, bench) = (Registry::open(), Registry::open(), Bench::empty());
    let mut images = Vec::new();
    for (nth, at) in
        [(1, registry.name("app:one")), (2, registry.name("parts/two:v1")), (3, other.name("three:v1"))]
    {
        let context =
            Context::new(&[("Dockerfile", "FROM scratch\nCOPY file /\n"), ("file", &format!("{nth}"))]);
        bench.build(&context, &["--push", "-t", &at]).expect(0);
        images.push(at);
    }
    let list = registry.name("app:all");
    bench.kiln(&["manifest", "inspect", &list]).expect(5).says(&["does not have"]);
    bench.ok(&["manifest", "create", &list, &images[0], &images[1]]);
    bench.kiln(&["manifest", "create", &list, &images[0]]).expect(2).says(&["--amend"]);
    bench.ok(&["manifest", "create", "--amend", &list, &images[2]]);
    for (image, arch, variant) in [(&images[1], "arm64", "v8"), (&images[2], "riscv64", "")] {
        let mut args = vec!["manifest", "annotate", "--arch", arch, "--annotation", "of=test", &list, image];
        if !variant.is_empty() {
            args.splice(2..2, ["--variant", variant]);
        }
        bench.ok(&args);
    }
    bench.ok(&["manifest", "annotate", "--annotation", "whole=list", &list]);
    bench.kiln(&["manifest", "annotate", "--arch", "x", &list]).expect(2).says(&["name the image"]);
    bench.kiln(&["manifest", "annotate", "--arch", "x", &list, "absent"]).expect(2).says(&["has 0 entries"]);

    let shown: Value = serde_json::from_str(&bench.ok(&["manifest", "inspect", &list])).unwrap();
    let pushed = bench.ok(&["manifest", "push", "--purge", &list]);
    assert!(pushed.contains("2 mounted"), "{pushed}");
    assert_eq!(registry.digest("app:all"), digest_in(&pushed));
    let raw = registry.skopeo(&["inspect", "--raw", &format!("docker://{list}")]);
    let index: Value = serde_json::from_str(&raw).unwrap();
    assert_eq!(index, shown);
    let platforms: Vec<&str> = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["platform"]["architecture"].as_str().unwrap())
        .collect();
    let host = kiln_oci::Platform::host().architecture;
    assert_eq!(platforms, [host.as_str(), "arm64", "riscv64"]);
    assert_eq!(
        (&index["annotations"]["whole"], &index["manifests"][1]["annotations"]["of"]),
        (&"list".into(), &"test".into())
    );
    // What it lists is in its repository now, and pulled for this platform.
    let fresh = Bench::empty();
    fresh.ok(&["pull", &list]);
    assert_eq!(fresh.id(&list), bench.id(&images[0]));
    bench.kiln(&["manifest", "rm", &list]).expect(4).says(&["there is no list"]);
    // From the registry, now that there is none here; and as the beginning of another one.
    assert_eq!(serde_json::from_str::<Value>(&bench.ok(&["manifest", "inspect", &list])).unwrap(), index);
    let copy = other.name("copy:all");
    bench.ok(&["manifest", "create", &copy, &list]);
    bench.ok(&["manifest", "push", &copy]);
    assert_eq!(
        bench.ok(&[
            "copy",
            "-q",
            "--all",
            &format!("docker://{list}"),
            &format!("docker://{}", other.name("whole:v1"))
        ]),
        format!("{}\n", digest_in(&pushed))
    );
    bench.ok(&["manifest", "rm", &copy]);
    bench.store.sound().unwrap();
}
