//! What the simulation asks of a flight: that it does not wait in vain. Looks at the tree pair by pair, and knows nothing of
//! how the flight decides.

use super::{
    Flight, Surroundings,
    pieces::{PieceIdx, Progress, State},
};
use crate::dispatch::Slot;

impl Flight {
    /// Whether a root waits for servers that are not in and for nobody else, without a hedge to come, although all pairs of
    /// one of its pieces could be had from servers that are in and were not asked for them at their present epoch, and what
    /// else it lacks as well.
    pub(crate) fn waits_in_vain(&self, around: &Surroundings<'_>) -> bool {
        let root_of = |idx| self.pieces.ancestors(idx).last().unwrap_or(idx);
        let is_out = |idx: &PieceIdx| matches!(self.pieces[*idx].state, State::Out(_));
        self.roots.iter().any(|&root| {
            let pieces: Vec<_> = (0..self.pieces.len()).filter(|&idx| root_of(idx) == root).collect();
            let alone = |idx: &PieceIdx| match &self.pieces[*idx].state {
                State::Out(sent) => sent.hedge_at.is_none() && !around.health.is_in(&sent.holder),
                State::Home { .. } | State::Failed | State::Orphaned => true,
            };
            let could = |slot: &Slot| {
                let pair = (self.activations.layer, self.activations.expert(*slot));
                let was_asked = |holder: &cluster::Holder| {
                    let of_pair = pieces.iter().filter(|&&idx| self.pieces[idx].slots.contains(slot));
                    of_pair.filter_map(|&idx| self.pieces[idx].tried.as_ref()).any(|tried| {
                        tried.holder == holder.instance && (!tried.excused || tried.epoch == holder.epoch)
                    })
                };
                let holders = around.table.holders().filter(|holder| holder.holds.contains_key(&pair));
                holders.into_iter().any(|holder| around.health.is_in(&holder.instance) && !was_asked(holder))
            };
            let is_home = |slot: &Slot| {
                pieces
                    .iter()
                    .map(|&idx| &self.pieces[idx])
                    .any(|piece| matches!(piece.state, State::Home { .. }) && piece.slots.contains(slot))
            };
            let could_be_had = |idx: &PieceIdx| {
                let slots = &self.pieces[*idx].slots;
                slots.iter().all(could) && around.health.failovers.affords(slots.len())
            };
            // With a lost one beside it a piece's reply is of no use.
            let counts = |idx: &PieceIdx| {
                self.pieces.ancestors(*idx).all(|whole| {
                    let of_idx = |cover: &&Vec<PieceIdx>| {
                        cover
                            .iter()
                            .any(|part| part == idx || self.pieces.ancestors(*idx).any(|at| at == *part))
                    };
                    let cover = self.pieces[whole].covers.iter().find(of_idx);
                    cover.is_some_and(|cover| {
                        cover.iter().all(|&part| self.pieces.progress(part) != Progress::Lost)
                    })
                })
            };
            let open = |idx: &&PieceIdx| is_out(idx) && !self.pieces.is_settled(**idx) && counts(idx);
            self.pieces.progress(root) == Progress::Waiting
                && pieces.iter().all(alone)
                && pieces.iter().filter(open).any(could_be_had)
                && self.pieces[root].slots.iter().all(|slot| is_home(slot) || could(slot))
        })
    }
}
