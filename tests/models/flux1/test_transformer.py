"""The transformer against the reference's tensors, and the invariants the recorder and the lens lean on."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from jaxtyping import TypeCheckError

from flux_ir.errors import FluxIRError
from flux_ir.models.flux1.transformer import Flux, FluxParams

GOLDEN = ["schnell_like", "dev_like"]


@pytest.fixture(scope="module", params=GOLDEN)
def reference(request, golden):
    return golden(request.param)


@pytest.fixture
def flux(reference):
    """The network of the golden file, loaded strictly."""
    model = Flux(FluxParams(**reference.params))
    model.load_state_dict(reference.weights, strict=True)
    return model.eval().requires_grad_(False)


def golden_arguments(reference, img, step):
    t = reference.tensors
    guidance = reference.metadata.get("guidance")
    return {
        "img": img,
        "img_ids": t["img_ids"],
        "txt": t["txt"],
        "txt_ids": t["txt_ids"],
        "timesteps": t["timesteps"][step : step + 1].float(),
        "y": t["vec"],
        "guidance": None if guidance is None else torch.tensor([float(guidance)]),
    }


def steps_of(reference):
    return range(int(reference.metadata["num_steps"]))


def assert_agrees(ours, reference, name):
    torch.testing.assert_close(ours, reference.tensors[name], rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")


def test_every_block_and_the_velocity_agree_with_the_reference_at_every_step(flux, reference):
    outputs = {}
    for i, block in enumerate(flux.double_blocks):
        block.register_forward_hook(lambda _, __, out, i=i: outputs.update({f"double.{i}.img": out[0]}))
        block.register_forward_hook(lambda _, __, out, i=i: outputs.update({f"double.{i}.txt": out[1]}))
    for i, block in enumerate(flux.single_blocks):
        block.register_forward_hook(lambda _, __, out, i=i: outputs.update({f"single.{i}": out}))

    for step in steps_of(reference):
        outputs["pred"] = flux(**golden_arguments(reference, reference.tensors[f"x.{step}"], step))
        assert len(outputs) == 2 * len(flux.double_blocks) + len(flux.single_blocks) + 1
        for site, output in outputs.items():
            assert_agrees(output, reference, f"{site}.{step}")


def test_the_whole_trajectory_agrees_with_the_reference(flux, reference):
    img = reference.tensors["img"]
    times = reference.tensors["timesteps"].tolist()
    for step, (t_curr, t_prev) in enumerate(pairwise(times)):
        assert_agrees(img, reference, f"x.{step}")
        img = img + (t_prev - t_curr) * flux(**golden_arguments(reference, img, step))
    assert_agrees(img, reference, "x.final")


def test_reading_out_a_block_early_agrees_with_the_reference(flux, reference):
    times = reference.tensors["timesteps"].tolist()
    txt_tokens = reference.tensors["txt"].shape[1]
    for step in steps_of(reference):
        state = reference.tensors[f"x.{step}"]
        arguments = golden_arguments(reference, state, step)
        vec = flux.conditioning(arguments["timesteps"], arguments["y"], arguments["guidance"])
        for name in (name for name in reference.tensors if name.startswith("lens.") and name.endswith(f".{step}")):
            _, kind, block, _ = name.split(".")
            if kind == "double":
                tokens = reference.tensors[f"double.{block}.img.{step}"]
            else:
                tokens = reference.tensors[f"single.{block}.{step}"][:, txt_tokens:]
            reading = state + (times[step + 1] - times[step]) * flux.read_out(tokens, vec)
            assert_agrees(reading, reference, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [None, 3.5])
def test_read_out_of_the_last_block_is_the_velocity_bit_for_bit(tiny_flux, tiny_inputs, dtype, guidance):
    flux = tiny_flux(guidance=guidance is not None, dtype=dtype)
    inputs = tiny_inputs(batch=2, guidance=guidance, dtype=dtype)
    last = []
    flux.single_blocks[-1].register_forward_hook(lambda _, __, out: last.append(out))

    velocity = flux(*inputs)

    vec = flux.conditioning(inputs.timesteps, inputs.y, inputs.guidance)
    assert torch.equal(flux.read_out(last[0][:, inputs.txt.shape[1] :], vec), velocity)
    assert velocity.dtype == dtype
    assert velocity.shape == inputs.img.shape


def test_double_blocks_return_image_first_and_single_blocks_hold_text_first(tiny_flux, tiny_inputs):
    flux, inputs = tiny_flux(), tiny_inputs()
    seen = {}
    flux.double_blocks[-1].register_forward_hook(lambda _, __, out: seen.update(img=out[0], txt=out[1]))
    flux.single_blocks[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))

    flux(*inputs)

    assert seen["img"].shape[1] == 12
    assert seen["txt"].shape[1] == 7
    assert torch.equal(seen["x"], torch.cat([seen["txt"], seen["img"]], dim=1))


def test_pictures_of_a_batch_do_not_see_each_other(tiny_flux, tiny_inputs):
    flux, inputs = tiny_flux(), tiny_inputs(batch=2)
    together = flux(*inputs)
    alone = [flux(*(None if part is None else part[i : i + 1] for part in inputs)) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_order_of_image_tokens_is_told_by_their_positions_alone(tiny_flux, tiny_inputs):
    flux, inputs = tiny_flux(), tiny_inputs()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = inputs._replace(img=inputs.img[:, order], img_ids=inputs.img_ids[:, order])
    torch.testing.assert_close(flux(*shuffled), flux(*inputs)[:, order], rtol=0, atol=1e-5)
    assert not torch.allclose(flux(*inputs._replace(img=inputs.img[:, order])), flux(*inputs)[:, order], atol=1e-2)


@pytest.mark.parametrize("argument", ["img", "txt", "timesteps", "y", "guidance"])
def test_every_input_reaches_the_velocity(tiny_flux, tiny_inputs, argument):
    flux, inputs = tiny_flux(guidance=True), tiny_inputs(guidance=3.5)
    changed = inputs._replace(**{argument: getattr(inputs, argument) * 0.5})
    assert (flux(*changed) - flux(*inputs)).abs().max() > 1e-3


def test_models_without_a_guidance_embedder_ignore_guidance(tiny_flux, tiny_inputs):
    flux = tiny_flux()
    assert torch.equal(flux(*tiny_inputs(guidance=3.5)), flux(*tiny_inputs()))


def test_distilled_models_refuse_to_run_without_guidance(tiny_flux, tiny_inputs):
    with pytest.raises(FluxIRError, match=r"guidance-distilled.*got None.*hint: pass a value such as 2\.5"):
        tiny_flux(guidance=True)(*tiny_inputs())


@pytest.mark.parametrize("argument", ["txt_ids", "img_ids"])
def test_shape_checks_name_the_argument_with_the_wrong_token_count(tiny_flux, tiny_inputs, argument):
    inputs = tiny_inputs()
    wrong = inputs._replace(**{argument: torch.zeros(1, 9, 3)})
    with pytest.raises(TypeCheckError, match=rf"parameter '{argument}'"):
        tiny_flux()(*wrong)


def test_params_turn_lists_from_json_into_tuples(tiny_flux_params):
    from_json = dataclasses.asdict(tiny_flux_params) | {"axes_dim": [4, 6, 6]}
    assert FluxParams(**from_json) == tiny_flux_params
    assert hash(FluxParams(**from_json)) == hash(tiny_flux_params)


def test_params_refuse_heads_that_do_not_divide_the_width(tiny_flux_params):
    with pytest.raises(FluxIRError, match=r"multiple of num_heads: got 64 and 5"):
        dataclasses.replace(tiny_flux_params, num_heads=5)


@pytest.mark.parametrize("axes_dim", [(4, 6, 8), (4, 4, 4), (5, 5, 6)])
def test_params_refuse_axes_that_do_not_fill_a_head(tiny_flux_params, axes_dim):
    with pytest.raises(FluxIRError, match=r"even and add up to the head width 16: got \("):
        dataclasses.replace(tiny_flux_params, axes_dim=axes_dim)
