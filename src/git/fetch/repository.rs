//! The bare repository around a fetched pack, written by hand, and repositories read in place.
//!
//! A few small files make a repository; writing them ourselves means that no template, hook or
//! configuration of the machine takes part. References go to `packed-refs`, so that a name a server
//! chose never becomes a path.

use std::fs;
use std::path::{Path, PathBuf};

use gix::ObjectId;

use super::conversation::Wanted;
use super::error::Error;

/// Where a new repository keeps what is fetched.
pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Writes everything but the pack and the references into the existing empty directory `root`.
    pub(super) fn create(root: &Path) -> Result<Layout, Error> {
        let layout = Layout {
            root: root.to_owned(),
        };
        for directory in ["objects/pack", "objects/info", "refs/heads", "refs/tags"] {
            let path = root.join(directory);
            fs::create_dir_all(&path).map_err(disk("creating the directory", &path))?;
        }
        layout.write(
            "config",
            b"[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n",
        )?;
        layout.write("HEAD", b"ref: refs/heads/main\n")?;
        Ok(layout)
    }

    /// Where the pack grows.
    pub(super) fn incoming_pack(&self) -> PathBuf {
        self.root.join("objects/pack/incoming.tmp")
    }

    /// Where its index is written.
    pub(super) fn incoming_index(&self) -> PathBuf {
        self.root.join("objects/pack/incoming.idx.tmp")
    }

    /// Gives pack and index the names git looks for; returns the index.
    pub(super) fn admit(&self, checksum: ObjectId) -> Result<PathBuf, Error> {
        let pack = self.root.join(format!("objects/pack/pack-{checksum}.pack"));
        let index = pack.with_extension("idx");
        fs::rename(self.incoming_pack(), &pack).map_err(disk("naming the pack", &pack))?;
        fs::rename(self.incoming_index(), &index).map_err(disk("naming the index", &index))?;
        Ok(index)
    }

    /// Sets HEAD, to a branch where the server named one and the name is a branch's.
    pub(super) fn set_head(&self, wanted: &Wanted) -> Result<(), Error> {
        let branch = wanted
            .name
            .as_deref()
            .filter(|name| is_branch(name) && name.len() <= 1024);
        match (branch, wanted.peeled) {
            (Some(name), Some(id)) => {
                let refs = format!("# pack-refs with: peeled fully-peeled sorted \n{id} {name}\n");
                self.write("packed-refs", refs.as_bytes())?;
                self.write("HEAD", format!("ref: {name}\n").as_bytes())
            }
            (Some(name), None) => self.write("HEAD", format!("ref: {name}\n").as_bytes()),
            (None, Some(id)) => self.write("HEAD", format!("{id}\n").as_bytes()),
            (None, None) => Ok(()),
        }
    }

    /// Notes where history is cut.
    pub(super) fn set_shallow(&self, boundary: &[ObjectId]) -> Result<(), Error> {
        let lines: String = boundary.iter().map(|id| format!("{id}\n")).collect();
        self.write("shallow", lines.as_bytes())
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let path = self.root.join(name);
        fs::write(&path, content).map_err(disk("writing", &path))
    }
}

/// Whether this is the full name of a branch as git accepts it.
fn is_branch(name: &str) -> bool {
    name.starts_with("refs/heads/")
        && gix::validate::reference::name(gix::bstr::BStr::new(name)).is_ok()
}

/// Whether a user may name a branch so.
pub(super) fn is_branch_name(branch: &str) -> bool {
    !branch.starts_with('-') && branch.len() <= 255 && is_branch(&format!("refs/heads/{branch}"))
}

/// What a repository of this machine says of itself.
pub(super) struct Local {
    /// The commit of HEAD or of the branch; `None` when unborn.
    pub(super) head: Option<ObjectId>,
    /// Whether its history is cut.
    pub(super) shallow: bool,
}

/// Looks at a repository of this machine, with no configuration but its own.
pub(super) fn inspect(path: &Path, branch: Option<&str>) -> Result<Local, Error> {
    let fault = |detail: String| Error::Local {
        path: path.to_owned(),
        detail,
    };
    if !path.exists() {
        return Err(fault("there is no such directory".to_owned()));
    }
    let repository = gix::open_opts(path, gix::open::Options::isolated())
        .map_err(|error| fault(error.to_string()))?;
    let head = match branch {
        None => repository
            .head()
            .map_err(|error| fault(error.to_string()))?
            .try_into_peeled_id()
            .map_err(|error| fault(error.to_string()))?
            .map(gix::Id::detach),
        Some(branch) => {
            let find = |kind: &str| {
                let name = format!("refs/{kind}/{branch}");
                repository
                    .try_find_reference(name.as_str())
                    .map_err(|error| fault(error.to_string()))
            };
            let found = match find("heads")? {
                Some(reference) => Some(reference),
                None => find("tags")?,
            };
            let mut reference = found.ok_or_else(|| Error::NoBranch {
                url: path.display().to_string(),
                branch: branch.to_owned(),
            })?;
            let id = reference
                .peel_to_id()
                .map_err(|error| fault(error.to_string()))?;
            Some(id.detach())
        }
    };
    Ok(Local {
        head,
        shallow: repository
            .is_shallow()
            .map_err(|error| fault(error.to_string()))?,
    })
}

/// An error of our own disk.
pub(super) fn disk(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Disk {
        doing,
        path,
        source,
    }
}
