//! The tree of a flight's pieces, and how far each has come.

use std::{
    ops::{Index, IndexMut},
    time::Instant,
};

use cluster::{Health, RoutingTable};
use ids::{Epoch, FrameId, InstanceId, WeightsHash};

use crate::dispatch::Slot;

/// Position of a piece in its flight.
pub(super) type PieceIdx = usize;

#[derive(Debug)]
pub(super) struct Piece {
    pub(super) slots: Vec<Slot>,
    pub(super) as_pairs: bool,
    pub(super) parent: Option<PieceIdx>,
    /// Who was sent it.
    pub(super) tried: Option<Tried>,
    pub(super) state: State,
    /// Each does the whole piece again.
    pub(super) covers: Vec<Vec<PieceIdx>>,
}

/// A holder that was sent a piece.
#[derive(Clone, Debug)]
pub(super) struct Tried {
    pub(super) holder: InstanceId,
    pub(super) epoch: Epoch,
    /// It refused because the table was older than its holdings: what it still holds, it will compute.
    pub(super) excused: bool,
}

impl Tried {
    /// False once the table knows what the holder that refused holds now.
    pub(super) fn is_avoided(&self, table: &RoutingTable) -> bool {
        !self.excused || table.holder(&self.holder).is_none_or(|holder| holder.epoch == self.epoch)
    }
}

#[derive(Debug)]
pub(super) enum State {
    Out(Sent),
    Home {
        holder: InstanceId,
        frame_rows: Vec<usize>,
        values: Vec<f32>,
    },
    Failed,
    /// Nobody holds these experts, or nobody that has not failed.
    Orphaned,
}

#[derive(Debug)]
pub(super) struct Sent {
    pub(super) holder: InstanceId,
    pub(super) epoch: Epoch,
    pub(super) weights: WeightsHash,
    pub(super) frame_id: FrameId,
    /// Its place in the flight's log.
    pub(super) attempt_idx: usize,
    pub(super) frame_rows: Vec<usize>,
    /// When a second frame is due; None: nobody else could take it, or one is under way.
    pub(super) hedge_at: Option<Instant>,
    pub(super) expires_at: Instant,
    /// Past what makes a holder silent, whether it could be ejected or not: worth the engine's own time.
    pub(super) is_overdue: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Waiting,
    Done,
    Lost,
}

/// All pieces of a flight, in the order they were made.
#[derive(Debug, Default)]
pub(super) struct Pieces(Vec<Piece>);

impl Index<PieceIdx> for Pieces {
    type Output = Piece;

    fn index(&self, idx: PieceIdx) -> &Piece {
        &self.0[idx]
    }
}

impl IndexMut<PieceIdx> for Pieces {
    fn index_mut(&mut self, idx: PieceIdx) -> &mut Piece {
        &mut self.0[idx]
    }
}

impl Pieces {
    pub(super) fn push(&mut self, piece: Piece) -> PieceIdx {
        self.0.push(piece);
        self.0.len() - 1
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn progress(&self, idx: PieceIdx) -> Progress {
        let piece = &self.0[idx];
        let mut best = match piece.state {
            State::Home { .. } => return Progress::Done,
            State::Out(_) => Progress::Waiting,
            State::Failed | State::Orphaned => Progress::Lost,
        };
        for cover in &piece.covers {
            match self.cover_progress(cover) {
                Progress::Done => return Progress::Done,
                Progress::Waiting => best = Progress::Waiting,
                Progress::Lost => {}
            }
        }
        best
    }

    fn cover_progress(&self, cover: &[PieceIdx]) -> Progress {
        let mut all = Progress::Done;
        for &piece in cover {
            match self.progress(piece) {
                Progress::Waiting => return Progress::Waiting,
                Progress::Lost => all = Progress::Lost,
                Progress::Done => {}
            }
        }
        all
    }

    /// True if nobody waits for this piece: it or something that it is part of is done.
    pub(super) fn is_settled(&self, idx: PieceIdx) -> bool {
        let mut at = Some(idx);
        while let Some(idx) = at {
            if self.progress(idx) == Progress::Done {
                return true;
            }
            at = self.0[idx].parent;
        }
        false
    }

    /// Pieces that are out and `chosen`, in the order they were sent.
    pub(super) fn out(&self, chosen: impl Fn(&Sent) -> bool) -> Vec<PieceIdx> {
        let is_out = |piece: &Piece| matches!(&piece.state, State::Out(sent) if chosen(sent));
        self.0.iter().enumerate().filter(|(_, piece)| is_out(piece)).map(|(idx, _)| idx).collect()
    }

    /// True if servers that are in are at all of it that is not home.
    fn is_in_hand(&self, idx: PieceIdx, health: &Health) -> bool {
        let piece = &self.0[idx];
        match &piece.state {
            State::Home { .. } => true,
            State::Out(sent) if health.is_in(&sent.holder) => true,
            State::Out(_) | State::Failed | State::Orphaned => self.is_covered(idx, health),
        }
    }

    /// The same of one of its covers.
    pub(super) fn is_covered(&self, idx: PieceIdx, health: &Health) -> bool {
        self.0[idx].covers.iter().any(|cover| cover.iter().all(|&piece| self.is_in_hand(piece, health)))
    }

    /// Pieces that are out at servers that are not in, and not part of others that are in hand or stranded themselves.
    pub(super) fn stranded(&self, health: &Health) -> Vec<PieceIdx> {
        let mut stranded: Vec<PieceIdx> = Vec::new();
        if health.all_in() {
            return stranded;
        }
        for idx in self.out(|sent| !health.is_in(&sent.holder)) {
            let is_tended = |whole| self.is_in_hand(whole, health) || stranded.contains(&whole);
            if !self.is_settled(idx) && !self.is_covered(idx, health) && !self.ancestors(idx).any(is_tended) {
                stranded.push(idx);
            }
        }
        stranded
    }

    /// What the piece is part of, from the smallest to the largest.
    pub(super) fn ancestors(&self, idx: PieceIdx) -> impl Iterator<Item = PieceIdx> {
        std::iter::successors(self.0[idx].parent, |&whole| self.0[whole].parent)
    }

    /// Who has failed with the piece or with what it is part of, who is at what covers it, and who refused that. Who failed
    /// with a cover may be asked again, as long as he is in: his failure may be over before the one that is waited for answers.
    pub(super) fn tried(&self, idx: PieceIdx) -> Vec<&Tried> {
        let mut covers: Vec<PieceIdx> = self.0[idx].covers.iter().flatten().copied().collect();
        let mut at = 0;
        while at < covers.len() {
            covers.extend(self.0[covers[at]].covers.iter().flatten());
            at += 1;
        }
        let tried = |idx: PieceIdx| self.0[idx].tried.as_ref();
        let covers = covers.into_iter().filter(|&idx| match &self.0[idx].state {
            State::Out(_) => true,
            State::Failed => tried(idx).is_some_and(|tried| tried.excused),
            State::Home { .. } | State::Orphaned => false,
        });
        self.ancestors(idx).chain([idx]).chain(covers).filter_map(tried).collect()
    }

    /// The cover that is home; without one, the last, for its lost pairs.
    pub(super) fn best_cover(&self, idx: PieceIdx) -> Option<&Vec<PieceIdx>> {
        let covers = &self.0[idx].covers;
        covers.iter().find(|cover| self.cover_progress(cover) == Progress::Done).or(covers.last())
    }
}
