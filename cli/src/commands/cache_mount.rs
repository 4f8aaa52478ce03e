//! `kiln cache-mount`

use std::time::{SystemTime, UNIX_EPOCH};

use kiln_build::export::Dest;
use kiln_build::{
    BuildError, CacheMountImport, CacheMountInfo, cache_mount_bytes, cache_mount_users, cache_mounts,
    export_cache_mount, find_cache_mounts, import_cache_mount, remove_cache_mount,
};
use serde_json::json;

use super::images::matches;
use super::save::write_to;
use super::{ago, human_size, print, table};
use crate::args::cache_mount::{CacheMountCommand, ImportArgs, LsArgs, RmArgs};
use crate::args::store::{Format, parse_duration};
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, command: CacheMountCommand) -> Result<u8, Failure> {
    match command {
        CacheMountCommand::Ls(args) => ls(session, &args),
        CacheMountCommand::Rm(args) => rm(session, &args),
        CacheMountCommand::Export(args) => {
            let dest = args.output.as_deref().map(|path| Dest::parse(&path.to_string_lossy()));
            write_to(session, dest, args.output.as_deref(), "a cache mount", &mut |target| {
                export_cache_mount(&session.engine, &args.id, target.path, target.out, &session.cancel)
            })
        }
        CacheMountCommand::Import(args) => import(session, args),
    }
}

fn all(session: &Session) -> Result<Vec<CacheMountInfo>, Failure> {
    let root = session.engine.store.root();
    let mut mounts = cache_mounts(root).map_err(|source| {
        Failure::from(BuildError::Unreadable { path: root.join("cache-mounts"), source })
    })?;
    mounts.sort_by_key(|mount| std::cmp::Reverse(mount.record.last_used_unix));
    Ok(mounts)
}

fn filtered(session: &Session, filters: &[String]) -> Result<Vec<CacheMountInfo>, Failure> {
    let filters = filters.iter().map(|text| Filter::parse(text)).collect::<Result<Vec<_>, _>>()?;
    let mut mounts = all(session)?;
    mounts.retain(|mount| filters.iter().all(|filter| filter.fits(mount)));
    Ok(mounts)
}

fn ls(session: &Session, args: &LsArgs) -> Result<u8, Failure> {
    let mounts = filtered(session, &args.filter)?;
    let name = |mount: &CacheMountInfo| {
        if args.no_trunc { mount.name.clone() } else { mount.short().to_owned() }
    };
    if args.quiet {
        print(&mounts.iter().map(|mount| name(mount) + "\n").collect::<String>())?;
        return Ok(0);
    }
    let root = session.engine.store.root();
    let users = cache_mount_users(root, &mounts);
    let head = ["CACHE MOUNT", "ID", "SIZE", "LAST USED", "SHARED BY"].map(str::to_owned).to_vec();
    let (mut rows, mut lines) = (vec![head], String::new());
    for (mount, users) in mounts.iter().zip(users) {
        let bytes = cache_mount_bytes(root, mount)?;
        let shared = match users {
            0 => "-".to_owned(),
            1 => "1 step".to_owned(),
            several => format!("{several} steps"),
        };
        // An ID comes from a Dockerfile, and may hold anything.
        let id: String = mount.record.id.chars().flat_map(shown).collect();
        rows.push(vec![name(mount), id, human_size(bytes), ago(mount.record.last_used_unix), shared]);
        let object = json!({
            "Name": mount.name,
            "ID": mount.record.id,
            "DiskBytes": bytes,
            "Size": human_size(bytes),
            "CreatedAt": mount.record.created_unix,
            "LastUsedAt": mount.record.last_used_unix,
            "LastUsedSince": ago(mount.record.last_used_unix),
            "InUse": mount.in_use,
            "SharedBy": users,
        });
        lines.push_str(&format!("{object}\n"));
    }
    print(&match args.format {
        Format::Json => lines,
        Format::Table => table(&rows),
    })?;
    Ok(0)
}

fn shown(c: char) -> Vec<char> {
    if c.is_control() { c.escape_default().collect() } else { vec![c] }
}

fn rm(session: &Session, args: &RmArgs) -> Result<u8, Failure> {
    let root = session.engine.store.root();
    let mounts = if args.all { all(session)? } else { filtered(session, &args.filter)? };
    let doomed: Vec<&CacheMountInfo> = if args.ids.is_empty() {
        mounts.iter().collect()
    } else {
        let found = args.ids.iter().map(|id| find_cache_mounts(&mounts, id));
        let mut found: Vec<_> = found.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
        found.sort_by(|one, other| one.name.cmp(&other.name));
        found.dedup_by(|one, other| one.name == other.name);
        found
    };
    // Those that can go do; the first that cannot is what the command ends with.
    let mut refused = None;
    for mount in doomed {
        let id = mount.record.id.clone();
        match remove_cache_mount(root, &mount.name) {
            Ok(true) => print(&format!("removed cache mount {} {id}\n", mount.short()))?,
            Ok(false) => drop(refused.get_or_insert(BuildError::CacheMountInUse { id })),
            Err(source) => drop(refused.get_or_insert(BuildError::CacheMount { id, source })),
        }
    }
    refused.map_or(Ok(0), |error| Err(error.into()))
}

fn import(session: &Session, args: ImportArgs) -> Result<u8, Failure> {
    let ImportArgs { id, source, force, mode, uid, gid, limits: _ } = args;
    if id.is_empty() {
        return Err(Failure::usage("a cache mount needs an ID"));
    }
    let import = CacheMountImport { id, source, mode, uid, gid, force };
    let mount = import_cache_mount(&session.engine, &import, &session.cancel)?;
    print(&format!("{}\n", mount.short()))?;
    Ok(0)
}

/// `--filter`
enum Filter {
    Id(String),
    /// Not used since, in seconds since 1970.
    UnusedSince(i64),
    InUse(bool),
}

impl Filter {
    fn parse(text: &str) -> Result<Self, Failure> {
        let wrong = |reason: &str| Failure::usage(format!("--filter {text}: {reason}"));
        let (what, value) = text.split_once('=').ok_or_else(|| wrong("it is not WHAT=VALUE"))?;
        Ok(match what {
            "id" => Self::Id(value.to_owned()),
            "until" => {
                let unused = parse_duration(value).map_err(|reason| wrong(&reason))?;
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let then = now.saturating_sub(unused).as_secs();
                Self::UnusedSince(i64::try_from(then).unwrap_or(i64::MAX))
            }
            "in-use" => Self::InUse(match value {
                "true" | "1" => true,
                "false" | "0" => false,
                _ => return Err(wrong("it takes true or false")),
            }),
            _ => return Err(wrong("there are id, until and in-use")),
        })
    }

    fn fits(&self, mount: &CacheMountInfo) -> bool {
        match self {
            Self::Id(pattern) => matches(pattern.as_bytes(), mount.record.id.as_bytes()),
            Self::UnusedSince(unix) => !mount.in_use && mount.record.last_used_unix <= *unix,
            Self::InUse(wanted) => mount.in_use == *wanted,
        }
    }
}
