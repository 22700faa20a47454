"""The demonstration's client: enqueues one analysis as a backend does, and shows what comes back.

    PYTHONPATH=examples/backend python scripts/demo.py REPOSITORY_URL
"""
import os
import sys
import time

from features.v1.github_analysis.worker_tasks import (
    enqueue_analysis_task, get_task_status, test_celery_connection)

ROWS = 15
DEADLINE = 1800


def follow(task_id):
    """Prints each new state until the end, and returns the last."""
    start, shown = time.monotonic(), None
    while True:
        status = get_task_status(task_id)
        info = status["info"] if isinstance(status["info"], dict) else {}
        text = status["status"]
        if text == "PROGRESS":
            text += "  " + str(info.get("status", info))
        if text != shown:
            print(f"  {time.monotonic() - start:6.2f} s  {text}", flush=True)
            shown = text
        if status["status"] in ("SUCCESS", "FAILURE", "REVOKED"):
            return status
        if time.monotonic() - start > DEADLINE:
            sys.exit(f"no end after {DEADLINE} s")
        time.sleep(0.02)


def show_contributors(result):
    lines = result["result"]
    total = sum(lines.values()) or 1
    print(f"\n{result['total_contributors']} contributors, {total:,} lines of {result['repo_url']}\n")
    widest = max((len(email) for email in list(lines)[:ROWS]), default=10)
    for rank, (email, count) in enumerate(list(lines.items())[:ROWS], 1):
        bar = "#" * round(40 * count / total)
        print(f"  {rank:3}. {email:<{widest}}  {count:>9,}  {100 * count / total:5.1f} %  {bar}")
    if len(lines) > ROWS:
        print(f"       and {len(lines) - ROWS} more")


def show_rows(task_id):
    url = os.environ.get("DATABASE_URL", "")
    if not url.startswith("postgres"):
        return
    import psycopg2
    # SQLAlchemy's spelling (postgresql+psycopg2://) is fine for the worker, not for libpq.
    scheme, _, rest = url.partition("://")
    connection = psycopg2.connect(f"{scheme.partition('+')[0]}://{rest}")
    with connection, connection.cursor() as cursor:
        print("\nin the database:")
        for query in (
                "SELECT task_id, state, head_commit, total_contributors, total_lines,"
                " finished_at - started_at AS took FROM analyses WHERE task_id = %s",
                "SELECT rank, email, lines FROM contributors JOIN analyses"
                " ON analyses.id = analysis_id WHERE task_id = %s ORDER BY rank LIMIT 5"):
            cursor.execute(query, (task_id,))
            names = [column.name for column in cursor.description]
            for row in cursor.fetchall():
                print("  " + "  ".join(f"{name}={value}" for name, value in zip(names, row)))
    connection.close()


def main():
    answer = test_celery_connection()
    print(f"test_task: {answer['result']!r}")
    task_id = enqueue_analysis_task(1, sys.argv[1], None)["task_id"]
    print(f"analyze_repo_task: {task_id}")
    status = follow(task_id)
    if status["status"] != "SUCCESS":
        sys.exit(f"{status['status']}: {status['info']}")
    show_contributors(status["result"])
    show_rows(task_id)


main()
