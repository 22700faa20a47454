"""What the fences and policies cost: small analyses with and without them; see scripts/bench-safety.

Both workers clone the same small repository over HTTP on loopback, one task at a time, a batch by each
in turn. A fresh child for every task shows what locking a child in costs, which others pay once.
"""
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

from celery import Celery
from cryptography.fernet import Fernet

from git_http import environment, serve

BROKER, CELERIAC = sys.argv[1], os.path.abspath(os.environ["BENCH_CELERIAC"])
BATCHES, TASKS, COMMITS = 6, int(os.environ.get("BENCH_TASKS", "50")), 100
KEY = Fernet.generate_key()
WORKERS = {
    "without": {"SANDBOX": "0", "CLONE_DISK_RESERVE": "0"},
    "with": {"USER_MAX_RUNNING": "1000", "USER_RATE_LIMIT": "1000000/s", "TOKEN_ENCRYPTION_KEYS": KEY.decode()},
}


def small_repository(folder):
    subprocess.run(["git", "init", "-q", "--bare", folder], env=environment, check=True)
    stream = []
    for number in range(COMMITS):
        text = "".join(f"line {number} {line}\n" for line in range(50))
        stream.append(f"commit refs/heads/main\ncommitter a <a{number % 7}@b> {1700000000 + number} +0000\n"
                      f"data 1\nx\nM 644 inline f{number % 20}\ndata {len(text)}\n{text}\n")
    subprocess.run(["git", "-C", folder, "fast-import", "--quiet"], input="".join(stream), text=True,
                   env=environment, check=True)
    subprocess.run(["git", "-C", folder, "symbolic-ref", "HEAD", "refs/heads/main"], env=environment, check=True)


class Worker:
    def __init__(self, name, folder, options):
        self.queue = f"bench-{name}-{os.getpid()}{len(options)}"
        self.token = Fernet(KEY).encrypt(b"a token").decode() if name == "with" else "a token"
        folder = os.path.join(folder, self.queue)
        os.mkdir(folder)
        settings = {"QUEUE_BROKER_URL": BROKER, "CELERY_RESULT_BACKEND": BROKER, "ALLOW_LOCAL_REPOS": "1",
                    "TMPDIR": folder, "XDG_DATA_HOME": folder, **WORKERS[name]}
        self.process = subprocess.Popen([CELERIAC, "-q", "worker", "-Q", self.queue, "-c", "1", "-n",
                                         f"{self.queue}@%h", *options], env={**os.environ, **settings}, stdout=subprocess.DEVNULL,
                                        cwd=folder)
        self.times = []

    def batch(self, app, url):
        for _ in range(TASKS):
            begin = time.perf_counter()
            arguments = ["user", url, self.token]
            found = app.send_task("analyze_repo_task", arguments, queue=self.queue).get(timeout=60)
            self.times.append(time.perf_counter() - begin)
            assert found["total_contributors"] == 7, found

    def stop(self):
        self.process.terminate()
        self.process.wait()


print(f"{'':46}{'without':>12}{'with':>12}{'more':>10}")
with tempfile.TemporaryDirectory(prefix="bench-safety-") as folder:
    repository = os.path.join(folder, "repo.git")
    small_repository(repository)
    url, app = serve(repository), Celery(broker=BROKER, backend=BROKER)
    for label, options in (("children that go on", []), ("a fresh child for each task", ["--max-tasks-per-child=1"])):
        workers = [Worker(name, folder, [*options, *shlex.split(os.environ.get("BENCH_OPTIONS", ""))])
                   for name in WORKERS]
        try:
            for worker in workers:
                worker.batch(app, url)
                worker.times.clear()
            for _ in range(BATCHES):
                for worker in workers:
                    worker.batch(app, url)
        finally:
            for worker in workers:
                worker.stop()
        without, fenced = (statistics.median(worker.times) * 1000 for worker in workers)
        print(f"{label + ', median, ms':<46}{without:>12.2f}{fenced:>12.2f}{fenced - without:>10.2f}")
print(f"\n{COMMITS} commits, 20 files; {BATCHES * TASKS} analyses each, one after the other, the client's time included.\n"
      "with: sandbox, disk reserve, user limits, an encrypted token. Limits on size and the judgement of\n"
      "addresses have no switch and are in both.")
