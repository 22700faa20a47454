"""A Python worker whose analyses all have to be tried again, in five minutes.

    retries.py QUEUE EXCEPTION

The exception is what a result says of one, in JSON: exc_type, exc_module, exc_message.
"""
import importlib
import json
import os
import sys

from celery import Celery

url = os.environ["QUEUE_BROKER_URL"]
app = Celery("retries", broker=url, backend=url)
queue, raised = sys.argv[1], json.loads(sys.argv[2])
error = getattr(importlib.import_module(raised["exc_module"]), raised["exc_type"])


@app.task(name="analyze_repo_task", bind=True, typing=False)
def analyze_repo_task(self, *args, **kwargs):
    raise self.retry(exc=error(*raised["exc_message"]), countdown=300)


# A prefetch without limit: the next tries are held until their time has come.
app.conf.worker_prefetch_multiplier = 0
app.worker_main(["worker", "--concurrency=1", "--loglevel=info", "-E", "-Q", queue])
