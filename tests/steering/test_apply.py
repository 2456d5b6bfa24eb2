"""Edits at work: what each does to a token, to the bit where it does nothing, in which order, and without a trace."""

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.steering.apply import steered
from flux_ir.steering.edits import NEUTRAL, Edit
from flux_ir.steering.regions import Region
from tests.recording.listeners import every_site, hooks_on
from tests.steering.conftest import GRID

SITE = "double.1.img"
ALL_KINDS = pytest.mark.parametrize("kind", list(NEUTRAL))
WITH_NEUTRAL = pytest.mark.parametrize("kind", [kind for kind, strength in NEUTRAL.items() if strength is not None])
INSIDE = [0, 1, 3, 4]  # the tokens of the rectangle 0, 0, 32, 32 in a picture of three columns


def width_of(site, params):
    return int(params.hidden_size * params.mlp_ratio) if site.part == "neurons" else params.hidden_size


def at_site(model, inputs, ready, site=SITE):
    """What the site puts out, steered, and the velocity."""
    sink = MemorySink()
    with steered(model, ready if isinstance(ready, list) else [ready]), Recorder(model, site, sink):
        velocity = model(*inputs)
    return sink.read(site, 0), velocity


# ---- Nothing changed, to the bit


@WITH_NEUTRAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_neutral_strength_changes_no_bit_at_any_site(
    tiny_flux, tiny_flux_params, tiny_inputs, tiny_sae, steering, kind, dtype
):
    model, inputs = tiny_flux(dtype=dtype), tiny_inputs(batch=2, dtype=dtype)
    plain = model(*inputs)
    for site in every_site(model):
        sae = tiny_sae(str(site), width_of(site, tiny_flux_params))
        ready = steering(Edit(kind=kind, sae=sae, feature=(3, 5), strength=NEUTRAL[kind]))
        with steered(model, [ready]):
            assert torch.equal(model(*inputs), plain), str(site)
    assert hooks_on(model) == 0


@ALL_KINDS
@pytest.mark.parametrize(
    "nowhere",
    [
        {"region": Region(tokens=())},
        {"steps": (3,)},
        {"schedule": (0.0,)},
        {"weights": (0.0,)},
    ],
)
def test_an_edit_that_reaches_nothing_changes_no_bit_at_any_site(
    tiny_flux, tiny_flux_params, tiny_inputs, tiny_sae, steering, kind, nowhere
):
    model, inputs = tiny_flux(), tiny_inputs()
    plain = model(*inputs)
    for site in every_site(model):
        sae = tiny_sae(str(site), width_of(site, tiny_flux_params))
        ready = steering(Edit(kind=kind, sae=sae, feature=3, strength=2.0, **nowhere))
        with steered(model, [ready]):
            assert torch.equal(model(*inputs), plain), str(site)


@ALL_KINDS
def test_tokens_whose_change_is_zero_keep_their_bits(tiny_flux, tiny_inputs, tiny_sae, steering, kind):
    model, inputs = tiny_flux(dtype=torch.bfloat16), tiny_inputs(dtype=torch.bfloat16)
    before, _ = at_site(model, inputs, steering())
    ready = steering(Edit(kind=kind, sae=tiny_sae(), feature=3, strength=2.0, region=Region(rectangle=(0, 0, 32, 32))))
    after, _ = at_site(model, inputs, ready)
    outside = [token for token in range(GRID.tokens) if token not in INSIDE]
    assert torch.equal(after[:, outside], before[:, outside])


def test_features_that_are_silent_are_not_scaled_to_life(tiny_flux, tiny_inputs, tiny_sae, steering):
    model, inputs, sae = tiny_flux(), tiny_inputs(), tiny_sae()
    before, _ = at_site(model, inputs, steering())
    silent = sae.encode(before)[0, :, 3] == 0
    assert 0 < silent.sum() < len(silent)
    after, _ = at_site(model, inputs, steering(Edit(kind="scale", sae=sae, feature=3, strength=5.0)))
    changed = (after != before).any(dim=2)[0]
    assert torch.equal(changed, ~silent)


# ---- What is changed


def expected(kind, z, strength, unit):
    """The code after the edit of features 3 and 5, written out."""
    new = z.clone()
    for feature, amount in zip((3, 5), strength, strict=True):
        mine = z[..., feature]
        match kind:
            case "add":
                new[..., feature] = mine + amount * unit[feature]
            case "scale":
                new[..., feature] = amount * mine
            case "clamp":
                new[..., feature] = mine.clamp(min=float(amount * unit[feature]))
            case "set":
                new[..., feature] = amount * unit[feature]
            case "ablate":
                new[..., feature] = 0
    if kind == "replace":
        new = torch.zeros_like(z)
        for feature, amount in zip((3, 5), strength, strict=True):
            new[..., feature] = amount * unit[feature]
    return new


@ALL_KINDS
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
@pytest.mark.parametrize("unit", ["max", "mean", "raw"])
def test_the_reconstruction_changes_and_the_error_stays_once(
    tiny_flux, tiny_inputs, tiny_sae, steering, kind, architecture, unit
):
    model, inputs, sae = tiny_flux(), tiny_inputs(), tiny_sae(architecture=architecture)
    before, _ = at_site(model, inputs, steering())
    strength = (2.0, 0.5)
    edit = Edit(kind=kind, sae=sae, feature=(3, 5), strength=strength, unit=unit)
    after, _ = at_site(model, inputs, steering(edit))
    z = sae.encode(before)
    units = {"max": sae.max_active, "mean": sae.mean_active, "raw": torch.ones(sae.config.d_sae)}[unit]
    new = expected(kind, z, strength, units)
    error = before - sae.decode(z)
    torch.testing.assert_close(after, sae.decode(new) + error, atol=2e-5, rtol=1e-5)
    assert not torch.equal(after, before)


def test_half_a_small_strength_makes_half_the_change(tiny_flux, tiny_inputs, tiny_sae, steering):
    model, inputs = tiny_flux(), tiny_inputs()
    plain = model(*inputs)
    changes = []
    for strength in (0.01, 0.005):
        _, velocity = at_site(model, inputs, steering(Edit(sae=tiny_sae(), feature=3, strength=strength)))
        changes.append((velocity - plain).norm())
    assert changes[1] / changes[0] == pytest.approx(0.5, rel=0.05)


def test_norm_is_the_mean_length_of_the_sites_tokens(tiny_flux, tiny_inputs, tiny_sae, steering):
    model, inputs, sae = tiny_flux(), tiny_inputs(batch=2), tiny_sae()
    before, _ = at_site(model, inputs, steering())
    after, _ = at_site(model, inputs, steering(Edit(sae=sae, feature=3, strength=0.5, unit="norm")))
    moved = (after - before).norm(dim=2)
    torch.testing.assert_close(moved, 0.5 * before.norm(dim=2).mean(dim=1, keepdim=True).expand_as(moved))


@pytest.mark.parametrize(("gate", "above"), [("all", None), ("active", 0.0), (0.4, 0.4)])
def test_the_gate_says_which_tokens(tiny_flux, tiny_inputs, tiny_sae, steering, gate, above):
    model, inputs, sae = tiny_flux(), tiny_inputs(), tiny_sae()
    before, _ = at_site(model, inputs, steering())
    after, _ = at_site(model, inputs, steering(Edit(sae=sae, feature=3, strength=1.0, gate=gate)))
    changed = (after != before).any(dim=2)[0]
    z = sae.encode(before)[0, :, 3] / sae.max_active[3]
    assert torch.equal(changed, torch.ones_like(changed) if above is None else z > above)


def test_steps_and_schedule_say_when(tiny_flux, tiny_inputs, tiny_sae, steering):
    model, inputs = tiny_flux(), tiny_inputs()
    plain, velocities = model(*inputs), []
    edit = Edit(sae=tiny_sae(), feature=3, steps=(1, 2), schedule=(1.0, 0.0, 2.0))
    with steered(model, [steering(edit, num_steps=3)]):
        velocities = [model(*inputs) for _ in range(3)]
    _, twice = at_site(model, inputs, steering(Edit(sae=tiny_sae(), feature=3, strength=2.0)))
    assert [torch.equal(velocity, plain) for velocity in velocities] == [True, True, False]
    assert torch.equal(velocities[2], twice)


def test_weights_share_the_change_among_sites(tiny_flux, tiny_inputs, tiny_sae, steering):
    model, inputs, sae = tiny_flux(), tiny_inputs(), tiny_sae()
    sites = ("double.0.img", "double.1.img")
    plain = {site: at_site(model, inputs, steering(), site)[0] for site in sites}
    edit = Edit(sae=sae, feature=3, sites=sites, weights=(0.25, 0.0))
    after, _ = at_site(model, inputs, steering(edit), "double.0.img")
    change = 0.25 * sae.max_active[3] * sae.W_dec[3]
    torch.testing.assert_close(after, plain["double.0.img"] + change)


@pytest.mark.parametrize("site", ["single.1", "single.1.img", "single.1.txt", "double.0.txt"])
def test_a_place_on_the_picture_leaves_the_text_alone(tiny_flux, tiny_inputs, tiny_sae, steering, site):
    model, inputs = tiny_flux(), tiny_inputs()
    before, _ = at_site(model, inputs, steering(), site)
    edit = Edit(sae=tiny_sae(site), feature=3, region=Region(rectangle=(0, 0, 32, 32)))
    if site.endswith("txt"):
        with pytest.raises(FluxIRError, match="no region of text tokens"):
            steering(edit)
        return
    after, _ = at_site(model, inputs, steering(edit), site)
    changed = torch.nonzero((after != before).any(dim=2)[0]).flatten().tolist()
    assert changed == [token + (7 if site == "single.1" else 0) for token in INSIDE]


def test_a_vector_is_a_feature_of_its_own(tiny_flux, tiny_inputs, steering):
    model, inputs = tiny_flux(), tiny_inputs()
    before, _ = at_site(model, inputs, steering())
    vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
    unit = vector / vector.norm()
    z = (before @ unit)[..., None]
    for kind, new in (
        ("add", z + 2),
        ("scale", 2 * z),
        ("ablate", 0 * z),
        ("set", 0 * z + 2),
        ("clamp", z.clamp(min=2)),
    ):
        edit = Edit(
            kind=kind,
            vector=7 * vector,
            sites=SITE,
            strength=2.0,
            unit="norm" if kind in ("scale", "ablate") else "raw",
        )
        if edit.unit == "raw":
            edit = Edit(kind=kind, vector=unit, sites=SITE, strength=2.0, unit="raw")
        after, _ = at_site(model, inputs, steering(edit))
        torch.testing.assert_close(after, before + (new - z) * unit, atol=1e-5, rtol=1e-5)


def test_a_vector_may_have_a_direction_for_each_step(tiny_flux, tiny_inputs, steering):
    model, inputs = tiny_flux(), tiny_inputs()
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    single = [at_site(model, inputs, steering(Edit(vector=row, sites=SITE)))[1] for row in rows]
    with steered(model, [steering(Edit(vector=rows, sites=SITE), num_steps=2)]):
        both = [model(*inputs) for _ in range(2)]
    assert all(map(torch.equal, both, single))


# ---- Several edits, several pictures, and no trace


@pytest.mark.parametrize(("first", "second"), [("add", "ablate"), ("ablate", "add")])
def test_edits_hold_in_the_order_they_are_stated(tiny_flux, tiny_inputs, tiny_sae, steering, first, second):
    model, inputs, sae = tiny_flux(), tiny_inputs(), tiny_sae(architecture="jumprelu")
    before, _ = at_site(model, inputs, steering())
    edits = [Edit(kind=kind, sae=sae, feature=3, strength=2.0) for kind in (first, second)]
    after, _ = at_site(model, inputs, steering(*edits))
    step_by_step = before
    for kind in (first, second):
        z = sae.encode(step_by_step)[..., 3:4]
        change = 2 * sae.max_active[3] if kind == "add" else -z
        step_by_step = step_by_step + change * sae.W_dec[3]
    torch.testing.assert_close(after, step_by_step, atol=2e-5, rtol=1e-5)


def test_every_picture_of_a_batch_has_its_own_strength(tiny_flux, tiny_inputs, tiny_sae, steering):
    model, inputs, sae = tiny_flux(), tiny_inputs(batch=3), tiny_sae()
    before, _ = at_site(model, inputs, steering())
    ready = steering(Edit(sae=sae, feature=3))
    after, _ = at_site(model, inputs, [ready.at(strength) for strength in (0.0, 1.0, 3.0)])
    change = torch.tensor([0.0, 1.0, 3.0])[:, None, None] * sae.max_active[3] * sae.W_dec[3]
    torch.testing.assert_close(after, before + change)
    assert torch.equal(after[0], before[0])
    with pytest.raises(ValueError, match="2 edits for 3 pictures"):
        at_site(model, inputs, [ready, ready])


@pytest.mark.parametrize(("strength", "side"), [(3.0, 1), (0.0, -1)])
def test_a_control_moves_every_token_as_far_in_another_direction(
    tiny_flux, tiny_inputs, tiny_sae, steering, strength, side
):
    model, inputs, sae = tiny_flux(), tiny_inputs(), tiny_sae()
    before, _ = at_site(model, inputs, steering())
    ready = steering(Edit(kind="scale", sae=sae, feature=(3, 5), strength=strength))
    (site,) = ready.sites
    direction = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(1)), dim=0)
    edited, _ = at_site(model, inputs, ready)
    control, _ = at_site(model, inputs, ready.along({site: direction}))
    length = (edited - before).norm(dim=2, keepdim=True)
    assert length.max() > 0
    torch.testing.assert_close(control, before + side * length * direction, atol=1e-5, rtol=1e-5)


def test_no_hook_is_left_whatever_raises(tiny_flux, tiny_inputs, tiny_sae, steering):
    model, inputs = tiny_flux(), tiny_inputs()
    edits = [Edit(sae=tiny_sae(site), feature=3) for site in ("double.1.img", "single.2", "double.0.txt.update")]
    for error in (KeyError("of a key"), FluxIRError("as a caller would")):
        with pytest.raises(type(error), match=r"of a key|as a caller would"):
            run_and_fail(model, inputs, steering(*edits), error)
        assert hooks_on(model) == 0


def run_and_fail(model, inputs, ready, error):
    with steered(model, [ready]):
        model(*inputs)
        assert hooks_on(model) > 0
        raise error
