//! `--chmod`: octal and symbolic modes, as chmod(1) reads them.

use std::fmt;
use std::str::FromStr;

/// A change of permission bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mode {
    text: String,
    form: Form,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Form {
    Octal(u32),
    Symbolic(Vec<Clause>),
}

/// `u+rw`: who, operator, permissions.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Clause {
    /// Bits of user, group and others that the clause speaks of.
    who: u32,
    operator: char,
    permissions: Permissions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Permissions {
    /// `r`, `w`, `x` as one octal digit.
    bits: u32,
    /// `X`: `x` for directories and for what somebody may execute already.
    execute_if_any: bool,
    set_id: bool,
    sticky: bool,
    /// `g=u`: the bits that this class has already; its shift.
    copied: Option<u32>,
}

/// Why a text is no mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModeError {
    /// An octal number beyond 07777.
    #[error("{0:?} is beyond 07777")]
    TooLarge(String),
    /// Neither octal nor symbolic.
    #[error("{0:?} is neither an octal mode like 0755 nor a symbolic one like u=rwX,go=rX")]
    Unknown(String),
}

const USER: u32 = 0o4700;
const GROUP: u32 = 0o2070;
const OTHERS: u32 = 0o1007;

impl FromStr for Mode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Self, ModeError> {
        let unknown = || ModeError::Unknown(text.to_owned());
        let form = if text.starts_with(|c: char| c.is_ascii_digit()) {
            if !text.bytes().all(|b| (b'0'..=b'7').contains(&b)) {
                return Err(unknown());
            }
            let bits = u32::from_str_radix(text, 8).unwrap_or(u32::MAX);
            if bits > 0o7777 {
                return Err(ModeError::TooLarge(text.to_owned()));
            }
            Form::Octal(bits)
        } else {
            let mut clauses = Vec::new();
            for clause in text.split(',') {
                clauses.extend(parse_clause(clause).ok_or_else(unknown)?);
            }
            Form::Symbolic(clauses)
        };
        Ok(Self { text: text.to_owned(), form })
    }
}

/// `ugo+rwx-w`: one who, one or more operators.
fn parse_clause(clause: &str) -> Option<Vec<Clause>> {
    let operator = clause.find(['+', '-', '='])?;
    let mut who = 0;
    for c in clause[..operator].chars() {
        who |= match c {
            'u' => USER,
            'g' => GROUP,
            'o' => OTHERS,
            'a' => USER | GROUP | OTHERS,
            _ => return None,
        };
    }
    // chmod(1) takes the umask away when nobody is named; a build has the usual 022 only for
    // files it makes itself, so `+x` means everybody here, as in BuildKit.
    if who == 0 {
        who = USER | GROUP | OTHERS;
    }
    let mut clauses: Vec<Clause> = Vec::new();
    for c in clause[operator..].chars() {
        if matches!(c, '+' | '-' | '=') {
            clauses.push(Clause { who, operator: c, permissions: Permissions::default() });
            continue;
        }
        let permissions = &mut clauses.last_mut()?.permissions;
        match c {
            'r' => permissions.bits |= 4,
            'w' => permissions.bits |= 2,
            'x' => permissions.bits |= 1,
            'X' => permissions.execute_if_any = true,
            's' => permissions.set_id = true,
            't' => permissions.sticky = true,
            'u' if *permissions == Permissions::default() => permissions.copied = Some(6),
            'g' if *permissions == Permissions::default() => permissions.copied = Some(3),
            'o' if *permissions == Permissions::default() => permissions.copied = Some(0),
            _ => return None,
        }
    }
    Some(clauses)
}

impl Mode {
    /// The permission bits of what had `current` before.
    pub fn apply(&self, current: u32, is_dir: bool) -> u32 {
        let clauses = match &self.form {
            Form::Octal(bits) => return *bits,
            Form::Symbolic(clauses) => clauses,
        };
        clauses.iter().fold(current & 0o7777, |mode, clause| clause.apply(mode, is_dir))
    }

    /// The bits of an octal mode.
    pub fn octal(&self) -> Option<u32> {
        match self.form {
            Form::Octal(bits) => Some(bits),
            Form::Symbolic(_) => None,
        }
    }
}

impl Clause {
    fn apply(&self, mode: u32, is_dir: bool) -> u32 {
        let Permissions { mut bits, execute_if_any, set_id, sticky, copied } = self.permissions;
        if execute_if_any && (is_dir || mode & 0o111 != 0) {
            bits |= 1;
        }
        if let Some(shift) = copied {
            bits |= mode >> shift & 7;
        }
        let mut wanted = bits | bits << 3 | bits << 6;
        if set_id {
            wanted |= 0o6000;
        }
        if sticky {
            wanted |= 0o1000;
        }
        let wanted = wanted & self.who;
        match self.operator {
            '+' => mode | wanted,
            '-' => mode & !wanted,
            // A directory keeps its set-id bits unless they are named, as GNU chmod does.
            _ => {
                let kept = if is_dir && !set_id { 0o6000 } else { 0 };
                mode & !(self.who & !kept) | wanted
            }
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(mode: &str, file: (u32, u32), dir: (u32, u32)) {
        let mode: Mode = mode.parse().expect("a mode");
        assert_eq!(format!("{:o}", mode.apply(file.0, false)), format!("{:o}", file.1), "{mode} of a file");
        assert_eq!(format!("{:o}", mode.apply(dir.0, true)), format!("{:o}", dir.1), "{mode} of a directory");
    }

    #[test]
    fn modes_do_what_chmod_does() {
        check("0640", (0o755, 0o640), (0o755, 0o640));
        check("7777", (0, 0o7777), (0, 0o7777));
        check("+x", (0o644, 0o755), (0o700, 0o711));
        check("u=rwX,go=rX", (0o600, 0o644), (0o700, 0o755));
        check("u=rwX,go=rX", (0o711, 0o755), (0o2700, 0o2755));
        check("a-w", (0o666, 0o444), (0o777, 0o555));
        check("u+s,o+t", (0o755, 0o5755), (0o755, 0o5755));
        check("g=u", (0o640, 0o660), (0o750, 0o770));
        check("u+w-x", (0o500, 0o600), (0o500, 0o600));
        check("o=", (0o777, 0o770), (0o777, 0o770));
    }

    #[test]
    fn what_is_no_mode_is_refused() {
        for text in ["", "8", "0o7", "777777", "u", "q+x", "u+q", "u+rg", "+x,", "0755x"] {
            assert!(text.parse::<Mode>().is_err(), "{text:?}");
        }
    }
}
