//! Who may do what with which repositories.

use crate::route::Name;

/// What one may do with a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// Read manifests, blobs, tags and referrers, and see its name in the catalog.
    Pull,
    /// Write blobs, manifests and tags.
    Push,
    /// Remove blobs, manifests and tags.
    Delete,
}

/// Who somebody is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Who {
    /// Has not said so.
    Anonymous,
    /// Has shown the password of this account.
    Account(String),
}

/// One line of rights; what several give adds up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// `team/app`, `team/*` (all that is below, at any depth), or `*`.
    repositories: Vec<Pattern>,
    /// Names of accounts; `*` is every account, `anonymous` everybody.
    users: Vec<String>,
    allow: Vec<Right>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    All,
    Below(Name),
    Only(Name),
}

/// Why a rule is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// Neither a name nor the beginning of some.
    #[error("{0:?} is neither a repository, nor NAME/*, nor *")]
    Repository(String),
    /// No right.
    #[error("{0:?} is none of pull, push, delete")]
    Right(String),
    /// It would give nothing, to nobody, or for nothing.
    #[error("a rule needs repositories, users and what they may do")]
    Empty,
}

impl Rule {
    /// Reads a rule as configuration files write it.
    ///
    /// # Errors
    /// [`RuleError`].
    pub fn parse(repositories: &[String], users: &[String], allow: &[String]) -> Result<Self, RuleError> {
        if repositories.is_empty() || users.is_empty() || allow.is_empty() {
            return Err(RuleError::Empty);
        }
        let pattern = |text: &String| {
            let name = |text: &str| text.parse().map_err(|_| RuleError::Repository(text.to_owned()));
            Ok(match text.strip_suffix("/*") {
                _ if text == "*" => Pattern::All,
                Some(above) => Pattern::Below(name(above)?),
                None => Pattern::Only(name(text)?),
            })
        };
        let right = |text: &String| match text.as_str() {
            "pull" => Ok(Right::Pull),
            "push" => Ok(Right::Push),
            "delete" => Ok(Right::Delete),
            _ => Err(RuleError::Right(text.clone())),
        };
        Ok(Self {
            repositories: repositories.iter().map(pattern).collect::<Result<_, _>>()?,
            users: users.to_vec(),
            allow: allow.iter().map(right).collect::<Result<_, _>>()?,
        })
    }

    fn is_for(&self, who: &Who) -> bool {
        self.users.iter().any(|user| match who {
            _ if user == "anonymous" => true,
            Who::Anonymous => false,
            Who::Account(name) => user == "*" || user == name,
        })
    }

    fn gives(&self, name: &Name, right: Right) -> bool {
        self.allow.contains(&right)
            && self.repositories.iter().any(|pattern| match pattern {
                Pattern::All => true,
                Pattern::Only(only) => only == name,
                Pattern::Below(above) => {
                    name.as_str().strip_prefix(above.as_str()).is_some_and(|rest| rest.starts_with('/'))
                }
            })
    }
}

/// Whether `rules` let somebody do this; without any, every account may.
pub(crate) fn allows(rules: &[Rule], who: &Who, name: &Name, right: Right) -> bool {
    match rules {
        [] => matches!(who, Who::Account(_)),
        rules => rules.iter().any(|rule| rule.is_for(who) && rule.gives(name, right)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(repositories: &str, users: &str, allow: &str) -> Rule {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        Rule::parse(&words(repositories), &words(users), &words(allow)).unwrap()
    }

    #[test]
    fn rights_add_up() {
        let rules = [
            rule("public/*", "anonymous", "pull"),
            rule("*", "*", "pull"),
            rule("team/* solo", "ann bob", "push"),
            rule("*", "root", "pull push delete"),
        ];
        let may = |user: &str, name: &str, right| {
            let who = if user.is_empty() { Who::Anonymous } else { Who::Account(user.to_owned()) };
            allows(&rules, &who, &name.parse().unwrap(), right)
        };
        assert!(may("", "public/a/b", Right::Pull) && !may("", "public/a", Right::Push));
        assert!(!may("", "public", Right::Pull), "below is not beside");
        assert!(!may("", "publicity/a", Right::Pull) && !may("", "team/a", Right::Pull));
        assert!(may("ann", "team/a", Right::Push) && may("bob", "solo", Right::Push));
        assert!(!may("ann", "solo/x", Right::Push) && !may("ann", "team/a", Right::Delete));
        assert!(may("eve", "team/a", Right::Pull) && !may("eve", "team/a", Right::Push));
        assert!(may("root", "x", Right::Delete));
        let name = "x".parse().unwrap();
        assert!(allows(&[], &Who::Account("a".to_owned()), &name, Right::Delete));
        assert!(!allows(&[], &Who::Anonymous, &name, Right::Pull));
    }

    #[test]
    fn an_account_called_anonymous_is_everybody_and_no_more() {
        let rules = [rule("*", "anonymous", "pull")];
        let name = "x".parse().unwrap();
        assert!(allows(&rules, &Who::Account("ann".to_owned()), &name, Right::Pull));
        assert!(allows(&rules, &Who::Anonymous, &name, Right::Pull));
    }

    #[test]
    fn rules_that_mean_nothing_are_refused() {
        let parse = |repository: &str, user: &str, right: &str| {
            let words = |text: &str| text.split(' ').filter(|w| !w.is_empty()).map(str::to_owned).collect();
            let (a, b, c): (Vec<_>, Vec<_>, Vec<_>) = (words(repository), words(user), words(right));
            Rule::parse(&a, &b, &c).unwrap_err()
        };
        assert_eq!(parse("a/*/b", "x", "pull"), RuleError::Repository("a/*/b".to_owned()));
        assert_eq!(parse("../*", "x", "pull"), RuleError::Repository("..".to_owned()));
        assert_eq!(parse("a", "x", "write"), RuleError::Right("write".to_owned()));
        assert_eq!(parse("a", "", "pull"), RuleError::Empty);
    }
}
