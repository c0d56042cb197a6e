//! What measures and what breaks: tools that run the real program from outside and judge what its clients see.

pub mod chaos;
