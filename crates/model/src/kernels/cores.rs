//! The cores that threads may run on, and keeping a thread on one of them.

#[cfg(target_os = "linux")]
pub(super) use linux::{allowed, current, interrupt_nobody, pin};

#[cfg(target_os = "linux")]
mod linux {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

    /// Those that this thread may run on; none if the system does not say.
    pub(in super::super) fn allowed() -> Vec<usize> {
        let set = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
        (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect()
    }

    /// Keeps this thread on `core`. A core that has gone meanwhile leaves it where it is.
    pub(in super::super) fn pin(core: usize) {
        let mut set = CpuSet::new();
        set.set(core);
        let _gone = sched_setaffinity(None, &set);
    }

    /// Has this thread, when it is woken, wait until its core is free instead of interrupting whoever runs there. A policy that
    /// somebody chose for it stays.
    pub(in super::super) fn interrupt_nobody() {
        let priority = libc::sched_param { sched_priority: 0 };
        #[expect(unsafe_code, reason = "sound: 0 is this thread, and what is read is here")]
        unsafe {
            if libc::sched_getscheduler(0) == libc::SCHED_OTHER {
                libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const priority);
            }
        }
    }

    /// The core that this thread runs on now.
    pub(in super::super) fn current() -> Option<usize> {
        Some(sched_getcpu())
    }
}

/// Other systems place threads as they like.
#[cfg(not(target_os = "linux"))]
pub(super) fn allowed() -> Vec<usize> {
    Vec::new()
}

#[cfg(not(target_os = "linux"))]
pub(super) fn pin(_core: usize) {}

#[cfg(not(target_os = "linux"))]
pub(super) fn interrupt_nobody() {}

#[cfg(not(target_os = "linux"))]
pub(super) fn current() -> Option<usize> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn policy() -> i32 {
        #[expect(unsafe_code, reason = "sound: 0 is this thread")]
        unsafe {
            libc::sched_getscheduler(0)
        }
    }

    #[test]
    fn a_thread_that_interrupts_nobody_has_the_policy_for_that_or_keeps_its_own() {
        let changed = || {
            let before = policy();
            interrupt_nobody();
            (before, policy())
        };
        let (before, after) = std::thread::spawn(changed).join().unwrap();
        assert_eq!(after, if before == libc::SCHED_OTHER { libc::SCHED_BATCH } else { before });
    }
}
