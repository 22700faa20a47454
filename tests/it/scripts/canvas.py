"""Random canvases, built by the real client, run by two workers and compared.

    canvas.py LEFT_URL RIGHT_URL QUEUE SEED COUNT

Both URLs are Redis databases that are broker and backend of one worker each: usually Python's on
the left and celeriac on the right. QUEUE may be several, with commas: then each task has one of
them, so that several workers may share a canvas. Every seed from SEED on is one canvas: chains,
groups, chords and single tasks, nested, with links and errbacks, some immutable, some failing. The
client's ids are derived from the seed, so both workers get the same messages. What is compared:
every message that was published (who, for whom, with which arguments, group, chain and chord) and
every result that was stored (state, value, children, parent, group). Ids that a worker made up are
replaced by what they stand for. Prints one JSON object; differences are told per seed. Seeds that a
Python worker hangs on are told as stuck: Celery joins a group that stands in the header of a chord
without any limit of time, also where one of its members was never published.
"""
import base64
import json
import os
import random
import re
import socket
import sys
import threading
import time
from urllib.parse import urlparse

import celery.app.base
import celery.app.task
import celery.canvas
import redis
from celery import Celery, chain, chord, group

# Celery prefers these to what an application is told, and here are two applications.
for variable in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
    os.environ.pop(variable, None)

PREFIX = re.compile(r"c(\d+)-\d+")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class Ids:
    """The ids of one canvas, the same every time it is built."""

    def __init__(self, seed):
        self.seed, self.count = seed, 0

    def __call__(self):
        self.count += 1
        return f"c{self.seed}-{self.count:03}"


class Builder:
    """A random canvas. `fed`: whether a value will be handed over as the first argument."""

    def __init__(self, app, seed, queues):
        self.app, self.random, self.tokens = app, random.Random(seed), 0
        self.queues, self.places = queues, random.Random(-seed)

    def token(self):
        self.tokens += 1
        return f"t{self.tokens}"

    def task(self, args, immutable=False):
        place = {"queue": self.places.choice(self.queues)} if len(self.queues) > 1 else {}
        return self.app.signature("test_task", args=args, immutable=immutable, **place)

    def leaf(self, fed):
        kind = self.random.random()
        if kind < 0.12:
            return self.task((self.token(), "wrong"), immutable=True)
        if kind < 0.16:
            return self.task((self.token(), "wrong"))
        if kind < 0.35:
            return self.task((self.token(),), immutable=True)
        return self.task(() if fed else (self.token(),))

    def sprinkle(self, made, depth, fed):
        if self.random.random() < 0.12:
            callback = self.canvas(max(0, min(1, depth - 1)), True, links=False)
            made.link(callback)
            if self.random.random() < 0.3:
                made.link(self.leaf(True))
        if self.random.random() < 0.12:
            args, immutable = ((self.token(),), True) if self.random.random() < 0.5 else ((), False)
            made.link_error(self.task(args, immutable))
        return made

    def canvas(self, depth, fed, links=True):
        kind = self.random.random()
        if depth == 0 or kind < 0.2:
            made = self.leaf(fed)
        elif kind < 0.5:
            count = self.random.randint(2, 4)
            made = chain(*[self.canvas(depth - 1, fed or i > 0) for i in range(count)],
                         app=self.app)
        elif kind < 0.72:
            count = self.random.randint(1, 3)
            made = group([self.canvas(depth - 1, fed) for _ in range(count)], app=self.app)
        else:
            count = self.random.randint(1, 3)
            header = [self.canvas(depth - 1, fed) for _ in range(count)]
            made = chord(header, self.canvas(depth - 1, True), app=self.app)
        return self.sprinkle(made, depth, fed) if links else made


class Monitor(threading.Thread):
    """Every message that is pushed to the queues, seen by MONITOR."""

    WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"')
    ESCAPE = re.compile(rb"\\(x[0-9a-f]{2}|.)")
    PLAIN = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}

    def __init__(self, url, queues):
        super().__init__(daemon=True)
        parsed = urlparse(url)
        self.database = (parsed.path.strip("/") or "0").encode()
        self.queues, self.messages = {queue.encode() for queue in queues}, []
        self.socket = socket.create_connection((parsed.hostname, parsed.port))
        self.socket.sendall(b"MONITOR\r\n")
        self.file = self.socket.makefile("rb")
        self.file.readline()

    def run(self):
        try:
            for line in self.file:
                self.line(line)
        except (OSError, ValueError):
            pass

    def line(self, line):
        head, _, rest = line.partition(b"] ")
        if b"lpush" not in rest[:8].lower() or head.split(b"[")[1].split()[0] != self.database:
            return
        words = [self.ESCAPE.sub(self.unescape, word) for word in self.WORD.findall(rest)]
        if words[1] in self.queues:
            self.messages += [json.loads(word) for word in words[2:]]

    def unescape(self, match):
        code = match.group(1)
        return bytes([int(code[1:], 16)]) if len(code) == 3 else self.PLAIN.get(code, code)


class Side:
    """One worker's world."""

    def __init__(self, url, queues):
        self.client = redis.Redis.from_url(url)
        self.app = Celery("canvas", broker=url, backend=url, set_as_current=False)
        self.app.conf.update(task_default_queue=queues[0], broker_connection_retry_on_startup=True)
        self.queues, self.monitor = queues, Monitor(url, queues)
        self.monitor.start()

    def send(self, seed, depth):
        ids = Ids(seed)
        for module in (celery.canvas, celery.app.base, celery.app.task):
            module.uuid = ids
        made = Builder(self.app, seed, self.queues).canvas(depth, False)
        text = repr(made)
        made.apply_async()
        return text

    def settle(self):
        """Waits until nothing happens any more, for as long as anything does."""
        last, since = None, time.monotonic()
        while time.monotonic() - since < (60 if last and last[0] else 1.5):
            waiting = sum(map(self.client.llen, self.queues)) + self.client.hlen("unacked")
            now = (waiting, self.client.dbsize(), len(self.monitor.messages))
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(0.05)
        if last[0]:
            print(f"{last[0]} messages have been left alone for a minute", file=sys.stderr)

    def give_up(self):
        """Removes what was left alone; returns the seeds it is of."""
        texts = [text for queue in self.queues for text in self.client.lrange(queue, 0, -1)]
        left = [json.loads(text) for text in texts]
        left += [json.loads(noted)[0] for noted in self.client.hvals("unacked")]
        self.client.delete("unacked", "unacked_index", *self.queues)
        # A root may be a task that a worker made up; what it was made from is in the body.
        made = re.compile(r"\bc(\d+)-\d{3}\b")
        return {int(seed) for message in left
                for seed in made.findall(f"{message['headers']} {Observed.body(message)}")}

    def observed(self, lenient):
        messages = {}
        for message in self.monitor.messages:
            messages.setdefault(message["headers"]["id"], []).append(message)
        return Observed(messages, self.client, lenient).records()


class Observed:
    """What one side did, in words that do not depend on ids made up by a worker."""

    def __init__(self, messages, client, lenient):
        self.messages, self.client, self.labels, self.lenient = messages, client, {}, lenient
        self.groups = {}
        # Some canvases make a worker publish an id twice, each time in a group of its own.
        for task_id, copies in messages.items():
            for gid in {copy["headers"]["group"] for copy in copies} - {None}:
                self.groups.setdefault(gid, []).append(task_id)

    @staticmethod
    def body(message):
        return json.loads(base64.b64decode(message["body"]))

    def label(self, task_id):
        if task_id is None or PREFIX.fullmatch(task_id):
            return task_id
        if task_id not in self.labels:
            self.labels[task_id] = "?"
            if task_id in self.messages:
                message = self.messages[task_id][0]
                args = self.replaced(json.dumps(self.body(message)[0]))
                self.labels[task_id] = f"<{self.parent(message['headers']['parent_id'])} {args}>"
            elif task_id in self.groups:
                members = sorted(self.label(member) for member in self.groups[task_id])
                self.labels[task_id] = f"<group {members}>"
            else:
                self.labels[task_id] = "<new>"
        return self.labels[task_id]

    def parent(self, task_id):
        """Which part of a chord is the last is up to chance, and so is the parent of its body."""
        if task_id in self.messages:
            chord_body = self.body(self.messages[task_id][0])[2].get("chord")
            if chord_body:
                return f"<part of {self.label((chord_body.get('options') or {}).get('task_id'))}>"
        return self.label(task_id)

    def root(self, task_id):
        """The same holds for the root of what a body brings, where each part has its own."""
        if task_id in self.messages:
            embed = self.body(self.messages[task_id][0])[2]
            if embed.get("chord") or any(map(self.counts, embed.get("chain") or [])):
                return "<part of a chord>"
        return self.parent(task_id)

    def counts(self, step):
        """Whether the end of a step is one of a chord's parts."""
        inner = step.get("kwargs") or {}
        inner = [one for one in [inner.get("body"), *(inner.get("tasks") or [])] if isinstance(one, dict)]
        return bool((step.get("options") or {}).get("chord")) or any(map(self.counts, inner))

    def replaced(self, text):
        return UUID.sub(lambda match: self.label(match.group(0)), text)

    def message(self, message):
        headers, (args, kwargs, embed) = message["headers"], self.body(message)
        ids = lambda found: [self.label(one["options"].get("task_id")) for one in found or []]
        links = lambda found: sorted(self.replaced(json.dumps(
            [one["task"], one["args"], one["immutable"]])) for one in found or [])
        body = embed.get("chord")
        return {
            "kind": "message", "task": headers["task"],
            "queue": message["properties"]["delivery_info"]["routing_key"], "id": self.label(headers["id"]),
            "root": self.root(headers["root_id"]), "parent": self.parent(headers["parent_id"]),
            "group": self.label(headers["group"]), "index": headers["group_index"],
            "args": self.replaced(json.dumps(args)), "kwargs": kwargs,
            "nesting": headers["replaced_task_nesting"], "retries": headers["retries"],
            "stamps": headers.get("stamps"), "callbacks": links(embed.get("callbacks")),
            "errbacks": links(embed.get("errbacks")), "chain": ids(embed.get("chain")),
            "chord": self.label(body["options"].get("task_id")) if body else None,
            "lists": [key for key in ("callbacks", "errbacks", "chain") if embed.get(key) is None],
        }

    def tuple(self, found):
        (task_id, parent), members = found
        # Python names some groups by an id they had in an earlier pass.
        name = self.label(task_id) if members is None else "group"
        return [[name, parent and self.tuple(parent)],
                None if members is None else [self.tuple(member) for member in members]]

    def result(self, meta):
        # Of a task that ran twice the result is that of the run which ended first.
        twice = len(self.messages.get(meta["task_id"], ())) > 1
        return {
            "kind": "result", "id": self.label(meta["task_id"]), "status": meta["status"],
            "result": self.replaced(json.dumps(meta["result"])),
            # Of what never ran they are those of the part that happened to be the last.
            "children": "?" if twice or meta["task_id"] not in self.messages else [
                self.tuple(child) for child in meta["children"] or []],
            "parent": "?" if twice else self.parent(meta.get("parent_id")),
            "group": self.label(meta.get("group_id")),
            # Python has none for some failures that it stores for others.
            "traceback": bool(meta["traceback"]) or self.lenient and meta["status"] == "FAILURE",
        }

    def records(self):
        found = [self.message(copy) for copies in self.messages.values() for copy in copies]
        for key in self.client.scan_iter("celery-task-meta-*", count=1000):
            found.append(self.result(json.loads(self.client.get(key))))
        records = {}
        for record in found:
            text = json.dumps(record)
            seed = PREFIX.search(text)
            records.setdefault(int(seed.group(1)) if seed else -1, []).append(text)
        return {seed: sorted(texts) for seed, texts in records.items()}


def without_causes(texts):
    """What never ran may fail for two reasons, and the later one stays."""
    records = [json.loads(text) for text in texts]
    return sorted(json.dumps({**record, "result": "?"} if record.get("children") == "?" else record)
                  for record in records)


def compared(sent, one, other):
    """The differences by seed, and the seeds whose ends were up to chance."""
    different, raced = {}, []
    for seed, text in sent.items():
        mine, theirs = one.get(seed, []), other.get(seed, [])
        # A group whose publishing failed half way revokes what is out: whether that comes in
        # time is up to chance.
        if any('"status": "REVOKED"' in text for text in mine + theirs):
            raced.append(seed)
        elif mine != theirs and without_causes(mine) == without_causes(theirs):
            raced.append(seed)
        elif mine != theirs:
            only = lambda these, those: [json.loads(text) for text in these if text not in those]
            different[seed] = {"canvas": text, "left only": only(mine, theirs),
                               "right only": only(theirs, mine)}
    return different, raced


def main():
    left, right, queues, first, count = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
    sides = [Side(url, queues.split(",")) for url in (left, right)]
    sent, refused = {}, []
    for seed in range(first, first + count):
        depth = 1 + seed % 4
        try:
            sent[seed] = [side.send(seed, depth) for side in sides][0]
        except (TypeError, RuntimeError, AttributeError, ValueError, IndexError) as error:
            # Some combinations the client itself cannot build.
            refused.append([seed, repr(error)])
    for side in sides:
        side.settle()
    # Python's are all on the left, and where there are several queues also on the right.
    stuck = set().union(*[side.give_up() for side in sides[:len(sides[0].queues)]])
    # On a busy machine one of the two may have paused for longer than it takes to look settled.
    different, raced, quiet = None, None, time.monotonic()
    while different is None or different and time.monotonic() - quiet < 15:
        before = [len(side.monitor.messages) for side in sides]
        one, other = sides[0].observed(True), sides[1].observed(len(sides[1].queues) > 1)
        judged = {seed: text for seed, text in sent.items() if seed not in stuck}
        last, (different, raced) = different, compared(judged, one, other)
        if different != last or before != [len(side.monitor.messages) for side in sides]:
            quiet = time.monotonic()
        time.sleep(0.5 if different else 0)
    print("answer: " + json.dumps({
        "sent": len(sent), "refused": refused, "raced": raced, "stuck": sorted(stuck),
        "different": different,
        "records": sum(len(texts) for texts in one.values()),
        "states": {state: sum(f'"status": "{state}"' in text for texts in one.values()
                              for text in texts) for state in ("SUCCESS", "FAILURE")},
    }, ensure_ascii=False))


main()
