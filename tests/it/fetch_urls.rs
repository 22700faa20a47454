//! The URLs strangers send: every trick with the answer it must get.

use celeriac::git::url::{Error, Policy, RepoUrl};

/// The cases: expected outcome, tab, text with escapes.
const CORPUS: &str = include_str!("fetch_urls.txt");

/// `\n`, `\0`, `\xNN`, `\uNNNN` and the like, replaced.
fn unescaped(text: &str) -> String {
    let mut result = String::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        if letter != '\\' {
            result.push(letter);
            continue;
        }
        match letters.clone().next().unwrap() {
            'x' => {
                letters.next();
                let hex: String = letters.by_ref().take(2).collect();
                result.push(char::from(u8::from_str_radix(&hex, 16).unwrap()));
            }
            'u' => {
                letters.next();
                let hex: String = letters.by_ref().take(4).collect();
                let number = u32::from_str_radix(&hex, 16).unwrap();
                result.push(char::from_u32(number).unwrap());
            }
            _ => result.push(match letters.next().unwrap() {
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                '0' => '\0',
                other => other,
            }),
        }
    }
    result
}

/// The variant's name.
fn kind(error: &Error) -> String {
    let text = format!("{error:?}");
    text.chars()
        .take_while(char::is_ascii_alphanumeric)
        .collect()
}

#[test]
fn every_url_of_the_corpus_gets_the_answer_it_must_get() {
    let mut wrong = Vec::new();
    let mut refused = 0;
    for line in CORPUS.lines() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (expected, text) = line.split_once('\t').unwrap();
        let got = match RepoUrl::parse(&unescaped(text), &Policy::default()) {
            Ok(url) => format!("ok {url}"),
            Err(error) => {
                refused += 1;
                kind(&error)
            }
        };
        if got != expected {
            wrong.push(format!(
                "{text}\n    expected {expected}\n    got      {got}"
            ));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    assert!(refused >= 250, "only {refused} hostile cases");
}

#[test]
fn no_error_repeats_what_may_be_a_password() {
    const MARKER: &str = "ghp_0123456789marker";
    for text in [
        format!("https://{MARKER}@github.com/a/b"),
        format!("https://user:{MARKER}@github.com/a/b"),
        format!("https://user:{MARKER}@127.0.0.1/a/b"),
        format!("https://user:{MARKER}@[::1/a/b"),
        format!("ssh://git:{MARKER}@github.com/a/b"),
        format!("{MARKER}@github.com:a/b"),
        format!("{MARKER}:x@github.com/a/b"),
        format!("{MARKER}://x"),
        format!("{MARKER}::x"),
        format!("https://github.com/a/b?token={MARKER}"),
        format!("https://github.com/a/b#{MARKER}"),
        format!("ftp://{MARKER}@x/y"),
        MARKER.to_owned(),
    ] {
        let error = RepoUrl::parse(&text, &Policy::default()).unwrap_err();
        assert!(!error.to_string().contains(MARKER), "{error}");
        assert!(!format!("{error:?}").contains(MARKER), "{error:?}");
    }
}

#[test]
fn local_repositories_are_accepted_where_the_policy_allows_them() {
    let policy = Policy {
        allow_local: true,
        ..Policy::default()
    };
    for (text, path) in [
        ("/srv/git/x.git", "/srv/git/x.git"),
        ("file:///srv/git/x.git", "/srv/git/x.git"),
        ("file://localhost/srv/x", "/srv/x"),
        ("file:///srv/with%20space", "/srv/with space"),
    ] {
        let url = RepoUrl::parse(text, &policy).unwrap();
        assert_eq!(url.local_path().unwrap().to_str(), Some(path), "{text}");
    }
    for text in [
        "http://127.0.0.1:8080/r.git",
        "https://127.0.0.1/r.git",
        "http://localhost:3000/r",
        "http://192.168.1.5/r",
        "http://[::1]:4000/r",
        "http://gitea:3000/r",
    ] {
        assert!(RepoUrl::parse(text, &policy).is_ok(), "{text}");
    }
    for (text, expected) in [
        ("http://169.254.169.254/r", "NotPublic"),
        ("http://0.0.0.0/r", "NotPublic"),
        ("http://[::ffff:127.0.0.1]/r", "NotPublic"),
        ("http://8.8.8.8/r", "Http"),
        ("http://0x7f000001/r", "AddressSpelling"),
        ("file://evil.example/share", "Host"),
        ("file:///", "NoPath"),
        ("ext::sh", "Scheme"),
        ("ssh://localhost/r", "Scheme"),
        ("-x", "LeadingDash"),
    ] {
        let error = RepoUrl::parse(text, &policy).unwrap_err();
        assert_eq!(kind(&error), expected, "{text}");
    }
}

#[test]
fn only_listed_hosts_are_asked_when_there_is_a_list() {
    let policy = Policy {
        hosts: [
            "github.com",
            "*.example.com",
            ".corp.org",
            "git.one.net:8443",
        ]
        .map(str::to_owned)
        .to_vec(),
        ..Policy::default()
    };
    for text in [
        "https://github.com/a/b",
        "https://www.github.com/a/b",
        "https://git.example.com/r",
        "https://a.b.example.com/r",
        "https://x.corp.org/r",
        "https://git.one.net:8443/r",
    ] {
        assert!(RepoUrl::parse(text, &policy).is_ok(), "{text}");
    }
    for text in [
        "https://gitlab.com/a/b",
        "https://notgithub.com/a/b",
        "https://github.com.evil.net/a/b",
        "https://example.com/r",
        "https://evilexample.com/r",
        "https://corp.org/r",
        "https://git.one.net/r",
        "https://sub.github.com/a/b",
    ] {
        let error = RepoUrl::parse(text, &policy).unwrap_err();
        assert_eq!(kind(&error), "HostNotAllowed", "{text}");
    }
}
