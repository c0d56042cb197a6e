//! Rows and table → the frames of one layer: which row goes to which holder. Pure.

use std::collections::BTreeMap;

use cluster::RoutingTable;
use ids::{ExpertId, InstanceId, LayerId, RowIndex};
use proto::{
    frame::{Assignment, FRAME_BYTES_MAX},
    rows::{Dtype, Rows},
};

/// The activations that one layer sends out, and the gate's choice for them.
#[derive(Debug)]
pub(crate) struct Activations {
    pub(crate) layer: LayerId,
    pub(crate) hidden_size: usize,
    pub(crate) dtype: Dtype,
    /// `[rows, hidden]`
    pub(crate) normed: Vec<f32>,
    pub(crate) assignments: model::Assignments,
}

impl Activations {
    pub(crate) fn n_rows(&self) -> usize {
        self.normed.len() / self.hidden_size
    }

    pub(crate) fn top_k(&self) -> usize {
        self.assignments.top_k
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.normed[row * self.hidden_size..][..self.hidden_size]
    }

    pub(crate) fn expert(&self, slot: Slot) -> ExpertId {
        self.assignments.experts[slot.0]
    }
}

/// One (row, expert) pair of a layer: its place in the gate's `[rows, topk]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(pub(crate) usize);

impl Slot {
    pub(crate) const fn row(self, top_k: usize) -> usize {
        self.0 / top_k
    }
}

/// What one frame asks of one holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) holder: InstanceId,
    /// Ascending, so that a row's pairs lie together.
    pub(crate) slots: Vec<Slot>,
}

/// Spreads `slots` over their holders. `avoid` names holders that have failed in this layer. Gives the parts, and the
/// slots that nobody can serve.
pub(crate) fn plan(
    activations: &Activations,
    slots: impl IntoIterator<Item = Slot>,
    table: &RoutingTable,
    avoid: &[InstanceId],
) -> (Vec<Part>, Vec<Slot>) {
    let mut by_holder: BTreeMap<&InstanceId, Vec<Slot>> = BTreeMap::new();
    let mut orphans = Vec::new();
    for slot in slots {
        let expert = activations.expert(slot);
        let holders = table.holders_of(activations.layer, expert);
        // Replicas share the experts between them by number, so that a layer touches few servers and each its part.
        let preferred =
            holders.iter().cycle().skip(expert.index() % holders.len().max(1)).take(holders.len());
        match preferred.into_iter().find(|holder| !avoid.contains(holder)) {
            Some(holder) => by_holder.entry(holder).or_default().push(slot),
            None => orphans.push(slot),
        }
    }
    let mut parts = Vec::with_capacity(by_holder.len());
    for (holder, mut slots) in by_holder {
        slots.sort_unstable();
        parts.extend(cut(activations, slots).map(|slots| Part { holder: holder.clone(), slots }));
    }
    (parts, orphans)
}

/// Cuts between rows, so that neither the rows of a frame nor a reply with one row per pair is too large a message.
fn cut(activations: &Activations, slots: Vec<Slot>) -> impl Iterator<Item = Vec<Slot>> {
    let top_k = activations.top_k();
    let row_bytes = activations.hidden_size * activations.dtype.bytes();
    let rows_max = (FRAME_BYTES_MAX / row_bytes).max(1);
    let pairs_max = (proto::MESSAGE_BYTES_MAX / 2 / row_bytes).max(top_k);
    let mut rest = slots.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut part: Vec<Slot> = Vec::new();
        let mut n_rows = 0;
        while let Some(slot) = rest.peek() {
            let new_row = part.last().is_none_or(|last| last.row(top_k) != slot.row(top_k));
            if new_row && (n_rows == rows_max || part.len() + top_k > pairs_max && !part.is_empty()) {
                break;
            }
            n_rows += usize::from(new_row);
            part.extend(rest.next());
        }
        (!part.is_empty()).then_some(part)
    })
}

/// The rows and assignments of a part in wire form, and the batch row of each frame row.
pub(crate) fn pack(activations: &Activations, slots: &[Slot]) -> (Rows, Vec<Assignment>, Vec<usize>) {
    let top_k = activations.top_k();
    let mut frame_rows: Vec<usize> = Vec::new();
    let mut values = Vec::with_capacity(slots.len() * activations.hidden_size);
    let mut assignments = Vec::with_capacity(slots.len());
    for &slot in slots {
        let row = slot.row(top_k);
        if frame_rows.last() != Some(&row) {
            frame_rows.push(row);
            values.extend_from_slice(activations.row(row));
        }
        assignments.push(Assignment {
            row: RowIndex(frame_rows.len() as u32 - 1),
            expert: activations.expert(slot),
            weight: activations.assignments.weights[slot.0],
        });
    }
    (Rows::encode(activations.dtype, activations.hidden_size, &values), assignments, frame_rows)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use cluster::{Holder, Members};

    /// Holders by name, each with the experts of layer 0 that it holds.
    pub(crate) fn table(holders: &[(&str, &[u32])]) -> RoutingTable {
        let mut members = Members::default();
        let mut table = RoutingTable::default();
        for (name, experts) in holders {
            table = members.join(Holder {
                instance: (*name).into(),
                address: String::new(),
                holds: BTreeMap::from([(LayerId(0), experts.iter().copied().map(ExpertId).collect())]),
            });
        }
        table
    }

    /// Rows of two numbers whose experts are `experts`, two a row.
    pub(crate) fn activations(experts: &[u32]) -> Activations {
        Activations {
            layer: LayerId(0),
            hidden_size: 2,
            dtype: Dtype::F32,
            normed: (0..experts.len()).map(|value| value as f32).collect(),
            assignments: model::Assignments {
                top_k: 2,
                experts: experts.iter().copied().map(ExpertId).collect(),
                weights: (0..experts.len()).map(|slot| 0.5 + slot as f32).collect(),
            },
        }
    }

    fn check(holders: &[(&str, &[u32])], avoid: &[&str], expected: &[(&str, &[usize])], orphans: &[usize]) {
        let activations = activations(&[0, 3, 1, 0, 2, 3]);
        let avoid: Vec<InstanceId> = avoid.iter().map(|&name| name.into()).collect();
        let (parts, lost) = plan(&activations, (0..6).map(Slot), &table(holders), &avoid);
        let slots = |slots: &[usize]| slots.iter().copied().map(Slot).collect::<Vec<_>>();
        let expected: Vec<Part> = expected
            .iter()
            .map(|&(holder, list)| Part { holder: holder.into(), slots: slots(list) })
            .collect();
        assert_eq!((parts, lost), (expected, slots(orphans)));
    }

    #[test]
    fn every_pair_goes_to_one_holder() {
        check(&[("a", &[0, 1]), ("b", &[2, 3])], &[], &[("a", &[0, 2, 3]), ("b", &[1, 4, 5])], &[]);
        check(
            &[("a", &[0, 1, 2, 3]), ("b", &[0, 1, 2, 3])],
            &[],
            &[("a", &[0, 3, 4]), ("b", &[1, 2, 5])],
            &[],
        );
        check(&[("a", &[0, 1, 2, 3]), ("b", &[0, 1, 2, 3])], &["a"], &[("b", &[0, 1, 2, 3, 4, 5])], &[]);
        check(&[("a", &[0, 1]), ("b", &[2])], &[], &[("a", &[0, 2, 3]), ("b", &[4])], &[1, 5]);
    }

    #[test]
    fn a_part_packs_each_row_once() {
        let activations = activations(&[0, 3, 1, 0, 2, 3]);
        let (rows, assignments, frame_rows) = pack(&activations, &[Slot(0), Slot(2), Slot(3)]);
        assert_eq!(rows.to_f32(), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(frame_rows, [0, 1]);
        let weights: Vec<_> = assignments.iter().map(|a| (a.row.0, a.expert.0, a.weight)).collect();
        assert_eq!(weights, [(0, 0, 0.5), (1, 1, 2.5), (1, 0, 3.5)]);
    }

    #[test]
    fn large_batches_are_cut_between_rows() {
        let n_rows = 3 * FRAME_BYTES_MAX / 8 / 2;
        let activations = activations(&vec![0; n_rows * 2]);
        let (parts, _) = plan(&activations, (0..n_rows * 2).map(Slot), &table(&[("a", &[0])]), &[]);
        assert_eq!(parts.len(), 2);
        assert!(
            parts.iter().all(|part| part.slots.len() % 2 == 0 && part.slots.len() / 2 * 8 <= FRAME_BYTES_MAX)
        );
        assert_eq!(parts.iter().map(|part| part.slots.len()).sum::<usize>(), n_rows * 2);
    }
}
