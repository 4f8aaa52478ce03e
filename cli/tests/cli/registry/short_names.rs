//! Names without a host, and where their images are.

use super::replies::{Image, offer};
use super::server::Bench;
use crate::harness::{Context, needs_root};
use crate::scripted::Server;

#[test]
fn a_short_name_is_where_its_alias_says() {
    needs_root!();
    let (image, server) = (Image::new(b"file"), Server::new());
    offer(&server, &image);
    let bench = Bench::empty();
    let aliases = format!(
        "[registries.aliases]\ndistro = \"{0}/base/distro\"\n\"team/app\" = \"{0}/apps/app\"\n",
        server.domain()
    );
    bench.write("kiln.toml", aliases);
    // Its name stays what it is called.
    assert!(bench.ok(&["pull", "distro:v1"]).contains("Pulled: distro:v1"));
    assert_eq!(server.lines()[0], "GET /v2/base/distro/manifests/v1");
    let context = Context::new(&[("Dockerfile", "FROM distro:v1\nLABEL a=b\n")]);
    let asked = server.lines().len();
    bench.build(&context, &["-t", "team/app:v2"]).expect(0);
    assert_eq!(server.lines().len(), asked, "it is in the store");
    bench.build(&context, &["--pull", "-t", "docker.io/team/app:v2"]).expect(0);
    assert_eq!(server.lines().last().unwrap(), "HEAD /v2/base/distro/manifests/v1");
    // What goes out goes there, and takes what that registry has in other repositories.
    let pushed = bench.ok(&["push", "team/app:v2"]);
    assert!(pushed.contains("pushed team/app:v2"), "{pushed}");
    assert!(server.lines().contains(&"PUT /v2/apps/app/manifests/v2".to_owned()), "{:?}", server.lines());
    bench.ok(&["copy", "docker://distro:v1", "docker://team/app:v3"]);
    assert!(server.lines().contains(&"PUT /v2/apps/app/manifests/v3".to_owned()), "{:?}", server.lines());
    // Another registry has names of its own.
    let other = Server::new();
    bench.kiln(&["pull", &format!("{}/library/distro:v1", other.domain())]).expect(5);
    assert_eq!(other.lines(), ["GET /v2/library/distro/manifests/v1"]);
    bench.store.sound().unwrap();
}

#[test]
fn what_is_no_alias_is_said_with_its_line() {
    let bench = Bench::empty();
    for (line, said) in [
        ("\"distro:v1\" = \"r.example/distro\"", "\"distro:v1\" is no short name"),
        ("\"quay.io/distro\" = \"r.example/distro\"", "\"quay.io/distro\" is no short name"),
        ("distro = \"base/distro\"", "\"base/distro\" says not where an image is"),
        ("distro = \"r.example/distro:v1\"", "says not where an image is"),
    ] {
        bench.write("kiln.toml", format!("[registries.aliases]\n{line}\n"));
        bench.kiln(&["pull", "distro"]).expect(2).says(&["kiln.toml", said]);
    }
}
