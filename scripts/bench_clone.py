"""A clone by celeriac beside `git clone --bare --single-branch --no-tags`; see scripts/bench-blame.

Both fetch over HTTP on loopback from `git http-backend`. What celeriac is measured with is an
analysis of no file at all: the clone, the opening of it and the reading of all commits. The server's
CPU is the same for both and not counted. Each is run a few times in turn, the least wall time counts.
"""
import http.server
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time

repository, celeriac = sys.argv[1], os.path.abspath(os.environ["BENCH_CELERIAC"])
rounds = int(os.environ.get("BENCH_ROUNDS", "3"))
environment = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}


class Backend(http.server.BaseHTTPRequestHandler):
    """One request, one `git http-backend`."""
    protocol_version = "HTTP/1.1"

    def chunks(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(self):
        path, _, query = self.path.partition("?")
        body = b"".join(self.chunks())
        variables = {**environment, "GIT_PROJECT_ROOT": repository, "GIT_HTTP_EXPORT_ALL": "1",
                     "PATH_INFO": path.removeprefix("/repo.git"), "QUERY_STRING": query,
                     "REQUEST_METHOD": self.command, "REMOTE_ADDR": "127.0.0.1",
                     "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                     "CONTENT_LENGTH": str(len(body)),
                     "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                     "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                     "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory",
                     "GIT_CONFIG_VALUE_0": "*"}
        child = subprocess.Popen(["git", "http-backend"], env=variables, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)
        child.stdin.write(body)
        child.stdin.close()
        status, headers = 200, []
        while line := child.stdout.readline().strip():
            name, _, value = line.decode().partition(": ")
            if name.lower() == "status":
                status = int(value.split()[0])
            else:
                headers.append((name, value))
        self.send_response(status)
        for name, value in [*headers, ("Connection", "close")]:
            self.send_header(name, value)
        self.end_headers()
        shutil.copyfileobj(child.stdout, self.wfile, 1 << 16)
        child.wait()
        self.close_connection = True

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


def run(command, settings):
    """Wall seconds, CPU seconds and peak of resident KiB of a command."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, env={**environment, **settings}, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)}\n{errors.decode(errors='replace')[-2000:]}")
    return time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/repo.git"
theirs, ours = [], []
for _ in range(rounds):
    with tempfile.TemporaryDirectory(prefix="bench-clone-") as folder:
        command = ["git", "clone", "--quiet", "--bare", "--single-branch", "--no-tags", url,
                   os.path.join(folder, "clone.git")]
        theirs.append(run(command, {}))
        command = [celeriac, "analyze", url, "--json", "--database", "none",
                   "--include", "no file has this name"]
        ours.append(run(command, {"ALLOW_LOCAL_REPOS": "true", "TMPDIR": folder}))
print(f"{'':36}{'wall s':>11}{'CPU s':>11}{'max RSS MiB':>14}")
for label, runs in (("git clone", theirs), ("celeriac: clone, read the commits", ours)):
    wall, used, peak = min(runs)
    print(f"{label:<36}{wall:>11.2f}{used:>11.2f}{peak / 1024:>14,.0f}")
print(f"\nceleriac / git, wall: {min(ours)[0] / min(theirs)[0]:.2f}; "
      f"CPU: {min(run[1] for run in ours) / min(run[1] for run in theirs):.2f} (best of {rounds})")
