//! What scripts written for docker ask for.

use serde_json::json;

use super::*;

fn value() -> Value {
    json!({
        "Id": "abc",
        "State": { "Pid": 42, "Running": true, "Error": "" },
        "Config": { "Labels": { "a": "1", "b-c": "2" }, "Env": ["A=1", "B=2"], "Cmd": null },
        "NetworkSettings": { "Ports": { "80/tcp": [{ "HostIp": "0.0.0.0", "HostPort": "8080" }], "9/udp": null } },
        "Mounts": [],
    })
}

#[track_caller]
fn check(template: &str, expected: &str) {
    let rendered = Template::parse(template).and_then(|template| template.render(&value()));
    assert_eq!(rendered.as_deref(), Ok(expected), "{template}");
}

#[track_caller]
fn check_error(template: &str, part: &str) {
    let rendered = Template::parse(template).and_then(|template| template.render(&value()));
    let error = rendered.expect_err(template).to_string();
    assert!(error.contains(part), "{template}: {error}");
}

#[test]
fn fields_are_filled_in() {
    check("{{.State.Pid}}", "42");
    check("pid {{ .State.Pid }}, running {{.State.Running}}\n", "pid 42, running true\n");
    check("{{$.Id}}{{with .State}}{{.Pid}}{{$.Id}}{{end}}", "abc42abc");
    check("{{.Config.Env}} {{.Config.Cmd}}", "[A=1 B=2] <no value>");
    check("{{.Config.Labels.a}} {{.Config.Labels.none}}", "1 <no value>");
    check(r#"{{index .Config.Labels "b-c"}}{{index .Config.Labels "none"}}"#, "2");
    check("{{/* nothing */}}x{{- /* trims */ -}}  y", "xy");
}

#[test]
fn what_is_not_there_is_an_error() {
    check_error("{{.Stat.Pid}}", "no field .Stat");
    check_error("{{.State.Nope}}", "no field .Nope");
    check_error("{{.Id.Nope}}", "no field .Nope");
    check_error("{{.Config.Cmd.Nope}}", "nothing is there");
    check_error("{{nope .Id}}", "no function nope");
    check_error("{{$nope}}", "no variable $nope");
    check_error("{{index .Config.Env 7}}", "out of range");
}

#[test]
fn branches_and_loops() {
    check("{{if .State.Running}}up{{else}}down{{end}}", "up");
    check("{{if .State.Error}}bad{{else if .Mounts}}mounts{{else}}fine{{end}}", "fine");
    check("{{range .Config.Env}}{{.}};{{end}}", "A=1;B=2;");
    check("{{range .Mounts}}x{{else}}none{{end}}", "none");
    check("{{range $k, $v := .Config.Labels}}{{$k}}={{$v}} {{end}}", "a=1 b-c=2 ");
    check(
        "{{range $p, $conf := .NetworkSettings.Ports}}{{if $conf}}{{$p}} -> {{(index $conf 0).HostPort}}{{end}}{{end}}",
        "80/tcp -> 8080",
    );
    check(r#"{{(index (index .NetworkSettings.Ports "80/tcp") 0).HostPort}}"#, "8080");
    check("{{$x := .Id}}{{$x}}", "abc");
    check("{{if and .State.Running (eq .Id \"abc\")}}yes{{end}}", "yes");
    check("{{if or .State.Error (gt .State.Pid 50)}}yes{{else}}no{{end}}", "no");
    check("{{if not .State.Error}}fine{{end}}", "fine");
}

#[test]
fn functions_and_pipes() {
    check("{{json .State}}", r#"{"Error":"","Pid":42,"Running":true}"#);
    check("{{.State | json}}", r#"{"Error":"","Pid":42,"Running":true}"#);
    check("{{json .}}", &value().to_string());
    check(r#"{{join .Config.Env ", "}}"#, "A=1, B=2");
    check("{{upper .Id}} {{.Id | upper | lower}} {{title .Id}}", "ABC abc Abc");
    check(r#"{{printf "%-5s|%5d|%q|%.1f%%" .Id .State.Pid .Id .State.Pid}}"#, r#"abc  |   42|"abc"|42.0%"#);
    check("{{len .Config.Env}}{{len .Id}}", "23");
    check(r#"{{truncate .Id 2}}{{index (split "a:b" ":") 1}}"#, "abb");
    check(r#"{{println "x"}}"#, "x\n");
}

#[test]
fn what_cannot_be_understood_is_said() {
    for bad in
        ["{{", "{{.a", "{{if .a}}", "{{end}}", "{{else}}", "{{.a}} {{range .b}}x", "{{\"x}}", "{{|}}", "{{}}"]
    {
        assert!(Template::parse(bad).is_err(), "{bad}");
    }
    let deep = "{{if 1}}".repeat(10_000);
    assert!(Template::parse(&deep).is_err());
    let parens = format!("{{{{{}1{}}}}}", "(".repeat(50_000), ")".repeat(50_000));
    assert!(Template::parse(&parens).is_err());
    check("no braces, { one } and }}", "no braces, { one } and }}");
}

#[test]
fn listings_are_tables_lines_or_objects() {
    let headers = json!({ "ID": "CONTAINER ID", "Names": "NAMES" });
    let entries = [json!({ "ID": "abc", "Names": "web", "_Labels": { "a": "1" } })];
    let render = |format: Option<&str>| {
        Listing::parse(format, "{{.ID}}\t{{.Names}}").unwrap().render(&headers, &entries).unwrap()
    };
    assert_eq!(render(None), "CONTAINER ID   NAMES\nabc            web\n");
    assert_eq!(render(Some("table {{.Names}}\\t{{.ID}}")), "NAMES   CONTAINER ID\nweb     abc\n");
    assert_eq!(render(Some("{{.Names}}:{{.Label \"a\"}}")), "web:1\n");
    assert_eq!(render(Some("json")), "{\"ID\":\"abc\",\"Names\":\"web\"}\n");
}
