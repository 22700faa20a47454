//! What follows from what happens to a request: a pure state machine.
//!
//! ```text
//!             ┌──────────── eta, rate limit ───────────┐
//!   received ─┤                                        ├─> running ─> settled
//!             └────────────────────────────────────────┘      │
//!                 └── revoked, expired ────────────────────────┴──> settled
//! ```
//!
//! [`Rules::begin`] and [`Rules::end`] answer a change with the [`Effect`]s it has, in the
//! order in which Celery lets them happen: follow-ups published, result stored, the chord
//! told, the message settled, the event sent. `execute` performs them; nothing here does input
//! or output, so every rule of acknowledgement can be read and tested in one place.

use std::time::Duration;

use serde_json::Value;

use crate::protocol::exception::Exception;

/// What the settings and the message say about one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Acknowledge at the end.
    pub acks_late: bool,
    /// Late: a failure counts as done.
    pub acks_on_failure: bool,
    /// Late: a hard time limit counts as done.
    pub acks_on_timeout: bool,
    /// Late: a lost child sends the message back.
    pub reject_on_worker_lost: bool,
    /// Store nothing.
    pub ignore_result: bool,
    /// Store failures although results are ignored.
    pub store_errors: bool,
    /// Store STARTED.
    pub track_started: bool,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// It returned a value.
    Success(Value),
    /// It raised.
    Failure(Exception),
    /// Its hard time limit passed.
    TimedOut(Exception),
    /// Its child died.
    WorkerLost(Exception),
    /// Too many workers died on it: it is not tried again, and its message is kept.
    GivenUp(Exception),
    /// It is to run again after a while.
    Retry {
        /// Why.
        cause: Exception,
        /// In how long.
        after: Duration,
    },
    /// It was revoked before it ran, ended while it ran, or came too late.
    Revoked {
        /// `revoked`, `expired` or `terminated`.
        reason: &'static str,
        /// The signal that ended it.
        signal: Option<i32>,
    },
    /// A delivery of a task that succeeded before, with the value that it had then.
    Repeated(Value),
    /// The worker ended it while it ran.
    Cancelled(Cancel),
    /// Somebody else holds the message now: whatever came out must have no effect.
    Fenced,
}

/// Why the worker itself ends a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancel {
    /// It goes down cold.
    Shutdown,
    /// The broker was lost, and with it the right to acknowledge the task
    /// (`worker_cancel_long_running_tasks_on_connection_loss`).
    ConnectionLoss,
}

/// Something that is to be done because of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Publish the callbacks and the next step of the chain.
    FollowUps,
    /// Publish the message again, to be run later.
    Republish,
    /// Store the state that belongs to the verdict.
    Store,
    /// Store STARTED.
    StoreStarted,
    /// Count this part of its chord.
    ChordPart,
    /// Store the failure under the ids of the chain's later steps.
    FailChain,
    /// Call the errbacks.
    Errbacks,
    /// Settle the message: done.
    Ack,
    /// Settle the message: dropped, or back to the queue.
    Reject {
        /// Back to the queue.
        requeue: bool,
    },
    /// Settle the message: kept where people can look at it.
    Quarantine,
    /// Send the event that belongs to the change.
    Event,
    /// Send task-rejected.
    RejectedEvent {
        /// As in the event.
        requeue: bool,
    },
}

impl Rules {
    /// A slot accepted the request.
    pub fn begin(&self) -> Vec<Effect> {
        let mut effects = Vec::with_capacity(3);
        if !self.acks_late {
            effects.push(Effect::Ack);
        }
        effects.push(Effect::Event);
        if self.track_started && !self.ignore_result {
            effects.push(Effect::StoreStarted);
        }
        effects
    }

    /// The request ended; `acknowledged` tells whether its message is settled already.
    pub fn end(&self, verdict: &Verdict, acknowledged: bool) -> Vec<Effect> {
        let late = !acknowledged;
        let mut effects = Vec::with_capacity(6);
        match verdict {
            Verdict::Success(_) => {
                effects.push(Effect::FollowUps);
                self.store(&mut effects, !self.ignore_result);
                effects.push(Effect::ChordPart);
                effects.extend(late.then_some(Effect::Ack));
                effects.push(Effect::Event);
            }
            Verdict::Failure(_) => {
                self.failure(&mut effects, late, self.acks_on_failure, false);
            }
            Verdict::TimedOut(_) => {
                self.failure(&mut effects, late, self.acks_on_timeout, true);
            }
            Verdict::WorkerLost(_) if late && self.reject_on_worker_lost => {
                effects.push(Effect::Reject { requeue: true });
                effects.push(Effect::RejectedEvent { requeue: true });
            }
            Verdict::WorkerLost(_) => self.failure(&mut effects, late, true, false),
            Verdict::GivenUp(_) => {
                self.failure(&mut effects, false, true, false);
                effects.insert(effects.len() - 1, Effect::Quarantine);
            }
            Verdict::Retry { .. } => {
                effects.push(Effect::Republish);
                self.store(&mut effects, !self.ignore_result);
                effects.extend(late.then_some(Effect::Ack));
                effects.push(Effect::Event);
            }
            Verdict::Revoked { .. } => {
                // As Celery: the record is written even where results are ignored.
                self.store(&mut effects, true);
                effects.push(Effect::ChordPart);
                effects.extend(late.then_some(Effect::Ack));
                effects.push(Effect::Event);
            }
            Verdict::Repeated(_) => {
                // What follows was published before the success was stored. The chord may not
                // have been told, and counts each part once.
                effects.push(Effect::ChordPart);
                effects.extend(late.then_some(Effect::Ack));
                effects.push(Effect::Event);
            }
            Verdict::Cancelled(Cancel::ConnectionLoss) => {
                // Its message is with the broker again; as Celery: the record is written even
                // where results are ignored.
                self.store(&mut effects, true);
                effects.push(Effect::Event);
            }
            Verdict::Cancelled(Cancel::Shutdown) => {
                // A late one goes back to its queue with everything else that is held, and its
                // state stays open; an early one is gone, and its client must be told.
                self.store(&mut effects, !late && !self.ignore_result);
                effects.push(Effect::Event);
            }
            Verdict::Fenced => {}
        }
        effects
    }

    fn store(&self, effects: &mut Vec<Effect>, wanted: bool) {
        effects.extend(wanted.then_some(Effect::Store));
    }

    fn failure(&self, effects: &mut Vec<Effect>, late: bool, done: bool, requeue: bool) {
        if late && !done && requeue {
            effects.push(Effect::Reject { requeue: true });
            effects.push(Effect::RejectedEvent { requeue: true });
            return;
        }
        self.store(effects, !self.ignore_result || self.store_errors);
        effects.extend([Effect::ChordPart, Effect::FailChain, Effect::Errbacks]);
        if late {
            effects.push(if done {
                Effect::Ack
            } else {
                Effect::Reject { requeue: false }
            });
        }
        effects.push(Effect::Event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(acks_late: bool) -> Rules {
        Rules {
            acks_late,
            acks_on_failure: true,
            acks_on_timeout: true,
            reject_on_worker_lost: false,
            ignore_result: false,
            store_errors: false,
            track_started: false,
        }
    }

    fn failed() -> Verdict {
        Verdict::Failure(Exception::type_error("boom"))
    }

    #[test]
    fn early_acknowledgement_comes_before_the_started_event() {
        assert_eq!(rules(false).begin(), [Effect::Ack, Effect::Event]);
        assert_eq!(rules(true).begin(), [Effect::Event]);
    }

    #[test]
    fn late_acknowledgement_comes_after_the_result_and_before_the_event() {
        let effects = rules(true).end(&Verdict::Success(Value::Null), false);
        assert_eq!(
            effects,
            [
                Effect::FollowUps,
                Effect::Store,
                Effect::ChordPart,
                Effect::Ack,
                Effect::Event
            ]
        );
        let effects = rules(false).end(&Verdict::Success(Value::Null), true);
        assert!(!effects.contains(&Effect::Ack));
    }

    #[test]
    fn a_late_failure_is_dropped_without_requeue_where_failures_are_not_acknowledged() {
        let mut rules = rules(true);
        rules.acks_on_failure = false;
        assert!(
            rules
                .end(&failed(), false)
                .contains(&Effect::Reject { requeue: false })
        );
        rules.acks_on_timeout = false;
        let timed_out = Verdict::TimedOut(Exception::type_error("limit"));
        assert_eq!(
            rules.end(&timed_out, false)[0],
            Effect::Reject { requeue: true }
        );
    }

    #[test]
    fn ignored_results_are_stored_for_errors_only_where_asked() {
        let mut rules = rules(false);
        rules.ignore_result = true;
        assert!(!rules.end(&failed(), true).contains(&Effect::Store));
        rules.store_errors = true;
        assert!(rules.end(&failed(), true).contains(&Effect::Store));
        assert!(
            !rules
                .end(&Verdict::Success(Value::Null), true)
                .contains(&Effect::Store)
        );
    }

    #[test]
    fn a_lost_child_is_a_failure_unless_its_message_is_to_go_back() {
        let mut rules = rules(true);
        let lost = Verdict::WorkerLost(Exception::type_error("signal 9"));
        assert!(rules.end(&lost, false).contains(&Effect::Store));
        rules.reject_on_worker_lost = true;
        assert_eq!(rules.end(&lost, false)[0], Effect::Reject { requeue: true });
        assert!(
            rules.end(&lost, true).contains(&Effect::Store),
            "an early one cannot go back"
        );
    }

    #[test]
    fn what_is_given_up_is_told_before_its_message_is_set_aside() {
        let verdict = Verdict::GivenUp(Exception::type_error("three deaths"));
        let effects = rules(true).end(&verdict, false);
        let end = [Effect::Errbacks, Effect::Quarantine, Effect::Event];
        assert!(effects.starts_with(&[Effect::Store]) && effects.ends_with(&end));
    }

    #[test]
    fn a_repeated_success_calls_nothing_again() {
        let verdict = Verdict::Repeated(Value::Null);
        assert_eq!(
            rules(true).end(&verdict, false),
            [Effect::ChordPart, Effect::Ack, Effect::Event]
        );
    }

    #[test]
    fn a_late_task_that_is_cancelled_leaves_its_message_to_the_broker() {
        let mut rules = rules(true);
        let end = |rules: &Rules, why| rules.end(&Verdict::Cancelled(why), false);
        assert_eq!(end(&rules, Cancel::Shutdown), [Effect::Event]);
        rules.ignore_result = true;
        assert_eq!(
            end(&rules, Cancel::ConnectionLoss),
            [Effect::Store, Effect::Event]
        );
    }

    #[test]
    fn a_fenced_request_has_no_effect_at_all() {
        assert_eq!(rules(true).end(&Verdict::Fenced, false), []);
    }
}
