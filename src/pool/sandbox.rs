//! What a child takes from itself before it touches a stranger's repository.
//!
//! Four fences, each applied as far as the kernel allows; what could not be had is told in one
//! warning per kind, never in silence:
//!
//! | fence | keeps the child from |
//! |---|---|
//! | resource limits | core dumps, endless files, descriptors, memory |
//! | no new privileges | gaining rights by set-uid programs |
//! | Landlock | files outside its own directory and a short list to read, other TCP ports than the given ones, binding a port, signalling or tracing processes outside |
//! | seccomp | starting programs and processes, tracing, mounting, kernel interfaces nobody needs here, sockets other than IPv4 and IPv6 |
//!
//! What remains open: an address cannot be fenced in by the kernel (Landlock knows ports only),
//! so *which host* is talked to is decided by the URL policy of the code that connects; UDP is
//! open for the name service; where no list of ports is given every TCP port is open.
//!
//! Knows no git and no jobs. The filter is a list of what is denied, not of what is allowed: a
//! new version of the C library must not kill analyses because it prefers another call.

use std::collections::BTreeMap;
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope, path_beneath_rules,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use serde::{Deserialize, Serialize};

/// How a child locks itself in. The default is everything on, no memory limit, every TCP port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Off: only the resource limits are set.
    pub enabled: bool,
    /// The only directory the child may write to. The pool fills in the child's own directory
    /// when it makes one; else this, else the temporary directory.
    pub directory: Option<PathBuf>,
    /// Everything may be read (repositories on this machine are analysed).
    pub allow_local: bool,
    /// Programs may be started (ssh is one).
    pub allow_processes: bool,
    /// The TCP ports that may be connected to, besides the name service's; empty = every port.
    pub connect_ports: Vec<u16>,
    /// More files and directories that may be read.
    pub read: Vec<PathBuf>,
    /// Most open files.
    pub max_open_files: Option<u64>,
    /// Longest file that can be written, bytes.
    pub max_file_size: Option<u64>,
    /// Most memory for data (heap and private mappings), bytes.
    pub max_memory: Option<u64>,
}

impl Default for Sandbox {
    fn default() -> Self {
        Sandbox {
            enabled: true,
            directory: None,
            allow_local: false,
            allow_processes: false,
            connect_ports: Vec::new(),
            read: Vec::new(),
            max_open_files: None,
            max_file_size: None,
            max_memory: None,
        }
    }
}

impl Sandbox {
    /// No fence but the resource limits.
    pub fn off() -> Self {
        Sandbox {
            enabled: false,
            ..Sandbox::default()
        }
    }
}

/// Name service, certificates, time zones, shared libraries and what the C library looks at to
/// count processors. No other file of `/etc`: some hold secrets.
const READABLE: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
    "/etc/localtime",
    "/etc/ld.so.cache",
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
    "/run/systemd/resolve",
    "/usr/share/zoneinfo",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/usr/lib",
    "/usr/lib64",
    "/lib",
    "/lib64",
    "/usr/local/lib",
    "/proc/self",
    "/proc/meminfo",
    "/proc/cpuinfo",
    "/proc/sys/vm/overcommit_memory",
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup",
    "/dev/urandom",
    "/dev/random",
    "/dev/zero",
];

/// The newest Landlock we know the meaning of; older kernels give what they have.
const NEWEST: ABI = ABI::V6;

/// Applies everything; returns what a person should know was not possible.
pub(super) fn enter(sandbox: &Sandbox) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Err(error) = limit_resources(sandbox) {
        warnings.push(format!("resource limits are not set: {error}"));
    }
    if !sandbox.enabled {
        return warnings;
    }
    if let Err(error) = nix::sys::prctl::set_no_new_privs() {
        warnings.push(format!("no_new_privs is not set: {error}"));
    }
    if let Some(warning) = fence_files_and_ports(sandbox) {
        warnings.push(warning);
    }
    if let Err(error) = fence_system_calls(sandbox) {
        warnings.push(format!(
            "the seccomp filter is not in force ({error}): a child could start programs"
        ));
    }
    warnings
}

fn limit_resources(sandbox: &Sandbox) -> nix::Result<()> {
    lower(Resource::RLIMIT_CORE, Some(0))?;
    lower(Resource::RLIMIT_NOFILE, sandbox.max_open_files)?;
    lower(Resource::RLIMIT_FSIZE, sandbox.max_file_size)?;
    lower(Resource::RLIMIT_DATA, sandbox.max_memory)
}

/// Lowers a limit for good; a lower one that is set already stays.
fn lower(resource: Resource, most: Option<u64>) -> nix::Result<()> {
    let Some(most) = most else { return Ok(()) };
    let (_, hard) = getrlimit(resource)?;
    let most = most.min(hard);
    setrlimit(resource, most, most)
}

// ---- Landlock ---------------------------------------------------------------------------------

fn fence_files_and_ports(sandbox: &Sandbox) -> Option<String> {
    match landlock(sandbox) {
        Err(error) => Some(format!(
            "Landlock is not in force ({error}): a child can read and write what this user can"
        )),
        Ok((RulesetStatus::NotEnforced, _)) => Some(String::from(
            "Landlock is not in force (kernel older than 5.13, or switched off): a child can read \
             and write what this user can",
        )),
        Ok((_, abi)) if abi < ABI::V4 && !sandbox.connect_ports.is_empty() => Some(String::from(
            "TCP ports are not fenced in (Landlock of kernels before 6.7 does not know them): a \
             child can connect to any port",
        )),
        Ok(_) => None,
    }
}

fn landlock(sandbox: &Sandbox) -> Result<(RulesetStatus, ABI), landlock::RulesetError> {
    let read = AccessFs::from_read(NEWEST);
    let execute: BitFlags<AccessFs> = AccessFs::Execute.into();
    let device = AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::MakeSock | AccessFs::MakeFifo;
    let work = AccessFs::from_all(NEWEST) & !device & !execute;
    let look = if sandbox.allow_processes {
        read
    } else {
        read & !execute
    };

    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?;
    if !sandbox.connect_ports.is_empty() {
        rules = rules.handle_access(AccessNet::ConnectTcp)?;
    }
    let mut rules = rules.create()?;

    let temporary = std::env::temp_dir();
    let directory = sandbox.directory.as_deref().unwrap_or(&temporary);
    if let Ok(directory) = PathFd::new(directory) {
        rules = rules.add_rule(PathBeneath::new(directory, work))?;
    }
    if let Ok(null) = PathFd::new("/dev/null") {
        rules = rules.add_rule(PathBeneath::new(
            null,
            AccessFs::ReadFile | AccessFs::WriteFile,
        ))?;
    }
    let everything = sandbox.allow_local || sandbox.allow_processes;
    let certificates = ["SSL_CERT_FILE", "SSL_CERT_DIR"]
        .into_iter()
        .filter_map(std::env::var_os)
        .map(PathBuf::from);
    let readable = READABLE
        .iter()
        .map(PathBuf::from)
        .chain(certificates)
        .chain(sandbox.read.iter().cloned())
        .chain(everything.then(|| PathBuf::from("/")));
    // Paths that do not exist here are passed over.
    rules = rules.add_rules(path_beneath_rules(readable, look))?;
    let dns: &[u16] = if sandbox.connect_ports.is_empty() {
        &[]
    } else {
        &[53]
    };
    // Nothing is added when every port is open: the kernel is then not asked to decide.
    for port in sandbox.connect_ports.iter().chain(dns) {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    let status = rules.restrict_self()?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi,
        _ => ABI::Unsupported,
    };
    Ok((status.ruleset, abi))
}

// ---- seccomp ----------------------------------------------------------------------------------

/// Never needed for reading repositories, whatever the arguments.
const DENIED: &[i64] = &[
    // other processes' memory and life
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    // mounts, namespaces, roots
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_quotactl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    // the kernel itself
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    // interfaces with a history of holes
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_vhangup,
    libc::SYS_fanotify_init,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_personality,
    // becoming somebody else
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    // a child answers nobody
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
];

/// The same for calls that only this processor has.
#[cfg(target_arch = "x86_64")]
const DENIED_HERE: &[i64] = &[
    libc::SYS_kexec_file_load,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_uselib,
    libc::SYS__sysctl,
    libc::SYS_ustat,
    libc::SYS_sysfs,
];
#[cfg(not(target_arch = "x86_64"))]
const DENIED_HERE: &[i64] = &[];

/// Starting programs and processes. A thread is started by `clone` with `CLONE_THREAD`.
const PROGRAMS: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn fence_system_calls(sandbox: &Sandbox) -> Result<(), String> {
    let own = u64::from(std::process::id());
    let mut denied: Rules = DENIED
        .iter()
        .chain(DENIED_HERE)
        .map(|call| (*call, Vec::new()))
        .collect();
    let families = [libc::AF_INET, libc::AF_INET6].map(i32::cast_unsigned);
    let no_internet = families
        .map(|family| condition(0, SeccompCmpOp::Ne, u64::from(family)))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    denied.insert(libc::SYS_socket, vec![rule(no_internet)?]);
    // abort() signals its own thread; nobody else may be signalled, whatever Landlock can do.
    for call in [libc::SYS_kill, libc::SYS_tgkill] {
        denied.insert(
            call,
            vec![rule(vec![condition(0, SeccompCmpOp::Ne, own)?])?],
        );
    }
    denied.insert(
        libc::SYS_prlimit64,
        vec![rule(vec![
            condition(0, SeccompCmpOp::Ne, 0)?,
            condition(0, SeccompCmpOp::Ne, own)?,
        ])?],
    );
    if !sandbox.allow_processes {
        denied.extend(PROGRAMS.iter().map(|call| (*call, Vec::new())));
        let thread = u64::from(libc::CLONE_THREAD.cast_unsigned());
        let process = condition(0, SeccompCmpOp::MaskedEq(thread), 0)?;
        denied.insert(libc::SYS_clone, vec![rule(vec![process])?]);
        // The flags of clone3 are out of a filter's sight; "there is no such call" makes the C
        // library fall back to clone. A filter has one answer, so this is a filter of its own.
        let clone3 = Rules::from([(libc::SYS_clone3, Vec::new())]);
        install(clone3, libc::ENOSYS)?;
    }
    install(denied, libc::EPERM)
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, String> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
        .map_err(|error| error.to_string())
}

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, String> {
    SeccompRule::new(conditions).map_err(|error| error.to_string())
}

fn install(rules: Rules, answer: i32) -> Result<(), String> {
    let architecture = std::env::consts::ARCH
        .try_into()
        .map_err(|_| format!("no filter for {}", std::env::consts::ARCH))?;
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(answer.cast_unsigned()),
        architecture,
    )
    .map_err(|error| error.to_string())?;
    let program: BpfProgram = filter
        .try_into()
        .map_err(|error: seccompiler::BackendError| error.to_string())?;
    seccompiler::apply_filter(&program).map_err(|error| error.to_string())
}
