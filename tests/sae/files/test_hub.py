"""Fetching and putting autoencoders. A small server on this machine plays the hub; nothing leaves it."""

import base64
import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae
from flux_ir.sae.files.formats import save_as
from flux_ir.sae.files.hub import from_pretrained, write_card

REPO = "someone/flux-sae"
PROGRAM = """
import sys
from pathlib import Path
from flux_ir.errors import FluxIRError
from flux_ir.sae.files.hub import from_pretrained, push_to_hub
try:
    if sys.argv[1] == "push":
        print(push_to_hub(Path(sys.argv[2]), "someone/flux-sae"))
    else:
        print(from_pretrained("someone/flux-sae").config)
except FluxIRError as error:
    print("error:", error)
"""


@pytest.fixture
def sae():
    tokens = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    config = SAEConfig(architecture="topk", d_in=6, d_sae=18, k=3, site="single.6.img", model="flux-tiny", steps=(0, 2))
    made = make_sae(config, sample=tokens)
    made.metadata = {
        "tokens_seen": 1000,
        "prompts": "a|b",
        "fvu": 0.5,
        "data": {"captures": "/home/me/tiny", "generations": 7},
    }
    return made


@contextlib.contextmanager
def hub(taken, *, status=200):
    """A server that takes a commit: what was put lands in `taken` by name. Yields its address."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, content, code=None):
            body = json.dumps(content).encode()
            self.send_response(code or status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            address = f"http://127.0.0.1:{self.server.server_port}/{REPO}"
            if status != 200:
                self.answer({"error": "no"})
            elif self.path.endswith("/repos/create"):
                self.answer({"url": address, "name": REPO, "id": REPO})
            elif self.path.endswith("/validate-yaml"):
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(sent)["files"]]
                files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                self.answer({"files": files})
            elif "/commit/" in self.path:
                for line in sent.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        taken[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.answer({"commitUrl": f"{address}/commit/{'1' * 40}", "commitOid": "1" * 40})
            else:
                self.answer({"error": "unknown"}, 404)

        def do_GET(self):
            self.answer({"error": "no such thing"}, 404)

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask(tmp_path, endpoint, *words, **variables):
    """What the program prints with an empty cache of its own and this hub: huggingface_hub reads it when imported."""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    own = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HOME": str(tmp_path), "HF_TOKEN": "hf_x"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env=kept | own | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_pushed_is_the_folder_and_a_card(sae, tmp_path):
    folder = save_sae(sae, tmp_path / "sae")
    (folder / "notes.txt").write_text("mine")
    taken = {}
    with hub(taken) as endpoint:
        said = ask(tmp_path, endpoint, "push", str(folder))
    assert f"{REPO}/commit/" in said
    assert set(taken) == {"cfg.json", "sae_weights.safetensors", "README.md"}
    assert taken["sae_weights.safetensors"] == (folder / "sae_weights.safetensors").read_bytes()
    assert "single.6.img" in taken["README.md"].decode()


def test_a_hub_that_refuses_or_is_not_there_is_one_line(sae, tmp_path):
    folder = save_sae(sae, tmp_path / "sae")
    with hub({}, status=403) as endpoint:
        said = ask(tmp_path, endpoint, "push", str(folder))
    assert said.startswith("error: ")
    assert "refused what was to be written" in said
    said = ask(tmp_path, "http://127.0.0.1:9", "load")
    assert "cannot be reached" in said
    assert "or name a local folder" in said


def test_a_local_folder_of_any_program_loads(sae, tmp_path):
    save_sae(sae, tmp_path / "all" / "ours")
    save_as(sae, "sparsify", tmp_path / "all" / "theirs")
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    ours = from_pretrained(str(tmp_path / "all" / "ours"))
    theirs = from_pretrained(str(tmp_path / "all"), subfolder="theirs")
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(name):
    with pytest.raises(FluxIRError, match="must be a folder, or a repository on the hub"):
        from_pretrained(name)


def test_the_card_tells_of_outliers(sae, tmp_path):
    folder = save_sae(sae, tmp_path / "sae")
    outliers = {"longer_than_medians": 10.0, "tokens": 12, "without": {"overall": {"fvu": 1.875}}}
    (folder / "metrics.json").write_text(json.dumps({"overall": {"fvu": 0.06}, "outliers": outliers}))
    card = write_card(folder, REPO).read_text()
    assert "| tokens more than 10 times as long as the median | 12 |" in card
    assert "| fraction of variance unexplained without them | 1.875 |" in card


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_the_card_tells_k_and_the_public_name_that_loads(architecture, tmp_path):
    sae = make_sae(SAEConfig(architecture=architecture, d_in=6, d_sae=18, k=3))
    card = write_card(save_sae(sae, tmp_path / "sae"), REPO).read_text()
    assert "| k | 3 |" in card
    assert "from flux_ir import load_sae" in card


def test_the_card_tells_site_steps_data_and_numbers(sae, tmp_path):
    folder = save_sae(sae, tmp_path / "sae")
    assert "Not measured." in write_card(folder, REPO).read_text()
    (folder / "metrics.json").write_text(json.dumps({"overall": {"fvu": 0.2101, "l0": 3.0, "dead_share": None}}))
    (folder / "density.png").write_bytes(b"")
    card = write_card(folder, REPO).read_text()
    for part in (
        "0.2101",
        "flux-tiny",
        "single.6.img",
        "0, 2",
        "tokens seen",
        "a\\|b",
        "density.png",
        "| captures | tiny |",
        REPO,
    ):
        assert part in card
    assert "/home/me" not in card
    assert "| fvu |" not in card
    assert card.startswith("---\nlibrary_name: flux-ir\n")
