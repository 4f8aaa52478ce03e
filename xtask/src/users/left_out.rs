//! Which tests are not run by users without privileges, and why.

use super::Ids;

/// A test, or a group of them, that one or both users do not run.
pub(super) struct LeftOut {
    /// A test's name; a group's ends with `::`.
    pub(super) tests: &'static str,
    /// `None`: neither of them.
    of: Option<Ids>,
    /// One line.
    pub(super) why: &'static str,
}

impl LeftOut {
    /// Whether this user leaves it out.
    pub(super) fn holds_for(&self, ids: Ids) -> bool {
        self.of.is_none_or(|of| of == ids)
    }

    /// Whether it stands for more than one test.
    pub(super) fn is_group(&self) -> bool {
        self.tests.ends_with("::")
    }

    /// Whether it stands for this test.
    pub(super) fn fits(&self, name: &str) -> bool {
        if self.is_group() { name.starts_with(self.tests) } else { name == self.tests }
    }

    /// As a part of a regular expression that begins where the name does.
    pub(super) fn pattern(&self) -> String {
        if self.is_group() { self.tests.to_owned() } else { format!("{}$", self.tests) }
    }
}

const fn both(tests: &'static str, why: &'static str) -> LeftOut {
    LeftOut { tests, of: None, why }
}

const fn single(tests: &'static str, why: &'static str) -> LeftOut {
    LeftOut { tests, of: Some(Ids::Single), why }
}

const CAMPAIGN: &str = "a campaign over crashes, races or input, minutes long: root's is the same code";
const PEERS: &str = "buildah, podman, skopeo and umoci run as root there";
const OWN: &str = "makes users of its own";

pub(super) const LEFT_OUT: &[LeftOut] = &[
    both("rootless::", OWN),
    both("bit_rot::", CAMPAIGN),
    both("concurrency::", CAMPAIGN),
    both("differential::", CAMPAIGN),
    both("faults::", CAMPAIGN),
    both("full_disk::", CAMPAIGN),
    both("kills::", CAMPAIGN),
    both("power::", CAMPAIGN),
    both("interop::", PEERS),
];
