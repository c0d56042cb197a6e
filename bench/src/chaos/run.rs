//! One run: start, ask in peace, ask while things happen, judge.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use proto::v1::{self, router_client::RouterClient};
use serde_json::{Value, json};
use telemetry::Tasks;
use tokio::time::Instant;
use tonic::transport::Endpoint;

use super::{
    cluster::{Cluster, Role},
    history::History,
    load::{self, Answer, QUESTIONS_MAX},
    scenario::{Action, Plan},
    verdict::{Observed, Seen, judge},
};

const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How often routers are asked how they see the world.
const OBSERVE_INTERVAL: Duration = Duration::from_millis(50);
/// How long after the last event and answer it is still looked whether the cluster has recovered.
const AFTERMATH: Duration = Duration::from_secs(12);

/// Runs `plan`; true if every check holds.
pub(crate) async fn run(
    plan: &Plan,
    program: &Path,
    model: &Path,
    out: Option<&Path>,
) -> anyhow::Result<bool> {
    let temporary = tempfile::Builder::new().prefix("shoal-chaos-").tempdir()?;
    let dir = out.map_or_else(|| temporary.path().to_owned(), |out| out.join(&plan.name));
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let history = Arc::new(History::begin(&dir.join("history.jsonl"), plan)?);
    let tasks = Tasks::new();
    let scenario = &plan.scenario;
    say(&format!("{}: {}", plan.name, scenario.about));
    let mut cluster =
        Cluster::start(&scenario.cluster, program, model, &dir, plan.seed, &tasks, &history).await?;
    let seen = observe_and_ask(plan, &mut cluster, &tasks, &history).await;
    tasks.begin_shutdown();
    let verdicts = judge(scenario, &seen?);
    drop(cluster);
    let mut holds = true;
    for verdict in &verdicts {
        history.note("verdict", &serde_json::to_value(verdict)?);
        let mark = if verdict.holds { "ok  " } else { "FAIL" };
        say(&format!("  {mark} {:34} {:>18}   {}", verdict.check, verdict.value, verdict.bound));
        holds &= verdict.holds;
    }
    if !holds {
        let kept = if out.is_none() { temporary.keep() } else { dir };
        say(&format!("  history and logs: {}", kept.display()));
        say(&format!("  again: shoal chaos --replay {}/history.jsonl", kept.display()));
    }
    Ok(holds)
}

/// Progress and results are for people: a closed stdout costs nothing.
fn say(line: &str) {
    use std::io::Write as _;
    let _closed = writeln!(std::io::stdout(), "{line}");
}

async fn observe_and_ask(
    plan: &Plan,
    cluster: &mut Cluster,
    tasks: &Tasks,
    history: &Arc<History>,
) -> anyhow::Result<Observed> {
    let scenario = &plan.scenario;
    wait_until_whole(cluster, scenario.cluster.replicas).await?;
    // A short run asks few questions, or it would know none of its answers.
    let n_questions = if scenario.load.requests == 0 { QUESTIONS_MAX } else { scenario.load.requests };
    let n_questions = n_questions.min(plan.questions_max).max(scenario.load.clients);
    let questions: Arc<Vec<Value>> = Arc::new(load::questions(plan.seed, n_questions));
    // In peace, twice: the first warms up, the second is the measure.
    let clients = scenario.load.clients;
    let mut peaceful = Vec::new();
    for _ in 0..2 {
        peaceful = ask_all(cluster, &questions, clients, n_questions, Duration::ZERO, tasks).await.answers;
    }
    if let Some(failed) = peaceful.iter().find(|answer| answer.error.is_some()) {
        bail!("an answer failed in peace: {failed:?}");
    }
    history.note("peace", &json!({ "answers": peaceful.len() }));

    let views: Arc<Mutex<Vec<Seen>>> = Arc::default();
    let began = Instant::now();
    let routers: Arc<Mutex<Vec<std::net::SocketAddr>>> = Arc::default();
    let watching = tasks.clone();
    {
        let (views, routers, stop, history) =
            (Arc::clone(&views), Arc::clone(&routers), tasks.clone(), Arc::clone(history));
        watching.spawn("observer", async move {
            tokio::select! {
                () = stop.shutting_down() => {}
                () = observe(&routers, &views, began, &history) => {}
            }
        });
    }
    let tell = |cluster: &Cluster| {
        let up = cluster.of(Role::Router).filter(|member| member.is_up()).filter_map(|member| member.address);
        *routers.lock().unwrap_or_else(PoisonError::into_inner) = up.collect();
    };
    tell(cluster);
    let load = ask_in_background(
        cluster,
        &questions,
        clients,
        scenario.load.requests,
        scenario.load.lasts,
        tasks,
        began,
    );
    let mut events = Vec::new();
    for event in &scenario.events {
        tokio::time::sleep_until(began + event.at).await;
        let started = began.elapsed();
        cluster.apply(event).await?;
        tell(cluster);
        events.push((started, began.elapsed(), event.clone()));
    }
    let (asked, registered) = tokio::join!(load, registered_once(plan, cluster, began));
    let (asked, registered) = (asked.context("the clients have gone")?, registered?);
    for answer in &asked.answers {
        history.note("answer", &serde_json::to_value(answer)?);
    }
    cluster.mend()?;
    aftermath(plan, &views).await;
    let observed = Observed {
        peaceful,
        answers: asked.answers,
        took: asked.took,
        events,
        seen: views.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        registered,
        fallen: cluster.fallen(),
    };
    Ok(observed)
}

/// What the clients got.
pub(crate) struct Asked {
    pub(crate) answers: Vec<Answer>,
    pub(crate) took: Duration,
}

async fn ask_all(
    cluster: &Cluster,
    questions: &Arc<Vec<Value>>,
    clients: usize,
    n: usize,
    lasts: Duration,
    tasks: &Tasks,
) -> Asked {
    ask_in_background(cluster, questions, clients, n, lasts, tasks, Instant::now())
        .await
        .unwrap_or(Asked { answers: Vec::new(), took: Duration::ZERO })
}

/// `clients` at once, `n` requests and at least as long as `lasts`.
fn ask_in_background(
    cluster: &Cluster,
    questions: &Arc<Vec<Value>>,
    clients: usize,
    n: usize,
    lasts: Duration,
    tasks: &Tasks,
    began: Instant,
) -> tokio::sync::oneshot::Receiver<Asked> {
    let (done, asked) = tokio::sync::oneshot::channel();
    let next = Arc::new(AtomicUsize::new(0));
    let ends = began + lasts;
    let ask_one_after_the_other =
        move |gateways: load::Gateways, questions: Arc<Vec<Value>>, next: Arc<AtomicUsize>| async move {
            let mut answers = Vec::new();
            loop {
                let at = next.fetch_add(1, Relaxed);
                if at >= n && Instant::now() >= ends {
                    return answers;
                }
                let question = at % questions.len();
                answers.push(load::ask(&gateways, at, question, &questions[question], began).await);
            }
        };
    let all = (0..clients)
        .map(|_| {
            ask_one_after_the_other(Arc::clone(&cluster.gateways), Arc::clone(questions), Arc::clone(&next))
        })
        .collect::<Vec<_>>();
    tasks.spawn("clients", async move {
        let started = Instant::now();
        let answers = futures_util::future::join_all(all).await.into_iter().flatten().collect();
        let asked = Asked { answers, took: started.elapsed() };
        let _gone = done.send(asked);
    });
    asked
}

async fn wait_until_whole(cluster: &Cluster, replicas: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY_TIMEOUT;
    let n_experts = cluster.of(Role::Expert).count();
    loop {
        let mut whole = true;
        for router in cluster.of(Role::Router) {
            let status = match router.address {
                Some(address) => status(address).await,
                None => None,
            };
            whole &= status.is_some_and(|status| {
                let served = status
                    .servers
                    .iter()
                    .filter(|server| server.state == "ready" && server.transport != "inside")
                    .count();
                status.ready && served == n_experts && (replicas > n_experts || status.under_replicated == 0)
            });
        }
        if whole {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the cluster is not whole within {READY_TIMEOUT:?}");
        }
        tokio::time::sleep(OBSERVE_INTERVAL).await;
    }
}

async fn status(address: std::net::SocketAddr) -> Option<v1::RouterStatus> {
    let ask = async {
        let channel = Endpoint::from_shared(format!("http://{address}")).ok()?.connect().await.ok()?;
        Some(RouterClient::new(channel).status(v1::RouterStatusRequest {}).await.ok()?.into_inner())
    };
    tokio::time::timeout(Duration::from_millis(500), ask).await.ok().flatten()
}

async fn observe(
    routers: &Mutex<Vec<std::net::SocketAddr>>,
    views: &Mutex<Vec<Seen>>,
    began: Instant,
    history: &History,
) {
    let mut last = Value::Null;
    loop {
        let addresses = routers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for address in addresses {
            if let Some(status) = status(address).await {
                let seen = Seen::new(began.elapsed(), address, &status);
                let summary = seen.summary();
                if summary != last {
                    history.note("seen", &summary);
                    last = summary;
                }
                views.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
            }
        }
        tokio::time::sleep(OBSERVE_INTERVAL).await;
    }
}

/// Waits until the cluster has recovered, or long enough.
async fn aftermath(plan: &Plan, views: &Mutex<Vec<Seen>>) {
    let ends = Instant::now() + AFTERMATH;
    let checks = &plan.scenario.check;
    let recovered = || {
        let views = views.lock().unwrap_or_else(PoisonError::into_inner);
        let last = views.last();
        last.is_some_and(|seen| seen.under_replicated == 0 && seen.ejected.is_empty())
    };
    let needs = checks.replicated_within.is_some() || checks.readmitted_within.is_some();
    while needs && !recovered() && Instant::now() < ends {
        tokio::time::sleep(OBSERVE_INTERVAL).await;
    }
}

/// When each living expert server was registered exactly once, since the last event.
async fn registered_once(plan: &Plan, cluster: &Cluster, began: Instant) -> anyhow::Result<Option<Duration>> {
    if plan.scenario.check.registered_within.is_none() {
        return Ok(None);
    }
    let ends = Instant::now() + AFTERMATH + AFTERMATH;
    let last_event = plan.scenario.events.iter().rev().find(|event| event.action != Action::Thaw);
    let since = last_event.map_or(Duration::ZERO, |event| event.at);
    let tasks = Tasks::new();
    let registry: cluster::Registry = cluster.registry().parse()?;
    let session = cluster::Session::open(&registry, &tasks)?;
    let mut members = session.members(cluster::Role::Expert);
    let mut alive: Vec<String> = cluster
        .of(Role::Expert)
        .filter(|member| member.is_up())
        .filter_map(|member| member.advertised())
        .map(|address| address.to_string())
        .collect();
    alive.sort();
    let mut found = None;
    while Instant::now() < ends {
        let mut registered: Vec<String> =
            members.borrow_and_update().members.values().map(|member| member.address.clone()).collect();
        registered.sort();
        if registered == alive {
            found = Some(began.elapsed().saturating_sub(since));
            break;
        }
        let _late = tokio::time::timeout(OBSERVE_INTERVAL, members.changed()).await;
    }
    tasks.begin_shutdown();
    Ok(found)
}
