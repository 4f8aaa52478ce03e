//! `RUN --mount=…`: its fields and what they mean together.

use kiln_llb::Sharing;

use crate::Diagnostic;
use crate::ast::{Instruction, Text};
use crate::suggest::did_you_mean;

/// `key[=value]`, and where the field stands in the flag's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) key: String,
    pub(crate) value: Option<String>,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// What a mount shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Type {
    Bind,
    Cache,
    Tmpfs,
    Secret,
    Ssh,
}

impl Type {
    const ALL: [(&'static str, Type); 5] = [
        ("bind", Type::Bind),
        ("cache", Type::Cache),
        ("tmpfs", Type::Tmpfs),
        ("secret", Type::Secret),
        ("ssh", Type::Ssh),
    ];

    fn name(self) -> &'static str {
        Type::ALL.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

/// A mount with its values expanded and checked; paths are as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountSpec {
    pub(crate) kind: Type,
    pub(crate) from: Option<String>,
    pub(crate) source: Option<String>,
    pub(crate) target: Option<String>,
    pub(crate) read_only: bool,
    pub(crate) required: bool,
    pub(crate) size_bytes: Option<u64>,
    pub(crate) id: Option<String>,
    pub(crate) sharing: Sharing,
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) env: Option<String>,
}

/// What is wrong, with the bytes of the flag's value it speaks of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountError {
    start: usize,
    end: usize,
    message: String,
    hint: Option<String>,
    refused: bool,
}

impl MountError {
    fn new(field: &Field, message: impl Into<String>) -> Self {
        Self { start: field.start, end: field.end, message: message.into(), hint: None, refused: false }
    }

    fn hint(mut self, hint: Option<String>) -> Self {
        self.hint = hint;
        self
    }

    /// As a diagnostic on the flag's value.
    pub(crate) fn at(self, instruction: &Instruction, value: &Text) -> Box<Diagnostic> {
        let span = instruction.part_span(value, self.start, self.end);
        let diagnostic = if self.refused {
            Diagnostic::refused(span, self.message)
        } else {
            Diagnostic::error(span, self.message)
        };
        Box::new(diagnostic.with_hint(self.hint))
    }
}

/// A key's canonical spelling, and which types take it.
const KEYS: [(&str, &str, &[Type]); 19] = {
    use Type::{Bind, Cache, Secret, Ssh, Tmpfs};
    const ALL: &[Type] = &[Bind, Cache, Tmpfs, Secret, Ssh];
    [
        ("type", "type", ALL),
        ("target", "target", ALL),
        ("dst", "target", ALL),
        ("destination", "target", ALL),
        ("source", "source", &[Bind, Cache, Secret, Ssh]),
        ("src", "source", &[Bind, Cache, Secret, Ssh]),
        ("from", "from", &[Bind, Cache]),
        ("readonly", "readonly", ALL),
        ("ro", "readonly", ALL),
        ("readwrite", "readwrite", ALL),
        ("rw", "readwrite", ALL),
        ("id", "id", &[Cache, Secret, Ssh]),
        ("sharing", "sharing", &[Cache]),
        ("size", "size", &[Tmpfs]),
        ("mode", "mode", &[Cache, Secret, Ssh]),
        ("uid", "uid", &[Cache, Secret, Ssh]),
        ("gid", "gid", &[Cache, Secret, Ssh]),
        ("required", "required", &[Secret, Ssh]),
        ("env", "env", &[Secret]),
    ]
};

/// Splits a mount's value at commas (CSV: a field in quotes may hold commas) and checks its keys.
pub(crate) fn fields(text: &str) -> Result<Vec<Field>, MountError> {
    let mut fields = Vec::new();
    for (start, end) in csv(text)? {
        let raw = &text[start..end];
        let unquoted =
            raw.strip_prefix('"').and_then(|raw| raw.strip_suffix('"')).map(|raw| raw.replace("\"\"", "\""));
        let raw = unquoted.as_deref().unwrap_or(raw);
        let (key, value) = match raw.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (raw, None),
        };
        let field = Field { key: key.trim().to_lowercase(), value, start, end };
        let Some((_, name, _)) = KEYS.iter().find(|(known, _, _)| *known == field.key) else {
            let key_only = Field { end: start + key.len().min(end - start), ..field.clone() };
            let hint = did_you_mean(&field.key, KEYS.iter().map(|(known, _, _)| *known));
            return Err(MountError::new(&key_only, format!("unknown mount option `{key}`")).hint(hint));
        };
        let bare = matches!(*name, "readonly" | "readwrite" | "required");
        if field.value.is_none() && !bare {
            let message = format!("mount option `{key}` needs a value, such as {key}=…");
            return Err(MountError::new(&field, message));
        }
        if *name == "from" && field.value.as_deref().is_some_and(|value| value.contains('$')) {
            let hint = "name a stage by `FROM $IMAGE AS name` and mount from it".to_owned();
            let message = "variables are not expanded in a mount's `from`";
            return Err(MountError::new(&field, message).hint(Some(hint)));
        }
        let again = fields.iter().any(|known: &(Field, &str)| known.1 == *name);
        if again {
            return Err(MountError::new(&field, format!("mount option `{name}` is given twice")));
        }
        fields.push((field, *name));
    }
    Ok(fields.into_iter().map(|(field, name)| Field { key: name.to_owned(), ..field }).collect())
}

fn csv(text: &str) -> Result<Vec<(usize, usize)>, MountError> {
    let (mut pieces, mut start, mut quoted) = (Vec::new(), 0, false);
    for (at, c) in text.char_indices() {
        match c {
            '"' if quoted || at == start => quoted = !quoted,
            ',' if !quoted => {
                pieces.push((start, at));
                start = at + 1;
            }
            _ => {}
        }
    }
    pieces.push((start, text.len()));
    let whole = Field { key: String::new(), value: None, start: 0, end: text.len() };
    if quoted {
        return Err(MountError::new(&whole, "a closing `\"` is missing"));
    }
    if let Some((start, end)) = pieces.iter().find(|(start, end)| start == end) {
        let place = Field { start: start.saturating_sub(1), end: (*end).max(1), ..whole };
        let hint = "one comma and no blank stands between options".to_owned();
        return Err(MountError::new(&place, "a mount option is empty").hint(Some(hint)));
    }
    Ok(pieces)
}

/// Makes sense of `fields`, whose values are expanded.
pub(crate) fn mount(fields: &[Field]) -> Result<MountSpec, MountError> {
    let first = fields.iter().find(|field| field.key == "type");
    let kind = match first {
        None => Type::Bind,
        Some(field) => {
            let value = field.value.as_deref().unwrap_or_default().to_lowercase();
            let known = Type::ALL.iter().find(|(name, _)| *name == value);
            let Some((_, kind)) = known else {
                let hint = did_you_mean(&value, Type::ALL.iter().map(|(name, _)| *name))
                    .or(Some("mount types are bind, cache, tmpfs, secret, ssh".to_owned()));
                return Err(MountError::new(field, format!("unknown mount type {value:?}")).hint(hint));
            };
            *kind
        }
    };
    let mut spec = MountSpec {
        kind,
        from: None,
        source: None,
        target: None,
        read_only: !matches!(kind, Type::Cache | Type::Tmpfs),
        required: false,
        size_bytes: None,
        id: None,
        sharing: Sharing::Shared,
        mode: None,
        uid: None,
        gid: None,
        env: None,
    };
    for field in fields {
        let takes =
            KEYS.iter().find(|(_, name, _)| *name == field.key).map_or(&[][..], |(_, _, types)| types);
        if !takes.contains(&kind) {
            let message = format!("mount option `{}` is not for type={}", field.key, kind.name());
            return Err(MountError::new(field, message));
        }
        apply(&mut spec, field)?;
    }
    together(&spec, fields)?;
    Ok(spec)
}

fn apply(spec: &mut MountSpec, field: &Field) -> Result<(), MountError> {
    let value = field.value.as_deref().unwrap_or_default();
    let wrong = |expected: &str| {
        Err(MountError::new(field, format!("mount option {}={value}: {expected}", field.key)))
    };
    let text = || Some(value.to_owned()).filter(|value| !value.is_empty());
    let switch = || match field.value.as_deref() {
        None | Some("true" | "1" | "t" | "T" | "TRUE" | "True") => Some(true),
        Some("false" | "0" | "f" | "F" | "FALSE" | "False") => Some(false),
        Some(_) => None,
    };
    match field.key.as_str() {
        "target" => spec.target = text(),
        "source" => spec.source = text(),
        "from" => spec.from = text(),
        "id" => spec.id = text(),
        "env" => {
            if value.is_empty() || value.contains(['=', '\0']) {
                return wrong("the name of a variable is expected");
            }
            spec.env = text();
        }
        "readonly" | "readwrite" | "required" => {
            let Some(on) = switch() else { return wrong("true or false is expected") };
            match field.key.as_str() {
                "readonly" => spec.read_only = on,
                "readwrite" => spec.read_only = !on,
                _ => spec.required = on,
            }
        }
        "sharing" => {
            spec.sharing = match value.to_lowercase().as_str() {
                "shared" => Sharing::Shared,
                "private" => Sharing::Private,
                "locked" => Sharing::Locked,
                other => {
                    let hint = did_you_mean(other, ["shared", "private", "locked"]);
                    let message = format!("unknown sharing {value:?}: shared, private or locked is expected");
                    return Err(MountError::new(field, message).hint(hint));
                }
            };
        }
        "size" => match size(value) {
            Some(bytes) => spec.size_bytes = Some(bytes),
            None => return wrong("a size like 64m or 1g is expected"),
        },
        "mode" => match u32::from_str_radix(value, 8) {
            Ok(mode) if mode <= 0o7777 => spec.mode = Some(mode),
            _ => return wrong("an octal mode up to 07777 is expected"),
        },
        "uid" | "gid" => match value.parse::<u32>() {
            // (uid_t) -1 means "no change" to the kernel (chown(2)).
            Ok(id) if id < u32::MAX => {
                let slot = if field.key == "uid" { &mut spec.uid } else { &mut spec.gid };
                *slot = Some(id);
            }
            _ => return wrong("a number from 0 to 4294967294 is expected"),
        },
        _ => {}
    }
    Ok(())
}

/// What fields must or must not stand together.
fn together(spec: &MountSpec, fields: &[Field]) -> Result<(), MountError> {
    let end = fields.last().map_or(0, |field| field.end);
    let whole = Field { key: String::new(), value: None, start: 0, end };
    let find = |key: &str| fields.iter().find(|field| field.key == key).unwrap_or(&whole);
    match spec.kind {
        Type::Bind | Type::Cache | Type::Tmpfs if spec.target.is_none() => {
            let message = format!("a mount of type={} needs a target", spec.kind.name());
            let hint = "add target=/path".to_owned();
            return Err(MountError::new(&whole, message).hint(Some(hint)));
        }
        Type::Secret if spec.source.is_none() && spec.target.is_none() && spec.id.is_none() => {
            let hint = "add id=NAME".to_owned();
            return Err(
                MountError::new(&whole, "a mount of type=secret needs an id or a target").hint(Some(hint))
            );
        }
        Type::Secret if spec.source.is_some() && spec.id.is_some() => {
            return Err(MountError::new(find("source"), "a secret has either an id or a source, not both"));
        }
        _ => {}
    }
    let Some(target) = &spec.target else { return Ok(()) };
    if target.contains('\0') {
        return Err(MountError::new(find("target"), "a path cannot hold a NUL byte"));
    }
    Ok(())
}

/// Refuses targets that the sandbox itself needs. `target` is absolute and clean.
pub(crate) fn check_target(target: &str, fields: &[Field]) -> Result<(), MountError> {
    let below =
        |dir: &str| target.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let refused = target == "/"
        || below("/proc")
        || below("/sys")
        || (below("/dev") && !target.starts_with("/dev/shm/") && target != "/dev/shm");
    if !refused {
        return Ok(());
    }
    let end = fields.last().map_or(0, |field| field.end);
    let whole = Field { key: String::new(), value: None, start: 0, end };
    let field = fields.iter().find(|field| field.key == "target").unwrap_or(&whole);
    let message = format!("nothing can be mounted at {target}: the sandbox needs it");
    Err(MountError { refused: true, ..MountError::new(field, message) })
}

/// `64m`, `1.5g`, `100KB`, `1GiB`: bytes, in powers of 1024 as docker counts memory.
fn size(text: &str) -> Option<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let unit = unit.trim_start();
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" if !unit.starts_with('i') => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return None,
    };
    if number.is_empty() || number.starts_with('.') || unit.len() > 3 {
        return None;
    }
    let bytes = number.parse::<f64>().ok()? * (1u64 << shift) as f64;
    (bytes < i64::MAX as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<MountSpec, String> {
        fields(text).and_then(|fields| mount(&fields)).map_err(|error| error.message)
    }

    #[test]
    fn fields_make_a_mount() {
        let spec = read("type=cache,target=/root/.cache,sharing=locked,mode=0700,uid=5,ro").unwrap();
        assert_eq!((spec.kind, spec.sharing, spec.mode), (Type::Cache, Sharing::Locked, Some(0o700)));
        assert!(spec.read_only && spec.uid == Some(5));
        let spec = read("required,TYPE=secret,id=x,env=TOKEN").unwrap();
        assert!(spec.required && spec.env.as_deref() == Some("TOKEN"));
        assert!(!read("target=/x,rw").unwrap().read_only);
        assert_eq!(read("type=tmpfs,\"target=/a,b\",size=1.5k").unwrap().target.as_deref(), Some("/a,b"));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("type=bnd,target=/x", "unknown mount type"),
            ("target=/x,bind-propagation=shared", "unknown mount option `bind-propagation`"),
            ("type=bind", "needs a target"),
            ("type=bind,target=/x,mode=0777", "not for type=bind"),
            ("type=cache,target=/x,mode=0777777", "octal mode"),
            ("type=cache,target=/x,uid=-1", "a number from 0"),
            ("type=tmpfs,target=/x,size=1e99", "a size like"),
            ("type=secret", "needs an id or a target"),
            ("type=cache,target=/x,sharing=lokced", "unknown sharing"),
            ("type=cache,target", "needs a value"),
            ("target=/x,dst=/y", "given twice"),
            ("target=/x,from=$X", "not expanded"),
            ("target=/x,,ro", "empty"),
            ("target=/x,ro=maybe", "true or false"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_sandboxes_own_places_are_refused() {
        for target in ["/", "/proc", "/proc/self", "/sys", "/dev/null", "/dev"] {
            assert!(check_target(target, &[]).is_err(), "{target}");
        }
        for target in ["/dev/shm", "/dev/shm/x", "/process", "/x"] {
            assert!(check_target(target, &[]).is_ok(), "{target}");
        }
    }

    #[test]
    fn sizes_are_read_as_in_docker() {
        for (text, bytes) in [("64", 64), ("1k", 1024), ("1.5k", 1536), ("2MB", 2 << 20), ("1GiB", 1 << 30)] {
            assert_eq!(size(text), Some(bytes), "{text}");
        }
        for text in ["", "m", "1x", "1e99", "-1", "1ib", "99999999999p"] {
            assert_eq!(size(text), None, "{text}");
        }
    }
}
