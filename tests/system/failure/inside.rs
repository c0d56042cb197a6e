//! Routers that hold experts themselves, beside servers that go away.

use super::*;

/// Every expert is in the router and on a server. How much the server gets to do depends on how fast it answers.
async fn twice() -> Cluster {
    let cluster = Cluster::builder(&endless()).router_args(&["--shard", "1/1"]).start().await;
    // Ready with what the router holds, it does not wait for the server.
    wait_for("both holders", async || {
        let servers = cluster.router_status().await.servers;
        let ready = servers.iter().filter(|server| server.state == "ready");
        let mut transports: Vec<_> = ready.map(|server| server.transport.as_str()).collect();
        transports.sort_unstable();
        if transports == ["inside", "unix"] { Ok(()) } else { Err(format!("{servers:?}")) }
    })
    .await;
    cluster
}

#[tokio::test]
async fn a_killed_servers_work_is_done_in_the_router() {
    let mut cluster = twice().await;
    let streams = long_streams(&cluster.http(), 4).await;
    cluster.experts[0].process.kill();
    assert_undisturbed(streams).await;
}

#[tokio::test]
async fn a_frozen_servers_work_is_done_in_the_router() {
    let cluster = twice().await;
    let streams = long_streams(&cluster.http(), 4).await;
    cluster.experts[0].process.freeze();
    assert_undisturbed(streams).await;
}

#[tokio::test]
async fn what_the_router_does_not_hold_is_missed_by_name() {
    let builder = Cluster::builder(&needs_expert_3().write()).placement(&["3"]);
    let mut cluster = builder.router_args(&["--experts", "0-2", "--expert-wait", "1s"]).start().await;
    assert_answers(&cluster.http()).await;
    cluster.experts[0].process.kill();
    wait_for("missing expert", async || {
        let status = cluster.router_status().await;
        if status.missing.is_empty() { Err("none") } else { Ok(()) }
    })
    .await;
    assert_names_expert_3(&post(cluster.http()).await);
    cluster.restart_expert(0).await;
    cluster.servers_ready().await;
    assert_answers(&cluster.http()).await;
}
