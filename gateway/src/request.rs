//! One request, whatever door it came through: admit → route → stream → repair. Knows no HTTP and no JSON.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, stream};
use proto::{Code, Error, v1};
use text::Prompt;

use crate::{
    admit::{Admitted, admit},
    answer::{Answer, Delta},
    observe::Watch,
    repair::Replies,
    service::Gateway,
};

/// How to draw and when to stop. Absent values take the checkpoint's defaults.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_k: Option<u32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) seed: Option<u64>,
    pub(crate) tokens_max: Option<u32>,
    pub(crate) tokens_min: u32,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) top_logprobs: Option<u32>,
}

/// A request as both doors hand it in.
pub(crate) struct Ask {
    /// For log lines and the router.
    pub(crate) id: String,
    pub(crate) prompts: Vec<Prompt>,
    /// Answers to each prompt.
    pub(crate) n: usize,
    pub(crate) options: Options,
    /// Split reasoning from content.
    pub(crate) chat: bool,
    pub(crate) watch: Arc<Watch>,
}

pub(crate) type Deltas = Pin<Box<dyn Stream<Item = Result<Delta, Error>> + Send>>;

/// An answer that has begun.
pub(crate) struct Served {
    pub(crate) deltas: Deltas,
    /// It is known already that experts will be left out. Usage says in the end whether they were.
    pub(crate) degraded: bool,
}

/// Answers `ask`: a stream of pieces, in which each choice ends with a piece that says why. Dropping the stream cancels
/// what is left of it.
pub(crate) async fn serve(gateway: &Arc<Gateway>, ask: Ask) -> Result<Served, Error> {
    let admitted = admit(gateway, ask)?;
    let mut degraded = false;
    let mut answers = Vec::with_capacity(admitted.ask.prompts.len() * admitted.ask.n);
    for (prompt_idx, prompt) in admitted.ask.prompts.iter().enumerate() {
        for i in 0..admitted.ask.n {
            let choice = prompt_idx * admitted.ask.n + i;
            let (answer, known_degraded) = start(gateway, &admitted, prompt, choice).await?;
            answers.push(answer);
            degraded |= known_degraded;
        }
    }
    admitted.ask.watch.admitted();
    Ok(Served { deltas: merge(answers, admitted), degraded })
}

/// Sends one sequence to a router.
async fn start(
    gateway: &Arc<Gateway>,
    admitted: &Admitted,
    prompt: &Prompt,
    choice: usize,
) -> Result<(Answer, bool), Error> {
    let ask = &admitted.ask;
    let request = |router: &v1::RouterStatus| generate_request(ask, prompt, choice, router);
    let replies =
        Replies::start(gateway, &ask.watch, choice, &prompt.ids, request).await.map_err(|error| {
            // The router knows token ids only.
            let names_prompt = error.param.as_deref() == Some("prompt_ids");
            if names_prompt { error.with_param(prompt_param(ask)) } else { error }
        })?;
    let mut stop_ids = ask.options.stop_token_ids.clone();
    if !ask.options.ignore_eos {
        stop_ids.extend(&replies.eos_ids);
    }
    let degraded = replies.degraded;
    Ok((Answer::new(gateway, ask, prompt, choice, (replies, stop_ids))?, degraded))
}

/// The request field that the prompt came from.
fn prompt_param(ask: &Ask) -> &'static str {
    if ask.chat { "messages" } else { "prompt" }
}

fn generate_request(
    ask: &Ask,
    prompt: &Prompt,
    choice: usize,
    router: &v1::RouterStatus,
) -> Result<v1::GenerateRequest, Error> {
    let options = &ask.options;
    let context_max = router.context_max as usize;
    if prompt.ids.len() >= context_max {
        let message = format!(
            "the prompt has {} tokens, the maximum context length is {context_max} tokens, the answer included",
            prompt.ids.len()
        );
        let error = Error::new(Code::InvalidArgument, "context_length_exceeded", message);
        return Err(error.with_param(prompt_param(ask)));
    }
    if let Some(tokens_max) = options.tokens_max.filter(|&tokens| tokens as usize > context_max) {
        let message =
            format!("max_tokens is {tokens_max}, the maximum context length is {context_max} tokens");
        return Err(Error::invalid("max_tokens", message));
    }
    // Each choice draws its own numbers; without a seed, numbers that nobody can repeat.
    let seed =
        options.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0).wrapping_add(choice as u64);
    Ok(v1::GenerateRequest {
        request_id: ask.id.clone(),
        prompt_ids: prompt.ids.clone(),
        tokens_max: options.tokens_max.unwrap_or(0),
        tokens_min: options.tokens_min,
        sampling: Some(v1::Sampling {
            temperature: options.temperature.unwrap_or(1.0),
            top_k: options.top_k.unwrap_or(0),
            top_p: options.top_p.unwrap_or(1.0),
            min_p: options.min_p.unwrap_or(0.0),
            seed,
        }),
        stop_ids: options.stop_token_ids.clone(),
        ignore_eos: options.ignore_eos,
        top_logprobs: options.top_logprobs,
        prompt_logits: false,
        emitted_ids: Vec::new(),
    })
}

/// The choices' pieces as they come. The admission lasts as long as the stream.
fn merge(answers: Vec<Answer>, admitted: Admitted) -> Deltas {
    let choices = answers.into_iter().map(|answer| Box::pin(answer.into_stream()));
    let merged = stream::select_all(choices);
    Box::pin(stream::unfold((merged, admitted), |(mut merged, admitted)| async move {
        let delta = futures_util::StreamExt::next(&mut merged).await?;
        if let Ok(delta) = &delta {
            admitted.ask.watch.piece(delta);
        }
        Some((delta, (merged, admitted)))
    }))
}
