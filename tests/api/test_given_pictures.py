"""Runs of flux-tiny that begin with a picture or refer to one, from the call to everything that reads them."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import flux_ir
from flux_ir.activations.shards import read_shard
from flux_ir.activations.source import open_source
from flux_ir.commands.capture import main
from flux_ir.demo.drawing import draw
from flux_ir.demo.scenes import scene_at
from flux_ir.errors import FluxIRError
from flux_ir.layout import run_of
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.placement import plan
from flux_ir.models.registry import PACKAGED_MODELS, packaged_spec
from flux_ir.models.suite import Suite
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae
from tests.commands.run_folder import LAST, tensors_of

PROMPT = "a large blue circle on a white background"
FAST = {"model": "flux-tiny", "num_steps": 4, "seed": 3, "dtype": "float32"}
SIZES = ((64, 32), (32, 64))  # 8 tokens, beside 64 of the image and those of the text


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A scene of flux-tiny's world, 128 x 128 px, as a file."""
    path = tmp_path_factory.mktemp("given") / "scene.png"
    Image.fromarray(draw(scene_at(0, 5), 128)).save(path)
    return path


@pytest.fixture(scope="module")
def begun(picture, tmp_path_factory):
    """A capture that begins with it at step 2 of 4. Read it only."""
    folder = tmp_path_factory.mktemp("begun")
    return flux_ir.capture(PROMPT, init_image=picture, strength=0.5, output_dir=folder, **FAST)


@pytest.fixture(scope="module")
def kontext(tmp_path_factory):
    """flux-tiny's weights with a spec that takes reference pictures: packaged in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("packaged") / "flux-tiny"
    shutil.copytree(PACKAGED_MODELS["flux-tiny"], folder)
    facts = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(facts | {"reference_sizes": SIZES}))
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["files"]["params.json"] = hashlib.sha256((folder / "params.json").read_bytes()).hexdigest()
    (folder / "provenance.json").write_text(json.dumps(provenance))
    spec = packaged_spec("flux-tiny", folder)
    return Suite(spec, locate_model(spec), plan(0, device="cpu"), torch.float32)


@pytest.fixture(scope="module")
def referring(kontext, picture, tmp_path_factory):
    """A capture that refers to the picture, which is fitted to 64 x 32 px. Read it only."""
    folder = tmp_path_factory.mktemp("referring")
    events = []
    done = flux_ir.capture(
        PROMPT,
        model=kontext,
        num_steps=2,
        seed=3,
        width=128,
        height=128,
        reference_image=Image.open(picture).resize((130, 70)),
        sites="double.*.*,single.*,single.7.cond,double.1.cond",
        output_dir=folder,
        progress=events.append,
    )
    return done, [event.text for event in events if isinstance(event, flux_ir.Note)]


# ---- Image to image


def test_the_last_steps_are_run_under_their_own_numbers(begun, picture):
    capture = flux_ir.read_capture(begun)
    assert capture.steps == [2, 3]
    metadata = json.loads(begun.metadata.read_text())
    assert [capture.context(step).t_curr for step in (2, 3)] == metadata["timesteps"][2:4]
    said = metadata["init_image"]
    assert (said["path"], said["strength"], said["first_step"]) == (str(picture), 0.5, 2)
    assert said["t"] == metadata["timesteps"][2]
    assert metadata["captured_steps"] == [2, 3]
    assert metadata["options"]["init_image"] == str(picture)
    assert capture.metadata["init_image"] == said
    kept = run_of(begun.capture).given_picture("init_image")
    with Image.open(kept) as one, Image.open(picture) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other.convert("RGB")))


def test_the_first_state_is_between_picture_and_noise(begun, picture):
    model = flux_ir.load_model("flux-tiny", dtype="float32")
    context = flux_ir.read_capture(begun).context(2)
    latent = flux_ir.encode(model, picture)
    plain = next(iter(flux_ir.sample(model, PROMPT, seed=3, num_steps=4)))
    t = context.t_curr
    torch.testing.assert_close(context.img, t * plain.before + (1 - t) * latent, atol=1e-6, rtol=0)


def test_every_part_gives_the_same_states_as_the_capture(begun, picture):
    model, capture = flux_ir.load_model("flux-tiny", dtype="float32"), flux_ir.read_capture(begun)
    sink = flux_ir.MemorySink()
    with flux_ir.Recorder(model, LAST, sink, first_step=2):
        steps = list(flux_ir.sample(model, PROMPT, seed=3, num_steps=4, init_image=picture, strength=0.5))
    assert [step.number for step in steps] == [2, 3]
    for step in steps:
        assert torch.equal(step.before, capture.context(step.number).img)
        assert torch.equal(sink.read(LAST, step.number), capture.read(LAST, step.number))


def test_all_that_reads_a_run_reads_it(begun, tmp_path):
    shutil.copytree(begun.folder, tmp_path / begun.generation_id)
    again = flux_ir.read_lens(begun.generation_id, output_dir=tmp_path)
    rows = json.loads(again.numbers.read_text())["sites"][LAST]
    assert [row["step"] for row in rows] == [2, 3]
    assert rows[-1]["psnr_x0_db"] is None  # the finished picture itself
    assert sorted(path.name for path in again.pictures["x0"].iterdir()) == ["step_2", "step_3"]
    films = flux_ir.create_visualization(begun.generation_id, output_dir=tmp_path)
    assert films.files
    assert all(path.is_file() for path in films.files.values())
    flux_ir.explore(begun.generation_id, output_dir=tmp_path)
    source = open_source(begun.capture)
    assert source.steps == [2, 3]
    with pytest.raises(FluxIRError, match="was made with --init_image or --reference_image") as error:
        source.sampling(0)
    assert "made without them" in error.value.hint


def test_attributing_such_a_run_is_refused_before_anything_is_loaded(begun, tmp_path):
    config = SAEConfig("topk", d_in=192, d_sae=64, k=8, site="double.2.img", model="flux-tiny")
    sae = save_sae(make_sae(config), tmp_path / "sae")
    with pytest.raises(FluxIRError, match="would be run again without"):
        flux_ir.attribute(begun.folder, sae=sae, output_dir=tmp_path / "out")


def test_at_strength_1_the_capture_is_the_plain_one_bit_for_bit(picture, tmp_path):
    few = {**FAST, "num_steps": 2, "sites": LAST, "should_decode_intermediates": False}
    plain = flux_ir.capture(PROMPT, output_dir=tmp_path, **few)
    begun = flux_ir.capture(PROMPT, init_image=picture, strength=1, output_dir=tmp_path, **few)
    expected, found = tensors_of(plain.folder), tensors_of(begun.folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert plain.picture.read_bytes() == begun.picture.read_bytes()


def test_the_size_is_that_of_the_picture(tmp_path):
    given = Image.new("RGB", (64, 32), (255, 255, 255))
    done = flux_ir.capture(
        PROMPT, init_image=given, sites=LAST, should_decode_intermediates=False, output_dir=tmp_path, **FAST
    )
    with Image.open(done.picture) as made:
        assert made.size == (64, 32)
    facts = json.loads(done.metadata.read_text())
    assert (facts["width"], facts["height"], facts["options"]["init_image"]) == (64, 32, "given")
    assert flux_ir.read_capture(done).steps == [1, 2, 3]


def test_an_edit_holds_at_the_steps_it_names(picture, tmp_path):
    vector = torch.ones(192)
    few = {**FAST, "sites": LAST, "should_decode_intermediates": False, "output_dir": tmp_path}
    plain, same, other = (
        flux_ir.capture(
            PROMPT,
            init_image=picture,
            strength=0.5,
            edit=None if steps is None else flux_ir.Edit(vector=vector, sites="single.1", unit="raw", steps=steps),
            progress=notes.append,
            **few,
        )
        for steps, notes in ((None, []), ((3,), []), ((2, 3), []))
    )
    first, second = (flux_ir.read_capture(run).read(LAST, 2) for run in (plain, same))
    assert torch.equal(first, second)
    assert not torch.equal(first, flux_ir.read_capture(other).read(LAST, 2))
    assert not torch.equal(*(flux_ir.read_capture(run).read(LAST, 3) for run in (plain, same)))
    notes = []
    early = flux_ir.Edit(vector=vector, sites="single.1", unit="raw", steps=(0, 1))
    flux_ir.capture(PROMPT, init_image=picture, strength=0.5, edit=early, progress=notes.append, **few)
    assert any("it has none of the steps that are run" in str(note) for note in notes)
    notes.clear()
    partly = flux_ir.Edit(vector=vector, sites="single.1", unit="raw", steps=(1, 2))
    flux_ir.capture(PROMPT, init_image=picture, strength=0.5, edit=partly, progress=notes.append, **few)
    assert any("edit 1 names steps that are not run: 1" in str(note) for note in notes)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--strength", "0.5"], "--strength says how much of a picture is changed: got 0.5, and no --init_image"),
        (["--init_image", "SCENE", "--strength", "0"], "--strength must be above 0 and at most 1: got 0"),
        (["--init_image", "SCENE", "--strength", "1.5"], "--strength must be above 0 and at most 1: got 1.5"),
        (["--init_image", "SCENE", "--width", "64"], "--init_image must have the size of the run, 64 x 128 px"),
        (["--init_image", "nothing.png"], "cannot read the picture of --init_image in nothing.png"),
        (["--init_image", "SCENE", "--strength", "0.5", "--num_steps", "4", "--steps", "1"], "from 2 to 3: got 1"),
        (["--reference_image", "SCENE"], "flux-tiny takes no reference picture: got --reference_image"),
        (["--sites", "double.0.cond"], "names tokens of a reference picture, which this model takes none of"),
    ],
)
def test_what_cannot_be_done_is_one_line(picture, tmp_path, capsys, flags, told):
    words = [str(picture) if word == "SCENE" else word for word in flags]
    code = main(["--model", "flux-tiny", "--prompt", PROMPT, "--output_dir", str(tmp_path / "out"), *words])
    assert code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert told in message
    assert not (tmp_path / "out").exists()


def test_the_command_says_which_steps_are_run(picture, tmp_path, capsys):
    words = ["--model", "flux-tiny", "--prompt", PROMPT, "--num_steps", "4", "--sites", LAST, "--lens", "x0"]
    assert main([*words, "--init_image", str(picture), "--output_dir", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "begun with a picture of 128 x 128 px at strength 0.6: steps 1 to 3 of 4" in said


# ---- Steering what is begun with a picture


def test_a_given_picture_is_steered_at_the_steps_that_are_run(picture, tmp_path):
    config = SAEConfig("topk", d_in=192, d_sae=64, k=8, site="double.2.img", model="flux-tiny")
    made = make_sae(config)
    made.max_active, made.mean_active = torch.full((64,), 6.0), torch.full((64,), 2.0)
    sae = save_sae(made, tmp_path / "sae")
    asked = {"sae": sae, "feature": 12, "seeds": 1, "controls": 1, "strength": (0, 2), "model": "flux-tiny"}
    asked |= {"num_steps": 4, "dtype": "float32", "seed": 3, "output_dir": tmp_path / "out"}
    done = flux_ir.steer(PROMPT, init_image=picture, init_strength=0.5, **asked)
    rows = {(row.row, row.strength): row.identical for row in done.table}
    assert rows["edit", 0] == rows["random", 0] == 1
    assert rows["edit", 2] == 0
    assert {row for row, _ in rows} >= {"edit", "random", "neuron"}
    begun = flux_ir.capture(
        PROMPT, init_image=picture, strength=0.5, sites=LAST, lens="x0", output_dir=tmp_path, **FAST
    )
    unsteered = done.folder / "pictures" / "unsteered_strength_0_seed_3.png"
    with Image.open(unsteered) as one, Image.open(begun.picture) as other:
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).mean() < 4  # a JPEG of the same
    again = flux_ir.steer(PROMPT, init_image=picture, init_strength=0.75, **asked)
    assert again.folder != done.folder
    with pytest.raises(FluxIRError, match="--init_strength must be above 0 and at most 1: got 2"):
        flux_ir.steer(PROMPT, init_image=picture, init_strength=2, **asked)


# ---- A reference picture


def test_a_reference_is_fitted_and_has_sites_of_its_own(referring, kontext):
    done, notes = referring
    (fitted,) = [note for note in notes if "fitted" in note]
    assert "the reference picture of 130 x 70 px is fitted to 64 x 32 px" in fitted
    capture, text_tokens = flux_ir.read_capture(done), kontext.spec.text_tokens
    assert capture.metadata["tokens"] == {"txt": text_tokens, "img": 64, "cond": 8}
    assert capture.metadata["reference_image"]["width"] == 64
    assert capture.read("double.1.cond", 1).shape == (1, 8, 192)
    assert capture.read("single.7.cond", 0).shape == (1, 8, 192)
    assert capture.read("double.1.img", 1).shape == (1, 64, 192)
    assert capture.read("single.7", 0).shape == (1, text_tokens + 64, 192)
    assert capture.read("single.7.img", 0).shape == (1, 64, 192)
    assert capture.context(1).img.shape == (1, 64, 64)
    with Image.open(run_of(done.capture).given_picture("reference_image")) as kept:
        assert kept.size == (64, 32)


def test_the_lens_reads_the_image_alone_and_is_the_sampler_at_the_last_block(referring):
    done, _ = referring
    rows = json.loads(done.lens.numbers.read_text())["sites"]
    assert set(rows) == {*(f"double.{block}.img" for block in range(4)), *(f"single.{block}" for block in range(8))}
    assert rows[LAST][-1]["psnr_euler_db"] is None
    assert [row["relative_distance"] for row in rows[LAST]] == [0, 0]


def test_films_and_the_explorer_of_a_run_with_a_reference_are_made(referring, tmp_path):
    done, _ = referring
    shutil.copytree(done.folder, tmp_path / done.generation_id)
    flux_ir.create_visualization(done.generation_id, output_dir=tmp_path)
    flux_ir.explore(done.generation_id, output_dir=tmp_path)


def test_tokens_of_a_reference_are_activations_like_others(referring, tmp_path):
    done, _ = referring
    source = open_source(done.capture)
    block = source.read(0, "double.1.cond", 1)
    assert torch.equal(block.values, flux_ir.read_capture(done).read("double.1.cond", 1)[0])
    assert block.positions.tolist() == list(range(8))
    assert block.txt_tokens == 0
    image = source.read(0, "single.7", 1)
    assert len(image.positions) == image.txt_tokens + 64
    small = {"expansion": 1, "k": 4, "batch_tokens": 4, "held_out": 0, "device": "cpu", "output_dir": tmp_path}
    *_, last = flux_ir.train_sae(done.capture, site="double.1.cond", **small)
    (trained,) = last.finished
    assert last.tokens == 2 * 8  # steps, tokens
    with pytest.raises(FluxIRError, match=r"tokens of the image or the text: got double\.1\.cond"):
        flux_ir.score_features(trained.folder, done.capture, output_dir=tmp_path / "features")


def test_samples_with_a_reference_are_those_of_the_capture_and_others_without(referring, kontext, picture):
    done, _ = referring
    asked = {"seed": 3, "num_steps": 2, "width": 128, "height": 128}
    given = Image.open(picture).resize((130, 70))
    first, second = flux_ir.sample(kontext, PROMPT, reference_image=given, **asked)
    assert torch.equal(second.before, flux_ir.read_capture(done).context(1).img)
    *_, without = flux_ir.sample(kontext, PROMPT, **asked)
    assert not torch.equal(second.after, without.after)
    assert first.before.shape == (1, 64, 64)


def test_attention_on_a_reference_is_a_group_of_its_own(kontext, picture, tmp_path):
    asked = {"words": "circle", "num_steps": 1, "seed": 3, "blocks": ["double.1", "single.0"], "output_dir": tmp_path}
    with_reference = flux_ir.attention_maps(PROMPT, model=kontext, reference_image=picture, **asked)
    without = flux_ir.attention_maps(PROMPT, model=kontext, **asked)
    for block in ("double.1", "single.0"):
        assert with_reference.mass[block]["reference"] > 0.01
        assert without.mass[block]["reference"] == 0
        assert sum(with_reference.mass[block].values()) == pytest.approx(1, abs=1e-5)


def test_both_pictures_can_be_given(kontext, picture):
    steps = list(
        flux_ir.sample(kontext, PROMPT, num_steps=4, init_image=picture, strength=0.3, reference_image=picture)
    )
    assert [step.number for step in steps] == [2, 3]


def test_edits_at_a_reference_are_left_to_interventions(kontext, picture):
    edit = flux_ir.Edit(vector=torch.ones(192), sites="double.1.cond", unit="raw")
    with pytest.raises(FluxIRError, match=r"got double\.1\.cond, of a reference picture") as error:
        flux_ir.capture(PROMPT, model=kontext, reference_image=picture, edit=edit)
    assert "Intervention" in error.value.hint
    asked = {"num_steps": 1, "width": 64, "height": 64, "reference_image": picture}
    *_, plain = flux_ir.sample(kontext, PROMPT, **asked)
    with flux_ir.Intervention(kontext, {"double.*.cond.update": lambda value, step: 0 * value}):
        *_, changed = flux_ir.sample(kontext, PROMPT, **asked)
    assert not torch.equal(plain.after, changed.after)


# ---- Collections


def seed_of_first(collection):
    return read_shard(collection / "shards/000000.safetensors").metadata["seeds"][0]


def test_a_collection_of_a_picture_that_runs_begin_with(kontext, picture, tmp_path):
    given = Image.open(picture).resize((64, 48))
    asked = {"model": kontext, "num_steps": 4, "init_image": given, "strength": 0.5, "store_dtype": "float32"}
    notes = []
    done = flux_ir.collect([PROMPT], ["double.1.img", "single.7"], tmp_path / "a", progress=notes.append, **asked)
    assert any(isinstance(note, flux_ir.Note) and "steps 2 to 3 of 4" in note.text for note in notes)
    source = open_source(tmp_path / "a")
    assert list(source.steps) == [2, 3]
    assert done.tokens == 2 * (12 + 12 + kontext.spec.text_tokens)
    sink, seed = flux_ir.MemorySink(), seed_of_first(tmp_path / "a")
    sampled = flux_ir.sample(kontext, PROMPT, seed=seed, num_steps=4, init_image=given, strength=0.5)
    with flux_ir.Recorder(kontext, ["double.1.img", "single.7"], sink, first_step=2):
        states = {step.number: step.before for step in sampled}
    for (step, site), value in sink.values.items():
        assert torch.equal(source.read(0, site, step).values, value[0])
    assert torch.equal(source.state(0, 2), states[2][0])
    with pytest.raises(FluxIRError, match="was made with --init_image or --reference_image"):
        source.sampling(0)
    with pytest.raises(FluxIRError, match="strength"):
        flux_ir.collect([PROMPT], ["double.1.img", "single.7"], tmp_path / "a", **asked | {"strength": 0.75})
    with pytest.raises(FluxIRError, match="the run has the steps from 2 to 3: got 0"):
        flux_ir.collect([PROMPT], "single.7", tmp_path / "b", steps=[0], **asked)
    assert not (tmp_path / "b").exists()


def test_a_collection_of_a_picture_that_runs_refer_to(kontext, picture, tmp_path):
    sites = ["double.1.img", "double.1.cond", "single.7"]
    asked = {"num_steps": 1, "width": 64, "height": 48, "reference_image": picture}
    kept = {"tokens_per_image": 5, "store_dtype": "float32", "batch_size": 1}
    flux_ir.collect([PROMPT, "a red square"], sites, tmp_path / "a", model=kontext, **asked, **kept)
    source = open_source(tmp_path / "a")
    sink, seed = flux_ir.MemorySink(), seed_of_first(tmp_path / "a")
    with flux_ir.Recorder(kontext, sites, sink):
        list(flux_ir.sample(kontext, PROMPT, seed=seed, **asked))
    of_picture = source.read(0, "double.1.cond", 0)
    assert torch.equal(of_picture.values, sink.values[0, flux_ir.Site.parse("double.1.cond")][0])
    assert (of_picture.positions.tolist(), of_picture.txt_tokens) == (list(range(8)), 0)
    of_image = source.read(0, "double.1.img", 0)
    places = of_image.positions.long()
    assert torch.equal(of_image.values, sink.values[0, flux_ir.Site.parse("double.1.img")][0][places])
    assert len(source.read(0, "single.7", 0).positions) == kontext.spec.text_tokens + 5
    with pytest.raises(FluxIRError, match="flux-tiny takes no reference picture"):
        flux_ir.collect([PROMPT], "single.7", tmp_path / "b", model="flux-tiny", reference_image=picture)


# ---- Encoding


def test_encoding_is_the_twin_of_decoding(picture):
    model = flux_ir.load_model("flux-tiny", parts=["autoencoder"])
    latent = flux_ir.encode(model, picture)
    assert latent.shape == (1, 64, 64)
    with Image.open(picture) as original:
        given = torch.from_numpy(np.asarray(original.convert("RGB")).copy())[None]
    decoded = flux_ir.decode(model, latent)
    assert (decoded.int() - given.int()).abs().float().mean() < 6
    both = flux_ir.encode(model, torch.cat([given, decoded]))
    assert torch.equal(both[:1], latent)
    assert torch.equal(flux_ir.encode(model, [given, picture])[1:], latent)
    with pytest.raises(FluxIRError, match="pictures that are encoded together have one size: got 2"):
        flux_ir.encode(model, [picture, Image.new("RGB", (64, 64))])
    with pytest.raises(FluxIRError, match="multiples of 16 px: got 70 x 64"):
        flux_ir.encode(model, Image.new("RGB", (70, 64)))
