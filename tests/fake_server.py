"""A chat-completions server on this machine, for a judge to ask."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, prompt=10, completion=2):
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": usage})


class Server(ThreadingHTTPServer):
    """Answers request number i by `script(i, body) -> (status, headers, text)`, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.lock = script, [], threading.Lock()
        self.at_once = self.most_at_once = 0
        self.ended = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.seen)
            server.seen.append((time.monotonic(), self.path, dict(self.headers), body))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        status, headers, text = server.script(number, body)
        with server.lock:
            server.at_once -= 1
        try:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(text.encode()))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:  # the client has given up
            pass

    def log_message(self, *_):
        pass
