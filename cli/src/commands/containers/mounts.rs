//! `-v` and `--mount`

use std::path::Path;

use kiln_containers::{MountKind, MountPoint, is_name};

use super::config::volume_name;
use crate::args::limits::bytes;
use crate::errors::Failure;

/// `[HOST|VOLUME:]INSIDE[:OPTIONS]`
pub(super) fn of_volume_flag(text: &str) -> Result<MountPoint, Failure> {
    let wrong = |reason: &str| Failure::usage(format!("--volume {text:?}: {reason}"));
    let parts: Vec<&str> = text.split(':').collect();
    let (source, inside, options) = match parts[..] {
        [inside] => (None, inside, ""),
        [source, inside] => (Some(source), inside, ""),
        [source, inside, options] => (Some(source), inside, options),
        _ => return Err(wrong("[HOST|VOLUME:]INSIDE[:ro] is expected")),
    };
    let (mut read_only, mut fill) = (false, true);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => read_only = true,
            "nocopy" => fill = false,
            // Labels are SELinux's affair, and mounts propagate nowhere.
            "rw" | "z" | "Z" | "rprivate" | "private" => {}
            _ => return Err(wrong("only ro, rw and nocopy may follow the path inside")),
        }
    }
    let inside = target(inside).map_err(|reason| wrong(&reason))?;
    let Some(source) = source else { return anonymous(inside, read_only, fill) };
    let kind = if source.contains('/') || source.starts_with('.') {
        let path = Path::new(source);
        // docker makes what is missing.
        if path.is_absolute() && !path.exists() {
            std::fs::create_dir_all(path).map_err(|error| wrong(&format!("{source}: {error}")))?;
        }
        MountKind::Bind(path.canonicalize().map_err(|error| wrong(&format!("{source}: {error}")))?)
    } else if is_name(source) {
        MountKind::Volume { name: source.to_owned(), anonymous: false, fill }
    } else {
        return Err(wrong("it is neither a path nor a volume's name"));
    };
    Ok(MountPoint { kind, target: inside, read_only })
}

/// A volume of the container's own.
pub(super) fn anonymous(target: String, read_only: bool, fill: bool) -> Result<MountPoint, Failure> {
    let kind = MountKind::Volume { name: volume_name()?, anonymous: true, fill };
    Ok(MountPoint { kind, target, read_only })
}

/// `type=bind,source=…,target=…[,readonly]`
pub(super) fn of_mount_flag(text: &str) -> Result<MountPoint, Failure> {
    let wrong = |reason: &str| Failure::usage(format!("--mount {text:?}: {reason}"));
    let (mut kind, mut source, mut inside, mut read_only) = ("volume", None, None, false);
    let (mut size_bytes, mut mode, mut fill) = (None, DEFAULT_TMPFS_MODE, true);
    for setting in text.split(',') {
        let (name, value) = setting.split_once('=').unwrap_or((setting, "true"));
        match name {
            "type" => kind = value,
            "source" | "src" => source = Some(value),
            "target" | "dst" | "destination" => inside = Some(value),
            "readonly" | "ro" => read_only = yes(value).ok_or_else(|| wrong("readonly is true or false"))?,
            "volume-nocopy" => {
                fill = !yes(value).ok_or_else(|| wrong("volume-nocopy is true or false"))?;
            }
            "tmpfs-size" => size_bytes = Some(bytes(value).map_err(|reason| wrong(&reason))?),
            "tmpfs-mode" => mode = octal_mode(value).ok_or_else(|| wrong("tmpfs-mode is no mode"))?,
            "bind-propagation" if !matches!(value, "rprivate" | "private") => {
                return Err(wrong("mounts propagate nowhere: bind-propagation can only be rprivate"));
            }
            "bind-propagation" | "consistency" => {}
            _ => return Err(wrong(&format!("{name:?} is not known"))),
        }
    }
    let inside = target(inside.ok_or_else(|| wrong("it has no target"))?).map_err(|reason| wrong(&reason))?;
    let kind = match (kind, source) {
        ("bind", Some(source)) => {
            // Unlike -v, what is missing is an error.
            let path = Path::new(source).canonicalize();
            MountKind::Bind(path.map_err(|error| wrong(&format!("{source}: {error}")))?)
        }
        ("bind", None) => return Err(wrong("it has no source")),
        ("volume", None) => return anonymous(inside, read_only, fill),
        ("volume", Some(name)) if is_name(name) => {
            MountKind::Volume { name: name.to_owned(), anonymous: false, fill }
        }
        ("volume", Some(_)) => return Err(wrong("its source is no volume's name")),
        ("tmpfs", None) => MountKind::Tmpfs { size_bytes, mode: Some(mode), executable: false },
        ("tmpfs", Some(_)) => return Err(wrong("a tmpfs has no source")),
        _ => return Err(wrong("its type is none of bind, volume, tmpfs")),
    };
    Ok(MountPoint { kind, target: inside, read_only })
}

/// docker's own: anybody may write, nothing may be executed.
const DEFAULT_TMPFS_MODE: u32 = 0o1777;

/// `DIR[:OPTION,…]`
pub(super) fn of_tmpfs_flag(text: &str) -> Result<MountPoint, Failure> {
    let wrong = |reason: &str| Failure::usage(format!("--tmpfs {text:?}: {reason}"));
    let (inside, options) = text.split_once(':').unwrap_or((text, ""));
    let inside = target(inside).map_err(|reason| wrong(&reason))?;
    let (mut size_bytes, mut mode, mut executable, mut read_only) = (None, DEFAULT_TMPFS_MODE, false, false);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=').unwrap_or((option, "")) {
            ("size", size) => size_bytes = Some(bytes(size).map_err(|reason| wrong(&reason))?),
            ("mode", text) => {
                mode = octal_mode(text).ok_or_else(|| wrong(&format!("{option:?} is no mode")))?;
            }
            ("exec", "") => executable = true,
            ("noexec", "") => executable = false,
            ("ro", "") => read_only = true,
            // As it always is.
            ("rw" | "nosuid" | "nodev", "") => {}
            _ => {
                return Err(wrong(&format!("there is no option {option:?}; there are size, mode, exec, ro")));
            }
        }
    }
    let kind = MountKind::Tmpfs { size_bytes, mode: Some(mode), executable };
    Ok(MountPoint { kind, target: inside, read_only })
}

fn yes(value: &str) -> Option<bool> {
    match value {
        "true" | "1" => Some(true),
        "false" | "0" => Some(false),
        _ => None,
    }
}

fn octal_mode(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777)
}

/// Where something may be mounted.
pub(super) fn target(path: &str) -> Result<String, String> {
    let bad = !path.starts_with('/')
        || path.split('/').any(|part| part == "..")
        || path.trim_matches('/').is_empty();
    if bad {
        return Err("the path inside must be absolute, without `..`, and not `/`".to_owned());
    }
    kiln_executor::check_mount_target(path).map_err(|error| error.to_string())?;
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_say_what_is_mounted() {
        let shown = |mount: Result<MountPoint, Failure>| {
            mount.map_err(|error| error.render()).map(|mount| {
                let kind = match &mount.kind {
                    MountKind::Volume { anonymous: true, .. } => "anonymous".to_owned(),
                    MountKind::Volume { name, .. } => name.clone(),
                    MountKind::Bind(path) => path.display().to_string(),
                    MountKind::Tmpfs { size_bytes, mode, executable } => {
                        format!("tmpfs {size_bytes:?} {:o} {executable}", mode.unwrap_or(0))
                    }
                };
                format!("{kind} {} {}", mount.target, mount.read_only)
            })
        };
        assert_eq!(shown(of_volume_flag("/data")).unwrap(), "anonymous /data false");
        assert_eq!(shown(of_volume_flag("vol:/data:ro")).unwrap(), "vol /data true");
        assert_eq!(shown(of_volume_flag("/usr:/data")).unwrap(), "/usr /data false");
        assert_eq!(
            shown(of_mount_flag("type=tmpfs,dst=/t,tmpfs-size=1m")).unwrap(),
            "tmpfs Some(1048576) 1777 false /t false"
        );
        assert_eq!(shown(of_tmpfs_flag("/t:exec,mode=700,ro")).unwrap(), "tmpfs None 700 true /t true");
        assert!(of_tmpfs_flag("/t:odd").is_err());
        assert_eq!(shown(of_mount_flag("src=vol,target=/data,readonly")).unwrap(), "vol /data true");
        for bad in ["data", "a:b", "vol:/", "vol:/../x", "vol:/data:odd", "a:b:c:d"] {
            assert!(of_volume_flag(bad).is_err(), "{bad}");
        }
        for bad in ["target=/", "type=bind,target=/x", "type=odd,target=/x", "target=/x,odd=1", ""] {
            assert!(of_mount_flag(bad).is_err(), "{bad}");
        }
    }
}
