"""The backend's Celery application. It only sends: the tasks themselves run in celeriac."""
import os

from celery import Celery

broker = os.environ.get("QUEUE_BROKER_URL", "redis://localhost:6379/0")
# With RabbitMQ and no backend named, results come back as messages.
backend = os.environ.get("CELERY_RESULT_BACKEND") or (
    "rpc://" if broker.startswith("amqp") else broker)

celery_app = Celery("backend", broker=broker, backend=backend)


# Names and signatures alone: Flower refuses to steer tasks its application does not know.

@celery_app.task(name="analyze_repo_task")
def analyze_repo_task(user_id, repo_url, user_github_token=None):
    """Who wrote the repository, line by line."""
    raise NotImplementedError("runs in the worker")


@celery_app.task(name="test_task")
def test_task(message):
    """A connection check: the result contains the message."""
    raise NotImplementedError("runs in the worker")
