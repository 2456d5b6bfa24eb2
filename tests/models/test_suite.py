"""A whole model on its devices: what is loaded when, and that offloaded parts always come back."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.locate import ModelSource, locate_autoencoder, locate_transformer
from flux_ir.models.checkpoints.locate_text import EncoderSource, TextSource
from flux_ir.models.placement import Placement, plan
from flux_ir.models.registry import packaged_spec
from flux_ir.models.suite import Suite
from flux_ir.models.text import encode
from flux_ir.sites import all_sites, text_sites

PROMPT = ["a red circle"]


class Traced(nn.Module):
    """Notes where it is sent and stays where it is: there is only one device here, so only the order is looked at."""

    moves: list[str]

    def to(self, device):
        self.moves.append(device)
        return self


def traced(part, moves):
    """The part itself, which notes where it is sent from here on."""
    part.__class__ = type("Traced", (Traced, type(part)), {})
    part.moves = moves
    return part


@pytest.fixture
def suite(packaged_folder, text_folders):
    """Makes a suite of small random networks, found on disk like any model."""

    def make(placement=None, dtype=torch.float32, clip_dir=None):
        params = json.loads((packaged_folder / "params.json").read_text())
        params["text_tokens"] = 7
        (packaged_folder / "params.json").write_text(json.dumps(params))
        spec = packaged_spec("flux-tiny", packaged_folder)
        clip_dir = clip_dir or text_folders.clip
        source = ModelSource(
            locate_transformer(spec),
            locate_autoencoder(spec),
            TextSource(
                EncoderSource(text_folders.t5, text_folders.t5, "a test"),
                EncoderSource(clip_dir, clip_dir, "a test"),
            ),
        )
        return Suite(spec, source, placement or plan(0), dtype)

    return make


def offloaded(device="cuda:3"):
    return Placement(device, device, device, device, device, offload="parts", reason="a test")


def test_loading_tells_each_part_once_it_is_there(suite, tmp_path):
    loading = suite(clip_dir=tmp_path).load()
    with pytest.raises(FluxIRError, match="text encoder"):
        next(loading)
    whole = suite()
    assert list(whole.load()) == whole.parts == ["text", "transformer", "autoencoder"]


def test_each_part_is_loaded_once(suite):
    whole = suite()
    list(whole.load())
    for part in (whole.transformer, whole.autoencoder, whole.text_encoders):
        with part() as first, part() as again:
            assert again is first or list(map(id, again)) == list(map(id, first))


def test_parts_are_loaded_when_they_are_asked_for(suite, tmp_path):
    with suite(clip_dir=tmp_path).transformer() as model:  # the missing text encoder is not missed
        assert model.params.depth == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_all_parts_but_the_autoencoder(suite, dtype):
    whole = suite(dtype=dtype)
    with whole.text_encoders() as text, whole.transformer() as model, whole.autoencoder() as autoencoder:
        assert model.dtype == dtype
        embedding = encode(*text, PROMPT)
        assert embedding.txt.dtype == embedding.y.dtype == dtype
        assert {parameter.dtype for parameter in autoencoder.parameters()} == {torch.float32}


def test_text_has_the_length_of_the_spec(suite):
    with suite().text_encoders() as text:
        assert encode(*text, PROMPT).txt.shape == (1, 7, 40)


@pytest.mark.parametrize("part", ["text_encoders", "transformer", "autoencoder"])
def test_without_offload_nothing_moves(suite, part):
    whole, moves = suite(), []
    parts_of(whole, moves)
    with getattr(whole, part)():
        pass
    assert moves == []


def parts_of(whole, moves):
    """Loads every part and notes its moves as (part, device)."""

    class Notes(list):
        def __init__(self, name):
            self.name = name

        def append(self, device):
            moves.append((self.name, device))

    with whole.text_encoders() as text, whole.transformer() as model, whole.autoencoder() as autoencoder:
        parts = {"t5": text.t5, "clip": text.clip, "transformer": model}
        parts |= {"ae_encoder": autoencoder.encoder, "ae_decoder": autoencoder.decoder}
        for name, part in parts.items():
            traced(part, Notes(name))


PARTS_OF = {
    "text_encoders": ["t5", "clip"],
    "transformer": ["transformer"],
    "autoencoder": ["ae_encoder", "ae_decoder"],
}


@pytest.mark.parametrize("part", PARTS_OF)
@pytest.mark.parametrize("fails", [False, True])
def test_with_offload_parts_are_on_their_device_inside_the_block_alone(suite, part, fails):
    whole, moves = suite(plan(0)), []
    parts_of(whole, moves)
    whole.placement = Placement("cuda:0", "cuda:1", "cuda:2", "cuda:5", "cuda:6", offload="parts", reason="a test")
    there = [(name, getattr(whole.placement, name)) for name in PARTS_OF[part]]
    back = [(name, "cpu") for name in reversed(PARTS_OF[part])]

    def use():
        with getattr(whole, part)():
            assert moves == there
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            use()
    else:
        use()
    assert moves == there + back


def test_a_part_that_does_not_fit_comes_back_too(suite):
    """Out of memory half way: what had been moved must not stay."""
    whole, moves = suite(offloaded()), []

    class Full(nn.Linear):
        def to(self, device):
            moves.append(device)
            if device != "cpu":
                raise torch.cuda.OutOfMemoryError("no room")
            return self

    with pytest.raises(torch.cuda.OutOfMemoryError), whole._on(Full(1, 1), "cuda:3"):
        pytest.fail("the body must not run")
    assert moves == ["cuda:3", "cpu"]


def test_with_offload_everything_is_loaded_to_the_cpu_first(suite):
    whole = suite(offloaded())  # there is no such GPU: loading to it would fail
    assert list(whole.load())[-1] == "autoencoder"


@pytest.mark.gpu
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("part", PARTS_OF)
def test_offloaded_parts_are_on_the_gpu_while_they_are_needed(suite, part, fails):
    whole = suite(offloaded("cuda:0"), torch.bfloat16)
    modules: list[nn.Module] = []

    def devices():
        return {parameter.device.type for module in modules for parameter in module.parameters()}

    def use():
        with getattr(whole, part)() as inside:
            modules.extend(inside if isinstance(inside, tuple) else [inside])
            assert devices() == {"cuda"}
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            use()
    else:
        use()
    assert devices() == {"cpu"}


@pytest.mark.gpu
def test_an_offloaded_transformer_computes_what_a_resident_one_does(suite, tiny_inputs):
    inputs = [None if tensor is None else tensor.cuda() for tensor in tiny_inputs(dtype=torch.bfloat16)]
    whole, resident = suite(offloaded("cuda:0"), torch.bfloat16), suite(plan(1), torch.bfloat16)
    for _ in range(2):
        with whole.transformer() as moved, resident.transformer() as model:
            assert torch.equal(moved(*inputs), model(*inputs))


def test_a_model_says_what_it_is_and_which_sites_it_has(suite):
    model = suite()
    flux = model.spec.flux
    with model.text_encoders() as encoders:
        layers = encoders.t5.model.params.num_layers, encoders.clip.model.params.num_hidden_layers
    assert model.sites == [*text_sites(*layers), *all_sites(flux.depth, flux.depth_single_blocks)]
    assert repr(suite()) == "<flux-tiny: 2 double and 3 single blocks of width 64, float32 on cpu>"


def test_streamed_blocks_give_the_bits_of_resident_ones_and_text_encoders_go(suite, tiny_inputs):
    resident, streamed = suite(), suite(plan(0, offload="blocks"))
    assert list(streamed.load()) == ["transformer"]
    velocities = []
    for model in (resident, streamed):
        with model.text_encoders() as encoders:
            text = encode(encoders.t5, encoders.clip, PROMPT)
        inputs = tiny_inputs()._replace(txt=text.txt, txt_ids=torch.zeros(1, text.txt.shape[1], 3), y=text.y)
        with model.transformer() as flux:
            velocities.append(flux(*inputs))
    assert torch.equal(*velocities)
    assert streamed._t5 is None
    assert all(parameter.is_meta for parameter in streamed.flux.double_blocks.parameters())


def test_a_memory_limit_keeps_as_many_blocks_as_it_has_room_for(suite):
    placement = replace(plan(0, offload="blocks"), memory_bytes=10**10)
    flux = suite(placement).flux
    there = [not next(block.parameters()).is_meta for block in (*flux.double_blocks, *flux.single_blocks)]
    assert sum(there) == len(there) - 1  # one is always streamed
