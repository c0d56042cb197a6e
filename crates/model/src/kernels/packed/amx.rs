//! AMX: tiles of up to 16 rows times 16 outputs. One instruction gives a tile of dot products of a block; through memory,
//! which is the only way, they come to registers, where they are scaled and added as everywhere.
//!
//! Blocks are taken [`BLOCKS`] at a time: of a panel their numbers are made signed bytes in the order that tiles have anyway,
//! and stay in the first cache for all rows. The rows of a tile lie together block after block ([`TILE_ROWS`]); those of the
//! last tile that are not there are zeros.

use std::{
    arch::{asm, x86_64::*},
    cell::RefCell,
    ops::Range,
};

use super::{BLOCK, BLOCKS, Bits, Group, Line, OUTPUTS, Panel, Rows, TILE_ROWS, ahead, avx512};

/// Lines of a block of sixteen outputs in signed bytes.
const LINES: usize = BLOCK / 4;

/// What a tile of sums holds.
type Tile = [[i32; OUTPUTS]; TILE_ROWS];

/// Asks the system for the tiles' registers, for all threads of this process. False if the machine has none.
pub(in super::super) fn request() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        const AMX_TILE: u32 = 1 << 24;
        const AMX_INT8: u32 = 1 << 25;
        let has = __cpuid(0).eax >= 7 && {
            let features = __cpuid_count(7, 0).edx;
            features & AMX_TILE != 0 && features & AMX_INT8 != 0
        };
        #[expect(
            unsafe_code,
            reason = "sound: it allows this process to use registers, and touches no memory"
        )]
        let granted =
            || unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0;
        has && granted()
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Palette 1: for each of eight tiles its rows and their bytes. Two each of sums, rows and outputs.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = TILES;

const TILES: Config = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut at = 0;
    while at < 2 {
        (rows[at], row_bytes[at]) = (TILE_ROWS as u8, size_of::<Line>() as u16);
        (rows[2 + at], row_bytes[2 + at]) = (TILE_ROWS as u8, BLOCK as u16);
        (rows[4 + at], row_bytes[4 + at]) = (LINES as u8, size_of::<Line>() as u16);
        at += 1;
    }
    Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

/// Multiply-adds of so many turns from registers, as many as it returns: four tiles of 64 elements, which take turns.
///
/// # Safety
/// AMX was granted.
#[expect(unsafe_code, reason = "sound: where it was granted; registers alone are used")]
pub(in super::super) unsafe fn multiply(turns: usize) -> usize {
    static WIDE: Config = {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        let mut at = 0;
        while at < 8 {
            (rows[at], row_bytes[at]) = (TILE_ROWS as u8, size_of::<Line>() as u16);
            at += 1;
        }
        Config { row_bytes, rows, ..TILES }
    };
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "2:",
            "tdpbssd tmm0, tmm4, tmm5",
            "tdpbssd tmm1, tmm4, tmm5",
            "tdpbssd tmm2, tmm4, tmm5",
            "tdpbssd tmm3, tmm4, tmm5",
            "dec {turns}",
            "jnz 2b",
            "tilerelease",
            config = in(reg) &WIDE,
            turns = inout(reg) turns.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
            options(nostack, readonly),
        );
    }
    turns.max(1) * 4 * TILE_ROWS * OUTPUTS * 64
}

/// What is needed of some blocks of a panel, and where their tiles go.
#[repr(align(64))]
struct Work {
    /// `[blocks, lines]`, signed.
    numbers: [[Line; LINES]; BLOCKS],
    scales: [[f32; OUTPUTS]; BLOCKS],
    dots: [Tile; BLOCKS],
}

/// Rows from `first` on times the outputs of one panel → `y`, one a row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn rows_with_panel(
    bits: Bits,
    x: &Rows,
    first: usize,
    panel: Panel<'_>,
    y: &mut [[f32; OUTPUTS]],
) {
    WORK.with_borrow_mut(|work| work.rows_with_panel(bits, x, first, panel, y));
}

thread_local! {
    static WORK: RefCell<Work> = const {
        RefCell::new(Work {
            numbers: [[[0; size_of::<Line>()]; LINES]; BLOCKS],
            scales: [[0.0; OUTPUTS]; BLOCKS],
            dots: [[[0; OUTPUTS]; TILE_ROWS]; BLOCKS],
        })
    };
}

impl Work {
    /// The same with what this thread works with.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
    fn rows_with_panel(
        &mut self,
        bits: Bits,
        x: &Rows,
        first: usize,
        panel: Panel<'_>,
        y: &mut [[f32; OUTPUTS]],
    ) {
        y.fill([0.0; OUTPUTS]);
        #[expect(unsafe_code, reason = "sound: it reads the 64 bytes of a valid configuration")]
        unsafe {
            asm!(
                "ldtilecfg [{}]",
                in(reg) &CONFIG,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        let n_blocks = panel.n_blocks();
        for start in (0..n_blocks).step_by(BLOCKS) {
            let blocks = start..(start + BLOCKS).min(n_blocks);
            self.take(bits, panel, blocks.clone());
            for (at, y) in y.chunks_mut(TILE_ROWS).enumerate() {
                let x = x.group(first + at * TILE_ROWS);
                self.multiply(x, blocks.clone());
                match y.as_mut_array() {
                    Some(y) => self.add(x, blocks.clone(), y),
                    None => {
                        let mut whole = [[0.0; OUTPUTS]; TILE_ROWS];
                        whole[..y.len()].copy_from_slice(y);
                        self.add(x, blocks.clone(), &mut whole);
                        y.copy_from_slice(&whole[..y.len()]);
                    }
                }
            }
        }
        #[expect(unsafe_code, reason = "sound: it empties the tiles, which nobody uses now")]
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Makes numbers and scales of some blocks ready for all rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
    fn take(&mut self, bits: Bits, panel: Panel<'_>, blocks: Range<usize>) {
        let (low_halves, eights) = (_mm512_set1_epi8(0x0f), _mm512_set1_epi8(8));
        let signs = _mm512_set1_epi8(-128);
        // What is taken next comes while these are multiplied.
        let ahead_bytes = BLOCKS / 2 * panel.pair_lines() * size_of::<Line>();
        for ((block, numbers), w_scales) in blocks.zip(&mut self.numbers).zip(&mut self.scales) {
            let lines = panel.block(block);
            for line in lines {
                ahead::ask_for::<_MM_HINT_T0>(line, ahead_bytes);
            }
            match bits {
                Bits::Eight => {
                    for (number, line) in numbers.iter_mut().zip(lines) {
                        store(number, _mm512_xor_si512(avx512::load(line), signs));
                    }
                }
                Bits::Four => {
                    for ([first, second], line) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(lines) {
                        let both = avx512::load(line);
                        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low_halves);
                        store(first, _mm512_sub_epi8(_mm512_and_si512(both, low_halves), eights));
                        store(second, _mm512_sub_epi8(high, eights));
                    }
                }
            }
            let scales = avx512::scales(panel.scales(block));
            #[expect(
                unsafe_code,
                reason = "sound: sixteen floats are there, and the store needs no alignment"
            )]
            unsafe {
                _mm512_storeu_ps(w_scales.as_mut_ptr(), scales);
            }
        }
    }

    /// Dot products of a tile of rows with these blocks, two at a time: there is an even number.
    #[inline]
    fn multiply(&mut self, x: Group<'_>, blocks: Range<usize>) {
        let x = &x.numbers[blocks.start * TILE_ROWS..blocks.end * TILE_ROWS];
        let pairs = x.as_chunks::<{ 2 * TILE_ROWS }>().0.iter().zip(self.numbers.as_chunks::<2>().0);
        for ((x, w), dots) in pairs.zip(self.dots.as_chunks_mut::<2>().0) {
            #[expect(
                unsafe_code,
                reason = "sound: tiles are configured, and read and write two blocks of these arrays"
            )]
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tileloadd tmm2, [{x} + {x_stride}]",
                    "tileloadd tmm4, [{w} + {stride}]",
                    "tdpbssd tmm0, tmm2, tmm4",
                    "tilezero tmm1",
                    "tileloadd tmm3, [{x} + {x_stride} + {x_block}]",
                    "tileloadd tmm5, [{w} + {stride} + {w_block}]",
                    "tdpbssd tmm1, tmm3, tmm5",
                    "tilestored [{dots} + {stride}], tmm0",
                    "tilestored [{dots} + {stride} + {dots_block}], tmm1",
                    x = in(reg) x.as_ptr(),
                    w = in(reg) w.as_ptr(),
                    dots = in(reg) dots.as_mut_ptr(),
                    x_stride = in(reg) BLOCK,
                    stride = in(reg) size_of::<Line>(),
                    x_block = const TILE_ROWS * BLOCK,
                    w_block = const LINES * size_of::<Line>(),
                    dots_block = const size_of::<Tile>(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                    options(nostack),
                );
            }
        }
    }

    /// Scales them and adds them to `y`, block after block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
    fn add(&self, x: Group<'_>, blocks: Range<usize>, y: &mut [[f32; OUTPUTS]; TILE_ROWS]) {
        let mut sums = [_mm512_setzero_ps(); TILE_ROWS];
        for r in 0..TILE_ROWS {
            #[expect(
                unsafe_code,
                reason = "sound: sixteen floats are there, and the load needs no alignment"
            )]
            unsafe {
                sums[r] = _mm512_loadu_ps(y[r].as_ptr());
            }
        }
        let x_scales = &x.scales[blocks.start * TILE_ROWS..blocks.end * TILE_ROWS];
        let of_blocks = x_scales.as_chunks::<TILE_ROWS>().0.iter().zip(&self.scales).zip(&self.dots);
        for ((x_scales, w_scales), dots) in of_blocks {
            #[expect(
                unsafe_code,
                reason = "sound: sixteen floats are there, and the load needs no alignment"
            )]
            let w_scales = unsafe { _mm512_loadu_ps(w_scales.as_ptr()) };
            for r in 0..TILE_ROWS {
                let scale = _mm512_mul_ps(w_scales, _mm512_set1_ps(x_scales[r]));
                #[expect(
                    unsafe_code,
                    reason = "sound: sixteen numbers are there, and the load needs no alignment"
                )]
                let dots = unsafe { _mm512_loadu_si512(dots[r].as_ptr().cast()) };
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale, sums[r]);
            }
        }
        for r in 0..TILE_ROWS {
            #[expect(
                unsafe_code,
                reason = "sound: sixteen floats are there, and the store needs no alignment"
            )]
            unsafe {
                _mm512_storeu_ps(y[r].as_mut_ptr(), sums[r]);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(line: &mut Line, numbers: __m512i) {
    #[expect(unsafe_code, reason = "sound: 64 bytes are there, and the store needs no alignment")]
    unsafe {
        _mm512_storeu_si512(line.as_mut_ptr().cast(), numbers);
    }
}
