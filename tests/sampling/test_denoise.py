"""The Euler loop names the first step and block whose values are not finite."""

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sampling.denoise import StateNotFiniteError, denoise
from flux_ir.sampling.generate import to_pixels

TIMES = [1.0, 0.7, 0.4, 0.0]


def walk(model, inputs, *, times=TIMES):
    img, img_ids, txt, txt_ids, _, y, _ = inputs
    return denoise(model, img, img_ids, txt, txt_ids, y, times, guidance=1.0)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("double_blocks.1.img_mlp.2", "double.1.img"),
        ("double_blocks.0.txt_attn.proj", "double.0.txt"),
        ("single_blocks.2.linear2", "single.2"),
        ("img_in", "img_in"),
        ("vector_in.out_layer", "vector_in"),
        ("final_layer.linear", "final_layer"),
    ],
)
def test_the_first_block_whose_values_are_not_finite_is_named(tiny_flux, tiny_inputs, module, told):
    model = tiny_flux()
    model.get_submodule(module).weight[0, 0] = float("inf")
    with pytest.raises(FluxIRError, match=rf"not finite after step 0: .* come from {told} \(") as caught:
        list(walk(model, tiny_inputs()))
    assert "float16" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_step_is_named_and_nobody_hears_it_twice(tiny_flux, tiny_inputs, value):
    """Where a hook does it from the second step on; the network by itself is sound."""
    model, sink, calls = tiny_flux(), MemorySink(), []

    def spoil(module, args, output):
        calls.append(len(calls))
        return output * value if len(calls) > 1 else output

    model.single_blocks[0].register_forward_hook(spoil)
    with (
        pytest.raises(FluxIRError, match=r"not finite after step 1: .* nothing of the network by itself"),
        Recorder(model, "single.*", sink),
    ):
        list(walk(model, tiny_inputs()))
    assert len(calls) == 2
    assert list(sink.contexts) == [0, 1]


@pytest.mark.parametrize(("name", "told"), [("txt", "from T5"), ("y", "from CLIP"), ("img", "the state before it")])
def test_inputs_that_are_not_finite_are_named(tiny_flux, tiny_inputs, name, told):
    inputs = tiny_inputs()
    getattr(inputs, name)[0, 0] = float("nan")
    with pytest.raises(FluxIRError, match=told):
        list(walk(tiny_flux(), inputs))


def test_the_state_of_every_step_is_checked_before_it_is_yielded_on_a_cpu(tiny_flux, tiny_inputs):
    model = tiny_flux()
    steps = walk(model, tiny_inputs())
    assert next(steps).after.isfinite().all()
    model.final_layer.linear.bias[3] = float("nan")
    with pytest.raises(FluxIRError, match=r"after step 1: .* final_layer"):
        next(steps)


def test_the_first_picture_of_a_batch_that_is_not_finite_is_told(tiny_flux, tiny_inputs):
    inputs = tiny_inputs(batch=3)
    inputs.y[1] = float("nan")
    with pytest.raises(StateNotFiniteError, match="from CLIP") as caught:
        list(walk(tiny_flux(), inputs))
    assert caught.value.row == 1


@pytest.mark.gpu
def test_a_gpu_tells_at_the_latest_one_step_later(tiny_flux, tiny_inputs):
    model = tiny_flux().cuda()
    model.single_blocks[1].linear2.weight[0, 0] = float("inf")
    inputs = tiny_inputs()._replace(**{k: v.cuda() for k, v in tiny_inputs()._asdict().items() if v is not None})
    for times in (TIMES, TIMES[-2:]):
        seen = []
        with pytest.raises(FluxIRError, match=r"after step 0: .* single.1"):
            seen.extend(walk(model, inputs, times=times))
        assert len(seen) <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_is_an_error(value):
    picture = torch.zeros(1, 3, 4, 4)
    picture[0, 1, 2, 3] = value
    with pytest.raises(FluxIRError, match="the autoencoder put out values that are not finite: there is no picture"):
        to_pixels(picture)
