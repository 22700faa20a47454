//! Whether a node's name fits the pattern of a request.
//!
//! Answers for `kombu.matcher`: `glob` is `fnmatch`, `pcre` is `re.match`, which has to fit at
//! the start of the name only. Patterns come from strangers: both take bounded time.

use regex::RegexBuilder;

/// Longest pattern that is looked at.
const MAX_LENGTH: usize = 1000;

/// Matches `hostname`; the error is for the log.
pub(super) fn matches(hostname: &str, pattern: &str, matcher: &str) -> Result<bool, String> {
    if pattern.len() > MAX_LENGTH {
        return Err(format!("pattern is longer than {MAX_LENGTH} bytes"));
    }
    match matcher {
        "glob" => Ok(glob(pattern, hostname)),
        "pcre" => RegexBuilder::new(&format!("^(?:{pattern})"))
            .size_limit(1 << 20)
            .build()
            .map(|regex| regex.is_match(hostname))
            .map_err(|error| format!("pattern {pattern:?} cannot be used: {error}")),
        other => Err(format!("No matcher installed for {other}")),
    }
}

/// Shell patterns: `*`, `?`, `[abc]`, `[!a-z]`.
fn glob(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    let (mut at, mut position) = (0, 0);
    // Where to go on when a mismatch shows that the last star must take one more character.
    let mut star: Option<(usize, usize)> = None;
    while position < text.len() {
        let step = match pattern.get(at) {
            Some('*') => {
                star = Some((at + 1, position));
                at += 1;
                continue;
            }
            Some('?') => Some(1),
            Some('[') => match class(&pattern[at..], text[position]) {
                Some((true, length)) => Some(length),
                Some((false, _)) => None,
                None => (text[position] == '[').then_some(1),
            },
            Some(char) => (*char == text[position]).then_some(1),
            None => None,
        };
        match (step, star) {
            (Some(length), _) => {
                at += length;
                position += 1;
            }
            (None, Some((after, taken))) => {
                at = after;
                position = taken + 1;
                star = Some((after, taken + 1));
            }
            (None, None) => return false,
        }
    }
    pattern[at..].iter().all(|char| *char == '*')
}

/// Matches a bracket expression; gives its length too. `None` when it has no end.
fn class(pattern: &[char], char: char) -> Option<(bool, usize)> {
    let negated = pattern.get(1) == Some(&'!');
    let start = 1 + usize::from(negated);
    // A closing bracket right at the start is one of the characters.
    let end = start
        + 1
        + pattern
            .get(start + 1..)?
            .iter()
            .position(|char| *char == ']')?;
    let members = &pattern[start..end];
    let mut found = false;
    let mut at = 0;
    while at < members.len() {
        if at + 2 < members.len() && members[at + 1] == '-' {
            found |= (members[at]..=members[at + 2]).contains(&char);
            at += 3;
        } else {
            found |= members[at] == char;
            at += 1;
        }
    }
    Some((found != negated, end + 1))
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn globs_match_as_in_a_shell() {
        for (pattern, expected) in [
            ("worker1@example", true),
            ("worker*", true),
            ("*@example", true),
            ("*", true),
            ("w*1@*ple", true),
            ("worker?@example", true),
            ("worker[0-9]@example", true),
            ("worker[!0-9]@example", false),
            ("worker[1]@exampl", false),
            ("worker", false),
            ("[", false),
            ("", false),
            ("*x*z", false),
        ] {
            assert_eq!(
                matches("worker1@example", pattern, "glob"),
                Ok(expected),
                "{pattern}"
            );
        }
        assert_eq!(matches("a[b", "a[b", "glob"), Ok(true));
        assert_eq!(matches("a]b", "a[]]b", "glob"), Ok(true));
        let slow = format!("{}b", "*a".repeat(400));
        assert_eq!(matches(&"a".repeat(2000), &slow, "glob"), Ok(false));
    }

    #[test]
    fn expressions_fit_at_the_start() {
        for (pattern, expected) in [
            ("worker", true),
            (r"worker\d@", true),
            ("example", false),
            ("x|w", true),
            ("^worker1@example$", true),
        ] {
            assert_eq!(
                matches("worker1@example", pattern, "pcre"),
                Ok(expected),
                "{pattern}"
            );
        }
        matches("w", "(", "pcre").expect_err("not an expression");
        matches("w", &"a{1000}{1000}".repeat(3), "pcre").expect_err("too large");
        matches("w", "w", "soundex").expect_err("unknown matcher");
    }
}
