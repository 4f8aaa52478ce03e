//! Expansion, form by form.

use super::*;

fn lookup(name: &str) -> Option<String> {
    let value = match name {
        "A" => "a",
        "EMPTY" => "",
        "FILE" => "dir/sub/name.tar.gz",
        "STARS" => "a*b?c",
        "ABC" => "abcabc",
        "SLASH" => "a/b/c",
        "BRACE" => "x}y",
        _ => return None,
    };
    Some(value.to_owned())
}

#[track_caller]
fn check(text: &str, expected: Result<&str, &str>) {
    match (expand(text, '\\', Quotes::Remove, &lookup), expected) {
        (Ok(value), Ok(expected)) => assert_eq!(value.text, expected, "{text}"),
        (Err(error), Err(part)) => assert!(error.message.contains(part), "{text}: {error:?}"),
        (got, expected) => panic!("{text}: {got:?}, not {expected:?}"),
    }
}

#[test]
fn variables_expand_as_in_docker() {
    check("$A-${A}-$NO", Ok("a-a-"));
    check("${A:-x}${NO:-x}${EMPTY:-x}${EMPTY-x}", Ok("axx"));
    check("${A:+x}${NO:+x}${EMPTY+x}${EMPTY:+x}", Ok("xx"));
    check("${NO:-${A:-x}}", Ok("a"));
    check("${NO:-a b}", Ok("a b"));
    check("${A:?gone}${EMPTY?gone}", Ok("a"));
    check("${NO:?gone}", Err("NO: gone"));
    check("${NO?}", Err("NO: is not allowed to be unset"));
    check("${EMPTY:?}", Err("EMPTY: is not allowed to be empty"));
}

#[test]
fn special_parameters_are_never_set() {
    check("$1$12x$@$*$#$?$-$!$0|$$|", Ok("x||"));
    check("${1}${12}${@}${*}", Ok(""));
    check("$ $. $", Ok("$ $. $"));
}

#[test]
fn prefixes_and_suffixes_are_removed() {
    check("${FILE#*/}", Ok("sub/name.tar.gz"));
    check("${FILE##*/}", Ok("name.tar.gz"));
    check("${FILE%.*}", Ok("dir/sub/name.tar"));
    check("${FILE%%.*}", Ok("dir/sub/name"));
    check("${FILE#nothing}${NO#x}", Ok("dir/sub/name.tar.gz"));
    check(r"${STARS%\?*}", Ok("a*b"));
    check(r"${STARS#a\*}", Ok("b?c"));
    check(r"${BRACE#x\}}", Ok("y"));
    check("${ABC#$A}", Ok("bcabc"));
    check(r"${A#\x}", Err("invalid escape"));
    check("${ABC#[a]}", Ok("abcabc"));
    check("${A:#x}", Err("unsupported modifier `:#`"));
    check("${A:%x}", Err("unsupported modifier `:%`"));
}

#[test]
fn patterns_are_replaced() {
    check("${ABC/b/X}", Ok("aXcabc"));
    check("${ABC//b/X}", Ok("aXcaXc"));
    check("${ABC//b*/X}", Ok("aX"));
    check("${ABC/z/X}${NO/a/b}", Ok("abcabc"));
    check(r"${SLASH//\//-}", Ok("a-b-c"));
    check("${ABC//a/$A$A}", Ok("aabcaabc"));
    check("${ABC//[b]/X}", Ok("abcabc"));
    check("${ABC/b}", Err("a second `/` is missing"));
    check("${ABC/b/", Err("a closing `}` is missing"));
}

#[test]
fn other_modifiers_are_refused() {
    check("${A:=x}", Err("unsupported modifier `:=`"));
    check("${A:1:2}", Err("unsupported modifier `:1`"));
    check("${#A}", Err("unsupported modifier"));
    check("${A^}", Err("unsupported modifier `^`"));
    for text in ["${}", "${{A}", "${:-x}"] {
        check(text, Err("needs a variable name"));
    }
    check("${A", Err("a closing `}` is missing"));
    check("${", Err("a closing `}` is missing"));
    check("${A:-${B}", Err("a closing `}` is missing"));
}

#[test]
fn quotes_and_escapes_are_taken_away() {
    check(r#"'$A' "$A" \$A "\$A" "\a" \a"#, Ok(r"$A a $A $A \a a"));
    check(r#""a'b"'c"d'"#, Ok("a'bc\"d"));
    check("x\\", Ok("x"));
    check("'x", Err("a closing `'` is missing"));
    check("\"x", Err("a closing `\"` is missing"));
    let kept = expand(r#"'$A' "\$A""#, '\\', Quotes::Text, &lookup).map(|expanded| expanded.text);
    assert_eq!(kept.as_deref(), Ok(r#"'a' "$A""#));
    let backtick = expand(r"a\b`$A", '`', Quotes::Remove, &lookup).map(|expanded| expanded.text);
    assert_eq!(backtick.as_deref(), Ok(r"a\b$A"));
}

#[test]
fn errors_point_into_the_word() {
    let error = expand("ab${A:=x}cd", '\\', Quotes::Remove, &lookup).unwrap_err();
    assert_eq!((error.start, error.end), (5, 7));
    let error = expand("ab${A", '\\', Quotes::Remove, &lookup).unwrap_err();
    assert_eq!(error.start, 2);
    let error = expand("x ${NO:?gone} y", '\\', Quotes::Remove, &lookup).unwrap_err();
    assert_eq!((error.start, error.end), (2, 13));
}

#[test]
fn what_was_looked_up_is_known() {
    let expanded = expand("$A ${NO:-$OTHER} ${EMPTY}", '\\', Quotes::Remove, &lookup).unwrap();
    assert_eq!(expanded.used.iter().collect::<Vec<_>>(), ["A", "EMPTY"]);
    assert_eq!(expanded.unset.iter().collect::<Vec<_>>(), ["NO", "OTHER"]);
}

#[test]
fn hostile_nesting_and_doubling_are_refused() {
    check(&format!("{}x{}", "${N:-".repeat(10_000), "}".repeat(10_000)), Err("nested deeper"));
    let long = "x".repeat(60_000);
    let big = |_: &str| Some(long.clone());
    let error = expand(&"$A".repeat(20), '\\', Quotes::Remove, &big).unwrap_err();
    assert!(error.message.contains("longer than"), "{error:?}");
}

#[test]
fn words_keep_their_quotes() {
    let text = r#"A="x y" B=\ z 'c d' "open end"#;
    let words: Vec<&str> =
        split_quoted(text, 0, '\\').iter().map(|piece| &text[piece.start..piece.end]).collect();
    assert_eq!(words, [r#"A="x y""#, r"B=\ z", "'c d'", r#""open end"#]);
    let words: Vec<&str> = split_blanks("a  'b c'", 0).iter().map(|p| &"a  'b c'"[p.start..p.end]).collect();
    assert_eq!(words, ["a", "'b", "c'"]);
}
