"""A clone by celeriac beside `git clone --bare --single-branch --no-tags`; see scripts/bench-blame.

Both fetch over HTTP on loopback from `git http-backend`. What celeriac is measured with is an
analysis of no file at all: the clone, the opening of it and the reading of all commits. The server's
CPU is the same for both and not counted. Each is run a few times in turn, the least wall time counts.
"""
import os
import subprocess
import sys
import tempfile
import time

from git_http import environment, serve

repository, celeriac = sys.argv[1], os.path.abspath(os.environ["BENCH_CELERIAC"])
rounds = int(os.environ.get("BENCH_ROUNDS", "3"))


def run(command, settings):
    """Wall seconds, CPU seconds and peak of resident KiB of a command."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, env={**environment, **settings}, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)}\n{errors.decode(errors='replace')[-2000:]}")
    return time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss


url = serve(repository)
theirs, ours = [], []
for _ in range(rounds):
    with tempfile.TemporaryDirectory(prefix="bench-clone-") as folder:
        command = ["git", "clone", "--quiet", "--bare", "--single-branch", "--no-tags", url,
                   os.path.join(folder, "clone.git")]
        theirs.append(run(command, {}))
        command = [celeriac, "analyze", url, "--json", "--database", "none",
                   "--include", "no file has this name"]
        ours.append(run(command, {"ALLOW_LOCAL_REPOS": "true", "TMPDIR": folder}))
print(f"{'':36}{'wall s':>11}{'CPU s':>11}{'max RSS MiB':>14}")
for label, runs in (("git clone", theirs), ("celeriac: clone, read the commits", ours)):
    wall, used, peak = min(runs)
    print(f"{label:<36}{wall:>11.2f}{used:>11.2f}{peak / 1024:>14,.0f}")
print(f"\nceleriac / git, wall: {min(ours)[0] / min(theirs)[0]:.2f}; "
      f"CPU: {min(run[1] for run in ours) / min(run[1] for run in theirs):.2f} (best of {rounds})")
