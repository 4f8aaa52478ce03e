//! Images for several platforms: built here, pushed, pulled and built on.

use serde_json::Value;

use super::server::{Bench, Registry, needs_programs};
use crate::harness::{Context, needs_root};

/// Two that are not this machine's.
fn others() -> [&'static str; 2] {
    if kiln_oci::Platform::host().architecture == "riscv64" {
        ["linux/s390x", "linux/ppc64le"]
    } else {
        ["linux/riscv64", "linux/s390x"]
    }
}

#[test]
fn an_index_is_pushed_and_each_platform_is_built_on() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (registry, maker, bench) = (Registry::open(), Bench::new(), Bench::empty());
    let host = kiln_oci::Platform::host().to_string();
    let [other, absent] = others();
    let both = format!("{host},{other}");
    let base = registry.name("base:v1");
    let context = Context::new(&[(
        "Dockerfile",
        "FROM --platform=$BUILDPLATFORM busybox AS make\nARG TARGETPLATFORM\nRUN echo $TARGETPLATFORM > /for\n\
         FROM scratch\nCOPY --from=make /for /\n",
    )]);
    let metadata = maker.at("metadata.json");
    let metadata_path = metadata.to_str().expect("UTF-8");
    let args = ["--platform", &both, "--push", "-t", &base, "--metadata-file", metadata_path];
    let pushed = maker.build(&context, &args).expect(0);
    let raw = registry.skopeo(&["inspect", "--raw", &format!("docker://{base}")]);
    let index: Value = serde_json::from_str(&raw).expect("JSON");
    let entries = index["manifests"].as_array().expect("a list");
    let platform = |entry: &Value| {
        let word = |name: &str| entry["platform"][name].as_str().expect("text").to_owned();
        format!("{}/{}", word("os"), word("architecture"))
    };
    assert_eq!(entries.iter().map(platform).collect::<Vec<_>>(), [host.as_str(), other]);
    let told: Value = serde_json::from_slice(&std::fs::read(&metadata).expect("written")).expect("JSON");
    assert_eq!(told["containerimage.digest"], registry.digest("base:v1").as_str());
    assert!(pushed.stdout.contains(&registry.digest("base:v1")), "{}", pushed.stdout);
    // skopeo finds each of them whole.
    for architecture in
        [&host, other].map(|platform| platform.rsplit('/').next().expect("two words").to_owned())
    {
        let dir = maker.at(&format!("copy-{architecture}"));
        let to = format!("dir:{}", dir.display());
        registry.skopeo(&["copy", "--override-arch", &architecture, &format!("docker://{base}"), &to]);
    }
    // A second push sends nothing.
    let again = maker.build(&context, &args).expect(0);
    assert!(again.ran().is_empty() && again.stdout.contains("nothing to send"), "{}", again.stdout);

    // Built on: the name stays this machine's, whatever a build needs.
    let on_base = Context::new(&[("Dockerfile", &format!("FROM {base}\nCOPY Dockerfile /\n"))]);
    let out = bench.at("out");
    let files = |bench: &Bench, args: &[&str]| {
        let args = [args, &["-o", out.to_str().expect("UTF-8")]].concat();
        bench.build(&on_base, &args).expect(0);
    };
    let read = |path: &str| std::fs::read_to_string(out.join(path)).expect("written");
    files(&bench, &["--platform", other]);
    assert_eq!(read("for"), format!("{other}\n"));
    assert_eq!(bench.ok(&["images", &base]).lines().count(), 1, "no name");
    bench.ok(&["pull", &base]);
    let id = bench.id(&base);
    files(&bench, &["--platform", &format!("{other},{host}")]);
    for platform in [other, &host] {
        assert_eq!(read(&format!("{}/for", platform.replace('/', "_"))), format!("{platform}\n"));
    }
    files(&bench, &["--platform", other, "--pull"]);
    assert_eq!(bench.id(&base), id);
    // One that nobody has.
    let refused = bench.build(&on_base, &["--platform", absent]).expect(5);
    refused.says(&["Dockerfile:1", &host, absent, "holds no image for"]);
    let offline = Bench::empty();
    offline.ok(&["pull", "--platform", other, &base]);
    offline.build(&on_base, &["--offline"]).expect(4).says(&["Dockerfile:1", other, &host]);
    // With nobody to ask, what was pulled is good.
    drop(registry);
    files(&bench, &["--platform", &format!("{other},{host}")]);
    bench.store.sound().unwrap();
    maker.store.sound().unwrap();
}

#[test]
fn an_image_for_one_platform_is_not_taken_for_another() {
    needs_root!();
    needs_programs!("docker-registry");
    let (registry, maker, bench) = (Registry::open(), Bench::empty(), Bench::empty());
    let [one, other] = others();
    let base = registry.name("one:v1");
    let made = Context::new(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    maker.build(&made, &["--platform", one, "--push", "-t", &base]).expect(0);
    let on_base = Context::new(&[("Dockerfile", &format!("FROM {base}\nCOPY Dockerfile /more\n"))]);
    bench.build(&on_base, &["--platform", other]).expect(5).says(&["Dockerfile:1", one, other]);
    bench.kiln(&["pull", "--platform", other, &base]).expect(5).says(&[one, other]);
    bench.build(&on_base, &["--platform", one]).expect(0);
    // Where nobody asked for a platform, what a name leads to counts, with a word about it (as BuildKit does).
    bench.build(&on_base, &[]).expect(0).says(&[&format!("is for {one}, not for")]);
    // As docker does; containers as well.
    let mut command = bench.command(&["pull", &base]);
    let pulled = command.env("DOCKER_DEFAULT_PLATFORM", other).output().expect("kiln starts");
    assert_eq!(pulled.status.code(), Some(5));
    let run = bench.kiln(&["run", "--rm", "--pull=never", "--platform", other, &base, "/x"]).expect(125);
    run.says(&[one, other]);
}
