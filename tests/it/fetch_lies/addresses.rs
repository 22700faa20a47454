//! Names and redirects that lead to where nothing may be asked: the listener there hears nothing.

use super::*;

/// Counts connections; what the attacker would like to hear.
fn listening_ear() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let heard = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&heard);
    std::thread::spawn(move || {
        for _ in listener.incoming() {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    });
    (address, heard)
}

fn fetch_under(policy: &Policy, url: &str) -> Error {
    let directory = tempfile::tempdir().unwrap();
    let url = match RepoUrl::parse(url, policy) {
        Ok(url) => url,
        Err(error) => return error.into(),
    };
    let token = SecretString::from(TOKEN);
    let request = Request {
        url: &url,
        token: Some(&token),
        branch: None,
        depth: None,
        directory: directory.path(),
        limits: Limits::default(),
        policy,
    };
    fetch::fetch(&request, &|_| {}, &AtomicBool::new(false)).unwrap_err()
}

/// A name server that gives these answers, one after the other.
fn answering(answers: &[&[&str]]) -> (Policy, Arc<AtomicUsize>) {
    let answers: Vec<Vec<IpAddr>> = answers
        .iter()
        .map(|answer| answer.iter().map(|text| text.parse().unwrap()).collect())
        .collect();
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let lookup = Lookup::new(move |_| {
        let at = counter.fetch_add(1, Ordering::SeqCst);
        Ok(answers[at.min(answers.len() - 1)].clone())
    });
    let policy = Policy {
        lookup,
        ..Policy::default()
    };
    (policy, asked)
}

#[test]
fn names_that_lead_to_private_addresses_are_refused_before_a_connection() {
    let (address, heard) = listening_ear();
    let port = address.rsplit(':').next().unwrap();
    for answer in [
        &["127.0.0.1"][..],
        &["::1"],
        &["8.8.8.8", "127.0.0.1"],
        &["2606:4700::1111", "10.0.0.1"],
        &["8.8.8.8", "::ffff:127.0.0.1"],
        &["169.254.169.254"],
        &["0.0.0.0"],
        &["64:ff9b::7f00:1"],
        &["100.64.1.1"],
        &["fd00::1"],
    ] {
        let (policy, _) = answering(&[answer]);
        let error = fetch_under(&policy, &format!("https://rebind.example.com:{port}/r.git"));
        assert!(
            matches!(error, Error::Refused { .. }),
            "{answer:?}: {error:?}"
        );
        assert!(!error.is_transient());
    }
    let failing = Policy {
        lookup: Lookup::new(|_| Err(std::io::Error::other("SERVFAIL"))),
        ..Policy::default()
    };
    let error = fetch_under(&failing, "https://gone.example.com/r.git");
    assert!(
        matches!(error, Error::HostNotFound { .. }) && error.is_transient(),
        "{error:?}"
    );
    let (empty, _) = answering(&[&[]]);
    assert_error!(
        fetch_under(&empty, "https://gone.example.com/r.git"),
        Error::HostNotFound { .. }
    );
    assert_eq!(
        heard.load(Ordering::SeqCst),
        0,
        "the listener heard something"
    );
}

#[test]
fn link_local_answers_are_refused_even_where_local_repositories_are_allowed() {
    let (mut policy, _) = answering(&[&["169.254.169.254"]]);
    policy.allow_local = true;
    assert_error!(
        fetch_under(&policy, "http://metadata.example.com/r"),
        Error::Refused { .. }
    );
    let (mut policy, _) = answering(&[&["8.8.8.8"]]);
    policy.allow_local = true;
    let error = fetch_under(&policy, "http://public.example.com/r");
    assert!(
        error.to_string().contains("plain http is not allowed"),
        "{error}"
    );
}

#[test]
fn name_is_asked_once_and_its_answer_kept_for_the_whole_fetch() {
    let liar = Liar::start(|head, stream| match head.starts_with("GET") {
        true => reply(
            stream,
            &format!("200 OK\r\nConnection: close\r\nContent-Type: {ADVERTISEMENT}"),
            &hello(),
        ),
        false => reply(stream, "503 -\r\nRetry-After: 7", b""),
    });
    let port = liar.address.rsplit(':').next().unwrap();
    let (mut policy, asked) = answering(&[&["127.0.0.1"], &["169.254.169.254"]]);
    policy.allow_local = true;
    let error = fetch_under(&policy, &format!("http://rebind.example.com:{port}/r.git"));
    assert!(
        matches!(error, Error::Server { status: 503, .. }),
        "{error:?}"
    );
    assert_eq!(error.retry_after(), Some(7));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert_eq!(liar.seen().len(), 2, "two connections, one answer");
}

#[test]
fn redirects_are_judged_hop_by_hop_and_the_token_stays_at_home() {
    let (ear, heard) = listening_ear();
    let tail = "/info/refs?service=git-upload-pack";
    for target in [
        format!("http://169.254.169.254/r{tail}"),
        format!("http://0.0.0.0:{}/r{tail}", ear.rsplit(':').next().unwrap()),
        format!(
            "http://[::ffff:127.0.0.1]:{}/r{tail}",
            ear.rsplit(':').next().unwrap()
        ),
        format!("http://8.8.8.8/r{tail}"),
        format!("http://user:hunter2@{ear}/r{tail}"),
        format!("http://{ear}/other?x"),
        format!("http://{ear}/"),
        format!("http://{ear}/r/info/refs?service=git-receive-pack"),
        format!("file:///r{tail}"),
        format!("gopher://{ear}/r{tail}"),
        format!("ftp://{ear}/r{tail}"),
        format!("http://{ear}:22/r{tail}"),
        format!("http://127.0.0.1:22/r{tail}"),
        format!("//0.0.0.0/r{tail}"),
        "http://[".to_owned(),
        format!("http://{ear}/-x{tail}"),
    ] {
        for status in [301, 302, 303, 307, 308] {
            let location = target.clone();
            let liar = Liar::start(move |_, stream| {
                reply(stream, &format!("{status} -\r\nLocation: {location}"), b"");
            });
            let error = error_of(&liar);
            assert!(
                matches!(error, Error::Redirect { .. } | Error::Refused { .. }),
                "{status} {target}: {error:?}"
            );
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }
    assert_eq!(
        heard.load(Ordering::SeqCst),
        0,
        "the listener heard something"
    );

    // Another port is another host: it is asked, but without the token.
    let other = Liar::start(|_, stream| reply(stream, "404 -", b""));
    let location = format!("http://{}/moved.git{tail}", other.address);
    let first = Liar::start(move |_, stream| {
        reply(stream, &format!("301 -\r\nLocation: {location}"), b"");
    });
    assert_error!(error_of(&first), Error::NotFound { status: 404, .. });
    assert!(
        first.seen()[0]
            .to_ascii_lowercase()
            .contains("authorization: basic")
    );
    assert!(other.seen()[0].starts_with("GET /moved.git/info/refs?service=git-upload-pack "));
    assert!(
        !other.seen()[0]
            .to_ascii_lowercase()
            .contains("authorization")
    );
}

#[test]
fn redirect_loops_end_and_a_redirected_pack_request_is_refused() {
    let liar = Liar::start(|_, stream| {
        let target = "/r.git/info/refs?service=git-upload-pack";
        reply(stream, &format!("302 -\r\nLocation: {target}"), b"");
    });
    assert_error!(error_of(&liar), Error::Redirect { .. });
    assert_eq!(liar.seen().len(), 6);

    let liar = Liar::start(|head, stream| match head.starts_with("GET") {
        true => ok(stream, ADVERTISEMENT, &hello()),
        false => reply(stream, "307 -\r\nLocation: /elsewhere/git-upload-pack", b""),
    });
    assert_error!(error_of(&liar), Error::Redirect { .. });
    let nowhere = Liar::start(|_, stream| reply(stream, "302 -", b""));
    assert_error!(error_of(&nowhere), Error::Redirect { .. });
    let odd = Liar::start(|_, stream| reply(stream, "305 -\r\nLocation: http://127.0.0.1/", b""));
    assert_error!(error_of(&odd), Error::Redirect { .. });
}
