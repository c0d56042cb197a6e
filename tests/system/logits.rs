//! The same numbers as another implementation, and the same bits whatever the servers, the placement and the batch.

use std::{ffi::OsString, path::Path};

use futures_util::future::join_all;
use tempfile::TempDir;

use crate::{
    fixtures::{Case, Chain, Expected, fixture, minnow, uniform, write_prompts},
    harness::{
        Cluster, Process,
        clients::{Generated, generate},
        cluster::Builder,
    },
};

/// Runs `shoal logits` on a checkpoint with reference outputs and compares.
async fn check_tool(checkpoint: &Path, flags: &[&str]) {
    let expected = Expected::beside(checkpoint);
    let out = TempDir::new().expect("a temporary folder");
    let output = out.path().join("out.safetensors");
    let mut args = vec!["logits".into(), checkpoint.as_os_str().to_owned(), "--tokens".into()];
    args.extend([checkpoint.join("expected.safetensors").into(), "--out".into(), output.clone().into()]);
    args.extend(["--greedy", "24"].iter().chain(flags).map(Into::into));
    let ended = Process::run(args).await;
    assert!(ended.status.success(), "{} {flags:?}: {}", checkpoint.display(), ended.stderr);
    let computed = Expected::of_output(&output, &expected);
    for (index, (wanted, got)) in expected.0.iter().zip(&computed.0).enumerate() {
        let what = format!("{} {flags:?}, prompt {index}", checkpoint.display());
        wanted.assert_close(&what, &got.logits, &got.greedy);
    }
}

async fn check_family(name: &str) {
    let checkpoint = fixture(name);
    check_tool(&checkpoint, &["--experts", "1"]).await;
    check_tool(&checkpoint, &["--experts", "2", "--chunk", "7", "--combine", "exact"]).await;
    check_tool(&checkpoint, &["--experts", "4", "--chunk", "1", "--combine", "pairs"]).await;
    check_tool(&checkpoint, &["--experts", "4", "--combine", "fast"]).await;
}

/// A wire that rounds what it carries: half of the positions differ by less than `bound` of their logits' norm. Not all: a
/// gate that was nearly undecided may choose another expert.
async fn check_wire(wire: &str, bound: f32) {
    const PROMPT: std::ops::Range<u32> = 3..67;
    let checkpoint = minnow();
    let folder = TempDir::new().expect("a temporary folder");
    let (prompts, output) = (folder.path().join("prompts"), folder.path().join("out"));
    write_prompts(&prompts, &[PROMPT.collect()]);
    let mut logits = Vec::new();
    for wire in ["f32", wire] {
        let mut args: Vec<OsString> = vec!["logits".into(), checkpoint.clone().into(), "--tokens".into()];
        args.extend([prompts.clone().into(), "--out".into(), output.clone().into()]);
        args.extend(["--experts", "2", "--combine", "fast", "--wire", wire].map(OsString::from));
        let ended = Process::run(args).await;
        assert!(ended.status.success(), "{wire}: {}", ended.stderr);
        logits.push(Expected::logits_of(&output, 0));
    }
    let vocab = logits[0].len() / PROMPT.len();
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
    let positions = logits[0].chunks(vocab).zip(logits[1].chunks(vocab));
    let mut differences: Vec<f32> = positions
        .map(|(exact, rounded)| {
            let difference = norm(&mut exact.iter().zip(rounded).map(|(exact, rounded)| exact - rounded));
            difference / norm(&mut exact.iter().copied())
        })
        .collect();
    differences.sort_unstable_by(f32::total_cmp);
    let median = differences[PROMPT.len() / 2];
    assert!(median > 0.0 && median < bound, "{wire}: {median}");
}

/// Rows go to quantized experts as these compute with them, to whichever server and in whatever batch.
#[tokio::test]
async fn quantized_experts_give_the_same_bits_on_any_servers() {
    let folder = TempDir::new().expect("a temporary folder");
    let (prompts, output) = (folder.path().join("prompts"), folder.path().join("out"));
    write_prompts(&prompts, &[(3..67).collect()]);
    for weights in ["q8", "q4-experts"] {
        let mut bits = Vec::new();
        for flags in ["1 --chunk 64", "3 --chunk 5", "0 --chunk 9"] {
            let mut args: Vec<OsString> = vec!["logits".into(), minnow().into(), "--tokens".into()];
            args.extend([prompts.clone().into(), "--out".into(), output.clone().into()]);
            args.extend(
                ["--weights", weights, "--experts"].into_iter().chain(flags.split(' ')).map(OsString::from),
            );
            let ended = Process::run(args).await;
            assert!(ended.status.success(), "{weights} {flags:?}: {}", ended.stderr);
            bits.push(Expected::logits_of(&output, 0).into_iter().map(f32::to_bits).collect::<Vec<_>>());
        }
        assert!(bits[0] == bits[1] && bits[0] == bits[2], "{weights}");
    }
}

#[tokio::test]
async fn wires_that_round_stay_near() {
    check_wire("bf16", 0.002).await;
    check_wire("int8", 0.007).await;
}

#[tokio::test]
async fn deepseek_v2_lite_agrees_with_the_reference() {
    check_family("deepseek-v2-lite").await;
}

#[tokio::test]
async fn deepseek_v2_agrees_with_the_reference() {
    check_family("deepseek-v2").await;
}

#[tokio::test]
async fn deepseek_v3_agrees_with_the_reference() {
    check_family("deepseek-v3").await;
}

#[tokio::test]
async fn deepseek_v3_2_agrees_with_the_reference() {
    check_family("deepseek-v3.2").await;
}

/// Odd head counts, one group, no q_lora, attention bias, tied embeddings, rope with and without YaRN.
#[tokio::test]
async fn odd_shapes_agree_with_the_reference() {
    let folder = fixture("odd");
    let mut n = 0;
    for checkpoint in std::fs::read_dir(&folder).expect("the fixtures are there") {
        let path = checkpoint.expect("it can be listed").path();
        if path.is_dir() {
            check_tool(&path, &["--experts", "3", "--chunk", "9"]).await;
            n += 1;
        }
    }
    assert!(n >= 8, "{n} checkpoints in {}", folder.display());
}

/// Whether the prompts of a case go to the router one after the other, or all at once.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    Alone,
    Together,
}

const GREEDY: u32 = 24;

/// Runs every prompt on a cluster of `builder`, with at most `chunk` rows of it a step.
async fn run(builder: Builder, chunk: usize, load: Load, prompts: &[Vec<u32>]) -> Vec<Generated> {
    let cluster = builder.router_args(&["--chunk", &chunk.to_string()]).without_gateway().start().await;
    let router = cluster.router.router();
    let calls = prompts.iter().map(|prompt| generate(router.clone(), prompt, GREEDY));
    let results = match load {
        Load::Together => join_all(calls).await,
        Load::Alone => {
            let mut results = Vec::new();
            for call in calls {
                results.push(call.await);
            }
            results
        }
    };
    // A step is counted after its tokens are sent: not before everything is over.
    cluster.idle().await;
    let n_steps = cluster.router_status().await.steps;
    let n_alone: usize =
        prompts.iter().map(|prompt| prompt.len().div_ceil(chunk) + GREEDY as usize - 1).sum();
    match load {
        Load::Alone => assert_eq!(n_steps, n_alone as u64),
        Load::Together => assert!(n_steps < n_alone as u64, "{n_steps} steps: nothing was batched"),
    }
    results.into_iter().map(|result| result.expect("the router answers")).collect()
}

#[track_caller]
fn assert_same_bits(what: &str, got: &[Generated], wanted: &[Generated]) {
    for (index, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        assert_eq!(got.ids, wanted.ids, "{what}, prompt {index}: tokens");
        let numbers = got.prompt_logits.iter().zip(&wanted.prompt_logits);
        let differs = numbers.clone().position(|(got, wanted)| got.to_bits() != wanted.to_bits());
        if let Some(at) = differs {
            let (got, wanted) = (got.prompt_logits[at], wanted.prompt_logits[at]);
            panic!("{what}, prompt {index}: number {at} is {got:e}, not {wanted:e}");
        }
        assert_eq!(got.prompt_logits.len(), wanted.prompt_logits.len(), "{what}, prompt {index}");
    }
}

/// Deals `n_experts` out to `n` servers; none is left empty.
fn random_placement(n_experts: u32, n: usize, mut seed: u64) -> Vec<String> {
    let mut lists = vec![Vec::new(); n];
    for expert in 0..n_experts {
        let dealt = ((uniform(&mut seed) + 1.0) / 2.0 * n as f32) as usize;
        let server = if (expert as usize) < n { expert as usize } else { dealt.min(n - 1) };
        lists[server].push(expert.to_string());
    }
    lists.into_iter().map(|list| list.join(",")).collect()
}

async fn check_bits(checkpoint: &Path, prompts: &[Vec<u32>], n_experts: u32) {
    for combine in ["exact", "pairs"] {
        let builder = || Cluster::builder(&checkpoint.to_owned()).router_args(&["--combine", combine]);
        let reference = run(builder(), 256, Load::Alone, prompts).await;
        let lists = random_placement(n_experts, 3, 5);
        let lists: Vec<&str> = lists.iter().map(String::as_str).collect();
        for (what, builder, chunk, load) in [
            ("one server, chunks", builder(), 7, Load::Together),
            ("two servers", builder().experts(2), 256, Load::Together),
            ("four servers, token by token", builder().experts(4), 1, Load::Alone),
            ("four servers, token by token, batched", builder().experts(4), 1, Load::Together),
            ("a random placement", builder().placement(&lists), 19, Load::Together),
            ("two servers, half-batches", in_halves(builder().experts(2)), 9, Load::Together),
            ("half-batches, one alone", in_halves(builder().experts(3)), 256, Load::Alone),
            ("no server, chunks", builder().inside(), 7, Load::Together),
            ("a third of it inside", inside(builder().placement(&lists[1..]), lists[0]), 19, Load::Together),
            ("some of it inside too", inside(builder().placement(&lists), "0-3"), 64, Load::Together),
            (
                "half-batches, some of it inside too",
                in_halves(inside(builder().placement(&lists), "0-3")),
                19,
                Load::Together,
            ),
        ] {
            let what = format!("{} {combine}: {what}", checkpoint.display());
            assert_same_bits(&what, &run(builder, chunk, load, prompts).await, &reference);
        }
    }
}

/// Every step of more than one row.
fn in_halves(builder: Builder) -> Builder {
    builder.router_args(&["--half-batches", "always"])
}

/// The router holds `experts` itself.
fn inside(builder: Builder, experts: &str) -> Builder {
    builder.router_args(&["--experts", experts])
}

async fn check_bits_of_family(name: &str) {
    let prompts: Vec<_> =
        Expected::beside(&fixture(name)).0.into_iter().map(|Case { prompt, .. }| prompt).collect();
    check_bits(&fixture(name), &prompts, 16).await;
}

#[tokio::test]
async fn deepseek_v2_lite_has_the_same_bits_everywhere() {
    check_bits_of_family("deepseek-v2-lite").await;
}

#[tokio::test]
async fn deepseek_v2_has_the_same_bits_everywhere() {
    check_bits_of_family("deepseek-v2").await;
}

#[tokio::test]
async fn deepseek_v3_has_the_same_bits_everywhere() {
    check_bits_of_family("deepseek-v3").await;
}

#[tokio::test]
async fn deepseek_v3_2_has_the_same_bits_everywhere() {
    check_bits_of_family("deepseek-v3.2").await;
}

/// A sequence that gave its pages back computes everything again, and nobody can tell.
#[tokio::test]
async fn a_preempted_sequence_has_the_same_bits() {
    let checkpoint = fixture("deepseek-v3.2");
    let long = Expected::beside(&checkpoint).0.into_iter().map(|case| case.prompt).max_by_key(Vec::len);
    let long = long.expect("prompts");
    let prompts = vec![long.iter().rev().copied().collect(), long];
    let builder = || Cluster::builder(&checkpoint).experts(2);
    let reference = run(builder(), 256, Load::Alone, &prompts).await;
    // Room for both at the start, and for one at the end.
    let n_pages = 2 * (prompts[0].len() + 16).div_ceil(16);
    let flags = ["--page-positions", "16", "--pages", &n_pages.to_string(), "--chunk", "50"];
    let cluster = builder().router_args(&flags).without_gateway().start().await;
    let calls = prompts.iter().map(|prompt| generate(cluster.router.router(), prompt, GREEDY));
    let results = join_all(calls).await.into_iter().map(|result| result.expect("the router answers"));
    assert_same_bits("preempted", &results.collect::<Vec<_>>(), &reference);
    cluster.idle().await;
    assert!(cluster.router_status().await.preemptions > 0);
}

/// Contributions beyond the grid of exact combine are asked for again, pair by pair.
#[tokio::test]
async fn rows_beyond_the_grid_have_the_same_bits_everywhere() {
    // Not among the tokens that the router calibrates with.
    const OUTLIER: u32 = 71;
    let model = Chain::new().experts_add().outlier(OUTLIER).prefers([0, 3]).write();
    let prompts = vec![vec![OUTLIER; 5], vec![70, OUTLIER, 72], (60..130).collect()];
    check_bits(model.path(), &prompts, 4).await;

    let cluster = Cluster::builder(&model).experts(2).without_gateway().start().await;
    let router = cluster.router.router();
    let pairs = async || cluster.expert_status(0).await.pairs + cluster.expert_status(1).await.pairs;
    let before = pairs().await;
    generate(router, &[70, OUTLIER, OUTLIER, 72], 1).await.expect("the router answers");
    assert_eq!(pairs().await - before, 2 * 4 + 2 * 2, "two experts a row; those of two rows asked twice");
}

#[tokio::test]
async fn servers_of_this_host_are_called_through_unix_sockets() {
    for (flag, transport) in [("true", "unix"), ("false", "tcp")] {
        let builder = Cluster::builder(&minnow()).router_args(&["--unix-sockets", flag]);
        let cluster = builder.without_gateway().start().await;
        generate(cluster.router.router(), &[3, 4, 5], 4).await.expect("the router answers");
        let servers = cluster.router_status().await.servers;
        let transports: Vec<_> = servers.iter().map(|server| server.transport.as_str()).collect();
        assert!(!transports.is_empty() && transports.iter().all(|it| *it == transport), "{transports:?}");
    }
}
