"""An OpenAI-compatible server on this host, whose faults are scripted."""

import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-very-secret"


def choice(text, reason="stop", **message) -> dict:
    return {"message": {"content": text} | message, "finish_reason": reason}


def completion(*choices, tokens: int = 7, prompt: int = 100, name: str = "big-2026") -> dict:
    usage = {"prompt_tokens": prompt, "completion_tokens": tokens}
    return {"model": name, "choices": list(choices), "usage": usage}


def last_text(body: dict) -> str:
    """The last text in a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def pictures(body: dict) -> list[str]:
    """The data URIs of a request."""
    parts = [part for message in body["messages"] for part in message["content"]]
    return [part["image_url"]["url"] for part in parts if "image_url" in part]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        place = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        place.requests.append((self.path, self.headers["Authorization"], body))
        with place.lock:
            place.flying += 1
            place.most = max(place.most, place.flying)
        try:
            self.send(place.say(body))
        finally:
            place.flying -= 1

    def send(self, reply):
        """reply: a text, a whole reply, a status, (status, headers, bytes), or bytes."""
        status, headers, content = 200, {}, reply
        if isinstance(reply, int):
            reply = (reply, {"Retry-After-Ms": "1"}, b"")
        if isinstance(reply, tuple):
            status, headers, content = reply
        if isinstance(reply, str):
            content = completion(choice(reply))
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        self.send_response(status)
        headers = {"Location": f"{self.server.url}/elsewhere"} | headers
        headers["Content-Length"] = "999" if content == b"cut off" else str(len(content))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the caller may be gone
            for byte in content if self.server.drip else []:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
            self.wfile.write(content)

    def do_GET(self):  # where some redirects would lead
        self.server.requests.append((self.path, self.headers["Authorization"], None))

    def log_message(self, *_): ...


class Quiet(ThreadingHTTPServer):
    request_queue_size = 100

    def handle_error(self, *_): ...  # a caller that is gone


@contextmanager
def serving(say):
    """A server that replies say(request's body) (see Handler.send). Its attributes: url, requests
    (path, key, body), most (at once), drip (a byte at a time)."""
    with Quiet(("127.0.0.1", 0), Handler) as server:
        server.say, server.requests, server.drip = say, [], False
        server.lock, server.flying, server.most = threading.Lock(), 0, 0
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
