//! Git repositories made by git, and what git itself says about them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// A repository with a work tree in a temporary directory.
pub struct Repository {
    directory: TempDir,
    clock: u64,
}

impl Repository {
    /// An empty repository on branch `main`.
    pub fn new() -> Self {
        let repository = Self {
            directory: tempfile::Builder::new()
                .prefix("celeriac-repository-")
                .tempdir()
                .expect("a temporary directory"),
            clock: 1_700_000_000,
        };
        repository.git(&["init", "-q", "-b", "main"]);
        repository
    }

    /// Writes the files and commits everything as `Name <email>`, a minute after the last one.
    pub fn commit(&mut self, author: &str, files: &[(&str, &str)]) -> &mut Self {
        for (path, content) in files {
            self.write(path, content.as_bytes());
        }
        self.git(&["add", "-A"]);
        self.clock += 60;
        let (name, email) = author
            .split_once(" <")
            .unwrap_or((author, "nobody@example.com"));
        let date = format!("{} +0000", self.clock);
        let done = command(self.path())
            .args(["commit", "-q", "--allow-empty", "-m", "change"])
            .env("GIT_AUTHOR_NAME", name)
            .env("GIT_AUTHOR_EMAIL", email.trim_end_matches('>'))
            .env("GIT_AUTHOR_DATE", &date)
            .env("GIT_COMMITTER_DATE", &date)
            .output()
            .expect("git runs");
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        self
    }

    /// Writes a file of the work tree without committing it.
    pub fn write(&self, path: &str, content: &[u8]) {
        let path = self.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a file has a directory")).expect("mkdir");
        std::fs::write(path, content).expect("write");
    }

    /// Runs git in the work tree and returns what it printed.
    #[track_caller]
    pub fn git(&self, arguments: &[&str]) -> Vec<u8> {
        let done = command(self.path())
            .args(arguments)
            .output()
            .expect("git runs");
        assert!(
            done.status.success(),
            "git {arguments:?}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        done.stdout
    }

    /// The work tree.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// `file://…`, which the worker takes with `ALLOW_LOCAL_REPOS=1`.
    pub fn url(&self) -> String {
        format!("file://{}", self.path().display())
    }

    /// The id of HEAD's commit.
    pub fn head(&self) -> String {
        String::from_utf8_lossy(&self.git(&["rev-parse", "HEAD"]))
            .trim()
            .to_owned()
    }

    /// Lines per author e-mail over all text files at HEAD, as `git blame` counts them.
    pub fn blame_totals(&self) -> BTreeMap<String, u64> {
        let mut totals = BTreeMap::new();
        for entry in self
            .git(&["ls-tree", "-r", "-z", "HEAD"])
            .split(|&byte| byte == 0)
        {
            let entry = String::from_utf8_lossy(entry);
            let Some((meta, path)) = entry.split_once('\t') else {
                continue;
            };
            let object = meta.split(' ').nth(2).expect("mode, type, object");
            if meta.split(' ').nth(1) != Some("blob") {
                continue;
            }
            let content = self.git(&["cat-file", "blob", object]);
            if content.iter().take(8000).any(|&byte| byte == 0) {
                continue;
            }
            let blame = self.git(&["blame", "--line-porcelain", "HEAD", "--", path]);
            for line in blame.split(|&byte| byte == b'\n') {
                if let Some(mail) = line.strip_prefix(b"author-mail ") {
                    let mail = String::from_utf8_lossy(mail);
                    let mail = mail
                        .trim_start_matches('<')
                        .trim_end_matches('>')
                        .to_owned();
                    *totals.entry(mail).or_insert(0) += 1;
                }
            }
        }
        totals
    }
}

impl Default for Repository {
    fn default() -> Self {
        Self::new()
    }
}

/// git with a blank configuration, so that no developer's settings change a result.
pub fn command(directory: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(directory)
        .stdin(Stdio::null())
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("LC_ALL", "C.UTF-8")
        .env("GIT_COMMITTER_NAME", "Committer")
        .env("GIT_COMMITTER_EMAIL", "committer@example.com");
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"] {
        command.env_remove(variable);
    }
    command
}
