//! How much may be sent beyond what is asked for: a token bucket that fills with the frames sent, so that hedges and
//! failovers stay a share of the traffic and cannot become a storm.

/// Tokens earned by each frame, spent by each extra one.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    tokens: f32,
    tokens_max: f32,
    per_frame: f32,
    n_spent: u64,
    n_refused: u64,
}

impl Budget {
    /// At most 8 % of all frames, and 8 at once.
    pub(super) const fn hedges() -> Self {
        Self { tokens: 8.0, tokens_max: 8.0, per_frame: 0.08, n_spent: 0, n_refused: 0 }
    }

    /// At most 20 % of all frames, and 64 at once: a server that dies fails all its frames of a layer together.
    pub(super) const fn failovers() -> Self {
        Self { tokens: 64.0, tokens_max: 64.0, per_frame: 0.2, n_spent: 0, n_refused: 0 }
    }

    pub(super) fn earn(&mut self) {
        self.tokens = (self.tokens + self.per_frame).min(self.tokens_max);
    }

    #[must_use]
    pub const fn affords(&self, n: usize) -> bool {
        self.tokens >= n as f32
    }

    /// Pays for `n` extra frames, or for none.
    pub fn spend(&mut self, n: usize) -> bool {
        let affordable = self.affords(n);
        if affordable {
            self.tokens -= n as f32;
            self.n_spent += n as u64;
        } else {
            self.n_refused += n as u64;
        }
        affordable
    }

    #[must_use]
    pub const fn n_spent(&self) -> u64 {
        self.n_spent
    }

    /// Extra frames that were not sent for lack of tokens.
    #[must_use]
    pub const fn n_refused(&self) -> u64 {
        self.n_refused
    }
}
