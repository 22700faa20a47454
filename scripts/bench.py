"""Measures celeriac and a Python Celery worker one after the other; see scripts/bench.

Both get the same command line and settings, and both are asked by the same client process, so
the client's own time is part of both latencies.
"""
import base64
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import redis
from celery import Celery
from celery.exceptions import TimeoutError

SERVER = sys.argv[1].rsplit("/", 1)[0]
TASKS = int(os.environ.get("BENCH_TASKS", "10000"))
CALLS = 500
STARTS = 5
HELD = 20_000
OPTIONS = shlex.split(os.environ.get("BENCH_OPTIONS", ""))
CELERIAC = os.path.abspath(os.environ["BENCH_CELERIAC"])
PYTHON = os.path.dirname(sys.executable)
WORKERS = {
    "python": [os.path.join(PYTHON, "celery"), "-A", "python_worker", "worker"],
    "celeriac": [CELERIAC, "worker"],
}


def descendants(pid):
    found = [pid]
    for parent in found:
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as text:
                    found.extend(int(child) for child in text.read().split())
        except OSError:
            pass
    return found


def pss(pid):
    """Kilobytes of the whole tree: shared pages are counted once in all."""
    total = 0
    for member in descendants(pid):
        try:
            with open(f"/proc/{member}/smaps_rollup", encoding="ascii") as text:
                total += sum(int(line.split()[1]) for line in text if line.startswith("Pss:"))
        except OSError:
            pass
    return total


def until(what, seconds, condition, pause=0.001):
    deadline = time.perf_counter() + seconds
    while not condition():
        if time.perf_counter() > deadline:
            sys.exit(f"waited {seconds} s in vain for {what}")
        time.sleep(pause)


class Contender:
    """One kind of worker with two Redis databases: messages, and results alone."""

    def __init__(self, name, database):
        self.name = name
        self.broker = f"{SERVER}/{database}"
        self.backend = f"{SERVER}/{database + 1}"
        self.queue = redis.Redis.from_url(self.broker)
        self.results = redis.Redis.from_url(self.backend)
        self.app = Celery("bench", broker=self.broker, backend=self.backend)
        self.process = None
        self.directory = tempfile.TemporaryDirectory(prefix="celeriac-bench-")

    def clear(self):
        self.queue.flushdb()
        self.results.flushdb()

    def start(self, concurrency):
        environment = {key: value for key, value in os.environ.items()
                       if not key.startswith(("CELERY_", "QUEUE_", "DATABASE_"))}
        environment.update(QUEUE_BROKER_URL=self.broker, CELERY_RESULT_BACKEND=self.backend,
                           HOME=self.directory.name, TMPDIR=self.directory.name,
                           PYTHONPATH=os.path.abspath("examples/python-worker"))
        self.log = open(os.path.join(self.directory.name, "log"), "ab")
        self.process = subprocess.Popen(
            [*WORKERS[self.name], f"--concurrency={concurrency}", "--loglevel=warning",
             "-n", f"{self.name}@%h", *OPTIONS],
            env=environment, cwd=self.directory.name, stdin=subprocess.DEVNULL,
            stdout=self.log, stderr=self.log, start_new_session=True)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()

    def check(self):
        if self.process.poll() is not None:
            with open(self.log.name, encoding="utf-8", errors="replace") as text:
                sys.exit(f"{self.name} ended with {self.process.returncode}:\n{text.read()[-2000:]}")

    def answers(self):
        self.check()
        node = f"{self.name}@{socket.gethostname()}"
        # A connection of its own: one that waited in vain would still be waiting, a second long.
        with self.app.connection_for_write() as connection:
            return bool(self.app.control.ping(
                destination=[node], timeout=0.02, limit=1, connection=connection))

    def first_result(self):
        """Milliseconds from the start of the process to the result of a task that waited."""
        self.clear()
        self.app.send_task("test_task", args=["first"])
        begin = time.perf_counter()
        self.start(2)
        until("the first result", 60, lambda: self.check() or self.results.dbsize() >= 1)
        elapsed = time.perf_counter() - begin
        self.stop()
        return 1000 * elapsed

    def first_answer(self):
        """Milliseconds from the start of the process to its first answer to a ping.

        The client's ping is repeated as it is: a client that waited in vain is blocked for a
        second, longer than what is measured.
        """
        self.clear()
        ear = self.queue.pubsub()
        ear.psubscribe("*.celery.pidbox")
        node = f"{self.name}@{socket.gethostname()}"
        self.app.control.ping(destination=[node], timeout=0.05)
        sent = {}
        until("the ping", 10, lambda: sent.update(ear.get_message() or {}) or sent.get("pattern"))
        ear.close()
        ping = json.loads(sent["data"])
        del ping["headers"]["expires"]
        reply_to = json.loads(base64.b64decode(ping["body"]))["reply_to"]
        replies = f"{reply_to['routing_key']}.{reply_to['exchange']}"
        # As kombu binds the reply queue, which went with the client's channel.
        separator = "\x06\x16"
        self.queue.sadd(f"_kombu.binding.{reply_to['exchange']}",
                        separator.join([reply_to["routing_key"], "", replies]))

        def answered():
            self.check()
            self.queue.publish(sent["channel"], json.dumps(ping))
            return self.queue.llen(replies)

        begin = time.perf_counter()
        self.start(2)
        until("an answer", 60, answered)
        elapsed = time.perf_counter() - begin
        self.stop()
        return 1000 * elapsed

    def throughput(self):
        """Tasks per second, from the first result to the last, of a queue that was full."""
        self.clear()
        with self.app.producer_pool.acquire(block=True) as producer:
            for number in range(TASKS):
                self.app.send_task("test_task", args=[f"message {number}"], producer=producer)
        self.start(2)
        until("the first result", 60, lambda: self.check() or self.results.dbsize() >= 1)
        first, begin = self.results.dbsize(), time.perf_counter()
        # Looking costs the worker a part of the machine: seldom is often enough.
        until("all results", 900, lambda: self.results.dbsize() >= TASKS, pause=0.02)
        elapsed = time.perf_counter() - begin
        self.stop()
        return (TASKS - first) / elapsed if TASKS > first else float("inf")

    def latency(self):
        """Milliseconds of send and get(), one after the other: median and 99th percentile."""
        self.clear()
        self.start(2)
        until("an answer", 60, self.answers, pause=0)
        times = []
        for number in range(CALLS + 20):
            begin = time.perf_counter()
            self.app.send_task("test_task", args=[f"message {number}"]).get(timeout=30)
            times.append(1000 * (time.perf_counter() - begin))
        self.stop()
        times = sorted(times[20:])
        return statistics.median(times), times[int(len(times) * 0.99)]

    def client(self):
        """The client's own part of that: sending, and getting a result that is there already."""
        self.clear()
        self.start(2)
        done = self.app.send_task("test_task", args=["done"])
        done.get(timeout=30)
        self.stop()
        times = []
        for number in range(CALLS):
            begin = time.perf_counter()
            self.app.send_task("test_task", args=[f"message {number}"])
            self.app.AsyncResult(done.id).get(timeout=30)
            times.append(1000 * (time.perf_counter() - begin))
        return statistics.median(times)

    def memory(self):
        """Megabytes of the idle tree of a worker with four processes."""
        self.clear()
        self.start(4)
        until("an answer", 60, self.answers, pause=0)
        time.sleep(3)  # what is still starting should not look idle
        kilobytes, processes = pss(self.process.pid), len(descendants(self.process.pid))
        self.stop()
        return kilobytes / 1024, processes

    def held(self):
        """Bytes for each task that waits in the worker for its time."""
        self.clear()
        self.start(1)
        until("an answer", 60, self.answers, pause=0)
        before = pss(self.process.pid)
        with self.app.producer_pool.acquire(block=True) as producer:
            for number in range(HELD):
                self.app.send_task("test_task", args=[f"message {number}"], countdown=3600,
                                   producer=producer)
        until("all tasks in the worker", 300, lambda: self.queue.hlen("unacked") >= HELD, pause=0.1)
        grown = pss(self.process.pid) - before
        self.stop()
        return 1024 * grown / HELD


class OverRabbitMQ(Contender):
    """The same worker with RabbitMQ for messages; results go to Redis, or come as messages."""

    def __init__(self, name, database, url):
        super().__init__(name, database)
        self.broker = url
        self.app = Celery("bench", broker=url, backend=self.backend)

    def clear(self):
        self.results.flushdb()
        with self.app.connection_for_write() as connection:
            # Not deleted: the client would not make it again.
            connection.default_channel.queue_declare("celery", durable=True, auto_delete=False)
            connection.default_channel.queue_purge("celery")

    def latency_of_messages(self):
        """As latency(), with results over rpc://."""
        redis_backend, redis_app = self.backend, self.app
        self.backend = "rpc://"
        self.app = Celery("bench", broker=self.broker, backend=self.backend)
        try:
            return self.latency()
        except TimeoutError:
            if self.name != "python":
                raise
            # A Python child that is replaced after its tasks may take a result along.
            print(f"{self.name}: a result over rpc:// did not come", file=sys.stderr)
            self.stop()
            return float("nan"), float("nan")
        finally:
            # The client's queue is named after the app's address in memory: a consumer that
            # stayed would take every other result of an app that gets the same one.
            self.app.backend.result_consumer.stop()
            self.backend, self.app = redis_backend, redis_app


def over_rabbitmq(url):
    columns = {}
    for database, name in ((4080, "python"), (4082, "celeriac")):
        print(f"measuring {name} on RabbitMQ …", file=sys.stderr, flush=True)
        contender = OverRabbitMQ(name, database, url)
        columns[name] = [*contender.latency(), *contender.latency_of_messages(),
                         contender.throughput()]
        contender.clear()
    rows = [
        (f"send → get() by Redis, median of {CALLS}, ms", "{:.2f}"),
        ("send → get() by Redis, 99th percentile, ms", "{:.2f}"),
        (f"send → get() by rpc://, median of {CALLS}, ms", "{:.2f}"),
        ("send → get() by rpc://, 99th percentile, ms", "{:.2f}"),
        (f"tasks/s, {TASKS:,} queued, concurrency 2", "{:,.0f}"),
    ]
    print(f"\n{'RabbitMQ':46}{'Python':>12}{'celeriac':>12}{'ratio':>10}")
    for (label, form), python, celeriac in zip(rows, columns["python"], columns["celeriac"]):
        ratio = celeriac / python if label.startswith("tasks/s") else python / celeriac
        print(f"{label:<46}{form.format(python):>12}{form.format(celeriac):>12}{ratio:>8.1f} ×")


def median_of(measure):
    return statistics.median(measure() for _ in range(STARTS))


def installed_size():
    """Megabytes of the Python packages a Celery worker needs, without the interpreter."""
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    total = 0
    for directory, _, names in os.walk(packages):
        if not os.path.relpath(directory, packages).startswith(("pip", "setuptools", "flower", "tornado")):
            total += sum(os.lstat(os.path.join(directory, name)).st_size for name in names)
    return total / 1e6


def main():
    columns = {}
    for database, name in ((4080, "python"), (4082, "celeriac")):
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        contender = Contender(name, database)
        median, worst = contender.latency()
        client = contender.client()
        memory, processes = contender.memory()
        columns[name] = [contender.throughput(), median, worst, client, memory, processes,
                         contender.held(),
                         median_of(contender.first_answer), median_of(contender.first_result),
                         os.path.getsize(CELERIAC) / 1e6 if name == "celeriac" else installed_size()]
        contender.clear()
    rows = [
        (f"tasks/s, {TASKS:,} queued, concurrency 2", "{:,.0f}", True),
        (f"send → get(), median of {CALLS}, ms", "{:.2f}", False),
        ("send → get(), 99th percentile, ms", "{:.2f}", False),
        ("  of which the client alone, median, ms", "{:.2f}", None),
        ("idle memory (PSS), concurrency 4, MiB", "{:.1f}", False),
        ("  processes", "{:.0f}", None),
        (f"memory for each of {HELD:,} ETA tasks, bytes", "{:,.0f}", False),
        (f"start → answers a ping, median of {STARTS}, ms", "{:.0f}", False),
        (f"start → first result, median of {STARTS}, ms", "{:.0f}", False),
        ("size: packages without Python / binary, MB", "{:.1f}", False),
    ]
    print(f"\n{'':46}{'Python':>12}{'celeriac':>12}{'ratio':>10}")
    for (label, form, more_is_better), python, celeriac in zip(
            rows, columns["python"], columns["celeriac"]):
        ratio = ""
        if more_is_better is not None:
            ratio = f"{celeriac / python if more_is_better else python / celeriac:.1f} ×"
        print(f"{label:<46}{form.format(python):>12}{form.format(celeriac):>12}{ratio:>10}")
    print("\nBoth: prefork, time limit 1800 s, prefetch multiplier 1, 50 tasks per child"
          + (", " + " ".join(OPTIONS) if OPTIONS else "") + "; Redis on loopback.")


if len(sys.argv) > 2:
    over_rabbitmq(sys.argv[2])
else:
    main()
