//! Every attribute, as users write it.

use std::path::PathBuf;

use kiln_layer::Codec;

use super::*;

fn parse(text: &str) -> Output {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[track_caller]
fn check_error(text: &str, expected: &str) {
    match text.parse::<Output>() {
        Ok(output) => panic!("{text} is {output:?}"),
        Err(error) => assert_eq!(error.to_string(), expected),
    }
}

fn path(text: &str) -> Dest {
    Dest::Path(PathBuf::from(text))
}

fn archive(text: &str) -> ArchiveOutput {
    match parse(text) {
        Output::Archive(archive) => archive,
        other => panic!("{text} is {other:?}"),
    }
}

#[test]
fn a_directory_or_a_dash_says_it_all() {
    assert_eq!(parse("out/dir"), Output::Local(TreeOutput::to(path("out/dir"))));
    assert_eq!(parse("-"), Output::Tar(TreeOutput::to(Dest::Stdout)));
    assert_eq!(parse("type=cacheonly"), Output::CacheOnly);
    assert_eq!(parse("type=tar"), Output::Tar(TreeOutput::to(Dest::Stdout)));
    assert_eq!(parse("type=tar,dest=a.tar"), Output::Tar(TreeOutput::to(path("a.tar"))));
    let mut delete = TreeOutput::to(path("d"));
    (delete.platform_split, delete.mode) = (Some(true), LocalMode::Delete);
    assert_eq!(parse("type=local,dest=d,mode=delete,platform-split=true"), Output::Local(delete));
}

#[test]
fn archives_say_where_and_how() {
    let found = archive(
        "type=oci,dest=a.tar,\"name=app:1,app:2\",compression=zstd,compression-level=9,force-compression=true",
    );
    assert_eq!(found.dest, path("a.tar"));
    assert_eq!(found.names.iter().map(Reference::familiar).collect::<Vec<_>>(), ["app:1", "app:2"]);
    let packing = Packing::Stream(Codec::Zstd { level: 9 });
    assert_eq!(found.format.compress, Some(Compress { packing, level_given: true, force: true }));
    assert!(!found.directory && archive("type=oci,tar=false,dest=d").directory);
    let docker = archive("type=docker,dest=-,oci-mediatypes=false,rewrite-timestamp=true");
    assert!(docker.kind == ArchiveFormat::Docker && docker.dest == Dest::Stdout);
    assert!(docker.format.docker_types && docker.format.rewrite_timestamp);
    assert_eq!(docker.format.compress, None);
}

#[test]
fn an_output_may_have_a_time_of_its_own() {
    let of = |text: &str| match parse(text) {
        Output::Image(image) => image.format.epoch,
        Output::Archive(archive) => archive.format.epoch,
        Output::Tar(tree) | Output::Local(tree) => tree.epoch,
        Output::CacheOnly => None,
    };
    for kind in ["image", "registry", "docker", "docker,dest=a", "oci", "tar", "local,dest=d"] {
        assert_eq!(of(&format!("type={kind},source-date-epoch=1000")), Some(1000), "{kind}");
        assert_eq!(of(&format!("type={kind},source-date-epoch=")), None, "{kind}");
        assert_eq!(of(&format!("type={kind}")), None, "{kind}");
    }
    for wrong in ["x", "-1", "1.5", "253402300800", "9223372036854775808"] {
        let text = format!("type=oci,source-date-epoch={wrong}");
        check_error(&text, &format!("source-date-epoch={wrong} is no number of seconds since 1970"));
    }
    check_error(
        "type=cacheonly,source-date-epoch=1",
        "type=cacheonly has no attribute \"source-date-epoch\"",
    );
}

#[test]
fn a_registry_without_encryption_is_not_for_an_output_to_allow() {
    for kind in ["image", "registry"] {
        parse(&format!("type={kind},name=a,registry.insecure=false"));
        let error = format!("type={kind},name=a,registry.insecure=true").parse::<Output>().unwrap_err();
        assert!(error.to_string().contains("--insecure-registry HOST"), "{error}");
    }
    check_error("type=oci,registry.insecure=true", "type=oci has no attribute \"registry.insecure\"");
}

#[test]
fn docker_without_a_file_is_an_image_in_the_store() {
    let Output::Image(image) = parse("type=docker,name=app") else { panic!() };
    assert_eq!(image.names[0].familiar(), "app:latest");
    let Output::Image(image) =
        parse("type=image,name-canonical=true,dangling-name-prefix=none,unpack=true,store=true,push=false")
    else {
        panic!()
    };
    assert!(image.canonical && image.dangling_prefix.is_some());
}

#[test]
fn annotations_are_of_a_manifest_its_descriptor_or_one_platform() {
    let text = "type=oci,annotation.a=1,annotation-manifest.b.c=2,annotation[linux/arm64].d=3,\
                annotation-manifest-descriptor[linux/amd64].E=4";
    let mut format = archive(text).format;
    let amd64: Platform = "linux/amd64".parse().unwrap();
    let pairs =
        |map: BTreeMap<String, String>| map.into_iter().map(|(k, v)| k + "=" + &v).collect::<Vec<_>>();
    assert_eq!(pairs(format.annotations.of_manifest(&amd64)), ["a=1", "b.c=2"]);
    assert_eq!(pairs(format.annotations.of_descriptor(&amd64)), ["E=4"]);
    format.annotations.add_flag("k=v").unwrap();
    format.annotations.add_flag("manifest,manifest-descriptor:x:y=z=1").unwrap();
    assert_eq!(pairs(format.annotations.of_manifest(&amd64)), ["a=1", "b.c=2", "k=v", "x:y=z=1"]);
    assert_eq!(pairs(format.annotations.of_descriptor(&amd64)), ["E=4", "x:y=z=1"]);
    assert!(format.annotations.add_flag("no-value").is_err());
}

#[test]
fn mistakes_are_named() {
    check_error("dest=out,mode=copy", "the type is missing");
    check_error("type=local", "type=local needs dest=DIR");
    check_error("type=local,dest=-", "type=local writes a directory, not to `-`");
    check_error("type=oci,dest", "\"dest\" is not NAME=VALUE");
    check_error("type=oci,tar=false", "tar=false writes a directory: say which with dest=DIR");
    check_error("type=oci,colour=red", "type=oci has no attribute \"colour\"");
    check_error(
        "type=local,dest=x,attestation-prefix=a/b",
        "attestation-prefix=\"a/b\" does not begin the name of a file",
    );
    check_error("type=cacheonly,dest=x", "type=cacheonly has no attribute \"dest\"");
    check_error("type=local,dest=x,compression=gzip", "type=local has no attribute \"compression\"");
    check_error("type=oci,compression=rar", "\"rar\" is none of uncompressed, gzip, zstd, estargz");
    check_error("type=oci,compression-level=x", "compression-level=x is no number");
    check_error("type=oci,force-compression=maybe", "force-compression=maybe is neither true nor false");
    check_error("type=registry,push=maybe,nonsense=1", "type=registry has no attribute \"nonsense\"");
    let types = "type=rpm is none of image, docker, oci, tar, local, cacheonly, registry";
    check_error("type=rpm", types);
    check_error("\"type=oci", "\"\\\"type=oci\": quotes stand around a whole field, or twice inside them");
}

#[test]
fn what_is_for_several_platforms_or_for_one_only_is_told() {
    let told = |text: &str, several| parse(text).check(several, false).err().map(|error| error.to_string());
    let index = "type=oci,annotation-index.a=1,annotation-index-descriptor.b=2";
    assert_eq!(told(index, false).unwrap(), "an image for one platform has no index to annotate");
    assert_eq!(told(index, true), None);
    let docker = "type=docker,dest=x";
    assert!(told(docker, true).unwrap().contains("type=oci") && told(docker, false).is_none());
    let mixed = "type=local,dest=x,mode=delete,platform-split=false";
    assert!(told(mixed, true).unwrap().contains("mode=delete") && told(mixed, false).is_none());
    for text in ["type=image", "type=oci", "type=tar", "type=local,dest=x,mode=delete", "type=cacheonly"] {
        assert_eq!((told(text, true), told(text, false)), (None, None), "{text}");
    }
    // What is said of an image makes an index of it, and docker's types have no place for that.
    let attested = |text: &str| parse(text).check(false, true).err().map(|error| error.to_string());
    assert_eq!(attested(index), None);
    assert!(attested("type=image,oci-mediatypes=false").unwrap().contains("media types"));
    assert_eq!(attested("type=docker,dest=x,oci-mediatypes=false"), None, "it holds none anyway");
    check_error(
        "type=oci,annotation-index[linux/arm64].a=1",
        "\"index[linux/arm64]\": an index is of all platforms",
    );
}
