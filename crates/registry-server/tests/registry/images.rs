//! Images that somebody else keeps.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use kiln_oci::Digest;
use kiln_registry_server::route::{Name, Tag, Which};
use kiln_registry_server::{Content, Found, FoundManifest, Images, ImagesError};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Client, manifest};
use crate::lab::Lab;

const OCI: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER: &[u8] = b"0123456789";

/// One image, `team/app` with two tags, that has to be made ready.
struct Shelf {
    dir: TempDir,
    is_ready: AtomicBool,
    /// Held while it is being made ready.
    gate: (Mutex<bool>, Condvar),
    made: AtomicUsize,
    is_broken: AtomicBool,
}

impl Shelf {
    fn new() -> Arc<Self> {
        let dir = tempfile::tempdir().expect("temporary directories can be made");
        File::create(dir.path().join("blob")).unwrap().write_all(LAYER).unwrap();
        Arc::new(Self {
            dir,
            is_ready: AtomicBool::new(false),
            gate: (Mutex::new(true), Condvar::new()),
            made: AtomicUsize::new(0),
            is_broken: AtomicBool::new(false),
        })
    }

    fn document(&self) -> Vec<u8> {
        manifest(b"{}", &[LAYER], &Value::Null)
    }

    fn found(&self) -> Found {
        let bytes = self.document();
        Found::Manifest(FoundManifest { media_type: OCI.to_owned(), digest: Digest::of(&bytes), bytes })
    }

    fn open_gate(&self) {
        *self.gate.0.lock().unwrap() = true;
        self.gate.1.notify_all();
    }
}

impl Images for Shelf {
    fn repositories(&self) -> Result<Vec<Name>, ImagesError> {
        Ok(["other", "team/app", "team/b"].map(|name| name.parse().unwrap()).to_vec())
    }

    fn tags(&self, name: &Name) -> Result<Vec<Tag>, ImagesError> {
        if name.as_str() != "team/app" {
            return Ok(Vec::new());
        }
        Ok(["v1", "v2"].map(|tag| tag.parse().unwrap()).to_vec())
    }

    fn manifest(&self, name: &Name, which: &Which) -> Result<Found, ImagesError> {
        if self.is_broken.load(Ordering::SeqCst) {
            return Err(ImagesError("the disk at /secret/place is gone".into()));
        }
        let is_it = match which {
            Which::Tag(tag) => tag.as_str() == "v1",
            Which::Digest(digest) => *digest == Digest::of(&self.document()),
        };
        Ok(match self.is_ready.load(Ordering::SeqCst) {
            _ if name.as_str() != "team/app" || !is_it => Found::Missing,
            false if matches!(which, Which::Digest(_)) => Found::Missing,
            false => Found::Unready,
            true => self.found(),
        })
    }

    fn make_ready(&self, _: &Name, _: &Tag) -> Result<Found, ImagesError> {
        self.made.fetch_add(1, Ordering::SeqCst);
        let mut open = self.gate.0.lock().unwrap();
        while !*open {
            open = self.gate.1.wait(open).unwrap();
        }
        self.is_ready.store(true, Ordering::SeqCst);
        Ok(self.found())
    }

    fn blob(&self, name: &Name, digest: &Digest) -> Result<Option<(File, u64)>, ImagesError> {
        let is_it = name.as_str() == "team/app" && *digest == Digest::of(LAYER);
        let open = || (File::open(self.dir.path().join("blob")).unwrap(), LAYER.len() as u64);
        Ok(is_it.then(open))
    }

    fn tidy(&self) {}
}

fn lab(shelf: &Arc<Shelf>) -> Lab {
    let images: Arc<dyn Images> = shelf.clone();
    Lab::with(|settings| settings.content = Content::Images(images))
}

#[test]
fn they_are_pulled_like_any_other() {
    let shelf = Shelf::new();
    let lab = lab(&shelf);
    let mut client = lab.client();
    let digest = Digest::of(&shelf.document());
    // It has no digest before it is ready.
    client.get(&format!("/v2/team/app/manifests/{digest}")).expect(404);
    let reply = client.get("/v2/team/app/manifests/v1").expect(200);
    assert_eq!((reply.body, shelf.made.load(Ordering::SeqCst)), (shelf.document(), 1));
    for which in ["v1".to_owned(), digest.to_string()] {
        let path = format!("/v2/team/app/manifests/{which}");
        let reply = client.send("HEAD", &path, &[], b"").expect(200);
        assert_eq!(reply.header("docker-content-digest"), Some(digest.to_string().as_str()));
        assert_eq!(reply.header("content-type"), Some(OCI));
        let tag = reply.header("etag").unwrap().to_owned();
        client.send("GET", &path, &[("if-none-match", &tag)], b"").expect(304);
    }
    let blob = format!("/v2/team/app/blobs/{}", Digest::of(LAYER));
    assert_eq!(client.get(&blob).expect(200).body, LAYER);
    let part = client.send("GET", &blob, &[("range", "bytes=2-4")], b"").expect(206);
    assert_eq!(part.body, b"234");
    client.send("GET", &blob, &[("range", "bytes=10-")], b"").expect(416);
    assert_eq!(client.get("/v2/team/b/manifests/v1").expect(404).code(), "MANIFEST_UNKNOWN");
    assert_eq!(client.get(&blob.replace("team/app", "team/b")).expect(404).code(), "BLOB_UNKNOWN");
    assert_eq!(shelf.made.load(Ordering::SeqCst), 1);
}

#[test]
fn they_are_listed_page_by_page() {
    let lab = lab(&Shelf::new());
    let mut client = lab.client();
    let all = client.get("/v2/_catalog").expect(200).json();
    assert_eq!(all, json!({ "repositories": ["other", "team/app", "team/b"] }));
    let page = client.get("/v2/_catalog?n=1&last=other").expect(200);
    assert_eq!(page.json(), json!({ "repositories": ["team/app"] }));
    assert_eq!(page.header("link"), Some("</v2/_catalog?last=team%2Fapp&n=1>; rel=\"next\""));
    let tags = client.get("/v2/team/app/tags/list").expect(200).json();
    assert_eq!(tags, json!({ "name": "team/app", "tags": ["v1", "v2"] }));
    let page = client.get("/v2/team/app/tags/list?n=1").expect(200);
    assert_eq!(page.header("link"), Some("</v2/team/app/tags/list?last=v1&n=1>; rel=\"next\""));
    assert_eq!(client.get("/v2/none/tags/list").expect(404).code(), "NAME_UNKNOWN");
    // Nothing refers to anything, in the words of the specification.
    let path = format!("/v2/team/app/referrers/{}?artifactType=x", Digest::of(b"x"));
    let reply = client.get(&path).expect(200);
    assert_eq!(
        (reply.json()["manifests"].clone(), reply.header("oci-filters-applied")),
        (json!([]), Some("artifactType"))
    );
}

#[test]
fn nothing_is_pushed_or_deleted() {
    let lab = lab(&Shelf::new());
    let mut client = lab.client();
    let digest = Digest::of(LAYER);
    for (method, path) in [
        ("POST", "/v2/team/app/blobs/uploads/".to_owned()),
        ("POST", format!("/v2/team/b/blobs/uploads/?mount={digest}&from=team/app")),
        ("GET", format!("/v2/team/app/blobs/uploads/{}", "0".repeat(32))),
        ("PUT", "/v2/team/app/manifests/v3".to_owned()),
        ("DELETE", "/v2/team/app/manifests/v1".to_owned()),
        ("DELETE", format!("/v2/team/app/blobs/{digest}")),
    ] {
        assert_eq!(
            client.send(method, &path, &[], b"x").expect(405).code(),
            "UNSUPPORTED",
            "{method} {path}"
        );
    }
    let metrics = client.get("/metrics").expect(200).body;
    assert!(String::from_utf8(metrics).unwrap().contains("kiln_registry_uploads 0\n"));
}

#[test]
fn what_takes_long_is_done_once_for_all_who_ask_and_holds_up_nobody_else() {
    let shelf = Shelf::new();
    *shelf.gate.0.lock().unwrap() = false;
    let lab = lab(&shelf);
    // More than there are threads for the disk.
    let clients: Vec<_> = (0..40)
        .map(|_| {
            let mut client = lab.client();
            client.head("GET", "/v2/team/app/manifests/v1", &[], None);
            client
        })
        .collect();
    // Whoever does not wait for it gets what he asks for.
    let mut other = lab.client();
    other.get("/v2/team/app/tags/list").expect(200);
    other.get(&format!("/v2/team/app/blobs/{}", Digest::of(LAYER))).expect(200);
    // One who goes away ends nothing.
    let mut gone = lab.client();
    gone.head("GET", "/v2/team/app/manifests/v1", &[], None);
    drop(gone);
    shelf.open_gate();
    let answer = |mut client: Client| assert_eq!(client.read(false).expect(200).body, shelf.document());
    clients.into_iter().for_each(answer);
    assert_eq!(shelf.made.load(Ordering::SeqCst), 1);
    let metrics = String::from_utf8(other.get("/metrics").expect(200).body).unwrap();
    assert!(metrics.contains("kiln_registry_made_ready_total 1\n"), "{metrics}");
}

#[test]
fn why_something_cannot_be_given_out_is_for_whoever_serves_it() {
    let shelf = Shelf::new();
    let lab = lab(&shelf);
    shelf.is_broken.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let reply = lab.client().get("/v2/team/app/manifests/v1").expect(500);
        assert!(!String::from_utf8_lossy(&reply.body).contains("secret"), "{reply:?}");
    }
    let said = lab.said.lock().unwrap().clone();
    assert!(said.len() == 1 && said[0].contains("the disk at /secret/place is gone"), "{said:?}");
    shelf.is_broken.store(false, Ordering::SeqCst);
    lab.client().get("/v2/team/app/manifests/v1").expect(200);
}
