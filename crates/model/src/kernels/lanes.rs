//! Sixteen f32 side by side, as each instruction set holds them: what [`super::matmul`] and [`super::attend`] are written
//! with, so that their sums stay in registers. All have the same bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::ops;

use half::bf16;

use super::Weight;

/// Virtual lanes of every sum: element i belongs to lane i % 16.
pub(crate) const LANES: usize = 16;

/// Sixteen numbers. Only code that is compiled for their instruction set, after it was detected, may make them.
pub(crate) trait Lanes: Copy {
    /// What a register has of them, and how many they are.
    type Part: Copy;
    const PARTS: usize;
    fn splat(x: f32) -> Self;
    fn load(x: &[f32; LANES]) -> Self;
    fn load_halves(x: &[bf16; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    /// Asks for a line that is read soon, into the first cache, where there is an instruction for it.
    #[inline(always)]
    fn ask_soon<T>(_line: *const T) {}
    /// Asks for a line that is read later, into the second cache.
    #[inline(always)]
    fn ask_later<T>(_line: *const T) {}
    /// `self * by + sum`, rounded once.
    fn mul_add(self, by: Self, sum: Self) -> Self;
    /// The one reduction tree: halves are added until one number is left.
    fn reduce(self) -> f32;

    fn load_part(x: &[f32; LANES], part: usize) -> Self::Part;
    /// In the order of [`apart`](Self::apart).
    fn load_halves_part(x: &[bf16; LANES], part: usize) -> Self::Part;
    /// Adds `x * by` to a part, rounded once.
    fn add_part(&mut self, part: usize, x: Self::Part, by: Self::Part);
    /// In the order in which the parts of bf16 are loaded with the fewest instructions.
    #[inline(always)]
    fn apart(self) -> Self {
        self
    }
    /// Back from it.
    #[inline(always)]
    fn together(self) -> Self {
        self
    }
}

/// Numbers that begin with a line of the caches: what lies across two of them takes two loads.
#[derive(Debug)]
pub(crate) struct Lines {
    numbers: Vec<f32>,
    start: usize,
}

impl Lines {
    /// What is never touched takes no room.
    pub(crate) fn zeros(n: usize) -> Self {
        let numbers = vec![0.0; n + LANES - 1];
        // Where that cannot be told, they are what they are.
        let start = numbers.as_ptr().align_offset(size_of::<[f32; LANES]>()).min(LANES - 1);
        Self { numbers, start }
    }
}

impl ops::Deref for Lines {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.numbers[self.start..][..self.numbers.len() - (LANES - 1)]
    }
}

impl ops::DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [f32] {
        let n = self.numbers.len() - (LANES - 1);
        &mut self.numbers[self.start..][..n]
    }
}

/// For any machine.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Lanes for Portable {
    type Part = Self;
    const PARTS: usize = 1;

    #[inline(always)]
    fn load_part(x: &[f32; LANES], _: usize) -> Self {
        Self::load(x)
    }

    #[inline(always)]
    fn load_halves_part(x: &[bf16; LANES], _: usize) -> Self {
        Self::load_halves(x)
    }

    #[inline(always)]
    fn add_part(&mut self, _: usize, x: Self, by: Self) {
        *self = x.mul_add(by, *self);
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        Self(*x)
    }

    #[inline(always)]
    fn load_halves(x: &[bf16; LANES]) -> Self {
        Self(x.map(Weight::to_f32))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }

    #[inline(always)]
    fn mul_add(self, by: Self, sum: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane].mul_add(by.0[lane], sum.0[lane])))
    }

    #[inline(always)]
    fn reduce(self) -> f32 {
        let mut lanes = self.0;
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
            half /= 2;
        }
        lanes[0]
    }
}

/// Numbers at any address.
#[cfg(target_arch = "x86_64")]
#[repr(C, packed)]
struct Unaligned(__m256i);

/// Two registers of AVX2 with FMA.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256; 2]);

/// Four lanes' sum.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn reduce_four(x: __m128) -> f32 {
    let two = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn reduce_eight(x: __m256) -> f32 {
    reduce_four(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)))
}

#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "sound: made only where AVX2 was detected; sixteen numbers are there, loads need no alignment, and asking for a \
              line never faults"
)]
impl Lanes for Avx2 {
    type Part = __m256;
    const PARTS: usize = 2;

    #[inline(always)]
    fn load_part(x: &[f32; LANES], part: usize) -> __m256 {
        unsafe { _mm256_loadu_ps(x[8 * part..].as_ptr()) }
    }

    /// The even ones, or the odd ones. Both are read: a compiler that keeps them from the first part for the second is short of
    /// a register for six sums, and a product of bf16 takes nearly twice as long.
    #[inline(always)]
    fn load_halves_part(x: &[bf16; LANES], part: usize) -> __m256 {
        unsafe {
            let pairs = std::ptr::read_volatile(x.as_ptr().cast::<Unaligned>()).0;
            let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            _mm256_castsi256_ps(if part == 0 { _mm256_slli_epi32::<16>(pairs) } else { odd })
        }
    }

    #[inline(always)]
    fn add_part(&mut self, part: usize, x: __m256, by: __m256) {
        self.0[part] = unsafe { _mm256_fmadd_ps(x, by, self.0[part]) };
    }

    #[inline(always)]
    fn apart(self) -> Self {
        unsafe {
            let sorted = |x| _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(x)));
            let even = sorted(_mm256_shuffle_ps::<0b10_00_10_00>(self.0[0], self.0[1]));
            let odd = sorted(_mm256_shuffle_ps::<0b11_01_11_01>(self.0[0], self.0[1]));
            Self([even, odd])
        }
    }

    #[inline(always)]
    fn together(self) -> Self {
        unsafe {
            let low = _mm256_unpacklo_ps(self.0[0], self.0[1]);
            let high = _mm256_unpackhi_ps(self.0[0], self.0[1]);
            Self([_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)])
        }
    }

    #[inline(always)]
    fn ask_soon<T>(line: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }

    #[inline(always)]
    fn ask_later<T>(line: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        unsafe { Self([_mm256_set1_ps(x); 2]) }
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        unsafe { Self([_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x[8..].as_ptr())]) }
    }

    #[inline(always)]
    fn load_halves(x: &[bf16; LANES]) -> Self {
        unsafe {
            let wide = |halves: &[bf16]| {
                let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves.as_ptr().cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
            };
            Self([wide(&x[..8]), wide(&x[8..])])
        }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), self.0[0]);
            _mm256_storeu_ps(to[8..].as_mut_ptr(), self.0[1]);
        }
    }

    #[inline(always)]
    fn mul_add(self, by: Self, sum: Self) -> Self {
        unsafe {
            Self([
                _mm256_fmadd_ps(self.0[0], by.0[0], sum.0[0]),
                _mm256_fmadd_ps(self.0[1], by.0[1], sum.0[1]),
            ])
        }
    }

    #[inline(always)]
    fn reduce(self) -> f32 {
        unsafe { reduce_eight(_mm256_add_ps(self.0[0], self.0[1])) }
    }
}

/// One register of AVX-512.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "sound: made only where AVX-512 was detected; sixteen numbers are there, loads need no alignment, and asking for \
              a line never faults"
)]
impl Lanes for Avx512 {
    type Part = Self;
    const PARTS: usize = 1;

    #[inline(always)]
    fn load_part(x: &[f32; LANES], _: usize) -> Self {
        Self::load(x)
    }

    #[inline(always)]
    fn load_halves_part(x: &[bf16; LANES], _: usize) -> Self {
        Self::load_halves(x)
    }

    #[inline(always)]
    fn add_part(&mut self, _: usize, x: Self, by: Self) {
        *self = x.mul_add(by, *self);
    }

    #[inline(always)]
    fn ask_soon<T>(line: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }

    #[inline(always)]
    fn ask_later<T>(line: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        unsafe { Self(_mm512_set1_ps(x)) }
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        unsafe { Self(_mm512_loadu_ps(x.as_ptr())) }
    }

    #[inline(always)]
    fn load_halves(x: &[bf16; LANES]) -> Self {
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves)))
        }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn mul_add(self, by: Self, sum: Self) -> Self {
        unsafe { Self(_mm512_fmadd_ps(self.0, by.0, sum.0)) }
    }

    #[inline(always)]
    fn reduce(self) -> f32 {
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
            reduce_eight(_mm256_add_ps(_mm512_castps512_ps256(self.0), high))
        }
    }
}
