use proptest::prelude::*;

use super::*;
use crate::kernels::{Factors, Product, RmsNorm, products as multiply, tests::bits as of};

fn packed(bits: Bits, w: &[f32], width: usize) -> Vec<u8> {
    let mut packed = vec![0; bits.matrix_bytes(w.len() / width, width)];
    pack(bits, w, width, &mut packed);
    packed
}

/// By tasks of some panels each, the last panel not whole.
fn products(isa: Isa, bits: Bits, x: &Rows, packed: &[u8], width: usize) -> Vec<f32> {
    let outputs = packed.len() / bits.panel_bytes(width) * OUTPUTS - 5;
    let mut y = vec![MaybeUninit::new(f32::NAN); x.n_rows * outputs];
    for mut columns in Columns::split(&mut y, outputs, 3 * OUTPUTS) {
        let panels = columns.range().start / OUTPUTS..columns.range().end.div_ceil(OUTPUTS);
        rows_with_panels(isa, bits, x, packed, width, panels, &mut columns);
    }
    #[expect(unsafe_code, reason = "sound: all were numbers before")]
    let y: Vec<f32> = y.into_iter().map(|y| unsafe { y.assume_init() }).collect();
    assert!(!y.iter().any(|y| y.is_nan()), "{isa:?} leaves a number as it was");
    y
}

/// Of some blocks, and of more than are taken at a time.
fn widths() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 1_usize..100, 1 => 250_usize..270, 1 => 500_usize..530]
}

/// Through the way that everything takes.
fn matmul(bits: Bits, x: &[f32], w: &[f32], width: usize) -> Vec<f32> {
    let (rows, bytes) = (Rows::quantize(x, width), packed(bits, w, width));
    let factors = Factors::Packed(&rows, bits, &bytes);
    multiply(&[Product { width, outputs: w.len() / width, factors }]).remove(0)
}

proptest! {
    #[test]
    fn products_have_the_same_bits_everywhere_and_alone(
        (width, x, w) in (widths(), 1_usize..20, 1_usize..100).prop_flat_map(|(width, rows, outputs)| {
            let values = |n: usize| proptest::collection::vec(-8.0_f32..8.0, n * width);
            (Just(width), values(rows), values(outputs))
        })
    ) {
        let rows = Rows::quantize(&x, width);
        for bits in [Bits::Eight, Bits::Four] {
            let packed = packed(bits, &w, width);
            let wanted = products(Isa::Baseline, bits, &rows, &packed, width);
            for isa in Isa::all() {
                let rows = Rows::quantize_for(isa, &x, width);
                prop_assert_eq!(of(&products(isa, bits, &rows, &packed, width)), of(&wanted), "{:?} {:?}", isa, bits);
            }
            let n = wanted.len() / rows.n_rows;
            for (row, x) in x.chunks_exact(width).enumerate() {
                let alone = products(Isa::detect(), bits, &Rows::quantize(x, width), &packed, width);
                prop_assert_eq!(of(&alone), of(&wanted[row * n..][..n]));
            }
        }
    }

    /// What a packed matrix reads back as is within half a step of what it was, and its products are those of the
    /// numbers that it reads back as.
    #[test]
    fn a_packed_matrix_is_within_half_a_step(w in proptest::collection::vec(-8.0_f32..8.0, 20 * 45)) {
        const WIDTH: usize = 45;
        for (bits, steps) in [(Bits::Eight, 127.0), (Bits::Four, 8.0)] {
            let packed = packed(bits, &w, WIDTH);
            for output in 0..20 {
                let mut read = Vec::new();
                unpack_row(bits, &packed, WIDTH, output, &mut read);
                for (read, w) in read.chunks(BLOCK).zip(w[output * WIDTH..][..WIDTH].chunks(BLOCK)) {
                    let largest = w.iter().fold(0.0_f32, |largest, w| largest.max(w.abs()));
                    for (read, w) in read.iter().zip(w) {
                        // Half a step; a whole one for the largest of the other sign, which has no number of its own.
                        // bf16 rounds the step by 1/256 at most.
                        let half = if bits == Bits::Four && w.abs() > largest * 0.93 { 1.0 } else { 0.5 };
                        prop_assert!((read - w).abs() <= largest / steps * (half + 0.04) + largest / 200.0,
                            "{bits:?}: {w} reads {read}, the largest is {largest}");
                    }
                }
                let mut unit = [0.0; WIDTH];
                unit[output] = 127.0;
                let product = products(Isa::detect(), bits, &Rows::quantize(&unit, WIDTH), &packed, WIDTH);
                prop_assert!((product[output] / 127.0 - read[output]).abs() <= read[output].abs() * 1e-6);
            }
        }
    }
}

/// int4 is the smallest number and then the largest of all others, stored as 0 and 15: the sums that are largest in 16 bits.
#[test]
fn the_extremes_do_not_overflow() {
    const WIDTH: usize = 64;
    for (bits, first, other) in [(Bits::Eight, 1.0, 1.0), (Bits::Four, -8.0, 7.0), (Bits::Four, 1.0, 1.0)] {
        let of_block = |at: usize| if at.is_multiple_of(BLOCK) { first } else { other };
        for (x, sign) in [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)] {
            let w: Vec<f32> = (0..16 * WIDTH).map(|at| sign * of_block(at)).collect();
            let (packed, wanted) = (packed(bits, &w, WIDTH), x * w[..WIDTH].iter().sum::<f32>());
            for isa in Isa::all() {
                for n_rows in [1, 2, 3, 4, 8, 9, 10, 17] {
                    let rows = |isa| Rows::quantize_for(isa, &vec![x; n_rows * WIDTH], WIDTH);
                    let y = products(isa, bits, &rows(isa), &packed, WIDTH);
                    let scalar = products(Isa::Baseline, bits, &rows(Isa::Baseline), &packed, WIDTH);
                    assert_eq!(of(&y), of(&scalar), "{isa:?} {bits:?}, {n_rows} rows");
                    for y in y {
                        let is_near = (y - wanted).abs() < 0.005 * wanted.abs();
                        assert!(is_near, "{isa:?} {bits:?}: {y}, wanted {wanted}");
                    }
                }
            }
        }
    }
}

/// More rows and blocks than go through at a time, and some that do not fill a group, a pass or a turn.
#[test]
fn many_rows_are_each_as_alone() {
    const WIDTH: usize = (2 * BLOCKS + 3) * BLOCK - 20;
    const OUTPUTS: usize = 60;
    const ROWS: usize = 500;
    let x: Vec<f32> = (0..ROWS * WIDTH).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
    let w: Vec<f32> = (0..OUTPUTS * WIDTH).map(|i| ((i * 31) % 100) as f32 / 50.0 - 1.0).collect();
    for bits in [Bits::Eight, Bits::Four] {
        let packed = packed(bits, &w, WIDTH);
        let gated = |isa, x: &[f32]| {
            let rows = &Rows::quantize_for(isa, x, WIDTH);
            let gated = Gated { bits, gate: &packed, up: &packed, outputs: OUTPUTS, rows, width: WIDTH };
            let mut result = gated.result(isa);
            Blocks::split(&mut result, gated.n_blocks(), 1)
                .for_each(|mut blocks| gated.compute(isa, &mut blocks));
            result
        };
        let alone: Vec<_> =
            x.chunks_exact(WIDTH).map(|x| (matmul(bits, x, &w, WIDTH), gated(Isa::Baseline, x))).collect();
        // In several tasks.
        for (y, alone) in matmul(bits, &x, &w, WIDTH).chunks_exact(OUTPUTS).zip(&alone) {
            assert_eq!(of(y), of(&alone.0));
        }
        for isa in Isa::all() {
            for n_rows in [2, 3, 4, 5, 6, 7, 8, 9, 15, 50, 128, 129, 130, 133, 135, 261, ROWS] {
                let x = &x[..n_rows * WIDTH];
                let products = products(isa, bits, &Rows::quantize_for(isa, x, WIDTH), &packed, WIDTH);
                let together = gated(isa, x);
                let n = products.len() / n_rows;
                for (row, (y, (alone, of_gated))) in products.chunks_exact(n).zip(&alone).enumerate() {
                    assert_eq!(
                        of(&y[..n.min(OUTPUTS)]),
                        of(&alone[..n.min(OUTPUTS)]),
                        "{isa:?}, {n_rows} rows"
                    );
                    for block in 0..OUTPUTS.div_ceil(BLOCK) {
                        let (scale, numbers) = together.block(row, block);
                        let (wanted, wanted_numbers) = of_gated.block(0, block);
                        assert_eq!((scale.to_bits(), numbers), (wanted.to_bits(), wanted_numbers));
                    }
                }
            }
        }
    }
}

#[test]
fn every_pass_begins_with_a_group() {
    for isa in Isa::all() {
        for n_rows in 1..600 {
            let rows = Rows::zeros(isa, n_rows, BLOCK);
            let pass = rows.pass_rows();
            assert!(pass == n_rows || pass.is_multiple_of(rows.group), "{isa:?}: {pass} of {n_rows} rows");
            assert!(pass <= ROWS_PASS + TILE_ROWS && n_rows.div_ceil(pass) <= n_rows.div_ceil(ROWS_PASS));
            if isa.widens() {
                assert_eq!(rows.group, WIDE_ROWS);
            } else if rows.group == TILE_ROWS {
                assert!(isa.has_tiles() && rows.n_places.is_multiple_of(TILE_ROWS));
            } else if isa.pairs_panels() && n_rows > GROUP {
                assert!(rows.group <= PAIRED_ROWS);
            } else {
                assert!(rows.group >= GROUP);
            }
        }
    }
}

/// The indexer's scores, over its positions by turns of two panels, an odd last one, and one that is not whole.
#[test]
fn what_is_positive_is_summed_in_the_order_of_rows() {
    const WIDTH: usize = 128;
    const OUTPUTS: usize = 40;
    let number = |i: usize| ((i * 7919) % 1000) as f32 / 500.0 - 1.0;
    let w: Vec<f32> = (0..OUTPUTS * WIDTH).map(|i| number(3 * i + 1)).collect();
    let packed = packed(Bits::Eight, &w, WIDTH);
    for n_rows in [1, 3, 8, 9, 13, 64] {
        let x: Vec<f32> = (0..n_rows * WIDTH).map(number).collect();
        let weights: Vec<f32> = (0..n_rows).map(|row| number(row + 5)).collect();
        let mut sums = [f32::NAN; OUTPUTS];
        sum_of_positive(&Rows::quantize(&x, WIDTH), &weights, &packed, WIDTH, &mut sums);
        let products = matmul(Bits::Eight, &x, &w, WIDTH);
        let mut wanted = [0.0_f32; OUTPUTS];
        for (products, weight) in products.chunks_exact(OUTPUTS).zip(&weights) {
            for (sum, product) in wanted.iter_mut().zip(products) {
                *sum += weight * product.max(0.0);
            }
        }
        for (sum, wanted) in sums.iter().zip(wanted) {
            assert!(
                (sum - wanted).abs() <= 1e-4 * wanted.abs().max(1.0),
                "{n_rows} rows: {sum}, wanted {wanted}"
            );
        }
    }
}

/// As a frame for nobody has, or a batch between two steps.
#[test]
fn no_rows_have_no_products() {
    for bits in [Bits::Eight, Bits::Four] {
        assert!(matmul(bits, &[], &[1.0; 20 * 40], 40).is_empty());
        let (rows, packed) = (&Rows::quantize(&[], 40), packed(bits, &[1.0; 20 * 40], 40));
        let gated = Gated { bits, gate: &packed, up: &packed, outputs: 20, rows, width: 40 };
        assert_eq!(crate::kernels::gated_beside(&[gated], || ()).1[0].n_rows(), 0);
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for bits in [Bits::Eight, Bits::Four] {
            let (mut x, mut w) = ([1.0; 40], [1.0; 40]);
            x[33] = bad;
            let product = |x: &[f32], w: &[f32]| matmul(bits, x, w, 40)[0];
            assert!(!product(&x, &w).is_finite(), "{bad} in a row, {bits:?}");
            x[33] = 1.0;
            w[33] = bad;
            assert!(!product(&x, &w).is_finite(), "{bad} in a matrix, {bits:?}");
            let mut rows = vec![1.0; 12 * 40];
            rows[5 * 40 + 33] = bad;
            for (row, y) in matmul(bits, &rows, &[1.0; 40], 40).iter().enumerate() {
                assert_eq!(y.is_finite(), row != 5, "{bad} in one of many rows, {bits:?}");
            }
        }
    }
}

/// Numbers too small for their inverse to be one, and zeros.
#[test]
fn the_smallest_numbers_are_small() {
    for tiny in [0.0, 1e-45, 1e-39, f32::MIN_POSITIVE] {
        for bits in [Bits::Eight, Bits::Four] {
            let y = matmul(bits, &[tiny; 32], &[tiny; 32], 32);
            assert!(y[0].abs() < 1e-30, "{tiny}, {bits:?}: {y:?}");
        }
    }
}

proptest! {
    /// In one pass: the same numbers, scales and sums as one after the other.
    #[test]
    fn gated_rows_are_those_of_two_products_activated_and_quantized(
        (width, x, gate, up) in (widths(), 1_usize..40, 1_usize..80).prop_flat_map(|(width, rows, outputs)| {
            let values = |n: usize| proptest::collection::vec(-2.0_f32..2.0, n * width);
            (Just(width), values(rows), values(outputs), values(outputs))
        })
    ) {
        let outputs = gate.len() / width;
        for bits in [Bits::Eight, Bits::Four] {
            let mut wanted = matmul(bits, &x, &gate, width);
            crate::kernels::silu_mul(&mut wanted, &matmul(bits, &x, &up, width));
            let [gate, up] = [&gate, &up].map(|w| packed(bits, w, width));
            for isa in Isa::all() {
                let rows = &Rows::quantize_for(isa, &x, width);
                let gated = Gated { bits, gate: &gate, up: &up, outputs, rows, width };
                let mut result = gated.result(isa);
                for mut blocks in Blocks::split(&mut result, gated.n_blocks(), 2) {
                    gated.compute(isa, &mut blocks);
                }
                let wanted = Rows::quantize_for(isa, &wanted, outputs);
                prop_assert_eq!(&result.numbers, &wanted.numbers);
                prop_assert_eq!(of(&result.scales), of(&wanted.scales));
                prop_assert_eq!(&result.biases, &wanted.biases);
                prop_assert_eq!(&result.wide, &wanted.wide);
            }
        }
    }

    /// In one pass: the same as normed, then quantized.
    #[test]
    fn rows_are_normed_and_quantized_as_one_after_the_other(
        (weight, x) in (1_usize..100, 1_usize..40).prop_flat_map(|(width, rows)| {
            let values = |n: usize| proptest::collection::vec(-2.0_f32..2.0, n * width);
            (values(1), values(rows))
        })
    ) {
        let width = weight.len();
        let norm = RmsNorm::new(weight, 1e-6);
        let wanted = norm.apply(&x);
        for isa in Isa::all() {
            let (normed, rows) = Rows::norm_quantize_for(isa, &norm, &x);
            prop_assert_eq!(of(&normed), of(&wanted));
            let wanted = Rows::quantize_for(isa, &wanted, width);
            prop_assert_eq!(&rows.numbers, &wanted.numbers);
            prop_assert_eq!(of(&rows.scales), of(&wanted.scales));
            prop_assert_eq!(&rows.biases, &wanted.biases);
            prop_assert_eq!(&rows.wide, &wanted.wide);
        }
    }

    /// Whatever order and number they are in.
    #[test]
    fn rows_that_are_selected_are_as_if_quantized_together(
        (width, x) in (1_usize..100, 1_usize..40).prop_flat_map(|(width, rows)| {
            (Just(width), proptest::collection::vec(-2.0_f32..2.0, rows * width))
        }),
        picks in proptest::collection::vec(any::<prop::sample::Index>(), 1..40),
    ) {
        let picks: Vec<usize> = picks.iter().map(|pick| pick.index(x.len() / width)).collect();
        let picked: Vec<f32> = picks.iter().flat_map(|row| &x[row * width..][..width]).copied().collect();
        for isa in Isa::all() {
            let selected = Rows::quantize_for(isa, &x, width).select_for(isa, &picks);
            let wanted = Rows::quantize_for(isa, &picked, width);
            prop_assert_eq!(&selected.numbers, &wanted.numbers);
            prop_assert_eq!(of(&selected.scales), of(&wanted.scales));
            prop_assert_eq!(&selected.biases, &wanted.biases);
            prop_assert_eq!(&selected.wide, &wanted.wide);
        }
    }

    #[test]
    fn rows_quantized_elsewhere_are_as_if_quantized_here(
        (width, x) in (1_usize..100, 1_usize..40).prop_flat_map(|(width, rows)| {
            (Just(width), proptest::collection::vec(-2.0_f32..2.0, rows * width))
        }),
    ) {
        let elsewhere = Rows::quantize_for(Isa::Baseline, &x, width);
        let block = |row, at| {
            let (scale, numbers): (f32, &[i8; BLOCK]) = elsewhere.block(row, at);
            (scale, &numbers[..BLOCK.min(width - at * BLOCK)])
        };
        for isa in Isa::all() {
            let rows = Rows::of_blocks_for(isa, x.len() / width, width, block);
            let wanted = Rows::quantize_for(isa, &x, width);
            prop_assert_eq!(&rows.numbers, &wanted.numbers);
            prop_assert_eq!(of(&rows.scales), of(&wanted.scales));
            prop_assert_eq!(&rows.biases, &wanted.biases);
            prop_assert_eq!(&rows.wide, &wanted.wide);
        }
    }

    #[test]
    fn blocks_are_quantized_the_same_everywhere(
        mut x in proptest::array::uniform32(-3.0_f32..3.0), power in -150_i32..127, odd in proptest::num::f32::ANY,
        at in 0_usize..64,
    ) {
        x = x.map(|x| x * 2.0_f32.powi(power));
        if let Some(x) = x.get_mut(at) {
            *x = odd;
        }
        let quantized = |isa| {
            let rows = Rows::quantize_for(isa, &x, BLOCK);
            (rows.numbers[0], rows.scales[0].to_bits(), rows.biases[0])
        };
        for isa in Isa::all() {
            prop_assert_eq!(quantized(isa), quantized(Isa::Baseline));
        }
    }
}
