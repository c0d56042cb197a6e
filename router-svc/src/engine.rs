//! The engine: one thread that owns model, cache and scheduler, and steps many sequences together. Commands come in through
//! a channel, tokens go out through one for each sequence. Whatever it waits for, the links' event loop runs meanwhile.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use cluster::{RoutingTable, table};
use model::{Backbone, Pages, Span, threads};
use proto::{Code, Error};
use telemetry::Tracer;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::{
    args::{Combine, Limits},
    batch::Step,
    calibrate::calibrate,
    forward::{CombineMode, Fate, Forward, forward},
    halves::Halves,
    meters::Meters,
    remote::Remote,
    sampling::{Draw, Drawn, sample},
    scheduler::{RETRY_AFTER, Scheduled, Scheduler},
    sequence::{Event, Parked, Sequence},
    spans::{Part, PassLog, Policy, StepLog, Trail, Usual, record, record_queue},
    stats::Stats,
};

/// What the edge tells the engine.
pub(crate) enum Command {
    Submit(Box<Sequence>),
    /// Something changed that may matter: a caller went away, the table has a new version.
    Wake,
    Stop,
}

/// How often an engine without work looks again: at what waits for experts, for callers to go away, at late replies.
const IDLE_TICK: Duration = Duration::from_millis(100);

pub(crate) struct Engine {
    backbone: Arc<Backbone>,
    pages: Pages,
    scheduler: Scheduler,
    remote: Remote,
    mode: CombineMode,
    halves: Halves,
    calibrated: bool,
    calibrate_at: Instant,
    stats: Arc<Stats>,
    observers: Observers,
    usual: Usual,
    n_steps: u64,
}

/// Who is told what a step did.
pub(crate) struct Observers {
    pub(crate) meters: Meters,
    pub(crate) tracer: Tracer,
    pub(crate) policy: Policy,
}

/// One part of a batch before it is computed.
struct Planned {
    position: usize,
    is_prefill: bool,
    /// It is recorded, and its servers are told so.
    wanted: bool,
    trail: Trail,
}

enum Turn {
    Worked,
    /// Nothing can be computed, but something waits, or is waited for.
    Waiting,
    Idle,
}

impl Engine {
    pub(crate) fn new(
        backbone: Arc<Backbone>,
        limits: &Limits,
        remote: Remote,
        stats: Arc<Stats>,
        observers: Observers,
    ) -> Self {
        Self {
            pages: Pages::new(&backbone, limits.n_pages, limits.page_positions),
            scheduler: Scheduler::new(limits),
            remote,
            mode: CombineMode::new(limits),
            halves: Halves::new(limits.half_batches),
            calibrated: limits.combine != Combine::Exact,
            calibrate_at: now(),
            stats,
            observers,
            usual: Usual::default(),
            n_steps: 0,
            backbone,
        }
    }

    /// Serves commands until told to stop, or until nobody can send any.
    pub(crate) fn run(mut self, commands: &mut UnboundedReceiver<Command>) {
        let mut turn = Turn::Waiting;
        loop {
            let first = match turn {
                Turn::Worked => commands.try_recv().ok(),
                Turn::Waiting => self.remote.wait(commands.recv(), IDLE_TICK).flatten(),
                Turn::Idle => match self.remote.wait(commands.recv(), Duration::MAX).flatten() {
                    Some(command) => Some(command),
                    None => return,
                },
            };
            let more = std::iter::from_fn(|| commands.try_recv().ok());
            for command in first.into_iter().chain(more) {
                match command {
                    Command::Submit(sequence) => self.scheduler.submit(*sequence),
                    Command::Wake => {}
                    Command::Stop => return,
                }
            }
            self.stats.begin_turn(now());
            turn = self.step(now());
            self.stats.end_turn();
            self.stats.publish(&self.scheduler, &self.remote);
        }
    }

    /// One turn: schedule → forward → sample.
    fn step(&mut self, now: Instant) -> Turn {
        let view = self.remote.view();
        if !self.calibrated && !self.try_calibrate(now) {
            self.scheduler.drop_cancelled();
            let missing = view
                .table
                .missing(self.backbone.config().moe_layers(), self.backbone.config().n_routed_experts);
            self.scheduler.fail_overdue(now, || not_started(&missing));
            return Turn::Waiting;
        }
        let batch = self.scheduler.schedule(now, &view.table);
        if batch.is_empty() {
            self.remote.hear_all();
            self.remote.give_up_mute();
            let waits = self.remote.is_owed()
                || self.scheduler.n_waiting() > 0
                || !self.scheduler.running().is_empty();
            return if waits { Turn::Waiting } else { Turn::Idle };
        }
        let planned = self.plan(&batch, now);
        let mut result = self.forward(&batch, &planned);
        let pass = std::mem::take(&mut result.pass);
        let failures: Vec<_> = result.fates.iter().map(Fate::failure).collect();
        let (finished, ended) = self.deliver(&batch, result, now);
        self.observe(&batch, planned, failures, &pass, &view.table, (now, ended));
        self.scheduler.remove(&finished);
        self.stats.count_step();
        Turn::Worked
    }

    fn try_calibrate(&mut self, now: Instant) -> bool {
        let config = self.backbone.config();
        let view = self.remote.view();
        if now < self.calibrate_at
            || !view.table.missing(config.moe_layers(), config.n_routed_experts).is_empty()
        {
            return false;
        }
        match calibrate(&self.backbone, &mut self.remote, &mut self.mode) {
            Ok(()) => {
                self.calibrated = true;
                self.stats.set_calibrated();
                tracing::info!(layers = self.mode.grids.len(), "calibrated exact combine");
            }
            Err(error) => {
                tracing::warn!(%error, "calibration failed, trying again");
                self.calibrate_at = now + RETRY_AFTER;
            }
        }
        self.calibrated
    }

    /// What is to be known of each part of the batch before it is computed; the wait of those that begin is over.
    fn plan(&mut self, batch: &[Scheduled], now: Instant) -> Vec<Planned> {
        let Observers { meters, tracer, policy } = &self.observers;
        let plan = |scheduled: &Scheduled| {
            let sequence = self.scheduler.running_mut(scheduled.sequence);
            if let Some(since) = sequence.trail.queued_at {
                meters.queued(now.saturating_duration_since(since));
                record_queue(tracer, &mut sequence.trail, now);
            }
            let is_prefill = sequence.n_pending() > 1 || sequence.n_generated() == 0;
            let wanted = tracer.is_on() && sequence.trail.wants_next(*policy, is_prefill);
            Planned { position: sequence.n_computed, is_prefill, wanted, trail: sequence.trail }
        };
        batch.iter().map(plan).collect()
    }

    /// Metrics of the step, and its spans.
    fn observe(
        &mut self,
        batch: &[Scheduled],
        mut planned: Vec<Planned>,
        failures: Vec<Option<(&'static str, String)>>,
        pass: &PassLog,
        table: &RoutingTable,
        (started, ended): (Instant, Instant),
    ) {
        self.n_steps += 1;
        let n_rows = batch.iter().map(|scheduled| scheduled.rows.len()).sum();
        let step =
            StepLog { number: self.n_steps, started, ended, n_rows, n_sequences: batch.len(), pass, table };
        self.observers.meters.step(&step);
        let slow = self.usual.is_slow(n_rows, ended - started);
        if !self.observers.tracer.is_on() {
            return;
        }
        let part = |((planned, scheduled), failure)| -> Part<'_> {
            let (planned, scheduled): (&mut Planned, &Scheduled) = (planned, scheduled);
            Part {
                rows: scheduled.rows.clone(),
                position: planned.position,
                is_prefill: planned.is_prefill,
                wanted: planned.wanted,
                failure,
                trail: &mut planned.trail,
            }
        };
        let parts = planned.iter_mut().zip(batch).zip(failures).map(part);
        let traced: Vec<Part<'_>> = parts.filter(|part| part.trail.context.sampled).collect();
        if traced.is_empty() {
            return;
        }
        record(&self.observers.tracer, &step, slow, traced);
        for (scheduled, planned) in batch.iter().zip(planned) {
            self.scheduler.running_mut(scheduled.sequence).trail = planned.trail;
        }
    }

    fn forward(&mut self, batch: &[Scheduled], planned: &[Planned]) -> Forward {
        // Participants are noted during the step while tokens and pages are read: taken out for its time.
        let mut participants: Vec<_> = batch
            .iter()
            .map(|scheduled| std::mem::take(&mut self.scheduler.running_mut(scheduled.sequence).participants))
            .collect();
        let sequences =
            batch.iter().map(|scheduled| (scheduled, &self.scheduler.running()[scheduled.sequence]));
        let mut step = Step {
            ids: sequences
                .clone()
                .flat_map(|(scheduled, sequence)| {
                    &sequence.tokens[sequence.n_computed..][..scheduled.rows.len()]
                })
                .copied()
                .collect(),
            spans: sequences
                .map(|(scheduled, sequence)| Span {
                    rows: scheduled.rows.clone(),
                    position: sequence.n_computed,
                    pages: &sequence.pages,
                })
                .collect(),
            participants: participants.iter_mut().collect(),
            traced: batch
                .iter()
                .zip(planned)
                .filter(|(_, planned)| planned.wanted)
                .map(|(scheduled, planned)| (scheduled.rows.clone(), planned.trail.context))
                .collect(),
        };
        let with_prompt = step.spans.iter().any(|span| span.rows.len() > 1);
        let choice = self.halves.choose(step.ids.len(), with_prompt, self.remote.is_elsewhere());
        let began = self.remote.now();
        let result = forward(
            &self.backbone,
            &mut step,
            &mut self.pages,
            &mut self.remote,
            &self.mode,
            choice.in_halves,
        );
        if result.fates.iter().all(|fate| matches!(fate, Fate::Done)) {
            self.halves.note(choice, self.remote.now().saturating_duration_since(began));
        }
        for (scheduled, participants) in batch.iter().zip(participants) {
            self.scheduler.running_mut(scheduled.sequence).participants = participants;
        }
        result
    }

    /// Draws the next token of each sequence that has all of its rows; the threads share the sequences.
    fn draw(&self, rows: &RowsToHead, logits: &[f32]) -> Vec<(usize, Drawn)> {
        let vocab_size = self.backbone.config().vocab_size;
        let running = self.scheduler.running();
        let complete: Vec<_> = rows
            .wanted
            .iter()
            .zip(rows.split(logits, vocab_size))
            .filter(|(wanted, _)| running[wanted.sequence].n_pending() == 0)
            .collect();
        let of = |at: usize| {
            let (wanted, logits) = complete[at];
            let sequence = &running[wanted.sequence];
            let draw = Draw {
                position: sequence.n_generated() as u64,
                banned: sequence.banned_ids(),
                n_top: sequence.request.top_logprobs,
            };
            let last = &logits[logits.len() - vocab_size..];
            (wanted.sequence, sample(last, &sequence.request.sampling, draw))
        };
        threads::share(complete.len() * vocab_size, || threads::map(complete.len(), of))
    }

    /// Turns what was computed into tokens, and what was not into waiting or errors. Gives the sequences that ended, and
    /// when everything was computed and nobody had been told yet.
    fn deliver(&mut self, batch: &[Scheduled], result: Forward, now: Instant) -> (Vec<usize>, Instant) {
        let mut finished = Vec::new();
        let mut not_finite = Vec::new();
        let mut rows = RowsToHead::default();
        for (scheduled, fate) in batch.iter().zip(result.fates) {
            let sequence = self.scheduler.running_mut(scheduled.sequence);
            match fate {
                Fate::Done => {
                    rows.want(sequence, scheduled);
                    sequence.n_computed += scheduled.rows.len();
                    sequence.progress_at = now;
                }
                Fate::Missing { layer, experts, last_failure } => {
                    let missing = BTreeMap::from([(layer, experts)]);
                    self.scheduler.park(
                        scheduled.sequence,
                        Parked { missing, last_failure, retry_at: now + RETRY_AFTER },
                    );
                }
                Fate::NotFinite { layer } => not_finite.push((scheduled.sequence, layer)),
            }
        }
        let vocab_size = self.backbone.config().vocab_size;
        let logits = rows.logits(&self.backbone, &result.hidden);
        let ended = self.remote.now();
        for (index, layer) in not_finite {
            let message = format!("hidden states are not finite at layer {layer}");
            let error = Error::new(Code::Internal, "not_finite", message);
            self.scheduler.running_mut(index).send(Event::Failed(error));
            finished.push(index);
        }
        for (wanted, logits) in rows.wanted.iter().zip(rows.split(&logits, vocab_size)) {
            let sequence = self.scheduler.running_mut(wanted.sequence);
            if wanted.as_prompt_logits > 0 {
                let values = logits[..wanted.as_prompt_logits * vocab_size].to_vec();
                sequence.send(Event::PromptLogits { first_position: sequence.n_logits_sent, values });
                sequence.n_logits_sent += wanted.as_prompt_logits;
            }
        }
        let draws = self.draw(&rows, &logits);
        // One after the other without a pause: whoever sends them on is mostly woken once, and not anew for each.
        for (index, drawn) in draws {
            let sequence = self.scheduler.running_mut(index);
            self.stats.count_token();
            if let Some(finish) = sequence.push(drawn) {
                // Counted before it is sent: who has the answer sees it in the status.
                if sequence.is_degraded() {
                    self.stats.count_degraded();
                }
                sequence.finish(finish);
                finished.push(index);
            }
        }
        finished.sort_unstable();
        (finished, ended)
    }
}

/// The rows of a step whose logits somebody wants.
#[derive(Default)]
struct RowsToHead {
    rows: Vec<usize>,
    wanted: Vec<Wanted>,
}

struct Wanted {
    sequence: usize,
    n_rows: usize,
    /// How many of them, from the first, are prompt positions to be reported.
    as_prompt_logits: usize,
}

impl RowsToHead {
    /// Call before `n_computed` moves on.
    fn want(&mut self, sequence: &Sequence, scheduled: &Scheduled) {
        let n_rows = scheduled.rows.len();
        let first = sequence.n_computed;
        let n_prompt = sequence.request.prompt.len();
        // After a preemption the prompt is computed again; what was sent is not sent twice.
        let skip = if sequence.request.prompt_logits {
            sequence.n_logits_sent.saturating_sub(first)
        } else {
            n_rows
        };
        let as_prompt_logits = n_prompt.saturating_sub(first).min(n_rows).saturating_sub(skip);
        let draws = sequence.n_pending() == n_rows;
        let start = match (as_prompt_logits, draws) {
            (0, false) => return,
            (0, true) => n_rows - 1,
            (1.., _) => skip,
        };
        self.rows.extend(scheduled.rows.clone().skip(start));
        self.wanted.push(Wanted { sequence: scheduled.sequence, n_rows: n_rows - start, as_prompt_logits });
    }

    /// `[wanted rows, vocab]`
    fn logits(&self, backbone: &Backbone, hidden: &[f32]) -> Vec<f32> {
        let hidden_size = backbone.config().hidden_size;
        let gathered: Vec<f32> =
            self.rows.iter().flat_map(|row| &hidden[row * hidden_size..][..hidden_size]).copied().collect();
        if gathered.is_empty() { Vec::new() } else { backbone.logits(&gathered) }
    }

    fn split<'a>(&self, mut logits: &'a [f32], vocab_size: usize) -> impl Iterator<Item = &'a [f32]> {
        self.wanted.iter().map(move |wanted| {
            let (own, rest) = logits.split_at(wanted.n_rows * vocab_size);
            logits = rest;
            own
        })
    }
}

fn not_started(missing: &BTreeMap<ids::LayerId, Vec<ids::ExpertId>>) -> Error {
    let message = if missing.is_empty() {
        "the router is still calibrating".to_owned()
    } else {
        format!("no live server holds {}", table::describe(missing))
    };
    Error::new(Code::Unavailable, "experts_missing", message)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the engine's loop is where time enters; everything below takes it"
)]
fn now() -> Instant {
    Instant::now()
}
