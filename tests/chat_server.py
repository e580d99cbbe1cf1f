"""A chat-completions server for tests that behaves, or does not, as it is told."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    tried: int  # how often this question came before

    @property
    def text(self):
        return self.body["messages"][0]["content"][1]["text"]

    @property
    def image(self):
        return self.body["messages"][0]["content"][0]["image_url"]["url"]


class FakeServer(NamedTuple):
    url: str
    requests: list[Request]
    most: list[int]  # requests that were answered at one time, at most
    connections: list[int]


def say(content):
    """The reply whose text this is."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


def respond(handler, body, status=200, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def well(answer: Callable[[Request], str]):
    return lambda handler, request, closing: respond(handler, say(answer(request)))


def body(data, status=200, **headers):
    return lambda handler, request, closing: respond(handler, data, status, **headers)


def after(seconds, then):
    def behave(handler, request, closing):
        closing.wait(seconds)
        then(handler, request, closing)

    return behave


def failing(times, first, then):
    """`first` for the first tries of each question."""
    return lambda *args: (first if args[1].tried < times else then)(*args)


def endless(handler, request, closing):
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    while not closing.is_set():
        handler.wfile.write(b" " * 65536)


def dripping(handler, request, closing):
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    while not closing.wait(0.05):
        handler.wfile.write(b" ")


def hanging_up(handler, request, closing):
    handler.close_connection = True


def silent(handler, request, closing):
    handler.close_connection = True
    closing.wait(60)


@contextmanager
def serving(behave):
    """A server on this machine; behave(handler, request, closing: an event) writes the response."""
    lock, running, closing = threading.Lock(), [0], threading.Event()
    found = FakeServer("", [], [0], [0])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            with lock:
                found.connections[0] += 1
            super().setup()

        def do_POST(self):
            data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = Request(self.path, dict(self.headers), data, 0)
            with lock:
                tried = sum(other.text == request.text and other.image == request.image for other in found.requests)
                request = request._replace(tried=tried)
                found.requests.append(request)
                running[0] += 1
                found.most[0] = max(found.most[0], running[0])
            try:
                behave(self, request, closing)
            except OSError:
                self.close_connection = True
            finally:
                with lock:
                    running[0] -= 1

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 128

        def handle_error(self, request, client_address):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield found._replace(url=f"http://127.0.0.1:{server.server_port}/v1")
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
        deadline = time.monotonic() + 5
        while running[0] and time.monotonic() < deadline:
            time.sleep(0.01)
