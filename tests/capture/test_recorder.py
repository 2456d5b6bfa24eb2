"""Every site against a forward written out by hand, and what recording must not do: change outputs, leave hooks."""

from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F

from flux_ir.capture.recorder import MemorySink, Recorder, RecordingComplete, until_recorded
from flux_ir.errors import FluxIRError
from flux_ir.models.registry import get_spec, model_names
from flux_ir.models.transformer import Flux
from flux_ir.sampling.denoise import denoise
from flux_ir.sites import Site, all_sites, block_outputs

TXT_TOKENS, IMG_TOKENS = 7, 12


def forward_by_hand(model, inputs):
    """Every site of the network from its weights alone: {site: value}, in float64."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    params = model.params
    heads, width = params.num_heads, params.hidden_size
    inputs = type(inputs)(*(None if value is None else value.double() for value in inputs))

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def silu(x):
        return x / (1 + torch.exp(-x))

    def embed(t):
        frequencies = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(128) / 128).float().double()
        angles = 1000 * t[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)

    def embedder(name, x):
        return linear(f"{name}.out_layer", silu(linear(f"{name}.in_layer", x)))

    def split_heads(x):  # b n (heads d) -> b heads n d
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    def rms(x, scale):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[scale]

    positions = torch.cat([inputs.txt_ids, inputs.img_ids], 1)
    angles = torch.cat(
        [
            positions[..., axis, None] * params.theta ** (-torch.arange(0, dim, 2).double() / dim)
            for axis, dim in enumerate(params.axes_dim)
        ],
        -1,
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rope(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    def attend(q, k, v):
        logits = rope(q) @ rope(k).transpose(-1, -2) / (width // heads) ** 0.5
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    vec = embedder("time_in", embed(inputs.timesteps)) + embedder("vector_in", inputs.y)
    if params.guidance_embed:
        vec = vec + embedder("guidance_in", embed(inputs.guidance))
    x = {"img": linear("img_in", inputs.img), "txt": linear("txt_in", inputs.txt)}
    sites = {}

    for i in range(params.depth):
        block = f"double_blocks.{i}"
        mods, qkv = {}, {}
        for s in ("img", "txt"):
            mods[s] = linear(f"{block}.{s}_mod.lin", silu(vec))[:, None].chunk(6, -1)
            shift, scale = mods[s][:2]
            q, k, v = map(split_heads, linear(f"{block}.{s}_attn.qkv", norm(x[s]) * (1 + scale) + shift).chunk(3, -1))
            q = rms(q, f"{block}.{s}_attn.norm.query_norm.scale")
            k = rms(k, f"{block}.{s}_attn.norm.key_norm.scale")
            qkv[s] = q, k, v
        joint = attend(*(torch.cat([of_txt, of_img], 2) for of_img, of_txt in zip(*qkv.values(), strict=True)))
        attended = {"txt": joint[:, :TXT_TOKENS], "img": joint[:, TXT_TOKENS:]}
        for s in ("img", "txt"):
            _, _, gate_1, shift, scale, gate_2 = mods[s]
            name = f"double.{i}.{s}"
            sites[f"{name}.attn"] = linear(f"{block}.{s}_attn.proj", attended[s])
            middle = x[s] + gate_1 * sites[f"{name}.attn"]
            sites[f"{name}.neurons"] = gelu(linear(f"{block}.{s}_mlp.0", norm(middle) * (1 + scale) + shift))
            sites[f"{name}.mlp"] = linear(f"{block}.{s}_mlp.2", sites[f"{name}.neurons"])
            sites[f"{name}.update"] = gate_1 * sites[f"{name}.attn"] + gate_2 * sites[f"{name}.mlp"]
            x[s] = sites[name] = x[s] + sites[f"{name}.update"]

    joined = torch.cat([x["txt"], x["img"]], 1)
    for i in range(params.depth_single_blocks):
        block, name = f"single_blocks.{i}", f"single.{i}"
        shift, scale, gate = linear(f"{block}.modulation.lin", silu(vec))[:, None].chunk(3, -1)
        hidden = linear(f"{block}.linear1", norm(joined) * (1 + scale) + shift)
        q, k, v = map(split_heads, hidden[..., : 3 * width].chunk(3, -1))
        q, k = rms(q, f"{block}.norm.query_norm.scale"), rms(k, f"{block}.norm.key_norm.scale")
        whole = {".neurons": gelu(hidden[..., 3 * width :])}
        whole[".out"] = linear(f"{block}.linear2", torch.cat([attend(q, k, v), whole[".neurons"]], -1))
        whole[".update"] = gate * whole[".out"]
        joined = whole[""] = joined + whole[".update"]
        for part, value in whole.items():
            sites[f"{name}{part}"] = value
            sites[f"{name}.txt{part}"] = value[:, :TXT_TOKENS]
            sites[f"{name}.img{part}"] = value[:, TXT_TOKENS:]
    return {Site.parse(name): value for name, value in sites.items()}


def every_site(model):
    return all_sites(model.params.depth, model.params.depth_single_blocks)


def hooks_on(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    with_kwargs = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds + with_kwargs)


@pytest.mark.parametrize("guidance", [None, 3.5])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_site_is_what_the_equations_say(tiny_flux, tiny_inputs, batch, guidance):
    model, inputs = tiny_flux(guidance=guidance is not None), tiny_inputs(batch=batch, guidance=guidance)
    sink = MemorySink()
    with Recorder(model, every_site(model), sink):
        model(*inputs)
    expected = forward_by_hand(model, inputs)
    assert {site for _, site in sink.values} == set(expected) == set(every_site(model))
    for (_, site), value in sink.values.items():
        assert value.shape == expected[site].shape, str(site)
        torch.testing.assert_close(value.double(), expected[site], atol=1e-4, rtol=1e-4, msg=str(site))
    # no two sites of the same shape are so alike that a mix-up could pass
    flat = [value.double().flatten() for value in expected.values() if value.shape == (batch, IMG_TOKENS, 64)]
    assert min((a - b).abs().max() for i, a in enumerate(flat) for b in flat[:i]) > 1e-2


@pytest.mark.parametrize("name", model_names())
def test_every_site_has_its_module_in_every_model_of_the_registry(name):
    """On the meta device: the published networks without their weights."""
    params = get_spec(name).flux
    with torch.device("meta"):
        model = Flux(params)
    sites = every_site(model)
    assert len(sites) == 10 * params.depth + 12 * params.depth_single_blocks
    with Recorder(model, sites, MemorySink()):
        assert hooks_on(model) > len(sites)
    assert hooks_on(model) == 0


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


class Failing(MemorySink):
    """Fails at the n-th site."""

    def __init__(self, at, error):
        super().__init__()
        self.left, self.error = at, error

    def write(self, step, site, value):
        self.left -= 1
        if self.left < 0:
            raise self.error
        super().write(step, site, value)


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


def test_a_recorder_listens_once_at_a_time(tiny_flux):
    model = tiny_flux()
    with Recorder(model, block_outputs(2, 3), MemorySink()) as recorder:
        hooks = hooks_on(model)
        with pytest.raises(RuntimeError), recorder:
            pytest.fail("the body must not run")
        assert hooks_on(model) == hooks
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


# ---- Stopping early


def steps_of(model, inputs, timesteps=(1.0, 0.6, 0.3, 0.0)):
    img, img_ids, txt, txt_ids, _, y, _ = inputs
    return denoise(model, img, img_ids, txt, txt_ids, y, list(timesteps), guidance=1.0)


def called(model):
    """The blocks that are called from now on, by name, in a list that grows."""
    names = []
    for name, module in model.named_modules():
        if name.count(".") == 1 or name == "final_layer":
            module.register_forward_pre_hook(lambda module, args, name=name: names.append(name))
    return names


@pytest.mark.parametrize(
    ("site", "deepest"),
    [
        *[(f"double.0.{stream}{part}", 1) for stream in ("img", "txt") for part in ("", ".attn", ".mlp", ".update")],
        ("double.1.txt.neurons", 2),
        ("single.0.neurons", 3),
        ("single.0.img", 3),
        ("single.1.out", 4),
        ("single.2.update", 5),
    ],
)
def test_nothing_behind_the_deepest_site_is_called(tiny_flux, tiny_inputs, site, deepest):
    model, sink = tiny_flux(), MemorySink()
    blocks = [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]
    names = called(model)
    with Recorder(model, [Site.parse(site)], sink, steps=[0], stop_early=True), pytest.raises(RecordingComplete):
        model(*tiny_inputs())
    assert [name for name in names if name in {*blocks, "final_layer"}] == blocks[:deepest]
    assert list(sink.values) == [(0, Site.parse(site))]


@pytest.mark.parametrize("patterns", [["double.0.*"], ["double.*"], ["double.1.txt.*", "single.1*"], ["*"]])
def test_stopping_early_changes_no_bit_of_what_is_recorded(tiny_flux, tiny_inputs, patterns):
    model, inputs = tiny_flux(), tiny_inputs()
    sites = [site for site in every_site(model) if any(fnmatchcase(str(site), pattern) for pattern in patterns)]
    whole, stopped = MemorySink(), MemorySink()
    with Recorder(model, sites, whole, steps=[0, 2]):
        assert len(list(steps_of(model, inputs))) == 3
    with Recorder(model, sites, stopped, steps=[0, 2], stop_early=True):
        steps = list(until_recorded(steps_of(model, inputs)))
    assert [step.number for step in steps] == [0, 1]  # the last has no velocity
    assert hooks_on(model) == 0
    assert list(stopped.values) == list(whole.values)
    assert all(torch.equal(value, whole.values[key]) for key, value in stopped.values.items())
    assert all(torch.equal(context.img, whole.contexts[step].img) for step, context in stopped.contexts.items())


def test_steps_behind_the_last_recorded_one_are_not_begun(tiny_flux, tiny_inputs):
    model, names = tiny_flux(), []
    model.register_forward_pre_hook(lambda module, args: names.append("forward"))
    with Recorder(model, [Site.parse("double.0.img")], MemorySink(), steps=[1], stop_early=True):
        assert len(list(until_recorded(steps_of(model, tiny_inputs())))) == 1
    assert len(names) == 2
    assert torch.is_grad_enabled()


def test_without_sites_the_last_step_ends_before_it_begins(tiny_flux, tiny_inputs):
    model, sink = tiny_flux(), MemorySink()
    names = called(model)
    with Recorder(model, [], sink, steps=[0], stop_early=True):
        assert list(until_recorded(steps_of(model, tiny_inputs()))) == []
    assert list(sink.contexts) == [0]
    assert names == []


def test_other_errors_pass_until_recorded(tiny_flux, tiny_inputs):
    model, site = tiny_flux(), Site.parse("double.0.img")
    recorder = Recorder(model, [site], Failing(0, RuntimeError("stop")), steps=[0], stop_early=True)
    with pytest.raises(RuntimeError, match="stop"), recorder:
        list(until_recorded(steps_of(model, tiny_inputs())))


@pytest.mark.parametrize("steps", [None, []])
def test_stopping_early_needs_to_know_where(tiny_flux, steps):
    with pytest.raises(ValueError, match="stop_early needs the steps"):
        Recorder(tiny_flux(), block_outputs(2, 3), MemorySink(), steps=steps, stop_early=True)
