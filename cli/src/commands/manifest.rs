//! `kiln manifest`

use kiln_build::registry::{Annotate, ListError, Lists, Place, Referrer, Referrers, WhichImage, referrers};
use kiln_oci::document::artifact_type;
use serde_json::{Value, json};

use super::copy::End;
use super::{human_size, print};
use crate::args::registry::{ManifestCommand, ManifestReferrersArgs, RegistryArgs};
use crate::args::store::Format;
use crate::config::Config;
use crate::errors::Failure;
use crate::escape;
use crate::registries::{registries, tell_notes};
use crate::session::Session;

pub(crate) fn run(session: &Session, command: &ManifestCommand) -> Result<u8, Failure> {
    let none = RegistryArgs::default();
    let flags = match command {
        ManifestCommand::Create(args) => &args.registries,
        ManifestCommand::Inspect(args) => &args.registries,
        ManifestCommand::Push(args) => &args.registries,
        ManifestCommand::Referrers(args) => &args.registries,
        ManifestCommand::Annotate(_) | ManifestCommand::Rm(_) => &none,
    };
    let registries = registries(&Config::read()?, flags);
    let lists = Lists::new(&session.engine, &registries, &session.cancel);
    match command {
        ManifestCommand::Create(args) => {
            lists.create(&args.list, &args.images, args.amend)?;
            print(&format!("{}\n", args.list.familiar()))?;
        }
        ManifestCommand::Inspect(args) => {
            let json = lists.inspect(&args.name)?;
            let value: serde_json::Value = serde_json::from_slice(&json)
                .map_err(|error| Failure::store(format!("{}: {error}", args.name.familiar())))?;
            print(&format!("{value:#}\n"))?;
        }
        ManifestCommand::Annotate(args) => {
            let mut change = Annotate {
                os: args.os.clone(),
                arch: args.arch.clone(),
                variant: args.variant.clone(),
                os_version: args.os_version.clone(),
                os_features: args.os_features.clone(),
                ..Annotate::default()
            };
            for text in &args.annotation {
                let Some((name, value)) = text.split_once('=').filter(|(name, _)| !name.is_empty()) else {
                    return Err(Failure::usage(format!("--annotation {text:?} is not NAME=VALUE")));
                };
                change.annotations.insert(name.to_owned(), value.to_owned());
            }
            let platform = [&args.os, &args.arch, &args.variant, &args.os_version];
            if args.image.is_none()
                && (platform.iter().any(|part| part.is_some()) || !args.os_features.is_empty())
            {
                return Err(Failure::usage("a platform is an image's: name the image behind the list"));
            }
            lists.annotate(&args.list, args.image.as_ref(), &change)?;
        }
        ManifestCommand::Push(args) => {
            let (digest, copied) = lists.push(&args.list, args.to.as_ref())?;
            if args.purge {
                lists.remove(&args.list)?;
            }
            let name = args.to.as_ref().unwrap_or(&args.list).familiar();
            let (blobs, bytes) = copied.sent;
            print(&match args.quiet {
                true => format!("{digest}\n"),
                false => format!(
                    "pushed {name} ({blobs} blobs copied, {}, {} mounted)\ndigest {digest}\n",
                    human_size(bytes),
                    copied.mounted
                ),
            })?;
        }
        ManifestCommand::Referrers(args) => {
            let place = place(&args.name)?;
            let which = args.platform.clone().map_or(WhichImage::All, WhichImage::Platform);
            let found = referrers(&session.engine, &registries, (&place, &which), &session.cancel);
            tell_notes(&registries);
            print(&shown(args, found?))?;
        }
        ManifestCommand::Rm(args) => {
            for list in &args.lists {
                lists.remove(list)?;
            }
        }
    }
    Ok(0)
}

/// Where an image is that something may refer to; a name alone is one of a registry.
fn place(text: &str) -> Result<Place, Failure> {
    match End::parse(text)? {
        End::Outside(Place::Docker(..)) => {
            Err(Failure::usage("a docker archive has nothing that refers to its images"))
        }
        End::Outside(place) => Ok(place),
        End::Store(name) => match name.parse() {
            Ok(name) => Ok(Place::Registry(name)),
            Err(error) => Err(Failure::usage(format!("{name:?}: {error}"))),
        },
    }
}

fn shown(args: &ManifestReferrersArgs, mut found: Referrers) -> String {
    if let Some(kind) = &args.artifact_type {
        found.referrers.retain(|referrer| artifact_type(&referrer.descriptor) == kind);
    }
    let (name, subject) = (&args.name, found.subject);
    match args.format {
        Format::Json => {
            let referrers: Vec<Value> = found.referrers.iter().map(as_json).collect();
            format!("{:#}\n", json!({ "name": name, "digest": subject, "referrers": referrers }))
        }
        Format::Table if found.referrers.is_empty() => format!("nothing refers to {subject}\n"),
        Format::Table => {
            let mut out = format!("{subject}\n");
            draw(&found.referrers, "", &mut out);
            out
        }
    }
}

/// Its descriptor, and what refers to it in its turn.
fn as_json(referrer: &Referrer) -> Value {
    let mut value = json!(referrer.descriptor);
    value["referrers"] = referrer.referrers.iter().map(as_json).collect();
    value
}

fn draw(all: &[Referrer], indent: &str, out: &mut String) {
    for (nth, Referrer { descriptor, referrers }) in all.iter().enumerate() {
        let (mark, more) = if nth + 1 == all.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        // A list need not say what its entries are.
        let kind = match artifact_type(descriptor) {
            "" => &descriptor.media_type,
            kind => kind,
        };
        let (kind, digest) = (escape::quoted(kind), descriptor.digest);
        out.push_str(&format!("{indent}{mark}{kind}  {digest}\n"));
        draw(referrers, &format!("{indent}{more}"), out);
    }
}

impl From<ListError> for Failure {
    fn from(error: ListError) -> Self {
        match error {
            ListError::Build(error) => error.into(),
            ListError::Exists { .. } => Failure::usage(error.to_string()).hint("`--amend` adds to it"),
            ListError::Missing { .. } => {
                Failure::source(error.to_string()).hint("`kiln manifest create` makes one")
            }
            ListError::File { path, source } => Failure::store(format!("{}: {source}", path.display())),
            error => Failure::usage(error.to_string()),
        }
    }
}
