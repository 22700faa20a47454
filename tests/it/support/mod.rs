//! What integration tests stand on. Nothing here is mocked.

pub mod broker;
pub mod events;
pub mod git_server;
pub mod proxy;
pub mod python;
pub mod rabbit_api;
pub mod rabbit_server;
pub mod raw;
pub mod redis_server;
pub mod repository;
pub mod services;
pub mod shared;
pub mod tls_front;
pub mod waiting;
pub mod worker;

pub use broker::Broker;
pub(crate) use broker::on_brokers;
pub use git_server::GitServer;
pub use proxy::Proxy;
pub use rabbit_server::RabbitServer;
pub use raw::Raw;
pub use redis_server::{RedisServer, fixed_port};
pub use repository::Repository;
pub use shared::Shared;
pub use tls_front::TlsFront;
pub use waiting::wait_for;
#[allow(unused_imports, reason = "used as soon as the worker runs")]
pub use worker::Worker;

/// The project's directory: asked at run time, since a shared build directory outlives a checkout.
pub fn project() -> std::path::PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .expect("cargo says where the project is")
        .into()
}

/// A name nobody else uses: for queues, databases, nodes.
pub fn unique(prefix: &str) -> String {
    format!(
        "{prefix}-{}",
        &uuid::Uuid::new_v4().simple().to_string()[..12]
    )
}
