//! Waiting and running sequences, and the page budget → what the next step computes. Pure: the clock and the table
//! are arguments.

use std::{
    collections::VecDeque,
    ops::Range,
    time::{Duration, Instant},
};

use cluster::RoutingTable;

use crate::{
    args::Limits,
    cache::Cache,
    sequence::{Event, Parked, Sequence, experts_missing},
};

/// Rows `n_computed..n_computed + n_rows` of one running sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scheduled {
    /// Position in [`Scheduler::running`].
    pub(crate) sequence: usize,
    /// Rows of the batch.
    pub(crate) rows: Range<usize>,
}

pub(crate) struct Scheduler {
    chunk_rows_max: usize,
    step_rows_max: usize,
    running_max: usize,
    expert_wait: Duration,
    waiting: VecDeque<Sequence>,
    /// In order of admission; the last is the first to give its pages back.
    running: Vec<Sequence>,
    cache: Cache,
    n_preemptions: u64,
}

/// How long after a failure a listed holder is asked again.
pub(crate) const RETRY_AFTER: Duration = Duration::from_millis(100);

impl Scheduler {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            chunk_rows_max: limits.chunk_rows_max,
            step_rows_max: limits.step_rows_max,
            running_max: limits.running_max,
            expert_wait: limits.expert_wait,
            waiting: VecDeque::new(),
            running: Vec::new(),
            cache: Cache::new(limits.n_pages, limits.page_positions),
            n_preemptions: 0,
        }
    }

    pub(crate) fn submit(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Frees what belongs to callers that went away.
    pub(crate) fn drop_cancelled(&mut self) {
        self.waiting.retain(|sequence| !sequence.is_cancelled());
        let cancelled = self.running.extract_if(.., |sequence| sequence.is_cancelled());
        for mut sequence in cancelled {
            self.cache.release(&mut sequence.pages);
        }
    }

    /// The next batch; empty if there is nothing that can be computed now.
    pub(crate) fn schedule(&mut self, now: Instant, table: &RoutingTable) -> Vec<Scheduled> {
        self.drop_cancelled();
        self.wake_parked(now, table);
        self.admit(now);
        self.make_room(now);
        let mut batch = Vec::new();
        let mut n_rows = 0;
        // One row for everybody who is decoding before any prompt gets its chunk.
        for decoding in [true, false] {
            for (index, sequence) in self.running.iter().enumerate() {
                let pending = sequence.n_pending();
                if sequence.parked.is_some() || (pending == 1) != decoding {
                    continue;
                }
                let take = pending.min(self.chunk_rows_max).min(self.step_rows_max - n_rows);
                if take > 0 {
                    batch.push(Scheduled { sequence: index, rows: n_rows..n_rows + take });
                    n_rows += take;
                }
            }
        }
        batch
    }

    /// Lets sequences go on whose experts have holders again; fails those that waited too long.
    fn wake_parked(&mut self, now: Instant, table: &RoutingTable) {
        let mut late = Vec::new();
        for (index, sequence) in self.running.iter_mut().enumerate() {
            let Some(parked) = &sequence.parked else { continue };
            let held = parked.missing.iter().all(|(&layer, experts)| {
                experts.iter().all(|&expert| !table.holders_of(layer, expert).is_empty())
            });
            // First: a listed holder that never answers in time must not be asked for ever.
            if now.saturating_duration_since(sequence.progress_at) >= self.expert_wait {
                sequence.send(Event::Failed(experts_missing(&parked.missing, parked.last_failure.as_ref())));
                late.push(index);
            } else if held && now >= parked.retry_at {
                sequence.parked = None;
            }
        }
        self.remove(&late);
    }

    fn admit(&mut self, now: Instant) {
        while self.running.len() < self.running_max {
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            if !self.cache.grow(&mut sequence.pages, sequence.tokens.len()) {
                self.waiting.push_front(sequence);
                break;
            }
            // The wait for experts is counted from here: time in the queue is not their fault.
            sequence.progress_at = now;
            self.running.push(sequence);
        }
    }

    /// Gives every running sequence the pages for its pending rows, the oldest first, taking them from the youngest,
    /// which starts over later. Its tokens are kept, and computing them again gives the same bits.
    fn make_room(&mut self, now: Instant) {
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            if self.cache.grow(&mut sequence.pages, sequence.tokens.len()) {
                index += 1;
                continue;
            }
            if let Some(mut youngest) = self.running.pop() {
                tracing::debug!(request = %youngest.request.id, "preempted");
                self.cache.release(&mut youngest.pages);
                youngest.n_computed = 0;
                youngest.parked = None;
                youngest.trail.queued_at = Some(now);
                self.n_preemptions += 1;
                self.waiting.push_front(youngest);
            }
        }
    }

    /// Fails every waiting sequence that has waited for the experts too long: used while nothing can be computed.
    pub(crate) fn fail_overdue(&mut self, now: Instant, error: impl Fn() -> proto::Error) {
        let expert_wait = self.expert_wait;
        self.waiting.retain(|sequence| {
            let overdue = now.saturating_duration_since(sequence.progress_at) >= expert_wait;
            if overdue {
                sequence.send(Event::Failed(error()));
            }
            !overdue
        });
    }

    pub(crate) fn park(&mut self, index: usize, parked: Parked) {
        self.running[index].parked = Some(parked);
    }

    pub(crate) fn running(&self) -> &[Sequence] {
        &self.running
    }

    pub(crate) fn running_mut(&mut self, index: usize) -> &mut Sequence {
        &mut self.running[index]
    }

    /// Ends the running sequences at `indices` (ascending) and frees their pages.
    pub(crate) fn remove(&mut self, indices: &[usize]) {
        for &index in indices.iter().rev() {
            let mut sequence = self.running.remove(index);
            self.cache.release(&mut sequence.pages);
        }
    }

    pub(crate) fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn pages_in_use(&self) -> usize {
        self.cache.in_use()
    }

    pub(crate) const fn n_preemptions(&self) -> u64 {
        self.n_preemptions
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ids::{ExpertId, LayerId};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;
    use crate::{
        args::{Combine, OnMissingExpert, Wire},
        dispatch::tests::table,
        sampling::{Drawn, Sampling},
        sequence::Request,
    };

    /// Pages of four positions, chunks of three rows, steps of five.
    fn limits(n_pages: usize) -> Limits {
        Limits {
            combine: Combine::Exact,
            wire: Wire::F32,
            chunk_rows_max: 3,
            step_rows_max: 5,
            half_batches: crate::args::HalfBatches::Measured,
            n_pages,
            page_positions: 4,
            context_max: 100,
            running_max: 3,
            queue_max: 8,
            expert_wait: Duration::from_secs(10),
            dispatch_timeout: Duration::from_secs(10),
            on_missing_expert: OnMissingExpert::Wait,
        }
    }

    struct Bench {
        scheduler: Scheduler,
        start: Instant,
        table: RoutingTable,
    }

    impl Bench {
        #[expect(clippy::disallowed_methods, reason = "an origin for the test's own clock")]
        fn new(n_pages: usize) -> Self {
            Self {
                scheduler: Scheduler::new(&limits(n_pages)),
                start: Instant::now(),
                table: table(&[("a", &[0])]),
            }
        }

        fn submit(&mut self, n_prompt: usize) -> UnboundedReceiver<Event> {
            let (out, events) = unbounded_channel();
            let sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 };
            let request = Request {
                id: String::new(),
                emitted: Vec::new(),
                prompt: vec![1; n_prompt],
                tokens_max: 50,
                tokens_min: 0,
                sampling,
                stop_ids: Vec::new(),
                top_logprobs: 0,
                prompt_logits: false,
            };
            let trace = telemetry::Tracer::off().accept(None, false);
            self.scheduler.submit(Sequence::new(request, trace, out, self.start));
            events
        }

        /// Schedules, and does what the engine does for rows that come home. Gives (sequence, rows) of the step.
        fn step(&mut self, seconds: u64) -> Vec<(usize, usize)> {
            let batch = self.scheduler.schedule(self.start + Duration::from_secs(seconds), &self.table);
            for scheduled in &batch {
                let sequence = self.scheduler.running_mut(scheduled.sequence);
                sequence.n_computed += scheduled.rows.len();
                if sequence.n_pending() == 0 {
                    sequence.push(Drawn { id: 2, logprob: 0.0, top: Vec::new() });
                }
            }
            batch.iter().map(|scheduled| (scheduled.sequence, scheduled.rows.len())).collect()
        }
    }

    #[test]
    fn decoding_goes_before_prompts_and_chunks_are_bounded() {
        let mut bench = Bench::new(8);
        let _a = bench.submit(2);
        assert_eq!(bench.step(0), [(0, 2)]);
        let _b = bench.submit(7);
        assert_eq!(bench.step(0), [(0, 1), (1, 3)]);
        let _c = bench.submit(3);
        assert_eq!(bench.step(0), [(0, 1), (1, 3), (2, 1)], "five rows a step");
        assert_eq!(bench.step(0), [(0, 1), (1, 1), (2, 2)]);
    }

    #[test]
    fn the_youngest_gives_its_pages_back_and_starts_over() {
        let mut bench = Bench::new(4);
        let _a = bench.submit(8);
        let _b = bench.submit(8);
        let mut steps = 0;
        while bench.scheduler.n_preemptions() == 0 {
            bench.step(0);
            steps += 1;
            assert!(steps < 20, "sixteen positions cannot hold two sequences that grow");
        }
        assert_eq!((bench.scheduler.running().len(), bench.scheduler.n_waiting()), (1, 1));
        assert_eq!(bench.scheduler.pages_in_use(), 3);
        let preempted = &bench.scheduler.waiting[0];
        assert!(preempted.tokens.len() >= 8 && preempted.n_computed == 0 && preempted.pages.is_empty());
    }

    #[test]
    fn a_cancelled_sequence_frees_its_pages_within_one_step() {
        let mut bench = Bench::new(4);
        let running = bench.submit(8);
        bench.step(0);
        let waiting = bench.submit(16);
        bench.step(0);
        assert_eq!((bench.scheduler.pages_in_use(), bench.scheduler.n_waiting()), (2, 1));
        drop((running, waiting));
        assert!(bench.step(0).is_empty());
        assert_eq!((bench.scheduler.pages_in_use(), bench.scheduler.n_waiting()), (0, 0));
    }

    fn park(bench: &mut Bench, expert: u32) {
        let missing = BTreeMap::from([(LayerId(0), vec![ExpertId(expert)])]);
        bench
            .scheduler
            .park(0, Parked { missing, last_failure: None, retry_at: bench.start + Duration::from_secs(1) });
    }

    #[test]
    fn a_parked_sequence_goes_on_when_its_experts_have_a_holder() {
        let mut bench = Bench::new(4);
        let _events = bench.submit(2);
        bench.step(0);
        park(&mut bench, 0);
        assert!(bench.step(0).is_empty(), "not before the pause is over");
        assert_eq!(bench.step(1), [(0, 1)]);
        park(&mut bench, 5);
        assert!(bench.step(9).is_empty());
        bench.table = table(&[("b", &[5])]);
        assert_eq!(bench.step(9), [(0, 1)]);
    }

    fn check_fails(expert: u32) {
        let mut bench = Bench::new(4);
        let mut events = bench.submit(2);
        bench.step(0);
        park(&mut bench, expert);
        assert!(bench.step(10).is_empty());
        assert_eq!(bench.scheduler.pages_in_use(), 0);
        assert!(matches!(events.try_recv(), Ok(Event::Token { .. })));
        let Ok(Event::Failed(error)) = events.try_recv() else { panic!("it waits for ever") };
        assert_eq!(error.message, format!("no live server answers for layer 0: expert {expert}"));
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn a_parked_sequence_fails_with_the_experts_named() {
        check_fails(5);
        // Listed, and does not answer: whoever asks it for ever would never fail.
        check_fails(0);
    }
}
