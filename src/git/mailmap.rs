//! The mailmap: which address an author goes by.
//!
//! Each line is one of `Name <commit@>` (names only, no use here), `<proper@> <commit@>`,
//! `Name <proper@> <commit@>` and `Name <proper@> Commit Name <commit@>`. Addresses and names
//! are compared without regard to ASCII case; an entry with a commit name beats one without;
//! a later line beats an earlier one. Answers for what `git blame` makes of `HEAD:.mailmap`.

use std::collections::HashMap;

/// What a mailmap says about addresses.
#[derive(Debug, Default)]
pub struct Mailmap {
    people: HashMap<Vec<u8>, Person>,
}

/// What is known of one address used in commits.
#[derive(Debug, Default)]
struct Person {
    /// The proper address whatever the name in the commit.
    email: Option<Vec<u8>>,
    /// By name in the commit. `None`: the name is mapped, its address is not.
    by_name: HashMap<Vec<u8>, Option<Vec<u8>>>,
}

/// A name, if there is one, and the address after it.
type Identity<'a> = (Option<&'a [u8]>, &'a [u8]);

impl Mailmap {
    /// Reads the text of a mailmap; lines that say nothing are passed over, as git does.
    pub fn parse(text: &[u8]) -> Mailmap {
        let mut mailmap = Mailmap::default();
        // git reads the file as a C string.
        let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
        for line in text.split(|&byte| byte == b'\n') {
            if line.first() == Some(&b'#') {
                continue;
            }
            let Some(((_, first), rest)) = identity(line, false) else {
                continue;
            };
            match identity(rest, true) {
                // Only the name is mapped, but it stands in the way of nothing.
                None => {
                    mailmap
                        .people
                        .entry(first.to_ascii_lowercase())
                        .or_default();
                }
                Some(((name, commit), _)) => {
                    let person = mailmap
                        .people
                        .entry(commit.to_ascii_lowercase())
                        .or_default();
                    match name {
                        None => person.email = Some(first.to_vec()),
                        Some(name) => {
                            let name = name.to_ascii_lowercase();
                            person.by_name.insert(name, Some(first.to_vec()));
                        }
                    }
                }
            }
        }
        mailmap
    }

    /// The proper address of somebody who signed a commit with this name and address.
    pub fn email<'a>(&'a self, name: &[u8], email: &'a [u8]) -> &'a [u8] {
        let Some(person) = self.people.get(&email.to_ascii_lowercase()) else {
            return email;
        };
        let by_name = match person.by_name.is_empty() {
            true => None,
            false => person.by_name.get(&name.to_ascii_lowercase()),
        };
        let proper = match by_name {
            Some(proper) => proper,
            None => &person.email,
        };
        proper.as_deref().unwrap_or(email)
    }
}

/// Reads up to the end of the first address; gives back what follows it.
fn identity(text: &[u8], may_be_empty: bool) -> Option<(Identity<'_>, &[u8])> {
    let left = memchr::memchr(b'<', text)?;
    let right = left + 1 + memchr::memchr(b'>', &text[left + 1..])?;
    if right == left + 1 && !may_be_empty {
        return None;
    }
    let name = trim(&text[..left]);
    let name = (!name.is_empty()).then_some(name);
    Some(((name, &text[left + 1..right]), &text[right + 1..]))
}

/// Without white space, as C knows it, at both ends.
fn trim(text: &[u8]) -> &[u8] {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t'..=b'\r');
    let start = text
        .iter()
        .position(|byte| !is_space(byte))
        .unwrap_or(text.len());
    let end = text
        .iter()
        .rposition(|byte| !is_space(byte))
        .map_or(start, |at| at + 1);
    &text[start..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"# People <no@x> <none@x>\n\
        Name Only <only@x>\n\
        <proper@x> <Commit@x>\n\
        Two <two@x> <old-two@x>\n\
        Three <three@x> Commit Three <shared@x>\n\
        Four <four@x> COMMIT four <shared@x>\n\
        <empty@x> <>\n\
        <early@x> <twice@x>\n\
        <late@x> <twice@x>\r\n\
        broken <line\n\
        <> <nobody@x>";

    #[test]
    fn addresses_are_mapped_as_the_forms_say() {
        let mailmap = Mailmap::parse(TEXT);
        for (name, email, proper) in [
            ("Any", "only@x", "only@x"),
            ("Any", "commit@X", "proper@x"),
            ("Any", "old-two@x", "two@x"),
            ("commit three", "shared@x", "three@x"),
            ("Commit Four", "Shared@x", "four@x"),
            ("Commit Five", "Shared@x", "Shared@x"),
            ("Any", "", "empty@x"),
            ("Any", "twice@x", "late@x"),
            ("Any", "none@x", "none@x"),
            ("Any", "nobody@x", "nobody@x"),
        ] {
            let found = mailmap.email(name.as_bytes(), email.as_bytes());
            assert_eq!(String::from_utf8_lossy(found), proper, "{name} <{email}>");
        }
    }
}
