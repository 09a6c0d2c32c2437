"""Stands in for the engine's server: its processes, its log lines and its endpoints, and nothing of its model.

    python fake_server.py --port N --answers FILE [--ranks N] [--stubborn] [--die]

``--answers`` names a JSON file with the reply to each path. ``--stubborn`` ranks ignore SIGTERM.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

RANK = """
import signal, sys, time
stubborn, rank = sys.argv[1] == "True", sys.argv[2]
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
for message in ("Init torch distributed begin.", "Load weight begin. avail mem=1 GB", "Load weight end. elapsed=1 s"):
    print(f"[2026-01-31 12:00:00 DP{int(rank) // 2} TP{rank}] {message}", flush=True)
time.sleep(600)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--answers", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stubborn", action="store_true")
    parser.add_argument("--die", action="store_true")
    options, _ = parser.parse_known_args()
    if options.die:
        print("ValueError: a reason that a person must see", flush=True)
        sys.exit(3)
    for rank in range(options.ranks):
        start_orphan([sys.executable, "-c", RANK, str(options.stubborn), str(rank)])
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1.0)  # so that the ranks are there before the server is ready, as in the engine
    with open(options.answers, encoding="utf-8") as file:
        serve(options.port, json.load(file))


def start_orphan(command: list[str]) -> None:
    """Starts a process whose parent is gone at once: no walk over children finds it."""
    if os.fork() == 0:
        subprocess.Popen(command)
        os._exit(0)
    os.wait()


def serve(port: int, answers: dict) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200 if self.path == "/health" else 404, {})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(200 if self.path in answers else 400, answers.get(self.path, {"error": "unknown"}))

        def reply(self, status: int, content) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
