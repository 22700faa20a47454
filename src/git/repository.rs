//! A repository on disk: where its objects are and what its names stand for.
//!
//! libgit2 finds the directory, follows references and peels tags. Nothing else of the
//! repository's configuration is obeyed, and none of the machine's or the user's is read: it is no
//! business of ours, and inside the sandbox it cannot be read.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Once;

use super::objects::Packs;
use super::{Error, Oid};

/// A repository that was opened; can be shared by threads.
pub struct Repository {
    directory: PathBuf,
    objects: PathBuf,
    packs: Packs,
    shallow: Vec<Oid>,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repository")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl Repository {
    /// Opens a bare repository, a `.git` directory or a work tree.
    pub fn open(path: &Path) -> Result<Repository, Error> {
        let opened = open(path)?;
        let directory = opened.path().to_owned();
        let common = opened.commondir();
        let objects = common.join("objects");
        let packs = Packs::open(&objects)?;
        let shallow = shallow_commits(&common.join("shallow"))?;
        Ok(Repository {
            directory,
            objects,
            packs,
            shallow,
        })
    }

    /// The commit HEAD stands for, or `None` when its branch has no commit yet.
    pub fn head(&self) -> Result<Option<Oid>, Error> {
        let repository = open(&self.directory)?;
        let head = match repository
            .find_reference("HEAD")
            .and_then(|head| head.resolve())
        {
            Ok(head) => head,
            Err(error)
                if matches!(
                    error.code(),
                    git2::ErrorCode::UnbornBranch | git2::ErrorCode::NotFound
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(unresolved("HEAD", &error)),
        };
        match head.target() {
            Some(target) => peel(&repository, "HEAD", target).map(Some),
            None => Ok(None),
        }
    }

    /// The commit that a branch, a tag or the name of a commit stands for.
    pub fn resolve(&self, revision: &str) -> Result<Oid, Error> {
        let repository = open(&self.directory)?;
        let object = repository
            .revparse_single(revision)
            .map_err(|error| unresolved(revision, &error))?;
        peel(&repository, revision, object.id())
    }

    /// The directory with HEAD and the references.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The commits at which a shallow clone ends, sorted.
    pub fn shallow(&self) -> &[Oid] {
        &self.shallow
    }

    /// The contents of a file in the tree of a commit, if there is one.
    pub fn file(&self, commit: Oid, path: &str) -> Result<Option<Vec<u8>>, Error> {
        let repository = self.libgit2()?;
        let found = git2::Oid::from_bytes(commit.as_bytes())
            .and_then(|commit| repository.find_commit(commit)?.tree())
            .and_then(|tree| tree.get_path(Path::new(path)))
            .and_then(|entry| repository.find_blob(entry.id()));
        match found {
            Ok(blob) => Ok(Some(blob.content().to_vec())),
            Err(error) if error.code() == git2::ErrorCode::NotFound => Ok(None),
            Err(error) => Err(unresolved(&format!("{commit}:{path}"), &error)),
        }
    }

    /// libgit2's view of the repository.
    pub(in crate::git) fn libgit2(&self) -> Result<git2::Repository, Error> {
        open(&self.directory)
    }

    /// The directory of the objects.
    pub(in crate::git) fn objects(&self) -> &Path {
        &self.objects
    }

    pub(in crate::git) fn packs(&self) -> &Packs {
        &self.packs
    }

    /// libgit2's view of the objects, without references and configuration.
    pub(in crate::git) fn odb(&self) -> Result<git2::Odb<'static>, git2::Error> {
        let odb = git2::Odb::new()?;
        let objects = self.objects.to_str().ok_or_else(|| {
            git2::Error::from_str("the path of the repository is not valid UTF-8")
        })?;
        odb.add_disk_alternate(objects)?;
        Ok(odb)
    }
}

/// The commit that a name, which stands for an object, stands for in the end. A commit is not parsed: libgit2
/// refuses some that git accepts, and who reads it says what is wrong with it.
fn peel(repository: &git2::Repository, revision: &str, target: git2::Oid) -> Result<Oid, Error> {
    /// Tags of tags of tags.
    const DEEPEST: usize = 64;
    let refused = |reason: String| Error::Revision {
        revision: revision.to_owned(),
        reason,
    };
    let odb = (repository.odb()).map_err(|error| unresolved(revision, &error))?;
    let mut name = target;
    for _ in 0..DEEPEST {
        let oid = Oid::from_bytes(name.as_bytes())
            .ok_or_else(|| refused("its name is no SHA-1".to_owned()))?;
        match odb.read_header(name) {
            Ok((_, git2::ObjectType::Commit)) => return Ok(oid),
            Ok((_, git2::ObjectType::Tag)) => {
                name = (repository.find_tag(name))
                    .map_err(|error| Error::Corrupt {
                        oid,
                        reason: error.message().to_owned(),
                    })?
                    .target_id();
            }
            Ok((_, kind)) => {
                let reason = format!("it is the {} {oid}, not a commit", kind.str());
                return Err(refused(reason));
            }
            Err(error) if error.code() == git2::ErrorCode::NotFound => {
                return Err(Error::Missing { oid });
            }
            Err(error) => {
                return Err(Error::Corrupt {
                    oid,
                    reason: error.message().to_owned(),
                });
            }
        }
    }
    Err(refused(format!("more than {DEEPEST} tags lead to it")))
}

/// Makes libgit2 look for configuration nowhere, and at any owner's repository: whose it is
/// matters to programs that run what a configuration names, and we run nothing.
fn forget_the_machine() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        use git2::ConfigLevel::{Global, ProgramData, System, XDG};
        for level in [ProgramData, System, XDG, Global] {
            // SAFETY: the options of libgit2 are plain variables of its own. They are set once,
            // before this module, the only one that opens repositories, opens the first.
            #[expect(unsafe_code, reason = "libgit2 has no safe way to set its options")]
            let set = unsafe { git2::opts::set_search_path(level, "") };
            if let Err(error) = set {
                log::warn!(
                    "git's configuration of the machine is read: {}",
                    error.message()
                );
            }
        }
        // SAFETY: as above.
        #[expect(unsafe_code, reason = "libgit2 has no safe way to set its options")]
        let set = unsafe { git2::opts::set_verify_owner_validation(false) };
        if let Err(error) = set {
            log::warn!("owners of repositories are checked: {}", error.message());
        }
    });
}

fn open(path: &Path) -> Result<git2::Repository, Error> {
    forget_the_machine();
    git2::Repository::open_ext(
        path,
        git2::RepositoryOpenFlags::NO_SEARCH,
        std::iter::empty::<&Path>(),
    )
    .map_err(|error| match declared_format(path) {
        Some(format) if format != "sha1" => Error::Format {
            path: path.to_owned(),
            format,
        },
        _ => Error::Open {
            path: path.to_owned(),
            reason: error.message().to_owned(),
        },
    })
}

/// The object format the configuration names; libgit2 only says that it does not know it.
fn declared_format(path: &Path) -> Option<String> {
    let text = [path.join("config"), path.join(".git/config")]
        .iter()
        .find_map(|file| std::fs::read(file).ok())?;
    String::from_utf8_lossy(&text).lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        let is_format = key.trim().eq_ignore_ascii_case("objectformat");
        is_format.then(|| value.trim().to_ascii_lowercase())
    })
}

fn shallow_commits(path: &Path) -> Result<Vec<Oid>, Error> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(Error::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    let lines = text.split(|&byte| byte == b'\n');
    let mut commits: Vec<Oid> = lines
        .filter_map(|line| Oid::from_hex(line.trim_ascii()))
        .collect();
    commits.sort();
    Ok(commits)
}

fn unresolved(revision: &str, error: &git2::Error) -> Error {
    Error::Revision {
        revision: revision.to_owned(),
        reason: error.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_configuration_of_the_machine_or_the_user_is_found() {
        let directory = tempfile::tempdir().unwrap();
        git2::Repository::init_bare(directory.path()).unwrap();
        Repository::open(directory.path()).unwrap();
        assert!(git2::Config::find_system().is_err());
        assert!(git2::Config::find_global().is_err());
        assert!(git2::Config::find_xdg().is_err());
    }
}
