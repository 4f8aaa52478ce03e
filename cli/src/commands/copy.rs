//! `kiln copy`

use std::path::{Path, PathBuf};

use kiln_build::export::{
    ArchiveFormat, Compress, Dest, Packing, SaveOptions, SavedImage, save, save_layout,
};
use kiln_build::registry::{
    Copied, CopyRequest, Place, PushRequest, Registries, WhichImage, copy, copy_in, push, stored_image,
};
use kiln_build::{BuildError, LayoutImage};
use kiln_content::ImageRecord;
use kiln_oci::{Digest, Platform, Reference};

use super::save::write_to;
use super::{human_size, print};
use crate::args::registry::CopyArgs;
use crate::config::Config;
use crate::errors::{Failure, say};
use crate::registries::{registries, tell_notes};
use crate::session::Session;

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    Outside(Place),
    /// A name of the store.
    Store(String),
}

impl End {
    /// As skopeo writes places; a name alone is the store's.
    pub(super) fn parse(text: &str) -> Result<Self, Failure> {
        let wrong = |what: &str| Failure::usage(format!("{text:?}: {what}"));
        let name = |text: &str| text.parse::<Reference>().map_err(|error| wrong(&error.to_string()));
        let Some((transport, rest)) = text.split_once(':') else { return Ok(Self::Store(text.to_owned())) };
        let path = || {
            let (path, tag) = rest.split_once(':').map_or((rest, None), |(path, tag)| (path, Some(tag)));
            if path.is_empty() { Err(wrong("a path is missing")) } else { Ok((PathBuf::from(path), tag)) }
        };
        let image = |tag: Option<&str>| match tag {
            Some(tag) => LayoutImage::Tag(tag.to_owned()),
            None => LayoutImage::Default,
        };
        match transport {
            "docker" => {
                let rest = rest.strip_prefix("//").ok_or_else(|| wrong("a registry is written docker://NAME"))?;
                Ok(Self::Outside(Place::Registry(name(rest)?)))
            }
            "oci" => path().map(|(path, tag)| Self::Outside(Place::Layout(path, image(tag)))),
            "oci-archive" => path().map(|(path, tag)| Self::Outside(Place::Archive(path, image(tag)))),
            "docker-archive" => {
                let (path, tag) = path()?;
                Ok(Self::Outside(Place::Docker(path, tag.map(name).transpose()?)))
            }
            "store" | "containers-storage" => Ok(Self::Store(rest.to_owned())),
            "dir" | "docker-daemon" | "ostree" | "sif" | "tarball" => {
                Err(wrong("this transport of skopeo is none of kiln's").hint(
                    "docker://NAME, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME] and names of the \
                     store are",
                ))
            }
            // A name with a port or a tag.
            _ => Ok(Self::Store(text.to_owned())),
        }
    }
}

/// What there is to say about a copy.
struct Told {
    /// Some lines.
    text: String,
    /// Digest of the manifest or index.
    digest: String,
}

impl Told {
    /// Of an image that has a name in the store now.
    fn named(name: &Reference, image: &ImageRecord, digest: &Digest) -> Self {
        let text = format!("copied to {} (image {})\n", name.familiar(), image.config);
        Self { text, digest: digest.to_string() }
    }

    /// Of a file or directory that was written.
    fn saved(path: &Path, digests: &[Digest]) -> Self {
        let digest = digests.first().map(ToString::to_string).unwrap_or_default();
        Self { text: format!("copied to {}\n", path.display()), digest }
    }
}

pub(crate) fn run(session: &Session, args: &CopyArgs) -> Result<u8, Failure> {
    let (from, to) = (End::parse(&args.from)?, End::parse(&args.to)?);
    refuse(&from, &to, args)?;
    let registries = registries(&Config::read()?, &args.registries);
    // What is written there is no place for words.
    let is_piped = match &to {
        End::Outside(Place::Archive(path, _) | Place::Docker(path, _)) => is_stdout(path),
        _ => false,
    };
    let which = match (&args.platform, args.all) {
        (Some(platform), _) => WhichImage::Platform(platform.clone()),
        (None, true) => WhichImage::All,
        (None, false) => WhichImage::Own,
    };
    let done = match (from, to) {
        (End::Outside(from), End::Outside(to)) => {
            let compress = args.compression.is_given().then(|| compress(args, Packing::GZIP)).transpose()?;
            let request = CopyRequest { from, to, which, compress, referrers: args.referrers };
            let copied = copy(&session.engine, &registries, &request, &session.cancel);
            copied.map(|copied| told(&copied)).map_err(Failure::from)
        }
        (End::Outside(from), End::Store(to)) => {
            let name = reference(&to)?;
            let note = |line: &str| {
                if !args.quiet {
                    say(&format!("{line}\n"));
                }
            };
            let from = (&from, &which);
            let copied = copy_in(&session.engine, &registries, from, &name, &session.cancel, &note);
            let told = |(digest, image): (Digest, ImageRecord)| Told::named(&name, &image, &digest);
            copied.map(told).map_err(Failure::from)
        }
        (End::Store(name), to) => out_of_store(session, args, &name, to, &registries),
    };
    tell_notes(&registries);
    let Told { text, digest } = done?;
    let text = if args.quiet { format!("{digest}\n") } else { format!("{text}digest {digest}\n") };
    match is_piped {
        true => say(&text),
        false => print(&text)?,
    }
    Ok(0)
}

/// What cannot be done is said before anything is.
fn refuse(from: &End, to: &End, args: &CopyArgs) -> Result<(), Failure> {
    if args.compression.is_given() {
        if matches!(to, End::Store(_)) {
            return Err(Failure::usage("the store has the files of an image: nothing is packed for it").hint(
                "`--compression` is for what comes out: `kiln push`, `kiln save`, `kiln copy` from the store",
            ));
        }
        if args.referrers {
            return Err(Failure::usage(
                "layers that are packed anew give the image another digest, and `--referrers` are about this one",
            ));
        }
    }
    for end in [from, to].into_iter().filter(|_| args.referrers) {
        let what = match end {
            End::Store(_) => "the store has images and nothing that refers to them",
            End::Outside(Place::Docker(..)) => "a docker archive has no place for what refers to an image",
            End::Outside(_) => continue,
        };
        return Err(Failure::usage(what).hint("`--referrers` go between registries and OCI layouts"));
    }
    Ok(())
}

fn compress(args: &CopyArgs, default: Packing) -> Result<Compress, Failure> {
    args.compression.compress(default).map_err(|error| Failure::usage(error.to_string()))
}

fn reference(text: &str) -> Result<Reference, Failure> {
    text.parse::<Reference>().map_err(|error| Failure::usage(format!("{text:?}: {error}")))
}

/// An image of the store leaves as with `kiln push` and `kiln save`.
fn out_of_store(
    session: &Session,
    args: &CopyArgs,
    from: &str,
    to: End,
    registries: &Registries,
) -> Result<Told, Failure> {
    let (engine, cancel) = (&session.engine, &session.cancel);
    let image = chosen(session, from, args.platform.as_ref())?;
    let to = match to {
        End::Outside(place) => place,
        End::Store(to) => {
            let name = reference(&to)?;
            engine.store.set_name(&name, &image)?;
            engine.store.barrier()?;
            // The other platforms are with the image, whatever it is called.
            let index = if args.all { engine.store.index_of(&image.config)? } else { None };
            return Ok(Told::named(&name, &image, &index.unwrap_or(image.manifest)));
        }
    };
    let is_docker = matches!(to, Place::Docker(..));
    let compress = compress(args, if is_docker { Packing::UNCOMPRESSED } else { Packing::GZIP })?;
    let alone = !args.all;
    let format = if is_docker { ArchiveFormat::Docker } else { ArchiveFormat::Oci };
    let options = SaveOptions { format, compress, alone };
    let own = from.parse::<Reference>().ok();
    // An ID is no name.
    let own = match own {
        Some(own) if engine.store.resolve(&own)?.is_some() => Some(own),
        _ => None,
    };
    let tagged = |tag: LayoutImage| {
        let LayoutImage::Tag(tag) = tag else { return Ok(own.clone()) };
        let Some(own) = &own else {
            let why = format!("{from:?} is no name that the tag {tag:?} could go with");
            return Err(Failure::usage(why).hint("`kiln tag` gives an image a name"));
        };
        reference(&format!("{}/{}:{tag}", own.domain(), own.path())).map(Some)
    };
    let (path, names) = match to {
        Place::Registry(name) => {
            let request = PushRequest { image, names: vec![name], compress, alone };
            let pushed = push(engine, registries, &request, cancel)?.pop();
            let pushed = pushed.ok_or_else(|| Failure::store("nothing was pushed"))?;
            let (text, digest) = (super::push::line(&pushed), pushed.digest.to_string());
            return Ok(Told { text, digest });
        }
        Place::Layout(dir, tag) => {
            let names = tagged(tag)?.into_iter().collect();
            let digests = save_layout(engine, &[SavedImage { image, names }], &options, &dir, cancel)?;
            return Ok(Told::saved(&dir, &digests));
        }
        Place::Archive(path, tag) => (path, tagged(tag)?),
        Place::Docker(path, name) => (path, name.or_else(|| own.clone())),
    };
    let images = [SavedImage { image, names: names.into_iter().collect() }];
    let mut digests = Vec::new();
    write_to(session, Some(Dest::Path(path.clone())), Some(&path), "an archive", &mut |target| {
        digests = save(engine, &images, &options, target, cancel)?;
        Ok(())
    })?;
    Ok(Told::saved(&path, &digests))
}

/// The image that a name or an ID means, for this platform if one was asked for.
fn chosen(session: &Session, from: &str, platform: Option<&Platform>) -> Result<ImageRecord, Failure> {
    let Some(wanted) = platform else { return session.find(from) };
    // A name may stand for several; an ID is one.
    if let Ok(name) = from.parse::<Reference>()
        && let Some(image) = stored_image(&session.engine, &name, wanted, &session.cancel)?
    {
        return Ok(image);
    }
    let image = session.find(from)?;
    let actual = session.config(&image)?.platform();
    match wanted.distance(&actual) {
        Some(_) => Ok(image),
        None => {
            let (wanted, available) = (Box::new(wanted.clone()), vec![actual.to_string()]);
            Err(BuildError::NoPlatform { path: from.into(), wanted, available }.into())
        }
    }
}

/// Whether a path is that of standard output.
fn is_stdout(path: &Path) -> bool {
    ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|stdout| path == Path::new(stdout))
}

fn told(copied: &Copied) -> Told {
    let Copied { digest, sent: (blobs, bytes), mounted, known, kept, referrers } = copied;
    if *kept > 0 {
        say(&format!(
            "note: layers that stay packed as they were: {kept} (`--force-compression` packs them anew)\n"
        ));
    }
    let about = match referrers {
        0 => String::new(),
        1 => ", 1 manifest refers to it".to_owned(),
        several => format!(", {several} manifests refer to it"),
    };
    let size = human_size(*bytes);
    let text = format!("copied ({blobs} blobs, {size}; {mounted} mounted, {known} there already{about})\n");
    Told { text, digest: digest.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_written_as_skopeo_does() {
        let end = |text: &str| End::parse(text).unwrap_or_else(|_| panic!("{text}"));
        let name = |text: &str| text.parse::<Reference>().unwrap();
        assert_eq!(end("docker://h:5000/x:v1"), End::Outside(Place::Registry(name("h:5000/x:v1"))));
        assert_eq!(end("oci:/dir"), End::Outside(Place::Layout("/dir".into(), LayoutImage::Default)));
        let tag = LayoutImage::Tag("v1".to_owned());
        assert_eq!(end("oci-archive:a.tar:v1"), End::Outside(Place::Archive("a.tar".into(), tag)));
        let docker = Place::Docker("a.tar".into(), Some(name("x:v1")));
        assert_eq!(end("docker-archive:a.tar:x:v1"), End::Outside(docker));
        assert_eq!(end("localhost:5000/x:v1"), End::Store("localhost:5000/x:v1".to_owned()));
        assert_eq!(end("store:x"), end("x"));
        for wrong in ["docker:x", "docker://X", "oci:", "dir:/x"] {
            assert!(End::parse(wrong).is_err(), "{wrong}");
        }
    }
}
