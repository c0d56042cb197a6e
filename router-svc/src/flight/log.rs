//! What a flight did: every frame as it was sent and what became of it. Metrics and traces are made of this afterwards.

use std::time::{Duration, Instant};

use ids::{ExpertId, FrameId, InstanceId};
use telemetry::trace::SpanId;

/// Why a frame was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    First,
    /// The first one is late.
    Hedge,
    /// The first one has failed, or its server was ejected.
    Failover,
    /// To find out whether an ejected server is back.
    Probe,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::First, Self::Hedge, Self::Failover, Self::Probe];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Hedge => "hedge",
            Self::Failover => "failover",
            Self::Probe => "probe",
        }
    }
}

/// Why frames are sent.
pub(super) struct Purpose {
    pub(super) kind: Kind,
    pub(super) cause: Option<String>,
}

impl Purpose {
    pub(super) const fn first() -> Self {
        Self { kind: Kind::First, cause: None }
    }
}

pub(super) fn distinct(experts: impl Iterator<Item = ExpertId>) -> Vec<ExpertId> {
    let mut experts: Vec<ExpertId> = experts.collect();
    experts.sort_unstable();
    experts.dedup();
    experts
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ending {
    /// Nobody waited for it any more when the layer went on.
    Outrun,
    Answered {
        /// As the server says.
        queue: Duration,
        compute: Duration,
        bytes_in: usize,
    },
    Failed {
        reason: String,
        message: String,
    },
}

/// One frame.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) frame_id: FrameId,
    /// Of the client's span in each trace that the frame belongs to: known before it is sent, so that the server's spans
    /// hang under it.
    pub(crate) span_id: SpanId,
    pub(crate) holder: InstanceId,
    /// The holder is this router: nothing was sent.
    pub(crate) inside: bool,
    pub(crate) kind: Kind,
    /// Why it was sent; the first ones need no reason.
    pub(crate) cause: Option<String>,
    /// Ascending. Of the batch; of the step once [`Log::of_rows_from`] was told where that begins.
    pub(crate) rows: Vec<usize>,
    /// Each once, ascending.
    pub(crate) experts: Vec<ExpertId>,
    pub(crate) n_pairs: usize,
    pub(crate) as_pairs: bool,
    pub(crate) bytes_out: usize,
    pub(crate) sent_at: Instant,
    pub(crate) ended_at: Option<Instant>,
    pub(crate) ending: Ending,
}

impl Attempt {
    /// Something happened here that a reader of a trace looks for.
    pub(crate) fn is_remarkable(&self) -> bool {
        self.kind != Kind::First || matches!(self.ending, Ending::Failed { .. })
    }
}

/// A server was ejected while the flight was under way.
#[derive(Clone, Debug)]
pub(crate) struct Ejection {
    pub(crate) at: Instant,
    pub(crate) holder: InstanceId,
    pub(crate) cause: String,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) ejections: Vec<Ejection>,
}

impl Log {
    /// The rows of its frames become those of a step in which the flight's first one is row `first`.
    pub(crate) fn of_rows_from(&mut self, first: usize) {
        let rows = self.attempts.iter_mut().flat_map(|attempt| &mut attempt.rows);
        rows.for_each(|row| *row += first);
    }

    pub(super) fn end(&mut self, attempt_idx: usize, at: Instant, ending: Ending) {
        let attempt = &mut self.attempts[attempt_idx];
        attempt.ended_at = Some(at);
        attempt.ending = ending;
    }
}
