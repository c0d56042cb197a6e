//! Rows and table → the frames of one layer: which row goes to which holder. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::Instant,
};

use cluster::{Health, RoutingTable};
use ids::{Epoch, ExpertId, InstanceId, LayerId, RowIndex, WeightsHash};
use proto::{
    frame::{Assignment, FRAME_BYTES_MAX, TRACEPARENTS_MAX},
    rows::{Dtype, Rows},
};

use crate::flight::log::Attempt;

/// The activations that one layer sends out, and the gate's choice for them.
#[derive(Debug)]
pub(crate) struct Activations {
    pub(crate) layer: LayerId,
    pub(crate) hidden_size: usize,
    pub(crate) dtype: Dtype,
    /// `[rows, hidden]`; the shared experts are computed from them too.
    pub(crate) normed: Arc<model::Input<'static>>,
    pub(crate) assignments: model::Assignments,
    /// Whose rows are recorded.
    pub(crate) traced: Traced,
}

/// Rows of the batch whose sequences' traces record this step, with the servers' spans.
pub(crate) type Traced = Arc<[(Range<usize>, telemetry::trace::Context)]>;

impl Activations {
    /// The contexts that a frame carries: one for each trace that has a row in it.
    pub(crate) fn traceparents(&self, attempt: &Attempt) -> Vec<String> {
        let has_row = |rows: &Range<usize>| {
            let first = attempt.rows.partition_point(|&row| row < rows.start);
            attempt.rows.get(first).is_some_and(|row| rows.contains(row))
        };
        let traced = self.traced.iter().filter(|(rows, _)| has_row(rows)).take(TRACEPARENTS_MAX);
        traced.map(|(_, context)| context.under(attempt.span_id).traceparent()).collect()
    }

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
    /// The holder's holdings that this was planned with.
    pub(crate) epoch: Epoch,
    /// Of the part's experts, each once.
    pub(crate) weights: WeightsHash,
    /// Ascending, so that a row's pairs lie together.
    pub(crate) slots: Vec<Slot>,
    /// How its rows travel.
    pub(crate) dtype: Dtype,
}

/// What a plan goes by: who holds what, how well each answers, and a number that is another one every time.
pub(crate) struct Grounds<'a> {
    pub(crate) table: &'a RoutingTable,
    pub(crate) health: &'a Health,
    pub(crate) now: Instant,
    pub(crate) salt: u64,
}

/// Spreads `slots` over their holders. `avoid` names holders that have failed with them. Gives the parts, and the slots
/// that nobody can serve.
pub(crate) fn plan(
    activations: &Activations,
    slots: impl IntoIterator<Item = Slot>,
    grounds: &Grounds<'_>,
    avoid: &[InstanceId],
) -> (Vec<Part>, Vec<Slot>) {
    let mut by_expert: BTreeMap<ExpertId, Vec<Slot>> = BTreeMap::new();
    for slot in slots {
        by_expert.entry(activations.expert(slot)).or_default().push(slot);
    }
    let mut by_holder: BTreeMap<&InstanceId, (f32, Vec<Slot>)> = BTreeMap::new();
    let mut orphans = Vec::new();
    for (expert, slots) in by_expert {
        let candidates = candidates(activations.layer, expert, grounds, avoid);
        let load = |holder: &InstanceId| {
            let (cost, planned) = by_holder
                .get(holder)
                .map_or_else(|| (grounds.cost(holder), 0), |(cost, planned)| (*cost, planned.len()));
            cost * (planned + slots.len()) as f32
        };
        match candidates.into_iter().min_by(|a, b| load(a).total_cmp(&load(b))) {
            Some(holder) => {
                by_holder.entry(holder).or_insert_with(|| (grounds.cost(holder), Vec::new())).1.extend(slots);
            }
            None => orphans.extend(slots),
        }
    }
    let mut parts = Vec::with_capacity(by_holder.len());
    for (holder, (_, mut slots)) in by_holder {
        slots.sort_unstable();
        let dtype = dtype(activations, holder, grounds.table);
        parts.extend(
            cut(activations, slots, dtype).map(|slots| part(activations, holder, slots, grounds.table)),
        );
    }
    orphans.sort_unstable();
    (parts, orphans)
}

/// All of `slots` for one holder; None if it does not hold all of their experts.
pub(crate) fn plan_for(
    activations: &Activations,
    holder: &InstanceId,
    slots: &[Slot],
    table: &RoutingTable,
) -> Option<Part> {
    let holds = &table.holder(holder)?.holds;
    let held = slots.iter().all(|&slot| holds.contains_key(&(activations.layer, activations.expert(slot))));
    held.then(|| part(activations, holder, slots.to_vec(), table))
}

/// At most two holders to choose between (the power of two choices): an expert's work goes to one of them, so that its
/// weights are read once.
fn candidates<'a>(
    layer: LayerId,
    expert: ExpertId,
    grounds: &Grounds<'a>,
    avoid: &[InstanceId],
) -> Vec<&'a InstanceId> {
    let left = || grounds.table.holders_of(layer, expert).iter().filter(|holder| !avoid.contains(holder));
    let mut candidates: Vec<&InstanceId> = left().filter(|holder| grounds.health.is_in(holder)).collect();
    if candidates.is_empty() {
        // Better an ejected server than none.
        candidates = left().collect();
    }
    let n = candidates.len();
    if n > 0 {
        candidates.rotate_left((grounds.salt as usize).wrapping_add(expert.index()) % n);
        candidates.truncate(2);
    }
    candidates
}

impl Grounds<'_> {
    fn cost(&self, holder: &InstanceId) -> f32 {
        self.health.cost(holder, self.now)
    }
}

fn part(activations: &Activations, holder: &InstanceId, slots: Vec<Slot>, table: &RoutingTable) -> Part {
    let experts: BTreeSet<ExpertId> = slots.iter().map(|&slot| activations.expert(slot)).collect();
    let holding = table.holder(holder);
    let weights = experts
        .iter()
        .filter_map(|&expert| holding?.holds.get(&(activations.layer, expert)).copied())
        .fold(WeightsHash::default(), WeightsHash::and);
    let epoch = holding.map_or(Epoch(0), |holder| holder.epoch);
    let dtype = dtype(activations, holder, table);
    Part { holder: holder.clone(), epoch, weights, slots, dtype }
}

/// How rows travel to `holder`: as asked for, or as what it would make of that. Those that do not travel are not rounded.
fn dtype(activations: &Activations, holder: &InstanceId, table: &RoutingTable) -> Dtype {
    let holder = table.holder(holder);
    let wanted = if holder.is_some_and(|holder| holder.inside) { Dtype::F32 } else { activations.dtype };
    let reads_blocks = holder.is_some_and(|holder| holder.reads_blocks);
    if wanted == Dtype::F32 && reads_blocks { Dtype::Int8Blocks } else { wanted }
}

/// Cuts between rows, so that neither the rows of a frame nor a reply with one row per pair is too large a message.
fn cut(activations: &Activations, slots: Vec<Slot>, dtype: Dtype) -> impl Iterator<Item = Vec<Slot>> {
    let top_k = activations.top_k();
    let rows_max = (FRAME_BYTES_MAX / dtype.row_bytes(activations.hidden_size)).max(1);
    let reply_bytes = dtype.of_reply().row_bytes(activations.hidden_size);
    let pairs_max = (proto::MESSAGE_BYTES_MAX / 2 / reply_bytes).max(top_k);
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
pub(crate) fn pack(
    activations: &Activations,
    slots: &[Slot],
    dtype: Dtype,
) -> (Rows, Vec<Assignment>, Vec<usize>) {
    let top_k = activations.top_k();
    let mut frame_rows: Vec<usize> = Vec::new();
    let mut assignments = Vec::with_capacity(slots.len());
    for &slot in slots {
        let row = slot.row(top_k);
        if frame_rows.last() != Some(&row) {
            frame_rows.push(row);
        }
        assignments.push(Assignment {
            row: RowIndex(frame_rows.len() as u32 - 1),
            expert: activations.expert(slot),
            weight: activations.assignments.weights[slot.0],
        });
    }
    (encode(activations, &frame_rows, dtype), assignments, frame_rows)
}

fn encode(activations: &Activations, rows: &[usize], dtype: Dtype) -> Rows {
    let width = activations.hidden_size;
    if dtype == Dtype::Int8Blocks {
        // The shared experts are computed from the same.
        let blocks = activations.normed.blocks(width);
        return Rows::of_blocks(rows.len(), width, |row, at| blocks.block(rows[row], at));
    }
    // The numbers are sent from where they are collected: what is too much would stay until then.
    let mut values = Vec::with_capacity(rows.len() * width);
    rows.iter().for_each(|&row| values.extend_from_slice(activations.row(row)));
    Rows::encode(dtype, width, values)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use cluster::{Holder, Members, health::Limits};
    use ids::FrameId;

    /// Holders by name, each with the experts of layer 0 that it holds.
    pub(crate) fn table(holders: &[(&str, &[u32])]) -> RoutingTable {
        let mut members = Members::default();
        let mut table = RoutingTable::default();
        for (name, experts) in holders {
            table = members.join(holder(name, experts, 7)).unwrap();
        }
        table
    }

    pub(crate) fn holder(name: &str, experts: &[u32], epoch: u64) -> Holder {
        let held = |&expert: &u32| ((LayerId(0), ExpertId(expert)), WeightsHash(1 << expert));
        Holder {
            instance: name.into(),
            address: String::new(),
            epoch: Epoch(epoch),
            holds: experts.iter().map(held).collect(),
            draining: false,
            reads_blocks: false,
            inside: false,
        }
    }

    #[expect(clippy::disallowed_methods, reason = "any instant will do")]
    pub(crate) fn any_instant() -> Instant {
        Instant::now()
    }

    /// Rows of two numbers whose experts are `experts`, two a row.
    pub(crate) fn activations(experts: &[u32]) -> Activations {
        Activations {
            layer: LayerId(0),
            hidden_size: 2,
            dtype: Dtype::F32,
            normed: Arc::new((0..experts.len()).map(|value| value as f32).collect::<Vec<_>>().into()),
            assignments: model::Assignments {
                top_k: 2,
                experts: experts.iter().copied().map(ExpertId).collect(),
                weights: (0..experts.len()).map(|slot| 0.5 + slot as f32).collect(),
            },
            traced: Traced::default(),
        }
    }

    fn check(
        holders: &[(&str, &[u32])],
        avoid: &[&str],
        expected: &[(&str, &[usize], u64)],
        orphans: &[usize],
    ) {
        let activations = activations(&[0, 3, 1, 0, 2, 3]);
        let avoid: Vec<InstanceId> = avoid.iter().map(|&name| name.into()).collect();
        let (table, health) = (table(holders), Health::new(Limits::default()));
        let grounds = Grounds { table: &table, health: &health, now: any_instant(), salt: 0 };
        let (parts, lost) = plan(&activations, (0..6).map(Slot), &grounds, &avoid);
        let slots = |slots: &[usize]| slots.iter().copied().map(Slot).collect::<Vec<_>>();
        let expected: Vec<Part> = expected
            .iter()
            .map(|&(holder, list, weights)| Part {
                holder: holder.into(),
                epoch: Epoch(7),
                weights: WeightsHash(weights),
                slots: slots(list),
                dtype: Dtype::F32,
            })
            .collect();
        assert_eq!((parts, lost), (expected, slots(orphans)));
    }

    #[test]
    fn every_pair_goes_to_one_holder() {
        check(
            &[("a", &[0, 1]), ("b", &[2, 3])],
            &[],
            &[("a", &[0, 2, 3], 0b11), ("b", &[1, 4, 5], 0b1100)],
            &[],
        );
        // Expert 0 (two pairs) goes to a, 1 and 2 (one each) to b; for 3 both are equal.
        check(
            &[("a", &[0, 1, 2, 3]), ("b", &[0, 1, 2, 3])],
            &[],
            &[("a", &[0, 3], 0b1), ("b", &[1, 2, 4, 5], 0b1110)],
            &[],
        );
        check(
            &[("a", &[0, 1, 2, 3]), ("b", &[0, 1, 2, 3])],
            &["a"],
            &[("b", &[0, 1, 2, 3, 4, 5], 0b1111)],
            &[],
        );
        check(&[("a", &[0, 1]), ("b", &[2])], &[], &[("a", &[0, 2, 3], 0b11), ("b", &[4], 0b100)], &[1, 5]);
    }

    #[test]
    fn the_server_that_owes_less_is_chosen_and_an_ejected_one_only_in_need() {
        let activations = activations(&[0, 1]);
        let now = any_instant();
        let table = table(&[("a", &[0, 1]), ("b", &[0, 1]), ("c", &[1])]);
        let mut health = Health::new(Limits::default());
        table.holders().for_each(|holder| health.join(&holder.instance, now));
        let holders = |health: &Health, avoid: &[InstanceId]| {
            let grounds = Grounds { table: &table, health, now, salt: 1 };
            let (parts, _) = plan(&activations, [Slot(0)], &grounds, avoid);
            parts.into_iter().map(|part| part.holder.to_string()).collect::<Vec<_>>()
        };
        health.sent(&"a".into(), FrameId(1), 1, now);
        assert_eq!(holders(&health, &[]), ["b"]);
        health.failed(&"b".into(), FrameId(2), cluster::health::Failure::Wrong, now);
        assert_eq!(holders(&health, &[]), ["a"]);
        assert_eq!(holders(&health, &["a".into()]), ["b"]);
    }

    #[test]
    fn a_part_packs_each_row_once() {
        let activations = activations(&[0, 3, 1, 0, 2, 3]);
        let (rows, assignments, frame_rows) = pack(&activations, &[Slot(0), Slot(2), Slot(3)], Dtype::F32);
        assert_eq!(rows.to_f32(), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(frame_rows, [0, 1]);
        let weights: Vec<_> = assignments.iter().map(|a| (a.row.0, a.expert.0, a.weight)).collect();
        assert_eq!(weights, [(0, 0, 0.5), (1, 1, 2.5), (1, 0, 3.5)]);
    }

    #[test]
    fn quantized_experts_get_what_they_compute_with() {
        let mut activations = activations(&[0, 1, 0, 1]);
        let mut members = Members::default();
        members.join(holder("stored", &[0], 7)).unwrap();
        let table = members.join(Holder { reads_blocks: true, ..holder("quantized", &[1], 7) }).unwrap();
        let dtypes = |activations: &Activations| {
            ["quantized", "stored"].map(|holder| {
                let slots = [Slot(usize::from(holder == "quantized"))];
                plan_for(activations, &holder.into(), &slots, &table).map(|part| part.dtype)
            })
        };
        assert_eq!(dtypes(&activations), [Dtype::Int8Blocks, Dtype::F32].map(Some));
        let (rows, ..) = pack(&activations, &[Slot(1), Slot(3)], Dtype::Int8Blocks);
        assert_eq!(rows, Rows::encode(Dtype::Int8Blocks, 2, [0.0, 1.0, 2.0, 3.0]));
        // Some rows of many, whose last blocks are not whole.
        const WIDTH: usize = 80;
        let values: Vec<f32> =
            (0..21 * WIDTH).map(|at| ((at * 7919 + 13) % 1000) as f32 / 25.0 - 20.0).collect();
        let of_rows = |rows: [usize; 3]| rows.map(|row| &values[row * WIDTH..][..WIDTH]).concat();
        let wide = Activations {
            hidden_size: WIDTH,
            normed: Arc::new(values.clone().into()),
            ..super::tests::activations(&[0; 42])
        };
        let (rows, ..) = pack(&wide, &[Slot(3), Slot(17 * 2), Slot(20 * 2)], Dtype::Int8Blocks);
        assert_eq!(rows, Rows::encode(Dtype::Int8Blocks, WIDTH, of_rows([1, 17, 20])));
        // What was asked for is what it gets.
        activations.dtype = Dtype::Bf16;
        assert_eq!(dtypes(&activations), [Dtype::Bf16; 2].map(Some));
        // Rounding saves nothing where nothing is sent.
        let here = Holder { inside: true, ..holder("here", &[0], 7) };
        let table = Members::default().join(here).unwrap();
        assert_eq!(dtype(&activations, &"here".into(), &table), Dtype::F32);
    }

    #[test]
    fn large_batches_are_cut_between_rows() {
        for (reads_blocks, dtype) in [(false, Dtype::F32), (true, Dtype::Int8Blocks)] {
            let row_bytes = dtype.row_bytes(2);
            let n_rows = 3 * FRAME_BYTES_MAX / row_bytes / 2;
            let activations = activations(&vec![0; n_rows * 2]);
            let table = Members::default().join(Holder { reads_blocks, ..holder("a", &[0], 7) }).unwrap();
            let health = Health::new(Limits::default());
            let grounds = Grounds { table: &table, health: &health, now: any_instant(), salt: 0 };
            let (parts, _) = plan(&activations, (0..n_rows * 2).map(Slot), &grounds, &[]);
            let n_slots: Vec<_> = parts.iter().map(|part| part.slots.len()).collect();
            let fits = |n: &usize| n.is_multiple_of(2) && n / 2 * row_bytes <= FRAME_BYTES_MAX;
            assert!(n_slots.iter().all(fits), "{dtype:?}: {n_slots:?}");
            assert_eq!((n_slots.len(), n_slots.iter().sum::<usize>()), (2, n_rows * 2), "{dtype:?}");
        }
    }
}
