"""`flux_ir.capture` and its kin from Python: the same files as the command, and nothing printed."""

import json

import pytest
import torch
from safetensors.torch import save_file

import flux_ir
from flux_ir.api.lens import capture_file
from flux_ir.commands.capture import main
from flux_ir.errors import FluxIRError
from flux_ir.models.registry import get_spec
from tests.commands.run_folder import LAST, SPEC, tensors_of

TINY = get_spec("flux-tiny")


@pytest.fixture(scope="module")
def embeds(tmp_path_factory):
    """The embedding of "a red circle", as a file."""
    path = tmp_path_factory.mktemp("embeds") / "red.safetensors"
    model = flux_ir.load_model("flux-tiny", parts=["text"])
    flux_ir.encode_prompt(model, "a red circle", save_to=path)
    return path


def capture(tmp_path, *args, **options):
    small = {"model": "flux-tiny", "num_steps": 1, "seed": 3, "sites": LAST, "output_dir": tmp_path}
    return flux_ir.capture(*args, **(small | options))


def test_the_result_says_where_everything_is_and_nothing_is_printed(tmp_path, capsys):
    events = []
    done = capture(tmp_path, "a red circle", lens="both", progress=events.append)
    assert capsys.readouterr() == ("", "")
    assert done.folder == tmp_path / done.generation_id
    assert done.picture.is_file()
    assert done.metadata.is_file()
    assert done.lens.numbers.is_file()
    assert list(done.lens.sheets) == list(done.lens.pictures) == ["euler", "x0"]
    recorded = flux_ir.read_capture(done.capture)
    assert [str(site) for site in recorded.sites] == [LAST]
    assert recorded.read(LAST, 0).shape[1] == TINY.text_tokens + 64
    stages = [event.stage for event in events if isinstance(event, flux_ir.Progress) and event.done == event.total]
    assert stages == ["load", "text", "sample", "picture", "decode", "contact sheet"]
    assert flux_ir.Begun(done.generation_id) in events


def test_an_embedding_from_a_file_gives_the_same_capture_without_a_text_encoder(tmp_path, embeds, monkeypatch):
    by_prompt = capture(tmp_path, "a red circle", should_decode_intermediates=False)
    monkeypatch.setattr("flux_ir.models.suite.load_t5", lambda *args: pytest.fail("a text encoder was loaded"))
    by_file = capture(tmp_path, prompt_embeds=embeds, should_decode_intermediates=False)
    assert by_file.lens is None
    assert all(
        torch.equal(value, tensors_of(by_file.folder)[key]) for key, value in tensors_of(by_prompt.folder).items()
    )
    facts = json.loads(by_file.metadata.read_text())
    assert facts["prompt"] == "a red circle"
    assert facts["options"]["prompt_embeds"] == str(embeds)


def pictures_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")}


def test_a_loaded_model_gives_the_bytes_of_its_name_and_is_not_loaded_again(tmp_path, monkeypatch):
    named, loaded = capture(tmp_path, "a red circle"), flux_ir.load_model("flux-tiny")
    with loaded.text_encoders() as encoders, monkeypatch.context() as patch:
        for name in ("load_t5", "load_clip", "load_flux", "load_autoencoder"):
            patch.setattr(f"flux_ir.models.suite.{name}", lambda *_, **__: pytest.fail("it was loaded again"))
        done = capture(tmp_path, "a red circle", model=loaded)
    with loaded.text_encoders() as still:
        assert all(after is before for after, before in zip(still, encoders, strict=True))
    assert pictures_of(done.folder) == pictures_of(named.folder)
    numbers = named.lens.numbers.read_text().replace(named.generation_id, done.generation_id)
    assert done.lens.numbers.read_text() == numbers
    tensors = tensors_of(named.folder)
    assert all(torch.equal(value, tensors[key]) for key, value in tensors_of(done.folder).items())
    facts, expected = (json.loads(run.metadata.read_text()) for run in (done, named))
    assert facts.pop("dtype_reason") == "as the model was loaded"
    for name in ("generation_id", "timestamp"):
        facts[name] = expected[name]
    assert facts == {name: value for name, value in expected.items() if name != "dtype_reason"}


def test_a_loaded_model_brings_its_dtype_and_needs_no_text_encoder_for_an_embedding(tmp_path, embeds, monkeypatch):
    monkeypatch.setattr("flux_ir.models.suite.load_t5", lambda *_, **__: pytest.fail("a text encoder was loaded"))
    loaded = flux_ir.load_model("flux-tiny", parts=["transformer"], dtype="float32")
    done = capture(tmp_path, prompt_embeds=embeds, model=loaded, should_decode_intermediates=False)
    assert flux_ir.read_capture(done.capture).dtype == torch.float32
    assert json.loads(done.metadata.read_text())["dtype"] == "float32"


def test_what_a_loaded_model_has_settled_cannot_be_asked_for(tmp_path):
    loaded = flux_ir.load_model("flux-tiny", parts=[])
    asked = {"dtype": "float32", "device": "cpu", "multi_gpu": True, "offload": True}
    asked |= {"checkpoint": "flux", "ae_checkpoint": "ae"}
    with pytest.raises(FluxIRError, match=f"is used as it is: got {', '.join(asked)} as well"):
        capture(tmp_path / "runs", "a red circle", model=loaded, **asked)
    assert not (tmp_path / "runs").exists()


def test_other_names_and_other_lengths_of_an_embedding_are_taken(tmp_path):
    draw = torch.Generator().manual_seed(0)
    txt = torch.randn(1, 5, TINY.flux.context_in_dim, generator=draw)
    save_file({"txt": txt, "vec": torch.randn(1, TINY.flux.vec_in_dim, generator=draw)}, tmp_path / "mine.safetensors")
    done = capture(tmp_path / "runs", prompt_embeds=tmp_path / "mine.safetensors", should_decode_intermediates=False)
    recorded = flux_ir.read_capture(done.folder)
    assert recorded.metadata["prompt"] == "the embeddings in mine.safetensors"
    assert len(recorded.metadata["prompt_embeds"]) == 16  # so that nobody encodes these words in their place
    assert recorded.context(0).txt_tokens == 5
    assert recorded.read("single.7.txt", 0).shape[1] == 5


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"prompt_embeds": (1, 5, 64)}, "must hold one of prompt_embeds, txt and one of pooled_prompt_embeds, vec, y"),
        (
            {"prompt_embeds": (1, 5, 3), "vec": (1, SPEC.flux.vec_in_dim)},
            r"must be floats \[1, tokens,",
        ),
        ({"txt": (2, 5, SPEC.flux.context_in_dim), "vec": (1, SPEC.flux.vec_in_dim)}, r"got torch.float32 \[2, 5, "),
        ({"txt": (1, 5, SPEC.flux.context_in_dim), "y": (1, 7)}, r"y in .* must be floats \[1, "),
    ],
)
def test_an_embedding_that_does_not_fit_is_one_line(tmp_path, tensors, says):
    path = tmp_path / "wrong.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(FluxIRError, match=says):
        capture(tmp_path / "runs", prompt_embeds=path)
    assert not (tmp_path / "runs").exists()


def test_broken_embeddings_and_two_prompts_are_refused(tmp_path, embeds):
    (tmp_path / "cut.safetensors").write_bytes(embeds.read_bytes()[:-5])
    with pytest.raises(FluxIRError, match="cannot read the prompt's embedding"):
        capture(tmp_path, prompt_embeds=tmp_path / "cut.safetensors")
    with pytest.raises(FluxIRError, match="cannot read the prompt's embedding"):
        capture(tmp_path, prompt_embeds=tmp_path / "missing.safetensors")
    with pytest.raises(FluxIRError, match="got --prompt as well"):
        capture(tmp_path, "a red circle", prompt_embeds=embeds)
    txt, y = torch.full((1, 5, TINY.flux.context_in_dim), torch.nan), torch.zeros(1, TINY.flux.vec_in_dim)
    save_file({"txt": txt, "y": y}, tmp_path / "nan.safetensors")
    with pytest.raises(FluxIRError, match="must be finite"):
        capture(tmp_path, prompt_embeds=tmp_path / "nan.safetensors")


def test_the_command_takes_an_embedding_and_tells_what_is_wrong_in_one_line(tmp_path, embeds, capsys):
    words = ["--model", "flux-tiny", "--num_steps", "1", "--sites", LAST, "--output_dir", str(tmp_path)]
    words += ["--prompt_embeds", str(embeds), "--noshould_decode_intermediates"]
    assert main(words) == 0
    assert "generation id: " in capsys.readouterr().out
    assert main([*words, "--prompt", "a red circle"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --prompt_embeds is what a prompt is encoded to: got --prompt as well\n"
    )


@pytest.mark.parametrize("options", [{"steps": [1]}, {"width": 100}, {"sites": "single.99"}, {"model": "flux-tin"}])
def test_what_cannot_be_captured_leaves_nothing(tmp_path, options):
    with pytest.raises(FluxIRError):
        capture(tmp_path / "runs", "a red circle", **options)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_read_again_however_it_is_named(tmp_path, monkeypatch):
    done = capture(tmp_path, "a red circle", lens="euler")
    (tmp_path / "elsewhere" / done.generation_id).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")  # an id is one of output_dir, whatever lies here
    written = {path: path.read_bytes() for path in done.folder.rglob("*.jpg")}
    for run in (done, done.folder, str(done.folder), done.capture, f"../{done.generation_id}"):
        assert flux_ir.read_capture(run).path.samefile(done.capture)
    for run in (done.generation_id, "latest"):
        assert flux_ir.read_capture(run, output_dir=tmp_path).path == done.capture
    assert flux_ir.read_capture(output_dir=tmp_path).path == done.capture
    for run in (done, done.capture, done.folder, done.generation_id):
        again = flux_ir.read_lens(run, lens="euler", output_dir=tmp_path)
        assert again.numbers == done.lens.numbers
    assert {path: path.read_bytes() for path in done.folder.rglob("*.jpg")} == written
    assert flux_ir.read_lens("latest", lens="x0", output_dir=tmp_path).sheets["x0"].is_file()


@pytest.mark.parametrize("read", [flux_ir.read_capture, flux_ir.read_lens])
def test_what_names_no_run_is_one_line(tmp_path, read):
    for run, says in {
        "01234567": f"the folder {tmp_path / 'runs'} does not exist, so there is no generation 01234567 in it",
        "latest": f"there is no generation in {tmp_path / 'runs'}",
    }.items():
        with pytest.raises(FluxIRError) as caught:
            read(run, output_dir=tmp_path / "runs")
        assert caught.value.message == says
    with pytest.raises(FluxIRError, match="cannot read the capture"):
        read(tmp_path / "01234567" / "intermediates" / "capture.pt")
    with pytest.raises(FluxIRError, match="a run is a path, a generation id, or what capture returned: got int"):
        capture_file(7, tmp_path)
