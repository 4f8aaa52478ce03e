//! The catalogue of bad input, and of attacks on the sandbox (A): which test is which case. D are in
//! `catalogue.rs` and in the frontend's corpus, X in `context.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Cases from and to, the file below this directory, the test.
const CASES: &[(&str, u32, u32, &str, &str)] = &[
    ("T", 1, 5, "layers/catalogue.rs", "t01_to_t05_paths_stay_inside"),
    ("T", 6, 7, "layers/catalogue.rs", "t06_and_t07_a_directory_replaces_a_link_and_nothing_the_root"),
    ("T", 8, 12, "layers/catalogue.rs", "t08_to_t12_hard_links_lead_to_earlier_files_of_the_layer"),
    ("T", 13, 13, "layers/catalogue.rs", "t13_more_links_than_the_file_system_has_become_copies"),
    (
        "T",
        14,
        16,
        "layers/catalogue.rs",
        "t14_to_t16_devices_are_of_no_use_on_the_host_and_pipes_are_not_opened",
    ),
    ("T", 17, 21, "layers/catalogue.rs", "t17_to_t21_whiteouts_name_something_inside"),
    (
        "T",
        22,
        25,
        "layers/catalogue.rs",
        "t22_to_t25_attributes_of_overlayfs_are_dropped_and_bad_ones_refused",
    ),
    ("T", 26, 28, "layers/catalogue.rs", "t26_to_t28_extensions_mean_what_they_mean_to_go"),
    ("T", 29, 33, "layers/catalogue.rs", "t29_to_t33_numbers_without_measure"),
    ("T", 34, 37, "layers/catalogue.rs", "t34_to_t37_damage_and_what_may_be_missing"),
    ("T", 38, 41, "layers/catalogue.rs", "t38_to_t41_compressed_streams"),
    ("T", 42, 42, "layers/catalogue.rs", "t42_a_bomb_is_cut_off_and_its_disk_returned"),
    ("T", 43, 44, "layers/catalogue.rs", "t43_and_t44_names_that_are_too_much"),
    ("J", 1, 2, "manifests.rs", "j01_and_j02_a_document_is_one_thing_and_what_was_announced"),
    ("J", 3, 3, "manifests.rs", "j03_a_manifest_of_schema_1_is_named_so"),
    ("J", 4, 6, "manifests.rs", "j04_to_j06_a_digest_is_sha256_and_64_digits"),
    ("J", 7, 9, "manifests.rs", "j07_to_j09_sizes_are_what_they_say"),
    ("J", 10, 10, "manifests.rs", "j10_a_manifest_beyond_4_mib_is_not_read"),
    ("J", 10, 10, "manifests.rs", "j10_all_documents_together_are_bound_too"),
    ("J", 11, 12, "manifests.rs", "j11_and_j12_depth_is_bound_and_a_name_stands_once"),
    ("J", 13, 14, "manifests.rs", "j13_and_j14_indexes_in_indexes_end"),
    ("J", 15, 15, "manifests.rs", "j15_platforms_that_are_there_are_listed"),
    ("J", 16, 17, "manifests.rs", "j16_and_j17_layers_are_those_of_the_config"),
    ("J", 18, 18, "manifests.rs", "j18_urls_of_layers_are_never_asked"),
    ("J", 19, 22, "manifests.rs", "j19_to_j22_configs_that_would_run_something_else"),
    ("J", 21, 21, "manifests.rs", "j21_labels_of_64_mib_are_not_read"),
    ("C", 1, 2, "command_line.rs", "c01_and_c02_what_is_no_command_line_is_answered_with_one_that_is"),
    ("C", 3, 3, "command_line.rs", "c03_a_name_is_a_name"),
    ("C", 4, 5, "command_line.rs", "c04_and_c05_arguments_have_names_and_platforms_two_words"),
    ("C", 6, 6, "surroundings.rs", "c06_a_closed_standard_input_is_an_error_of_the_source"),
    ("C", 7, 7, "surroundings.rs", "c07_a_context_that_is_none_is_named"),
    ("C", 8, 9, "surroundings.rs", "c08_and_c09_a_store_that_somebody_else_could_swap_is_not_used"),
    ("C", 10, 10, "command_line.rs", "c10_without_a_home_a_user_is_asked_where_the_store_is"),
    ("C", 11, 11, "command_line.rs", "c11_garbage_in_the_environment_is_named"),
    ("C", 12, 12, "surroundings.rs", "c12_nobody_who_listens_is_no_panic"),
    ("C", 12, 12, "bad_input.rs", "an_answer_that_cannot_be_written_is_no_success"),
    ("C", 13, 13, "signals.rs", "c13_a_step_is_stopped_by_each_signal"),
    ("C", 13, 13, "signals.rs", "c13_reading_is_stopped_by_each_signal"),
    ("C", 13, 13, "signals.rs", "c13_writing_is_stopped_by_each_signal"),
    ("C", 13, 13, "signals.rs", "c13_any_moment_is_a_good_one"),
    ("C", 14, 14, "surroundings.rs", "c14_few_descriptors_are_enough_or_said"),
    ("C", 15, 15, "surroundings.rs", "c15_a_limit_on_files_is_an_error_and_no_death"),
    ("C", 16, 16, "surroundings.rs", "c16_a_mask_changes_no_mode"),
    ("C", 17, 17, "surroundings.rs", "c17_a_directory_that_is_gone_is_an_error_of_the_source"),
    ("C", 18, 18, "surroundings.rs", "c18_clocks_of_1970_and_2106_are_clocks"),
    ("C", 19, 19, "command_line.rs", "c19_a_broken_configuration_is_named_with_its_line"),
    ("C", 19, 19, "registry/login.rs", "a_broken_file_of_credentials_is_named"),
    ("C", 20, 20, "command_line.rs", "c20_flags_that_contradict_each_other_are_refused"),
    (
        "C",
        20,
        20,
        "registry/bases.rs",
        "a_build_pulls_what_it_stands_on_and_asks_nobody_when_nothing_changed",
    ),
    ("C", 21, 23, "remote_git.rs", "what_would_reach_options_or_other_files_is_refused"),
    ("M", 1, 4, "catalogue.rs", "bad_mounts_are_refused_with_place_and_exit_code"),
    ("M", 5, 7, "run_mounts.rs", "odd_mounts_stay_inside"),
    ("M", 6, 6, "sandbox/paths.rs", "a08_cache_names_and_mount_options_mean_nothing_but_themselves"),
    ("M", 7, 13, "catalogue.rs", "bad_mounts_are_refused_with_place_and_exit_code"),
    ("M", 14, 14, "run_mounts.rs", "a_missing_required_secret_is_named_with_what_to_pass"),
    ("J", 2, 3, "registry/replies.rs", "j02_and_j03_a_manifest_is_what_it_was_announced_as"),
    ("J", 18, 18, "registry/hostile.rs", "urls_of_layers_are_never_asked"),
    ("R", 1, 5, "registry/replies.rs", "r01_to_r05_challenges_and_token_servers"),
    ("R", 2, 2, "../../../crates/registry/src/auth.rs", "a_token_server_without_encryption_is_refused"),
    ("R", 6, 8, "registry/replies.rs", "r06_to_r08_redirects"),
    ("R", 9, 11, "registry/replies.rs", "r09_to_r11_what_passes_is_waited_for_within_bounds"),
    ("R", 12, 14, "registry/replies.rs", "r12_to_r14_ranges"),
    ("R", 15, 16, "registry/replies.rs", "r15_and_r16_what_stands_still_is_given_up"),
    ("R", 17, 17, "registry/replies.rs", "r17_a_certificate_of_nobody_known_is_refused"),
    ("R", 18, 21, "registry/replies.rs", "r18_to_r21_other_bytes_than_promised_are_not_kept"),
    ("R", 22, 22, "registry/replies.rs", "r22_a_tag_that_moves_leads_to_one_image"),
    ("R", 23, 27, "registry/replies.rs", "r23_to_r27_uploads"),
    ("A", 1, 1, "sandbox/attacks.rs", "a01_kilns_binary_cannot_be_overwritten_from_inside"),
    ("A", 2, 2, "sandbox/attacks.rs", "a02_no_descriptor_and_no_working_directory_leads_out"),
    ("A", 3, 3, "sandbox/races.rs", "a03_a_step_that_shares_a_cache_sends_no_mount_elsewhere"),
    ("A", 4, 4, "sandbox/paths.rs", "a04_links_in_an_image_lead_no_mount_out"),
    ("A", 5, 5, "sandbox/races.rs", "a05_a_source_that_becomes_a_link_shows_nothing_of_the_host"),
    ("A", 6, 6, "sandbox/paths.rs", "a06_what_kiln_made_for_a_mount_is_taken_out_and_nothing_else"),
    ("A", 7, 7, "sandbox/identity.rs", "a07_a_step_is_held_back_unless_it_was_allowed_not_to_be"),
    ("A", 8, 8, "sandbox/paths.rs", "a08_cache_names_and_mount_options_mean_nothing_but_themselves"),
    ("A", 9, 9, "sandbox/identity.rs", "a09_a_users_file_that_is_none_is_an_error_at_once"),
    ("A", 10, 10, "sandbox/paths.rs", "a10_a_working_directory_is_made_inside"),
    ("A", 11, 11, "sandbox/identity.rs", "a11_what_is_no_user_is_never_root"),
    ("A", 12, 12, "sandbox/attacks.rs", "a12_nothing_of_the_host_is_known_inside"),
    ("A", 13, 13, "sandbox/attacks.rs", "a13_nothing_survives_its_step"),
    ("A", 14, 14, "sandbox/attacks.rs", "a14_a_step_cannot_use_the_machine_up"),
    ("A", 14, 14, "full_disk.rs", "a14_a_step_that_uses_up_all_inodes_gives_them_back"),
    ("A", 15, 15, "sandbox/identity.rs", "a15_no_process_of_the_host_is_within_reach"),
    ("A", 16, 16, "sandbox/paths.rs", "a16_devices_that_come_with_an_image_do_not_open"),
    ("A", 17, 17, "sandbox/paths.rs", "a17_nobody_else_on_the_host_reaches_what_is_stored"),
];

#[test]
fn every_case_has_a_test() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli");
    let mut tested = BTreeSet::new();
    for &(kind, from, to, file, test) in CASES {
        let source = fs::read_to_string(here.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(
            source.replace("    ", "").contains(&format!("#[test]\nfn {test}() {{")),
            "{file} has no test {test}"
        );
        tested.extend((from..=to).map(|number| format!("{kind}{number:02}")));
    }
    let all: BTreeSet<String> = [("T", 44), ("J", 22), ("C", 23), ("M", 14), ("A", 17), ("R", 27)]
        .into_iter()
        .flat_map(|(kind, count)| (1..=count).map(move |number| format!("{kind}{number:02}")))
        .collect();
    let missing: Vec<_> = all.difference(&tested).collect();
    assert!(missing.is_empty(), "no test is {missing:?}");
    let unknown: Vec<_> = tested.difference(&all).collect();
    assert!(unknown.is_empty(), "these are no cases: {unknown:?}");
}
