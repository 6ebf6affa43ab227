"""A server in the manner of OpenAI that prefers the brighter image, and fails as it is told."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


class JudgeServer:
    """`behave(question, number)` says how the number-th request about a question is answered.

    A question is (levels of the images, words): of two, which is brighter; of one, how bright it
    is, from 1 to 5. It returns None for a right answer, a text for another one, a mapping for a
    whole body, a number for an HTTP status, or "hang".

    Args:
        models: what it lists of its models; None: nothing, with status 501.
    """

    def __init__(self, behave=lambda question, number: None, headers=None, models=None):
        self.behave, self.headers, self.models = behave, headers or {}, models
        self.seen, self.bodies, self.sent_headers = {}, [], []
        self.now, self.most = 0, 0
        self.over, self._lock = threading.Event(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    outer.bodies.append(body)
                    outer.sent_headers.append({k.lower(): v for k, v in self.headers.items()})
                try:
                    outer._reply(self, body)
                finally:
                    with outer._lock:
                        outer.now -= 1

            def do_GET(self):
                code = 501 if outer.models is None else 200
                if isinstance(outer.models, int):
                    code = outer.models
                data = json.dumps({"object": "list", "data": outer.models}).encode()
                self.send_response(code)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def _reply(self, handler, body):
        *images, words = body["messages"][0]["content"]
        question = (*map(level, images), words["text"])
        with self._lock:
            number = self.seen[question] = self.seen.get(question, 0) + 1
        how = self.behave(question, number)
        if how == "hang":
            self.over.wait(20)
            return
        status, said = (how, "no") if isinstance(how, int) else (200, how or self.right(question))
        content = (
            {"choices": [{"message": {"content": said}}]} if status == 200 else {"error": said}
        )
        data = json.dumps(said if isinstance(said, dict) else content).encode()
        try:
            handler.send_response(status)
            for name, value in self.headers.items():
                handler.send_header(name, value)
            handler.send_header("content-length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    @staticmethod
    def right(question):
        if len(question) == 2:
            return f"It is neither dark nor bright.\nFinal Score: {1 + 4 * question[0] / 255}"
        first, second, _ = question
        better = 1 if first > second else 2
        same = first == second
        verdict = "Both images are equally good" if same else f"Image {better} is better"
        return f"<think>Image 2 is better, or is it?</think><answer>{verdict}</answer>"


def level(part):
    data = part["image_url"]["url"].partition(",")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    return float(pixels.astype(float).mean())
