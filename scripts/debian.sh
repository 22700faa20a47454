# shellcheck shell=bash
# Sourced by the other scripts: speak to the user, and install Debian packages after saying why.

say() { printf '%s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}

# install_packages WHY PACKAGE...: apt-get as root or through sudo, or an error that says what to do.
install_packages() {
    local why=$1 attempt
    local -a root=()
    shift
    if ! command -v apt-get >/dev/null; then
        die "$why needs $*, and this machine has no apt-get" "install $* with your package manager and try again"
    fi
    if [ "$(id -u)" -ne 0 ]; then
        # -n: a script that waits for a password nobody sees would hang.
        if ! sudo -n true 2>/dev/null; then
            die "$why needs the Debian packages: $*" "run: sudo apt-get install $*"
        fi
        root=(sudo)
    fi
    say "installing the Debian packages $* ($why)"
    # RUNLEVEL=1 keeps the packages from starting system-wide servers; ours are private ones.
    root+=(env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1)
    for attempt in 1 2 3 4 5; do
        if "${root[@]}" apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" \
            </dev/null >"${TMPDIR:-/tmp}/celeriac-apt.$$.log" 2>&1; then
            rm -f "${TMPDIR:-/tmp}/celeriac-apt.$$.log"
            return 0
        fi
        say "apt-get did not succeed (attempt $attempt of 5); refreshing the package lists"
        "${root[@]}" apt-get -o DPkg::Lock::Timeout=300 update </dev/null >/dev/null 2>&1 || true
        sleep "$attempt"
    done
    tail -n 15 "${TMPDIR:-/tmp}/celeriac-apt.$$.log" >&2
    rm -f "${TMPDIR:-/tmp}/celeriac-apt.$$.log"
    die "could not install: $*" "install them by hand and try again"
}

# need_program NAME PACKAGE WHY
need_program() {
    command -v "$1" >/dev/null || install_packages "$3" "$2"
}
