//! celeriac: a Celery-compatible worker that tells who wrote a Git repository, line by line.

pub mod analysis;
pub mod backend;
pub mod blame;
pub mod config;
pub mod database;
pub mod events;
pub mod git;
pub mod logging;
pub mod pidbox;
pub mod pool;
pub mod protocol;
pub mod tasks;
pub mod transport;
pub mod worker;
