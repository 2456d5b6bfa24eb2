"""Pictures of flux-tiny from earlier layers of its text encoders, from the prompt to the sheet."""

import json

import numpy as np
import pytest
from PIL import Image

import flux_ir
from flux_ir.errors import FluxIRError

PROMPT = "a large red circle on the left on a white background"
OTHER = "a large blue circle on the left on a white background"
SHORT = {"seed": 3, "num_steps": 1}


@pytest.fixture(scope="module")
def model():
    return flux_ir.load_model("flux-tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text_lens")


@pytest.fixture(scope="module")
def lensed(model, folder):
    return flux_ir.text_lens(
        PROMPT, layers="t5.0,t5.2", tokens=("all", "words"), seeds=2, model=model, output_dir=folder, **SHORT
    )


def test_the_last_layer_gives_the_bytes_of_the_ordinary_run(lensed, model):
    (row,) = [row for row in lensed.rows if (row.tokens, row.layer) == ("all", "t5.2")]
    for seed, path in row.pictures.items():
        *_, last = flux_ir.sample(model, PROMPT, seed=seed, num_steps=1)
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), flux_ir.decode(model, last.after)[0].numpy())


def test_every_reading_has_a_picture_for_each_seed(lensed):
    assert [(row.tokens, row.layer) for row in lensed.rows] == [
        (tokens, layer) for tokens in ("all", "words") for layer in ("t5.0", "t5.2")
    ]
    pictures = [path for row in lensed.rows for path in row.pictures.values()]
    assert len({path.read_bytes() for path in pictures}) == 8
    said = json.loads(lensed.numbers.read_text())
    assert said["prompts"] == [PROMPT]
    assert said["tokens"][0]["words"] == list(range(11))
    assert (lensed.folder / said["rows"][0]["pictures"]["3"]).is_file()
    with Image.open(lensed.sheets[0]) as sheet:
        assert sheet.height > 4 * 128


def test_the_same_call_goes_on_and_makes_only_what_is_missing(lensed, model, folder):
    pictures = sorted((lensed.folder / "pictures").iterdir())
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in pictures}
    pictures[2].unlink()
    again = flux_ir.text_lens(
        PROMPT, layers="t5.*", tokens=("all", "words"), seeds=2, model=model, output_dir=folder, **SHORT
    )
    assert again.folder == lensed.folder
    assert len(list((lensed.folder / "pictures").iterdir())) == 16
    assert all(path.read_bytes() == content for path, (_, content) in before.items())
    same = [path for path, (written, _) in before.items() if path.stat().st_mtime_ns == written]
    assert len(same) == 7


def test_captions_are_judged_and_written_as_a_table(model, tmp_path):
    done = flux_ir.text_lens(
        prompts=[PROMPT, OTHER],
        other_prompt=[OTHER, PROMPT],
        pooled="other",
        layers="t5.2",
        judge=True,
        seeds=1,
        model=model,
        name="judged",
        output_dir=tmp_path,
        **SHORT,
    )
    assert [one.aspect for one in done.scores if one.layer == "t5.2"] == [
        "number",
        "background",
        "colour",
        "shape",
        "size",
        "place",
        "everything",
    ]
    assert all(one.chance is None and one.other is not None for one in done.scores)  # no third caption
    assert done.table.read_text().splitlines()[0].startswith("tokens,layer,aspect,right,low,high")
    assert done.chart.is_file()
    assert [path.name for path in done.sheets] == ["sheet_0.png", "sheet_1.png"]
    with pytest.raises(FluxIRError, match="holds a text lens that differs in other_prompts, pooled"):
        flux_ir.text_lens(prompts=[PROMPT, OTHER], model=model, name="judged", output_dir=tmp_path, **SHORT)


def test_texts_of_any_length_are_drawn(model, tmp_path):
    done = flux_ir.text_lens(
        PROMPT,
        layers="t5.2",
        words=["red", "red circle"],
        rest="removed",
        seeds=1,
        model=model,
        output_dir=tmp_path,
        **SHORT,
    )
    assert [row.tokens for row in done.rows] == ["red", "red circle"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layers": "t5.7"}, r"3 layers of T5 and 3 of CLIP, and none matches 't5\.7'"),
        ({"words": "purple"}, "the prompt has no word 'purple' .*its words are a#1, large, red, circle, on#1"),
        ({"words": "red", "tokens": "words"}, "--words are some of the tokens: got --tokens as well"),
        ({"tokens": ()}, "nothing to draw"),
        ({"swap": "red=blue"}, "--swap takes something of another prompt: got none"),
        ({"other_prompt": OTHER}, "nothing is taken from --other_prompt"),
        ({"other_prompt": [OTHER, OTHER], "pooled": "other"}, "or one for each of 1: got 2"),
        ({"layers": "t5.0,clip.1", "pooled": "zeros"}, r"nothing of clip\.1 is read"),
        ({"prompts": [PROMPT]}, "--prompts has every prompt"),
        ({"prompt": "a cat", "judge": True}, "the captions of flux-tiny's world: got 'a cat'"),
        ({"judge": True, "width": 176}, "square pictures: got 176 x 128"),
        ({"prompt": "", "tokens": "words", "rest": "removed"}, "no text left of ''"),
        ({"seeds": 0}, "--seeds must be at least 1"),
    ],
)
def test_what_cannot_be_read_is_refused_and_leaves_nothing(model, tmp_path, wrong, says):
    with pytest.raises(FluxIRError, match=says):
        flux_ir.text_lens(**{"prompt": PROMPT, "model": model, "output_dir": tmp_path / "lens"} | wrong)
    assert not (tmp_path / "lens").exists()
