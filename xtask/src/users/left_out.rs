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

    /// Whether it is left out for its time only: it would pass.
    pub(super) fn would_pass(&self) -> bool {
        [CAMPAIGN, PARSERS, SAME].contains(&self.why)
    }

    /// As a part of a regular expression that begins where the name does.
    pub(super) fn pattern(&self) -> String {
        if self.is_group() { self.tests.to_owned() } else { format!("{}$", self.tests) }
    }
}

const fn both(tests: &'static str, why: &'static str) -> LeftOut {
    LeftOut { tests, of: None, why }
}

const fn range(tests: &'static str, why: &'static str) -> LeftOut {
    LeftOut { tests, of: Some(Ids::Range), why }
}

const fn single(tests: &'static str, why: &'static str) -> LeftOut {
    LeftOut { tests, of: Some(Ids::Single), why }
}

const CAMPAIGN: &str = "a campaign over crashes, races or input, minutes long: root's is the same code";
const PARSERS: &str = "a catalogue of what is refused before anything asks who runs it";
const SAME: &str = "long, and the same code on the same files whoever runs it: root's turn has it";
const PEERS: &str = "it starts other builders, which are root's there";
const OWN: &str = "makes users of its own";
const MOUNTS: &str = "root mounts something for it";
const BRIDGES: &str = "bridges are root's; users' ports and networks are in rootless::";
const PRIVILEGES: &str =
    "about a kiln that has lost a part of root's power: a user's has all of it in its namespace";
const MODES: &str =
    "about files that their reader may not read: a user's kiln may read all of the user's files";
const DEVICES: &str = "nobody makes devices in a user namespace";
const GROUPS: &str = "needs a control group; users have one where it was delegated to them";
const BY_HAND: &str = "it starts a part of kiln by hand, and a user's is started inside a namespace";
const OTHERS: &str = "root gives files or processes to others there";

const INSIDE: &str =
    "owners are seen from inside, where one id is all there is; rootless:: looks into the layers";
const FILTER: &str = "with one id a filter for chown is always there, and there are no groups to add";

pub(super) const LEFT_OUT: &[LeftOut] = &[
    both("rootless::", OWN),
    both("bit_rot::", CAMPAIGN),
    both("concurrency::", CAMPAIGN),
    both("differential::", CAMPAIGN),
    both("edits::", CAMPAIGN),
    both("faults::", CAMPAIGN),
    both("full_disk::", CAMPAIGN),
    both("interrupts::", CAMPAIGN),
    both("kills::", CAMPAIGN),
    both("power::", CAMPAIGN),
    both("interop::", PEERS),
    both("remote_cache_s3::", CAMPAIGN),
    both("remote_cache_ends::", CAMPAIGN),
    both("remote_cache_clouds::", SAME),
    both("registry::own::cache::a_registry_that_dies_costs_time_and_nothing_else", CAMPAIGN),
    both("registry::own::cache::a_registry_that_falls_silent_costs_time_and_nothing_else", CAMPAIGN),
    both("stamps::", MOUNTS),
    both("registry::attestations::", PEERS),
    both("registry::transfer::", PEERS),
    both("registry::directions::", PEERS),
    both("registry::collected::", CAMPAIGN),
    both("registry::own::peers::", PEERS),
    both("registry::own::store::other_tools_pull_from_a_store", PEERS),
    both("registry::own::pushes::tools_push_to_a_store_and_pull_it_back", PEERS),
    both("registry::own::pushes::an_image_for_several_platforms_comes_whole_and_one_of_them_runs", PEERS),
    both("registry::own::pushes::many_push_and_pull_while_garbage_is_collected", CAMPAIGN),
    both("registry::own::crowd::", CAMPAIGN),
    both("registry::own::many::", CAMPAIGN),
    both("registry::own::limits::a_full_disk_is_said_and_with_more_room_the_same_push_is_taken", MOUNTS),
    both("registry::hostile::", PARSERS),
    both("registry::replies::", PARSERS),
    both("registry::copy::", PEERS),
    both("registry::lists::", PEERS),
    both("registry::platforms::an_index_is_pushed_and_each_platform_is_built_on", PEERS),
    both("platforms::a_step_runs_by_the_emulator_that_the_kernel_has_a_rule_for", MOUNTS),
    both("platforms::a_container_runs_by_the_emulator_that_the_kernel_has_a_rule_for", MOUNTS),
    both("layers::implied::umoci_unpacks_what_kiln_loads_to_the_same_tree", PEERS),
    both("toolkit_mutate::other_tools_unpack_the_new_images_to_the_same_tree", PEERS),
    both("build_process::a_run_reaches_the_network_through_nat_although_forward_is_dropped", BRIDGES),
    both("containers::networks::", BRIDGES),
    both("containers::ports::", BRIDGES),
    both("context::mount_point_inside_the_context_is_crossed", MOUNTS),
    both("gc::a_disk_that_is_full_to_the_last_byte_can_be_cleared", MOUNTS),
    both("layers::large::", MOUNTS),
    both("shell::an_image_without_a_shell_is_lent_one", MOUNTS),
    both("context::unreadable_directory_that_is_needed_is_an_error", MODES),
    both("context::unreadable_ignore_file_is_an_error", MODES),
    both("fsck::what_one_command_could_not_prove_the_next_does", PRIVILEGES),
    both("fsck::without_a_privilege_nothing_is_taken_for_damaged", PRIVILEGES),
    both(
        "layers::catalogue::t14_to_t16_devices_are_of_no_use_on_the_host_and_pipes_are_not_opened",
        "about devices in the store: a user's has files that stand for them, which rootless:: tests",
    ),
    both("outputs::devices_that_a_directory_does_not_get_are_told_in_one_warning", DEVICES),
    both("run_mounts::devices_made_by_a_step_do_not_open", DEVICES),
    both("containers::end::exec_answers_with_dockers_codes", GROUPS),
    both("containers::end::an_interrupt_of_its_caller_is_nothing_to_a_monitor_that_begins", BY_HAND),
    both("containers::end::the_exit_code_is_known_although_the_disk_is_full", MOUNTS),
    both("containers::settings::limits_change_while_it_runs_and_stay", GROUPS),
    both("containers::settings::limits_of_a_stopped_container_are_for_its_next_start", GROUPS),
    both("sandbox::attacks::a02_no_descriptor_and_no_working_directory_leads_out", GROUPS),
    both("sandbox::run_options::a_killed_kilns_group_is_removed_by_the_next", GROUPS),
    both("command_line::c10_without_a_home_a_user_is_asked_where_the_store_is", OTHERS),
    both("sandbox::paths::a17_nobody_else_on_the_host_reaches_what_is_stored", OTHERS),
    both("surroundings::c08_and_c09_a_store_that_somebody_else_could_swap_is_not_used", OTHERS),
    both("signals::c13_any_moment_is_a_good_one", CAMPAIGN),
    both("signals::c13_reading_is_stopped_by_each_signal", CAMPAIGN),
    both("signals::c13_writing_is_stopped_by_each_signal", CAMPAIGN),
    both("surroundings::c14_few_descriptors_are_enough_or_said", CAMPAIGN),
    both("surroundings::c15_a_limit_on_files_is_an_error_and_no_death", CAMPAIGN),
    both("layers::backends::more_layers_than_the_kernel_stacks_are_an_error_that_says_what_to_do", CAMPAIGN),
    both("layers::catalogue::t13_more_links_than_the_file_system_has_become_copies", CAMPAIGN),
    both("toolkit_layer::hundred_thousand_files_need_little_memory", CAMPAIGN),
    both("catalogue::", PARSERS),
    both("check::", PARSERS),
    both("keys::", SAME),
    both("context::large_context_stays_within_memory", SAME),
    both("du::sizes_agree_with_du_to_one_percent", SAME),
    both("fsck::damaged_blobs_are_found_forgotten_and_made_anew", SAME),
    both("fsck::damaged_packed_layers_are_found_forgotten_and_packed_again", SAME),
    both("fsck::damaged_places_of_snapshots_are_found_forgotten_and_made_anew", SAME),
    both("fsck::without_index_and_journal_all_that_is_written_beside_layers_comes_back", SAME),
    both("gc::builds_loads_and_containers_race_with_collection_and_lose_nothing", CAMPAIGN),
    both("image::damaged_blobs_are_whole_again_when_they_are_loaded_again", SAME),
    both("layers::catalogue::t42_a_bomb_is_cut_off_and_its_disk_returned", SAME),
    both("layers::catalogue::t42_honest_zeros_pass_when_their_size_is_named", SAME),
    both("layers::catalogue::trees_as_deep_as_paths_go_can_be_loaded_saved_and_removed", SAME),
    both("why::the_one_thing_that_changed_is_named_and_nothing_else", CAMPAIGN),
    both("manifests::", PARSERS),
    single("deltas::a_delta_has_what_changed_and_nothing_else", INSIDE),
    single("kept_layers::a_layer_is_kept_where_the_copy_finds_the_same_and_nowhere_else", INSIDE),
    single("build::copied_files_have_the_owner_mode_and_name_that_was_asked_for", INSIDE),
    single("cache_mount::a_cache_mount_travels_as_a_tar", INSIDE),
    single("copy::archives_are_told_by_content", INSIDE),
    single("copy::owner_mode_time_and_hard_links_of_a_copy", INSIDE),
    single("layers::implied::appended_and_added_tars_leave_directories_alone_too", INSIDE),
    single("layers::implied::directories_of_lower_layers_stay_as_they_are", INSIDE),
    single("remote_add::flags_of_a_download", INSIDE),
    single("remote_contexts::files_of_an_archive_keep_their_owner_mode_and_time", INSIDE),
    single(
        "certificates::what_knows_only_the_distributions_file_finds_it_there",
        "KNOWN FAULT: with one id, --ca-cert does not reach what reads only the distribution's file",
    ),
    single("run_mounts::a_secret_is_read_by_its_step_and_held_by_nothing_else", INSIDE),
    single("sandbox::identity::a07_a_step_is_held_back_unless_it_was_allowed_not_to_be", FILTER),
    single("sandbox::run_options::options_do_what_they_say", FILTER),
    single("layers::backends::all_snapshotters_build_the_same_tree", INSIDE),
    range("layers::implied::directories_of_lower_layers_stay_as_they_are", OTHERS),
    single("runtime::", "with one id a runtime is refused, which rootless:: tests"),
];
