//! POSIX ACLs as text, the way `tar --acls` writes them, become what the kernel takes.

use std::collections::BTreeMap;

/// PAX records of text, and the attributes that they stand for.
pub(crate) const RECORDS: [(&[u8], &[u8]); 2] = [
    (b"SCHILY.acl.access", b"system.posix_acl_access"),
    (b"SCHILY.acl.default", b"system.posix_acl_default"),
];

const VERSION: u32 = 2;
const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
/// In entries that are for nobody in particular.
const NO_ID: u32 = u32::MAX;

/// The attribute's value for `user::rw-,user:1001:r--,…`, entries set apart by commas or lines.
///
/// `None` for what is no ACL, and for one with names: whose they are only the tree that it was taken
/// from could tell. star writes numbers behind the names, and `tar --numeric-owner` in their place.
pub(crate) fn parse(text: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(text).ok()?;
    let mut entries: BTreeMap<(u16, u32), u16> = BTreeMap::new();
    for line in text.split(['\n', ',']) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let line = line.strip_prefix("default:").unwrap_or(line);
        let mut fields = line.split(':');
        let (kind, name, permissions) = (fields.next()?, fields.next()?, fields.next()?);
        let number = fields.next().unwrap_or(name);
        let tag = match (kind, name.is_empty()) {
            ("user" | "u", true) => USER_OBJ,
            ("user" | "u", false) => USER,
            ("group" | "g", true) => GROUP_OBJ,
            ("group" | "g", false) => GROUP,
            ("mask" | "m", true) => MASK,
            ("other" | "o", true) => OTHER,
            _ => return None,
        };
        let id = if name.is_empty() { NO_ID } else { number.parse().ok().filter(|&id| id != NO_ID)? };
        let doubled = entries.insert((tag, id), bits(permissions)?);
        if doubled.is_some() || fields.next().is_some() {
            return None;
        }
    }
    let has = |tag| entries.contains_key(&(tag, NO_ID));
    let is_named = entries.keys().any(|(tag, _)| matches!(*tag, USER | GROUP));
    if !has(USER_OBJ) || !has(GROUP_OBJ) || !has(OTHER) || (is_named && !has(MASK)) {
        return None;
    }
    // Sorted by tag and number, as the kernel wants them.
    let mut value = VERSION.to_le_bytes().to_vec();
    for ((tag, id), permissions) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    Some(value)
}

fn bits(permissions: &str) -> Option<u16> {
    let (mut sum, mut count) = (0, 0);
    for letter in permissions.chars() {
        count += 1;
        sum |= match letter {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return None,
        };
    }
    (1..=3).contains(&count).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_sorted_entries() {
        let text = b"user::rw-\nuser:1002:r--\nuser:lisa:rwx:1001\ngroup::r--\nmask::rwx\nother::---\n";
        let value = parse(text).unwrap();
        let entry = |tag: u8, permissions: u8, id: [u8; 4]| [&[tag, 0, permissions, 0][..], &id].concat();
        let none = [0xff; 4];
        let expected = [
            vec![2, 0, 0, 0],
            entry(1, 6, none),
            entry(2, 7, [0xe9, 3, 0, 0]),
            entry(2, 4, [0xea, 3, 0, 0]),
            entry(4, 4, none),
            entry(0x10, 7, none),
            entry(0x20, 0, none),
        ];
        assert_eq!(value, expected.concat());
        assert_eq!(parse(b"u::rw-,u:1002:r,u:1001:rwx,g::r--,m::rwx,o::-"), Some(value));
    }

    #[test]
    fn what_cannot_be_told_is_none() {
        for text in [
            "",
            "user::rw-,group::r--",
            "user::rw-,user:lisa:r--,group::r--,mask::r--,other::r--",
            "user::rw-,user:7:r--,group::r--,other::r--",
            "user::rw-,user::r--,group::r--,other::r--",
            "user::rwz,group::r--,other::r--",
            "user::rw-,group::r--,other:5:r--",
            "user::rw-,user:4294967295:r--,group::r--,mask::r--,other::r--",
        ] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }
}
