"""Two models beside each other, run or recorded: the numbers, the controls, the folder, and what is refused."""

import json
from dataclasses import replace

import pytest

import flux_ir
from flux_ir.api.compare_models import CompareModelsSettings, run_model_comparison
from flux_ir.api.model_comparison import check_blocks
from flux_ir.commands.main import main
from flux_ir.errors import FluxIRError
from flux_ir.explorer.data import decoded_runs, read_run, run_entry
from flux_ir.models.architecture import block_names
from flux_ir.models.registry import get_spec
from tests.models.checkpoints.lora.layouts import Factors, draw_factors, kohya

PROMPT, SIZE = "a red circle", {"width": 64, "height": 48}
BLOCKS = [name.replace("_blocks", "") for name in block_names(get_spec("flux-tiny").flux)]
CHOICES = {**SIZE, "num_steps": 2}


@pytest.fixture(scope="module")
def base():
    return flux_ir.load_model("flux-tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def with_lora(base, tmp_path_factory):
    """The same with a LoRA that changes single block 3 alone."""
    network = base.flux
    factors = {
        name: Factors(0.2 * f.up, f.down) for name, f in draw_factors(network).items() if "single_blocks.3" in name
    }
    lora = kohya(factors, network, tmp_path_factory.mktemp("lora") / "lora.safetensors")
    return flux_ir.load_model("flux-tiny", device="cpu", dtype="float32", lora=lora)


@pytest.fixture(scope="module")
def found(base, with_lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparisons")
    return flux_ir.compare_models(PROMPT, model=base, other_model=with_lora, repeats=2, output_dir=folder, **CHOICES)


def test_only_what_a_lora_changes_differs_and_only_free_runs_carry_it_on(found):
    alone, forced, free = (found.mean(run) for run in ("block", "forced", "free"))
    assert list(free) == ["state", *BLOCKS, "velocity"]
    assert {row for row, steps in alone.items() if any(steps)} == {"single.3"}
    changed = BLOCKS[BLOCKS.index("single.3") :]
    assert {row for row, steps in forced.items() if any(steps)} == {*changed, "velocity"}
    assert forced["single.3"] == alone["single.3"]
    assert [steps[0] for steps in free.values()] == [steps[0] for steps in forced.values()]
    assert all(free[row][1] > 0 for row in free)
    assert free["state"][0] == 0
    assert found.mean("block", stream="txt")["single.3"][0] > 0


def test_the_yardstick_and_the_controls_stand_beside(found):
    seed, free = found.mean("seed"), found.mean("free")
    assert all(seed[row][step] > free[row][step] for row in seed for step in (0, 1))
    assert found.result["control"] == {"equal_bits": True, "distance": 0.0, "least_cka": 1.0}
    pictures = found.result["pictures"]
    assert pictures["free"]["latent_distance"] < pictures["seed"]["latent_distance"]
    seeds = [(one["seed"], one["other_seed"]) for one in found.result["generations"]]
    assert seeds == [(0, 1_000_003), (1, 1_000_004)]


def test_the_same_model_is_equal_in_every_bit_in_every_mode(base, tmp_path):
    same = flux_ir.compare_models(PROMPT, model=base, lens_pictures=False, output_dir=tmp_path, **CHOICES)
    for mode in ("free", "forced", "block"):
        for stream in ("img", "txt"):
            assert not any(value for steps in same.mean(mode, stream=stream).values() for value in steps)
            ckas = [value for steps in same.mean(mode, "cka", stream).values() for value in steps]
            assert set(ckas) == {1.0}
    assert same.result["pictures"]["free"]["equal"] == 1
    assert same.runs is None


def test_it_goes_on_where_it_stopped_and_takes_more_generations(found, base, with_lora):
    before = found.numbers.read_bytes()
    files = sorted((found.folder / "generations").iterdir(), key=lambda path: json.loads(path.read_text())["seed"])
    kept = [path.read_bytes() for path in files]
    files[1].unlink()
    times = files[0].stat().st_mtime_ns
    again = flux_ir.compare_models(
        PROMPT, model=base, other_model=with_lora, repeats=2, output_dir=found.folder.parent, **CHOICES
    )
    assert (again.numbers.read_bytes(), files[0].stat().st_mtime_ns) == (before, times)
    assert [path.read_bytes() for path in files] == kept


def test_the_runs_show_both_models_in_the_explorer(found):
    ids = decoded_runs(found.runs)
    runs = [run_entry(read_run(found.runs, name)) for name in ids]
    assert {run["model"] for run in runs} == {"flux-tiny", "flux-tiny, lora.safetensors at 1"}
    for run in runs:
        assert run["blocks"] == BLOCKS
        distances = run["numbers"]["relative_distance"]
        assert distances[-1] == [0.0, 0.0]  # the last block's reading is the step's own velocity
        assert distances[0][0] > 0.1
    generation = json.loads(next(iter((found.folder / "generations").iterdir())).read_text())
    assert (found.runs / ids[0] / "intermediates" / "difference.json").is_file()
    assert generation["prompt"] == PROMPT
    assert list(found.runs.glob("*/visualization_*_vs_*.png"))


def test_captures_of_both_say_what_their_free_runs_said(base, with_lora, tmp_path):
    live = flux_ir.compare_models(
        PROMPT, model=base, other_model=with_lora, seed=4, modes=["free"], lens_pictures=False, output_dir=tmp_path,
        **CHOICES,
    )  # fmt: skip
    runs = [
        flux_ir.capture(PROMPT, model=model, seed=4, lens="x0", output_dir=tmp_path / "runs", **CHOICES)
        for model in (base, with_lora)
    ]
    recorded = flux_ir.compare_models(
        captures=runs[0].folder, other_captures=runs[1].folder, output_dir=tmp_path, name="recorded"
    )
    for stream in ("img", "txt"):
        for measure in ("distance", "cka"):
            ours = live.mean("free", measure, stream)
            ours.pop("velocity", None)
            assert recorded.mean("free", measure, stream) == ours
    assert recorded.result["pictures"]["free"]["equal"] == 0
    assert len(decoded_runs(recorded.runs)) == 2
    assert not list(recorded.runs.rglob("*.pt"))
    again = flux_ir.compare_models(
        captures=runs[0].capture, other_captures=runs[0].capture, cka_tokens=0, output_dir=tmp_path
    )
    assert not any(value for steps in again.mean("free").values() for value in steps)


@pytest.fixture(scope="module")
def captured(base, tmp_path_factory):
    """Runs of one model that differ in prompt, seed, steps and sites."""
    folder, common = tmp_path_factory.mktemp("runs"), {"sites": "double.*.img", "seed": 0, **CHOICES}
    wanted = {
        "plain": {},
        "prompt": {"prompt": "a blue square"},
        "seed": {"seed": 1},
        "schedule": {"num_steps": 1},
        "sites": {"sites": "single.2.txt"},
    }
    return {
        name: flux_ir.capture(
            **{"prompt": PROMPT, **common, **other}, model=base, should_decode_intermediates=False, output_dir=folder
        ).folder
        for name, other in wanted.items()
    }


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("prompt", "share prompts and noise: the first has 'a red circle' from seed 0 .* 'a blue square' from seed 0"),
        ("seed", "share prompts and noise: .* from seed 1 at 64 x 48 px"),
        ("schedule", "steps at the same flow times: the first has 2 of them, captured 0, 1, the other 1, captured 0"),
        ("sites", "image outputs of the same blocks: they have none in common"),
    ],
)
def test_captures_that_do_not_belong_together_are_refused(captured, tmp_path, other, says):
    with pytest.raises(FluxIRError, match=says):
        flux_ir.compare_models(
            captures=captured["plain"], other_captures=captured[other], output_dir=tmp_path / "comparisons"
        )
    assert not (tmp_path / "comparisons").exists()


def test_a_prompt_from_two_seeds_gives_captures_a_yardstick(captured, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    for name in ("plain", "seed"):
        (both / captured[name].name).symlink_to(captured[name])
    found = flux_ir.compare_models(captures=both, other_captures=both, cka_tokens=0, output_dir=tmp_path)
    assert [(one["seed"], one["other_seed"]) for one in found.result["generations"]] in (
        [(0, 1), (1, 0)],
        [(1, 0), (0, 1)],
    )
    assert found.mean("seed")["double.0"][0] > 0.1


def test_models_whose_blocks_do_not_match_are_refused_before_anything_is_read(tmp_path):
    says = "flux-tiny has 4 double and 8 single blocks of width 192, .* flux-schnell 19 double and 38 single .* 3072"
    with pytest.raises(FluxIRError, match=says):
        flux_ir.compare_models(model="flux-tiny", other_model="flux-schnell", output_dir=tmp_path)
    tiny = get_spec("flux-tiny").flux
    with pytest.raises(FluxIRError, match=r"width 192, .* of width 384"):
        check_blocks("a", tiny, "b", replace(tiny, hidden_size=384, num_heads=12))
    check_blocks("flux-schnell", get_spec("flux-schnell").flux, "flux-dev", get_spec("flux-dev").flux)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"other_guidance": 4.0}, "told a guidance strength: flux-tiny is not"),
        ({"captures": "x"}, "go together: got one of them"),
        ({"prompts": "x.txt"}, "got both"),
        ({"modes": []}, "one mode or more"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, wrong, says):
    with pytest.raises(FluxIRError, match=says):
        flux_ir.compare_models(PROMPT, model="flux-tiny", output_dir=tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_comparison_is_not_written_over(found, base, with_lora):
    with pytest.raises(FluxIRError, match="holds a comparison of other models or with other settings"):
        flux_ir.compare_models(PROMPT, model=base, name=found.folder.name, output_dir=found.folder.parent, **CHOICES)


def test_what_is_not_said_of_the_other_is_as_for_the_first():
    settings = CompareModelsSettings(model="flux-tiny", lora="a", lora_strength=0.5, quantize="nf4", checkpoint="w")
    other = settings.other()
    assert (other.lora, other.lora_strength, other.quantize, other.checkpoint) == ("a", 0.5, "nf4", "w")
    assert replace(settings, other_lora_strength=2.0).other().lora_strength == 2.0
    assert replace(settings, other_lora="b").other().lora_strength is None
    named = replace(settings, other_model="flux-tiny").other()
    assert (named.lora, named.lora_strength, named.quantize, named.checkpoint) == (None, None, None, None)


def test_the_command_prints_the_table(tmp_path, capsys):
    words = [
        "compare-models",
        "--model",
        "flux-tiny",
        "--num_steps",
        "1",
        "--device",
        "cpu",
        "--lens_pictures",
        "False",
    ]
    assert main([*words, "--modes", "forced", "--width", "64", "--height", "48", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "note: both models are the same one" in printed.err
    assert "control, the first model beside itself: every bit is the same" in printed.out
    assert [line.split()[1] for line in printed.out.splitlines() if line.startswith("single.7")] == ["0.0000"]


def test_settings_in_one_object_do_the_same(base, tmp_path):
    settings = CompareModelsSettings(
        model=base, prompt=PROMPT, modes=("free",), cka_tokens=0, lens_pictures=False, output_dir=tmp_path,
        **SIZE, num_steps=1,
    )  # fmt: skip
    found = run_model_comparison(settings)
    assert set(found.maps) == {"distance_img", "distance_txt"}
    assert found.mean("free", "cka")["double.0"] == [None]
