//! Images whose documents say whatever a test wants, in every form that leads into a store.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_oci::Digest;
use kiln_oci::Platform;

use crate::harness::{Context, Outcome, Store, text};
use crate::layers::raw::{Member, file, tar};
use crate::universal::Watch;

/// A way into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `kiln load` of an OCI archive.
    OciArchive,
    /// A layout directory as a named context, by the entry of its index.
    Layout,
    /// `kiln load` of a layout directory.
    LayoutLoad,
    /// A layout directory as a named context, by the digest of the manifest.
    LayoutDigest,
    /// `kiln load` of a docker archive: config and layers, no manifest.
    DockerArchive,
    /// `kiln load` of a directory as skopeo's `dir:` makes it: manifest, config and layers.
    Dir,
}
pub(super) use Form::{Dir, DockerArchive, Layout, LayoutDigest, LayoutLoad, OciArchive};

/// All that know of an index.
pub(super) const INDEXED: &[Form] = &[OciArchive, Layout, LayoutLoad];
/// All that know of a manifest, and name it by its digest.
pub(super) const MANIFESTED: &[Form] = &[OciArchive, Layout, LayoutLoad, LayoutDigest];
/// All of them.
pub(super) const ALL: &[Form] = &[OciArchive, Layout, LayoutLoad, LayoutDigest, DockerArchive, Dir];

/// An image with one layer; texts in which these words stand for what comes before them in the chain:
/// `DIFF_ID`, `LAYER`, `LAYER_SIZE`, `CONFIG`, `CONFIG_SIZE`, `MANIFEST`, `MANIFEST_SIZE`, `ARCH`.
pub(super) struct Forge {
    pub(super) layer: Vec<u8>,
    pub(super) config: String,
    pub(super) manifest: String,
    pub(super) index: String,
    /// Blobs beside these, by the name they have.
    pub(super) blobs: Vec<(String, Vec<u8>)>,
    /// More arguments for `kiln load`.
    pub(super) load_args: Vec<&'static str>,
    pub(super) without_layer: bool,
}

pub(super) const CONFIG: &str = r#"{"architecture":"ARCH","os":"linux","config":{"Env":["A=b"]},"rootfs":{"type":"layers","diff_ids":["DIFF_ID"]},"history":[{"created_by":"forged"}]}"#;
pub(super) const MANIFEST: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"CONFIG","size":CONFIG_SIZE},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"LAYER","size":LAYER_SIZE}]}"#;
pub(super) const INDEX: &str = r#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"MANIFEST","size":MANIFEST_SIZE,"annotations":{"org.opencontainers.image.ref.name":"forged:1"}}]}"#;

impl Forge {
    /// One that is right.
    pub(super) fn new() -> Forge {
        Forge {
            layer: tar(&[file("made", "forged")]),
            config: CONFIG.to_owned(),
            manifest: MANIFEST.to_owned(),
            index: INDEX.to_owned(),
            blobs: Vec::new(),
            load_args: Vec::new(),
            without_layer: false,
        }
    }

    /// The right one with another text in the config.
    pub(super) fn config(from: &str, to: &str) -> Forge {
        Forge { config: replaced(CONFIG, from, to), ..Forge::new() }
    }

    /// The right one with another text in the manifest.
    pub(super) fn manifest(from: &str, to: &str) -> Forge {
        Forge { manifest: replaced(MANIFEST, from, to), ..Forge::new() }
    }

    /// The right one with another text in the index.
    pub(super) fn index(from: &str, to: &str) -> Forge {
        Forge { index: replaced(INDEX, from, to), ..Forge::new() }
    }

    pub(super) fn texts(&self) -> [String; 3] {
        let layer = Digest::of(&self.layer).to_string();
        let size = self.layer.len().to_string();
        let arch = Platform::host().architecture;
        let fill = |text: &str, words: &[(&str, &str)]| {
            words.iter().fold(text.replace("ARCH", &arch), |text, (word, with)| text.replace(word, with))
        };
        let config = fill(&self.config, &[("DIFF_ID", &layer)]);
        let layers = [("LAYER_SIZE", size.as_str()), ("LAYER", &layer)];
        let (digest, size) = (Digest::of(config.as_bytes()).to_string(), config.len().to_string());
        let configs = [("CONFIG_SIZE", size.as_str()), ("CONFIG", &digest)];
        let manifest = fill(&self.manifest, &[layers, configs].concat());
        let (digest, size) = (Digest::of(manifest.as_bytes()).to_string(), manifest.len().to_string());
        let manifests = [("MANIFEST_SIZE", size.as_str()), ("MANIFEST", &digest)];
        let index = fill(&self.index, &[layers, configs, manifests].concat());
        [config, manifest, index]
    }

    /// Names and contents of an OCI layout.
    fn files(&self) -> Vec<(String, Vec<u8>)> {
        let [config, manifest, index] = self.texts();
        let mut files = vec![
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            ("index.json".to_owned(), index.into_bytes()),
            (blob(config.as_bytes()), config.into_bytes()),
            (blob(manifest.as_bytes()), manifest.into_bytes()),
        ];
        if !self.without_layer {
            files.push((blob(&self.layer), self.layer.clone()));
        }
        files.extend(self.blobs.iter().cloned());
        files
    }

    fn oci_archive(&self) -> Vec<u8> {
        let files = self.files();
        let members = files.iter().map(|(name, content)| Member::new(name, b'0').content(content).bytes());
        tar(&members.collect::<Vec<_>>())
    }

    /// The OCI archive as a file.
    pub(super) fn write_archive(&self, store: &Store) -> String {
        let place = store.beside("forged");
        fs::write(&place, self.oci_archive()).expect("ours to write");
        text(&place).to_owned()
    }

    fn docker_archive(&self) -> Vec<u8> {
        let [config, _, _] = self.texts();
        let manifest = r#"[{"Config":"config.json","RepoTags":["forged:1"],"Layers":["layer.tar"]}]"#;
        let layer = Member::new("layer.tar", b'0').content(&self.layer).bytes();
        tar(&[file("config.json", &config), file("manifest.json", manifest), layer])
    }

    /// Names and contents of skopeo's `dir:`.
    fn dir_files(&self) -> Vec<(String, Vec<u8>)> {
        let [config, manifest, _] = self.texts();
        let name = |bytes: &[u8]| Digest::of(bytes).hex();
        let mut files = vec![
            ("version".to_owned(), b"Directory Transport Version: 1.1\n".to_vec()),
            ("manifest.json".to_owned(), manifest.into_bytes()),
            (name(config.as_bytes()), config.into_bytes()),
        ];
        if !self.without_layer {
            files.push((name(&self.layer), self.layer.clone()));
        }
        files
    }

    /// The only command line that takes it into the store in this form.
    fn command(&self, store: &Store, context: &Context, form: Form) -> std::process::Command {
        let place: PathBuf = store.beside("forged");
        let _ = fs::remove_dir_all(&place).or_else(|_| fs::remove_file(&place));
        match form {
            OciArchive | DockerArchive => {
                let bytes = if form == OciArchive { self.oci_archive() } else { self.docker_archive() };
                fs::write(&place, bytes).expect("ours to write");
                store.command(&[&["load", "-i", text(&place)], self.load_args.as_slice()].concat())
            }
            LayoutLoad | Dir => {
                if form == LayoutLoad {
                    write(&place, &self.files());
                } else {
                    write(&place, &self.dir_files());
                }
                store.command(&[&["load", "-i", text(&place)], self.load_args.as_slice()].concat())
            }
            Layout | LayoutDigest => {
                write(&place, &self.files());
                let [_, manifest, _] = self.texts();
                let digest = Digest::of(manifest.as_bytes());
                let suffix = if form == Layout { String::new() } else { format!("@{digest}") };
                let named = format!("base=oci-layout://{}{suffix}", text(&place));
                store.command(&["build", "--progress", "plain", "--build-context", &named, context.path()])
            }
        }
    }
}

fn write(dir: &Path, files: &[(String, Vec<u8>)]) {
    for (name, content) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().expect("below")).expect("ours to write");
        fs::write(path, content).expect("ours to write");
    }
}

/// The name of a blob in a layout.
pub(super) fn blob(bytes: &[u8]) -> String {
    format!("blobs/sha256/{}", Digest::of(bytes).hex())
}

#[track_caller]
fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{text} has no {from}");
    text.replace(from, to)
}

/// A store into which forged images are taken, one after the other.
pub(super) struct Door {
    pub(super) store: Store,
    context: Context,
}

impl Door {
    pub(super) fn new() -> Door {
        let store = Store::empty();
        // Makes it, so that what is compared later is not only its directories.
        store.ok(&["images"]);
        Door { store, context: Context::new(&[("Dockerfile", "FROM base\n")]) }
    }

    /// Each of these forms is refused with this code and these words.
    #[track_caller]
    pub(super) fn refuses(&self, forge: &Forge, forms: &[Form], code: i32, says: &[&str]) {
        let watch = Watch::new(&self.store);
        for &form in forms {
            let outcome = watch.refuses(&forge.command(&self.store, &self.context, form), code, says);
            // Where it is: the archive or the layout, and something inside.
            for place in ["error: ", "forged: ", "hint: "] {
                assert!(outcome.stderr.contains(place), "{form:?} lacks {place:?}:\n{}", outcome.stderr);
            }
        }
    }

    /// This form is accepted.
    #[track_caller]
    pub(super) fn takes(&self, forge: &Forge, form: Form) -> Outcome {
        let watch = Watch::new(&self.store);
        watch.run(&forge.command(&self.store, &self.context, form)).expect(0)
    }
}
