"""Pictures side by side: the bits of one by itself, numbers that are right, and controls that are as long."""

import math

import pytest
import torch

from flux_ir.models.text import TextEmbedding
from flux_ir.sampling.schedule import get_schedule
from flux_ir.steering.dose import (
    Made,
    Meter,
    Painter,
    Variant,
    aligned_neurons,
    measuring,
    moved,
    price,
    random_directions,
    windows,
)
from flux_ir.steering.edits import Edit
from flux_ir.steering.table import Run, estimate, tabulate
from tests.recording.listeners import hooks_on
from tests.steering.conftest import GRID

STEPS = 2


@pytest.fixture
def painter(tiny_flux, tiny_autoencoder):
    def make(meter=None):
        times = get_schedule(STEPS, GRID.tokens, shift=False)
        return Painter(tiny_flux(), tiny_autoencoder(), GRID, times, 1.0, torch.float32, meter)

    return make


@pytest.fixture
def text(tiny_inputs):
    inputs = tiny_inputs()
    return TextEmbedding(inputs.txt, inputs.y)


def test_pictures_side_by_side_have_the_bits_of_each_by_itself(painter, text, steering, tiny_sae):
    ready = steering(Edit(sae=tiny_sae(), feature=3), num_steps=STEPS)
    painter = painter(ready)
    doses = [ready.at(strength) for strength in (0.0, 1.0, 4.0)]
    variants = [
        Variant("edit", s, seed, text, dose) for seed in (1, 2) for s, dose in zip((0, 1, 4), doses, strict=True)
    ]
    together = list(painter.make(variants))
    assert [made.variant for made in together] == variants
    for made in together:
        (alone,) = painter.make([made.variant])
        assert torch.equal(alone.latent, made.latent)
        assert torch.equal(alone.picture, made.picture)
    unmeasured = list(painter._replace(meter=None).make(variants))
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(unmeasured, together, strict=True))
    assert hooks_on(painter.model) == 0


def test_strength_zero_is_the_unsteered_picture_to_the_bit(painter, text, steering, tiny_sae):
    ready = steering(Edit(sae=tiny_sae(), feature=3), num_steps=STEPS)
    unsteered, zero, one = painter(ready).make(
        [Variant("unsteered", 0, 7, text, None), *(Variant("edit", s, 7, text, ready.at(s)) for s in (0.0, 1.0))]
    )
    assert price(zero, unsteered, None, GRID).identical
    paid = price(one, unsteered, None, GRID)
    assert not paid.identical
    assert paid.latent_inside == pytest.approx(float((one.latent - unsteered.latent).norm() / unsteered.latent.norm()))


def test_the_price_is_paid_inside_or_outside(steering):
    latent, picture = torch.zeros(12, 64) + 1, torch.zeros(64, 48, 3, dtype=torch.uint8)
    changed, bright = latent.clone(), picture.clone()
    changed[0] = 3
    bright[:16, :16] = 10
    inside = torch.zeros(12, dtype=torch.bool)
    inside[0] = True
    variant = Variant("edit", 1, 0, None, None)
    paid = price(Made(variant, changed, bright, None), Made(variant, latent, picture, None), inside, GRID)
    assert paid.latent_inside == pytest.approx(2)
    assert paid.latent_outside == 0
    assert paid.psnr_inside_db == pytest.approx(20 * math.log10(25.5))
    assert paid.psnr_outside_db is None


def test_a_meter_reads_what_the_network_made_and_what_the_edit_made_of_it(tiny_flux, tiny_inputs, steering, tiny_sae):
    from flux_ir.steering.apply import steered

    model, inputs, sae = tiny_flux(), tiny_inputs(), tiny_sae()
    ready = steering(Edit(kind="set", sae=sae, feature=3, strength=2.0, steps=(0,)), num_steps=2)
    meter, plain = Meter(ready), Meter(ready)
    for one, rows in ((meter, [ready]), (plain, [None])):
        with measuring(model, [one], "before"), steered(model, rows), measuring(model, [one], "behind"):
            first, second = model(*inputs), model(*inputs)
    assert not torch.equal(first, second) or rows == [None]
    active, unsteered = meter.activity(), plain.activity()
    assert active.carried == unsteered.carried  # the second step is given the same input and is not edited
    assert active.after > unsteered.after
    assert moved(ready, active, unsteered) >= 0
    assert moved(ready, unsteered, unsteered) == 0


def test_random_directions_are_the_same_for_their_number(steering, tiny_sae):
    ready = steering(Edit(sae=tiny_sae("double.1.img.neurons", 256), feature=3))
    (first,), (again,), (other,) = (random_directions(ready, number).values() for number in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (256,)
    assert float(first.norm()) == pytest.approx(1)


@pytest.mark.parametrize("site", ["double.1.img", "double.0.txt", "single.1", "single.2.img.update"])
def test_the_aligned_neuron_is_the_one_whose_output_points_there(tiny_flux, steering, tiny_sae, site):
    model = tiny_flux()
    ready = steering(Edit(sae=tiny_sae(site), feature=3))
    vec = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    ((number, direction),) = aligned_neurons(model, ready, vec).values()
    sae = ready.ready[0].edit.sae
    cosine = float(direction @ sae.W_dec[3] / sae.W_dec[3].norm())
    assert 0 < cosine <= 1
    assert 0 <= number < 256
    assert float(direction.norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("steps", "parts"),
    [(8, {"early": range(3), "middle": range(3, 5), "late": range(5, 8)}), (3, None), (2, None), (1, None)],
)
def test_windows_are_thirds_that_cover_the_schedule(steps, parts):
    found = windows(steps)
    assert [step for part in found.values() for step in part] == list(range(steps))
    assert parts is None or found == parts


def test_the_table_has_means_with_their_intervals():
    runs = [Run(f"random_{i}", 1.0, i, float(i), None, i, None) for i in range(3)] + [
        Run("edit", 1.0, 0, 5.0, 1.0, 2, None)
    ]
    random, edit = tabulate(runs)
    assert (random.row, random.pictures, random.activation.mean) == ("random", 3, 1.0)
    assert random.activation.high - random.activation.mean == pytest.approx(4.302653 * 1 / math.sqrt(3), rel=1e-6)
    assert random.carried is None
    assert edit.activation == (5.0, None, None)
    assert estimate([]) is None
    assert Run.from_json(runs[0].to_json()) == runs[0]
