//! Extended attributes with which trees are marked: overlayfs's own, and what a user's files cannot be.

use std::sync::OnceLock;

/// Whether overlayfs is mounted with `userxattr` here: in a user namespace nobody may write
/// `trusted.*`, which take CAP_SYS_ADMIN on the host. Looked up once, so not to be asked before a
/// process has entered its namespace.
pub fn uses_user_attributes() -> bool {
    static USER: OnceLock<bool> = OnceLock::new();
    *USER.get_or_init(|| {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        is_part(&map)
    })
}

/// Whether a map of ids is not that of the host, which has all of them.
fn is_part(map: &str) -> bool {
    let mut lines = map.lines().map(|line| line.split_whitespace().nth(2));
    match (lines.next(), lines.next()) {
        (None | Some(None), _) => false,
        (Some(Some(count)), None) => count != "4294967295",
        (Some(_), Some(_)) => true,
    }
}

/// The attribute of a directory that hides what lower layers have in it, when it is `y`.
pub fn opaque_attribute() -> &'static str {
    if uses_user_attributes() { "user.overlay.opaque" } else { "trusted.overlay.opaque" }
}

/// The attribute of what may have been copied up.
pub(crate) fn origin_attribute() -> &'static str {
    if uses_user_attributes() { "user.overlay.origin" } else { "trusted.overlay.origin" }
}

/// Whether this process has one id only and can give no file another owner. Looked up once, as
/// [`uses_user_attributes`].
pub fn has_single_id() -> bool {
    static SINGLE: OnceLock<bool> = OnceLock::new();
    *SINGLE.get_or_init(|| {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        ["/proc/self/uid_map", "/proc/self/gid_map"].iter().any(|path| is_single(&read(path)))
    })
}

fn is_single(map: &str) -> bool {
    let mut lines = map.lines();
    lines.next().is_some_and(|line| line.split_whitespace().nth(2) == Some("1")) && lines.next().is_none()
}

/// How trees are marked here, as a number to keep beside one: what was made with another is made otherwise.
pub fn marking() -> u8 {
    u8::from(uses_user_attributes()) | u8::from(has_single_id()) << 1
}

/// The ids of a namespace, as its maps have them: first and last of each part.
struct Ids {
    users: Vec<(u32, u32)>,
    groups: Vec<(u32, u32)>,
}

impl Ids {
    fn own() -> &'static Ids {
        static OWN: OnceLock<Ids> = OnceLock::new();
        OWN.get_or_init(|| {
            let read = |path: &str| parts(&std::fs::read_to_string(path).unwrap_or_default());
            Ids { users: read("/proc/self/uid_map"), groups: read("/proc/self/gid_map") }
        })
    }

    fn each(&self, owner: (u32, u32), choose: impl Fn(&[(u32, u32)], u32) -> u32) -> (u32, u32) {
        (choose(&self.users, owner.0), choose(&self.groups, owner.1))
    }

    /// The owner that a file is given for this one: the last id stands for those beyond the range.
    fn givable(&self, owner: (u32, u32)) -> (u32, u32) {
        self.each(owner, |parts, id| match parts {
            [] => id,
            _ if parts.iter().any(|(first, last)| (*first..=*last).contains(&id)) => id,
            _ => last(parts),
        })
    }
}

/// The parts of a map; one that makes no sense is left out.
fn parts(map: &str) -> Vec<(u32, u32)> {
    let part = |line: &str| {
        let mut fields = line.split_whitespace();
        let (first, count): (u32, u32) = (fields.next()?.parse().ok()?, fields.nth(1)?.parse().ok()?);
        Some((first, first.checked_add(count.checked_sub(1)?)?))
    };
    map.lines().filter_map(part).collect()
}

fn last(parts: &[(u32, u32)]) -> u32 {
    parts.iter().map(|(_, last)| *last).max().unwrap_or(0)
}

/// The owner that the kernel is told for this one. What differs has to be put on record, and is true as
/// long as the file has it: a `chown` in a container takes it away.
pub(crate) fn givable(owner: (u32, u32)) -> (u32, u32) {
    if uses_user_attributes() { Ids::own().givable(owner) } else { owner }
}

/// The true owner of what the kernel says is `owner`'s and what has `record`.
pub(crate) fn true_owner(owner: (u32, u32), record: Record) -> (u32, u32) {
    if has_single_id() {
        return record.owner;
    }
    let ids = Ids::own();
    let one = |parts: &[(u32, u32)], id, known| if id == last(parts) { known } else { id };
    (one(&ids.users, owner.0, record.owner.0), one(&ids.groups, owner.1, record.owner.1))
}

/// Gives an open file or directory to an owner: in truth, or on record where the id cannot be given.
///
/// # Errors
/// The kernel's.
pub fn give(fd: std::os::fd::BorrowedFd<'_>, owner: (u32, u32)) -> std::io::Result<()> {
    crate::node::give(fd, owner).map_err(|error| error.errno.into())
}

/// Gives an open directory the owner that another one has on record.
///
/// # Errors
/// The kernel's.
pub fn copy_record(
    from: std::os::fd::BorrowedFd<'_>,
    to: std::os::fd::BorrowedFd<'_>,
) -> std::io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    let xattrs = crate::node::xattrs_of(from).map_err(|error| std::io::Error::from(error.errno))?;
    let record = xattrs.get(RECORD.as_bytes()).and_then(|value| Record::parse(value));
    record.map_or(Ok(()), |record| give(to, true_owner((stat.st_uid, stat.st_gid), record)))
}

/// The attribute of a user's file or directory that says what it is in truth, where the kernel cannot:
/// `UID:GID`, or
/// `UID:GID:c:MAJOR:MINOR` (`b` for a block device) for a file that stands for a device.
pub(crate) const RECORD: &str = "user.kiln.stat";

/// What a file is in truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) owner: (u32, u32),
    /// It is a device: whether a block device, and its numbers.
    pub(crate) device: Option<(bool, u32, u32)>,
}

impl Record {
    /// What an attribute says; `None` when it makes no sense.
    pub(crate) fn parse(value: &[u8]) -> Option<Self> {
        let fields: Vec<&str> = std::str::from_utf8(value).ok()?.split(':').collect();
        let number = |text: &str| text.parse::<u32>().ok();
        match fields.as_slice() {
            [uid, gid] => Some(Self { owner: (number(uid)?, number(gid)?), device: None }),
            [uid, gid, kind @ ("b" | "c"), major, minor] => Some(Self {
                owner: (number(uid)?, number(gid)?),
                device: Some((*kind == "b", number(major)?, number(minor)?)),
            }),
            _ => None,
        }
    }

    pub(crate) fn to_value(self) -> Vec<u8> {
        let (uid, gid) = self.owner;
        match self.device {
            None => format!("{uid}:{gid}"),
            Some((block, major, minor)) => {
                format!("{uid}:{gid}:{}:{major}:{minor}", if block { "b" } else { "c" })
            }
        }
        .into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_as_they_were_written() {
        let file = Record { owner: (1000, 4_294_967_294), device: None };
        let device = Record { owner: (0, 5), device: Some((false, 5, 1)) };
        for (record, value) in [(file, "1000:4294967294"), (device, "0:5:c:5:1")] {
            assert_eq!(record.to_value(), value.as_bytes());
            assert_eq!(Record::parse(value.as_bytes()), Some(record));
        }
        for wrong in ["", "1", "1:2:3", "-1:0", "0:0:p:1:1", "0:0:c:1"] {
            assert_eq!(Record::parse(wrong.as_bytes()), None, "{wrong}");
        }
        assert!(is_single("0 1000 1\n") && !is_single("0 1000 1\n1 100000 65536\n") && !is_single(""));
    }

    #[test]
    fn the_last_id_stands_for_those_beyond_the_range() {
        let map = parts("         0     206588          1\n         1  100000      65536\n");
        assert_eq!(map, [(0, 0), (1, 65536)]);
        let ids = Ids { users: map, groups: parts("0 5 1\n") };
        assert_eq!(ids.givable((1000, 0)), (1000, 0));
        assert_eq!(ids.givable((65537, 7)), (65536, 0));
        assert_eq!(ids.givable((u32::MAX - 1, 0)), (65536, 0));
        let none = Ids { users: parts("x"), groups: parts("0 0 0\n5 5 4294967295\n") };
        assert_eq!(none.givable((9, 9)), (9, 9));
        assert_eq!(parts("0 0 4294967295\n"), [(0, u32::MAX - 1)]);
    }

    #[test]
    fn a_namespace_has_a_part_of_the_ids() {
        assert!(!is_part("         0          0 4294967295\n"));
        assert!(!is_part(""));
        assert!(is_part("         0       1000          1\n"));
        assert!(is_part("         0       1000          1\n         1     100000      65536\n"));
    }
}
