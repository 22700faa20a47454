"""Serves a local repository over HTTP on loopback by `git http-backend`."""
import http.server
import os
import shutil
import subprocess
import threading

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
        variables = {**environment, "GIT_PROJECT_ROOT": self.server.repository, "GIT_HTTP_EXPORT_ALL": "1",
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


def serve(repository):
    """The URL at which the repository is served until this process ends."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    server.repository = repository
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/repo.git"
