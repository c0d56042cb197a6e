//! What a machine can do at most, for comparison: bytes read, and multiply-adds from registers.

use self::loops as generic;
use super::Isa;

/// Turns of a loop of [`CHAINS`] multiply-adds.
const TURNS: usize = 1 << 20;

/// Turns with the same number: changing it goes through memory, which takes longer than a turn.
const SAME: usize = 16;

/// Sums that do not wait for each other: more than any core has multiplications under way.
const CHAINS: usize = 12;

/// Reads everything once.
pub(crate) fn read(bytes: &[u8]) -> u64 {
    match Isa::detect() {
        Isa::Baseline => generic::read(bytes),
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx2 | Isa::Avx512 | Isa::Amx => unsafe { x86::read(bytes) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => generic::read(bytes),
    }
}

/// f32 multiply-adds, as many as it returns; `seed` is any small number.
pub(crate) fn multiply_f32(seed: f32) -> (usize, f32) {
    match Isa::detect() {
        Isa::Baseline => generic::multiply_f32(seed),
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx2 => unsafe { x86::avx2_f32(seed) },
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx512 | Isa::Amx => unsafe { x86::avx512_f32(seed) },
        #[cfg(target_arch = "aarch64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Neon => unsafe { arm::neon_f32(seed) },
    }
}

/// int8 multiply-adds, as many as it returns, of the best kind of a product's kernel; of AVX-512 where there are tiles.
pub(crate) fn multiply_i8(seed: i8) -> (usize, i32) {
    match Isa::detect() {
        Isa::Baseline => generic::multiply_i8(seed),
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx2 => unsafe { x86::avx2(seed) },
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx512 | Isa::Amx => unsafe { x86::avx512(seed) },
        #[cfg(target_arch = "aarch64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Neon => unsafe { arm::neon(seed) },
    }
}

/// The same with int4: pairs of eight numbers fit in 16 bits, which AVX2 has more sums of.
pub(crate) fn multiply_i4(seed: i8) -> (usize, i32) {
    match Isa::detect() {
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx2 => unsafe { x86::avx2_i4(seed) },
        _ => multiply_i8(seed),
    }
}

/// The same of tiles; none where there are none.
pub(crate) fn multiply_tiles() -> usize {
    match Isa::detect() {
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Amx => unsafe { super::packed::amx::multiply(TURNS / 64) },
        _ => 0,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    use super::{CHAINS, SAME, TURNS};

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(seed: i8) -> (usize, i32) {
        // Pairs of 16 bits: what signed bytes without VNNI come down to.
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        let mut x = _mm256_set1_epi16(i16::from(seed));
        for _ in 0..TURNS / SAME {
            // Another number, as far as a compiler knows: no product is computed ahead.
            x = black_box(x);
            for _ in 0..SAME {
                for sum in &mut sums {
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*sum, x));
                }
            }
        }
        let mut all = sums[0];
        for sum in &sums[1..] {
            all = _mm256_add_epi32(all, *sum);
        }
        (TURNS * CHAINS * 16, _mm256_extract_epi32::<0>(all))
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2_i4(seed: i8) -> (usize, i32) {
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        let mut x = _mm256_set1_epi8(seed);
        for _ in 0..TURNS / SAME {
            x = black_box(x);
            for _ in 0..SAME {
                for sum in &mut sums {
                    *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(*sum, x));
                }
            }
        }
        let mut all = sums[0];
        for sum in &sums[1..] {
            all = _mm256_add_epi16(all, *sum);
        }
        (TURNS * CHAINS * 32, _mm256_extract_epi32::<0>(all))
    }

    /// The same loop, and what is read next is asked for: the hardware's own prefetch ends at each page.
    #[target_feature(enable = "avx2")]
    pub(super) fn read(bytes: &[u8]) -> u64 {
        const NEAR_BYTES: usize = 512;
        const AHEAD_BYTES: usize = 4096;
        let mut lanes = [0_u64; 32];
        for line in bytes.as_chunks::<256>().0 {
            for part in line.as_chunks::<64>().0 {
                _mm_prefetch::<_MM_HINT_T0>(part.as_ptr().wrapping_add(NEAR_BYTES).cast());
                _mm_prefetch::<_MM_HINT_T1>(part.as_ptr().wrapping_add(AHEAD_BYTES).cast());
            }
            for (lane, word) in lanes.iter_mut().zip(line.as_chunks::<8>().0) {
                *lane ^= u64::from_ne_bytes(*word);
            }
        }
        lanes.iter().fold(0, |all, lane| all ^ lane)
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2_f32(seed: f32) -> (usize, f32) {
        let mut sums = [_mm256_setzero_ps(); CHAINS];
        let (x, half) = (_mm256_set1_ps(black_box(seed)), _mm256_set1_ps(0.5));
        for _ in 0..TURNS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, half, x);
            }
        }
        let mut all = sums[0];
        for sum in &sums[1..] {
            all = _mm256_add_ps(all, *sum);
        }
        (TURNS * CHAINS * 8, _mm256_cvtss_f32(all))
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512_f32(seed: f32) -> (usize, f32) {
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        let (x, half) = (_mm512_set1_ps(black_box(seed)), _mm512_set1_ps(0.5));
        for _ in 0..TURNS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, half, x);
            }
        }
        let mut all = sums[0];
        for sum in &sums[1..] {
            all = _mm512_add_ps(all, *sum);
        }
        (TURNS * CHAINS * 16, _mm512_reduce_add_ps(all))
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn avx512(seed: i8) -> (usize, i32) {
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        let mut x = _mm512_set1_epi8(seed);
        for _ in 0..TURNS / SAME {
            x = black_box(x);
            for _ in 0..SAME {
                for sum in &mut sums {
                    *sum = _mm512_dpbusd_epi32(*sum, x, x);
                }
            }
        }
        let mut all = sums[0];
        for sum in &sums[1..] {
            all = _mm512_add_epi32(all, *sum);
        }
        (TURNS * CHAINS * 64, _mm512_reduce_add_epi32(all))
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::{arch::aarch64::*, hint::black_box};

    use super::{super::packed::neon::sdot, CHAINS, SAME, TURNS};

    #[target_feature(enable = "neon")]
    pub(super) fn neon_f32(seed: f32) -> (usize, f32) {
        let mut sums = [vdupq_n_f32(0.0); CHAINS];
        let (x, half) = (vdupq_n_f32(black_box(seed)), vdupq_n_f32(0.5));
        for _ in 0..TURNS {
            for sum in &mut sums {
                // The sum is what is added to: of all three it is the one that `fmla` writes.
                *sum = vfmaq_f32(*sum, half, x);
            }
        }
        let mut all = sums[0];
        for sum in &sums[1..] {
            all = vaddq_f32(all, *sum);
        }
        (TURNS * CHAINS * 4, vaddvq_f32(all))
    }

    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn neon(seed: i8) -> (usize, i32) {
        let mut sums = [vdupq_n_s32(0); CHAINS];
        let mut x = vdupq_n_s8(seed);
        for _ in 0..TURNS / SAME {
            x = black_box(x);
            for _ in 0..SAME {
                for sum in &mut sums {
                    *sum = sdot::<0>(*sum, x, x);
                }
            }
        }
        let mut all = sums[0];
        for sum in &sums[1..] {
            all = vaddq_s32(all, *sum);
        }
        (TURNS * CHAINS * 16, vaddvq_s32(all))
    }
}

mod loops {
    use std::hint::black_box;

    use super::{CHAINS, TURNS};

    #[inline(always)]
    pub(crate) fn read(bytes: &[u8]) -> u64 {
        let mut lanes = [0_u64; 32];
        for line in bytes.as_chunks::<256>().0 {
            for (lane, word) in lanes.iter_mut().zip(line.as_chunks::<8>().0) {
                *lane ^= u64::from_ne_bytes(*word);
            }
        }
        lanes.iter().fold(0, |all, lane| all ^ lane)
    }

    #[inline(always)]
    pub(crate) fn multiply_f32(seed: f32) -> (usize, f32) {
        // Fewer, since a virtual register is two of AVX2's, of which there are sixteen.
        const CHAINS_F32: usize = 7;
        let mut sums = [[0.0_f32; 16]; CHAINS_F32];
        // As in a dot product: compilers know that loop.
        let (x, w) = (black_box([seed; 256]), black_box([seed; 256]));
        for _ in 0..TURNS / 16 {
            for (x, w) in x.as_chunks::<16>().0.iter().zip(w.as_chunks::<16>().0) {
                for sums in &mut sums {
                    for lane in 0..16 {
                        sums[lane] = x[lane].mul_add(w[lane], sums[lane]);
                    }
                }
            }
        }
        (TURNS * CHAINS_F32 * 16, sums.iter().flatten().sum())
    }

    #[inline(always)]
    pub(crate) fn multiply_i8(seed: i8) -> (usize, i32) {
        let mut sums = [[0_i32; 16]; CHAINS];
        for _ in 0..TURNS {
            let x = i32::from(black_box(seed));
            for sums in &mut sums {
                for sum in sums {
                    *sum = sum.wrapping_add(sum.wrapping_mul(x));
                }
            }
        }
        (TURNS * CHAINS * 16, sums.iter().flatten().fold(0, |all, sum| all.wrapping_add(*sum)))
    }
}
