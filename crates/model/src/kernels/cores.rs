//! The cores that threads may run on, and keeping a thread on one of them.

#[cfg(target_os = "linux")]
pub(super) use linux::{allowed, current, pin};

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
pub(super) fn current() -> Option<usize> {
    None
}
