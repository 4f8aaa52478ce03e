//! A full disk, and a mirror of another registry.

use std::ffi::CString;
use std::path::PathBuf;

use kiln_oci::Digest;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::process::Signal;

use super::super::server::Bench;
use super::Own;
use super::client::Client;
use crate::harness::{Context, needs_root};

/// A tmpfs, unmounted with this value.
struct Small(PathBuf);

impl Small {
    fn new(place: PathBuf) -> Self {
        std::fs::create_dir(&place).expect("ours to write");
        let options = CString::new("size=4m").expect("no NUL");
        mount("tmpfs", &place, "tmpfs", MountFlags::empty(), Some(options.as_c_str()))
            .expect("root may mount");
        Self(place)
    }

    fn grow(&self) {
        mount_remount(&self.0, MountFlags::empty(), c"size=64m").expect("root may mount");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_is_said_and_with_more_room_the_same_push_is_taken() {
    needs_root!();
    let dir = tempfile::tempdir().unwrap();
    let small = Small::new(dir.path().join("registry"));
    let own = Own::on(dir, &[]);
    let mut client = own.client();
    let (digest, _) = client.push_image("team/app", "v1", "small");
    let large = vec![7; 8 << 20];
    let path = format!("/v2/team/app/blobs/uploads/?digest={}", Digest::of(&large));
    let refused = Client::new(own.address).send("POST", &path, &[], &large).expect(507);
    assert!(String::from_utf8_lossy(&refused.body).contains("disk is full"), "{refused:?}");
    // Nothing is half there, and what was there is.
    let mut client = own.client();
    client.get(&format!("/v2/team/app/blobs/{}", Digest::of(&large))).expect(404);
    client.get(&format!("/v2/team/app/manifests/{digest}")).expect(200);
    small.grow();
    client.push_blob("team/app", &large);
    assert_eq!(client.get(&format!("/v2/team/app/blobs/{}", Digest::of(&large))).expect(200).body, large);
    own.signal(Signal::TERM);
    assert_eq!(own.wait().0.code(), Some(0));
}

#[test]
fn a_mirror_has_what_its_registry_had_when_that_is_gone() {
    needs_root!();
    let behind = Own::start();
    let bench = Bench::empty();
    let name = behind.name("team/app:v1");
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY file /\n"), ("file", "content")]);
    bench.build(&context, &["--push", "-t", &name]).expect(0);
    let mirror = Own::with(&["--mirror", &behind.address.to_string()]);
    let mirrored = mirror.name("team/app:v1");
    let first = Bench::empty();
    first.ok(&["pull", &mirrored]);
    assert_eq!(first.id(&mirrored), bench.id(&name));
    // Nothing is pushed to a mirror.
    first.ok(&["tag", &mirrored, &mirror.name("other:v1")]);
    first.kiln(&["push", &mirror.name("other:v1")]).expect(5).says(&["405"]);
    behind.signal(Signal::TERM);
    assert_eq!(behind.wait().0.code(), Some(0));
    let second = Bench::empty();
    second.ok(&["pull", &mirrored]);
    assert_eq!(second.id(&mirrored), bench.id(&name));
    second.store.sound().unwrap();
}
