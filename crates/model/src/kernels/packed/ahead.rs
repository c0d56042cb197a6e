//! How far ahead of its products with a few rows a matrix is asked for. The hardware's own prefetch ends at each page of 4 KiB,
//! and what is best differs between cores: bench/RESULTS.md has what was measured on which.

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
    /// Into the second one before; 0: not.
    pub(super) far: usize,
}

impl Ahead {
    /// With AVX-512. On a Zen 4 sixteen rows of int8 take a fifth longer with half of what is far, and a core reads a quarter
    /// less int4, whose lines take twice as long, with twice of it. A Xeon reads an eighth more of it then.
    pub(super) fn avx512(bits: Bits) -> Self {
        match bits {
            Bits::Eight => Self { near: 512, far: 4096 },
            Bits::Four if is_intel() => Self { near: 1024, far: 4096 },
            Bits::Four => Self { near: 512, far: 2048 },
        }
    }

    /// With AVX2. Asking twice, a Xeon reads a tenth more, and a Zen 4 a third less.
    pub(super) fn avx2() -> Self {
        if is_intel() { Self { near: 1024, far: 4096 } } else { Self { near: 4096, far: 0 } }
    }

    #[inline(always)]
    pub(super) fn ask_for(self, line: &Line) {
        ask_for::<_MM_HINT_T0>(line, self.near);
        if self.far > 0 {
            ask_for::<_MM_HINT_T1>(line, self.far);
        }
    }
}

/// Asks for the line so many bytes behind that one, which need not be there.
#[inline(always)]
pub(super) fn ask_for<const HINT: i32>(line: &Line, ahead_bytes: usize) {
    #[expect(unsafe_code, reason = "sound: every x86-64 has it, and nothing is read")]
    unsafe {
        _mm_prefetch::<HINT>(line.as_ptr().wrapping_add(ahead_bytes).cast());
    }
}

fn is_intel() -> bool {
    static IS_INTEL: OnceLock<bool> = OnceLock::new();
    *IS_INTEL.get_or_init(|| {
        let vendor = __cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
    })
}
