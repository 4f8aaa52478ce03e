//! Which extended attributes overlayfs keeps its marks in.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_a_part_of_the_ids() {
        assert!(!is_part("         0          0 4294967295\n"));
        assert!(!is_part(""));
        assert!(is_part("         0       1000          1\n"));
        assert!(is_part("         0       1000          1\n         1     100000      65536\n"));
    }
}
