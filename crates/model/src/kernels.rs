//! The arithmetic of rows. Every sum has one order, whatever the instruction set, the number of rows or threads:
//! sixteen virtual lanes, fused multiply-add, one reduction tree. So a row's result has the same bits alone and in any
//! batch, on every machine.
//!
//! Each kernel is written once and compiled for each instruction set, so that the twins cannot drift apart: [`generic`] in
//! plain Rust, [`matmul`] and [`attend`] with a type for sixteen [`lanes`]; [`packed`] has one of each. The only module with
//! `unsafe`, for instructions and calls that need a detected instruction set, the threads' tasks,
//! results that nobody clears first, and a setting of the C library.

mod attend;
mod columns;
mod cores;
mod generic;
mod heap;
mod lanes;
mod matmul;
pub(crate) mod packed;
pub mod threads;

use std::{mem::MaybeUninit, sync::OnceLock};

use half::bf16;

use crate::Error;

pub(crate) use attend::{HEADS_MAX, Softmax, attend};
pub(crate) use columns::Columns;
pub(crate) use generic::{layer_norm, sigmoid};
pub use heap::keep_freed;
pub(crate) use lanes::Lines;
pub(crate) use matmul::{Weight, matmul};

/// Multiply-adds below which products are not worth a second thread: some 20 µs of one core.
const PARALLEL_FROM: usize = 1 << 18;

/// Into how many tasks products are cut for each thread: what a thread that was late leaves to the others is small.
const TASKS_PER_THREAD: usize = 8;

/// Numbers that one thread adds: what is not worth a second one is one part.
const ADDED: usize = 1 << 15;

/// Rows that one thread norms.
const NORM_ROWS: usize = 16;

/// Outputs that are never cut apart.
const UNIT: usize = packed::OUTPUTS;

static ISA: OnceLock<Isa> = OnceLock::new();

/// The instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What the target has at least.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// With VNNI, BW and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512, and tiles of bytes.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// With the dot products of ARMv8.2.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Isa {
    /// The one to compute with: the best one that this machine has, or the one that was chosen.
    #[must_use]
    pub fn detect() -> Self {
        *ISA.get_or_init(Self::best)
    }

    /// Computes with the one of that name from now on, for comparison. Once a process, before anything is computed.
    ///
    /// # Errors
    /// This machine does not have it, or another one is in use.
    pub fn choose(name: &str) -> Result<(), Error> {
        let all = Self::all();
        let Some(isa) = all.iter().find(|isa| isa.name() == name) else {
            let names: Vec<_> = all.into_iter().map(Self::name).collect();
            return Err(Error::new(format!("this machine has {}, not {name}", names.join(", "))));
        };
        let used = *ISA.get_or_init(|| *isa);
        if used != *isa {
            return Err(Error::new(format!("{} is in use, not {name}", used.name())));
        }
        Ok(())
    }

    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512vl")
                && std::arch::is_x86_feature_detected!("avx512vnni")
            {
                return if packed::amx::request() { Self::Amx } else { Self::Avx512 };
            }
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            return Self::Neon;
        }
        Self::Baseline
    }

    /// Every one that this machine has.
    pub(crate) fn all() -> Vec<Self> {
        match Self::best() {
            Self::Baseline => vec![Self::Baseline],
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => vec![Self::Baseline, Self::Avx2],
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => vec![Self::Baseline, Self::Avx2, Self::Avx512],
            #[cfg(target_arch = "x86_64")]
            Self::Amx => vec![Self::Baseline, Self::Avx2, Self::Avx512, Self::Amx],
            #[cfg(target_arch = "aarch64")]
            Self::Neon => vec![Self::Baseline, Self::Neon],
        }
    }

    /// True if rows lie in groups of four, and many of them meet int8 in 16 bits.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const fn widens(self) -> bool {
        matches!(self, Self::Avx2)
    }

    /// True if it multiplies tiles of many rows, where they are full.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const fn has_tiles(self) -> bool {
        matches!(self, Self::Amx)
    }

    /// True if it multiplies many rows with two panels at once, or those that do not fill tiles.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const fn pairs_panels(self) -> bool {
        matches!(self, Self::Avx512 | Self::Amx)
    }

    #[cfg(not(target_arch = "x86_64"))]
    #[expect(clippy::unused_self, reason = "others have sets that do")]
    pub(crate) const fn widens(self) -> bool {
        false
    }

    #[cfg(not(target_arch = "x86_64"))]
    #[expect(clippy::unused_self, reason = "others have sets that do")]
    pub(crate) const fn has_tiles(self) -> bool {
        false
    }

    #[cfg(not(target_arch = "x86_64"))]
    #[expect(clippy::unused_self, reason = "others have sets that do")]
    pub(crate) const fn pairs_panels(self) -> bool {
        false
    }

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
        }
    }
}

/// Compiles `generic::$name` for every instruction set and picks one at run time. The baseline of aarch64 has all of NEON that
/// these use.
macro_rules! dispatch {
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?) => {
        $(#[$doc])*
        $visibility fn $name($($arg: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $type),*) $(-> $result)? {
                generic::$name($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            fn avx512($($arg: $type),*) $(-> $result)? {
                generic::$name($($arg),*)
            }
            match Isa::detect() {
                Isa::Baseline => generic::$name($($arg),*),
                #[cfg(target_arch = "x86_64")]
                #[expect(unsafe_code, reason = "sound: `Isa::Avx2` is made by `Isa::detect` alone")]
                Isa::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
                Isa::Avx512 | Isa::Amx => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => generic::$name($($arg),*),
            }
        }
    };
}

pub(crate) mod limits;

dispatch! {
    /// SwiGLU: `gate = gate * sigmoid(gate) * up`.
    pub(crate) fn silu_mul(gate: &mut [f32], up: &[f32])
}
dispatch! {
    /// Scores → probabilities, in place.
    pub(crate) fn softmax(scores: &mut [f32])
}
dispatch! {
    fn norm_rows(x: &[f32], weight: &[f32], eps: f32, normed: &mut [f32])
}

dispatch! {
    fn add_numbers(sum: &mut [f32], values: &[f32])
}

/// `sum += values`, number by number; threads share long ones.
pub fn add(sum: &mut [f32], values: &[f32]) {
    if sum.len() <= ADDED {
        return add_numbers(sum, values);
    }
    let parts = sum.chunks_mut(ADDED).zip(values.chunks(ADDED)).collect();
    threads::for_each(parts, |(sum, values)| add_numbers(sum, values));
}

/// RMSNorm: `weight * x / sqrt(mean(x²) + eps)` of each row `[weight.len()]`.
pub(crate) struct RmsNorm {
    weight: Vec<f32>,
    eps: f32,
}

impl RmsNorm {
    pub(crate) const fn new(weight: Vec<f32>, eps: f32) -> Self {
        Self { weight, eps }
    }

    /// `x` `[rows, weight.len()]` → the same.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut normed = vec![0.0; x.len()];
        let part = NORM_ROWS * self.weight.len();
        threads::for_each(x.chunks(part).zip(normed.chunks_mut(part)).collect(), |(x, normed)| {
            norm_rows(x, &self.weight, self.eps, normed);
        });
        normed
    }
}

dispatch! {
    /// `sum += weight * values`; false if any of the products is not finite.
    pub fn add_weighted(sum: &mut [f32], values: &[f32], weight: f32) -> bool
}
dispatch! {
    /// `sum += weight * values`, the products rounded half to even to whole multiples of `step`, a power of two; false if
    /// any is beyond `max` or no number.
    pub fn add_on_grid(sum: &mut [f32], values: &[f32], weight: f32, step: f32, max: f32) -> bool
}
dispatch! {
    /// `sum += Σ weights[row] · max(products[row], 0)`
    fn add_positive(products: &[[f32; packed::OUTPUTS]], weights: &[f32], sum: &mut [f32; packed::OUTPUTS])
}
dispatch! {
    /// The largest of `values`, −∞ if there is none; what is no number does not count.
    pub fn largest(values: &[f32]) -> f32
}
dispatch! {
    /// True if no magnitude is above `max`; what is no number is.
    pub fn within(values: &[f32], max: f32) -> bool
}
dispatch! {
    /// Σ e^(scale · (value − shift)) within 1e-6 of it, the same on every machine. No term is less than e^-87.
    pub fn sum_of_exp(values: &[f32], shift: f32, scale: f32) -> f64
}

/// Rows and a matrix `[outputs, width]` that they are multiplied with.
pub(crate) struct Product<'a> {
    pub(crate) width: usize,
    pub(crate) outputs: usize,
    pub(crate) factors: Factors<'a>,
}

/// Rows `[rows, width]` and a matrix `[outputs, width]`.
#[derive(Clone, Copy)]
pub(crate) enum Factors<'a> {
    F32(&'a [f32], &'a [f32]),
    Bf16(&'a [f32], &'a [bf16]),
    Packed(&'a packed::Rows, packed::Bits, &'a [u8]),
}

impl Product<'_> {
    fn n_rows(&self) -> usize {
        match self.factors {
            Factors::F32(rows, _) | Factors::Bf16(rows, _) => rows.len() / self.width,
            Factors::Packed(rows, ..) => rows.n_rows(),
        }
    }

    /// Multiply-adds.
    fn work(&self) -> usize {
        self.n_rows() * self.width * self.outputs
    }

    /// Writes every number of `y`.
    fn compute(&self, isa: Isa, y: &mut Columns<'_, MaybeUninit<f32>>) {
        match self.factors {
            Factors::F32(rows, w) => self.compute_stored(isa, rows, w, y),
            Factors::Bf16(rows, w) => self.compute_stored(isa, rows, w, y),
            Factors::Packed(rows, bits, bytes) => {
                let panels = y.range().start / UNIT..y.range().end.div_ceil(UNIT);
                packed::rows_with_panels(isa, bits, rows, bytes, self.width, panels, y);
            }
        }
    }

    fn compute_stored<W: Weight>(
        &self,
        isa: Isa,
        rows: &[f32],
        w: &[W],
        y: &mut Columns<'_, MaybeUninit<f32>>,
    ) {
        let outputs = y.range();
        let mut part = vec![0.0; self.n_rows() * outputs.len()];
        let w = &w[outputs.start * self.width..outputs.end * self.width];
        matmul(isa, rows, w, self.width, &mut part);
        for (row, part) in part.chunks_exact(outputs.len()).enumerate() {
            y.row(row).write_copy_of_slice(part);
        }
    }
}

/// True if products of so many multiply-adds are computed by one thread.
pub(crate) const fn is_small(work: usize) -> bool {
    work < PARALLEL_FROM
}

/// Cuts a job of so many multiply-adds into tasks.
struct Cut {
    work: usize,
    n_tasks: usize,
}

impl Cut {
    fn new(work: usize) -> Self {
        // A thread alone has tasks, too: the part of a matrix that it reads for every few of many rows stays near.
        Self { work, n_tasks: if is_small(work) { 1 } else { threads::count() * TASKS_PER_THREAD } }
    }

    /// Of `n_units` that are `work` of it: how many a task has.
    fn share(&self, n_units: usize, work: usize) -> usize {
        let n_tasks = (work * self.n_tasks).div_ceil(self.work.max(1)).clamp(1, n_units.max(1));
        n_units.div_ceil(n_tasks).max(1)
    }

    fn run<T: Send, F>(&self, tasks: Vec<T>, compute: impl Fn(T) + Sync, first: impl FnOnce() -> F) -> F {
        if self.n_tasks == 1 {
            let done = first();
            tasks.into_iter().for_each(compute);
            done
        } else {
            threads::for_each_beside(tasks, compute, first)
        }
    }
}

/// Rows times matrices transposed, `[rows, outputs]` each: all of them one job of the threads, which share the outputs, so
/// that each weight is read once by few rows.
pub(crate) fn products(list: &[Product<'_>]) -> Vec<Vec<f32>> {
    products_beside(list, || ()).1
}

/// The same, and this thread does something else `first` while others begin.
pub(crate) fn products_beside<T>(list: &[Product<'_>], first: impl FnOnce() -> T) -> (T, Vec<Vec<f32>>) {
    let isa = Isa::detect();
    let cut = Cut::new(list.iter().map(Product::work).sum());
    // Not cleared first: one thread would do it, for as long as a twentieth of the products takes.
    let mut results: Vec<Vec<f32>> =
        list.iter().map(|product| Vec::with_capacity(product.n_rows() * product.outputs)).collect();
    let mut tasks = Vec::with_capacity(cut.n_tasks + list.len());
    for (product, y) in list.iter().zip(&mut results) {
        let share = cut.share(product.outputs.div_ceil(UNIT), product.work()) * UNIT;
        let y = &mut y.spare_capacity_mut()[..product.n_rows() * product.outputs];
        tasks.extend(Columns::split(y, product.outputs, share).map(|columns| (product, columns)));
    }
    let done = cut.run(tasks, |(product, mut columns)| product.compute(isa, &mut columns), first);
    for (product, y) in list.iter().zip(&mut results) {
        #[expect(
            unsafe_code,
            reason = "sound: each task has written all rows of its columns, which cover the outputs"
        )]
        unsafe {
            y.set_len(product.n_rows() * product.outputs);
        }
    }
    (done, results)
}

/// silu(gate x) · up x, quantized, in the same way.
pub(crate) fn gated_beside<T>(
    list: &[packed::Gated<'_>],
    first: impl FnOnce() -> T,
) -> (T, Vec<packed::Rows>) {
    let isa = Isa::detect();
    let cut = Cut::new(list.iter().map(packed::Gated::work).sum());
    let mut results: Vec<_> = list.iter().map(|gated| gated.result(isa)).collect();
    let mut tasks = Vec::with_capacity(cut.n_tasks + list.len());
    for (gated, rows) in list.iter().zip(&mut results) {
        let share = cut.share(gated.n_blocks(), gated.work());
        tasks.extend(packed::Blocks::split(rows, gated.n_blocks(), share).map(|blocks| (gated, blocks)));
    }
    let done = cut.run(tasks, |(gated, mut blocks)| gated.compute(isa, &mut blocks), first);
    (done, results)
}

#[cfg(test)]
mod tests;
