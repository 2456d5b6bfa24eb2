"""`--plan`: sizes to the byte against what is then written, times from a trial, and an end where it does not fit."""

import re
import shutil

import fsspec
import pytest
import torch

from flux_ir.activations import shards
from flux_ir.api import room
from flux_ir.api.room import check_disk, check_memory, room_at
from flux_ir.collecting.recipe import Recipe
from flux_ir.collecting.sizes import site_sizes
from flux_ir.commands.capture import main as capture
from flux_ir.commands.collect import main as collect
from flux_ir.commands.trials import Pace
from flux_ir.errors import FluxIRError
from flux_ir.models.placement import Placement
from flux_ir.models.registry import get_spec
from flux_ir.sites import Site

SPEC = get_spec("flux-tiny")
LONG = "a large red circle left of a small blue square on a white background " * 3


@pytest.fixture
def plan(capsys):
    """Runs a command with --plan: its rows by name, each an amount and a note."""

    def run(command, *words):
        assert command([*words, "--plan"]) == 0, capsys.readouterr().err
        lines = capsys.readouterr().out.splitlines()[1:]
        rows = [re.fullmatch(r"(.+?) {2,}(\S+(?: [a-zA-Z]+)?)(?: {2}(.*))?", line).groups() for line in lines]
        return {name: (amount, note) for name, amount, note in rows}

    return run


def amount(rows, name):
    return int(rows[name][0].removesuffix(" B"))


@pytest.mark.parametrize(
    "words",
    [
        ("--steps", "1"),
        ("--sites", "double.0.*,single.1,single.2.img", "--dtype", "float32", "--width", "64"),
        ("--sites", "t5.*,clip.1,single.1", "--steps", "1"),
    ],
)
def test_the_capture_has_the_planned_bytes(plan, tmp_path, capsys, words):
    words = ("--model", "flux-tiny", "--num_steps", "2", "--prompt", LONG, *words)
    words = (*words, "--should_decode_intermediates", "False", "--output_dir", str(tmp_path / "out"))
    rows = plan(capture, *words)
    assert not (tmp_path / "out").exists()
    assert capture(list(words)) == 0
    (written,) = (tmp_path / "out").glob("*/intermediates/capture_*.pt")
    assert amount(rows, "in all") == written.stat().st_size
    sites = [name for name in rows if name.startswith(("double.", "single.", "t5.", "clip."))]
    assert sum(amount(rows, name) for name in [*sites, "state and layout"]) == written.stat().st_size
    assert rows["what limits"][0] in ("compute", "copy", "disk")
    assert rows["pictures"][0] == "1"


@pytest.mark.parametrize(
    "words", [(), ("--store_dtype", "float8_e4m3fn", "--tokens_per_image", "9", "--repeats", "3", "--save_latents")]
)
def test_the_shards_of_a_collection_have_the_planned_bytes(plan, tmp_path, monkeypatch, words):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 4)
    prompts = ["a red circle", LONG, "a circle", "a caf\u00e9 \U0001f408", "a red circle"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    words = ("--model", "flux-tiny", "--prompts", str(tmp_path / "prompts.txt"), "--num_steps", "2", *words)
    words = (*words, "--sites", "double.1.img,single.0", "--output_dir", str(tmp_path / "out"), "--batch_size", "2")
    rows = plan(collect, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]  # nothing of the trial is left
    assert collect(list(words)) == 0
    out, generations = tmp_path / "out", 5 * (3 if "--repeats" in words else 1)
    written = [path.stat().st_size for path in out.glob("shards/*")]
    assert len(written) == int(rows["shards"][0]) == -(-generations // 4)
    assert amount(rows, "in all") == sum(written)
    beside = sum(path.stat().st_size for path in out.glob("stats/*"))
    assert abs(beside / 1000 - float(rows["beside them"][0].removesuffix(" kB"))) < 0.05 * beside / 1000
    tokens = 2 * (9 + 20 + 9 if "--tokens_per_image" in words else 64 + 20 + 64)
    assert amount(rows, "tokens") == tokens * generations
    assert rows["embedded prompts"][1] == "4 different ones"
    assert amount(rows, "embedded prompts") == sum(path.stat().st_size for path in out.glob("text/*/*"))
    latents = sum(path.stat().st_size for path in out.glob("latents/*/*"))
    assert (amount(rows, "latents") if "latents" in rows else 0) == latents
    assert bool(latents) == ("--save_latents" in words)


def test_scales_of_float8_count_for_their_site():
    site = Site.parse("single.1")
    recipe = Recipe(SPEC, 64, 48, 3, 2.5, (site,), (0, 2), torch.float8_e4m3fn, torch.bfloat16)
    (size,) = site_sizes(recipe.plan())
    tokens, d = SPEC.text_tokens + 12, SPEC.flux.hidden_size
    assert size == (site, tokens, d, 2, 2 * tokens * (d + 4))


@pytest.mark.parametrize("command", ["capture", "collect"])
def test_a_full_disk_is_said_before_the_model_is_loaded(command, tmp_path, capsys, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: free)
    (tmp_path / "prompts.txt").write_text("a red circle")
    words = ["--model", "flux-tiny", "--output_dir", str(tmp_path / "out"), "--plan"]
    if command == "collect":
        words += ["--prompts", str(tmp_path / "prompts.txt"), "--sites", "single.1"]
    assert {"capture": capture, "collect": collect}[command](words) == 2
    told = capsys.readouterr()
    assert re.search(r"error: it does not fit: \d+ bytes .* are needed, and 1000 \(1 kB\) are free", told.err)
    assert "hint: keep less with --sites" in told.err
    assert "in all" in told.out
    assert "what limits" not in told.out


def test_weights_that_are_larger_than_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda device: {"cpu": 50, "cuda:0": 20}[device])
    on_gpu = Placement(*["cuda:0"] * 5, offload=False, reason="")
    parts = {"t5": 10, "clip": 2, "transformer": 15, "ae_decoder": 1}
    with pytest.raises(FluxIRError, match="the weights take 28 B on cuda:0, and 20 B are free") as raised:
        check_memory(parts, on_gpu)
    assert "--offload" in raised.value.hint
    check_memory(parts, on_gpu, encoders_go_first=True)  # 12, then 16
    check_memory(parts, Placement(*["cuda:0"] * 5, offload=True, reason=""))  # one at a time
    with pytest.raises(FluxIRError, match="on cpu"):
        check_memory(parts | {"t5": 40}, Placement(*["cpu"] * 5, offload=False, reason=""))


def test_the_room_is_that_of_the_nearest_folder(tmp_path):
    here = room_at(str(tmp_path / "not" / "yet"))
    assert here.folder == tmp_path
    assert here.free_bytes > 0
    check_disk(here.free_bytes // 2, here, flags="--sites")
    there = room_at("s3://bucket/captures")
    assert (there.folder, there.free_bytes) == (None, None)
    check_disk(10**18, there, flags="--sites")  # nobody knows


def test_a_pace_says_what_limits_and_how_long_it_takes():
    pace = Pace({"load": 2.0, "text": 1.0}, compute=0.5, copy=0.1, disk=0.75, unit=0.75, memory={}, extras={})
    assert pace.limit == "disk"
    assert pace.seconds(100) == 78.0


def test_a_url_has_no_free_space_to_compare_with(plan, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle")
    url = f"memory://planned_{tmp_path.name}"
    words = ("--model", "flux-tiny", "--num_steps", "2", "--prompts", str(tmp_path / "prompts.txt"))
    rows = plan(collect, *words, "--sites", "single.0", "--output_dir", url)
    assert rows["free disk"] == ("unknown", f"of {url}")
    assert rows["what limits"][0] in ("compute", "copy", "disk")
    assert fsspec.filesystem("memory").find(url.removeprefix("memory:/")) == []
