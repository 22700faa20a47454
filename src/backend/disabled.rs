//! No results at all: `disabled://`, as in Celery. Everything that stores succeeds and keeps
//! nothing; a chord cannot be counted.

use async_trait::async_trait;
use serde_json::Value;

use super::{Backend, Error, Meta, ReplyTo, Stored};

/// The backend that keeps nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disabled;

#[async_trait]
impl Backend for Disabled {
    async fn store(&self, _: &Meta, _: &ReplyTo<'_>) -> Result<Stored, Error> {
        Ok(Stored::Written)
    }

    async fn get(&self, _: &str) -> Result<Option<Meta>, Error> {
        Ok(None)
    }

    async fn forget(&self, _: &str) -> Result<(), Error> {
        Ok(())
    }

    async fn save_group(&self, _: &str, _: &Value) -> Result<(), Error> {
        Ok(())
    }

    async fn restore_group(&self, _: &str) -> Result<Option<Value>, Error> {
        Ok(None)
    }

    fn display_url(&self) -> String {
        "disabled://".to_owned()
    }

    fn driver(&self) -> &'static str {
        "disabled"
    }
}
