//! No results at all: `disabled://`, as in Celery. Everything that stores succeeds and keeps
//! nothing; a chord cannot be counted.

use async_trait::async_trait;
use serde_json::Value;

use super::{Backend, ChordPart, ChordStatus, Claim, Error, Meta, ReplyTo, Stored};

/// The backend that keeps nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disabled;

const NO_CHORDS: Error = Error::Unsupported(
    "chords need a result backend, and it is disabled; set CELERY_RESULT_BACKEND to redis://… ",
);

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

    async fn chord_start(&self, _: &str, _: u64) -> Result<(), Error> {
        Err(NO_CHORDS)
    }

    async fn chord_part(&self, _: &ChordPart<'_>) -> Result<ChordStatus, Error> {
        Err(NO_CHORDS)
    }

    async fn chord_extend(&self, _: &str, _: &Claim) -> Result<bool, Error> {
        Err(NO_CHORDS)
    }

    async fn chord_done(&self, _: &str, _: &Claim) -> Result<(), Error> {
        Err(NO_CHORDS)
    }

    async fn chord_fail(&self, _: &str) -> Result<(), Error> {
        Err(NO_CHORDS)
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
