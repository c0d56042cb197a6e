//! How far ahead of its products a matrix is asked for that a core reads once. The hardware's own prefetch ends at each page of
//! 4 KiB, and what is best differs between cores: bench/NOTEBOOK.md has what was measured on which.

use std::{
    arch::x86_64::{__cpuid, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch},
    sync::OnceLock,
};

use super::{Bits, Line};

/// In bytes.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Into the first cache.
    pub(super) near: usize,
    /// Into the second one before that.
    pub(super) far: Option<usize>,
}

impl Ahead {
    /// With AVX-512. Into one cache alone, or a pair of blocks at once, a core reads a tenth less. Far is 4,096 bytes but for int4,
    /// whose lines take twice as long: a Zen 4 reads a quarter less of it than with 2,048, a Xeon an eighth more. With 2,048
    /// of int8, sixteen rows take a Zen 4 a fifth longer.
    pub(super) fn avx512(bits: Bits) -> Self {
        match bits {
            Bits::Eight => Self { near: 512, far: Some(4096) },
            Bits::Four if is_intel() => Self { near: 1024, far: Some(4096) },
            Bits::Four => Self { near: 512, far: Some(2048) },
        }
    }

    /// With AVX2. Asked into both caches, a Xeon reads a twentieth more, and a Zen 4 a third less.
    pub(super) fn avx2() -> Self {
        if is_intel() { Self { near: 1024, far: Some(4096) } } else { Self { near: 4096, far: None } }
    }

    #[inline(always)]
    pub(super) fn ask_for(self, line: &Line) {
        ask_for::<_MM_HINT_T0>(line, self.near);
        if let Some(far) = self.far {
            ask_for::<_MM_HINT_T1>(line, far);
        }
    }
}

/// Asks for the line `ahead_bytes` after that one, which need not exist.
#[inline(always)]
pub(super) fn ask_for<const HINT: i32>(line: *const Line, ahead_bytes: usize) {
    #[expect(unsafe_code, reason = "sound: every x86-64 has it, and it never faults, wherever it points")]
    unsafe {
        _mm_prefetch::<HINT>(line.wrapping_byte_add(ahead_bytes).cast());
    }
}

fn is_intel() -> bool {
    static IS_INTEL: OnceLock<bool> = OnceLock::new();
    *IS_INTEL.get_or_init(|| {
        let vendor = __cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
    })
}
