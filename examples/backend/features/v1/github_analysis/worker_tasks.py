"""What the backend's request handlers call: start an analysis, ask how it stands."""
import os

from celery.result import AsyncResult

from celery_app import celery_app

# None is Celery's default queue; a deployment that gives the worker `-Q` names it here.
QUEUE = os.environ.get("ANALYSIS_QUEUE") or None


def enqueue_analysis_task(user_id, repo_url, github_token=None):
    """Returns at once; the task id of the answer is what get_task_status asks for."""
    task = celery_app.send_task(
        "analyze_repo_task", args=[user_id, repo_url, github_token], queue=QUEUE)
    return {"task_id": task.id, "status": "PENDING", "repo_url": repo_url}


def get_task_status(task_id):
    """PENDING, PROGRESS with info {"status": …}, SUCCESS with the result, or FAILURE."""
    task = AsyncResult(task_id, app=celery_app)
    # One read: state and info of two reads may belong to different moments.
    document = task.backend.get_task_meta(task_id)
    status, info = document["status"], document["result"]
    if isinstance(info, BaseException):
        info = f"{type(info).__name__}: {info}"
    return {
        "task_id": task_id,
        "status": status,
        "result": info if status == "SUCCESS" else None,
        "info": info,
    }


def test_celery_connection(timeout=20):
    """Sends test_task and waits for its answer: broker, worker and results all work."""
    task = celery_app.send_task("test_task", args=["Hello from the backend"], queue=QUEUE)
    return {"task_id": task.id, "status": "SUCCESS", "result": task.get(timeout=timeout)}


test_celery_connection.__test__ = False  # not a test of pytest's
