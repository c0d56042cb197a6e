//! From queries to outputs: absorb, attend, expand. A row reads its latents in parts, each from nothing, and merges what they
//! give in their order. Threads can therefore share a long row between them, each with latents that no other one reads, and
//! which of them read what does not show.

use std::ops::Range;

use super::{Attention, Sizes};
use crate::{
    kernels::{Columns, HEADS_MAX, Isa, Lines, Softmax, attend, threads},
    storage::Input,
};

/// Positions of a part: merging it costs less than a hundredth of reading it.
const PART: usize = 192;

/// Parts of a row; long rows have longer ones, so that their sums stay few.
const PARTS_MAX: usize = 32;

/// Rows of the batch that one task attends at most: enough that a head's matrices are read a few times a batch.
const TASK_ROWS: usize = 32;

/// How many tasks there should be for each thread, where there are several.
const TASKS_PER_THREAD: usize = 2;

/// What a row reads: `[latent + rope]` of each position.
type Latents<'a> = Vec<&'a [f32]>;

/// The parts of a row, whichever rows share a batch with it.
fn parts<'l, 'a>(latents: &'l [&'a [f32]]) -> std::slice::Chunks<'l, &'a [f32]> {
    latents.chunks(latents.len().div_ceil(PARTS_MAX).next_multiple_of(PART).max(PART))
}

impl Attention {
    /// `q` `[rows, heads, nope + rope]` → `[rows, heads × v]`. `read` gives the latents that a row reads, `n_read` of them.
    pub(super) fn attend<'a>(
        &self,
        q: &[f32],
        n_read: &[usize],
        read: &(dyn Fn(usize) -> Latents<'a> + Sync),
    ) -> Vec<f32> {
        let Sizes { heads, v, .. } = self.sizes;
        let total: usize = n_read.iter().sum();
        let n_tasks = if threads::count() == 1 { 1 } else { threads::count() * TASKS_PER_THREAD };
        let mut outputs = vec![0.0; n_read.len() * heads * v];
        // Each more than a task's share: the others are fewer than there are tasks.
        let is_long = |row: usize| n_read[row] > PART && n_read[row] * n_tasks > total;
        let mut row = 0;
        while row < n_read.len() {
            let rows = if is_long(row) {
                row..row + 1
            } else {
                row..(row..n_read.len()).find(|&row| is_long(row)).unwrap_or(n_read.len())
            };
            let outputs = &mut outputs[rows.start * heads * v..rows.end * heads * v];
            if is_long(row) {
                self.share_row(q, row, &read(row), n_tasks, outputs);
            } else {
                self.share_rows(q, rows.clone(), n_read, read, n_tasks, outputs);
            }
            row = rows.end;
        }
        outputs
    }

    /// A task takes a few rows and heads from their queries to their outputs.
    fn share_rows<'a>(
        &self,
        q: &[f32],
        all_rows: Range<usize>,
        n_read: &[usize],
        read: &(dyn Fn(usize) -> Latents<'a> + Sync),
        n_tasks: usize,
        outputs: &mut [f32],
    ) {
        let Sizes { heads, v, .. } = self.sizes;
        let total: usize = n_read[all_rows.clone()].iter().sum();
        let task_rows = (all_rows.len() * heads / HEADS_MAX / n_tasks).clamp(1, TASK_ROWS);
        let mut tasks = Vec::new();
        for (block, outputs) in outputs.chunks_mut(task_rows * heads * v).enumerate() {
            let first = all_rows.start + block * task_rows;
            let rows = first..first + outputs.len() / (heads * v);
            // By what its rows read: longer ones among short ones are cut, too.
            let reads: usize = n_read[rows.clone()].iter().sum();
            let cuts = (reads * n_tasks).div_ceil(total.max(1)).clamp(heads.div_ceil(HEADS_MAX), heads);
            let columns = Columns::split(outputs, heads * v, heads.div_ceil(cuts) * v);
            tasks.extend(columns.map(|outputs| (rows.clone(), outputs)));
        }
        threads::for_each(tasks, |(rows, mut outputs)| self.attend_some(q, rows, read, &mut outputs));
    }

    /// Some rows and heads: those whose outputs `outputs` are.
    fn attend_some<'a>(
        &self,
        q: &[f32],
        rows: Range<usize>,
        read: &dyn Fn(usize) -> Latents<'a>,
        outputs: &mut Columns<'_>,
    ) {
        let Sizes { v, latent, rope, softmax_scale, .. } = self.sizes;
        let of_heads = outputs.range().start / v..outputs.range().end / v;
        let n_heads = of_heads.len();
        let (q_width, sums_width) = (n_heads * (latent + rope), n_heads * latent);
        let mut absorbed = Lines::zeros(rows.len() * q_width);
        self.absorb(q, rows.clone(), of_heads.clone(), &mut Columns::whole(&mut absorbed, q_width));
        let isa = Isa::detect();
        let mut means = Lines::zeros(rows.len() * sums_width);
        let mut next_sums = Lines::zeros(sums_width);
        let of_rows = absorbed.chunks_exact(q_width).zip(means.chunks_exact_mut(sums_width));
        for (row, (q, sums)) in rows.zip(of_rows) {
            let mut softmaxes = vec![Softmax::NOTHING; n_heads];
            for (at, part) in parts(&read(row)).enumerate() {
                if at == 0 {
                    attend(isa, q, part, softmax_scale, sums, &mut softmaxes);
                    continue;
                }
                let mut next = vec![Softmax::NOTHING; n_heads];
                next_sums.fill(0.0);
                attend(isa, q, part, softmax_scale, &mut next_sums, &mut next);
                let of_heads = sums.chunks_exact_mut(latent).zip(next_sums.chunks_exact(latent));
                for ((sums, next_sums), (softmax, next)) in of_heads.zip(softmaxes.iter_mut().zip(next)) {
                    softmax.merge(sums, next, next_sums);
                }
            }
            let of_heads = sums.chunks_exact_mut(latent).zip(softmaxes);
            of_heads.for_each(|(sums, softmax)| softmax.finish(sums));
        }
        self.expand(&means, of_heads, outputs);
    }

    /// A task takes a part of the row, for as many heads as read it while it is near. The same bits as with
    /// [`Attention::share_rows`].
    fn share_row(&self, q: &[f32], row: usize, latents: &[&[f32]], n_tasks: usize, outputs: &mut [f32]) {
        let Sizes { heads, v, latent, rope, softmax_scale, .. } = self.sizes;
        let _awake = threads::stay_awake();
        let q_width = latent + rope;
        let mut absorbed = Lines::zeros(heads * q_width); // [heads, latent + rope]
        let task_heads = heads.div_ceil(n_tasks);
        let tasks = Columns::split(&mut absorbed, heads * q_width, task_heads * q_width).collect();
        threads::for_each(tasks, |mut absorbed: Columns<'_>| {
            let of_heads = absorbed.range().start / q_width..absorbed.range().end / q_width;
            self.absorb(q, row..row + 1, of_heads, &mut absorbed);
        });

        let n_parts = parts(latents).len();
        let mut sums = Lines::zeros(n_parts * heads * latent); // [parts, heads, latent]
        let mut softmaxes = vec![Softmax::NOTHING; n_parts * heads]; // [parts, heads]
        let part_heads = heads.div_ceil(n_tasks.div_ceil(n_parts)).min(HEADS_MAX);
        let all_sums = sums.chunks_exact_mut(heads * latent).zip(softmaxes.chunks_exact_mut(heads));
        let tasks = parts(latents).zip(all_sums).flat_map(|(part, (sums, softmaxes))| {
            let of_heads = sums.chunks_mut(part_heads * latent).zip(softmaxes.chunks_mut(part_heads));
            absorbed.chunks(part_heads * q_width).zip(of_heads).map(move |(q, sums)| (q, part, sums))
        });
        let isa = Isa::detect();
        threads::for_each(tasks.collect(), |(q, part, (sums, softmaxes))| {
            attend(isa, q, part, softmax_scale, sums, softmaxes);
        });

        let tasks = Columns::split(outputs, heads * v, task_heads * v).collect();
        threads::for_each(tasks, |mut outputs: Columns<'_>| {
            let of_heads = outputs.range().start / v..outputs.range().end / v;
            let mut means = Vec::with_capacity(of_heads.len() * latent);
            for head in of_heads.clone() {
                let part = |part: usize| {
                    let at = part * heads + head;
                    (softmaxes[at], &sums[at * latent..][..latent])
                };
                let (mut softmax, first_sums) = part(0);
                let start = means.len();
                means.extend_from_slice(first_sums);
                for (next, next_sums) in (1..n_parts).map(part) {
                    softmax.merge(&mut means[start..], next, next_sums);
                }
                softmax.finish(&mut means[start..]);
            }
            self.expand(&means, of_heads, &mut outputs);
        });
    }

    /// Queries of some rows and heads as they meet latents: `[rows, heads, latent + rope]`.
    fn absorb(&self, q: &[f32], rows: Range<usize>, of_heads: Range<usize>, absorbed: &mut Columns<'_>) {
        let Sizes { heads, nope, latent, rope, .. } = self.sizes;
        for (at, head) in of_heads.enumerate() {
            let of_head = |row: usize| &q[(row * heads + head) * (nope + rope)..][..nope + rope];
            let no_position: Vec<f32> = rows.clone().flat_map(|row| &of_head(row)[..nope]).copied().collect();
            let keys = self.kv_b_proj[head].key.apply(&Input::new(&no_position), None); // [rows, latent]
            for (block, (row, key)) in rows.clone().zip(keys.chunks_exact(latent)).enumerate() {
                let absorbed = &mut absorbed.row(block)[at * (latent + rope)..][..latent + rope];
                absorbed[..latent].copy_from_slice(key);
                absorbed[latent..].copy_from_slice(&of_head(row)[nope..]);
            }
        }
    }

    /// Mean latents `[rows, heads, latent]` of some heads → their outputs.
    fn expand(&self, means: &[f32], of_heads: Range<usize>, outputs: &mut Columns<'_>) {
        let Sizes { v, latent, .. } = self.sizes;
        let n_heads = of_heads.len();
        for (at, head) in of_heads.enumerate() {
            let of_head: Vec<f32> =
                means.chunks_exact(latent).skip(at).step_by(n_heads).flatten().copied().collect();
            let values = self.kv_b_proj[head].value.apply(&Input::new(&of_head), None); // [rows, v]
            for (row, values) in values.chunks_exact(v).enumerate() {
                outputs.row(row)[at * v..][..v].copy_from_slice(values);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_few_and_cover_a_row() {
        for n in [1, PART, PART + 1, PART * PARTS_MAX, PART * PARTS_MAX + 1, 163_840] {
            let latents = vec![&[0.0_f32][..]; n];
            let parts: Vec<usize> = parts(&latents).map(<[_]>::len).collect();
            assert!(parts.len() <= PARTS_MAX, "{n}: {parts:?}");
            assert_eq!(parts.iter().sum::<usize>(), n);
            assert!(
                parts[1..].iter().all(|part| *part <= parts[0])
                    && (parts[0] == n || parts[0].is_multiple_of(PART))
            );
        }
    }
}
