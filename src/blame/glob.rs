//! Patterns that choose paths.
//!
//! `?` stands for one byte and `*` for any number of them, neither for `/`; `**` for anything;
//! `[a-z]` and `[!a-z]` for one byte of a set. A pattern without a slash is compared with
//! every name in a path, one with a slash with the whole path; a pattern that fits a directory
//! fits all that is in it.

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Glob {
    pattern: Vec<u8>,
    by_name: bool,
}

impl Glob {
    pub(super) fn new(pattern: &str) -> Glob {
        let trimmed = pattern.trim_end_matches('/');
        Glob {
            by_name: !trimmed.contains('/'),
            pattern: trimmed.trim_start_matches('/').as_bytes().to_vec(),
        }
    }

    pub(super) fn matches(&self, path: &[u8]) -> bool {
        if self.by_name {
            return path
                .split(|&byte| byte == b'/')
                .any(|name| fits(&self.pattern, name));
        }
        fits(&self.pattern, path)
            || memchr::memchr_iter(b'/', path).any(|slash| fits(&self.pattern, &path[..slash]))
    }
}

/// Backtracks to the last `**` and, after it, to the last `*`: the work is at most
/// proportional to the square of the path for each `**`.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on after one more byte was given to the star.
    let mut star: Option<(usize, usize)> = None;
    let mut double: Option<(usize, usize)> = None;
    loop {
        if pattern[p..].starts_with(b"**") {
            p += 2;
            // `**/` also stands for no directory at all.
            if pattern.get(p) == Some(&b'/') && (t == 0 || text[t - 1] == b'/') {
                p += 1;
            }
            double = Some((p, t));
            star = None;
            continue;
        }
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            star = Some((p, t));
            continue;
        }
        if p == pattern.len() && t == text.len() {
            return true;
        }
        let width = text.get(t).and_then(|&byte| one(&pattern[p..], byte));
        if let Some(width) = width {
            p += width;
            t += 1;
            continue;
        }
        match (star, double) {
            (Some((after, from)), _) if text.get(from).is_some_and(|&byte| byte != b'/') => {
                (p, t) = (after, from + 1);
                star = Some((after, from + 1));
            }
            (_, Some((after, from))) if from < text.len() => {
                (p, t) = (after, from + 1);
                double = Some((after, from + 1));
                star = None;
            }
            _ => return false,
        }
    }
}

/// How much of the pattern stands for this byte.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match *pattern.first()? {
        b'?' => (byte != b'/').then_some(1),
        b'\\' if pattern.len() > 1 => (pattern[1] == byte).then_some(2),
        b'[' => set(pattern, byte),
        literal => (literal == byte).then_some(1),
    }
}

fn set(pattern: &[u8], byte: u8) -> Option<usize> {
    let negated = matches!(pattern.get(1), Some(b'!' | b'^'));
    let start = 1 + usize::from(negated);
    // A bracket that comes first belongs to the set.
    let Some(length) = memchr::memchr(b']', pattern.get(start + 1..).unwrap_or_default()) else {
        return (byte == b'[').then_some(1);
    };
    let members = &pattern[start..start + 1 + length];
    let mut found = false;
    let mut at = 0;
    while at < members.len() {
        if members.get(at + 1) == Some(&b'-') && at + 2 < members.len() {
            found |= (members[at]..=members[at + 2]).contains(&byte);
            at += 3;
        } else {
            found |= members[at] == byte;
            at += 1;
        }
    }
    (found != negated && byte != b'/').then_some(start + length + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_what_they_should() {
        for (pattern, path, fits) in [
            ("*.rs", "src/git/mod.rs", true),
            ("*.rs", "src/git/mod.rsx", false),
            ("src", "src/git/mod.rs", true),
            ("src/", "src/git/mod.rs", true),
            ("src/git", "src/git/mod.rs", true),
            ("git/mod.rs", "src/git/mod.rs", false),
            ("src/*.rs", "src/git/mod.rs", false),
            ("src/**/*.rs", "src/git/mod.rs", true),
            ("src/**/mod.rs", "src/mod.rs", true),
            ("/mod.rs", "mod.rs", true),
            ("/mod.rs", "src/mod.rs", false),
            ("**/vendor/**", "a/vendor/b/c", true),
            ("**/vendor/**", "vendor/b", true),
            ("a[0-9]?", "x/a7b", true),
            ("a[!0-9]?", "x/a7b", false),
            ("a[]]", "a]", true),
            ("a[", "a[", true),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("*a*b*c", "xxaxxbxxc", true),
            ("*a*b*c", "xxaxxcxxb", false),
            ("", "x", false),
        ] {
            assert_eq!(
                Glob::new(pattern).matches(path.as_bytes()),
                fits,
                "{pattern} {path}"
            );
        }
    }
}
