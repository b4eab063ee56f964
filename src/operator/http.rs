//! The only port of the operator: metrics and health, without secrets and without input.

use super::{Metrics, metrics::CONTENT_TYPE};
use crate::reason::{Reason, Retry};
use axum::{
    Router,
    http::{StatusCode, header},
    routing::get,
};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::net::TcpListener;

/// The server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken, or not ours.
    #[error("cannot listen on {address}; choose another address with --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Reason for ServeError {
    fn reason(&self) -> &'static str {
        "CannotListen"
    }

    fn retry(&self) -> Retry {
        Retry::Terminal
    }
}

/// What a process says of itself.
#[derive(Debug)]
pub struct Health(Mutex<State>);

#[derive(Debug)]
struct State {
    beat: Instant,
    patience: Duration,
    unready: Option<String>,
}

impl Health {
    /// Not ready yet. The process counts as alive for `patience` after each [`beat`](Self::beat).
    pub fn new(patience: Duration) -> Self {
        Self(Mutex::new(State { beat: Instant::now(), patience, unready: Some("starting".into()) }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The main loop goes round.
    pub fn beat(&self) {
        self.state().beat = Instant::now();
    }

    /// `None`: ready. Otherwise why not.
    pub fn set_unready(&self, why: Option<String>) {
        self.state().unready = why;
    }

    fn live(&self) -> Result<(), String> {
        let state = self.state();
        let silent = state.beat.elapsed();
        if silent <= state.patience { Ok(()) } else { Err(format!("the main loop stands since {silent:.0?}")) }
    }

    fn ready(&self) -> Result<(), String> {
        self.state().unready.clone().map_or(Ok(()), Err)
    }
}

fn answer(state: Result<(), String>) -> (StatusCode, String) {
    match state {
        Ok(()) => (StatusCode::OK, "ok\n".into()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

/// Serves `/metrics`, `/livez` and `/readyz` until the returned task is aborted. The address that is really listened on
/// comes back as well: port 0 takes a free one.
pub async fn serve(
    address: SocketAddr,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
) -> Result<(SocketAddr, tokio::task::JoinHandle<()>), ServeError> {
    let failed = |source| ServeError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    let (live, ready) = (Arc::clone(&health), health);
    let router = Router::new()
        .route("/metrics", get(async move || ([(header::CONTENT_TYPE, CONTENT_TYPE)], metrics.text())))
        .route("/livez", get(async move || answer(live.live())))
        .route("/readyz", get(async move || answer(ready.ready())));
    let task = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "metrics and health are no longer served");
        }
    });
    Ok((local, task))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn health_and_metrics_are_served() {
        let metrics = Arc::new(Metrics::new("controller"));
        let health = Arc::new(Health::new(Duration::from_millis(200)));
        let (address, task) =
            serve("127.0.0.1:0".parse().unwrap(), Arc::clone(&metrics), Arc::clone(&health)).await.unwrap();
        health.beat();
        assert!(ask(address, "/livez").await.starts_with("HTTP/1.1 200"));
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        health.set_unready(None);
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        let text = ask(address, "/metrics").await;
        assert!(text.contains(r#"virt_fleece_build_info{version=""#) && text.ends_with("# EOF\n"), "{text}");
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(ask(address, "/livez").await.starts_with("HTTP/1.1 503"));
        let error = serve(address, metrics, health).await.unwrap_err();
        assert!(error.to_string().contains("--listen"));
        task.abort();
    }
}
