"""Recording: when values arrive, and what it must not do: change outputs, leave hooks, keep a graph."""

import pytest
import torch
import torch.nn.functional as F

from flux_ir.errors import FluxIRError
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sites import Site, block_outputs
from tests.recording.listeners import TXT_TOKENS, Failing, every_site, hooks_on


def test_values_arrive_in_the_order_of_computation_once_each(tiny_flux, tiny_inputs):
    model, inputs, sink = tiny_flux(), tiny_inputs(), MemorySink()
    sites = block_outputs(2, 3)
    with Recorder(model, [*reversed(sites), sites[0]], sink):
        model(*inputs)
        model(*inputs)
    blocks = [(step, site.kind, site.block) for step, site in sink.values]
    assert blocks == sorted(blocks)
    assert len(blocks) == 2 * len(sites)


def test_the_context_is_what_the_step_began_with(tiny_flux, tiny_inputs):
    model, sink = tiny_flux(), MemorySink()
    first, second = tiny_inputs(seed=1), tiny_inputs(seed=2)
    with Recorder(model, [], sink):
        model(*first)
        model(**second._asdict())  # by keyword
    assert list(sink.contexts) == [0, 1]
    for context, inputs in zip(sink.contexts.values(), (first, second), strict=True):
        assert context.img is inputs.img
        assert context.y is inputs.y
        assert context.txt_tokens == TXT_TOKENS


def test_keyword_arguments_give_the_same_values(tiny_flux, tiny_inputs):
    model, inputs = tiny_flux(), tiny_inputs()
    by_position, by_keyword = MemorySink(), MemorySink()
    with Recorder(model, every_site(model), by_position):
        model(*inputs)
    with Recorder(model, every_site(model), by_keyword):
        model(**inputs._asdict())
    assert all(torch.equal(value, by_keyword.values[key]) for key, value in by_position.values.items())


def test_blocks_called_by_keyword_show_their_input_too(tiny_flux, tiny_inputs):
    model = tiny_flux()
    double, single = model.double_blocks[1], model.single_blocks[2]
    inputs, sink = tiny_inputs(), MemorySink()
    seen = {}

    def remember(module, args, output):
        seen[module] = args, output

    handles = [block.register_forward_hook(remember) for block in (double, single)]
    model(*inputs)
    for handle in handles:
        handle.remove()
    sites = [Site.parse(name) for name in ("double.1.img.update", "double.1.txt.update", "single.2.update")]

    class Wrapped(type(model)):
        def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
            double(**dict(zip(("img", "txt", "vec", "rotation"), seen[double][0], strict=True)))
            return single(**dict(zip(("x", "vec", "rotation"), seen[single][0], strict=True)))

    wrapped = Wrapped(model.params)
    wrapped.double_blocks[1], wrapped.single_blocks[2] = double, single
    with Recorder(wrapped, sites, sink):
        wrapped(*inputs)
    (img, txt, *_), (img_after, txt_after) = seen[double]
    (x, *_), x_after = seen[single]
    for site, expected in zip(sites, (img_after - img, txt_after - txt, x_after - x), strict=True):
        assert torch.equal(sink.values[0, site], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recording_changes_no_bit_of_the_output(tiny_flux, tiny_inputs, dtype):
    model, inputs = tiny_flux(dtype=dtype), tiny_inputs(dtype=dtype)
    plain = model(*inputs)
    with Recorder(model, every_site(model), MemorySink()):
        assert hooks_on(model) > 0
        recorded = model(*inputs)
    assert torch.equal(plain, recorded)
    assert torch.equal(plain, model(*inputs))


def test_only_the_asked_for_steps_are_recorded(tiny_flux, tiny_inputs):
    model, sink, site = tiny_flux(), MemorySink(), Site.parse("single.1")
    with Recorder(model, [site], sink, steps=[1, 3]):
        for seed in range(5):
            model(*tiny_inputs(seed=seed))
    assert list(sink.values) == [(1, site), (3, site)]
    assert list(sink.contexts) == [1, 3]
    assert torch.equal(sink.contexts[3].img, tiny_inputs(seed=3).img)


def test_steps_are_counted_anew_each_time(tiny_flux, tiny_inputs):
    model, sink = tiny_flux(), MemorySink()
    recorder = Recorder(model, [], sink)
    for _ in range(2):
        with recorder:
            model(*tiny_inputs())
    assert list(sink.contexts) == [0]
    model(*tiny_inputs())
    assert list(sink.contexts) == [0]


@pytest.mark.parametrize("at", [0, 3, 30])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_no_hook_remains_when_a_block_is_interrupted(tiny_flux, tiny_inputs, at, error):
    model, inputs = tiny_flux(), tiny_inputs()
    plain = model(*inputs)
    recorder = Recorder(model, every_site(model), Failing(at, error))
    with pytest.raises(type(error)), recorder:
        model(*inputs)
    assert hooks_on(model) == 0
    assert torch.equal(model(*inputs), plain)


def test_no_hook_remains_when_entering_fails_midway(tiny_flux):
    model = tiny_flux()
    sites = every_site(model)
    recorder = Recorder(model, sites, MemorySink())
    del model.single_blocks[2]
    with pytest.raises(AttributeError), recorder:
        pytest.fail("the body must not run")
    assert hooks_on(model) == 0


def test_a_recorder_listens_once_at_a_time(tiny_flux, tiny_inputs):
    model = tiny_flux()
    with Recorder(model, block_outputs(2, 3), MemorySink()) as recorder:
        hooks = hooks_on(model)
        with pytest.raises(RuntimeError), recorder:
            pytest.fail("the body must not run")
        assert hooks_on(model) == hooks
        model(*tiny_inputs())
    assert hooks_on(model) == 0


def test_hooks_set_earlier_are_kept_and_their_changes_recorded(tiny_flux, tiny_inputs):
    model, inputs, sink = tiny_flux(), tiny_inputs(), MemorySink()
    site = Site.parse("single.0")
    model.single_blocks[0].register_forward_hook(lambda module, args, output: output * 0 + 2)
    with Recorder(model, [site], sink):
        model(*inputs)
    assert sink.values[0, site].unique().tolist() == [2.0]
    assert hooks_on(model) == 1


def test_sites_the_model_lacks_are_refused_with_the_nearest(tiny_flux):
    model = tiny_flux()
    with pytest.raises(FluxIRError) as caught:
        Recorder(model, [Site.parse("single.0"), Site.parse("single.30.img")], MemorySink())
    assert "2 double and 3 single blocks" in caught.value.message
    assert "single.30.img" in caught.value.message
    assert "single.0.img" in (caught.value.hint or "")


def test_recording_keeps_no_graph(tiny_flux, tiny_inputs):
    model, sink = tiny_flux().requires_grad_(True), MemorySink()
    with Recorder(model, every_site(model), sink):
        velocity = model(*tiny_inputs())
    assert velocity.requires_grad
    assert not any(value.requires_grad for value in sink.values.values())
    F.mse_loss(velocity, torch.zeros_like(velocity)).backward()
    assert model.img_in.weight.grad is not None


# ---- What was promised is counted


def test_a_site_whose_module_is_not_called_is_missed_at_the_next_step_and_at_the_end(tiny_flux, tiny_inputs):
    def run(model, steps):
        for _ in range(steps):
            model(*tiny_inputs())

    model = tiny_flux()
    sites = [Site.parse(name) for name in ("single.0", "single.1", "single.2")]
    block = model.single_blocks[1]
    model.single_blocks[1] = _Uncalled(block)
    for steps in (1, 2):
        recorder = Recorder(model, sites, MemorySink())
        with (
            pytest.raises(FluxIRError, match=r"step 0 .* in part: 1 of 3 sites never came: single\.1") as caught,
            recorder,
        ):
            run(model, steps)
        assert "compiled" in (caught.value.hint or "")
    assert hooks_on(model) == 0


class _Uncalled(torch.nn.Module):
    """Stands for a block that something else computes: its hooks are never called."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def __call__(self, *args):
        return self.block(*args)


def test_a_recorder_whose_model_was_never_run_says_so(tiny_flux, tiny_inputs):
    model, other = tiny_flux(), tiny_flux()
    with (
        pytest.raises(FluxIRError, match="the recorder saw no forward of its model"),
        Recorder(model, "single.*", MemorySink()),
    ):
        other(*tiny_inputs())


def test_a_block_that_is_skipped_is_named(tiny_flux, tiny_inputs):
    """As caches do that reuse what a block added at the step before."""
    model = tiny_flux()
    model.single_blocks[1].forward = lambda x, vec, rotation: x
    with (
        pytest.raises(FluxIRError, match=r"step 0 was recorded in part: 1 of 2 sites never came: single\.1\.neurons"),
        Recorder(model, "single.0, single.1.neurons") as recorder,
    ):
        model(*tiny_inputs())
    assert len(recorder.sink.values) == 1


def test_compiled_models_and_blocks_are_refused(tiny_flux, tiny_inputs):
    model, compiled = tiny_flux(), tiny_flux()
    compiled.compile(backend="eager")
    with (
        pytest.raises(FluxIRError, match="needs a model that is not compiled: the model is"),
        Recorder(compiled, "single.1", MemorySink()),
    ):
        pytest.fail("the body must not run")
    model.single_blocks[1].compile(backend="eager")
    with (
        pytest.raises(FluxIRError, match=r"not compiled: single_blocks\.1 is"),
        Recorder(model, "single.1.neurons", MemorySink()),
    ):
        pytest.fail("the body must not run")
    sink = MemorySink()
    # another block may be compiled; it is not traced here, which is torch's work and depends on what else is imported
    with torch.compiler.set_stance("force_eager"), Recorder(model, "single.0", sink):
        model(*tiny_inputs())
    assert len(sink.values) == 1


def test_a_wrapped_forward_is_recorded_all_the_same(tiny_flux, tiny_inputs):
    """As accelerate wraps the forwards of instances."""
    model, plain, wrapped = tiny_flux(), MemorySink(), MemorySink()
    with Recorder(model, "*.img", plain):
        model(*tiny_inputs())
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with Recorder(model, "*.img", wrapped):
        model(*tiny_inputs())
    assert plain.values.keys() == wrapped.values.keys()
    assert all(torch.equal(value, wrapped.values[key]) for key, value in plain.values.items())


def test_what_was_not_recorded_is_refused_with_what_was(tiny_flux, tiny_inputs):
    model, sink = tiny_flux(), MemorySink()
    with Recorder(model, "double.0.img", sink):
        model(*tiny_inputs())
    assert repr(sink) == "<MemorySink: 1 sites, 1 steps>"
    with pytest.raises(FluxIRError, match=r"double\.0\.img was not recorded at step 3") as caught:
        sink.read("double.0.img", step=3)
    assert caught.value.hint == "its steps are 0"
    with pytest.raises(FluxIRError, match=r"double\.1\.img was not recorded at step 0") as caught:
        sink.read("double.1.img", step=0)
    assert caught.value.hint == "the nearest of the sites recorded are double.0.img"


def test_without_a_sink_a_recorder_keeps_what_it_records_in_one_of_its_own(tiny_flux, tiny_inputs):
    model, given = tiny_flux(), MemorySink()
    with Recorder(model, "double.0.img") as recorder, Recorder(model, "double.0.img", given) as other:
        model(*tiny_inputs())
    assert other.sink is given
    assert recorder.sink is not given
    assert torch.equal(recorder.sink.read("double.0.img", 0), given.read("double.0.img", 0))
    assert Recorder(model, "double.0.img").sink is not recorder.sink
