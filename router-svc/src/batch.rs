//! A step's rows, and the batches in which they go through the layers.

use std::ops::Range;

use ids::{ExpertId, LayerId, RowIndex};
use model::Span;

use crate::{
    combine::Combined,
    dispatch::{Activations, Traced},
    forward::Fate,
    sequence::Participants,
};

/// One step's rows, the sequences' spans over them and who worked on each.
pub(crate) struct Step<'a> {
    pub(crate) ids: Vec<u32>,
    pub(crate) spans: Vec<Span<'a>>,
    pub(crate) participants: Vec<&'a mut Participants>,
    /// Whose servers record it.
    pub(crate) traced: Traced,
}

/// Rows that go through the layers together: all of a step, or a half of it. A span that is cut has one fate and one list of
/// participants.
pub(crate) struct Batch<'a> {
    /// Of the step. Whatever else speaks of rows here counts from the first of these.
    pub(crate) rows: Range<usize>,
    pub(crate) spans: Vec<Span<'a>>,
    /// Which one of the step's spans the first one here is, or is of.
    first_span: usize,
    pub(crate) traced: Traced,
    /// `[rows, hidden]`
    pub(crate) hidden: Vec<f32>,
}

impl<'a> Step<'a> {
    /// Its rows in so many equal parts, in their order.
    pub(crate) fn batches(&self, n: usize, embed: impl Fn(&[u32]) -> Vec<f32>) -> Vec<Batch<'a>> {
        let start = |part| part * self.ids.len() / n;
        (0..n).map(|part| self.batch(start(part)..start(part + 1), &embed)).collect()
    }

    fn batch(&self, rows: Range<usize>, embed: impl Fn(&[u32]) -> Vec<f32>) -> Batch<'a> {
        let here = |of: &Range<usize>| {
            let (start, end) = (of.start.max(rows.start), of.end.min(rows.end));
            (start < end).then(|| start - rows.start..end - rows.start)
        };
        let span = |span: &Span<'a>| {
            let of_batch = here(&span.rows)?;
            let position = span.position + (rows.start + of_batch.start - span.rows.start);
            Some(Span { rows: of_batch, position, pages: span.pages })
        };
        let traced = self.traced.iter().filter_map(|(rows, context)| Some((here(rows)?, *context)));
        Batch {
            first_span: self.spans.partition_point(|span| span.rows.end <= rows.start),
            spans: self.spans.iter().filter_map(span).collect(),
            traced: traced.collect(),
            hidden: embed(&self.ids[rows.clone()]),
            rows,
        }
    }
}

impl Batch<'_> {
    /// Its spans, each with its place among the step's.
    fn spans(&self) -> impl Iterator<Item = (usize, &Span<'_>)> {
        (self.first_span..).zip(&self.spans)
    }

    /// The rows worth sending: of spans that are still whole, with finite numbers.
    pub(crate) fn live_rows(&self, activations: &Activations, fates: &mut [Fate]) -> Vec<usize> {
        let mut rows = Vec::with_capacity(activations.n_rows());
        for (at, span) in self.spans() {
            if !matches!(fates[at], Fate::Done) {
                continue;
            }
            if span.rows.clone().any(|row| !model::within(activations.row(row), f32::MAX)) {
                fates[at] = Fate::NotFinite { layer: activations.layer };
            } else {
                rows.extend(span.rows.clone());
            }
        }
        rows
    }

    pub(crate) fn note_participants(&self, activations: &Activations, step: &mut Step<'_>) {
        let top_k = activations.top_k();
        for (at, span) in self.spans() {
            let chosen = &activations.assignments.experts[span.rows.start * top_k..span.rows.end * top_k];
            step.participants[at].experts.extend(chosen.iter().map(|&expert| (activations.layer, expert)));
        }
    }

    pub(crate) fn note_masked(&self, layer: LayerId, masked: &[(RowIndex, ExpertId)], step: &mut Step<'_>) {
        for (at, span) in self.spans() {
            let of_span = masked.iter().filter(|(row, _)| span.rows.contains(&row.index()));
            step.participants[at].masked.extend(of_span.map(|&(_, expert)| (layer, expert)));
        }
    }

    /// Marks the spans that lost a row, and notes who served the others.
    pub(crate) fn settle(
        &self,
        layer: LayerId,
        combined: &Combined,
        step: &mut Step<'_>,
        fates: &mut [Fate],
    ) {
        for (at, span) in self.spans() {
            let participants = &mut *step.participants[at];
            for (holder, rows) in &combined.served {
                if !participants.servers.contains(holder) && rows.iter().any(|row| span.rows.contains(row)) {
                    participants.servers.insert(holder.clone());
                }
            }
            let lost = combined.lost.range(span.rows.clone());
            let mut experts: Vec<ExpertId> = lost.flat_map(|(_, experts)| experts.iter().copied()).collect();
            // The first loss of a span that is cut counts: its other half may have been in the air.
            if !experts.is_empty() && matches!(fates[at], Fate::Done) {
                experts.sort_unstable();
                experts.dedup();
                fates[at] = Fate::Missing { layer, experts, last_failure: combined.last_failure.clone() };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ids::PageIndex;
    use proto::Error;
    use telemetry::trace::{Context, new_span_id, new_trace_id};

    use super::*;
    use crate::{dispatch::tests::activations, flight::log::Log};

    /// What was lost of a cut span's first half first: its second half is not sent any more, and the others' are.
    #[test]
    fn a_cut_span_has_one_fate() {
        let span = |rows, position| Span { rows, position, pages: &[] };
        let (mut one, mut other) = (Participants::default(), Participants::default());
        let mut step = Step {
            ids: vec![0; 6],
            spans: vec![span(0..4, 0), span(4..6, 0)],
            participants: vec![&mut one, &mut other],
            traced: Traced::default(),
        };
        let [first, second] = step.batches(2, |_| Vec::new()).try_into().unwrap_or_else(|_| panic!("two"));
        let mut fates = [Fate::Done, Fate::Done];
        let lost = |expert, failure: &str| Combined {
            update: Vec::new(),
            lost: [(0, vec![ExpertId(expert)])].into(),
            served: vec![("a".into(), vec![1])],
            last_failure: Some(Error::internal(failure)),
            log: Log::default(),
        };
        first.settle(LayerId(3), &lost(7, "first"), &mut step, &mut fates);
        // Rows 3 to 5 of the step: the first is of the span that is lost.
        assert_eq!(second.live_rows(&activations(&[0, 1, 1, 2, 0, 3]), &mut fates), [1, 2]);
        second.settle(LayerId(2), &lost(9, "second"), &mut step, &mut fates);
        let [Fate::Missing { layer, experts, last_failure }, Fate::Done] = &fates else {
            panic!("{fates:?}")
        };
        assert_eq!((*layer, &experts[..]), (LayerId(3), &[ExpertId(7)][..]));
        assert!(last_failure.as_ref().is_some_and(|error| error.message == "first"));
        assert!(step.participants.iter().all(|participants| participants.servers.len() == 1));
    }

    #[test]
    fn halves_cut_spans_where_they_must() {
        const PAGES: &[PageIndex] = &[PageIndex(3), PageIndex(1)];
        let span = |rows, position| Span { rows, position, pages: PAGES };
        let context =
            |_| Context { trace_id: new_trace_id(), span_id: new_span_id(), sampled: true, full: false };
        let contexts: [Context; 2] = std::array::from_fn(context);
        let step = Step {
            ids: (10..17).collect(),
            spans: vec![span(0..1, 40), span(1..6, 7), span(6..7, 0)],
            participants: Vec::new(),
            traced: [(1..6, contexts[0]), (6..7, contexts[1])].into(),
        };
        let batches = step.batches(2, |ids| ids.iter().map(|&id| id as f32).collect());
        let told: Vec<_> = batches
            .iter()
            .map(|batch| {
                let spans = batch.spans().map(|(at, span)| (at, span.rows.clone(), span.position));
                let traced = batch.traced.iter().map(|(rows, context)| (rows.clone(), context.trace_id));
                (batch.rows.clone(), batch.hidden.clone(), spans.collect(), traced.collect())
            })
            .collect();
        let [one, other] = contexts.map(|context| context.trace_id);
        let expected: Vec<(_, _, Vec<_>, Vec<_>)> = vec![
            (0..3, vec![10.0, 11.0, 12.0], vec![(0, 0..1, 40), (1, 1..3, 7)], vec![(1..3, one)]),
            (
                3..7,
                vec![13.0, 14.0, 15.0, 16.0],
                vec![(1, 0..3, 9), (2, 3..4, 0)],
                vec![(0..3, one), (3..4, other)],
            ),
        ];
        assert_eq!(told, expected);
        let whole = step.batches(1, |_| Vec::new());
        assert_eq!((whole.len(), whole[0].rows.clone(), whole[0].spans.len()), (1, 0..7, 3));
    }
}
