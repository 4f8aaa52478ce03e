use proptest::prelude::*;

use super::*;

#[path = "naive.rs"]
mod naive;

fn ignored(rules: &str, path: &str) -> bool {
    Patterns::parse(rules).unwrap_or_else(|error| panic!("{rules:?}: {error:?}")).is_ignored(path)
}

/// Rules, then the paths that they ignore and those that they leave.
type Case = (&'static str, &'static [&'static str], &'static [&'static str]);

fn check(cases: &[Case]) {
    for (rules, hits, misses) in cases {
        for (paths, expected) in [(hits, true), (misses, false)] {
            for path in *paths {
                assert_eq!(ignored(rules, path), expected, "{rules:?} on {path:?}");
            }
        }
    }
}

#[test]
fn names_match_within_one_directory() {
    check(&[
        ("file", &["file", "file/a/b"], &["file2", "d/file", "fil"]),
        ("*", &["file", "d/file", ".hidden", "☺"], &[]),
        ("*.log", &["a.log", ".log", "x.log/inside"], &["d/a.log", "a.logs", "alog"]),
        ("d/*", &["d/e", "d/e/f"], &["d", "e/d", "dd/e"]),
        ("*/*", &["d/e", "d/e/f"], &["d"]),
        ("*/b", &["a/b", "a/b/c"], &["a/c", "b", "a/c/b"]),
        ("a*b*c", &["abc", "axbyc", "abbcc"], &["ab", "a/bc", "acb"]),
        ("a?c", &["abc", "a☺c", "a.c"], &["ac", "abbc", "a/c"]),
        ("???", &["abc", "a☺b"], &["ab", "abcd", "a/c"]),
        ("*?", &["a", "ab"], &[]),
        ("a**b", &["ab", "ax/b", "a/b", "ax/y/b"], &["axb", "b"]),
        ("abc.def", &["abc.def"], &["abcdef", "abcZdef"]),
        ("A", &["A"], &["a"]),
    ]);
}

#[test]
fn two_stars_stand_for_any_number_of_directories() {
    check(&[
        ("**", &["file", "d/file", ".hidden", "a/b/c/d"], &[]),
        ("**/", &["file", "d/file", "d/"], &[]),
        ("**/**", &["file", "d/file", "d/e/f"], &[]),
        ("**/*", &["file", "d/file", "d/e/f"], &[]),
        ("***", &["file", "d/file"], &[]),
        ("d/**", &["d/file", "d/e/f/g"], &["d", "e/d/f", "dd/x"]),
        ("d**", &["d", "dd", "d/e/f", "dx/y"], &["e", "e/d"]),
        ("**/file", &["file", "d/file", "d/e/file", "d/file/x"], &["xfile", "d/xfile", "files"]),
        ("**file", &["file", "d/file", "xfile", "d/myfile", "d/xfile/x"], &["files", "filex/y"]),
        ("**/f*le", &["file", "d/fxle", "d/e/file"], &["d/xfile"]),
        // With something special behind them, the stars end at a `/`: that is what Docker does.
        ("**f?le", &["file", "d/file"], &["xfile", "d/xfile"]),
        ("**[f]ile", &["file", "d/file"], &["xfile"]),
        ("**\\file", &["file", "d/file"], &["xfile"]),
        ("**.txt", &[".txt", "a.txt", "d/a.txt"], &["a.txtx", "txt"]),
        ("**/*.txt", &["a.txt", ".txt", "d/e/a.txt"], &["a.txtx", "txt/a"]),
        ("**/d/*.txt", &["d/a.txt", "x/y/d/a.txt"], &["d/e/a.txt", "xd/a.txt"]),
        ("**/foo/bar", &["foo/bar", "d/foo/bar", "d/e/foo/bar/x"], &["foo", "bar", "foo/x/bar", "xfoo/bar"]),
        ("a/**/b", &["a/b", "a/x/b", "a/x/y/b", "a/b/c"], &["ab", "a/xb", "x/a/b", "a"]),
        ("a/**b", &["a/b", "a/x/b"], &["a/xb", "ab"]),
        ("a/**/*", &["a/b", "a/x/b"], &["a", "b"]),
        ("a/**/**/b", &["a/b", "a/x/b", "a/x/y/z/b"], &["a/xb"]),
        ("**/a/**", &["a/b", "x/a/b", "x/y/a/b/c"], &["a", "x/a", "xa/b"]),
        ("**/a**", &["a", "ab", "x/ab", "x/ab/c"], &["ba", "x/ba"]),
        ("**/.git", &[".git", "x/.git", ".git/config"], &["x.git", ".gitignore"]),
        ("*/**/x", &["a/x", "a/b/x"], &["x", "xa"]),
        (
            "**/node_modules/**/*.map",
            &["node_modules/a.map", "p/node_modules/q/r/a.map"],
            &["a.map", "node_modules/a.js"],
        ),
    ]);
}

#[test]
fn classes_hold_characters_and_ranges() {
    check(&[
        ("[a-c].txt", &["a.txt", "b.txt", "c.txt"], &["d.txt", "B.txt", ".txt", "ab.txt"]),
        ("[^a-c].txt", &["d.txt", "☺.txt"], &["b.txt", ".txt"]),
        ("[!a]", &["!", "a"], &["b"]),
        ("[abc-e]x", &["ax", "bx", "dx"], &["fx", "x", "-x"]),
        ("a[b-d]e/f", &["ace/f", "ace/f/g"], &["aae/f", "ace"]),
        ("[☺-☻]", &["☺", "☻"], &["☹", "a"]),
        ("[\\]]", &["]"], &["\\", "a"]),
        ("[\\-x]", &["-", "x"], &["a"]),
        ("[x\\-]", &["-", "x"], &["\\"]),
        ("[a^]", &["a", "^"], &["b"]),
        ("[*]", &["*"], &["a", ""]),
        ("[?+]", &["?", "+"], &["a"]),
        ("a]", &["a]"], &["a"]),
        // As in Go, a class may match a `/`.
        ("a[^b]c", &["axc", "a/c"], &["abc", "ac"]),
    ]);
}

#[test]
fn a_backslash_takes_the_next_character_as_it_is() {
    check(&[
        ("\\*", &["*", "*/x"], &["a", "\\*", "\\"]),
        ("a\\?b", &["a?b"], &["axb", "a\\?b"]),
        ("\\!file", &["!file"], &["file", "\\!file"]),
        ("\\#file", &["#file"], &["file"]),
        ("\\a\\b", &["ab"], &["\\a\\b"]),
        ("\\d", &["d"], &["5", "\\d"]),
        ("a\\\\b", &["a\\b"], &["ab", "a\\\\b"]),
        ("\\[a]", &["[a]"], &["a"]),
        ("\\*\\*/x", &["**/x"], &["a/x", "x"]),
        ("\\**", &["*", "*abc"], &["a", "\\a"]),
    ]);
}

#[test]
fn what_regular_expressions_know_means_nothing_here() {
    check(&[
        ("a.|)$(}+{bc", &["a.|)$(}+{bc"], &["abc", "a"]),
        ("a(b)c/d", &["a(b)c/d"], &["abc/d"]),
        ("a+*", &["a+", "a+b"], &["aa", "a"]),
        ("x^y*", &["x^y", "x^yz"], &["xy"]),
        ("{a,b}", &["{a,b}"], &["a", "b"]),
        ("dist/p-2.4.0rc3.dev36+g08.dist-info", &["dist/p-2.4.0rc3.dev36+g08.dist-info/x"], &["dist/p-2x4"]),
        ("a b", &["a b"], &["a", "b"]),
    ]);
}

#[test]
fn the_last_matching_rule_wins() {
    check(&[
        ("d\n!d/keep", &["d/other", "d"], &["d/keep", "d/keep/x"]),
        ("!d/keep\nd", &["d/keep", "d"], &["e"]),
        ("*\n!README.md", &["a", "d/README.md"], &["README.md"]),
        ("*.md\n!README*.md\nREADME-secret.md", &["a.md", "README-secret.md"], &["README.md", "README-x.md"]),
        ("*.md\nREADME-secret.md\n!README*.md", &["a.md"], &["README.md", "README-secret.md"]),
        ("**\n!a/b", &["a", "a/c", "c"], &["a/b", "a/b/c/d"]),
        ("**\n!a/b\na/b/c", &["a/b/c", "a/b/c/d", "x"], &["a/b", "a/b/x"]),
        ("**\n!**/*.go", &["a", "d/a.c"], &["a.go", "d/e/a.go"]),
        ("d\n! d/keep", &["d/x"], &["d/keep"]),
        ("d\n!d", &[], &["d", "d/x"]),
        ("d\n!d\nd/x", &["d/x", "d/x/y"], &["d", "d/y"]),
        // A rule that matches a directory above counts as much as one that matches the path.
        ("d/x\n!d", &[], &["d", "d/x", "d/x/y"]),
        ("!d", &[], &["d", "e"]),
    ]);
}

#[test]
fn lines_are_trimmed_and_cleaned_as_paths() {
    check(&[
        ("/d/", &["d", "d/e"], &["e", "e/d"]),
        ("./d", &["d"], &[]),
        ("//d//e//", &["d/e"], &["d", "e"]),
        ("d/../e", &["e"], &["d", "d/e"]),
        ("./x/./../y", &["y"], &["x"]),
        ("/../d", &["d"], &["e"]),
        ("../d", &[], &["d", "e"]),
        ("d/../..", &[], &["d", "a"]),
        (".", &[], &["d", ".", ""]),
        ("/", &[], &["d", ""]),
        ("./", &[], &["d"]),
        ("  d \t", &["d"], &["  d"]),
        ("\u{a0}d\u{3000}", &["d"], &[]),
        ("\u{feff}d", &["d"], &["\u{feff}d"]),
        ("\u{feff}#d\ne", &["e"], &["#d", "\u{feff}#d"]),
        ("\u{feff}\u{feff}d", &["\u{feff}d"], &["d"]),
        ("a\r\nb\r\n", &["a", "b"], &["a\r"]),
        ("# d\n#e", &[], &["d", "# d", "#e"]),
        (" #d", &["#d"], &["d"]),
        ("d #e", &["d #e"], &["d"]),
        ("\n\n  \nd", &["d"], &[""]),
        ("*\n!/d/", &["e"], &["d", "d/x"]),
        ("*\n!./d/../e", &["d"], &["e"]),
        ("!!d", &[], &["d", "!d"]),
        ("*\n!!d", &["d"], &["!d"]),
        // What is cleaned to a `!` takes back, as Docker has it.
        ("*\n./!d", &["!d", "e"], &["d"]),
        ("", &[], &["", "d"]),
    ]);
}

#[test]
fn the_table_has_more_than_140_pairs() {
    let source = include_str!("tests.rs");
    let table = &source[..source.find("fn the_table_has").unwrap()];
    let lists: Vec<&str> = table.split("&[\"").skip(1).filter_map(|list| list.split(']').next()).collect();
    let pairs: usize = lists.iter().map(|list| list.split("\", \"").count()).sum();
    assert!(pairs >= 140, "{pairs}");
}

#[test]
fn malformed_rules_name_their_line() {
    for (rules, line) in [
        ("ok\n!", 2),
        ("!  ", 1),
        ("!/", 1),
        ("!/.", 1),
        ("[a", 1),
        ("a\n\nb\\", 3),
        ("[]", 1),
        ("[]a]", 1),
        ("[^]a]", 1),
        ("[-a]", 1),
        ("[a-]", 1),
        ("[a-b-c]", 1),
        ("[", 1),
        ("[^", 1),
        ("x\n!a[", 2),
        ("a/b[", 1),
        ("[a\\", 1),
        ("[z-a]", 1),
        ("**/[", 1),
        ("#[\n[", 2),
    ] {
        assert_eq!(Patterns::parse(rules).unwrap_err().line, line, "{rules:?}");
    }
    assert!(Patterns::parse("!").unwrap_err().message.contains("illegal exclusion pattern"));
    assert!(Patterns::parse("a/[b").unwrap_err().message.contains("a/[b"));
}

#[test]
fn patterns_that_are_no_file_know_no_comments() {
    let patterns = |list: &[&str]| {
        let list: Vec<String> = list.iter().map(|pattern| (*pattern).to_owned()).collect();
        Patterns::from_patterns(&list).unwrap()
    };
    assert!(patterns(&["#a"]).is_ignored("#a"));
    assert!(!patterns(&["/a"]).is_ignored("a"));
    assert!(patterns(&["*", "", "!a/./b"]).is_ignored("a"));
    assert!(!patterns(&["*", "", "!a/./b"]).is_ignored("a/b"));
    assert_eq!(patterns(&["*", "", "!a"]).deciding_rule("a").map(|rule| rule.line), Some(3));
}

#[test]
fn directories_are_entered_only_for_what_may_be_taken_back() {
    let rules = Patterns::parse("target\nnode_modules\n!target/keep/me").unwrap();
    assert!(rules.may_contain_included("target"));
    assert!(rules.may_contain_included("target/keep"));
    assert!(!rules.may_contain_included("target/kee"));
    assert!(!rules.may_contain_included("target/other"));
    assert!(!rules.may_contain_included("node_modules"));
    assert!(rules.may_contain_included("elsewhere"));
    assert_eq!(rules.deciding_rule("node_modules/x").unwrap().to_string(), "line 2 of .dockerignore");
    assert_eq!(rules.deciding_rule("elsewhere"), None);

    assert!(!Patterns::parse("!d/keep\nd").unwrap().may_contain_included("d"));
    assert!(Patterns::parse("d\n!**/keep").unwrap().may_contain_included("d/e/f"));
    assert!(Patterns::parse("d\n!d/k?ep/x").unwrap().may_contain_included("d/keep"));
    assert!(!Patterns::parse("d\n!d/k?ep/x").unwrap().may_contain_included("d/kp"));
}

#[test]
fn names_that_are_no_utf_8_match_like_characters() {
    for (pattern, path, expected) in [
        ("a?", b"a\xff".as_slice(), true),
        ("**/*.o", b"\xfe/\xff\xfe.o", true),
        ("[^x]", b"\xff", true),
        ("[x]", b"\xff", false),
        ("a?", b"a\xff\xff", false),
    ] {
        assert_eq!(glob_path(pattern.as_bytes(), path), Some(expected), "{pattern}");
    }
}

#[test]
fn globs_are_those_of_go() {
    for (pattern, name, expected) in [
        ("abc", "abc", Some(true)),
        ("abc", "ab", Some(false)),
        ("", "", Some(true)),
        ("", "a", Some(false)),
        ("*", "abc", Some(true)),
        ("*", "", Some(true)),
        ("*c", "abc", Some(true)),
        ("a*", "a", Some(true)),
        ("a*", "abc", Some(true)),
        ("a*", "ab/c", Some(false)),
        ("a*/b", "abc/b", Some(true)),
        ("a*/b", "a/c/b", Some(false)),
        ("a*b*c*d*e*/f", "axbxcxdxe/f", Some(true)),
        ("a*b*c*d*e*/f", "axbxcxdxexxx/f", Some(true)),
        ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", Some(false)),
        ("a*b?c*x", "abxbbxdbxebxczzx", Some(true)),
        ("a*b?c*x", "abxbbxdbxebxczzy", Some(false)),
        ("**", "a/b", Some(false)),
        ("**", "ab", Some(true)),
        ("**/b", "b", Some(false)),
        ("ab[c]", "abc", Some(true)),
        ("ab[b-d]", "abc", Some(true)),
        ("ab[e-g]", "abc", Some(false)),
        ("ab[^c]", "abc", Some(false)),
        ("ab[^b-d]", "abc", Some(false)),
        ("ab[^e-g]", "abc", Some(true)),
        ("a\\*b", "a*b", Some(true)),
        ("a\\*b", "ab", Some(false)),
        ("a?b", "a☺b", Some(true)),
        ("a[^a]b", "a☺b", Some(true)),
        ("a???b", "a☺b", Some(false)),
        ("a[^a][^a][^a]b", "a☺b", Some(false)),
        ("[a-ζ]*", "α", Some(true)),
        ("*[a-ζ]", "A", Some(false)),
        ("a?b", "a/b", Some(false)),
        ("a*b", "a/b", Some(false)),
        ("[\\]a]", "]", Some(true)),
        ("[\\-]", "-", Some(true)),
        ("[x\\-]", "-", Some(true)),
        ("[x\\-]", "z", Some(false)),
        ("[\\-x]", "a", Some(false)),
        ("[]a]", "]", None),
        ("[-]", "-", None),
        ("[x-]", "x", None),
        ("[a-b-c]", "a", None),
        ("[-x]", "a", None),
        ("\\", "a", None),
        ("[", "a", None),
        ("[^", "a", None),
        ("[^bc", "a", None),
        ("a[", "a", None),
        ("a[", "ab", None),
        ("a[", "x", None),
        ("a/b[", "x", None),
        ("*x", "xxx", Some(true)),
        ("[z-a]", "m", Some(false)),
    ] {
        assert_eq!(glob(pattern.as_bytes(), name.as_bytes()), expected, "{pattern:?} on {name:?}");
    }
    assert_eq!(glob(b"a?", b"a\xff"), Some(true));
    assert_eq!(glob(b"\xff*", b"\xffa"), Some(true));
    assert_eq!(glob(b"\xff", b"\xfe"), Some(false));
    assert_eq!(glob(b"[\xff]", b"a"), None);
}

#[test]
fn path_globs_cross_directories_with_two_stars() {
    for (pattern, path, expected) in [
        ("**/*.txt", "a/b/c.txt", Some(true)),
        ("./**/*.txt", "c.txt", Some(true)),
        ("/a/**/c", "a/c", Some(true)),
        ("a/**/c", "a/b/b/c", Some(true)),
        ("a/*/c", "a/b/b/c", Some(false)),
        ("a", "a/b", Some(false)),
        ("../a/../b", "b", Some(true)),
        ("a/**", "a/b/c", Some(true)),
        ("a/**", "a", Some(false)),
        ("a/[", "a", None),
        ("", "", Some(true)),
    ] {
        assert_eq!(glob_path(pattern.as_bytes(), path.as_bytes()), expected, "{pattern:?} on {path:?}");
    }
    let glob = PathGlob::new(b"a/*/c/**/x").unwrap();
    let entered = ["", "a", "a/b", "a/b/c", "a/b/c/d/e"];
    assert!(entered.iter().all(|dir| glob.may_match_below(dir)), "{glob:?}");
    let left_out = ["b", "a/b/d", "aa"];
    assert!(!left_out.iter().any(|dir| glob.may_match_below(dir)), "{glob:?}");
}

// Steps grow with the product of both lengths: these would run for ages otherwise.
#[test]
fn hostile_patterns_take_polynomial_time() {
    let long = "a/".repeat(500) + "y";
    for unit in ["**/", "**/*", "**/a/", "*/**/", "**a", "[a-z]**/", "?**"] {
        assert!(!ignored(&(unit.repeat(500) + "x"), &long), "{unit}");
    }
    assert!(!ignored(&("*a".repeat(1000) + "x"), &"a".repeat(4000)));
    assert_eq!(glob("*a".repeat(1000).as_bytes(), "b".repeat(4000).as_bytes()), Some(false));
}

#[test]
fn a_million_patterns_are_read() {
    let text = "**/a*/b?c\n".repeat(1_000_000);
    let rules = Patterns::parse(&text).unwrap();
    assert_eq!(rules.deciding_rule("x/aa/bbc").map(|rule| rule.line), Some(1_000_000));
    assert!(!rules.is_ignored("x/y"));
}

fn pattern() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "a", "b", "c", "☺", ".", "..", "/", "/", "/", "*", "*", "**", "**/", "/**", "?", "[ab]", "[^a]",
        "[a-c☺]", "[^/]", "\\*", "\\a", "\\", "[", "]", "-", "!", "#", " ",
    ]);
    prop::collection::vec(piece, 0..9).prop_map(|pieces| pieces.concat())
}

fn path() -> impl Strategy<Value = String> {
    let name = prop::collection::vec(prop::sample::select(vec!["a", "b", "c", "☺", "*", ".", "!"]), 1..4);
    prop::collection::vec(name.prop_map(|pieces| pieces.concat()), 1..5).prop_map(|names| names.join("/"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_matcher_agrees_with_the_naive_one(
        patterns in prop::collection::vec((any::<bool>(), pattern()), 1..4),
        path in path(),
    ) {
        let lines: Vec<String> =
            patterns.iter().map(|(negated, text)| format!("{}{text}", if *negated { "!" } else { "" })).collect();
        let borrowed: Vec<&str> = lines.iter().map(String::as_str).collect();
        // `.` is no component of a walked path.
        prop_assume!(path.split('/').all(|name| name != "."));
        let ours = Patterns::from_lines(&lines).ok();
        let naive = naive::is_ignored(&borrowed, &path);
        prop_assert_eq!(ours.as_ref().map(|rules| rules.is_ignored(&path)), naive);
        // Leaving a directory out must not lose what is to be there.
        if let (Some(rules), Some(false)) = (&ours, naive) {
            for (end, _) in path.match_indices('/') {
                prop_assert!(rules.may_contain_included(&path[..end]), "{} is not entered", &path[..end]);
            }
        }
    }

    #[test]
    fn a_path_glob_agrees_with_the_naive_one(pattern in pattern(), path in path()) {
        prop_assume!(path.split('/').all(|name| name != "."));
        let parts = pattern.split('/').filter(|part| !part.is_empty() && *part != ".");
        prop_assume!(parts.clone().all(|part| part != ".."));
        let clean: Vec<char> = parts.collect::<Vec<_>>().join("/").chars().collect();
        let naive = naive::is_well_formed(&clean).then(|| naive::whole_path(&clean, &path));
        prop_assert_eq!(glob_path(pattern.as_bytes(), path.as_bytes()), naive);
        if naive == Some(true) {
            let glob = PathGlob::new(pattern.as_bytes()).unwrap();
            for (end, _) in path.match_indices('/') {
                prop_assert!(glob.may_match_below(&path[..end]));
            }
        }
    }
}
