//! `kiln volume …`

use std::collections::BTreeMap;

use kiln_containers::{Error, Volume, Volumes, user_of};
use kiln_snapshotter::disk_bytes;
use serde_json::{Value, json};

use super::config::volume_name;
use super::ps::{pattern, wrong_format};
use super::remove::ask;
use super::{each, inspect};
use crate::args::containers::{InspectArgs, VolumeArgs, VolumeCommand};
use crate::commands::{human_size, print};
use crate::errors::Failure;
use crate::session::Session;
use crate::template::Listing;

pub(crate) fn run(session: &Session, args: &VolumeArgs) -> Result<u8, Failure> {
    let volumes = Volumes::open(session.containers.root());
    match &args.command {
        VolumeCommand::Create { driver, opt, label, name } => {
            if driver != "local" {
                return Err(Failure::usage(format!("--driver {driver}: there is only `local`")));
            }
            if let Some(option) = opt.first() {
                return Err(Failure::usage(format!("--opt {option}: volumes are directories in the store"))
                    .hint("what is mounted on the host is shown inside with `-v PATH:INSIDE`"));
            }
            let pair = |label: &String| {
                let (name, value) = label.split_once('=').unwrap_or((label, ""));
                (name.to_owned(), value.to_owned())
            };
            let labels: BTreeMap<String, String> = label.iter().map(pair).collect();
            let name = name.clone().map_or_else(volume_name, Ok)?;
            if !kiln_containers::is_name(&name) {
                return Err(Failure::usage(format!("{name:?} is no name for a volume")));
            }
            volumes.create(&name, &labels, false)?;
            print(&format!("{name}\n"))?;
            Ok(0)
        }
        VolumeCommand::List { quiet, filter, format } => {
            list(session, &volumes, *quiet, filter, format.as_deref())
        }
        VolumeCommand::Inspect { format, names } => {
            let args = InspectArgs { format: format.clone(), kind: None, size: false, names: names.clone() };
            inspect::show(&args, |name| document(&volumes, name))
        }
        VolumeCommand::Rm { force, names } => {
            each(names, |name| match volumes.remove(name, &session.containers) {
                Err(Error::NoVolume { .. }) if *force => Ok(()),
                other => Ok(other?),
            })
        }
        VolumeCommand::Prune { force, all } => prune(session, &volumes, *force, *all),
    }
}

pub(super) fn document(volumes: &Volumes, name: &str) -> Result<Value, Failure> {
    let volume = volumes.find(name)?;
    Ok(json!({
        "CreatedAt": volume.created.to_string(),
        "Driver": "local",
        "Labels": volume.labels,
        "Mountpoint": volumes.data(name)?,
        "Name": volume.name,
        "Options": null,
        "Scope": "local",
    }))
}

fn list(
    session: &Session,
    volumes: &Volumes,
    quiet: bool,
    filters: &[String],
    format: Option<&str>,
) -> Result<u8, Failure> {
    let listing = Listing::parse(format, "{{.Driver}}\t{{.Name}}").map_err(wrong_format)?;
    let mut entries = Vec::new();
    for volume in volumes.list()? {
        if !fits(session, &volume, filters)? {
            continue;
        }
        let labels = volume.labels.iter().map(|(name, value)| format!("{name}={value}"));
        entries.push(json!({
            "Driver": "local",
            "Name": volume.name,
            "Labels": labels.collect::<Vec<_>>().join(","),
            "_Labels": volume.labels,
            "Mountpoint": volumes.data(&volume.name)?,
            "Scope": "local",
        }));
    }
    if quiet {
        let names = entries.iter().map(|entry| format!("{}\n", entry["Name"].as_str().unwrap_or_default()));
        print(&names.collect::<String>())?;
        return Ok(0);
    }
    let headers = json!({
        "Driver": "DRIVER", "Name": "VOLUME NAME", "Labels": "LABELS", "Mountpoint": "MOUNTPOINT",
        "Scope": "SCOPE",
    });
    print(&listing.render(&headers, &entries).map_err(wrong_format)?)?;
    Ok(0)
}

fn fits(session: &Session, volume: &Volume, filters: &[String]) -> Result<bool, Failure> {
    for text in filters {
        let wrong = |reason: &str| Failure::usage(format!("--filter {text}: {reason}"));
        let (what, value) = text.split_once('=').ok_or_else(|| wrong("it is not WHAT=VALUE"))?;
        let fits = match what {
            "name" => pattern(value).map_err(|reason| wrong(&reason))?.is_match(&volume.name),
            "label" => match value.split_once('=') {
                Some((name, value)) => volume.labels.get(name).is_some_and(|known| known == value),
                None => volume.labels.contains_key(value),
            },
            "dangling" => {
                let unused = user_of(&volume.name, &session.containers)?.is_none();
                matches!(value, "true" | "1") == unused
            }
            _ => return Err(wrong("there are name, label and dangling")),
        };
        if !fits {
            return Ok(false);
        }
    }
    Ok(true)
}

fn prune(session: &Session, volumes: &Volumes, force: bool, all: bool) -> Result<u8, Failure> {
    let what = if all { "all volumes" } else { "the volumes without a name" };
    if !force && !ask(&format!("WARNING! This will remove {what} that no container has."))? {
        return Ok(0);
    }
    let (mut removed, mut freed) = (String::new(), 0);
    for volume in volumes.list()?.iter().filter(|volume| all || volume.anonymous) {
        // One that goes meanwhile takes nothing any more.
        let data = volumes.data(&volume.name).ok();
        let bytes = data.and_then(|data| disk_bytes(&data).ok()).unwrap_or(0);
        match volumes.remove(&volume.name, &session.containers) {
            Ok(()) => {
                removed.push_str(&format!("{}\n", volume.name));
                freed += bytes;
            }
            Err(Error::VolumeInUse { .. } | Error::NoVolume { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if !removed.is_empty() {
        print(&format!("Deleted Volumes:\n{removed}\n"))?;
    }
    print(&format!("Total reclaimed space: {}\n", human_size(freed)))?;
    Ok(0)
}
