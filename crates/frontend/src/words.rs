//! Shell words: `$VAR`, `${VAR:-default}`, quotes, escapes; and splitting into words.

use std::iter::Peekable;
use std::str::Chars;

/// `${A:-${B:-…}}` nests at most this deep.
const MAX_DEPTH: usize = 64;
/// No expansion grows beyond this, however often it doubles.
const MAX_BYTES: usize = 1 << 20;

/// Looks a variable up.
pub(crate) type Lookup<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// Expands variables and takes quotes away.
pub(crate) fn expand(text: &str, escape: char, lookup: &Lookup<'_>) -> Result<String, String> {
    let mut chars = text.chars().peekable();
    let expander = Expander { escape, lookup };
    expander.until(&mut chars, None, 0)
}

struct Expander<'a> {
    escape: char,
    lookup: &'a Lookup<'a>,
}

impl Expander<'_> {
    fn until(
        &self,
        chars: &mut Peekable<Chars<'_>>,
        end: Option<char>,
        depth: usize,
    ) -> Result<String, String> {
        if depth > MAX_DEPTH {
            return Err(format!("variables are nested deeper than {MAX_DEPTH}"));
        }
        let mut out = String::new();
        loop {
            let Some(c) = chars.next() else {
                return end.map_or(Ok(out), |end| Err(format!("a closing `{end}` is missing")));
            };
            match c {
                c if Some(c) == end => return Ok(out),
                '\'' => loop {
                    match chars.next() {
                        Some('\'') => break,
                        Some(c) => out.push(c),
                        None => return Err("a closing `'` is missing".to_owned()),
                    }
                },
                '"' => self.double_quoted(chars, &mut out, depth)?,
                '$' => out.push_str(&self.variable(chars, depth)?),
                c if c == self.escape => out.extend(chars.next()),
                c => out.push(c),
            }
            if out.len() > MAX_BYTES {
                return Err(format!("the expanded text is longer than {MAX_BYTES} bytes"));
            }
        }
    }

    fn double_quoted(
        &self,
        chars: &mut Peekable<Chars<'_>>,
        out: &mut String,
        depth: usize,
    ) -> Result<(), String> {
        loop {
            match chars.next() {
                Some('"') => return Ok(()),
                Some('$') => out.push_str(&self.variable(chars, depth)?),
                Some(c) if c == self.escape => match chars.next() {
                    Some(next) if next == '"' || next == '$' || next == self.escape => out.push(next),
                    Some(next) => out.extend([c, next]),
                    None => out.push(c),
                },
                Some(c) => out.push(c),
                None => return Err("a closing `\"` is missing".to_owned()),
            }
        }
    }

    fn variable(&self, chars: &mut Peekable<Chars<'_>>, depth: usize) -> Result<String, String> {
        match chars.peek().copied() {
            Some('{') => {
                chars.next();
                self.braces(chars, depth)
            }
            Some(c) if c.is_ascii_alphabetic() || c == '_' => {
                Ok((self.lookup)(&name(chars)).unwrap_or_default())
            }
            // Positional and special parameters are never set.
            Some(c) if c.is_ascii_digit() || "@*#?-$!".contains(c) => {
                chars.next();
                Ok(String::new())
            }
            _ => Ok("$".to_owned()),
        }
    }

    fn braces(&self, chars: &mut Peekable<Chars<'_>>, depth: usize) -> Result<String, String> {
        let variable = name(chars);
        if variable.is_empty() {
            return Err("`${` needs a variable name".to_owned());
        }
        let value = (self.lookup)(&variable);
        let mut colon = false;
        let operator = match chars.next() {
            Some('}') => return Ok(value.unwrap_or_default()),
            Some(':') => {
                colon = true;
                chars.next()
            }
            other => other,
        };
        let set = value.filter(|value| !(colon && value.is_empty()));
        let Some(operator) = operator else { return Err("a closing `}` is missing".to_owned()) };
        match operator {
            '-' | '+' | '?' => {
                let word = self.until(chars, Some('}'), depth + 1)?;
                match (operator, set) {
                    ('-', Some(value)) => Ok(value),
                    ('-', None) => Ok(word),
                    ('+', Some(_)) => Ok(word),
                    ('+', None) => Ok(String::new()),
                    (_, Some(value)) => Ok(value),
                    (_, None) if word.is_empty() => Err(format!("{variable}: is not allowed to be unset")),
                    (_, None) => Err(format!("{variable}: {word}")),
                }
            }
            '#' | '%' | '/' => {
                Err(format!("the modifier `{operator}` of ${{{variable}…}} is not supported yet"))
            }
            other => Err(format!("unknown modifier `{other}` in ${{{variable}…}}")),
        }
    }
}

fn name(chars: &mut Peekable<Chars<'_>>) -> String {
    let mut name = String::new();
    while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
        name.push(c);
    }
    name
}

/// Splits at blanks outside quotes; quotes and escapes stay for [`expand`].
pub(crate) fn split(text: &str, escape: char) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match quote {
            None if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            None if c == '"' || c == '\'' => quote = Some(c),
            Some(open) if c == open => quote = None,
            _ => {}
        }
        word.push(c);
        if c == escape && quote != Some('\'') {
            word.extend(chars.next());
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Result<&str, &str>) {
        let lookup = |name: &str| match name {
            "A" => Some("a".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        match (expand(text, '\\', &lookup), expected) {
            (Ok(value), Ok(expected)) => assert_eq!(value, expected, "{text}"),
            (Err(error), Err(part)) => assert!(error.contains(part), "{text}: {error}"),
            (got, expected) => panic!("{text}: {got:?}, not {expected:?}"),
        }
    }

    #[test]
    fn variables_expand_as_in_docker() {
        check("$A-${A}-$NO", Ok("a-a-"));
        check("${A:-x}${NO:-x}${EMPTY:-x}${EMPTY-x}", Ok("axx"));
        check("${A:+x}${NO:+x}${EMPTY+x}", Ok("xx"));
        check("${NO:-${A:-x}}", Ok("a"));
        check(r#"'$A' "$A" \$A "\$A""#, Ok("$A a $A $A"));
        check("$1$@x $", Ok("x $"));
        check("${NO:?gone}", Err("gone"));
        check("${A:=x}", Err("unknown modifier"));
        check("${A", Err("missing"));
        check("'x", Err("missing"));
    }

    #[test]
    fn hostile_nesting_is_refused() {
        check(&format!("{}x{}", "${N:-".repeat(10_000), "}".repeat(10_000)), Err("nested deeper"));
    }

    #[test]
    fn words_keep_their_quotes() {
        assert_eq!(split(r#"A="x y" B=\ z 'c d'"#, '\\'), [r#"A="x y""#, r"B=\ z", "'c d'"]);
    }
}
