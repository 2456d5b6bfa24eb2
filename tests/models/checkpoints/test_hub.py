"""What the hub may answer, as one line each. A small server on this machine plays the hub; nothing leaves it."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = "black-forest-labs/FLUX.1-dev"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# A process of its own: huggingface_hub reads its variables when it is imported.
PROGRAM = """
import sys
from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints import hub
try:
    if sys.argv[1] == "cached":
        print(hub.cached("black-forest-labs/FLUX.1-dev", "ae.safetensors"))
    elif sys.argv[1] == "repository":
        print(hub.download_repository("black-forest-labs/FLUX.1-dev", ("*.model", "*.json"), None))
    elif sys.argv[1] == "folders":
        print(hub.download_folders("black-forest-labs/FLUX.1-dev", ("text_encoder", "tokenizer"), None))
    else:
        print(hub.download("black-forest-labs/FLUX.1-dev", "ae.safetensors", None))
except FluxIRError as error:
    print("error:", error)
"""


class Answer(NamedTuple):
    """What the hub says to every request that does not carry the token."""

    status: int
    code: str | None = None


@contextlib.contextmanager
def serving(answer, files=None, token=None):
    """A server that gives `files` to whoever shows the token, and `answer` to all others. Yields its address."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            name = self.path.rsplit("/resolve/main/", 1)[-1]
            if files and self.headers.get("Authorization") == f"Bearer {token}" and name in files:
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", '"0123"')
                content = files[name]
            else:
                self.send_response(answer.status)
                if answer.code:
                    self.send_header("X-Error-Code", answer.code)
                content = json.dumps({"error": "no"}).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask(tmp_path, endpoint, what="file", **variables):
    """What the program prints with an empty cache of its own and this hub."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "OMP_NUM_THREADS") if name in os.environ}
    environment = kept | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HOME": str(tmp_path)} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("status", [401, 403])
def test_gated_repository_asks_for_the_licence_and_a_token(tmp_path, status):
    with serving(Answer(status, "GatedRepo")) as endpoint:
        said = ask(tmp_path, endpoint)
    assert said.startswith(f"error: {REPO} is gated: the hub gives ae.safetensors only to accounts")
    assert "accept the licence" in said
    assert "HF_TOKEN" in said


def test_gated_repository_of_text_encoders_says_the_same(tmp_path):
    with serving(Answer(403, "GatedRepo")) as endpoint:
        said = ask(tmp_path, endpoint, "folders")
    assert said.startswith(f"error: {REPO} is gated: the hub gives text_encoder/ and tokenizer/ only to accounts")


def test_wrong_token_is_said_to_be_checked(tmp_path):
    with serving(Answer(401, "RepoNotFound")) as endpoint:
        said = ask(tmp_path, endpoint, HF_TOKEN="hf_wrong")
    assert said.startswith(f"error: the hub does not show the repository {REPO} to this account")
    assert "HF_TOKEN" in said


def test_file_that_the_repository_lacks_is_named(tmp_path):
    with serving(Answer(404, "EntryNotFound")) as endpoint:
        assert ask(tmp_path, endpoint).startswith(f"error: {REPO} has no ae.safetensors")


def test_hub_that_is_down_is_named_with_its_status(tmp_path):
    with serving(Answer(503)) as endpoint:
        said = ask(tmp_path, endpoint)
    assert said.startswith(f"error: the hub refused ae.safetensors of {REPO} with status 503")


@pytest.mark.parametrize("what", ["file", "folders"])
def test_no_network_is_one_line(tmp_path, what):
    with serving(Answer(503)) as endpoint:
        pass  # closed again: nobody listens at this port
    said = ask(tmp_path, endpoint, what)
    assert said.startswith("error: ")
    assert "is not in the hub's cache and the hub cannot be reached (hint: check the network, or name local" in said
    assert "\n" not in said


@pytest.mark.parametrize("what", ["file", "folders"])
def test_offline_mode_is_respected_and_named(tmp_path, what):
    with serving(Answer(200)) as endpoint:
        said = ask(tmp_path, endpoint, what, HF_HUB_OFFLINE="1")
    assert "is not in the hub's cache and HF_HUB_OFFLINE forbids fetching it (hint: unset HF_HUB_OFFLINE" in said


def test_file_is_fetched_with_the_token_into_the_named_cache(tmp_path):
    with serving(Answer(401, "GatedRepo"), {"ae.safetensors": b"weights"}, token="hf_right") as endpoint:
        path = ask(tmp_path, endpoint, HF_TOKEN="hf_right")
        assert path.startswith(str(tmp_path / "hf"))
    assert ask(tmp_path, endpoint, "cached") == path  # and the hub is gone by now
    assert Path(path).read_bytes() == b"weights"


@pytest.mark.parametrize("what", ["folders", "repository"])
@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_cache_that_holds_other_files_of_the_repository_is_not_taken_for_an_answer(tmp_path, what, offline):
    repository = tmp_path / "hf" / "hub" / f"models--{REPO.replace('/', '--')}"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "snapshots" / COMMIT / "ae.safetensors").write_bytes(b"weights")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    with serving(Answer(503)) as endpoint:
        pass  # nobody listens there any more
    said = ask(tmp_path, endpoint, what, HF_HUB_OFFLINE=offline)
    reason = "HF_HUB_OFFLINE forbids fetching it" if offline == "1" else "the hub cannot be reached"
    assert f"of {REPO} is not in the hub's cache and {reason}" in said
