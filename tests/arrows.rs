//! Who may depend on whom. The table is ARCHITECTURE.md's map of rooms; cargo's own metadata says what is true.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    process::Command,
};

use serde_json::Value;

/// One package of ours.
struct Room {
    name: &'static str,
    /// Packages of ours that it may use, in `[dependencies]`.
    uses: &'static [&'static str],
    /// And in tests only.
    tests_use: &'static [&'static str],
    /// Packages of others that it must not reach, even through others.
    never_reaches: &'static [&'static str],
}

/// Command lines and their errors belong to programs: `anyhow` and `clap` are for services and what is above them.
const PROGRAMS_ONLY: [&str; 2] = ["anyhow", "clap"];

const ROOMS: [Room; 13] = [
    Room {
        name: "ids",
        uses: &[],
        tests_use: &[],
        never_reaches: &["tokio", "tonic", "candle-core", "serde", "bytes"],
    },
    Room {
        name: "proto",
        uses: &["ids"],
        tests_use: &[],
        never_reaches: &["candle-core", "safetensors", "etcd-client", "clap", "tokenizers"],
    },
    Room {
        name: "text",
        uses: &[],
        tests_use: &[],
        never_reaches: &["candle-core", "safetensors", "tonic", "tokio", "reqwest", "axum"],
    },
    Room {
        name: "model",
        uses: &["ids"],
        tests_use: &[],
        never_reaches: &["tokio", "tonic", "prost", "etcd-client", "tracing", "tokenizers"],
    },
    Room {
        name: "telemetry",
        uses: &[],
        tests_use: &[],
        // `/metrics` is an axum route, which the services hang into their own routes.
        never_reaches: &["candle-core", "safetensors", "etcd-client", "clap"],
    },
    Room {
        name: "cluster",
        uses: &["ids", "telemetry"],
        tests_use: &[],
        never_reaches: &["candle-core", "safetensors", "tokenizers"],
    },
    Room {
        name: "shard",
        uses: &["ids", "proto", "model", "cluster"],
        tests_use: &[],
        never_reaches: &["tokenizers", "minijinja", "clap"],
    },
    Room {
        name: "expert-svc",
        uses: &["ids", "proto", "model", "cluster", "shard", "telemetry"],
        tests_use: &[],
        never_reaches: &["tokenizers", "minijinja"],
    },
    Room {
        name: "router-svc",
        uses: &["ids", "proto", "model", "cluster", "shard", "telemetry"],
        tests_use: &[],
        never_reaches: &["tokenizers", "minijinja"],
    },
    Room {
        name: "gateway",
        uses: &["ids", "proto", "text", "cluster", "telemetry"],
        tests_use: &[],
        never_reaches: &["candle-core", "safetensors", "memmap2"],
    },
    Room {
        name: "shoal",
        uses: &[
            "ids",
            "proto",
            "cluster",
            "model",
            "text",
            "telemetry",
            "expert-svc",
            "router-svc",
            "gateway",
            "bench",
        ],
        tests_use: &[],
        never_reaches: &[],
    },
    // Sees the program from outside.
    Room {
        name: "bench",
        uses: &["cluster", "proto", "telemetry"],
        tests_use: &[],
        never_reaches: &["candle-core", "safetensors", "tokenizers"],
    },
    // `shoal` is for the program under test alone: tidy.rs looks where it is named.
    Room {
        name: "tests",
        uses: &["shoal"],
        tests_use: &["cluster", "proto", "telemetry"],
        never_reaches: &[],
    },
];

/// What cargo knows of the workspace.
struct Metadata {
    packages: HashMap<String, Value>,
    members: Vec<String>,
    /// By package id: the ids that it depends on outside of tests.
    graph: HashMap<String, Vec<String>>,
}

impl Metadata {
    fn load() -> Self {
        let target = host();
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version=1", "--locked", "--filter-platform", &target])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let list = |value: &Value| value.as_array().expect("a list").clone();
        let text = |value: &Value| value.as_str().expect("a string").to_owned();
        let packages = list(&metadata["packages"]).into_iter().map(|package| (text(&package["id"]), package));
        let graph = list(&metadata["resolve"]["nodes"]).into_iter().map(|node| {
            let outside_of_tests = list(&node["deps"])
                .into_iter()
                .filter(|dependency| list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"] != "dev"));
            (text(&node["id"]), outside_of_tests.map(|dependency| text(&dependency["pkg"])).collect())
        });
        Self {
            packages: packages.collect(),
            graph: graph.collect(),
            members: list(&metadata["workspace_members"]).iter().map(text).collect(),
        }
    }

    fn name(&self, id: &str) -> &str {
        self.packages[id]["name"].as_str().expect("a name")
    }

    /// Names of the packages that a member lists, of ours and of others, by kind (`normal`, `build` or `dev`).
    fn listed(&self, id: &str) -> BTreeMap<String, BTreeSet<String>> {
        let mut listed = BTreeMap::<_, BTreeSet<String>>::new();
        for dependency in self.packages[id]["dependencies"].as_array().expect("a list") {
            let kind = dependency["kind"].as_str().unwrap_or("normal");
            let name = dependency["name"].as_str().expect("a name");
            listed.entry(kind.to_owned()).or_default().insert(name.to_owned());
        }
        listed
    }

    /// Names of everything that a member is built from.
    fn reached(&self, id: &str) -> BTreeSet<&str> {
        let mut reached = BTreeSet::new();
        let mut open = vec![id];
        let mut seen = BTreeSet::from([id]);
        while let Some(next) = open.pop() {
            for dependency in &self.graph[next] {
                if seen.insert(dependency) {
                    reached.insert(self.name(dependency));
                    open.push(dependency);
                }
            }
        }
        reached
    }
}

/// The platform that this test was built on, as cargo calls it.
fn host() -> String {
    let output = Command::new("rustc").arg("-vV").output().expect("rustc runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc names its host").to_owned()
}

#[test]
fn rooms_use_only_what_the_table_says() {
    let metadata = Metadata::load();
    let ours: BTreeSet<&str> = metadata.members.iter().map(|id| metadata.name(id)).collect();
    let in_table: BTreeSet<&str> = ROOMS.iter().map(|room| room.name).collect();
    assert_eq!(ours, in_table, "packages of the workspace and rooms of the table");
    let mut wrong = Vec::new();
    for id in &metadata.members {
        let name = metadata.name(id);
        let room = ROOMS.iter().find(|room| room.name == name).expect("it is in the table");
        for (kind, packages) in metadata.listed(id) {
            for package in packages.iter().map(String::as_str).filter(|package| ours.contains(package)) {
                let allowed =
                    room.uses.contains(&package) || kind == "dev" && room.tests_use.contains(&package);
                if !allowed {
                    wrong.push(format!("{name} must not use {package} ({kind})"));
                }
            }
            let is_program = name.ends_with("-svc") || ["gateway", "shoal", "bench", "tests"].contains(&name);
            for package in PROGRAMS_ONLY {
                if !is_program && kind == "normal" && packages.contains(package) {
                    wrong.push(format!("{name} is no program and must not use {package}"));
                }
            }
        }
        let reached = metadata.reached(id);
        for package in room.never_reaches {
            if reached.contains(package) {
                wrong.push(format!("{name} must not reach {package}, not even through others"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Candle is what kernels are compared with, and nothing that runs.
#[test]
fn candle_is_for_tests_alone() {
    let metadata = Metadata::load();
    for id in &metadata.members {
        assert!(!metadata.reached(id).contains("candle-core"), "{} reaches candle-core", metadata.name(id));
    }
}

/// Without this line the workspace's lints are silently off.
#[test]
fn every_package_has_the_lints() {
    let metadata = Metadata::load();
    for id in &metadata.members {
        let manifest = metadata.packages[id]["manifest_path"].as_str().expect("a path");
        let text = fs::read_to_string(manifest).expect("a manifest");
        assert!(text.contains("[lints]\nworkspace = true"), "{manifest} lacks [lints] workspace = true");
    }
}

/// Versions are chosen in one place.
#[test]
fn every_dependency_is_named_in_the_root() {
    let metadata = Metadata::load();
    for id in &metadata.members {
        let manifest = metadata.packages[id]["manifest_path"].as_str().expect("a path");
        let text = fs::read_to_string(manifest).expect("a manifest");
        let mut in_dependencies = false;
        for line in text.lines() {
            if line.starts_with('[') {
                in_dependencies = line.ends_with("dependencies]");
            } else if in_dependencies && line.contains('=') {
                assert!(line.contains("workspace = true"), "{manifest}: {line}");
            }
        }
    }
}
