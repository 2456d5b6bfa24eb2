"""`--plan`: sizes to the byte against what is then written, the run that tells the rest, and no room for it."""

import re
import shlex
import shutil

import fsspec
import pytest
import torch

import flux_ir.api.plan as plan_api
from flux_ir.activations import shards
from flux_ir.api import capacity
from flux_ir.api.capacity import check_disk, check_fits, disk_space_at
from flux_ir.collecting.recipe import Recipe
from flux_ir.commands import planning
from flux_ir.commands.capture import main as capture
from flux_ir.commands.collect import main as collect
from flux_ir.commands.planning import site_sizes
from flux_ir.errors import FluxIRError
from flux_ir.models.footprint import Footprint
from flux_ir.models.registry import get_spec
from flux_ir.sites import Site

SPEC = get_spec("flux-tiny")
LONG = "a large red circle left of a small blue square on a white background " * 3


@pytest.fixture
def plan(capsys):
    """Runs a command with --plan: its rows by name, each an amount and a note."""

    def run(command, *words):
        assert command([*words, "--plan"]) == 0, capsys.readouterr().err
        *lines, told, small = capsys.readouterr().out.splitlines()[1:]
        assert told == "the small run, whose report tells what is unknown here:"
        run.small = shlex.split(small)
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
    assert rows["time"][0] == "unknown"
    assert rows["s/step"][1].startswith("about, of one picture; limited by ")
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
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
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
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda path: free)
    (tmp_path / "prompts.txt").write_text("a red circle")
    words = ["--model", "flux-tiny", "--output_dir", str(tmp_path / "out"), "--plan"]
    if command == "collect":
        words += ["--prompts", str(tmp_path / "prompts.txt"), "--sites", "single.1"]
    assert {"capture": capture, "collect": collect}[command](words) == 2
    told = capsys.readouterr()
    assert re.search(r"error: it does not fit: \d+ bytes .* are needed, and 1000 \(1 kB\) are free", told.err)
    assert "hint: keep less with --sites" in told.err
    assert "in all" in told.out
    assert "unknown" not in told.out


def test_what_takes_more_than_a_device_or_the_host_has_is_refused(monkeypatch):
    monkeypatch.setattr(capacity, "free_memory", lambda device: {"cpu": 50, "cuda:0": 20}[device])
    monkeypatch.setattr(capacity, "resident_memory", lambda: 5)
    check_fits(Footprint(55, {"cuda:0": 20}), "capture")  # 5 of 55 are taken already
    with pytest.raises(FluxIRError, match="the capture takes about 21 B on cuda:0, where 20 B are") as raised:
        check_fits(Footprint(10, {"cuda:0": 21}), "capture")
    assert "--offload" in raised.value.hint
    with pytest.raises(FluxIRError, match="the collection takes about 56 B on the host, where 55 B are"):
        check_fits(Footprint(56, {}), "collection")


def test_plans_of_work_and_of_machines_are_one_arithmetic(plan, capsys, tmp_path, monkeypatch):
    from flux_ir.commands.plan import main as plan_machines

    for module in (planning, plan_api):
        monkeypatch.setattr(module, "base_here", lambda: 10**9)
    words = ["--model", "flux-tiny", "--dtype", "float32", "--num_steps", "2"]
    assert plan_machines(words) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("resident ")]
    rows = plan(capture, *words, "--output_dir", str(tmp_path), "--device", "cpu")
    assert rows["peak memory, host"] == (" ".join(row[2:4]), "about")


def test_the_room_is_that_of_the_nearest_folder(tmp_path):
    here = disk_space_at(str(tmp_path / "not" / "yet"))
    assert here.folder == tmp_path
    assert here.free_bytes > 0
    check_disk(here.free_bytes // 2, here, flags="--sites")
    there = disk_space_at("s3://bucket/captures")
    assert (there.folder, there.free_bytes) == (None, None)
    check_disk(10**18, there, flags="--sites")  # nobody knows


def test_the_small_run_of_a_collection_tells_the_pace(plan, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red circle {number}" for number in range(40)))
    words = ["--model", "flux-tiny", "--num_steps", "1", "--prompts", str(tmp_path / "prompts.txt"), "--repeats", "9"]
    rows = plan(
        collect, *words, "--sites", "single.0,double.1.img", "--output_dir", str(tmp_path / "out"), "--save_images"
    )
    assert rows["pictures"] == ("unknown", "360 JPEGs: their bytes count among those of the small run")
    assert rows["time"][1].startswith("divide the tokens by the small run's tokens/s; encoding")
    assert plan.small[:2] == ["flux-ir", "collect"]
    assert collect(plan.small[2:]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^generations +32  32 of them now$", told, flags=re.MULTILINE)
    seconds, speed = (float(re.search(rf"^{name} +([\d.]+) ", told, re.MULTILINE)[1]) for name in ("collect", "speed"))
    tokens = 32 * (64 + 20 + 64)
    assert tokens / (seconds + 0.005) - 1 < speed < tokens / (seconds - 0.005) + 1  # loading is not in it
    assert re.search(r"^load +[\d.]+ s$", told, flags=re.MULTILINE)
    assert (tmp_path / "out_pace" / "index.jsonl").is_file()
    assert not (tmp_path / "out").exists()


def test_the_small_run_of_a_capture_is_the_same_picture_with_fewer_steps(plan, tmp_path):
    rows = plan(capture, "--model", "flux-tiny", "--prompt", "a cat, a dog", "--num_steps", "8", "--steps", "6,7")
    assert rows["time"][1].startswith("the seconds of load and text, and 8/4 of those of sample")
    small = ["--noshould_decode_intermediates", "--prompt", "a cat, a dog", "--model", "flux-tiny", "--num_steps", "4"]
    assert plan.small == ["flux-ir", "capture", *small]


def test_a_url_has_no_free_space_to_compare_with(plan, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle")
    url = f"memory://planned_{tmp_path.name}"
    words = ("--model", "flux-tiny", "--num_steps", "2", "--prompts", str(tmp_path / "prompts.txt"))
    rows = plan(collect, *words, "--sites", "single.0", "--output_dir", url)
    assert rows["free disk"] == ("unknown", f"of {url}")
    assert f"{url}_pace" in plan.small
    assert fsspec.filesystem("memory").find(url.removeprefix("memory:/")) == []
