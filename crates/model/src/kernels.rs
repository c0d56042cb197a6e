//! The arithmetic of rows. Every sum has one order, whatever the instruction set, the number of rows or threads:
//! sixteen virtual lanes, fused multiply-add, one reduction tree. So a row's result has the same bits alone and in any
//! batch, on every machine.
//!
//! Each kernel is written once ([`generic`]) and compiled for each instruction set: the twins cannot drift apart. The
//! only module with `unsafe`, for the calls into code that needs a detected instruction set.

mod generic;
pub(crate) mod packed;

use half::bf16;
use rayon::prelude::*;

pub(crate) use generic::{layer_norm, sigmoid};

/// Multiply-adds below which a product is not worth a second thread: some 50 µs of one core.
const PARALLEL_FROM: usize = 1 << 19;

/// A stored number, read as f32 exactly.
pub(crate) trait Weight: Copy + Send + Sync + 'static {
    fn to_f32(self) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        // Written out: `half`'s own conversion branches on NaN.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

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
}

impl Isa {
    /// The best one that this machine has. Cheap: std remembers what it detected.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512vl")
                && std::arch::is_x86_feature_detected!("avx512vnni")
            {
                return Self::Avx512;
            }
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Baseline
    }

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
        }
    }
}

/// Compiles `generic::$name` for every instruction set and picks one at run time.
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
                #[expect(unsafe_code, reason = "sound: `Isa::Avx512` is made by `Isa::detect` alone")]
                Isa::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
    ($(#[$doc:meta])* $visibility:vis fn $name:ident<W>($($arg:ident: $type:ty),*) $(-> $result:ty)?) => {
        $(#[$doc])*
        $visibility fn $name<W: Weight>(isa: Isa, $($arg: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<W: Weight>($($arg: $type),*) $(-> $result)? {
                generic::$name($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            fn avx512<W: Weight>($($arg: $type),*) $(-> $result)? {
                generic::$name($($arg),*)
            }
            match isa {
                Isa::Baseline => generic::$name($($arg),*),
                #[cfg(target_arch = "x86_64")]
                #[expect(unsafe_code, reason = "sound: `Isa::Avx2` is made by `Isa::detect` alone")]
                Isa::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                #[expect(unsafe_code, reason = "sound: `Isa::Avx512` is made by `Isa::detect` alone")]
                Isa::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}

dispatch! {
    /// `x` `[rows, width]` times `w` `[outputs, width]` transposed → `y` `[rows, outputs]`.
    fn matmul<W>(x: &[f32], w: &[W], width: usize, y: &mut [f32])
}
dispatch! {
    /// `y += a * x`, each element fused.
    pub(crate) fn axpy<W>(a: f32, x: &[W], y: &mut [f32])
}
dispatch! {
    /// Scalar products of `x` with each row of `w` `[rows, x.len()]`.
    pub(crate) fn dot<W>(x: &[f32], w: &[W]) -> f32
}

dispatch! {
    /// SwiGLU: `gate = gate * sigmoid(gate) * up`.
    pub(crate) fn silu_mul(gate: &mut [f32], up: &[f32])
}
dispatch! {
    /// Scores → probabilities, in place.
    pub(crate) fn softmax(scores: &mut [f32])
}
dispatch! {
    /// `weight * x / sqrt(mean(x²) + eps)` for each row of `x` `[rows, weight.len()]`.
    pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32>
}

/// `x` `[rows, width]` times `w` `[outputs, width]` transposed, plus `bias` → `[rows, outputs]`.
pub(crate) fn linear<W: Weight>(x: &[f32], w: &[W], width: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let isa = Isa::detect();
    let (n_rows, n_outputs) = (x.len() / width, w.len() / width);
    let mut y = vec![0.0; n_rows * n_outputs];
    let threads = rayon::current_num_threads();
    if threads == 1 || n_rows * w.len() < PARALLEL_FROM {
        matmul(isa, x, w, width, &mut y);
    } else {
        // Threads share the outputs, so that each weight is read once.
        let share = n_outputs.div_ceil(threads * 4).max(4);
        let parts: Vec<Vec<f32>> = w
            .par_chunks(share * width)
            .map(|w| {
                let mut part = vec![0.0; n_rows * (w.len() / width)];
                matmul(isa, x, w, width, &mut part);
                part
            })
            .collect();
        for (at, part) in parts.iter().enumerate() {
            let n = part.len() / n_rows;
            for (row, values) in part.chunks_exact(n).enumerate() {
                y[row * n_outputs + at * share..][..n].copy_from_slice(values);
            }
        }
    }
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(n_outputs) {
            row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    }
    y
}

#[cfg(test)]
mod tests;
