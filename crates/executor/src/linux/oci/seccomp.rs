//! A filter as `linux.seccomp` of a bundle.

use serde_json::{Value, json};

use crate::linux::seccomp::profile::{Action, Argument, Comparison, Profile};

/// The profile in the words of the runtime specification. Rules that say what the default says are left
/// out: runtimes refuse them.
pub(crate) fn to_json(profile: &Profile) -> Value {
    let mut rules: Vec<Value> = Vec::new();
    for rule in profile.rules.iter().filter(|rule| rule.action != profile.default) {
        let args: Vec<Value> = rule.arguments.iter().map(argument).collect();
        let (action, errno) = action(rule.action);
        let mut value = json!({ "names": [rule.name], "action": action });
        if let Some(errno) = errno {
            value["errnoRet"] = errno.into();
        }
        if !args.is_empty() {
            value["args"] = args.into();
        }
        rules.push(value);
    }
    let (default, errno) = action(profile.default);
    let architectures: Vec<&str> =
        profile.architectures.iter().filter_map(|arch| arch.library_name()).collect();
    let mut value = json!({ "defaultAction": default, "architectures": architectures, "syscalls": rules });
    if let Some(errno) = errno {
        value["defaultErrnoRet"] = errno.into();
    }
    value
}

fn action(action: Action) -> (&'static str, Option<u16>) {
    match action {
        Action::Allow => ("SCMP_ACT_ALLOW", None),
        Action::Log => ("SCMP_ACT_LOG", None),
        Action::Errno(errno) => ("SCMP_ACT_ERRNO", Some(errno)),
        Action::Trap => ("SCMP_ACT_TRAP", None),
        Action::Trace(data) => ("SCMP_ACT_TRACE", Some(data)),
        Action::KillThread => ("SCMP_ACT_KILL_THREAD", None),
        Action::KillProcess => ("SCMP_ACT_KILL_PROCESS", None),
    }
}

fn argument(argument: &Argument) -> Value {
    let (op, value, two) = match argument.comparison {
        Comparison::Equal => ("SCMP_CMP_EQ", argument.value, 0),
        Comparison::NotEqual => ("SCMP_CMP_NE", argument.value, 0),
        Comparison::Less => ("SCMP_CMP_LT", argument.value, 0),
        Comparison::AtMost => ("SCMP_CMP_LE", argument.value, 0),
        Comparison::Greater => ("SCMP_CMP_GT", argument.value, 0),
        Comparison::AtLeast => ("SCMP_CMP_GE", argument.value, 0),
        // Here the mask comes first.
        Comparison::Masked(mask) => ("SCMP_CMP_MASKED_EQ", mask, argument.value),
    };
    json!({ "index": argument.index, "value": value, "valueTwo": two, "op": op })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::seccomp::profile::Rule;

    #[test]
    fn rules_are_said_as_the_specification_has_them() {
        let rule = |name: &'static str, action, arguments| Rule { name: name.into(), action, arguments };
        let masked = Argument { index: 0, comparison: Comparison::Masked(0xff), value: 0 };
        let profile = Profile {
            default: Action::Errno(1),
            rules: vec![
                rule("read", Action::Allow, vec![]),
                rule("mount", Action::Errno(1), vec![]),
                rule("clone", Action::Allow, vec![masked]),
                rule("clone3", Action::Errno(38), vec![]),
            ],
            ..Profile::native()
        };
        let json = to_json(&profile);
        assert_eq!(json["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(json["defaultErrnoRet"], 1);
        let expected = serde_json::json!([
            { "names": ["read"], "action": "SCMP_ACT_ALLOW" },
            { "names": ["clone"], "action": "SCMP_ACT_ALLOW",
              "args": [{ "index": 0, "value": 255, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] },
            { "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
        ]);
        assert_eq!(json["syscalls"], expected);
    }
}
