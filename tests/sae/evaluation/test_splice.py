"""Putting something in the place of a block's output: what must change no bit, what must be 0 or 1, what is refused."""

import math

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.evaluation.baselines import PCA, Covariance
from flux_ir.sae.evaluation.splice import (
    CLEAN,
    SpliceMeter,
    mean_ablation,
    reconstruction,
    recovered,
    spliced,
    zero_ablation,
)
from flux_ir.sampling.generate import Inputs
from flux_ir.sites import Site

SITES = [
    "double.0.img",
    "double.1.txt",
    "double.0.img.mlp",
    "single.1",
    "single.1.img",
    "single.1.img.update",
    "single.2.txt",
]
TIMES = [1.0, 0.7, 0.3, 0.0]


@pytest.fixture
def inputs(tiny_inputs):
    """What a run of two pictures begins with: 12 image and 7 text tokens."""

    def make(dtype=torch.float32):
        given = tiny_inputs(batch=2, dtype=dtype)
        return Inputs(given.img, given.img_ids, given.txt, given.txt_ids, given.y)

    return make


@pytest.fixture
def pca():
    """A poor dictionary of 3 components for activations of width 64."""
    covariance = Covariance(64)
    covariance.add(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)))
    return PCA.of(covariance, 3)


def run(model, tiny_inputs):
    with torch.no_grad():
        return model(*tiny_inputs)


def hooks_of(model):
    return [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_putting_a_value_in_its_own_place_changes_no_bit(tiny_flux, tiny_inputs, name, dtype):
    model, given = tiny_flux(dtype=dtype), tiny_inputs(dtype=dtype)
    untouched = run(model, given)
    seen = []
    with spliced(model, Site.parse(name), lambda x: seen.append(x.shape[1]) or x):
        assert torch.equal(run(model, given), untouched)
    assert seen == [{"img": 12, "txt": 7, None: 19}[Site.parse(name).stream]]
    assert hooks_of(model) == []


@pytest.mark.parametrize("name", SITES)
def test_another_value_reaches_the_velocity_unless_it_is_text_at_the_very_end(tiny_flux, tiny_inputs, name):
    model, given = tiny_flux(), tiny_inputs()
    with spliced(model, Site.parse(name), zero_ablation):
        changed = run(model, given)
    assert torch.equal(changed, run(model, given)) == (name == "single.2.txt")  # text behind the last block is dropped


@pytest.mark.parametrize("keep_error", [True, False])
def test_an_autoencoder_stands_for_its_reconstruction(tiny_flux, tiny_inputs, keep_error):
    model, given = tiny_flux(), tiny_inputs()
    sae = make_sae(SAEConfig("topk", d_in=64, d_sae=128, k=4))
    with spliced(model, "single.1.img", sae, keep_error=keep_error):
        by_name = run(model, given)
    with spliced(model, Site.parse("single.1.img"), reconstruction(sae, 128, keep_error=keep_error)):
        assert torch.equal(run(model, given), by_name)


def test_only_the_named_stream_is_replaced(tiny_flux, tiny_inputs):
    """Zeroing both halves of a single block, one after the other, is zeroing it whole."""
    model, given = tiny_flux(), tiny_inputs()
    with spliced(model, Site.parse("single.1"), zero_ablation):
        whole = run(model, given)
    with (
        spliced(model, Site.parse("single.1.img"), zero_ablation),
        spliced(model, Site.parse("single.1.txt"), zero_ablation),
    ):
        assert torch.equal(run(model, given), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reconstruction_with_its_error_is_the_value_again(tiny_flux, tiny_inputs, pca, dtype):
    model, given = tiny_flux(dtype=dtype), tiny_inputs(dtype=dtype)
    untouched = run(model, given)
    with spliced(model, Site.parse("single.0.img"), reconstruction(pca, 3, keep_error=True)):
        kept = run(model, given)
    with spliced(model, Site.parse("single.0.img"), reconstruction(pca, 3)):
        lost = run(model, given)
    assert (kept - untouched).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2) * untouched.abs().max()
    assert (lost - untouched).norm() > 0.1 * untouched.norm()


def test_a_reconstruction_does_not_depend_on_how_many_tokens_are_worked_on_at_once(pca, monkeypatch):
    x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1))
    whole = reconstruction(pca, 3)(x)
    monkeypatch.setattr("flux_ir.sae.evaluation.splice.DENSE_VALUES", 15)
    torch.testing.assert_close(reconstruction(pca, 3)(x), whole)
    torch.testing.assert_close(whole, pca(x))


def test_only_the_steps_asked_for_are_replaced(tiny_flux, tiny_inputs):
    model, given = tiny_flux(), tiny_inputs()
    untouched = run(model, given)
    with spliced(model, Site.parse("double.0.img"), zero_ablation, steps=[1]):
        results = [torch.equal(run(model, given), untouched) for _ in range(3)]
    assert results == [True, False, True]


def test_no_hook_stays_when_the_replacement_fails(tiny_flux, tiny_inputs):
    model = tiny_flux()

    def fails(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), spliced(model, Site.parse("single.0"), fails):
        run(model, tiny_inputs())
    assert hooks_of(model) == []


# ---- The numbers


def test_recovered_is_one_for_the_value_itself_and_zero_for_the_ablation(tiny_flux, inputs, pca):
    model, site = tiny_flux(), Site.parse("single.1.img")
    mean = torch.randn(64, generator=torch.Generator().manual_seed(2))
    replacements = {
        "itself": lambda x: x,
        "sae": reconstruction(pca, 3),
        "zero": zero_ablation,
        "mean": mean_ablation(mean),
    }
    meter = SpliceMeter(model, site, replacements)
    latents = meter.add(inputs(), TIMES, 3.0)
    numbers = meter.result()
    assert list(latents) == [CLEAN, *replacements]
    assert torch.equal(latents["itself"], latents[CLEAN])
    for ablation in ("zero", "mean"):
        ablated = numbers[ablation].velocity_mse
        assert recovered(numbers["itself"].velocity_mse, ablated) == 1
        assert recovered(ablated, ablated) == 0
    assert math.isnan(recovered(0.0, 0.0))
    assert sorted(numbers["sae"].velocity_mse_per_step) == [0, 1, 2]
    assert numbers["sae"].velocity_mse > 0


def test_velocities_are_compared_from_the_states_of_the_untouched_run(tiny_flux, inputs):
    """Written out for one step: the same state, time and text, with and without the splice."""
    from flux_ir.sampling.generate import sample

    model, site, given = tiny_flux(), Site.parse("double.1.img"), inputs()
    meter = SpliceMeter(model, site, {"zero": zero_ablation})
    meter.add(given, TIMES, 3.0)
    step = list(sample(model, given, TIMES, 3.0))[2]
    of_time = torch.full((2,), step.t_curr)
    with spliced(model, site, zero_ablation), torch.no_grad():
        velocity = model(step.before, given.img_ids, given.txt, given.txt_ids, of_time, given.y)
    expected = (velocity - step.velocity).double().square().mean().item()
    assert meter.result()["zero"].velocity_mse_per_step[2] == pytest.approx(expected, rel=1e-5)


def test_runs_add_up_to_the_mean_over_all_of_them(tiny_flux, inputs):
    model, site, given = tiny_flux(), Site.parse("single.0.img"), inputs()
    single = [Inputs(*(None if part is None else part[i : i + 1] for part in given)) for i in range(2)]
    together, apart = (SpliceMeter(model, site, {"zero": zero_ablation}) for _ in range(2))
    together.add(given, TIMES, 3.0)
    for one in single:
        apart.add(one, TIMES, 3.0)
    assert apart.result()["zero"].velocity_mse == pytest.approx(together.result()["zero"].velocity_mse, rel=1e-4)


def test_before_the_first_replaced_step_runs_are_the_same(tiny_flux, inputs):
    model = tiny_flux()
    meter = SpliceMeter(model, Site.parse("single.0.img"), {"zero": zero_ablation}, steps=[2])
    latents = meter.add(inputs(), TIMES, 3.0)
    assert list(meter.result()["zero"].velocity_mse_per_step) == [2]
    assert not torch.equal(latents["zero"], latents[CLEAN])


def test_pictures_are_compared_in_levels_of_255(tiny_flux, inputs):
    meter = SpliceMeter(tiny_flux(), Site.parse("single.0"), {"a": zero_ablation, "b": zero_ablation})
    meter.add(inputs(), TIMES, 3.0)
    assert meter.result()["a"].image_mse is None
    clean = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    for _ in range(2):
        meter.add_pictures({CLEAN: clean, "a": clean + 2, "b": clean})
    numbers = meter.result()
    assert numbers["a"].image_mse == 4
    assert numbers["a"].image_psnr_db == pytest.approx(10 * math.log10(255**2 / 4))
    assert (numbers["b"].image_mse, numbers["b"].image_psnr_db) == (0, None)


# ---- Refused


def test_blocks_the_model_does_not_have_are_refused(tiny_flux):
    with (
        pytest.raises(FluxIRError, match=r"2 double and 3 single blocks, and no site single.3.img"),
        spliced(tiny_flux(), Site.parse("single.3.img"), zero_ablation),
    ):
        pass


def test_values_of_another_shape_or_dtype_are_refused(tiny_flux, tiny_inputs):
    model, given = tiny_flux(), tiny_inputs()
    for wrong in (lambda x: x[:, 1:], lambda x: x.double()):
        with (
            pytest.raises(FluxIRError, match=r"what stands in place of single.0.img must have the"),
            spliced(model, Site.parse("single.0.img"), wrong),
        ):
            run(model, given)


def test_steps_beyond_the_schedule_are_refused(tiny_flux, inputs):
    meter = SpliceMeter(tiny_flux(), Site.parse("single.0"), {"zero": zero_ablation}, steps=[7])
    with pytest.raises(FluxIRError, match=r"at least one of the schedule's 3 steps: got \[7\]"):
        meter.add(inputs(), TIMES, 3.0)
