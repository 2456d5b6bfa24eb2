from inspect import signature

import pytest
import torch

import flux_ir
from flux_ir.api.capture import CaptureSettings
from flux_ir.api.model_settings import (
    Machine,
    ModelSettings,
    PictureSettings,
    identity_of_pictures,
    provenance_of,
)
from flux_ir.api.steer import SteerSettings
from flux_ir.errors import FluxIRError
from flux_ir.models.compute_dtype import ComputeDtype
from flux_ir.models.flux1.attention import kernel_of
from flux_ir.models.placement import plan
from flux_ir.models.suite import Suite
from flux_ir.sites import Site

SAMPLING = [flux_ir.capture, flux_ir.steer, flux_ir.attribute, flux_ir.transfer, flux_ir.play]


@pytest.mark.parametrize("function", [flux_ir.load_model, *SAMPLING], ids=lambda function: function.__name__)
def test_every_choice_is_an_argument_of_all_functions_that_run_a_model(function):
    arguments = {name: argument.default for name, argument in signature(function).parameters.items()}
    choices = ModelSettings().model_choices()
    if function is not flux_ir.load_model:
        choices |= PictureSettings().picture_choices()
    assert {name: arguments.get(name, "no argument") for name in choices} == choices


def test_the_same_model_and_picture_are_asked_for_with_other_settings():
    asked = CaptureSettings(device="cpu", dtype="float32", checkpoint="flux", width=64, num_steps=3)
    same = SteerSettings(model=asked.model, **asked.model_choices(), **asked.picture_choices())
    assert (same.model_choices(), same.picture_choices()) == (asked.model_choices(), asked.picture_choices())
    assert asked.choices_made() == {"device": "cpu", "dtype": "float32", "checkpoint": "flux"}


def test_what_was_recorded_in_float32_is_read_in_float32():
    machine = ModelSettings(model="flux-tiny", device="cpu").settle_machine(recorded=torch.float32)
    assert machine.compute.dtype == torch.float32


def test_an_emulated_dtype_is_told_with_the_machine():
    compute = ComputeDtype(torch.bfloat16, "as --dtype says", "bfloat16 is emulated")
    assert Machine(plan(0), compute).notes() == ["note: bfloat16 is emulated"]
    assert str(Machine(plan(0), compute)) == "cpu (no GPU is visible), bfloat16 (as --dtype says)"


def test_pictures_of_another_size_guidance_or_dtype_are_others():
    loaded = flux_ir.load_model("flux-tiny", parts=[], dtype="float32", device="cpu")
    plain = PictureSettings(model=loaded)
    known = identity_of_pictures(loaded, plain.settle_picture())
    assert known == identity_of_pictures(loaded, PictureSettings(model=loaded, width=128, height=128).settle_picture())
    for change in ({"width": 64}, {"guidance": 2.0}, {"num_steps": 3}):
        other = identity_of_pictures(loaded, PictureSettings(model=loaded, **change).settle_picture())
        assert other != known


def test_compiled_blocks_give_other_pictures():
    loaded = flux_ir.load_model("flux-tiny", parts=[], dtype="float32", device="cpu")
    compiled = Suite(loaded.spec, loaded.source, loaded.placement, loaded.dtype, compiled=True)
    plain, other = (identity_of_pictures(s, PictureSettings(model=s).settle_picture()) for s in (loaded, compiled))
    assert other == plain | {"compiled": True}
    assert "compiled" in repr(compiled)
    assert ModelSettings(model=compiled).settle_machine().compiled
    with pytest.raises(FluxIRError, match="a loaded model is used as it is: got compile as well"):
        ModelSettings(model=loaded, compile=True).settle_machine()


def test_the_kernel_of_attention_is_chosen_and_makes_other_pictures():
    loaded = flux_ir.load_model("flux-tiny", parts=[], dtype="float32", device="cpu")
    chosen = flux_ir.load_model("flux-tiny", parts=[], dtype="float32", device="cpu", attention="math")
    plain, other = (identity_of_pictures(s, PictureSettings(model=s).settle_picture()) for s in (loaded, chosen))
    assert other == plain | {"attention": "math"}
    machine = ModelSettings(model=chosen).settle_machine()
    assert (machine.attention, kernel_of(chosen.flux)) == ("math", "math")
    assert str(machine).endswith("float32 (as the model was loaded), math attention")
    told = [provenance_of(suite, ModelSettings(model=suite).settle_machine()) for suite in (loaded, chosen)]
    assert [(one["attention"], one["sdpa"]) for one in told] == [("auto", "flash_attention"), ("math", "math")]


@pytest.mark.parametrize("kernel", ["efficient", "cudnn"])
def test_a_kernel_that_the_device_lacks_is_refused_with_those_it_has(kernel):
    settings = ModelSettings(model="flux-tiny", device="cpu", dtype="float32", attention=kernel)
    with pytest.raises(FluxIRError) as raised:
        settings.settle_machine()
    assert raised.value.message == (
        f"--attention {kernel} is not there on cpu for heads of 32 channels in float32: flash and math are"
    )


def test_streamed_blocks_cannot_be_compiled():
    with pytest.raises(FluxIRError, match="--compile needs blocks that stay where they are"):
        ModelSettings(model="flux-tiny", device="cpu", offload="blocks", compile=True).settle_machine()


def test_weights_that_are_kept_as_codes_cannot_be_compiled():
    loaded = flux_ir.load_model("flux-tiny", parts=[], dtype="float32", device="cpu")
    codes = loaded.source._replace(quantize="int8")
    with pytest.raises(FluxIRError, match="--compile needs blocks whose weights are there as they are"):
        Suite(loaded.spec, codes, loaded.placement, loaded.dtype, compiled=True)


def test_blocks_around_a_site_are_named_as_not_compiled():
    compute = ComputeDtype(torch.float32, "as --dtype says")
    sites = [Site.parse(name) for name in ("single.2", "double.1.img.mlp", "double.1.txt.attn", "double.0.img.update")]
    assert Machine(plan(0), compute, True).notes(sites) == [
        "note: not compiled, because of sites inside them: double.1"
    ]
    assert Machine(plan(0), compute).notes(sites) == []
