//! `shoal logits`: logits and greedy tokens of given prompts, computed by a router and expert servers in processes of
//! their own, in the layout of the golden fixtures.

use std::{collections::BTreeMap, num::NonZeroUsize, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, bail, ensure};
use indicatif::ProgressBar;
use proto::{
    Error,
    rows::Rows,
    v1::{self, router_client::RouterClient},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tonic::transport::Channel;

use crate::{
    cluster::{Cluster, Plan, Where, router_client},
    process::WeightsArgs,
};

/// Compute logits and greedy tokens of given prompts through real processes.
///
/// IN holds int64 tensors `prompt_0`, `prompt_1`, … of token ids. OUT gets the prompts, `logits_i` float32
/// [length, vocabulary] at every position and `greedy_i` int64 [--greedy], in which end-of-sequence ids are not drawn
/// (transformers' `min_new_tokens`).
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Example:\n  shoal logits DIR --tokens expected.safetensors --out ours.safetensors --experts 4 --greedy 24"
)]
pub(crate) struct Args {
    /// Checkpoint folder
    dir: PathBuf,
    /// Prompts: a safetensors file with prompt_0, prompt_1, …
    #[arg(long, value_name = "IN")]
    tokens: PathBuf,
    /// Where to write
    #[arg(long, value_name = "OUT")]
    out: PathBuf,
    /// Expert servers; 0: the router holds the experts
    #[arg(long, default_value = "1", value_name = "N")]
    experts: usize,
    /// Spread the experts over the servers at random, by this seed, instead of in contiguous parts
    #[arg(long, value_name = "SEED")]
    scatter: Option<u64>,
    /// Most prompt rows of one sequence in a step
    #[arg(long, value_name = "ROWS")]
    chunk: Option<NonZeroUsize>,
    /// Greedy tokens behind each prompt
    #[arg(long, default_value_t = 0, value_name = "N")]
    greedy: u32,
    /// How contributions are summed
    #[arg(long)]
    combine: Option<router_svc::Combine>,
    /// How activations travel
    #[arg(long)]
    wire: Option<router_svc::Wire>,
    #[command(flatten)]
    weights: WeightsArgs,
    /// One prompt after the other instead of all together
    #[arg(long)]
    one_by_one: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let prompts = read_prompts(&args.tokens)?;
    let cluster = Cluster::start(&plan(&args)?).await?;
    let client = router_client(cluster.routers[0].address).await?;
    // Draws only on a terminal, on stderr.
    let progress = ProgressBar::new(prompts.len() as u64).with_message("prompts");
    let answer = |(name, prompt): (&String, &Vec<u32>)| {
        let (name, client, progress) = (name.clone(), client.clone(), progress.clone());
        let request = request(prompt, args.greedy);
        async move {
            let answer = ask(client, request).await.with_context(|| format!("prompt_{name}"))?;
            progress.inc(1);
            Ok::<_, anyhow::Error>((name, answer))
        }
    };
    let answers: anyhow::Result<Vec<(String, Answer)>> = if args.one_by_one {
        let mut answers = Vec::new();
        for prompt in &prompts {
            answers.push(answer(prompt).await?);
        }
        Ok(answers)
    } else {
        futures_util::future::try_join_all(prompts.iter().map(answer)).await
    };
    progress.finish_and_clear();
    cluster.stop().await;
    write(&args.out, &prompts, &answers?.into_iter().collect())?;
    Ok(ExitCode::SUCCESS)
}

fn plan(args: &Args) -> anyhow::Result<Plan> {
    let mut router_args = Vec::new();
    let mut flag = |flag: &str, value: Option<String>| {
        router_args.extend(value.map(|value| format!("--{flag}={value}")))
    };
    flag("chunk", args.chunk.map(|rows| rows.to_string()));
    flag("combine", args.combine.and_then(name_of));
    flag("wire", args.wire.and_then(name_of));
    let experts = match args.scatter {
        None => Plan::shards(args.experts, 1),
        Some(seed) => scatter(seed, args.experts, &args.dir)?,
    };
    Ok(Plan {
        model: args.dir.clone(),
        experts,
        registry: Where::Static,
        routers: 1,
        router_args,
        gateway: None,
        quiet: true,
        log_args: vec!["--log-filter=warn".to_owned()],
        expert_args: Vec::new(),
        weights_args: args.weights.to_args(),
        trace_args: Vec::new(),
    })
}

fn name_of(value: impl clap::ValueEnum) -> Option<String> {
    value.to_possible_value().map(|value| value.get_name().to_owned())
}

/// A random set of experts for each server; none is left empty.
fn scatter(seed: u64, n_servers: usize, dir: &std::path::Path) -> anyhow::Result<Vec<Vec<String>>> {
    let n_experts = model::ModelConfig::load(dir)?.n_routed_experts;
    ensure!(n_servers > 0, "--scatter is for expert servers, and --experts 0 starts none");
    ensure!(n_servers <= n_experts, "{n_servers} servers cannot share {n_experts} experts");
    let mut order: Vec<usize> = (0..n_experts).collect();
    let mut state = seed;
    for at in (1..n_experts).rev() {
        // SplitMix64 and a Fisher-Yates shuffle: the same spread for the same seed everywhere.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        order.swap(at, ((z ^ (z >> 31)) % (at as u64 + 1)) as usize);
    }
    let shard = |server: usize| {
        let experts: Vec<String> =
            order.iter().skip(server).step_by(n_servers).map(usize::to_string).collect();
        vec!["--experts".to_owned(), experts.join(",")]
    };
    Ok((0..n_servers).map(shard).collect())
}

fn read_prompts(path: &std::path::Path) -> anyhow::Result<BTreeMap<String, Vec<u32>>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes)
        .with_context(|| format!("{} is no safetensors file", path.display()))?;
    let mut prompts = BTreeMap::new();
    for (name, tensor) in file.tensors() {
        let Some(number) = name.strip_prefix("prompt_") else { continue };
        ensure!(
            tensor.dtype() == Dtype::I64,
            "{name} in {} is {:?}, wanted I64",
            path.display(),
            tensor.dtype()
        );
        let ids = tensor.data().as_chunks::<8>().0.iter().map(|bytes| {
            let id = i64::from_le_bytes(*bytes);
            u32::try_from(id).with_context(|| format!("{name} has the token id {id}"))
        });
        prompts.insert(number.to_owned(), ids.collect::<anyhow::Result<_>>()?);
    }
    ensure!(!prompts.is_empty(), "{} has no tensor prompt_0", path.display());
    Ok(prompts)
}

fn request(prompt: &[u32], greedy: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt_ids: prompt.to_vec(),
        // One token is drawn in any case: a router answers prompts, it does not score them.
        tokens_max: greedy.max(1),
        tokens_min: greedy.max(1),
        prompt_logits: true,
        ..v1::GenerateRequest::default()
    }
}

#[derive(Default)]
struct Answer {
    /// `[positions, vocab]`
    logits: Vec<f32>,
    tokens: Vec<u32>,
}

async fn ask(mut client: RouterClient<Channel>, request: v1::GenerateRequest) -> anyhow::Result<Answer> {
    let n_prompt = request.prompt_ids.len();
    let wanted = request.tokens_max as usize;
    let mut replies =
        client.generate(request).await.map_err(|status| Error::from_status(&status))?.into_inner();
    let mut answer = Answer::default();
    let mut n_positions = 0;
    while let Some(reply) = replies.message().await.map_err(|status| Error::from_status(&status))? {
        if let Some(part) = reply.prompt_logits {
            ensure!(
                part.first_position as usize == n_positions,
                "the router left out positions of the prompt"
            );
            let rows = Rows::from_wire(part.rows.context("logits without rows")?)?;
            n_positions += rows.n_rows();
            answer.logits.extend(rows.to_f32());
        }
        answer.tokens.extend(reply.tokens.iter().map(|token| token.id));
    }
    if n_positions != n_prompt || answer.tokens.len() != wanted {
        bail!(
            "the router sent {n_positions} of {n_prompt} positions and {} of {wanted} tokens: is the context long enough?",
            answer.tokens.len()
        );
    }
    Ok(answer)
}

fn write(
    path: &std::path::Path,
    prompts: &BTreeMap<String, Vec<u32>>,
    answers: &BTreeMap<String, Answer>,
) -> anyhow::Result<()> {
    let ids = |ids: &[u32]| ids.iter().flat_map(|id| i64::from(*id).to_le_bytes()).collect::<Vec<u8>>();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (number, prompt) in prompts {
        let Some(answer) = answers.get(number) else { continue };
        let vocab = answer.logits.len() / prompt.len();
        let logits: Vec<u8> = answer.logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        tensors.push((format!("prompt_{number}"), Dtype::I64, vec![prompt.len()], ids(prompt)));
        tensors.push((format!("logits_{number}"), Dtype::F32, vec![prompt.len(), vocab], logits));
        tensors.push((
            format!("greedy_{number}"),
            Dtype::I64,
            vec![answer.tokens.len()],
            ids(&answer.tokens),
        ));
    }
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| Ok((name, TensorView::new(*dtype, shape.clone(), data)?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, path)
        .with_context(|| format!("cannot write {}", path.display()))
}
