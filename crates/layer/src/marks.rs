//! Extended attributes with which trees are marked: overlayfs's own, and what a user's files cannot be.

use std::sync::OnceLock;

use kiln_oci::IdMap;

/// Whether overlayfs is mounted with `userxattr` here: in a user namespace nobody may write
/// `trusted.*`, which take CAP_SYS_ADMIN on the host. Looked up once, so not to be asked before a
/// process has entered its namespace.
pub fn uses_user_attributes() -> bool {
    let users = &Ids::own().users;
    !users.is_empty() && !users.is_whole()
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
    let ids = Ids::own();
    ids.users.is_single() || ids.groups.is_single()
}

/// How trees are marked here, as a number to keep beside one: what was made with another is made otherwise.
pub fn marking() -> u8 {
    u8::from(uses_user_attributes()) | u8::from(has_single_id()) << 1
}

/// The ids of a namespace.
struct Ids {
    users: IdMap,
    groups: IdMap,
}

impl Ids {
    /// Those of this process.
    fn own() -> &'static Ids {
        static OWN: OnceLock<Ids> = OnceLock::new();
        OWN.get_or_init(|| {
            let read = |path: &str| IdMap::parse(&std::fs::read_to_string(path).unwrap_or_default());
            Ids { users: read("/proc/self/uid_map"), groups: read("/proc/self/gid_map") }
        })
    }

    /// The owner that a file is given for this one: the last id stands for those beyond the range.
    fn givable(&self, owner: (u32, u32)) -> (u32, u32) {
        let one = |map: &IdMap, id| if map.is_empty() || map.has(id) { id } else { last(map) };
        (one(&self.users, owner.0), one(&self.groups, owner.1))
    }
}

fn last(map: &IdMap) -> u32 {
    map.last().unwrap_or(0)
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
    let one = |map: &IdMap, id, known| if id == last(map) { known } else { id };
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
    }

    #[test]
    fn the_last_id_stands_for_those_beyond_the_range() {
        let ids = |users, groups| Ids { users: IdMap::parse(users), groups: IdMap::parse(groups) };
        let range = ids("0 206588 1\n1 100000 65536\n", "0 5 1\n");
        assert_eq!(range.givable((1000, 0)), (1000, 0));
        assert_eq!(range.givable((65537, 7)), (65536, 0));
        assert_eq!(range.givable((u32::MAX - 1, 0)), (65536, 0));
        assert_eq!(ids("x", "0 0 0\n").givable((9, 9)), (9, 9));
    }
}
