//! All frames of one layer, from dispatch until every row is home or known to be lost. A pure state machine: the
//! engine feeds it replies and failures with the table of the moment, and sends what it orders. It knows no clock and
//! no sockets.
//!
//! Every (row, expert) pair is at each moment in exactly one of: an outstanding frame, a reply that is home, the list
//! of lost pairs. A pair whose holder fails goes to another holder; one without another holder is lost, and with it
//! its row.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use cluster::RoutingTable;
use ids::{ExpertId, FrameId, InstanceId};
use proto::{
    Code, Error, Frame, Reply,
    frame::{Combine, Computed},
};

use crate::dispatch::{Activations, Part, Slot, pack, plan};

/// A frame to be sent.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) holder: InstanceId,
    pub(crate) frame: Frame,
}

/// Numbers frames: unique for the life of the router.
#[derive(Debug, Default)]
pub(crate) struct FrameIds(u64);

impl FrameIds {
    fn next(&mut self) -> FrameId {
        self.0 += 1;
        FrameId(self.0)
    }
}

/// What the flight needs to know of its surroundings at the moment of a decision.
pub(crate) struct Surroundings<'a> {
    pub(crate) table: &'a RoutingTable,
    pub(crate) ids: &'a mut FrameIds,
}

#[derive(Debug)]
struct Outstanding {
    part: Part,
    frame_rows: Vec<usize>,
    as_pairs: bool,
}

/// A reply with one summed row for each row of its frame.
#[derive(Debug)]
pub(crate) struct Sum {
    pub(crate) frame_rows: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// Every row is home or lost. Only [`crate::combine::combine`] takes it.
#[derive(Debug)]
#[must_use]
pub(crate) struct Landed {
    pub(crate) hidden_size: usize,
    pub(crate) n_rows: usize,
    /// In the order the frames were made.
    pub(crate) sums: Vec<Sum>,
    /// By row: one weighted contribution for each of the gate's choices. These rows are not read from `sums`.
    pub(crate) pairs: BTreeMap<usize, Vec<Vec<f32>>>,
    /// Rows that could not be computed, with the experts nobody could serve.
    pub(crate) lost: BTreeMap<usize, Vec<ExpertId>>,
    /// Which server worked on which rows.
    pub(crate) served: Vec<(InstanceId, Vec<usize>)>,
    /// Why the last failed frame failed.
    pub(crate) last_failure: Option<Error>,
}

#[derive(Debug)]
#[must_use = "rows of a flight that never lands are lost"]
pub(crate) struct Flight {
    activations: Activations,
    combine: Combine,
    outstanding: HashMap<FrameId, Outstanding>,
    sums: BTreeMap<FrameId, Sum>,
    pairs: BTreeMap<usize, Vec<Option<Vec<f32>>>>,
    lost: BTreeSet<Slot>,
    avoid: Vec<InstanceId>,
    served: Vec<(InstanceId, Vec<usize>)>,
    last_failure: Option<Error>,
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
        let mut flight = Self {
            activations,
            combine,
            outstanding: HashMap::new(),
            sums: BTreeMap::new(),
            pairs: BTreeMap::new(),
            lost: BTreeSet::new(),
            avoid: Vec::new(),
            served: Vec::new(),
            last_failure: None,
        };
        let as_pairs = combine == Combine::Pairs;
        if as_pairs {
            flight.pairs.extend(rows.into_iter().map(|row| (row, vec![None; top_k])));
        }
        let orders = flight.order(slots, as_pairs, around);
        (flight, orders)
    }

    fn order(
        &mut self,
        slots: impl IntoIterator<Item = Slot>,
        as_pairs: bool,
        around: &mut Surroundings<'_>,
    ) -> Vec<Order> {
        let (parts, orphans) = plan(&self.activations, slots, around.table, &self.avoid);
        self.lost.extend(orphans);
        let mut orders = Vec::with_capacity(parts.len());
        for part in parts {
            let id = around.ids.next();
            let (rows, assignments, frame_rows) = pack(&self.activations, &part.slots);
            let frame = Frame {
                id,
                layer: self.activations.layer,
                rows,
                assignments,
                combine: if as_pairs { Combine::Pairs } else { self.combine },
                timeout: None,
                traceparent: String::new(),
            };
            orders.push(Order { holder: part.holder.clone(), frame });
            self.outstanding.insert(id, Outstanding { part, frame_rows, as_pairs });
        }
        orders
    }

    /// True once nothing is outstanding.
    pub(crate) fn is_home(&self) -> bool {
        self.outstanding.is_empty()
    }

    /// Takes a reply; gives the frames that it makes necessary. A reply to no frame of this flight (late, doubled) is
    /// not used, and the answer is None.
    pub(crate) fn accept(&mut self, reply: Reply, around: &mut Surroundings<'_>) -> Option<Vec<Order>> {
        let outstanding = self.outstanding.remove(&reply.id)?;
        let checked = reply.outcome.and_then(|computed| self.check(&outstanding, computed));
        Some(match checked {
            Ok(computed) => self.bring_home(reply.id, outstanding, computed, around),
            Err(error) => self.fail(vec![outstanding], error, around),
        })
    }

    /// `holder` is gone: its frames go to others.
    pub(crate) fn lose_holder(
        &mut self,
        holder: &InstanceId,
        error: Error,
        around: &mut Surroundings<'_>,
    ) -> Vec<Order> {
        let gone = self.outstanding.extract_if(|_, outstanding| outstanding.part.holder == *holder);
        let gone: Vec<Outstanding> = gone.map(|(_, outstanding)| outstanding).collect();
        if gone.is_empty() {
            return Vec::new();
        }
        self.fail(gone, error, around)
    }

    /// The flight took too long: whoever has not answered has failed.
    pub(crate) fn expire(&mut self, around: &mut Surroundings<'_>) -> Vec<Order> {
        let late: Vec<Outstanding> = self.outstanding.drain().map(|(_, outstanding)| outstanding).collect();
        let names: BTreeSet<&str> = late.iter().map(|outstanding| outstanding.part.holder.as_str()).collect();
        let names: Vec<&str> = names.into_iter().collect();
        let error = Error::new(
            Code::DeadlineExceeded,
            "dispatch_timeout",
            format!("no reply in time from {}", names.join(", ")),
        );
        self.fail(late, error, around)
    }

    fn check(&self, outstanding: &Outstanding, computed: Computed) -> Result<Computed, Error> {
        let expected =
            if outstanding.as_pairs { outstanding.part.slots.len() } else { outstanding.frame_rows.len() };
        let rows = &computed.rows;
        if rows.n_rows() != expected || rows.width() != self.activations.hidden_size {
            return Err(Error::internal(format!(
                "{} answered {} rows of {}, not {expected} of {}",
                outstanding.part.holder,
                rows.n_rows(),
                rows.width(),
                self.activations.hidden_size
            )));
        }
        if let Some(row) =
            computed.overflow_rows.iter().find(|row| row.index() >= outstanding.frame_rows.len())
        {
            return Err(Error::internal(format!("{} reports row {row} of none", outstanding.part.holder)));
        }
        rows.check_finite()?;
        Ok(computed)
    }

    fn bring_home(
        &mut self,
        id: FrameId,
        outstanding: Outstanding,
        computed: Computed,
        around: &mut Surroundings<'_>,
    ) -> Vec<Order> {
        let (top_k, hidden_size) = (self.activations.top_k(), self.activations.hidden_size);
        let Outstanding { part, frame_rows, as_pairs } = outstanding;
        self.served.push((part.holder, frame_rows.clone()));
        let values = computed.rows.to_f32();
        if as_pairs {
            for (slot, contribution) in part.slots.iter().zip(values.chunks_exact(hidden_size)) {
                if let Some(row) = self.pairs.get_mut(&slot.row(top_k)) {
                    row[slot.0 % top_k] = Some(contribution.to_vec());
                }
            }
            return Vec::new();
        }
        // One server's overflow makes the whole row a matter of pairs, from all its servers.
        let overflow: Vec<usize> = computed.overflow_rows.iter().map(|row| frame_rows[row.index()]).collect();
        self.sums.insert(id, Sum { frame_rows, values });
        let fresh: Vec<usize> = overflow.into_iter().filter(|row| !self.pairs.contains_key(row)).collect();
        self.pairs.extend(fresh.iter().map(|&row| (row, vec![None; top_k])));
        self.order(fresh.into_iter().flat_map(|row| (row * top_k..(row + 1) * top_k).map(Slot)), true, around)
    }

    fn fail(&mut self, failed: Vec<Outstanding>, error: Error, around: &mut Surroundings<'_>) -> Vec<Order> {
        tracing::warn!(layer = %self.activations.layer, reason = %error.reason, %error, frames = failed.len(), "dispatch failed");
        self.last_failure = Some(error);
        for outstanding in &failed {
            if !self.avoid.contains(&outstanding.part.holder) {
                self.avoid.push(outstanding.part.holder.clone());
            }
        }
        let (pairs, sums): (Vec<_>, Vec<_>) =
            failed.into_iter().partition(|outstanding| outstanding.as_pairs);
        let slots =
            |failed: Vec<Outstanding>| failed.into_iter().flat_map(|outstanding| outstanding.part.slots);
        let mut orders = self.order(slots(sums), false, around);
        orders.extend(self.order(slots(pairs), true, around));
        orders
    }

    /// Ends the flight. Whatever is still outstanding counts as lost.
    pub(crate) fn land(mut self) -> Landed {
        let top_k = self.activations.top_k();
        self.lost.extend(self.outstanding.into_values().flat_map(|outstanding| outstanding.part.slots));
        let mut lost: BTreeMap<usize, Vec<ExpertId>> = BTreeMap::new();
        for slot in self.lost {
            lost.entry(slot.row(top_k)).or_default().push(self.activations.expert(slot));
        }
        let pairs = self
            .pairs
            .into_iter()
            .filter(|(row, _)| !lost.contains_key(row))
            .map(|(row, contributions)| (row, contributions.into_iter().flatten().collect::<Vec<_>>()))
            .inspect(|(row, contributions)| {
                debug_assert_eq!(contributions.len(), top_k, "pairs of row {row}")
            })
            .collect();
        Landed {
            hidden_size: self.activations.hidden_size,
            n_rows: self.activations.n_rows(),
            sums: self.sums.into_values().collect(),
            pairs,
            lost,
            served: self.served,
            last_failure: self.last_failure,
        }
    }

    pub(crate) fn activations(&self) -> &Activations {
        &self.activations
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto::{
        frame::Grid,
        rows::{Dtype, Rows},
    };

    use super::*;
    use crate::{
        combine::combine,
        dispatch::tests::{activations, table},
    };
    use ids::RowIndex;

    const EXACT: Combine = Combine::Exact(Grid { exponent: -10, contribution_max: 1000.0 });

    /// What an expert server would answer: expert e turns a row into row + e, times the weight.
    fn serve(order: &Order, overflow_over: f32) -> Reply {
        let frame = &order.frame;
        let rows = frame.rows.to_f32();
        let contributions: Vec<[f32; 2]> = frame
            .assignments
            .iter()
            .map(|a| std::array::from_fn(|i| a.weight * (rows[a.row.index() * 2 + i] + a.expert.0 as f32)))
            .collect();
        let mut overflow_rows = Vec::new();
        let values: Vec<f32> = match frame.combine {
            Combine::Pairs => contributions.into_iter().flatten().collect(),
            Combine::Fast | Combine::Exact(_) => {
                let mut sums = vec![0.0; rows.len()];
                for (a, contribution) in frame.assignments.iter().zip(contributions) {
                    if contribution.iter().any(|value| value.abs() > overflow_over) {
                        overflow_rows.push(a.row);
                    }
                    for i in 0..2 {
                        sums[a.row.index() * 2 + i] += contribution[i];
                    }
                }
                sums
            }
        };
        let computed = Computed {
            rows: Rows::encode(Dtype::F32, 2, &values),
            overflow_rows,
            compute_time: Duration::ZERO,
        };
        Reply { id: frame.id, outcome: Ok(computed) }
    }

    fn expected() -> Vec<f32> {
        let activations = activations(&[0, 3, 1, 0, 2, 3]);
        (0..6)
            .map(|at| {
                let (row, value) = (at / 2, activations.normed[at]);
                (0..2)
                    .map(|j| {
                        activations.assignments.weights[row * 2 + j]
                            * (value + activations.expert(Slot(row * 2 + j)).0 as f32)
                    })
                    .sum()
            })
            .collect()
    }

    struct Case {
        table: RoutingTable,
        ids: FrameIds,
    }

    impl Case {
        fn new(holders: &[(&str, &[u32])]) -> Self {
            Self { table: table(holders), ids: FrameIds::default() }
        }

        fn around(&mut self) -> Surroundings<'_> {
            Surroundings { table: &self.table, ids: &mut self.ids }
        }

        fn launch(&mut self, combine: Combine) -> (Flight, Vec<Order>) {
            Flight::launch(activations(&[0, 3, 1, 0, 2, 3]), 0..3, combine, &mut self.around())
        }
    }

    const SPLIT: &[(&str, &[u32])] = &[("a", &[0, 1]), ("b", &[2, 3])];
    const TWICE: &[(&str, &[u32])] = &[("a", &[0, 1, 2, 3]), ("b", &[0, 1, 2, 3])];

    #[test]
    fn all_modes_bring_every_pair_home_once() {
        for combine_mode in [Combine::Fast, EXACT, Combine::Pairs] {
            let mut case = Case::new(SPLIT);
            let (mut flight, orders) = case.launch(combine_mode);
            assert_eq!(orders.len(), 2);
            for order in orders.iter().rev() {
                assert!(flight.accept(serve(order, f32::MAX), &mut case.around()).unwrap().is_empty());
                assert!(
                    flight.accept(serve(order, f32::MAX), &mut case.around()).is_none(),
                    "a doubled reply"
                );
            }
            assert!(flight.is_home());
            assert_eq!(combine(flight.land(), vec![0.0; 6]).update, expected(), "{combine_mode:?}");
        }
    }

    #[test]
    fn an_overflow_is_asked_for_again_as_pairs_from_all_its_servers() {
        let mut case = Case::new(SPLIT);
        let (mut flight, orders) = case.launch(EXACT);
        // Row 2 (experts 2 and 3, both at b) has the largest contribution.
        let mut again = Vec::new();
        for order in &orders {
            again.extend(flight.accept(serve(order, 40.0), &mut case.around()).unwrap());
        }
        assert_eq!(again.len(), 1);
        assert_eq!(again[0].frame.combine, Combine::Pairs);
        assert!(flight.accept(serve(&again[0], 40.0), &mut case.around()).unwrap().is_empty());
        let landed = flight.land();
        assert_eq!(landed.pairs.keys().copied().collect::<Vec<_>>(), [2]);
        assert_eq!(combine(landed, vec![0.0; 6]).update, expected());
    }

    #[test]
    fn a_failed_part_goes_to_the_replica() {
        for fail in 0..4 {
            let mut case = Case::new(TWICE);
            let (mut flight, orders) = case.launch(EXACT);
            let (first, second) = (&orders[0], &orders[1]);
            assert!(flight.accept(serve(second, f32::MAX), &mut case.around()).unwrap().is_empty());
            let again = match fail {
                0 => flight.lose_holder(&first.holder, Error::internal("gone"), &mut case.around()),
                1 => flight.expire(&mut case.around()),
                2 => {
                    let reply = Reply { id: first.frame.id, outcome: Err(Error::internal("no")) };
                    flight.accept(reply, &mut case.around()).unwrap()
                }
                _ => {
                    let mut reply = serve(first, f32::MAX);
                    if let Ok(computed) = &mut reply.outcome {
                        computed.rows = Rows::encode(Dtype::F32, 2, &[f32::NAN; 6]);
                    }
                    flight.accept(reply, &mut case.around()).unwrap()
                }
            };
            assert_eq!(again.len(), 1, "case {fail}");
            assert_eq!(again[0].holder, second.holder);
            assert!(
                flight.accept(serve(first, f32::MAX), &mut case.around()).is_none(),
                "a late reply is not used"
            );
            assert!(flight.accept(serve(&again[0], f32::MAX), &mut case.around()).unwrap().is_empty());
            let combined = combine(flight.land(), vec![0.0; 6]);
            assert_eq!(combined.update, expected());
            assert!(combined.lost.is_empty());
        }
    }

    #[test]
    fn rows_without_a_holder_are_named_and_the_others_come_home() {
        let mut case = Case::new(&[("a", &[0, 1]), ("b", &[2])]);
        let (mut flight, orders) = case.launch(EXACT);
        for order in &orders {
            assert!(flight.accept(serve(order, f32::MAX), &mut case.around()).unwrap().is_empty());
        }
        let combined = combine(flight.land(), vec![0.0; 6]);
        assert_eq!(combined.lost.keys().copied().collect::<Vec<_>>(), [0, 2]);
        assert_eq!(combined.lost[&0], [ExpertId(3)]);
        assert_eq!(combined.update[2..4], expected()[2..4]);
    }

    #[test]
    fn a_row_that_is_not_in_the_frame_cannot_overflow() {
        let mut case = Case::new(SPLIT);
        let (mut flight, orders) = case.launch(EXACT);
        let mut reply = serve(&orders[0], f32::MAX);
        if let Ok(computed) = &mut reply.outcome {
            computed.overflow_rows.push(RowIndex(9));
        }
        assert!(flight.accept(reply, &mut case.around()).unwrap().is_empty());
        assert!(flight.last_failure.as_ref().unwrap().message.contains("row 9"));
    }
}
