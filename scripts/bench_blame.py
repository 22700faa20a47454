"""CPU time, wall time and lines per second of both; see scripts/bench-blame.

The sample is drawn with a fixed seed, so that two runs compare the same files. What git would
need for all files is the sample's mean times their number, and is called an estimate.
"""
import os
import random
import resource
import subprocess
import sys
import tempfile
import time

repository, sample_size = sys.argv[1], int(sys.argv[2])
celeriac = os.path.abspath(os.environ["BENCH_CELERIAC"])
environment = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}


def run(command):
    """Output, CPU seconds and wall seconds of a command and its children."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment,
                          stderr=subprocess.PIPE, check=False)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr.decode(errors='replace')[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, cpu, wall


def git(*arguments):
    return run(["git", "-C", repository, *arguments])


def text_files():
    """Path and number of lines of every text file at HEAD."""
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


files = text_files()
total_lines = sum(lines for _, lines in files)
commits = int(git("rev-list", "--count", "HEAD")[0])
sample = random.Random(1).sample(files, min(sample_size, len(files)))
if not sample:
    sys.exit(f"{repository} has no text files at HEAD")

with tempfile.TemporaryDirectory() as directory:
    # The result is kept in a database of its own, not in the user's.
    environment.update(HOME=directory, XDG_DATA_HOME=directory)
    environment.pop("DATABASE_URL", None)
    _, cpu, wall = run([celeriac, "analyze", repository, "--json"])

sample_lines = sum(lines for _, lines in sample)
git_cpu = git_wall = 0.0
for path, _ in sample:
    _, used, took = git("blame", "--line-porcelain", "HEAD", "--", os.fsdecode(path))
    git_cpu += used
    git_wall += took
scale = len(files) / len(sample)

print(f"{repository}: {commits:,} commits, {len(files):,} text files, {total_lines:,} lines\n")
print(f"{'':36}{'files':>9}{'lines':>12}{'CPU s':>11}{'wall s':>11}{'lines/CPU s':>14}")


def row(label, count, lines, used, took):
    print(f"{label:<36}{count:>9,}{lines:>12,}{used:>11.2f}{took:>11.2f}{lines / max(used, 1e-9):>14,.0f}")


row("celeriac analyze, everything", len(files), total_lines, cpu, wall)
row("git blame per file, the sample", len(sample), sample_lines, git_cpu, git_wall)
row("git blame per file, all (estimate)", len(files), total_lines, git_cpu * scale, git_wall * scale)
print(f"\nCPU: git blame / celeriac = {git_cpu * scale / max(cpu, 1e-9):.0f} × (estimate)")
