"""Writing at sites: every one of them, in any company, and without a trace."""

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.recording.intervention import Intervention, check_edit
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sites import Site
from tests.recording.listeners import IMG_TOKENS, TXT_TOKENS, every_site, hooks_on

DEAD_ENDS = {"double.1.txt", "single.2.txt"}  # what text is put out of the last block reaches nothing


def double(value, step):
    return 2 * value


def double_in_place(value, step):
    return value.mul_(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_giving_back_what_came_changes_no_bit_at_any_site(tiny_flux, tiny_inputs, dtype, batch):
    model, inputs = tiny_flux(dtype=dtype), tiny_inputs(batch=batch, dtype=dtype)
    plain = model(*inputs)
    shapes = {}
    for site in every_site(model):
        with Intervention(model, {site: lambda value, step: shapes.setdefault(len(shapes), value.shape) and value}):
            assert torch.equal(model(*inputs), plain), str(site)
    everywhere = {site: lambda value, step: value.clone() for site in every_site(model)}
    with Intervention(model, everywhere):
        assert torch.equal(model(*inputs), plain)
    tokens = {"img": IMG_TOKENS, "txt": TXT_TOKENS, None: IMG_TOKENS + TXT_TOKENS}
    assert [shape[:2] for shape in shapes.values()] == [(batch, tokens[site.stream]) for site in every_site(model)]
    assert hooks_on(model) == 0


@pytest.mark.parametrize("edit", [double, double_in_place])
@pytest.mark.parametrize("recorder_first", [True, False])
def test_a_recorder_sees_the_edited_value_in_whichever_order_they_are_entered(
    tiny_flux, tiny_inputs, edit, recorder_first
):
    model, inputs = tiny_flux(), tiny_inputs(batch=2)
    plain = model(*inputs)
    for site in every_site(model):
        before, after = MemorySink(), MemorySink()
        with Recorder(model, site, before):
            model(*inputs)
        intervention, recorder = Intervention(model, {site: edit}), Recorder(model, site, after)
        first, second = (recorder, intervention) if recorder_first else (intervention, recorder)
        with first, second:
            changed = model(*inputs)
        torch.testing.assert_close(after.read(site, 0), 2 * before.read(site, 0), atol=1e-5, rtol=1e-5)
        is_dead_end = str(site.whole if site.part else site) in DEAD_ENDS or (site.block, site.stream) == (2, "txt")
        is_dead_end = is_dead_end and site.part != "k"  # the image looks at the keys of the last block's text
        assert torch.equal(changed, plain) == (is_dead_end and site.kind == "single"), str(site)


def test_only_the_named_half_is_edited(tiny_flux, tiny_inputs):
    model, inputs, plain, edited = tiny_flux(), tiny_inputs(), MemorySink(), MemorySink()
    sites = ["single.1", "single.1.out", "single.1.neurons", "single.1.update", "single.1.q", "single.1.attn"]
    for site in sites:
        half = Site.parse(site.replace("single.1", "single.1.img"))
        with Recorder(model, site, plain):
            model(*inputs)
        with Intervention(model, {half: double}), Recorder(model, site, edited):
            model(*inputs)
        torch.testing.assert_close(edited.read(site, 0)[:, TXT_TOKENS:], 2 * plain.read(site, 0)[:, TXT_TOKENS:])
        assert torch.equal(edited.read(site, 0)[:, :TXT_TOKENS], plain.read(site, 0)[:, :TXT_TOKENS])


def test_an_edited_update_is_what_the_block_adds(tiny_flux, tiny_inputs):
    model, inputs, sink = tiny_flux(), tiny_inputs(), MemorySink()
    with (
        Recorder(model, ["double.0.img", "double.1.img"], sink),
        Intervention(model, {"double.1.img.update": lambda value, step: torch.zeros_like(value)}),
    ):
        model(*inputs)
    assert torch.equal(sink.read("double.1.img", 0), sink.read("double.0.img", 0))


def test_the_update_is_edited_before_the_output_it_is_part_of(tiny_flux, tiny_inputs):
    model, inputs, sink = tiny_flux(), tiny_inputs(), MemorySink()
    edits = {
        "single.0": lambda value, step: value + 1,
        "single.0.update": lambda value, step: torch.zeros_like(value),
    }
    with Intervention(model, edits), Recorder(model, ["double.1.img", "single.0.img"], sink):
        model(*inputs)
    torch.testing.assert_close(sink.read("single.0.img", 0), sink.read("double.1.img", 0) + 1)


def test_interventions_compose_in_the_order_they_are_entered_in(tiny_flux, tiny_inputs):
    model, inputs, plain, sink = tiny_flux(), tiny_inputs(), MemorySink(), MemorySink()
    site = "single.1.img"
    with Recorder(model, site, plain):
        model(*inputs)
    with (
        Recorder(model, site, sink),
        Intervention(model, {site: lambda value, step: value + 1}),
        Intervention(model, {site: double}),
    ):
        model(*inputs)
    torch.testing.assert_close(sink.read(site, 0), 2 * (plain.read(site, 0) + 1))


def test_keys_may_be_patterns_and_a_site_named_twice_is_edited_twice(tiny_flux, tiny_inputs):
    model, inputs, plain, sink = tiny_flux(), tiny_inputs(), MemorySink(), MemorySink()
    with Recorder(model, "double.0.*", plain):
        model(*inputs)
    edits = {"double.0.*.mlp": double, Site.parse("double.0.img.mlp"): lambda value, step: value + 1}
    with Intervention(model, edits), Recorder(model, "double.0.*.mlp", sink):
        model(*inputs)
    torch.testing.assert_close(sink.read("double.0.img.mlp", 0), 2 * plain.read("double.0.img.mlp", 0) + 1)
    torch.testing.assert_close(sink.read("double.0.txt.mlp", 0), 2 * plain.read("double.0.txt.mlp", 0))


def test_steps_are_counted_from_zero_and_the_others_pass_untouched(tiny_flux, tiny_inputs):
    model, inputs, seen = tiny_flux(), tiny_inputs(), []
    plain = model(*inputs)
    intervention = Intervention(model, {"double.0.img": lambda value, step: seen.append(step) or 2 * value}, steps=[1])
    for _ in range(2):  # counted anew each time it is entered
        with intervention:
            assert [torch.equal(model(*inputs), plain) for _ in range(3)] == [True, False, True]
    assert seen == [1, 1]


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_no_hook_stays_when_an_edit_fails(tiny_flux, tiny_inputs, error):
    model = tiny_flux()

    def fails(value, step):
        raise error

    with pytest.raises(type(error)), Intervention(model, {"single.*": fails}):
        model(*tiny_inputs())
    assert hooks_on(model) == 0


def test_no_hook_stays_when_entering_fails_midway_and_it_is_entered_once_at_a_time(tiny_flux, tiny_inputs):
    model = tiny_flux()
    intervention = Intervention(model, {"single.*": double})
    with intervention:
        with pytest.raises(RuntimeError, match="already entered"), intervention:
            pytest.fail("the body must not run")
        model(*tiny_inputs())
    del model.single_blocks[2]
    with pytest.raises(AttributeError), intervention:
        pytest.fail("the body must not run")
    assert hooks_on(model) == 0


@pytest.mark.parametrize("site", ["double.0.img", "single.1", "single.1.img.update", "single.1.txt.out"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda value, step: None, "must be a tensor: got NoneType"),
        (lambda value, step: value[:, 1:], r"must have the shape \[1, \d+, 64\]: got \[1, \d+, 64\]"),
        (lambda value, step: value.double(), "must have the dtype torch.float32: got torch.float64"),
        (lambda value, step: value.to("meta"), "must have the device cpu: got meta"),
    ],
)
def test_what_cannot_stand_in_place_of_a_value_is_refused(tiny_flux, tiny_inputs, site, wrong, says):
    model = tiny_flux()
    with pytest.raises(FluxIRError, match=f"what stands in place of {site} {says}"), Intervention(model, {site: wrong}):
        model(*tiny_inputs())
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("single.7.img", "no site of this model matches 'single.7.img'"),
        (Site.parse("double.9.img"), "2 double and 3 single blocks, and no site double.9.img"),
        ("single.*.mlp", "no site of this model matches"),
    ],
)
def test_sites_that_are_not_there_are_refused_with_the_nearest(tiny_flux, name, says):
    with pytest.raises(FluxIRError, match=says) as caught:
        Intervention(tiny_flux(), {name: double})
    assert caught.value.hint.startswith("the nearest are ")


def test_gradients_pass_through_an_edit(tiny_flux, tiny_inputs):
    model = tiny_flux()
    direction = torch.zeros(64, requires_grad=True)
    with Intervention(model, {"single.0.img": lambda value, step: value + direction}):
        model(*tiny_inputs()).square().sum().backward()
    assert direction.grad.abs().sum() > 0


def test_an_intervention_that_never_came_to_its_site_says_so(tiny_flux, tiny_inputs):
    model, other = tiny_flux(), tiny_flux()
    with (
        pytest.raises(FluxIRError, match="the intervention saw no forward of its model"),
        Intervention(model, {"single.*": double}),
    ):
        other(*tiny_inputs())
    model.single_blocks[1].compile(backend="eager")
    with (
        pytest.raises(FluxIRError, match=r"needs a model that is not compiled: single_blocks\.1 is"),
        Intervention(model, {"single.1": double}),
    ):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("edit", [0, None, torch.zeros(1), lambda value: value, lambda value, step, more: value])
def test_what_does_not_take_a_value_and_a_step_is_refused(edit):
    with pytest.raises(FluxIRError, match=r"place of single\.1\.img must be a function of a value and a step: got"):
        check_edit(Site.parse("single.1.img"), edit)


def test_an_edit_is_checked_before_anything_runs(tiny_flux):
    with pytest.raises(FluxIRError, match="must be a function of a value and a step"):
        Intervention(tiny_flux(), {"single.1.img": lambda value: value})
