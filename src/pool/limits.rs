//! How much machine there is: processors this process may use, and a process's memory.
//!
//! A container with a quota of half a processor on a machine with 64 should run one child, not
//! 64; the count that Celery starts from sees the 64. Knows no children.

/// The processors this process may use, at least 1: the affinity mask, cut down to what the
/// quotas of its control groups (versions 1 and 2, up to the root) pay for. The standard library
/// reads all of these; a quota of 2.5 processors counts as 2, because a third child would only
/// take turns with the others.
pub fn available_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Resident memory of a process in KiB; `None` when it is gone.
pub fn resident_kib(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    resident_pages(&text).map(|pages| pages * page_size() / 1024)
}

fn resident_pages(statm: &str) -> Option<u64> {
    statm.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn page_size() -> u64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_the_second_number_of_statm() {
        assert_eq!(resident_pages("1000 250 30 4 0 5 0\n"), Some(250));
        assert_eq!(resident_pages(""), None);
        assert!(resident_kib(std::process::id()).is_some_and(|kib| kib > 100));
        assert_eq!(resident_kib(0), None);
    }
}
