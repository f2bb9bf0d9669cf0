"""Models from the Hub: the real client against a server that speaks the Hub's protocol, then from the cache alone."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jax_backtrack.errors import InputError
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from tests import tiny
from tests.chat_tokenizers import small_tokenizer
from tests.processes import HANG, ROOT, reserved_port

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
PROGRAM = """
import sys
import jax_backtrack
from jax_backtrack.errors import InputError
for path, revision in (argument.split("@") for argument in sys.argv[1:]):
    try:
        model, _ = jax_backtrack.load(path, revision=revision or None)
        print("LOADED", float(model.embedding_VxM[...][0, 0]))
    except InputError as error:
        print("ERROR", error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The three requests of `snapshot_download`. `owner/gated` wants the token "secret"."""

    folders: dict[str, Path]  # commit -> files
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        owner_name, _, rest = self.path.removeprefix("/api/models").strip("/").partition("/")
        name, _, rest = rest.partition("/")
        if owner_name != "owner" or name not in ("open", "gated"):
            return self.refuse(404, "RepoNotFound")
        if name == "gated" and self.headers.get("authorization") != "Bearer secret":
            return self.refuse(403, "GatedRepo")
        kind, revision, *file = rest.split("?")[0].split("/", 2)
        commit = COMMITS.get(revision, revision)
        if commit not in self.folders:
            return self.refuse(404, "RevisionNotFound")
        folder = self.folders[commit]
        if kind == "revision":
            return self.answer(json.dumps({"id": f"owner/{name}", "sha": commit, "siblings": []}).encode())
        if kind == "tree":
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            entries = [
                {
                    "type": "file",
                    "path": str(path.relative_to(folder)),
                    "size": path.stat().st_size,
                    "oid": digest(path),
                }
                for path in files
            ]
            return self.answer(json.dumps(entries).encode())
        path = folder / file[0]
        self.answer(path.read_bytes(), {"ETag": f'"{digest(path)}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def refuse(self, code: int, name: str) -> None:
        self.answer(b"{}", {"X-Error-Code": name, "X-Error-Message": name}, code)

    def answer(self, body: bytes, headers: dict | None = None, code: int = 200) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A running server; its two revisions hold models of different weights, and files that are not to be fetched."""
    root = tmp_path_factory.mktemp("hub")
    folders = {}
    for seed, commit in enumerate(COMMITS.values()):
        folders[commit] = root / commit
        save(tiny.model(seed, vocab_size=320), small_tokenizer(), folders[commit])
        (folders[commit] / "pytorch_model.bin").write_bytes(b"pickle")
        (folders[commit] / "original").mkdir()
        shutil.copy(folders[commit] / "model.safetensors", folders[commit] / "original" / "other.safetensors")
    handler = type("Handler", (Hub,), {"folders": folders, "asked": []})
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}", handler.asked
    server.shutdown()


def run(home: Path, endpoint: str, *asked: str, **environment: str) -> list[str]:
    """Loads `path@revision` one after another in a fresh process; a line for each."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_ETAG_TIMEOUT": str(HANG),  # the client takes a server that is slow for one that is not there
        "HF_HUB_DOWNLOAD_TIMEOUT": str(HANG),
        "PYTHONPATH": ".",
    } | environment
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *asked], cwd=root, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def first_weight(seed: int) -> str:
    return f"LOADED {float(tiny.model(seed, vocab_size=320).embedding_VxM[...][0, 0])}"


def test_revisions_tokens_and_the_cache(hub, tmp_path):
    endpoint, asked = hub
    newest, old, unknown_revision, gated, unknown = run(
        tmp_path, endpoint, "owner/open@", "owner/open@v1", "owner/open@v2", "owner/gated@", "owner/none@"
    )
    assert (newest, old) == (first_weight(0), first_weight(1))
    assert unknown_revision.startswith(
        "ERROR owner/open at revision 'v2': the Hub has the model, but not this revision"
    )
    assert "Accept the licence on https://huggingface.co/owner/gated, then log in" in gated
    assert "no such model on the Hub" in unknown
    assert not [path for path in asked if "resolve" in path and ("original" in path or ".bin" in path)]

    assert run(tmp_path, endpoint, "owner/gated@v1", HF_TOKEN="secret") == [first_weight(1)]

    before = len(asked)
    offline = run(tmp_path, endpoint, "owner/open@v1", "owner/open@", "owner/other@", HF_HUB_OFFLINE="1")
    assert offline[:2] == [first_weight(1), first_weight(0)] and offline[2].startswith("ERROR owner/other")
    with reserved_port() as nobody_listens:
        unreachable = run(tmp_path, f"http://localhost:{nobody_listens}", "owner/open@v1")
    assert unreachable == [first_weight(1)]
    assert len(asked) == before


def test_a_revision_of_what_is_here_is_refused(tmp_path):
    save(tiny.model(vocab_size=320), small_tokenizer(), tmp_path / "model")
    with pytest.raises(InputError, match="revision 'v1' has no meaning"):
        load(tmp_path / "model", revision="v1")
