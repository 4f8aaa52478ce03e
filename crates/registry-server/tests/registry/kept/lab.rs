//! A registry with a keeper of images.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_oci::Digest;
use kiln_registry_server::route::{Name, Tag, Which};
use kiln_registry_server::{Content, Found, Images, ImagesError, NotTaken, Pushed, Settings, Takes};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) use crate::lab::files;

/// Makes those registries; what is of no interest is as in the other ones.
pub(crate) struct Lab;

impl Lab {
    #[allow(clippy::new_ret_no_self, reason = "it is one as well")]
    pub(crate) fn new() -> crate::lab::Lab {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut Settings)) -> crate::lab::Lab {
        Self::on(Arc::new(tempfile::tempdir().expect("temporary directories can be made")), change)
    }

    pub(crate) fn on(dir: Arc<TempDir>, change: impl FnOnce(&mut Settings)) -> crate::lab::Lab {
        let images = Arc::new(Keeper::of(&dir));
        let directory = dir.path().join("registry");
        crate::lab::Lab::on(dir, |settings| {
            settings.content = Content::Pushed { images, directory };
            change(settings);
        })
    }
}

/// Keeps the names of images, and of images nothing but the digest of their config: a file for each.
pub(crate) struct Keeper(PathBuf);

impl Keeper {
    /// Beside the registry in `dir`.
    pub(crate) fn of(dir: &TempDir) -> Self {
        let names = dir.path().join("names");
        fs::create_dir_all(&names).expect("ours to write");
        Self(names)
    }

    fn place(&self, name: &Name, tag: &Tag) -> PathBuf {
        self.0.join(format!("{}:{tag}", name.as_str().replace('/', "@")))
    }

    /// Names an image, as somebody on the keeper's own machine does.
    pub(crate) fn name(&self, name: &str, tag: &str, config: &Digest) {
        let place = self.place(&name.parse().expect("a name"), &tag.parse().expect("a tag"));
        fs::write(place, config.to_string()).expect("ours to write");
    }

    pub(crate) fn config(&self, name: &str, tag: &str) -> Option<Digest> {
        let found = self.image(&name.parse().expect("a name"), &tag.parse().expect("a tag"));
        found.expect("ours to read")
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.0.with_file_name(name)
    }

    /// Some things take long here: those that a test has written such a file for, with milliseconds.
    fn dawdle(&self, at: &str) {
        let text = fs::read_to_string(self.beside(&format!("slow-{at}"))).unwrap_or_default();
        if let Ok(milliseconds) = text.parse() {
            std::thread::sleep(Duration::from_millis(milliseconds));
        }
    }

    pub(crate) fn be_slow(&self, at: &str, time: Duration) {
        fs::write(self.beside(&format!("slow-{at}")), time.as_millis().to_string()).expect("ours to write");
    }

    /// How often somebody has asked for a manifest.
    pub(crate) fn asked(&self) -> usize {
        fs::read(self.beside("asked")).map_or(0, |asked| asked.len())
    }

    fn all(&self) -> Vec<(Name, Tag)> {
        let entries = fs::read_dir(&self.0).expect("ours to read").flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut all: Vec<(Name, Tag)> = names
            .filter_map(|text| {
                let (name, tag) = text.split_once(':')?;
                Some((name.replace('@', "/").parse().ok()?, tag.parse().ok()?))
            })
            .collect();
        all.sort();
        all
    }
}

impl Images for Keeper {
    fn repositories(&self) -> Result<Vec<Name>, ImagesError> {
        let mut names: Vec<Name> = self.all().into_iter().map(|(name, _)| name).collect();
        names.dedup();
        Ok(names)
    }

    fn tags(&self, name: &Name) -> Result<Vec<Tag>, ImagesError> {
        Ok(self.all().into_iter().filter(|(known, _)| known == name).map(|(_, tag)| tag).collect())
    }

    fn manifest(&self, _: &Name, _: &Which) -> Result<Found, ImagesError> {
        let asked = File::options().create(true).append(true).open(self.beside("asked"));
        asked.expect("ours to write").write_all(b".").expect("ours to write");
        Ok(Found::Missing)
    }

    fn make_ready(&self, _: &Name, _: &Tag) -> Result<Found, ImagesError> {
        Ok(Found::Missing)
    }

    /// One blob that was never pushed.
    fn blob(&self, name: &Name, digest: &Digest) -> Result<Option<(File, u64)>, ImagesError> {
        let path = Path::new(&self.0).with_file_name("shelf");
        let known = name.as_str() == "shelf" && fs::read(&path).is_ok_and(|it| Digest::of(&it) == *digest);
        let open = || {
            let file = File::open(&path).expect("it was read");
            let size_bytes = file.metadata().expect("it is open").len();
            (file, size_bytes)
        };
        Ok(known.then(open))
    }

    fn tidy(&self) {}
}

impl Takes for Keeper {
    /// Looks at all that should be there, and refuses configs that say `hostile`.
    fn take(&self, name: &Name, tag: &Tag, pushed: Pushed) -> Result<(), NotTaken> {
        let read = |digest: &Digest| -> Result<Value, NotTaken> {
            let bytes = pushed.parts.document(digest)?.ok_or(NotTaken::Refused("no document".to_owned()))?;
            Ok(serde_json::from_slice(&bytes).expect("the registry has read it"))
        };
        let digest = |value: &Value| value.as_str().expect("a digest").parse::<Digest>().expect("a digest");
        let mut root = read(&pushed.digest)?;
        if let Some(child) = root["manifests"].get(0) {
            root = read(&digest(&child["digest"]))?;
        }
        let config = digest(&root["config"]["digest"]);
        for layer in root["layers"].as_array().expect("layers") {
            let place = pushed.parts.blob(&digest(&layer["digest"]))?.expect("it was looked for").path;
            assert_eq!(Digest::of(&fs::read(place).expect("it is there")), digest(&layer["digest"]));
        }
        let place = pushed.parts.blob(&config)?.expect("it was looked for").path;
        if fs::read_to_string(place).is_ok_and(|text| text.contains("hostile")) {
            return Err(NotTaken::Refused("the layer leads outside".to_owned()));
        }
        self.dawdle("before");
        fs::write(self.place(name, tag), config.to_string()).expect("ours to write");
        self.dawdle("take");
        Ok(())
    }

    fn names(&self) -> Result<HashMap<Name, HashMap<Tag, Digest>>, ImagesError> {
        let mut names: HashMap<Name, HashMap<Tag, Digest>> = HashMap::new();
        for (name, tag) in self.all() {
            let text = fs::read_to_string(self.place(&name, &tag)).ok();
            if let Some(image) = text.and_then(|text| text.parse().ok()) {
                names.entry(name).or_default().insert(tag, image);
            }
        }
        Ok(names)
    }

    fn image(&self, name: &Name, tag: &Tag) -> Result<Option<Digest>, ImagesError> {
        let text = fs::read_to_string(self.place(name, tag)).ok();
        self.dawdle("image");
        Ok(text.and_then(|text| text.parse().ok()))
    }

    /// An image whose name says so is needed.
    fn can_forget(&self, _: &Name, tags: &[Tag]) -> Result<(), NotTaken> {
        match tags.iter().find(|tag| tag.as_str() == "needed") {
            Some(tag) => Err(NotTaken::Needed(format!("{tag} is needed"))),
            None => Ok(()),
        }
    }

    fn called(&self, name: &Name) -> Name {
        name.clone()
    }

    fn forget(&self, name: &Name, tag: &Tag) -> Result<bool, NotTaken> {
        self.dawdle("forget");
        Ok(fs::remove_file(self.place(name, tag)).is_ok())
    }
}
