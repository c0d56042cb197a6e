//! An expert server that answers wrongly: nobody gets a wrong token for it.

use super::{
    stand_in::{Behaviour, StandIn},
    *,
};
use crate::harness::clients::generate;

/// A router over a real server for everything, and a stand-in that lies for all of it as well.
#[tokio::test]
async fn a_liar_beside_an_honest_server_changes_nothing_and_is_counted() {
    let model = needs_expert_3().write();
    for behaviour in Behaviour::ALL {
        let honest = Cluster::builder(&model).without_gateway().start().await;
        let mut status = honest.expert_status(0).await;
        status.instance = "stand-in".into();
        let stand_in = StandIn::start(status, behaviour).await;
        drop(honest);
        let flags = ["--dispatch-timeout", "1s"];
        let builder = Cluster::builder(&model).router_args(&flags).without_gateway();
        let mut cluster = builder.also_expert_at(stand_in.address).start().await;
        for _ in 0..10 {
            let prompt = prompt();
            let answered = generate(cluster.router.router(), &prompt, 2);
            let generated = within(BOUNDED, "answer", answered).await.expect("the honest one answers");
            assert_eq!(generated.ids, b"ok".map(u32::from), "{behaviour:?}");
        }
        let status = cluster.router_status().await;
        let counted = behaviour
            .reason()
            .map_or(status.stale_replies, |reason| status.failures.get(reason).copied().unwrap_or(0));
        assert!(counted > 0, "{behaviour:?}: {status:?}");
        if matches!(behaviour, Behaviour::NotFinite | Behaviour::OtherWeights) {
            assert!(status.ejections > 0, "{behaviour:?}: {status:?}");
        }
        cluster.idle().await;
        assert!(cluster.router.process.exit_status().is_none());
    }
}

fn prompt() -> Vec<u32> {
    b"abc>".iter().copied().map(u32::from).collect()
}

/// A router over a real server for experts 0 and 1, and a stand-in for 2 and 3.
async fn cluster_with(model: &Checkpoint, behaviour: Behaviour) -> (Cluster, StandIn) {
    let placement = Cluster::builder(model).placement(&["0,1", "2,3"]).without_gateway();
    let honest = placement.start().await;
    let mut status = honest.expert_status(1).await;
    status.instance = "stand-in".into();
    let stand_in = StandIn::start(status, behaviour).await;
    drop(honest);
    // Without calibration, which would find the stand-in out before any request.
    let flags = ["--combine", "pairs", "--expert-wait", "1s", "--dispatch-timeout", "1s"];
    let builder = Cluster::builder(model).placement(&["0,1"]).router_args(&flags).without_gateway();
    let cluster = builder.also_expert_at(stand_in.address).start().await;
    (cluster, stand_in)
}

#[tokio::test]
async fn wrong_replies_fail_the_request_by_name() {
    let model = needs_expert_3().write();
    for behaviour in Behaviour::ALL {
        let (mut cluster, _stand_in) = cluster_with(&model, behaviour).await;
        let answer = within(BOUNDED, "refusal", generate(cluster.router.router(), &prompt(), 2)).await;
        let error = proto::Error::from_status(&answer.expect_err("there is no right answer"));
        assert_eq!(error.code, proto::Code::Unavailable, "{behaviour:?}: {error:?}");
        assert!(error.message.contains("layer 1: expert 3"), "{behaviour:?}: {error:?}");
        assert!(cluster.router.process.exit_status().is_none());
        cluster.idle().await;
    }
}
