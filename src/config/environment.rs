//! Collects the settings from `.env`, the environment and the command line.

use super::Error;
use super::catalogue::{Known, without_effect};
use super::settings::{SETTINGS, Settings};

/// The settings, and what is to be said about them at start.
pub struct Loaded {
    /// Every setting.
    pub settings: Settings,
    /// Names of settings that somebody set: they are never overridden by a mere default.
    pub explicit: Vec<&'static str>,
    /// Variables that are set and have no effect here, with what is known of their settings.
    pub idle: Vec<(String, &'static Known)>,
}

/// Reads `.env` below the working directory (if there is one), the variables and `overrides`
/// (`name`, `value`, and the option the user typed), in this order.
pub fn load(overrides: &[(String, String, String)]) -> Result<Loaded, Error> {
    match dotenvy::dotenv() {
        Ok(_) => {}
        Err(error) if error.not_found() => {}
        // The text of the error can quote a line of the file, and lines hold passwords.
        Err(dotenvy::Error::LineParse(_, at)) => {
            return Err(Error::DotEnv(format!(
                "a line cannot be understood near column {at}"
            )));
        }
        Err(error) => return Err(Error::DotEnv(error.to_string())),
    }
    from_sources(|name| std::env::var(name).ok(), overrides)
}

fn from_sources(
    variable: impl Fn(&str) -> Option<String>,
    overrides: &[(String, String, String)],
) -> Result<Loaded, Error> {
    let mut settings = Settings::default();
    let mut explicit = Vec::new();
    for setting in SETTINGS {
        let own = format!("CELERY_{}", setting.name.to_ascii_uppercase());
        let names = setting.variables.iter().copied().chain([own.as_str()]);
        let found = names.filter_map(|name| Some((name.to_owned(), variable(name)?)));
        // An empty variable is how compose files say "not set".
        let Some((origin, text)) = found.into_iter().find(|(_, text)| !text.is_empty()) else {
            continue;
        };
        apply(&mut settings, setting.name, &text, &origin)?;
        explicit.push(setting.name);
    }
    for (name, text, origin) in overrides {
        let known = SETTINGS.iter().find(|setting| setting.name == name);
        let Some(setting) = known else {
            return Err(Error::Unknown(name.clone()));
        };
        apply(&mut settings, setting.name, text, origin)?;
        explicit.push(setting.name);
    }
    let idle = without_effect(|name| variable(name).is_some_and(|text| !text.is_empty()));
    Ok(Loaded {
        settings,
        explicit,
        idle,
    })
}

fn apply(settings: &mut Settings, name: &str, text: &str, origin: &str) -> Result<(), Error> {
    let setting = SETTINGS.iter().find(|setting| setting.name == name);
    let setting = setting.expect("because the caller took the name from the table");
    match settings.set(name, text) {
        Some(Err(reason)) => Err(Error::Invalid {
            origin: origin.to_owned(),
            reason: if setting.secret {
                "the value cannot be understood".to_owned()
            } else {
                reason
            },
            example: setting.example,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Loaded, Error> {
        from_sources(
            |name| {
                pairs
                    .iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, text)| (*text).to_owned())
            },
            &[],
        )
    }

    #[test]
    fn the_old_workers_variable_wins_over_celerys() {
        let loaded = read(&[
            ("CELERY_BROKER_URL", "redis://b/1"),
            ("QUEUE_BROKER_URL", "redis://a/1"),
        ]);
        assert_eq!(loaded.unwrap().settings.broker_url, "redis://a/1");
        let loaded = read(&[
            ("CELERY_BROKER_URL", "redis://b/1"),
            ("QUEUE_BROKER_URL", ""),
        ]);
        assert_eq!(loaded.unwrap().settings.broker_url, "redis://b/1");
    }

    #[test]
    fn a_malformed_value_names_the_variable_and_an_example() {
        let error = read(&[("CELERY_TASK_TIME_LIMIT", "soon")])
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("CELERY_TASK_TIME_LIMIT") && error.contains("soon"),
            "{error}"
        );
        assert!(
            error.contains("example: CELERY_TASK_TIME_LIMIT=30"),
            "{error}"
        );
    }

    #[test]
    fn the_command_line_wins_and_its_unknown_names_are_errors() {
        let line =
            |name: &str, text: &str| vec![(name.to_owned(), text.to_owned(), format!("--{name}"))];
        let loaded = from_sources(|_| Some("7".to_owned()), &line("worker_concurrency", "3"));
        // Every variable answers "7" here, which not every setting can be.
        assert!(loaded.is_err());
        let loaded = from_sources(|_| None, &line("worker_concurrency", "3")).unwrap();
        assert_eq!(loaded.settings.worker_concurrency, Some(3));
        let error = from_sources(|_| None, &line("worker_speed", "3"))
            .err()
            .unwrap();
        assert!(matches!(error, Error::Unknown(name) if name == "worker_speed"));
    }
}
