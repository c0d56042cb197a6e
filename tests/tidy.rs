//! House rules that clippy cannot see.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Longer files are two files.
const LINES_MAX: usize = 600;

/// A file of ours under version control, or new and not ignored.
struct File {
    /// From the root, with `/`.
    path: String,
    text: String,
}

/// Text files of the tree: no weights, no lock file, no outputs of others.
fn files() -> Vec<File> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
        .current_dir(ROOT)
        .output()
        .expect("git runs");
    assert!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    let list = String::from_utf8(output.stdout).expect("UTF-8");
    let paths = list.split('\0').filter(|path| !path.is_empty() && *path != "Cargo.lock");
    let files: Vec<File> = paths
        .filter_map(|path| {
            // A file that was deleted is still listed until that is committed.
            let text = fs::read_to_string(Path::new(ROOT).join(path)).ok()?;
            Some(File { path: path.to_owned(), text })
        })
        .collect();
    assert!(files.len() > 50, "only {} files: is this the whole tree?", files.len());
    files
}

fn rust_files() -> Vec<File> {
    files().into_iter().filter(|file| file.path.ends_with(".rs")).collect()
}

/// The lines of a file without its unit tests and comments, with their numbers.
fn code(file: &File) -> impl Iterator<Item = (usize, &str)> {
    let starts = ["#[cfg(test)]\nmod tests", "#[cfg(test)]\npub(crate) mod tests"];
    let end = starts.iter().filter_map(|start| file.text.find(start)).min().unwrap_or(file.text.len());
    let lines = file.text[..end].lines().enumerate().map(|(index, line)| (index + 1, line));
    lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
}

#[track_caller]
fn assert_none(rule: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

/// What the modules of a crate must not name. `*` at the end of a module stands for what is below it, too.
struct Wall {
    modules: &'static [&'static str],
    must_not_name: &'static [&'static str],
    why: &'static str,
}

const WALLS: [Wall; 9] = [
    Wall {
        modules: &["crates/model/src/*"],
        must_not_name: &["async fn", "std::net", "std::env", "Instant::now", "static mut"],
        why: "arithmetic only: no clock, no network, no global",
    },
    Wall {
        modules: &["crates/model/src/kernels*"],
        must_not_name: &["crate::config", "crate::checkpoint", "ModelConfig"],
        why: "kernels know numbers, not models",
    },
    Wall {
        modules: &[
            "crates/cluster/src/table*",
            "crates/cluster/src/placement*",
            "crates/cluster/src/health*",
            "crates/cluster/src/registry/listing*",
        ],
        must_not_name: &["tokio", "tonic", "Instant::now", "SystemTime"],
        why: "pure",
    },
    Wall {
        modules: &[
            "router-svc/src/scheduler*",
            "router-svc/src/cache*",
            "router-svc/src/forward*",
            "router-svc/src/combine*",
            "router-svc/src/sampling*",
        ],
        must_not_name: &["tonic", "proto::v1", "Instant::now", "async fn"],
        why: "the synchronous core: no I/O, no clock, no generated types",
    },
    Wall {
        modules: &["router-svc/src/dispatch*", "router-svc/src/flight*"],
        must_not_name: &["tokio", "tonic", "Instant::now", "async fn"],
        why: "pure state machines",
    },
    Wall {
        modules: &["router-svc/src/link*", "router-svc/src/api*"],
        must_not_name: &["model::Backbone", "model::Pages", "crate::cache"],
        why: "the asynchronous edge has no tensors",
    },
    Wall {
        modules: &["crates/shard/src/*"],
        must_not_name: &["tokio", "tonic", "Instant::now", "async fn"],
        why: "arithmetic behind a stream that it does not know",
    },
    Wall {
        modules: &["gateway/src/openai/*"],
        must_not_name: &["tonic", "RouterClient"],
        why: "a foreign language at the door, not the engine's words",
    },
    Wall {
        modules: &["gateway/src/request*"],
        must_not_name: &["axum", "serde_json"],
        why: "HTTP and gRPC both call it",
    },
];

#[test]
fn modules_stay_in_their_rooms() {
    let files = rust_files();
    let mut found = Vec::new();
    for wall in WALLS {
        for pattern in wall.modules {
            let prefix = pattern.trim_end_matches('*');
            let mut n = 0;
            for file in
                files.iter().filter(|file| file.path.starts_with(prefix) && !file.path.ends_with("tests.rs"))
            {
                n += 1;
                for (number, line) in code(file) {
                    for word in wall.must_not_name.iter().filter(|word| line.contains(**word)) {
                        found.push(format!("{}:{number} names {word} ({})", file.path, wall.why));
                    }
                }
            }
            assert!(n > 0, "no file matches {pattern}: the wall has moved");
        }
    }
    assert_none("modules name what they must not know", found);
}

/// Where `unsafe` may be written: kernels, the place that maps files, and the one that registers a socket.
const UNSAFE: [&str; 4] = [
    "crates/model/src/kernels",
    "crates/model/src/checkpoint.rs",
    "crates/model/src/checkpoint/",
    "crates/cluster/src/local.rs",
];

#[test]
fn unsafe_is_where_it_is_expected() {
    let mut found = Vec::new();
    for file in rust_files() {
        if !UNSAFE.iter().any(|place| file.path.starts_with(place)) {
            let lines = code(&file).filter(|(_, line)| {
                ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern"]
                    .iter()
                    .any(|word| line.contains(word) && !line.contains('"'))
            });
            found.extend(lines.map(|(number, _)| format!("{}:{number}", file.path)));
        }
    }
    assert_none("unsafe code outside of kernels and mapping", found);
}

#[test]
fn files_are_short_and_in_their_place() {
    let mut found = Vec::new();
    for File { path, text } in files() {
        let ours =
            [".rs", ".py", ".sh", ".md", ".proto", ".toml"].iter().any(|ending| path.ends_with(ending));
        let n_lines = text.lines().count();
        if ours && n_lines > LINES_MAX {
            found.push(format!("{path} has {n_lines} lines, {LINES_MAX} are the most"));
        }
        if path.ends_with("/mod.rs") {
            found.push(format!("{path}: a module foo lives in foo.rs"));
        }
        let folders = ["utils", "util", "common", "helpers", "misc"];
        let named_nothing = path.split(['/', '.']).any(|part| folders.contains(&part));
        if named_nothing {
            found.push(format!("{path}: a name that says nothing"));
        }
    }
    assert_none("files", found);
}

#[test]
fn nothing_names_a_machine() {
    // Put together here, so that this file does not name them.
    let homes = ["home", "root", "Users"].map(|folder| format!("/{folder}/"));
    let others = ["work", "tmp"].map(|folder| format!("/{folder}/"));
    let mut found = Vec::new();
    for file in files() {
        for (index, line) in file.text.lines().enumerate() {
            for path in homes.iter().chain(&others) {
                // Part of a longer path or address is something else.
                let named = line.match_indices(path.as_str()).any(|(at, _)| {
                    !line[..at]
                        .ends_with(|before: char| before.is_alphanumeric() || "-_.})$/".contains(before))
                });
                if named {
                    found.push(format!("{}:{} names {path}", file.path, index + 1));
                }
            }
        }
    }
    assert_none("paths of a machine", found);
}

/// `shoal` is linked by the program under test alone: tests run it, and do not call into it.
#[test]
fn tests_do_not_link_what_they_test() {
    let mut found = Vec::new();
    for file in
        rust_files().iter().filter(|file| file.path.starts_with("tests/") && file.path != "tests/binary.rs")
    {
        for (number, line) in code(file) {
            let uses = ["shoal::", "router_svc", "expert_svc", "gateway::"].iter().any(|name| {
                line.trim_start().starts_with(&format!("use {name}"))
                    || line.contains(&format!(" {name}main"))
            });
            if uses {
                found.push(format!("{}:{number}", file.path));
            }
        }
    }
    assert_none("tests that link services", found);
}

#[test]
fn decisions_are_linked() {
    let files = files();
    let index =
        files.iter().find(|file| file.path == "docs/adr/README.md").expect("docs/adr/README.md is there");
    let missing = files
        .iter()
        .filter_map(|file| file.path.strip_prefix("docs/adr/").filter(|name| *name != "README.md"))
        .filter(|name| !index.text.contains(&format!("({name})")));
    assert_none("decisions that docs/adr/README.md does not link", missing.map(str::to_owned).collect());
}

/// Relative links of the docs lead somewhere.
#[test]
fn links_lead_somewhere() {
    let mut found = Vec::new();
    for file in files().iter().filter(|file| file.path.ends_with(".md")) {
        let folder = Path::new(ROOT).join(&file.path).parent().expect("a folder").to_owned();
        for (at, _) in file.text.match_indices("](") {
            let target: String = file.text[at + 2..].chars().take_while(|&letter| letter != ')').collect();
            let path = target.split('#').next().unwrap_or_default();
            if !path.is_empty() && !target.contains("://") && !folder.join(path).exists() {
                found.push(format!("{}: {target}", file.path));
            }
        }
    }
    assert_none("links that lead nowhere", found);
}

/// All `--flags` in the help of the program and of its commands.
fn flags_in_help() -> BTreeSet<String> {
    let help = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_shoal-under-test"))
            .args(args)
            .env_clear()
            .output()
            .expect("the program runs");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let main = help(&["--help"]);
    let commands = main.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    let commands = commands.take_while(|line| line.starts_with("  "));
    let names = commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let mut flags = flags_in(&main);
    let mut n = 0;
    for name in names.filter(|name| !name.is_empty() && *name != "help") {
        flags.extend(flags_in(&help(&[name, "--help"])));
        n += 1;
    }
    assert!(n >= 7, "only {n} commands in:\n{main}");
    flags
}

fn flags_in(text: &str) -> BTreeSet<String> {
    let mut flags = BTreeSet::new();
    for (at, _) in text.match_indices("--") {
        if text[..at].ends_with(|before: char| before.is_alphanumeric() || before == '-') {
            continue;
        }
        let name = text[at + 2..].chars().take_while(|&letter| letter.is_ascii_lowercase() || letter == '-');
        let name: String = name.collect();
        let name = name.trim_end_matches('-');
        if name.len() > 1 {
            flags.insert(name.to_owned());
        }
    }
    flags
}

/// Flags that the docs show with other programs' commands.
const FLAGS_OF_OTHERS: [&str; 12] = [
    "config",
    "prefix",
    "profile",
    "release",
    "locked",
    "workspace",
    "data",
    "plaintext",
    "all-targets",
    "all",
    "check",
    "version",
];

#[test]
fn flags_in_the_docs_exist() {
    let known = flags_in_help();
    let mut found = Vec::new();
    let docs = files();
    let docs = docs.iter().filter(|file| {
        file.path.ends_with(".md") && (file.path.starts_with("docs/") || !file.path.contains('/'))
    });
    for file in docs {
        for flag in flags_in(&file.text) {
            if !known.contains(&flag) && !FLAGS_OF_OTHERS.contains(&flag.as_str()) {
                found.push(format!("{}: --{flag}", file.path));
            }
        }
    }
    assert_none("flags in the docs that no command has", found);
}

/// Files that ARCHITECTURE.md sends its readers to.
#[test]
fn files_in_the_map_exist() {
    let map =
        fs::read_to_string(PathBuf::from(ROOT).join("ARCHITECTURE.md")).expect("ARCHITECTURE.md is there");
    let mut found = Vec::new();
    for quoted in
        map.split('`').skip(1).step_by(2).filter(|quoted| quoted.ends_with(".rs") && quoted.contains('/'))
    {
        if !Path::new(ROOT).join(quoted).exists() {
            found.push(quoted.to_owned());
        }
    }
    assert_none("files that ARCHITECTURE.md names and that are not there", found);
}
