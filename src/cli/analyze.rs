//! `celeriac analyze`: the worker's job without any server.
//!
//! A path is read in place, a URL fetched into a temporary directory. A progress bar on a
//! terminal, a table of contributors, JSON or CSV; the result is kept in the database.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use super::args::{Analyze, Global};
use super::{connect, global_overrides, output};
use crate::analysis::{self, Job, Progress, Report, Stage};
use crate::blame::{self, Whitespace};
use crate::config::Settings;
use crate::database::{Database, DatabaseUrl};
use crate::git::{Oid, Repository, ignored};
use crate::tasks::analyze_repo::{Call, completed, policy};
use crate::worker::shutdown;

/// What a shell expects of a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;
const STEPS: u64 = 1000;

/// Analyses one repository; returns the exit code.
pub(super) fn run(global: &Global, options: &Analyze) -> anyhow::Result<i32> {
    let mut settings = crate::config::load(&global_overrides(global))?.settings;
    // Whoever runs the command may read what they may read anyway.
    settings.allow_local_repos = true;
    settings.allow_http_repos = true;
    if options.branch.is_some() {
        settings.clone_branch.clone_from(&options.branch);
    }
    let interrupt = shutdown::interrupt_flag().context("cannot wait for signals")?;
    let began = Instant::now();
    let bar = bar(global.quiet);
    let progress = |seen: Progress| show(&bar, &seen);
    let found = if Path::new(&options.repository).exists() {
        read(options, &settings, &progress, interrupt)
    } else {
        fetch(options, &settings, &progress, interrupt)
    };
    bar.finish_and_clear();
    let found = match found {
        Ok(found) => found,
        Err(_) if interrupt.load(std::sync::atomic::Ordering::Relaxed) => {
            output::print_error("interrupted\n");
            return Ok(INTERRUPTED);
        }
        Err(error) => return Err(error),
    };
    keep(options, &settings, &found.report)?;
    print(options, &found, began.elapsed().as_secs_f64());
    Ok(0)
}

/// A report, and each file's lines where they were asked for.
struct Found {
    report: Report,
    files: Option<Value>,
    statistics: Option<blame::Statistics>,
}

fn blame_options(options: &Analyze, settings: &Settings) -> blame::Options {
    let mut chosen = blame::Options {
        cache_bytes: usize::try_from(settings.blame_cache << 20).unwrap_or(usize::MAX),
        first_parent: options.first_parent,
        include: options.include.clone(),
        exclude: options.exclude.clone(),
        per_file: options.files,
        per_commit: options.commits,
        ..blame::Options::default()
    };
    if let Some(threads) = options.threads {
        chosen.threads = threads.max(1);
    }
    if options.ignore_whitespace {
        chosen.whitespace = Whitespace::IgnoreAll;
    }
    chosen
}

fn read(
    options: &Analyze,
    settings: &Settings,
    progress: analysis::OnProgress<'_>,
    interrupt: &AtomicBool,
) -> anyhow::Result<Found> {
    let path = Path::new(&options.repository);
    let repository = Repository::open(path)?;
    let commit = match &settings.clone_branch {
        Some(revision) => Some(repository.resolve(revision)?),
        None => repository.head()?,
    };
    blame_at(options, settings, path, commit, progress, interrupt)
}

fn blame_at(
    options: &Analyze,
    settings: &Settings,
    path: &Path,
    commit: Option<Oid>,
    progress: analysis::OnProgress<'_>,
    interrupt: &AtomicBool,
) -> anyhow::Result<Found> {
    let mut chosen = blame_options(options, settings);
    if let Some(commit) = commit {
        chosen.ignored = ignored(options, path, commit)?;
    }
    let (report, outcome) = analysis::read(path, commit, &chosen, progress, interrupt)?;
    let files = outcome
        .as_ref()
        .and_then(|outcome| by_file(outcome).or_else(|| by_commit(outcome)));
    Ok(Found {
        report,
        files,
        statistics: outcome.map(|outcome| outcome.statistics),
    })
}

/// The commits to look through.
fn ignored(options: &Analyze, path: &Path, commit: Oid) -> anyhow::Result<Vec<Oid>> {
    let repository = Repository::open(path)?;
    let mut commits = Vec::new();
    for revision in &options.ignore_rev {
        commits.push(repository.resolve(revision)?);
    }
    for file in &options.ignore_revs_file {
        let text = match std::fs::read(file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => repository
                .file(commit, file)?
                .with_context(|| format!("{file}: no such file here or in {commit}"))?,
            Err(error) => return Err(error).with_context(|| format!("cannot read {file}")),
        };
        commits.extend(repository.commits_of(&ignored::parse(&text, file)?)?);
    }
    Ok(commits)
}

fn fetch(
    options: &Analyze,
    settings: &Settings,
    progress: analysis::OnProgress<'_>,
    interrupt: &AtomicBool,
) -> anyhow::Result<Found> {
    if !options.repository.contains("://") {
        bail!(
            "{}: no such directory, and no URL either; give a path or https://HOST/OWNER/NAME",
            options.repository
        );
    }
    let directory = tempfile::Builder::new()
        .prefix("celeriac-")
        .tempdir()
        .context("cannot make a directory for the clone")?;
    let job = Job {
        url: options.repository.clone(),
        token: std::env::var(&options.token_variable)
            .ok()
            .filter(|token| !token.is_empty()),
        branch: settings.clone_branch.clone(),
        depth: settings
            .clone_depth
            .and_then(|depth| u32::try_from(depth).ok()),
        directory: directory.path().to_owned(),
        threads: blame_options(options, settings).threads,
        cache: settings.blame_cache,
        policy: policy(settings),
    };
    let fetched = analysis::fetch(&job, progress, interrupt).map_err(|(_, error)| error)?;
    let mut found = blame_at(
        options,
        settings,
        &fetched.repository,
        fetched.head,
        progress,
        interrupt,
    )?;
    found.report.shallow |= fetched.shallow;
    found.report.received_bytes = fetched.received_bytes;
    Ok(found)
}

/// `{path: {email: lines}}`.
fn by_file(outcome: &blame::Outcome) -> Option<Value> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let files = outcome.per_file.as_ref()?;
    let mut map = Map::new();
    for file in files {
        let mut authors = Map::new();
        for (author, lines) in &file.authors {
            let place = usize::try_from(*author)
                .ok()
                .and_then(|place| outcome.totals.get(place));
            let email = place.map_or_else(String::new, |(email, _)| text(email));
            authors.insert(email, Value::from(*lines));
        }
        map.insert(text(&file.path), Value::Object(authors));
    }
    Some(Value::Object(map))
}

/// `{path: {commit: lines}}`.
fn by_commit(outcome: &blame::Outcome) -> Option<Value> {
    let mut map = Map::new();
    for file in outcome.per_commit.as_ref()? {
        let commits = file
            .commits
            .iter()
            .map(|(commit, lines)| (commit.to_string(), Value::from(*lines)));
        let path = String::from_utf8_lossy(&file.path).into_owned();
        map.insert(path, Value::Object(commits.collect()));
    }
    Some(Value::Object(map))
}

/// Stores the report, unless the user does not want it kept.
fn keep(options: &Analyze, settings: &Settings, report: &Report) -> anyhow::Result<()> {
    let database = match options.database.as_deref() {
        Some("none") => return Ok(()),
        Some(url) => Database::new(DatabaseUrl::parse_named("--database", url)?),
        None => connect::database(settings)?,
    };
    let call = Call {
        user_id: None,
        repo_url: options.repository.clone(),
        token: None,
    };
    let mut run = call.run(&format!("analyze-{}", uuid::Uuid::new_v4()), settings, "");
    run.worker = None;
    run.shallow = report.shallow;
    let rows = completed(report, &call.value(report), chrono::Utc::now());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime
        .block_on(async {
            database.migrate().await?;
            database.succeed(&run, &rows).await
        })
        .map_err(|error| anyhow!("{error}"))
        .with_context(|| {
            format!(
                "cannot keep the result in {} (--database none keeps none)",
                database.url()
            )
        })
}

fn bar(quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(STEPS);
    if let Ok(style) =
        ProgressStyle::with_template("{msg:<40} {wide_bar:.green} {percent:>3}% {elapsed}")
    {
        bar.set_style(style);
    }
    bar
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a share of a thousand steps"
)]
fn show(bar: &ProgressBar, seen: &Progress) {
    let (name, unit) = match seen.stage {
        Stage::Clone => ("Fetching", "objects"),
        Stage::Analyze => ("Analysing", "commits"),
    };
    bar.set_position((seen.fraction.clamp(0.0, 1.0) * STEPS as f64) as u64);
    if seen.total > 0 {
        bar.set_message(format!("{name} {}/{} {unit}", seen.current, seen.total));
    } else {
        bar.set_message(name);
    }
}

fn print(options: &Analyze, found: &Found, seconds: f64) {
    let report = &found.report;
    if options.json {
        output::print(&format!("{:#}\n", to_json(options, found)));
        return;
    }
    if options.csv {
        let mut text = "email,lines\n".to_owned();
        for (email, lines) in &report.contributors {
            text.push_str(&format!("{},{lines}\n", csv_field(email)));
        }
        output::print(&text);
        return;
    }
    output::print(&table(options, report));
    for (path, reason) in &report.skipped {
        output::print_error(&format!("left out: {}: {reason}\n", printable(path)));
    }
    if report.shallow {
        output::print_error(
            "the history is cut off: lines older than it are counted for its oldest commits\n",
        );
    }
    output::print_error(&format!(
        "{} contributors, {} lines in {} text files, {} commits, {seconds:.2} s\n",
        report.contributors.len(),
        report.lines,
        report.files,
        report.commits,
    ));
}

fn table(options: &Analyze, report: &Report) -> String {
    let most = if options.limit == 0 {
        usize::MAX
    } else {
        options.limit
    };
    let shown: Vec<(String, u64)> = report
        .contributors
        .iter()
        .take(most)
        .map(|(email, lines)| (printable(email), *lines))
        .collect();
    let width = shown
        .iter()
        .map(|(email, _)| email.chars().count())
        .max()
        .unwrap_or(0)
        .max(11);
    let mut text = format!(
        "{:<width$}  {:>10}  {:>6}\n",
        "contributor", "lines", "share"
    );
    for (email, lines) in &shown {
        #[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
        let share = *lines as f64 * 100.0 / report.lines.max(1) as f64;
        text.push_str(&format!("{email:<width$}  {lines:>10}  {share:>5.1}%\n"));
    }
    let rest = report.contributors.len() - shown.len();
    if rest > 0 {
        let lines: u64 = report
            .contributors
            .iter()
            .skip(most)
            .map(|(_, lines)| lines)
            .sum();
        text.push_str(&format!(
            "{:<width$}  {lines:>10}  (-n 0 shows all)\n",
            format!("{rest} more")
        ));
    }
    text
}

fn to_json(options: &Analyze, found: &Found) -> Value {
    let report = &found.report;
    let lines: Map<String, Value> = report
        .contributors
        .iter()
        .map(|(email, lines)| (email.clone(), Value::from(*lines)))
        .collect();
    let mut value = json!({
        "status": "success",
        "repo_url": options.repository,
        "head": report.head,
        "total_contributors": lines.len(),
        "total_lines": report.lines,
        "total_files": report.files,
        "binary_files": report.binary_files,
        "commits": report.commits,
        "shallow": report.shallow,
        "skipped": report.skipped,
        "result": lines,
    });
    if let Some(files) = &found.files {
        value["files"] = files.clone();
    }
    if options.statistics {
        value["seconds"] = json!({"fetch": report.seconds.0, "blame": report.seconds.1});
        value["statistics"] = found.statistics.as_ref().map_or(Value::Null, statistics);
    }
    value
}

/// What the blame took; the times of several threads are added.
fn statistics(sum: &blame::Statistics) -> Value {
    json!({
        "commits": sum.commits,
        "commits_visited": sum.commits_visited,
        "trees": sum.trees,
        "objects": sum.objects,
        "diffs": sum.diffs,
        "renames": sum.renames,
        "inflated_bytes": sum.inflated_bytes,
        "object_bytes": sum.object_bytes,
        "seconds_preparing": sum.preparing.as_secs_f64(),
        "seconds_comparing_trees": sum.comparing_trees.as_secs_f64(),
        "seconds_reading": sum.reading.as_secs_f64(),
        "seconds_diffing": sum.diffing.as_secs_f64(),
        "seconds_renaming": sum.renaming.as_secs_f64(),
    })
}

/// Author data is data: no control character of it reaches a terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// A CSV field that no spreadsheet takes for a formula and no terminal for a command.
fn csv_field(text: &str) -> String {
    let text = printable(text);
    let guarded = match text.chars().next() {
        Some('=' | '+' | '-' | '@') => format!("'{text}"),
        _ => text,
    };
    if guarded.contains([',', '"']) {
        format!("\"{}\"", guarded.replace('"', "\"\""))
    } else {
        guarded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_addresses_are_only_text() {
        assert_eq!(printable("a\u{1b}[31m@x"), "a\u{fffd}[31m@x");
        assert_eq!(csv_field("=HYPERLINK(1)"), "'=HYPERLINK(1)");
        assert_eq!(csv_field("a,\"b\""), "\"a,\"\"b\"\"\"");
        assert_eq!(csv_field("\t\u{1b}[2J=1"), "\u{fffd}\u{fffd}[2J=1");
        assert_eq!(csv_field("ann@example.com"), "ann@example.com");
    }
}
