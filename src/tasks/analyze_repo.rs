//! `analyze_repo_task(user_id, repo_url, user_github_token=None)`: who wrote a repository.
//!
//! How its arguments become a job for a child, a child's progress the state that the backend
//! shows, and a child's report the stored rows and the result value.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use secrecy::zeroize::Zeroize;
use serde_json::{Map, Value, json};

use super::Definition;
use crate::analysis::{self, Job, Policy, Progress, Report, Stage};
use crate::config::Settings;
use crate::database::{Completed, Contributor, Run};
use crate::protocol::arguments::{Constant, Parameter, Parameters};
use crate::protocol::exception::Exception;
use crate::protocol::saferepr;

/// `analyze_repo_task`.
pub struct AnalyzeRepo;

impl Definition for AnalyzeRepo {
    const NAME: &'static str = "analyze_repo_task";
}

/// `def analyze_repo_task(user_id, repo_url, user_github_token=None)`.
pub const PARAMETERS: Parameters = Parameters {
    function: "analyze_repo_task",
    names: &[
        Parameter::required("user_id"),
        Parameter::required("repo_url"),
        Parameter::optional("user_github_token", Constant::None),
    ],
};

/// Position and name of the parameter that is a secret.
pub const SECRET: (usize, &str) = (2, "user_github_token");

/// Position and name of the parameter that says whose task it is.
pub const USER: (usize, &str) = (0, "user_id");

/// The share of the progress bar that fetching takes.
const CLONE_SHARE: f64 = 0.3;

/// The arguments of one call.
pub struct Call {
    /// The user, as text; `None` stays nobody.
    pub user_id: Option<String>,
    /// The repository.
    pub repo_url: String,
    /// The token, unless absent or empty.
    pub token: Option<String>,
}

impl Drop for Call {
    fn drop(&mut self) {
        self.token.zeroize();
    }
}

impl Call {
    /// Understands the bound arguments.
    pub fn new(arguments: &[Value]) -> Result<Self, Exception> {
        let [user_id, repo_url, token] = arguments else {
            return Err(Exception::type_error(
                "analyze_repo_task() takes three arguments",
            ));
        };
        let user_id = user(user_id);
        let Value::String(repo_url) = repo_url else {
            // The value itself may hold what nobody should see.
            let kind = match repo_url {
                Value::Null => "None",
                Value::Bool(_) => "bool",
                Value::Number(_) => "a number",
                Value::Array(_) => "list",
                _ => "dict",
            };
            return Err(Exception::type_error(format!(
                "repo_url must be a str, not {kind}"
            )));
        };
        let token = match token {
            Value::Null => None,
            Value::String(text) if text.trim().is_empty() => None,
            Value::String(text) => Some(text.trim().to_owned()),
            _ => {
                return Err(Exception::type_error(
                    "user_github_token must be a str or None",
                ));
            }
        };
        Ok(Self {
            user_id,
            repo_url: repo_url.trim().to_owned(),
            token,
        })
    }

    /// The work for a child.
    pub fn job(&self, settings: &Settings, directory: PathBuf, threads: usize) -> Job {
        Job {
            url: self.repo_url.clone(),
            token: self.token.clone(),
            branch: settings.clone_branch.clone(),
            depth: settings
                .clone_depth
                .and_then(|depth| u32::try_from(depth).ok()),
            directory,
            threads,
            cache: settings.blame_cache,
            policy: policy(settings),
        }
    }

    /// One spelling for all spellings of the repository; `None` when it may not be fetched.
    pub fn repository(&self, settings: &Settings) -> Option<String> {
        analysis::canonical_url(&self.repo_url, &policy(settings))
    }

    /// Names what is to be analysed, how, and where it is stored, as stored analyses are found;
    /// shows nothing of it.
    pub fn fingerprint(&self, settings: &Settings, place: &str) -> Option<String> {
        let branch = settings.clone_branch.as_deref();
        analysis::fingerprint(&format!("{place} {branch:?} {}", self.repo_url))
    }

    /// The name under which a token for the repository is stored.
    pub fn token_host(&self, settings: &Settings) -> Option<String> {
        analysis::token_host(&self.repo_url, &policy(settings))
    }

    /// What the database is told when the work begins.
    pub fn run(&self, task_id: &str, settings: &Settings, node: &str) -> Run {
        Run {
            task_id: task_id.to_owned(),
            user_id: self.user_id.clone(),
            repo_url: self.repo_url.clone(),
            branch: settings.clone_branch.clone(),
            shallow: settings.clone_depth.is_some(),
            worker: Some(node.to_owned()),
            started_at: Utc::now(),
        }
    }

    /// The return value: the backend's contract, most lines first.
    pub fn value(&self, report: &Report) -> Value {
        let lines: Map<String, Value> = report
            .contributors
            .iter()
            .map(|(email, lines)| (email.clone(), Value::from(*lines)))
            .collect();
        json!({
            "status": "success",
            "repo_url": self.repo_url,
            "total_contributors": lines.len(),
            "result": lines,
        })
    }
}

/// A user id as text: 7 and "7" are the same user, `None` is nobody.
pub fn user(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(saferepr::str(other)),
    }
}

/// What may be fetched, by the settings.
pub fn policy(settings: &Settings) -> Policy {
    Policy {
        allow_local: settings.allow_local_repos,
        allow_http: settings.allow_http_repos,
        hosts: settings.repo_hosts.clone(),
        authorities: authorities(settings),
        max_bytes: settings.clone_max_bytes,
        max_objects: settings.clone_max_objects,
        max_object_size: settings.clone_max_object_size,
        max_inflated: settings.clone_max_inflated,
        disk_quota: settings.clone_disk_quota,
        disk_reserve: settings.clone_disk_reserve,
    }
}

/// The file of `REPO_CA_FILE`.
pub fn authorities(settings: &Settings) -> Option<PathBuf> {
    let name = settings.repo_ca_file.as_deref();
    name.filter(|name| !name.is_empty()).map(PathBuf::from)
}

/// What the database is told at the end.
pub fn completed(report: &Report, value: &Value, finished_at: DateTime<Utc>) -> Completed {
    let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let contributor = |(email, lines): &(String, u64)| Contributor {
        email: email.clone(),
        lines: count(*lines),
    };
    Completed {
        head_commit: report.head.clone(),
        finished_at,
        total_lines: count(report.lines),
        total_files: count(report.files),
        skipped_files: count(report.binary_files + report.skipped.len() as u64),
        contributors: report.contributors.iter().map(contributor).collect(),
        result: value.clone(),
    }
}

/// The meta of PROGRESS. The text is what the backend has always shown; the other keys tell
/// more to those who look.
pub fn progress_meta(progress: &Progress) -> Value {
    let fraction = progress.fraction.clamp(0.0, 1.0);
    let (stage, overall) = match progress.stage {
        Stage::Clone => ("clone", fraction * CLONE_SHARE),
        Stage::Analyze => ("analyze", CLONE_SHARE + fraction * (1.0 - CLONE_SHARE)),
    };
    let percent = percent(overall);
    let detail = match progress.stage {
        Stage::Clone => format!(
            "저장소 복제 중: {}/{} 객체",
            progress.current, progress.total
        ),
        Stage::Analyze => format!(
            "변경 이력 분석 중: {}/{} 커밋",
            progress.current, progress.total
        ),
    };
    json!({
        "status": format!("분석 중... ({percent}%)"),
        "stage": stage,
        "detail": detail,
        "current": progress.current,
        "total": progress.total,
        "percent": percent,
    })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "0.0 to 1.0 by the clamp"
)]
fn percent(fraction: f64) -> u32 {
    // 0.3 + 0.5 * 0.7 is a little less than 0.65.
    (fraction * 100.0 + 1e-6) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_taken_as_loosely_as_the_python_task_took_them() {
        let call = |values: Value| Call::new(values.as_array().unwrap());
        let made = call(json!([7, " https://example.com/o/r ", ""]))
            .ok()
            .unwrap();
        assert_eq!(made.user_id.as_deref(), Some("7"));
        assert_eq!(made.repo_url, "https://example.com/o/r");
        assert_eq!(made.token, None);
        assert!(
            call(json!([null, "u", "ghp_x"]))
                .ok()
                .unwrap()
                .token
                .is_some()
        );
        assert!(call(json!([null, 5, null])).is_err());
    }

    #[test]
    fn progress_is_shown_as_the_backend_expects_it() {
        let progress = |stage, fraction| Progress {
            stage,
            current: 1,
            total: 2,
            fraction,
        };
        let status = |stage, fraction| progress_meta(&progress(stage, fraction))["status"].clone();
        assert_eq!(status(Stage::Clone, 0.0), "분석 중... (0%)");
        assert_eq!(status(Stage::Clone, 1.0), "분석 중... (30%)");
        assert_eq!(status(Stage::Analyze, 0.5), "분석 중... (65%)");
        assert_eq!(status(Stage::Analyze, 7.0), "분석 중... (100%)");
    }

    #[test]
    fn the_value_keeps_the_order_of_the_report() {
        let call = Call {
            user_id: None,
            repo_url: "u".to_owned(),
            token: None,
        };
        let report = Report {
            contributors: vec![("z@x".to_owned(), 5), ("a@x".to_owned(), 3)],
            ..Report::default()
        };
        let value = call.value(&report);
        assert_eq!(value["total_contributors"], 2);
        assert_eq!(value["result"].to_string(), r#"{"z@x":5,"a@x":3}"#);
    }
}
