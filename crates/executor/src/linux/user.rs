//! `user[:group]` against a tree's own `/etc/passwd` and `/etc/group`.

use std::os::fd::BorrowedFd;

use super::paths::read_small;
use crate::ExecError;

/// Who a process runs as, or who owns a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserIds {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups out of `/etc/group`.
    pub groups: Vec<u32>,
    /// Home directory; `/` when the tree does not know the user.
    pub home: String,
}

/// Files beyond this size, and lines beyond [`MAX_LINE_BYTES`], are refused: they come from an image.
const MAX_FILE_BYTES: u64 = 1 << 20;
const MAX_LINE_BYTES: usize = 4096;

/// Looks `user[:group]` up in the tree below `root`, which is never left.
///
/// Numbers need no entry there. A user without a group gets the one in `/etc/passwd`, else 0.
///
/// # Errors
/// [`ExecError::BadUser`] with the reason.
pub fn resolve_user(root: BorrowedFd<'_>, user: &str) -> Result<UserIds, ExecError> {
    let bad = |reason: String| ExecError::BadUser { user: user.to_owned(), reason };
    let file = |path: &str| match read_small(root, path, MAX_FILE_BYTES) {
        Ok(bytes) => Ok(bytes.unwrap_or_default()),
        Err(errno) => Err(bad(format!("{path} in the image cannot be used ({errno})"))),
    };
    let (name, group) = match user.split_once(':') {
        None => (user, None),
        Some((_, "")) | Some(("", _)) => return Err(bad("a name is missing beside the colon".to_owned())),
        Some((name, group)) => (name, Some(group)),
    };
    // Numbers, and root, are known without these files: whoever has to mend them gets in.
    let known = |name: &str| name == "root" || matches!(id(name), Ok(Some(_)));
    let lenient = known(name) && group.is_none_or(known);
    let file = |path| if lenient { file(path).or_else(|_| Ok(Vec::new())) } else { file(path) };
    let (passwd, groups) = (file("/etc/passwd")?, file("/etc/group")?);
    let unknown_root = lenient && name == "root" && !lines(&passwd).any(|fields| fields[0] == "root");
    resolve(if unknown_root { "0" } else { name }, group, &passwd, &groups).map_err(bad)
}

/// Adds groups by name or number to a user's; names are looked up in the tree below `root`.
pub(super) fn add_groups(root: BorrowedFd<'_>, more: &[String], ids: &mut UserIds) -> Result<(), ExecError> {
    if more.is_empty() {
        return Ok(());
    }
    let file = read_small(root, "/etc/group", MAX_FILE_BYTES);
    for name in more {
        let bad = |reason: String| ExecError::BadUser { user: format!("--group-add {name}"), reason };
        let number = match id(name).map_err(bad)? {
            Some(number) => number,
            None => {
                let bytes =
                    file.as_ref().map_err(|errno| bad(format!("/etc/group cannot be used ({errno})")))?;
                group_number(bytes.as_deref().unwrap_or_default(), name).map_err(bad)?
            }
        };
        if !ids.groups.contains(&number) {
            ids.groups.push(number);
        }
    }
    Ok(())
}

fn resolve(name: &str, group: Option<&str>, passwd: &[u8], groups: &[u8]) -> Result<UserIds, String> {
    let number = id(name)?;
    let entry = lines(passwd).find(|fields| match number {
        Some(uid) => fields.get(2).and_then(|field| field.parse().ok()) == Some(uid),
        None => fields[0] == name,
    });
    let (uid, primary, login, home) = match &entry {
        Some(fields) if fields.len() >= 4 => {
            let uid = id(&fields[2])?.ok_or("its entry in /etc/passwd has no number")?;
            let gid = id(&fields[3])?.ok_or("its entry in /etc/passwd has no group number")?;
            (uid, gid, Some(fields[0].clone()), fields.get(5).cloned().unwrap_or_default())
        }
        _ => {
            let uid = number.ok_or_else(|| format!("no user {name:?} in the image's /etc/passwd"))?;
            (uid, 0, None, String::new())
        }
    };
    let gid = match group {
        None => primary,
        Some(group) => match id(group)? {
            Some(gid) => gid,
            None => group_number(groups, group)?,
        },
    };
    // docker: an explicit group replaces the supplementary ones.
    let groups = match (&login, group) {
        (Some(login), None) => supplementary(groups, login),
        _ => Vec::new(),
    };
    let home = if home.is_empty() { "/".to_owned() } else { home };
    Ok(UserIds { uid, gid, groups, home })
}

/// A number, `None` for a name; out of range is an error, never another user (CVE-2024-40635).
fn id(text: &str) -> Result<Option<u32>, String> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse::<u32>() {
        // The last value means "unchanged" to chown(2) and setuid(2).
        Ok(id) if id != u32::MAX => Ok(Some(id)),
        _ => Err(format!("{text} is out of range (0 to 4294967294)")),
    }
}

fn lines(file: &[u8]) -> impl Iterator<Item = Vec<String>> + '_ {
    file.split(|&b| b == b'\n')
        .filter(|line| !line.is_empty() && line.len() <= MAX_LINE_BYTES && line[0] != b'#')
        .map(|line| String::from_utf8_lossy(line).trim_end().split(':').map(str::to_owned).collect())
}

fn group_number(groups: &[u8], name: &str) -> Result<u32, String> {
    let entry = lines(groups).find(|fields| fields[0] == name);
    let field = entry.and_then(|fields| fields.get(2).cloned());
    let field = field.ok_or_else(|| format!("no group {name:?} in the image's /etc/group"))?;
    id(&field)?.ok_or_else(|| format!("group {name:?} has no number in /etc/group"))
}

fn supplementary(groups: &[u8], login: &str) -> Vec<u32> {
    let member =
        |fields: &Vec<String>| fields.get(3).is_some_and(|list| list.split(',').any(|name| name == login));
    lines(groups)
        .filter(member)
        .filter_map(|fields| fields.get(2).and_then(|field| id(field).ok().flatten()))
        // NGROUPS_MAX is 65536; no real image comes near.
        .take(1024)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n";
    const GROUP: &[u8] = b"root:x:0:\napp:x:1001:\naudio:x:29:other,app\n";

    fn check(user: &str, expected: Result<(u32, u32, &[u32]), &str>) {
        let (name, group) = match user.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (user, None),
        };
        match (resolve(name, group, PASSWD, GROUP), expected) {
            (Ok(ids), Ok((uid, gid, groups))) => {
                assert_eq!((ids.uid, ids.gid, ids.groups.as_slice()), (uid, gid, groups), "{user}");
            }
            (Err(reason), Err(part)) => assert!(reason.contains(part), "{user}: {reason}"),
            (got, expected) => panic!("{user}: {got:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn names_and_numbers_are_looked_up_in_the_tree() {
        check("app", Ok((1000, 1001, &[29])));
        check("1000", Ok((1000, 1001, &[29])));
        check("app:audio", Ok((1000, 29, &[])));
        check("2000", Ok((2000, 0, &[])));
        check("2000:3000", Ok((2000, 3000, &[])));
        check("0", Ok((0, 0, &[])));
    }

    #[test]
    fn what_is_no_user_never_becomes_root() {
        check("nobody", Err("no user \"nobody\""));
        check("4294967296", Err("out of range"));
        check("4294967295", Err("out of range"));
        check("-1", Err("out of range"));
        check("0x0", Err("no user \"0x0\""));
        check(" 0", Err("no user \" 0\""));
        check("app:4294967295", Err("out of range"));
        check("app:nogroup", Err("no group"));
    }
}
