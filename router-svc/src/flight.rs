//! All frames of one layer, from dispatch until every row is home or known to be lost. A pure state machine: the
//! engine feeds it replies, failures and the time with the table of the moment, and sends what it orders. It knows no
//! clock and no sockets.
//!
//! The work is a tree. A piece is some (row, expert) pairs at one holder. When its holder fails, or is late, the piece
//! gets a cover: pieces at other holders that together do the same. Failover and hedge differ only in whether the first
//! frame still counts. A piece is done when its own reply is home or one of its covers is, whichever comes first; the
//! other is never looked at. So every pair is combined exactly once, or its row is lost by name.

pub(crate) mod aloft;
mod landed;
mod late;
pub(crate) mod log;
mod pieces;
#[cfg(test)]
mod vain;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use cluster::{Health, RoutingTable, health::Failure};
use ids::{FrameId, InstanceId};
use proto::{
    Code, Error, Frame, Reply,
    frame::{Combine, Computed},
};
use telemetry::trace::SpanId;

pub(crate) use self::landed::Landed;
use self::log::{Attempt, Ejection, Ending, Kind, Log, Purpose, distinct};
use self::pieces::{Piece, PieceIdx, Pieces, Progress, Sent, State, Tried};
use crate::dispatch::{Activations, Grounds, Part, Slot, pack, plan, plan_for};
use crate::inside;

/// A frame to be sent.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) holder: InstanceId,
    pub(crate) frame: Frame,
}

/// Numbers frames: unique for the life of the router.
#[derive(Debug, Default)]
pub(crate) struct FrameIds {
    last: u64,
    /// Another one for every router: a frame's span must not have the id of another router's.
    seed: u64,
}

impl FrameIds {
    pub(crate) const fn new(seed: u64) -> Self {
        Self { last: 0, seed }
    }

    fn next(&mut self) -> FrameId {
        self.last += 1;
        FrameId(self.last)
    }

    /// One to one for each router, and never zero, which would be no span.
    fn span_of(&self, frame: FrameId) -> SpanId {
        let mixed = self.seed ^ frame.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        SpanId::from(if mixed == 0 { frame.0 } else { mixed })
    }
}

/// What happened to all frames so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) frames: u64,
    pub(crate) stale_replies: u64,
    /// Failed frames by reason.
    pub(crate) failures: BTreeMap<String, u64>,
}

/// What the flight needs to know of its surroundings at the moment of a decision.
pub(crate) struct Surroundings<'a> {
    pub(crate) table: &'a RoutingTable,
    pub(crate) health: &'a mut Health,
    pub(crate) ids: &'a mut FrameIds,
    pub(crate) counts: &'a mut Counts,
    pub(crate) now: Instant,
    /// When that came which the flight is told now: not after `now`, and before it if nobody had time to hear.
    pub(crate) heard_at: Instant,
    /// How long a frame may take before it counts as failed.
    pub(crate) dispatch_timeout: Duration,
}

impl Surroundings<'_> {
    fn grounds(&self) -> Grounds<'_> {
        Grounds { table: self.table, health: self.health, now: self.now, salt: self.ids.last }
    }
}

#[derive(Debug)]
#[must_use = "rows of a flight that never lands are lost"]
pub(crate) struct Flight {
    activations: Activations,
    combine: Combine,
    pieces: Pieces,
    roots: Vec<PieceIdx>,
    frames: HashMap<FrameId, PieceIdx>,
    /// Rows that are asked for pair by pair.
    pair_rows: BTreeSet<usize>,
    last_failure: Option<Error>,
    log: Log,
}

impl Flight {
    /// Orders the frames for `rows` of the activations.
    pub(crate) fn launch(
        activations: Activations,
        rows: impl IntoIterator<Item = usize>,
        combine: Combine,
        around: &mut Surroundings<'_>,
    ) -> (Self, Vec<Order>) {
        let top_k = activations.top_k();
        let rows: Vec<usize> = rows.into_iter().collect();
        let slots: Vec<Slot> =
            rows.iter().flat_map(|row| (row * top_k..(row + 1) * top_k).map(Slot)).collect();
        let as_pairs = combine == Combine::Pairs;
        let mut flight = Self {
            activations,
            combine,
            pieces: Pieces::default(),
            roots: Vec::new(),
            frames: HashMap::new(),
            pair_rows: if as_pairs { rows.into_iter().collect() } else { BTreeSet::new() },
            last_failure: None,
            log: Log::default(),
        };
        let mut orders = flight.send_roots(slots, as_pairs, around);
        orders.extend(flight.send_probes(around));
        (flight, orders)
    }

    fn send_roots(&mut self, slots: Vec<Slot>, as_pairs: bool, around: &mut Surroundings<'_>) -> Vec<Order> {
        let (parts, orphans) = plan(&self.activations, slots, &around.grounds(), &[]);
        let mut orders = Vec::with_capacity(parts.len());
        for part in parts {
            let root = self.send(part, as_pairs, None, &Purpose::first(), around, &mut orders);
            self.roots.push(root);
        }
        if !orphans.is_empty() {
            let root = self.orphan(orphans, as_pairs, None);
            self.roots.push(root);
        }
        orders
    }

    /// A server whose time out is over gets a frame that another one is computing: it risks nobody's row.
    fn send_probes(&mut self, around: &mut Surroundings<'_>) -> Vec<Order> {
        let mut orders = Vec::new();
        for holder in around.health.probes_due(around.now) {
            let probe = self.roots.iter().find_map(|&root| {
                let piece = &self.pieces[root];
                let other = matches!(&piece.state, State::Out(sent) if sent.holder != holder);
                let part = plan_for(&self.activations, &holder, &piece.slots, around.table)?;
                (other && piece.covers.is_empty()).then_some((root, part))
            });
            if let Some((root, part)) = probe {
                let n_orders = orders.len();
                let as_pairs = self.pieces[root].as_pairs;
                let purpose = Purpose { kind: Kind::Probe, cause: Some("its time out is over".to_owned()) };
                let probe = self.send(part, as_pairs, Some(root), &purpose, around, &mut orders);
                self.pieces[root].covers.push(vec![probe]);
                // The frame that it goes along with is hedged, if need be.
                if let State::Out(sent) = &mut self.pieces[probe].state {
                    sent.hedge_at = None;
                }
                around.health.probe(&holder, orders[n_orders].frame.id);
            }
        }
        orders
    }

    fn send(
        &mut self,
        part: Part,
        as_pairs: bool,
        parent: Option<PieceIdx>,
        purpose: &Purpose,
        around: &mut Surroundings<'_>,
        orders: &mut Vec<Order>,
    ) -> PieceIdx {
        let Part { holder, epoch, weights, slots, dtype } = part;
        let frame_id = around.ids.next();
        let (rows, assignments, frame_rows) = pack(&self.activations, &slots, dtype);
        let inside = around.table.holder(&holder).is_some_and(|holder| holder.inside);
        let attempt = Attempt {
            frame_id,
            span_id: around.ids.span_of(frame_id),
            holder: holder.clone(),
            inside,
            kind: purpose.kind,
            cause: purpose.cause.clone(),
            rows: frame_rows.clone(),
            experts: distinct(assignments.iter().map(|assignment| assignment.expert)),
            n_pairs: slots.len(),
            as_pairs,
            bytes_out: if inside { 0 } else { rows.n_bytes() },
            sent_at: around.now,
            ended_at: None,
            ending: Ending::Outrun,
        };
        let frame = Frame {
            id: frame_id,
            layer: self.activations.layer,
            rows,
            assignments,
            combine: if as_pairs { Combine::Pairs } else { self.combine },
            timeout: Some(around.dispatch_timeout),
            traceparents: self.activations.traceparents(&attempt),
            epoch,
            weights,
        };
        let attempt_idx = self.log.attempts.len();
        self.log.attempts.push(attempt);
        orders.push(Order { holder: holder.clone(), frame });
        around.counts.frames += 1;
        around.health.sent(&holder, frame_id, slots.len(), around.now);
        let tried = Some(Tried { holder: holder.clone(), epoch, excused: false });
        let sent = Sent {
            holder,
            epoch,
            weights,
            frame_id,
            attempt_idx,
            frame_rows,
            hedge_at: around.health.hedge_after(slots.len()).map(|after| around.now + after),
            expires_at: around.now + around.dispatch_timeout,
            is_overdue: false,
        };
        let idx = self.pieces.push(Piece {
            slots,
            as_pairs,
            parent,
            tried,
            state: State::Out(sent),
            covers: Vec::new(),
        });
        self.frames.insert(frame_id, idx);
        idx
    }

    fn orphan(&mut self, slots: Vec<Slot>, as_pairs: bool, parent: Option<PieceIdx>) -> PieceIdx {
        let piece =
            Piece { slots, as_pairs, parent, tried: None, state: State::Orphaned, covers: Vec::new() };
        self.pieces.push(piece)
    }

    /// True once nothing is waited for.
    pub(crate) fn is_home(&self) -> bool {
        self.roots.iter().all(|&root| self.pieces.progress(root) != Progress::Waiting)
    }

    /// Takes a reply of `holder`; gives the frames that it makes necessary. A reply that nobody waits for (late, doubled,
    /// from somebody else) is not used, and the answer is None.
    pub(crate) fn accept(
        &mut self,
        holder: &InstanceId,
        reply: Reply,
        around: &mut Surroundings<'_>,
    ) -> Option<Vec<Order>> {
        around.health.heard(holder, around.heard_at);
        let waiting = self.frames.get(&reply.id).copied().filter(|&idx| {
            let from_holder = matches!(&self.pieces[idx].state, State::Out(sent) if sent.holder == *holder);
            from_holder && !self.pieces.is_settled(idx)
        });
        let Some(idx) = waiting else {
            note_late(holder, &reply, around);
            return None;
        };
        self.frames.remove(&reply.id);
        let State::Out(sent) = &self.pieces[idx].state else { return None };
        let checked = self.check(idx, sent, &reply).and(reply.outcome);
        Some(match checked {
            Ok(computed) => {
                let sent_back = !self.log.attempts[sent.attempt_idx].inside;
                let ending = Ending::Answered {
                    queue: computed.queue_time,
                    compute: computed.compute_time,
                    bytes_in: if sent_back { computed.rows.n_bytes() } else { 0 },
                };
                self.log.end(sent.attempt_idx, around.heard_at, ending);
                around.health.answered(holder, reply.id, around.heard_at);
                self.bring_home(idx, computed, around)
            }
            Err(error) => self.fail(idx, error, around),
        })
    }

    /// `holder` is gone: its frames go to others.
    pub(crate) fn lose_holder(
        &mut self,
        holder: &InstanceId,
        error: &Error,
        around: &mut Surroundings<'_>,
    ) -> Vec<Order> {
        let gone = self.pieces.out(|sent| sent.holder == *holder);
        gone.into_iter().flat_map(|idx| self.fail(idx, error.clone(), around)).collect()
    }

    pub(crate) fn note_ejection(&mut self, holder: &InstanceId, cause: &str, at: Instant) {
        self.log.ejections.push(Ejection { at, holder: holder.clone(), cause: cause.to_owned() });
    }

    fn check(&self, idx: PieceIdx, sent: &Sent, reply: &Reply) -> Result<(), Error> {
        let Ok(computed) = &reply.outcome else { return Ok(()) };
        let Sent { holder, epoch, weights, frame_rows, .. } = sent;
        if reply.epoch != *epoch {
            let message =
                format!("{holder} answered for epoch {}, the frame was of epoch {epoch}", reply.epoch);
            return Err(Error::new(Code::Unavailable, "stale_reply", message));
        }
        if reply.weights != *weights {
            let message = format!("{holder} computed with weights {}, not {weights}", reply.weights);
            return Err(Error::new(Code::Unavailable, "weights_mismatch", message));
        }
        let piece = &self.pieces[idx];
        let expected = if piece.as_pairs { piece.slots.len() } else { frame_rows.len() };
        let rows = &computed.rows;
        if rows.n_rows() != expected || rows.width() != self.activations.hidden_size {
            return Err(Error::internal(format!(
                "{holder} answered {} rows of {}, not {expected} of {}",
                rows.n_rows(),
                rows.width(),
                self.activations.hidden_size
            )));
        }
        if let Some(row) = computed.overflow_rows.iter().find(|row| row.index() >= frame_rows.len()) {
            return Err(Error::internal(format!("{holder} reports row {row} of none")));
        }
        rows.check_finite()
    }

    fn bring_home(&mut self, idx: PieceIdx, computed: Computed, around: &mut Surroundings<'_>) -> Vec<Order> {
        let piece = &mut self.pieces[idx];
        let State::Out(Sent { holder, frame_rows, .. }) = std::mem::replace(&mut piece.state, State::Failed)
        else {
            return Vec::new();
        };
        // One server's overflow makes the whole row a matter of pairs, from all its servers.
        let overflow: Vec<usize> = computed.overflow_rows.iter().map(|row| frame_rows[row.index()]).collect();
        piece.state = State::Home { holder, frame_rows, values: computed.rows.to_f32() };
        let top_k = self.activations.top_k();
        let fresh: Vec<usize> = overflow.into_iter().filter(|&row| self.pair_rows.insert(row)).collect();
        let slots = fresh.into_iter().flat_map(|row| (row * top_k..(row + 1) * top_k).map(Slot)).collect();
        self.send_roots(slots, true, around)
    }

    fn fail(&mut self, idx: PieceIdx, error: Error, around: &mut Surroundings<'_>) -> Vec<Order> {
        let settled = self.pieces.is_settled(idx);
        let piece = &mut self.pieces[idx];
        let State::Out(sent) = std::mem::replace(&mut piece.state, State::Failed) else { return Vec::new() };
        self.frames.remove(&sent.frame_id);
        let failure = kind(&error);
        if let Some(tried) = &mut piece.tried {
            tried.excused = failure == Failure::Excused;
        }
        let ending = Ending::Failed { reason: error.reason.to_string(), message: error.message.clone() };
        self.log.end(sent.attempt_idx, around.now, ending);
        if around.health.failed(&sent.holder, sent.frame_id, failure, around.now) {
            tracing::warn!(instance = %sent.holder, reason = %error.reason, "expert server ejected");
            self.note_ejection(&sent.holder, &error.reason, around.now);
        }
        let purpose =
            Purpose { kind: Kind::Failover, cause: Some(format!("{}: {}", sent.holder, error.reason)) };
        *around.counts.failures.entry(error.reason.clone().into_owned()).or_default() += 1;
        tracing::debug!(layer = %self.activations.layer, instance = %sent.holder, reason = %error.reason, %error, "frame failed");
        self.last_failure = Some(error);
        if settled || self.log.attempts[sent.attempt_idx].kind == Kind::Probe {
            return Vec::new();
        }
        if self.pieces.progress(idx) == Progress::Waiting {
            // Somebody is at it already, unless he has been ejected since. Where nobody else can, he is waited for.
            return self.hedge(idx, &purpose, |health| &mut health.failovers, around).unwrap_or_default();
        }
        self.replace(idx, &purpose, around)
    }

    /// Asks others for a piece that has failed; what nobody else can do is lost.
    fn replace(&mut self, idx: PieceIdx, purpose: &Purpose, around: &mut Surroundings<'_>) -> Vec<Order> {
        let (parts, orphans) = self.plan_elsewhere(idx, Kind::Failover, around);
        let affordable = around.health.failovers.spend(parts.len());
        let (parts, lost) =
            if affordable { (parts, orphans) } else { (Vec::new(), self.pieces[idx].slots.clone()) };
        let mut orders = Vec::with_capacity(parts.len());
        let mut cover = self.send_cover(idx, parts, purpose, around, &mut orders);
        if !lost.is_empty() {
            cover.push(self.orphan(lost, self.pieces[idx].as_pairs, Some(idx)));
        }
        self.pieces[idx].covers.push(cover);
        orders
    }

    /// A frame that is only late is not computed by whoever waits for it: its answer would be heard after that.
    fn plan_elsewhere(&self, idx: PieceIdx, kind: Kind, around: &Surroundings<'_>) -> (Vec<Part>, Vec<Slot>) {
        let slots = &self.pieces[idx].slots;
        let tried = self.pieces.tried(idx).into_iter().filter(|tried| tried.is_avoided(around.table));
        let inside = around.table.holders().filter(|holder| holder.inside && kind == Kind::Hedge);
        let avoid: Vec<InstanceId> = tried
            .map(|tried| tried.holder.clone())
            .chain(inside.map(|holder| holder.instance.clone()))
            .collect();
        plan(&self.activations, slots.iter().copied(), &around.grounds(), &avoid)
    }

    fn send_cover(
        &mut self,
        idx: PieceIdx,
        parts: Vec<Part>,
        purpose: &Purpose,
        around: &mut Surroundings<'_>,
        orders: &mut Vec<Order>,
    ) -> Vec<PieceIdx> {
        let as_pairs = self.pieces[idx].as_pairs;
        parts.into_iter().map(|part| self.send(part, as_pairs, Some(idx), purpose, around, orders)).collect()
    }

    /// True if the reply to this frame would be used, if only to learn that its holder is back.
    pub(crate) fn waits_for(&self, frame: FrameId) -> bool {
        self.frames.get(&frame).is_some_and(|&idx| {
            let is_probe = matches!(&self.pieces[idx].state, State::Out(sent) if self.log.attempts[sent.attempt_idx].kind == Kind::Probe);
            is_probe || !self.pieces.is_settled(idx)
        })
    }

    pub(crate) fn activations(&self) -> &Activations {
        &self.activations
    }
}

/// What a late reply says about its server.
pub(crate) fn note_late(holder: &InstanceId, reply: &Reply, around: &mut Surroundings<'_>) {
    let came = !matches!(&reply.outcome, Err(error) if &*error.reason == inside::NOT_NEEDED);
    around.counts.stale_replies += u64::from(came);
    around.health.heard(holder, around.heard_at);
    match &reply.outcome {
        Ok(_) => around.health.answered(holder, reply.id, around.heard_at),
        Err(error) => {
            around.health.failed(holder, reply.id, kind(error), around.now);
        }
    }
}

fn kind(error: &Error) -> Failure {
    match &*error.reason {
        "not_finite" | "weights_mismatch" => Failure::Wrong,
        // Our table was older than the server's holdings: no fault of its.
        "expert_not_held" | "draining" | "loading" => Failure::Excused,
        // Nobody was to compute it any more.
        inside::NOT_NEEDED => Failure::Excused,
        _ => Failure::Transient,
    }
}

#[cfg(test)]
pub(crate) mod tests;
