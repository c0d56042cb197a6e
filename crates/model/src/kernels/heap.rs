//! The heap of a process that computes: a step's rows lie where the last step's lay.

/// Freed memory at the end of a heap that stays with the process. The rows of a long prefill step, of this process and of
/// its sockets, are less.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES: i32 = 256 << 20;

/// What is larger is mapped by itself and given back when it is freed. The most that glibc takes.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES: i32 = 32 << 20;

/// Lets the allocator keep what is freed. By itself, glibc gives back what is free at the end of its heap beyond some
/// hundred KiB to some MiB; the system then clears it again page by page when the next layer asks for it, which took a tenth
/// of a prefill's time. Other allocators are left as they are.
pub(crate) fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(unsafe_code, reason = "the C library's settings")]
        // SAFETY: it takes two numbers, and locks what it changes.
        let taken = unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES) == 1
                && libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES) == 1
        };
        debug_assert!(taken, "glibc takes these numbers");
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
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
        const N: usize = 4 << 20;
        let step = || drop(black_box(vec![1.0_f32; N]));
        super::keep_freed();
        step();
        let before = faults().unwrap();
        step();
        let pages = faults().unwrap() - before;
        assert!(pages < 100, "{pages} pages of 4 KiB were taken anew for {N} numbers");
    }
}
