//! The words of remote control's answers, one by one, beside those of a Python worker.

use serde_json::{Value, json};

use crate::control::calls;
use crate::support::{Broker, Worker, on_brokers};

/// Each row: the command, its arguments, the answer.
#[track_caller]
fn check(worker: &Worker, rows: &Value) {
    let rows = rows.as_array().unwrap();
    let asked: Vec<Value> = rows.iter().map(|row| json!([row[0], row[1]])).collect();
    let got = calls(worker, &asked.into());
    for (row, got) in rows.iter().zip(got.as_array().unwrap()) {
        assert_eq!(got, &row[2], "{} {}", row[0], row[1]);
    }
}

on_brokers!(commands_answer_with_celerys_words);
fn commands_answer_with_celerys_words(broker: &Broker) {
    let worker = broker.worker().start();
    let rows = json!([
        ["ping", {}, {"ok": "pong"}],
        ["ping", {"nope": 1}, {"ok": "pong"}],
        ["no_such_command", {}, {"error": "KeyError('no_such_command')"}],
        ["rate_limit", {"task_name": "test_task", "rate_limit": "10/m"}, {"ok": "new rate limit set successfully"}],
        ["rate_limit", {"task_name": "test_task", "rate_limit": 0}, {"ok": "rate limit disabled successfully"}],
        ["registered", {}, ["analyze_repo_task", "test_task [rate_limit=0]"]],
        ["registered", {"taskinfoitems": []}, ["analyze_repo_task", "test_task [rate_limit=0]"]],
        ["rate_limit", {"task_name": "test_task", "rate_limit": "0"}, {"ok": "new rate limit set successfully"}],
        ["rate_limit", {"task_name": "test_task", "rate_limit": null}, {"ok": "rate limit disabled successfully"}],
        ["rate_limit", {"task_name": "nope", "rate_limit": "1/s"}, {"error": "unknown task"}],
        ["time_limit", {"task_name": "test_task", "soft": 10, "hard": 20}, {"ok": "time limits set successfully"}],
        ["time_limit", {"task_name": "nope", "soft": 10, "hard": 20}, {"error": "unknown task"}],
        ["time_limit", {}, {"error": "unknown task"}],
        ["disable_events", {}, {"ok": "task events already disabled"}],
        ["enable_events", {}, {"ok": "task events enabled"}],
        ["enable_events", {}, {"ok": "task events already enabled"}],
        ["heartbeat", {}, null],
        ["election", {"id": "e1", "topic": "task", "action": null}, null],
        ["add_consumer", {"queue": "foo"}, {"ok": "add consumer foo"}],
        ["cancel_consumer", {"queue": "foo"}, {"ok": "no longer consuming from foo"}],
        ["revoke", {"task_id": "r-1"}, {"ok": "tasks {'r-1'} flagged as revoked"}],
        ["revoke", {"task_id": ["r-2", "r-3"]}, {"ok": "tasks {'r-2', 'r-3'} flagged as revoked"}],
        ["revoke", {"task_id": ["r-4"], "terminate": true, "signal": "SIGKILL"}, {"ok": "terminate: tasks unknown"}],
        ["revoke", {"task_id": "r-4", "signal": "whatever"}, {"ok": "tasks {'r-4'} flagged as revoked"}],
        ["revoked", {}, ["r-1", "r-2", "r-3", "r-4"]],
        ["revoke_by_stamped_headers", {"headers": {"stage": ["prod"]}}, {"ok": "headers {'stage': ['prod']} flagged as revoked, but not terminated"}],
        ["revoke_by_stamped_headers", {"headers": ["stage=dev"]}, {"ok": "headers {'stage': 'dev'} flagged as revoked, but not terminated"}],
        ["revoke_by_stamped_headers", {"headers": {"stage": ["prod"]}, "terminate": true}, {"ok": "headers {'stage': ['prod']} were not terminated"}],
        ["pool_grow", {}, {"ok": "pool will grow"}],
        ["pool_shrink", {}, {"ok": "pool will shrink"}],
        ["objgraph", {}, {"error": "ImportError('Requires the objgraph library')"}],
        ["hello", {"from_node": worker.node, "revoked": []}, null],
        ["query_task", {"ids": ["nope"]}, {}],
        ["reserved", {}, []],
        ["dump_schedule", {}, []],
        ["registered", {}, ["analyze_repo_task", "test_task"]],
        ["dump_tasks", {"taskinfoitems": ["acks_late", "__class__"]}, ["analyze_repo_task [acks_late=True]", "test_task [acks_late=False]"]],
    ]);
    check(&worker, &rows);
}

on_brokers!(arguments_that_do_not_fit_are_refused_in_pythons_words);
fn arguments_that_do_not_fit_are_refused_in_pythons_words(broker: &Broker) {
    let worker = broker.worker().start();
    let rows = json!([
        ["rate_limit", {}, {"error": "TypeError(\"rate_limit() missing 2 required positional arguments: 'task_name' and 'rate_limit'\")"}],
        ["rate_limit", {"task_name": "test_task", "rate_limit": [1]}, {"error": "TypeError(\"float() argument must be a string or a real number, not 'list'\")"}],
        ["rate_limit", {"task_name": ["test_task"], "rate_limit": 1}, {"error": "TypeError(\"unhashable type: 'list'\")"}],
        ["rate_limit", {"task_name": "test_task", "rate_limit": "abc"}, {"error": "Invalid rate limit string: ValueError(\"could not convert string to float: 'abc'\")"}],
        ["rate_limit", {"task_name": "test_task", "rate_limit": "1/x"}, {"error": "KeyError('x')"}],
        ["enable_events", {"nope": 1}, {"error": "TypeError(\"enable_events() got an unexpected keyword argument 'nope'\")"}],
        ["revoke", {"task_id": "r-4", "terminate": true, "signal": "kill"}, {"error": "TypeError('signal name must be uppercase string.')"}],
        ["terminate", {"task_id": "r-4", "signal": "NOPE"}, {"error": "AttributeError(\"module 'signal' has no attribute 'SIGNOPE'\")"}],
        ["revoke", {"task_id": ["r-4", 5]}, {"error": "TypeError('sequence item 1: expected str instance, int found')"}],
        ["query_task", {"ids": null}, {"error": "TypeError(\"'NoneType' object is not iterable\")"}],
        ["revoke_by_stamped_headers", {"headers": ["junk"]}, {"error": "IndexError('list index out of range')"}],
        ["autoscale", {"max": "x"}, {"error": "ValueError('Autoscale not enabled')"}],
        ["autoscale", {"max": 4, "min": 1}, {"error": "ValueError('Autoscale not enabled')"}],
        ["autoscale", {"max": 3, "min": 1, "x": 1}, {"error": "TypeError(\"autoscale() got an unexpected keyword argument 'x'\")"}],
        ["pool_restart", {}, {"error": "ValueError('Pool restarts not enabled')"}],
        ["pool_grow", {"n": "2"}, {"error": "TypeError(\"'str' object cannot be interpreted as an integer\")"}],
        ["pool_shrink", {"n": null}, {"error": "TypeError(\"unsupported operand type(s) for -: 'NoneType' and 'int'\")"}],
        ["pool_shrink", {"n": 2}, {"error": "ValueError(\"Can't shrink pool by 2: it has 2, and one process must stay\")"}],
        ["pool_grow", {"n": 1000000}, {"error": "ValueError('a pool has at most 512 processes')"}],
        ["ping", {}, {"ok": "pong"}],
    ]);
    check(&worker, &rows);
}
