//! What a flight does about holders that are late: hedge, fail what is overdue, ask others for what an ejected one owes.

use std::time::Instant;

use cluster::{Health, health::Budget};
use proto::{Code, Error};

use super::{
    Flight, Order, Surroundings,
    log::{Kind, Purpose},
    pieces::{PieceIdx, State},
};

/// Why a piece was not asked of others as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotHedged {
    NobodyElse,
    Budget,
}

impl Flight {
    /// Asks others for what is left with ejected holders alone, as soon as there are others: somebody may have been ejected,
    /// the table or who is in may have changed, or a cover failed. Due after everything that the flight is told. The answers
    /// of those that were asked before still count if they come first.
    pub(crate) fn look_again(&mut self, around: &mut Surroundings<'_>) -> Vec<Order> {
        let mut orders = Vec::new();
        for idx in self.pieces.stranded(around.health) {
            let State::Out(sent) = &self.pieces[idx].state else { continue };
            let purpose =
                Purpose { kind: Kind::Failover, cause: Some(format!("{} is ejected", sent.holder)) };
            // Where nobody that is in can, or the budget is spent, its own answer is waited for.
            let (parts, _) = self.plan_elsewhere(idx, purpose.kind, around);
            if parts.iter().any(|part| !around.health.is_in(&part.holder)) {
                continue;
            }
            if let Ok(more) = self.hedge(idx, &purpose, |health| &mut health.failovers, around) {
                orders.extend(more);
            }
        }
        orders
    }

    /// Hedges what is late and fails what is overdue.
    pub(crate) fn tick(&mut self, around: &mut Surroundings<'_>) -> Vec<Order> {
        let now = around.now;
        let mut orders = Vec::new();
        for idx in self.pieces.out(|sent| sent.expires_at <= now || sent.hedge_at.is_some_and(|at| at <= now))
        {
            let State::Out(sent) = &mut self.pieces[idx].state else { continue };
            if sent.expires_at <= now {
                let message = format!("no reply from {} within {:?}", sent.holder, around.dispatch_timeout);
                let error = Error::new(Code::DeadlineExceeded, "dispatch_timeout", message);
                orders.extend(self.fail(idx, error, around));
                continue;
            }
            sent.hedge_at = None;
            let silent = sent.is_overdue.then(|| format!("{} is silent", sent.holder));
            let n_pairs = self.pieces[idx].slots.len();
            if self.pieces.is_settled(idx) {
                continue;
            }
            let kind = if silent.is_some() { Kind::Failover } else { Kind::Hedge };
            let late = || format!("late by the p95 of frames of {n_pairs} pairs");
            let purpose = Purpose { kind, cause: silent.or_else(|| Some(late())) };
            match self.hedge(idx, &purpose, |health| &mut health.hedges, around) {
                Ok(more) => orders.extend(more),
                // Later, when there are tokens again, if it is still late then.
                Err(NotHedged::Budget) => {
                    if let State::Out(sent) = &mut self.pieces[idx].state {
                        sent.hedge_at = around.health.hedge_after(n_pairs).map(|after| now + after);
                    }
                }
                // Nobody but this router, perhaps: that takes being silent, not only late.
                Err(NotHedged::NobodyElse) => {
                    let inside = around.table.holders().any(|holder| holder.inside);
                    if let State::Out(sent) = &mut self.pieces[idx].state
                        && inside
                        && !sent.is_overdue
                    {
                        sent.is_overdue = true;
                        sent.hedge_at = around.health.silent_after(n_pairs).map(|after| now + after);
                    }
                }
            }
        }
        orders
    }

    /// The next moment at which [`Flight::tick`] has something to do.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        let waiting = self.frames.values().filter(|&&idx| !self.pieces.is_settled(idx));
        waiting
            .filter_map(|&idx| match &self.pieces[idx].state {
                State::Out(sent) => Some(sent.hedge_at.map_or(sent.expires_at, |at| at.min(sent.expires_at))),
                State::Home { .. } | State::Failed | State::Orphaned => None,
            })
            .min()
    }

    /// Asks others for the whole of a piece that is still out.
    pub(super) fn hedge(
        &mut self,
        idx: PieceIdx,
        purpose: &Purpose,
        budget: impl FnOnce(&mut Health) -> &mut Budget,
        around: &mut Surroundings<'_>,
    ) -> Result<Vec<Order>, NotHedged> {
        // A probe, or a cover whose holder has been ejected since, is not enough.
        if self.pieces.is_covered(idx, around.health) {
            return Ok(Vec::new());
        }
        let (parts, orphans) = self.plan_elsewhere(idx, purpose.kind, around);
        let inside = around.table.holders().any(|holder| holder.inside);
        let any_out = parts.iter().any(|part| !around.health.is_in(&part.holder));
        // Before an ejected server is asked, this router would be, which is in.
        if !orphans.is_empty() || (inside && purpose.kind == Kind::Hedge && any_out) {
            return Err(NotHedged::NobodyElse);
        }
        if !budget(around.health).spend(parts.len()) {
            return Err(NotHedged::Budget);
        }
        let mut orders = Vec::with_capacity(parts.len());
        let cover = self.send_cover(idx, parts, purpose, around, &mut orders);
        self.pieces[idx].covers.push(cover);
        Ok(orders)
    }
}
