//! What an expert server says of itself → a holder, or a refusal.

use std::collections::BTreeMap;

use cluster::Holder;
use ids::{Epoch, ExpertId, LayerId, WeightsHash};
use proto::{Code, Error, v1};

/// What a server must agree with before it gets a frame.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) checkpoint: String,
    pub(crate) hidden_size: usize,
}

impl Identity {
    /// A holder, or a refusal that says which side has what.
    pub(crate) fn check(&self, address: &str, status: v1::ExpertStatus) -> Result<Holder, Error> {
        let refuse = |message: String| Err(Error::new(Code::InvalidArgument, "refused", message));
        if status.wire_version != proto::WIRE_VERSION {
            return refuse(format!(
                "{address} speaks wire version {}, this router {}",
                status.wire_version,
                proto::WIRE_VERSION
            ));
        }
        if status.checkpoint != self.checkpoint {
            return refuse(format!(
                "{address} serves checkpoint {}, this router {}",
                status.checkpoint, self.checkpoint
            ));
        }
        if status.hidden_size as usize != self.hidden_size {
            return refuse(format!(
                "{address} has hidden_size {}, this router {}",
                status.hidden_size, self.hidden_size
            ));
        }
        if !matches!(status.state.as_str(), "ready" | "draining") {
            return Err(Error::new(Code::Unavailable, "not_ready", format!("{address} is {}", status.state)));
        }
        let mut holds = BTreeMap::new();
        for layer in status.holds {
            if layer.weights.len() != layer.experts.len() {
                return refuse(format!(
                    "{address} names {} experts of layer {} and {} hashes of weights",
                    layer.experts.len(),
                    layer.layer,
                    layer.weights.len()
                ));
            }
            let experts =
                layer.experts.into_iter().map(ExpertId).zip(layer.weights.into_iter().map(WeightsHash));
            holds.extend(experts.map(|(expert, weights)| ((LayerId(layer.layer), expert), weights)));
        }
        Ok(Holder {
            instance: status.instance.as_str().into(),
            address: address.to_owned(),
            epoch: Epoch(status.epoch),
            holds,
            draining: status.state == "draining",
            reads_blocks: status.reads_blocks,
            inside: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut v1::ExpertStatus), expected: Result<usize, &str>) {
        let identity = Identity { checkpoint: "abc".into(), hidden_size: 64 };
        let mut status = v1::ExpertStatus {
            instance: "expert-1".into(),
            wire_version: proto::WIRE_VERSION,
            checkpoint: "abc".into(),
            hidden_size: 64,
            holds: vec![v1::LayerExperts { layer: 1, experts: vec![0, 1], weights: vec![7, 8] }],
            state: "ready".into(),
            ..v1::ExpertStatus::default()
        };
        change(&mut status);
        let result = identity.check("host:1", status);
        assert_eq!(
            result.map(|holder| holder.n_experts()).map_err(|error| error.message),
            expected.map_err(str::to_owned)
        );
    }

    #[test]
    fn a_server_of_another_kind_is_refused_with_both_sides_named() {
        check(|_| {}, Ok(2));
        check(|status| status.wire_version = 9, Err("host:1 speaks wire version 9, this router 4"));
        check(|status| status.checkpoint = "x".into(), Err("host:1 serves checkpoint x, this router abc"));
        check(|status| status.hidden_size = 32, Err("host:1 has hidden_size 32, this router 64"));
        check(|status| status.state = "loading".into(), Err("host:1 is loading"));
        check(
            |status| status.holds[0].weights.truncate(1),
            Err("host:1 names 2 experts of layer 1 and 1 hashes of weights"),
        );
    }
}
