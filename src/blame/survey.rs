//! What there is to explain: the text files at HEAD and their lines.

use crate::git::line_diff::count_lines;
use crate::git::objects::Reader;
use crate::git::tree::Type;
use crate::git::tree_diff::{Leaf, leaves};
use crate::git::{self, Interrupt, Oid};

use super::glob::Glob;
use super::pending::{common, cut};
use super::{Error, Options, Skipped};

/// What it costs to cut a path into its names.
const FILE: usize = 1 << 8;

/// A NUL among so many first bytes makes a file binary, as in git.
const PROBE: usize = 8_000;

/// A text file at HEAD.
#[derive(Debug)]
pub(super) struct File {
    /// Its place in [`Survey::files`], by which ranges name it.
    pub(super) number: u32,
    pub(super) path: Vec<u8>,
    pub(super) lines: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// In the order of the tree.
    pub(super) files: Vec<File>,
    pub(super) lines: u64,
    pub(super) binary_files: u64,
    pub(super) skipped: Vec<Skipped>,
}

/// Lists the files of a tree and counts their lines.
pub(super) fn survey(
    reader: &mut Reader<'_>,
    tree: Oid,
    options: &Options,
) -> Result<Survey, Error> {
    let include = globs(&options.include);
    let exclude = globs(&options.exclude);
    let mut survey = Survey::default();
    for leaf in leaves(reader, tree, options.limits.max_files)? {
        let is_text = matches!(Type::of(leaf.mode), Type::File | Type::Link);
        let is_wanted = (include.is_empty() || include.iter().any(|glob| glob.matches(&leaf.path)))
            && !exclude.iter().any(|glob| glob.matches(&leaf.path));
        if is_text && is_wanted {
            survey.add(reader, leaf, options)?;
        }
    }
    Ok(survey)
}

fn globs(patterns: &[String]) -> Vec<Glob> {
    patterns.iter().map(|pattern| Glob::new(pattern)).collect()
}

impl Survey {
    fn add(&mut self, reader: &mut Reader<'_>, leaf: Leaf, options: &Options) -> Result<(), Error> {
        reader.check_interrupt()?;
        let limit = options.limits.max_file_bytes;
        let read = match reader.blob_size(leaf.oid) {
            Ok(size) if size > limit => Err(git::Error::TooLarge {
                oid: leaf.oid,
                size,
                limit,
            }),
            Ok(_) => reader.blob(leaf.oid),
            Err(error) => Err(error),
        };
        let object = match read {
            Ok(object) => object,
            Err(error @ (git::Error::TooLarge { .. } | git::Error::Missing { .. })) => {
                self.skipped.push(Skipped {
                    path: leaf.path,
                    reason: error.to_string(),
                });
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let bytes = &object.bytes;
        if memchr::memchr(0, &bytes[..bytes.len().min(PROBE)]).is_some() {
            self.binary_files += 1;
            return Ok(());
        }
        let lines = count_lines(bytes, reader.interrupt())?;
        let most = options.limits.max_file_lines;
        if lines > most {
            self.skipped.push(Skipped {
                path: leaf.path,
                reason: format!("count its lines: {lines} are more than the limit of {most}"),
            });
            return Ok(());
        }
        self.lines += lines as u64;
        self.files.push(File {
            number: self.files.len() as u32,
            path: leaf.path,
            // Blobs are smaller than 4 GiB, see `Limits`.
            lines: lines as u32,
        });
        Ok(())
    }

    /// Cuts the files into up to `count` parts in a row with about the same number of lines.
    pub(super) fn parts(
        &self,
        count: usize,
        interrupt: &Interrupt<'_>,
    ) -> Result<Vec<&[File]>, Error> {
        let mut parts = Vec::new();
        let mut rest = &self.files[..];
        let mut lines = self.lines;
        for left in (2..=count as u64).rev() {
            let mut before: Vec<&[u8]> = Vec::new();
            let mut files = Vec::with_capacity(rest.len());
            for file in rest {
                interrupt.work(FILE)?;
                let names: Vec<&[u8]> = file.path.split(|&byte| byte == b'/').collect();
                files.push((common(&before, &names), u64::from(file.lines)));
                before = names;
            }
            let share = lines / left;
            let Some(end) = cut(&files, lines, share, share / 3) else {
                break;
            };
            let (part, after) = rest.split_at(end);
            lines -= files[..end].iter().map(|(_, lines)| lines).sum::<u64>();
            rest = after;
            parts.push(part);
        }
        if !rest.is_empty() {
            parts.push(rest);
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_files_in_order_and_are_about_equal() {
        let mut survey = Survey::default();
        for number in 0..50_u32 {
            let lines = number * 7 % 13;
            survey.lines += u64::from(lines);
            survey.files.push(File {
                number,
                path: vec![number as u8],
                lines,
            });
        }
        for count in [1, 2, 4, 60] {
            let parts = survey.parts(count, &Interrupt::never()).unwrap();
            let numbers: Vec<u32> = parts.concat_numbers();
            assert_eq!(numbers, (0..50).collect::<Vec<_>>());
            let share = survey.lines / count as u64;
            for part in parts {
                let lines: u64 = part.iter().map(|file| u64::from(file.lines)).sum();
                assert!(lines <= share * 5 / 3 + 13, "{lines} of {share}");
            }
        }
    }

    trait Numbers {
        fn concat_numbers(&self) -> Vec<u32>;
    }

    impl Numbers for Vec<&[File]> {
        fn concat_numbers(&self) -> Vec<u32> {
            self.iter()
                .flat_map(|part| part.iter().map(|file| file.number))
                .collect()
        }
    }
}
