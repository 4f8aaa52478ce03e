//! `kiln copy`

use std::path::{Path, PathBuf};

use kiln_build::export::{ArchiveFormat, Dest, Packing, SaveOptions, SavedImage, save};
use kiln_build::registry::{Copied, CopyRequest, Place, PushRequest, WhichImage, copy, pull, push};
use kiln_build::{LayoutImage, load, load_layout};
use kiln_content::ImageRecord;
use kiln_oci::{Platform, Reference};

use super::save::write_to;
use super::{human_size, print};
use crate::args::registry::CopyArgs;
use crate::config::Config;
use crate::errors::{Failure, say};
use crate::registries::{registries, tell_notes};
use crate::session::Session;

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Outside(Place),
    /// A docker archive, and the name in it.
    Docker(PathBuf, Option<Reference>),
    /// A name of the store.
    Store(String),
}

impl End {
    /// As skopeo writes places; a name alone is the store's.
    fn parse(text: &str) -> Result<Self, Failure> {
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
                Ok(Self::Docker(path, tag.map(name).transpose()?))
            }
            "store" | "containers-storage" => Ok(Self::Store(rest.to_owned())),
            "dir" | "docker-daemon" | "ostree" | "sif" | "tarball" => {
                Err(wrong("this transport of skopeo is none of kiln's").hint(
                    "docker://NAME, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE and names of the store are",
                ))
            }
            // A name with a port or a tag.
            _ => Ok(Self::Store(text.to_owned())),
        }
    }
}

pub(crate) fn run(session: &Session, args: &CopyArgs) -> Result<u8, Failure> {
    let (from, to) = (End::parse(&args.from)?, End::parse(&args.to)?);
    let registries = registries(&Config::read()?, &args.registries);
    let platform = args.platform.clone().unwrap_or_else(Platform::host);
    let (engine, cancel) = (&session.engine, &session.cancel);
    let copied = match (from, to) {
        (End::Outside(from), End::Outside(to)) => {
            let which = if args.all { WhichImage::All } else { WhichImage::Platform(platform) };
            copy(engine, &registries, &CopyRequest { from, to, which }, cancel)
        }
        (from, End::Store(to)) => {
            let image = match from {
                End::Outside(Place::Registry(name)) => {
                    pull(engine, &registries, &name, &platform, cancel, &|line| say(&format!("{line}\n")))?
                        .image
                }
                End::Outside(Place::Layout(path, image)) => {
                    load_layout(engine, &path, &image, &platform, cancel)?
                }
                End::Outside(Place::Archive(path, LayoutImage::Tag(tag))) => {
                    loaded(session, &path, &platform, |name| name.tag() == Some(&tag))?
                }
                End::Outside(Place::Archive(path, _)) | End::Docker(path, None) => {
                    loaded(session, &path, &platform, |_| true)?
                }
                End::Docker(path, Some(name)) => loaded(session, &path, &platform, |found| *found == name)?,
                End::Store(name) => session.find(&name)?,
            };
            let name = to.parse::<Reference>().map_err(|error| Failure::usage(format!("{to:?}: {error}")))?;
            engine.store.set_name(&name, &image)?;
            engine.store.barrier()?;
            print(&format!("copied to {} (image {})\n", name.familiar(), image.config))?;
            tell_notes(&registries);
            return Ok(0);
        }
        (End::Store(name), to) => {
            let image = session.find(&name)?;
            let packing = if matches!(to, End::Docker(..)) { Packing::UNCOMPRESSED } else { Packing::GZIP };
            let compress = args.compression.compress(packing);
            let compress = compress.map_err(|error| Failure::usage(error.to_string()))?;
            let (path, format, names) = match to {
                End::Outside(Place::Registry(name)) => {
                    let request = PushRequest { image, names: vec![name], compress };
                    for pushed in push(engine, &registries, &request, cancel)? {
                        print(&super::push::told(&pushed))?;
                    }
                    return Ok(0);
                }
                End::Outside(Place::Archive(path, tag)) => (path, ArchiveFormat::Oci, named(&name, tag)),
                End::Docker(path, tag) => {
                    (path, ArchiveFormat::Docker, tag.or_else(|| name.parse().ok()).into_iter().collect())
                }
                End::Outside(Place::Layout(..)) | End::Store(_) => {
                    return Err(Failure::usage(
                        "an image of the store goes into an archive or to a registry",
                    )
                    .hint("copy it to oci-archive:FILE, and that to oci:DIR"));
                }
            };
            let options = SaveOptions { format, compress };
            let images = [SavedImage { image, names }];
            return write_to(Some(Dest::Path(path.clone())), Some(&path), "an archive", &mut |target| {
                save(engine, &images, &options, target, cancel)
            });
        }
        (End::Docker(..), _) | (_, End::Docker(..)) => {
            return Err(Failure::usage("a docker archive is copied from the store and to the store")
                .hint("copy the image to a name of the store first, and from there"));
        }
    };
    tell_notes(&registries);
    let copied = copied?;
    print(&if args.quiet { format!("{}\n", copied.digest) } else { told(&copied) })?;
    Ok(0)
}

/// The names that an archive gives to an image.
fn named(name: &str, tag: LayoutImage) -> Vec<Reference> {
    let reference = name.parse::<Reference>().ok();
    let tagged = match tag {
        LayoutImage::Tag(tag) => {
            reference.and_then(|name| format!("{}/{}:{tag}", name.domain(), name.path()).parse().ok())
        }
        _ => reference,
    };
    tagged.into_iter().collect()
}

/// The image of an archive that has this name, or its only one.
fn loaded(
    session: &Session,
    path: &Path,
    platform: &Platform,
    is_it: impl Fn(&Reference) -> bool,
) -> Result<ImageRecord, Failure> {
    let all = load(&session.engine, path, Some(platform), &session.cancel)?;
    let fits = all.iter().filter(|loaded| loaded.names.iter().any(&is_it) || loaded.names.is_empty());
    match fits.collect::<Vec<_>>().as_slice() {
        [one] => Ok(one.image.clone()),
        several => Err(Failure::source(format!("{} has {} images that fit", path.display(), several.len()))
            .hint("say which one behind a colon")),
    }
}

fn told(copied: &Copied) -> String {
    let Copied { digest, sent: (blobs, bytes), mounted, known } = copied;
    format!(
        "copied ({blobs} blobs, {}; {mounted} mounted, {known} there already)\ndigest {digest}\n",
        human_size(*bytes)
    )
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
        assert_eq!(end("docker-archive:a.tar:x:v1"), End::Docker("a.tar".into(), Some(name("x:v1"))));
        assert_eq!(end("localhost:5000/x:v1"), End::Store("localhost:5000/x:v1".to_owned()));
        assert_eq!(end("store:x"), end("x"));
        for wrong in ["docker:x", "docker://X", "oci:", "dir:/x"] {
            assert!(End::parse(wrong).is_err(), "{wrong}");
        }
    }
}
