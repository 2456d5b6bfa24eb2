"""`train_sae.py` on activations of flux-tiny: a collection, one capture file, and live ones; several sites at once."""

import json

import pytest

from flux_ir.commands.collect import main as collect
from flux_ir.commands.train_sae import main as train_sae
from flux_ir.models.compute_dtype import choose_dtype
from flux_ir.sae.files.folder import load_sae
from tests.recording.conftest import write

__all__ = ["write"]

PROMPTS = [f"a {size} {colour} circle" for size in ("large", "small") for colour in ("red", "blue", "green")]
QUICK = ("--expansion", "1", "--k", "4", "--batch_tokens", "32", "--device", "cpu")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def captures(prompts):
    """Six generations: two steps of both streams of a double block, and of a whole single block."""
    folder = prompts.parent / "captures"
    words = ["--model", "flux-tiny", "--prompts", str(prompts), "--num_steps", "2", "--device", "cpu"]
    assert collect([*words, "--sites", "double.1.img,double.1.txt,single.6", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def train(tmp_path, capsys):
    """Trains into a fresh folder; gives the code, stderr, and the autoencoders by the name of their folder."""

    def run(*words):
        capsys.readouterr()
        code = train_sae([*map(str, words), *QUICK, "--output_dir", str(tmp_path / "saes")])
        found = sorted((tmp_path / "saes").glob("*/*/cfg.json"))
        return code, capsys.readouterr().err, {path.parent.name: load_sae(path.parent) for path in found}

    return run


def test_each_site_of_a_collection_gets_an_autoencoder(train, captures):
    """Image sites, text sites and whole blocks have other tokens, but one command trains them, outliers left out."""
    code, err, saes = train("--captures", captures, "--site", "double.1.*,single.6", "--outliers", "20")
    assert code == 0, err
    assert list(saes) == [f"{site}_topk_k4_x1_s0" for site in ("double.1.img", "double.1.txt", "single.6")]
    for name, sae in saes.items():
        config = sae.config
        assert (f"{config.site}_topk_k4_x1_s0", config.model, config.steps) == (name, "flux-tiny", (0, 1))
    assert "held out by prompt" in err


def test_one_half_and_one_step_of_whole_blocks_can_be_trained_on(train, captures):
    code, err, saes = train("--captures", captures, "--site", "single.6", "--stream", "img", "--steps", "1")
    assert code == 0, err
    assert saes["single.6_topk_k4_x1_s0"].config.steps == (1,)
    assert saes["single.6_topk_k4_x1_s0"].metadata["filters"]["stream"] == "img"


def test_the_capture_of_a_single_run_is_data(train, write, tmp_path):
    """Its held-out side is made of tokens of the same picture, which is said."""
    write(tmp_path / "run" / "capture_x.pt", img_tokens=64)
    code, err, saes = train("--captures", tmp_path / "run" / "capture_x.pt", "--site", "single.0.img")
    assert code == 0, err
    assert "there is one generation only" in err
    assert saes["single.0.img_topk_k4_x1_s0"].metadata["data"]["generations"] == 1


def test_live_activations_are_trained_on_and_not_stored(train, prompts, tmp_path):
    words = ("--model", "flux-tiny", "--prompts", prompts, "--site", "double.1.img,double.1.txt", "--steps", "0")
    code, err, saes = train(*words, "--max_tokens", "320")
    assert code == 0, err
    assert "live generations of 6 prompts of flux-tiny" in err
    assert list(saes) == ["double.1.img_topk_k4_x1_s0", "double.1.txt_topk_k4_x1_s0"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".pt"]
    about = json.loads((tmp_path / "saes/flux-tiny/double.1.img_topk_k4_x1_s0/training.json").read_text())
    assert about["described"]["tokens"] == 320
    data = about["described"]["data"]  # what a run is gone on with is the same model, computed in the same dtype
    assert data["dtype"] == choose_dtype("auto", ["cpu"]).name
    assert len(data["weights"]) == 16


def test_padding_that_captures_do_not_tell_of_is_said(train, write, tmp_path):
    said = "the captures do not say which text tokens are padding: all are trained on"
    write(tmp_path / "known.pt", img_tokens=64)
    write(tmp_path / "unknown.pt", img_tokens=64, metadata={"generation_id": "0123abcd", "model": "tiny"})
    for words, told in (
        (("unknown.pt", "--site", "single.0"), True),
        (("unknown.pt", "--site", "single.0", "--padding", "True"), False),
        (("unknown.pt", "--site", "single.0.img"), False),
        (("known.pt", "--site", "single.0"), False),
    ):
        code, err, _ = train("--captures", tmp_path / words[0], *words[1:], "--name", "-".join(words))
        assert code == 0, err
        assert (said in " ".join(err.split())) == told, words


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--site", "single.9.img"), "no site of these captures matches 'single.9.img'"),
        (("--site", "double.1.txt", "--stream", "img"), "none of the sites has img tokens: double.1.txt"),
        (("--site", "single.6", "--steps", "5"), "the steps to train on must be among those captured: got [5]"),
        ((), "the captures have 3 sites, double.1.img to single.6: say which"),
    ],
)
def test_what_the_captures_do_not_have_is_said_in_one_line(train, captures, words, error):
    code, err, saes = train("--captures", captures, *words)
    assert (code, saes) == (2, {})
    assert err.startswith(f"error: {error}")


def test_a_capture_cut_short_leaves_nothing_behind(train, write, tmp_path):
    file = tmp_path / "half" / "capture_x.pt"
    write(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, err, _ = train("--captures", tmp_path / "half", "--site", "single.0.img")
    assert code == 2
    assert "capture_x.pt is not a complete capture file" in err
    assert not (tmp_path / "saes").exists()
