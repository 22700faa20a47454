//! Lists of commits that do not count, such as `.git-blame-ignore-revs`.
//!
//! One full name a line; `#` begins a comment. A tag stands for its commit; what is no commit of the repository is
//! passed over, because such lists outlive what they name. Answers for `git blame --ignore-revs-file`.

use super::{Error, Oid, Repository};

/// The names in a list; `source` is named in the error about a line that is no name.
pub fn parse(text: &[u8], source: &str) -> Result<Vec<Oid>, Error> {
    let mut names = Vec::new();
    for (number, line) in (1..).zip(text.split(|&byte| byte == b'\n')) {
        let name = line.split(|&byte| byte == b'#').next().unwrap_or_default();
        let name = name.trim_ascii();
        if name.is_empty() {
            continue;
        }
        names.push(Oid::from_hex(name).ok_or_else(|| Error::List {
            list: source.to_owned(),
            number,
            line: String::from_utf8_lossy(name).into_owned(),
        })?);
    }
    Ok(names)
}

impl Repository {
    /// The commits that these names stand for; those that are not there are left out.
    pub fn commits_of(&self, names: &[Oid]) -> Result<Vec<Oid>, Error> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let repository = self.libgit2()?;
        let commit = |name: &Oid| {
            let name = git2::Oid::from_bytes(name.as_bytes()).ok()?;
            let object = repository.find_object(name, None).ok()?;
            let commit = object.peel(git2::ObjectType::Commit).ok()?;
            Oid::from_bytes(commit.id().as_bytes())
        };
        Ok(names.iter().filter_map(commit).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_blanks_and_line_ends_of_any_kind_are_passed_over() {
        let name = "0123456789abcdef0123456789abcdef01234567";
        let text = format!("# why\n\n  {name} # this one\r\n\t{name}\n#{name}\n{name}");
        let names = parse(text.as_bytes(), "list").unwrap();
        assert_eq!(names, [Oid::from_hex(name.as_bytes()).unwrap(); 3]);
    }

    #[test]
    fn a_line_that_is_no_full_name_is_told_with_its_place() {
        let error = parse(b"# one\n0123456\n", "some/list").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("some/list") && text.contains("line 2"),
            "{text}"
        );
        assert!(text.contains("0123456"), "{text}");
    }
}
