"""What a blame of everything costs, beside git; see scripts/bench-blame.

The sample of files is drawn with a fixed seed, so that two runs compare the same files. What git
would need for all files is the sample's mean times their number, and is called an estimate. CPU
seconds are those of the process and its children; memory is the peak of RssAnon, looked at every
few milliseconds: mapped packs are page cache and not counted.

Wall time says little on a busy machine. So the CPU time of each thread is looked at as well: that of the
caller, of the longer of the two that prepare and of the longer of the two that walk together are what
two free cores would need.
"""
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time

repository, sample_size = sys.argv[1], int(sys.argv[2])
celeriac = os.path.abspath(os.environ["BENCH_CELERIAC"])
caches = [int(cache) for cache in os.environ.get("BENCH_CACHES", "").split(",") if cache]
environment = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
environment.pop("BLAME_CACHE", None)
# Name and CPU seconds of each thread of the last command, by its number.
threads = {}


def run(command, settings=None, discard=False):
    """Output, CPU seconds, wall seconds and peak of anonymous KiB of a command."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             stdout=subprocess.DEVNULL if discard else subprocess.PIPE,
                             env={**environment, **(settings or {})})
    peak = [0]
    threads.clear()

    def watch():
        tasks = f"/proc/{child.pid}/task"
        while child.poll() is None:
            try:
                for task in os.listdir(tasks):
                    with open(f"{tasks}/{task}/comm", encoding="ascii", errors="replace") as name:
                        kind = name.read().strip()
                    with open(f"{tasks}/{task}/schedstat", encoding="ascii") as spent:
                        threads[int(task)] = kind, int(spent.read().split()[0]) / 1e9
                with open(f"/proc/{child.pid}/status", encoding="ascii", errors="replace") as status:
                    for line in status:
                        if line.startswith("RssAnon"):
                            peak[0] = max(peak[0], int(line.split()[1]))
            except (OSError, IndexError):
                pass  # A thread or the process has just ended.
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, errors = child.communicate()
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    watcher.join()
    if child.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{errors.decode(errors='replace')[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return output, cpu, wall, peak[0]


def git(*arguments, discard=False):
    return run(["git", "-C", repository, *arguments], discard=discard)


def text_files():
    """Path and number of lines of every text file and symbolic link at HEAD."""
    listing = git("ls-tree", "-r", "-z", "HEAD")[0].split(b"\0")[:-1]
    entries = [entry.partition(b"\t") for entry in listing]
    blobs = [(meta.split()[2], path) for meta, _, path in entries if meta.split()[1] == b"blob"]
    reader = subprocess.Popen(["git", "-C", repository, "cat-file", "--batch"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    files = []
    for blob, path in blobs:
        reader.stdin.write(blob + b"\n")
        reader.stdin.flush()
        size = int(reader.stdout.readline().split()[2])
        content = reader.stdout.read(size + 1)[:-1]
        if b"\0" not in content[:8000]:
            unended = bool(content) and not content.endswith(b"\n")
            files.append((path, content.count(b"\n") + unended))
    reader.stdin.close()
    reader.wait()
    return files


def analyze(threads, cache=None):
    settings = {"BLAME_CACHE": str(cache)} if cache else {}
    command = [celeriac, "analyze", repository, "--json", "--statistics", "--database", "none",
               "--threads", str(threads)]
    output, cpu, wall, peak = run(command, settings)
    return json.loads(output), cpu, wall, peak


files = text_files()
total_lines = sum(lines for _, lines in files)
commits = int(git("rev-list", "--count", "HEAD")[0])
sample = random.Random(1).sample(files, min(sample_size, len(files)))
if not sample:
    sys.exit(f"{repository} has no text files at HEAD")
print(f"{repository}: {commits:,} commits, {len(files):,} text files, {total_lines:,} lines\n")
print(f"{'':36}{'files':>9}{'lines':>12}{'CPU s':>11}{'wall s':>11}{'lines/CPU s':>14}{'MiB':>8}")


def row(label, count, lines, used, took, peak=0):
    memory = f"{peak / 1024:>8,.0f}" if peak else ""
    print(f"{label:<36}{count:>9,}{lines:>12,}{used:>11.2f}{took:>11.2f}"
          f"{lines / max(used, 1e-9):>14,.0f}{memory}")


def longest():
    """CPU seconds of the threads that nothing else can run beside."""
    blame = [spent for _, (name, spent) in sorted(threads.items()) if name == "blame"]
    others = sum(spent for name, spent in threads.values() if name != "blame")
    return others + max(blame[:2], default=0) + max(blame[2:], default=0)


one = analyze(1)
row("celeriac analyze, 1 thread", len(files), total_lines, *one[1:])
two = analyze(2)
alone = longest()
row("celeriac analyze, 2 threads", len(files), total_lines, *two[1:])
for cache in caches:
    row(f"  with a cache of {cache} MiB", len(files), total_lines, *analyze(2, cache)[1:])

_, log_cpu, log_wall, _ = git("log", "--numstat", "--format=%H", discard=True)
row("git log --numstat", len(files), total_lines, log_cpu, log_wall)
git_cpu = git_wall = 0.0
for path, _ in sample:
    _, used, took, _ = git("blame", "--line-porcelain", "HEAD", "--", os.fsdecode(path))
    git_cpu += used
    git_wall += took
scale = len(files) / len(sample)
row("git blame per file, the sample", len(sample), sum(lines for _, lines in sample), git_cpu, git_wall)
row("git blame per file, all (estimate)", len(files), total_lines, git_cpu * scale, git_wall * scale)

print(f"\n2 threads / 1 thread, wall: {two[2] / max(one[2], 1e-9):.2f}")
print(f"2 threads / 1 thread, CPU of the longest threads: {alone / max(one[1], 1e-9):.2f}")
print(f"2 threads / git log --numstat, wall: {two[2] / max(log_wall, 1e-9):.2f}")
print(f"git blame / celeriac on 2 threads, CPU: {git_cpu * scale / max(two[1], 1e-9):,.0f} × (estimate)")
statistics = one[0]["statistics"]
times = {name[len("seconds_"):]: value for name, value in statistics.items() if name.startswith("seconds_")}
print("stages on 1 thread, s: " + ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in times.items()))
counts = {name: value for name, value in statistics.items() if not name.startswith("seconds_")}
print("counts: " + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items()))
