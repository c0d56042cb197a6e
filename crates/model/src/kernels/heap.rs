//! The heap of a process that computes: a step's rows lie where the last step's lay.

/// Free memory at the end of the main heap that stays with the process. A heap of other threads is at most 64 MiB and stays.
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
const KEPT_BYTES: i32 = 256 << 20;

/// What is larger is mapped by itself and given back when it is freed: half of what a heap of other threads can have.
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
const MAPPED_BYTES: i32 = 32 << 20;

/// Lets the allocator keep what is freed; to be called before another thread is started. By itself, glibc gives back what is
/// free at the end of a heap beyond twice its largest block so far; the system then clears it again page by page when the
/// next layer asks for it, which took a tenth of a prefill's time. Other allocators are left as they are.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
    {
        #[expect(unsafe_code, reason = "the C library's settings")]
        // SAFETY: it takes numbers. Called while other threads allocate it would be a race of words that are read alone.
        let taken = unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES) == 1
                && libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES) == 1
        };
        debug_assert!(taken, "glibc takes these numbers");
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
mod tests {
    use std::{fs, hint::black_box};

    /// Pages that this thread has been given.
    fn faults() -> Option<u64> {
        let stat = fs::read_to_string("/proc/thread-self/stat").ok()?;
        // Behind the name, which may have blanks in it, `minflt` is the eighth.
        stat.rsplit_once(')')?.1.split_whitespace().nth(7)?.parse().ok()
    }

    #[test]
    fn a_step_finds_its_memory_where_the_last_one_left_it() {
        // Several blocks: of one alone, glibc keeps as much by itself.
        const BLOCKS: usize = 6;
        const N: usize = 1 << 18;
        let step = || drop(black_box([(); BLOCKS].map(|()| vec![1.0_f32; N])));
        super::keep_freed();
        step();
        let pages = (0..4).map(|_| {
            let before = faults().unwrap();
            step();
            faults().unwrap() - before
        });
        // The least: a test beside this one may have taken the place of one step.
        let pages = pages.min().unwrap();
        assert!(pages < 100, "{pages} pages of 4 KiB were taken anew for {BLOCKS} times {N} numbers");
    }
}
