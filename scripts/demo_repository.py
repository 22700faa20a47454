"""Writes a repository for `git fast-import` to stdout, for machines that reach no Git server.

    python3 scripts/demo_repository.py [COMMITS] | git -C NEW.git fast-import

The same commits every time: a dozen people with uneven diligence, some three hundred files in
a tree of directories that grow, are edited, renamed and deleted, topic branches that are
merged, and a .mailmap for the one who changed address.
"""
import random
import sys

PEOPLE = [("Ada Lovelace", "ada@example.com", 30), ("Grace Hopper", "grace@example.com", 22),
          ("Edsger Dijkstra", "edsger@example.org", 14), ("Barbara Liskov", "barbara@example.org", 10),
          ("Donald Knuth", "don@example.com", 8), ("Frances Allen", "fran@example.net", 6),
          ("Ada Lovelace", "countess@old.example.com", 4), ("Radia Perlman", "radia@example.net", 3),
          ("Ken Thompson", "ken@example.org", 2), ("Adele Goldberg", "adele@example.com", 1)]
DIRECTORIES = ["src", "src/broker", "src/worker", "src/worker/pool", "src/events", "tests",
               "tests/integration", "docs", "docs/guide", "scripts"]
SUFFIX = {"docs": "md", "docs/guide": "rst", "scripts": "sh"}
VERBS = ["connect", "publish", "consume", "reject", "acknowledge", "inspect", "restore", "measure"]
NOUNS = ["channel", "queue", "delivery", "worker", "slot", "result", "event", "clock", "lease"]

chance = random.Random(20)
out = sys.stdout.buffer
files = {}
clock = 1_500_000_000
marks = 0


def line():
    depth = "    " * chance.choice([0, 1, 1, 1, 2, 2, 3])
    verb, noun, other = chance.choice(VERBS), chance.choice(NOUNS), chance.choice(NOUNS)
    return depth + chance.choice([
        f"let {noun} = {verb}({other});", f"if {noun}.{verb}() {{", "}", "",
        f"// {verb.capitalize()} the {noun} before the {other}.",
        f"return {noun}.{verb}_{other}({chance.randrange(100)});",
        f'log("{verb} {noun}: {{{other}}}");'])


def new_path():
    directory = chance.choice(DIRECTORIES)
    name = f"{chance.choice(NOUNS)}_{chance.choice(VERBS)}_{len(files)}"
    return f"{directory}/{name}.{SUFFIX.get(directory, 'rs')}"


def edit(lines):
    """Insertions, replacements and deletions in one to four places."""
    for _ in range(chance.choice([1, 1, 1, 2, 2, 3, 4])):
        at = chance.randrange(len(lines) + 1)
        kind = chance.random()
        if kind < 0.5:
            lines[at:at] = [line() for _ in range(chance.choice([1, 2, 3, 5, 8, 13]))]
        elif kind < 0.85:
            size = chance.choice([1, 1, 2, 4])
            lines[at:at + size] = [line() for _ in range(size)]
        else:
            del lines[at:at + chance.choice([1, 2, 6])]


def data(text):
    encoded = text.encode()
    out.write(b"data %d\n%s\n" % (len(encoded), encoded))


def write(path, lines):
    out.write(b"M 100644 inline %s\n" % path.encode())
    data("\n".join(lines) + "\n" if lines else "")


def commit(message, parent, merged=None):
    global clock, marks
    clock += chance.randrange(600, 90_000)
    marks += 1
    name, email, _ = chance.choices(PEOPLE, [person[2] for person in PEOPLE])[0]
    out.write(b"commit refs/heads/main\nmark :%d\n" % marks)
    for role in ("author", "committer"):
        out.write(f"{role} {name} <{email}> {clock} +0100\n".encode())
    data(message)
    if parent:
        out.write(b"from :%d\n" % parent)
    if merged:
        out.write(b"merge :%d\n" % merged)
    return marks


def change():
    """The changes of one commit, applied to `files` and written."""
    for _ in range(chance.choice([1, 1, 1, 2, 2, 3, 5])):
        kind = chance.random()
        if len(files) < 10 or (kind < 0.09 and len(files) < 320):
            path = new_path()
            files[path] = [line() for _ in range(chance.choice([8, 20, 40, 80, 160, 300]))]
            write(path, files[path])
        elif kind < 0.11:
            path = chance.choice(sorted(files))
            moved = new_path()
            files[moved] = files.pop(path)
            out.write(f"R {path} {moved}\n".encode())
        elif kind < 0.12 and len(files) > 200:
            path = chance.choice(sorted(files))
            del files[path]
            out.write(f"D {path}\n".encode())
        else:
            path = chance.choice(sorted(files))
            edit(files[path])
            write(path, files[path])


total = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
tip = commit("Begin", None)
files[".mailmap"] = ["Ada Lovelace <ada@example.com> <countess@old.example.com>"]
write(".mailmap", files[".mailmap"])
change()
while marks < total:
    if chance.random() < 0.06:
        # A topic branch of a few commits, merged into a main that did not stand still. The
        # merge carries the topic's files; main's commit meanwhile touched one of its own.
        fork, before = tip, {path: list(lines) for path, lines in files.items()}
        topic = fork
        for _ in range(chance.choice([1, 2, 4])):
            topic = commit("Topic", topic)
            change()
        beside = new_path()
        tip = commit("Meanwhile", fork)
        note = [line() for _ in range(5)]
        write(beside, note)
        tip = commit("Merge topic", tip, topic)
        for path in sorted(set(before) - set(files)):
            out.write(f"D {path}\n".encode())
        for path in sorted(files):
            if before.get(path) != files[path]:
                write(path, files[path])
        files[beside] = note
    else:
        tip = commit(f"{chance.choice(VERBS).capitalize()} the {chance.choice(NOUNS)}", tip)
        change()
out.write(b"done\n")
