//! The scenarios of `bench/chaos/`, shortened: real processes, real etcd, every answer compared with an undisturbed
//! run. One after the other, since each wants the machine for itself.

#![expect(clippy::print_stdout, reason = "a test says what it saw and what it skipped")]

use std::{
    path::Path,
    process::Command,
    sync::{Mutex, PoisonError},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_shoal-under-test");
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[expect(clippy::disallowed_methods, reason = "the tests' surroundings, not a program's configuration")]
fn all_tools_must_be_there() -> bool {
    std::env::var("CI").as_deref() == Ok("true")
}

fn check(scenario: &str, scale: &str) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if Command::new("etcd").arg("--version").output().is_err() {
        let how =
            "etcd is not on PATH; on Debian: apt-get install etcd-server, elsewhere: https://etcd.io/docs";
        assert!(!all_tools_must_be_there(), "{how}");
        return println!("skipped: {how}");
    }
    let path = Path::new(ROOT).join(format!("bench/chaos/{scenario}.toml"));
    let mut command = Command::new(PROGRAM);
    // Flags can come from SHOAL_* variables: a person's own must not change a test.
    std::env::vars().map(|(name, _)| name).filter(|name| name.starts_with("SHOAL_")).for_each(|name| {
        command.env_remove(name);
    });
    let output = command
        .args(["--log-filter", "warn", "chaos", "--scale", scale, "--model"])
        .arg(Path::new(ROOT).join("models/minnow"))
        .arg(path)
        .output()
        .expect("the program runs");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    if said.contains("this machine gives no network namespaces") {
        return println!("skipped: {said}");
    }
    assert!(output.status.success(), "{scenario}: {}", output.status);
}

#[test]
fn r1_an_expert_server_dies_and_a_spare_comes() {
    check("r1", "0.12");
}

#[test]
fn r3_half_of_the_expert_servers_die_at_once() {
    check("r3-half", "0.2");
}

#[test]
fn r3_routers_die_one_after_the_other() {
    check("r3-routers", "0.4");
}

#[test]
fn r4_the_only_holder_dies_and_another_server_loads_its_experts() {
    check("r4-spare", "0.4");
}

#[test]
fn r5_a_frozen_expert_server_is_ejected_and_comes_back() {
    check("r5", "0.15");
}

#[test]
fn r6_packets_are_dropped_one_way_and_both_ways() {
    check("r6-partition", "0.4");
}

#[test]
fn r7_packets_are_lost_at_random() {
    check("r7-loss", "0.3");
}

#[test]
fn r9_etcd_is_down_and_comes_back_with_its_data() {
    check("r9-down", "0.15");
}

#[test]
fn r9_etcd_comes_back_empty() {
    check("r9-wiped", "0.3");
}

#[test]
fn r11_every_process_is_restarted_in_turn() {
    check("r11", "0.12");
}

#[test]
fn r12_two_expert_servers_become_four_and_two_again() {
    check("r12", "0.12");
}

#[test]
fn r15_flipped_bits_are_found() {
    check("r15", "0.2");
}

#[test]
fn a_far_server_costs_little() {
    check("slow", "0.2");
}
