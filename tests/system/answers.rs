//! A question comes in, and the answer was computed by several processes.
