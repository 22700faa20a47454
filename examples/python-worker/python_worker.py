"""The kind of Python worker that celeriac replaces: the same two tasks, the same settings.

Here for comparison: `make bench` measures it beside celeriac, and tests let both take tasks
from one queue.  celery -A python_worker worker --concurrency=2
"""
import os
import subprocess
import tempfile

from celery import Celery

broker = os.environ.get("QUEUE_BROKER_URL", "redis://localhost:6379/0")
app = Celery("python_worker", broker=broker, backend=os.environ.get("CELERY_RESULT_BACKEND") or (
    "rpc://" if broker.startswith("amqp") else broker))
app.conf.update(
    task_time_limit=1800,
    worker_prefetch_multiplier=1,
    worker_max_tasks_per_child=50,
    task_default_queue=os.environ.get("ANALYSIS_QUEUE") or "celery",
)


def git(directory, *arguments):
    return subprocess.run(["git", *arguments], cwd=directory, check=True,
                          stdout=subprocess.PIPE).stdout


@app.task(name="analyze_repo_task", bind=True)
def analyze_repo_task(self, user_id, repo_url, user_github_token=None):
    """Clones, then one `git blame` for each file. The token is not used here."""
    totals = {}
    with tempfile.TemporaryDirectory() as directory:
        git(directory, "clone", "--quiet", "--bare", "--", repo_url, ".")
        paths = git(directory, "ls-tree", "-r", "-z", "--name-only", "HEAD").split(b"\0")[:-1]
        for done, path in enumerate(paths):
            percent = 100 * done // len(paths)
            self.update_state(state="PROGRESS", meta={"status": f"분석 중... ({percent}%)"})
            for line in git(directory, "blame", "--line-porcelain", "HEAD", "--", path).split(b"\n"):
                if line.startswith(b"author-mail "):
                    mail = line[13:-1].decode("utf-8", "replace")
                    totals[mail] = totals.get(mail, 0) + 1
    ordered = dict(sorted(totals.items(), key=lambda entry: -entry[1]))
    return {"status": "success", "repo_url": repo_url, "total_contributors": len(ordered),
            "result": ordered}


@app.task(name="test_task")
def test_task(message):
    """A connection check: the same text as celeriac's."""
    return f"celeriac received: {message}"
