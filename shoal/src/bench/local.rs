//! The same model in one process without network, scheduler and exact combine: what being sharded is compared with.

use std::path::Path;

use anyhow::Context as _;
use ids::{ExpertId, PageIndex};
use model::{
    Backbone, Checkpoint, Experts, FeedForward, Input, Layer, Moe, Pages, Span, Threads, add, add_weighted,
    expert::Expert, tune::Wanted,
};

use super::{Case, Prompts, now, seconds};
use crate::process::{self, WeightsArgs};

const PAGE_POSITIONS: usize = 64;

/// Rows of a step in prefill, as a router's chunk.
const CHUNK_ROWS: usize = 512;

pub(super) struct Local {
    backbone: Backbone,
    experts: Experts,
    threads: Threads,
}

impl Local {
    pub(super) fn load(model: &Path, weights: &WeightsArgs) -> anyhow::Result<Self> {
        let tuning = process::tune(Wanted::default())?;
        let checkpoint = Checkpoint::open(model)?
            .with_weights(weights.weights, weights.cache_dir.clone())
            .with_huge_pages(tuning.huge_pages);
        let config = checkpoint.config();
        let experts = (0..config.n_routed_experts as u32).map(ExpertId);
        let all: Vec<_> = config
            .moe_layers()
            .flat_map(|layer| experts.clone().map(move |expert| (layer, expert)))
            .collect();
        let experts = Experts::load(&checkpoint, &all)?;
        let backbone = Backbone::load(&checkpoint)?;
        checkpoint.settle(&|| true)?;
        Ok(Self { backbone, experts, threads: tuning.start()? })
    }

    pub(super) fn vocab(&self) -> u32 {
        self.backbone.config().vocab_size as u32
    }

    /// Tokens a second.
    pub(super) fn measure(&self, case: Case, decode: u32, prompts: &mut Prompts) -> anyhow::Result<f64> {
        self.threads.install(|| match case {
            Case::Prefill { tokens } => {
                let mut run = Run::new(self, 1, tokens);
                let prompt = prompts.next(tokens);
                let began = now();
                run.prefill(0, &prompt)?;
                Ok(tokens as f64 / seconds(began, now()))
            }
            Case::Decode { batch, context } => {
                let mut run = Run::new(self, batch, context + decode as usize);
                let mut ids = Vec::with_capacity(batch);
                for sequence in 0..batch {
                    ids.push(run.prefill(sequence, &prompts.next(context))?);
                }
                let began = now();
                for step in 1..decode as usize {
                    ids = run.decode(&ids, context + step - 1)?;
                }
                Ok((batch as u32 * (decode - 1)) as f64 / seconds(began, now()))
            }
        })
    }
}

/// Sequences of one length.
struct Run<'a> {
    local: &'a Local,
    pages: Pages,
    of_sequence: Vec<Vec<PageIndex>>,
}

impl<'a> Run<'a> {
    fn new(local: &'a Local, n_sequences: usize, positions: usize) -> Self {
        let each = positions.div_ceil(PAGE_POSITIONS);
        let pages = |sequence: usize| (0..each).map(|at| PageIndex((sequence * each + at) as u32)).collect();
        Self {
            local,
            pages: Pages::new(&local.backbone, n_sequences * each, PAGE_POSITIONS),
            of_sequence: (0..n_sequences).map(pages).collect(),
        }
    }

    /// The first token of an answer.
    fn prefill(&mut self, sequence: usize, prompt: &[u32]) -> anyhow::Result<u32> {
        let mut last = Vec::new();
        for (chunk, ids) in prompt.chunks(CHUNK_ROWS).enumerate() {
            let pages = &self.of_sequence[sequence];
            let span = Span { rows: 0..ids.len(), position: chunk * CHUNK_ROWS, pages };
            last = forward(self.local, ids, &[span], &mut self.pages)?;
        }
        let width = self.local.backbone.config().hidden_size;
        Ok(greedy(&self.local.backbone.logits(&last[last.len() - width..])))
    }

    /// Each sequence's next token.
    fn decode(&mut self, ids: &[u32], position: usize) -> anyhow::Result<Vec<u32>> {
        let spans = self.of_sequence.iter().enumerate();
        let spans: Vec<_> = spans.map(|(row, pages)| Span { rows: row..row + 1, position, pages }).collect();
        let hidden = forward(self.local, ids, &spans, &mut self.pages)?;
        let logits = self.local.backbone.logits(&hidden);
        Ok(logits.chunks_exact(self.local.vocab() as usize).map(greedy).collect())
    }
}

fn greedy(logits: &[f32]) -> u32 {
    let better = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
    (0..logits.len()).fold(0, better) as u32
}

fn forward(local: &Local, ids: &[u32], spans: &[Span<'_>], pages: &mut Pages) -> anyhow::Result<Vec<f32>> {
    let mut hidden = local.backbone.embed(ids);
    for layer in local.backbone.layers() {
        layer.attend(&mut hidden, spans, pages);
        let normed = layer.post_attention_layernorm(&hidden);
        let update = match layer.feed_forward() {
            FeedForward::Dense(mlp) => mlp.apply(&normed),
            FeedForward::Routed(moe) => routed(local, layer, moe, &normed)?,
        };
        add(&mut hidden, &update);
    }
    Ok(hidden)
}

/// Shared and routed experts.
fn routed(local: &Local, layer: &Layer, moe: &Moe, normed: &Input<'_>) -> anyhow::Result<Vec<f32>> {
    let width = local.backbone.config().hidden_size;
    let (assignments, mut update) = moe.shared_beside(normed, || moe.gate(normed));
    let mut by_expert = vec![Vec::new(); local.backbone.config().n_routed_experts];
    for (slot, expert) in assignments.experts.iter().enumerate() {
        by_expert[expert.index()].push(slot);
    }
    let mut groups = Vec::new();
    for (expert, slots) in by_expert.iter().enumerate().filter(|(_, slots)| !slots.is_empty()) {
        let expert =
            local.experts.get(layer.id(), ExpertId(expert as u32)).context("an expert is missing")?;
        let rows: Vec<usize> = slots.iter().map(|slot| slot / assignments.top_k).collect();
        groups.push((expert, slots, rows));
    }
    let inputs: Vec<_> = groups.iter().map(|(expert, _, rows)| (*expert, rows.as_slice())).collect();
    let outputs = Expert::forward(normed, &inputs);
    for ((_, slots, _), outputs) in groups.iter().zip(outputs) {
        for (slot, output) in slots.iter().zip(outputs.chunks_exact(width)) {
            let update = &mut update[slot / assignments.top_k * width..][..width];
            add_weighted(update, output, assignments.weights[*slot]);
        }
    }
    Ok(update)
}
