"""A download that breaks half way: one clear error, nothing that later passes for a whole model, and it goes on."""

import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file

SHA = "a" * 40
OPEN = """
import sys
from dejavu.checkpoint.source import open_checkpoint
from dejavu.errors import DejavuError
try:
    checkpoint = open_checkpoint("owner/model")
    print("read", sorted((name, rows.sum().item()) for name, _, rows in checkpoint.tensors(
        {name: 1 for name in checkpoint.headers})))
except DejavuError as error:
    print("error", type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for; files named in `broken` end in the middle."""

    files: dict[str, bytes]
    broken: set[str]
    asked: list[tuple[str, str | None]]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        if "/tree/" in self.path:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in self.files.items()]
            return self.send(200, json.dumps(tree).encode(), body)
        if self.path.startswith("/api/models/owner/model"):
            siblings = [{"rfilename": name} for name in self.files]
            data = json.dumps({"id": "owner/model", "sha": SHA, "siblings": siblings, "private": False}).encode()
            return self.send(200, data, body)
        name = self.path.rpartition("/")[2]
        if name not in self.files:
            return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        data, given = self.files[name], self.headers.get("Range")
        first = int(re.match(r"bytes=(\d+)-", given)[1]) if given else 0
        if body:
            self.asked.append((name, given))
        facts = {"X-Repo-Commit": SHA, "ETag": f'"{name}-{len(data)}"', "Accept-Ranges": "bytes"}
        if given:
            facts["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.send(206 if given else 200, data[first:], body, facts, cut=name in self.broken)

    def send(self, status: int, data: bytes, body: bool, facts=None, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **(facts or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    files = {"config.json": b'{"model_type": "opt"}'}
    for number in (1, 2):
        file = tmp_path / f"model-{number:05}-of-00002.safetensors"
        save_file({f"t{number}": torch.full((1000, 4), float(number))}, file)
        files[file.name] = file.read_bytes()
    names = sorted(files)[1:]
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"t1": names[0], "t2": names[1]}}).encode()
    handler = type("Handler", (Hub,), {"files": files, "broken": set(), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()

    def load(endpoint: str = f"http://127.0.0.1:{server.server_port}") -> str:
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"),
                                    "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", OPEN], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    handler.load = staticmethod(load)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("broken", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_broken_download_is_an_error_until_it_is_whole(hub, broken):
    hub.broken.add(broken)
    first = hub.load()
    assert first.startswith("error CheckpointError") and "Hugging Face Hub did not deliver it" in first
    # Without a hub its client gives whatever it has of the model: here, a half.
    assert hub.load("http://127.0.0.1:9").startswith("error CheckpointError")
    hub.broken.clear()
    hub.asked.clear()
    assert hub.load() == "read [('t1', 4000.0), ('t2', 8000.0)]"
    assert {name for name, _ in hub.asked} == {broken}  # what had come whole is not asked for again
