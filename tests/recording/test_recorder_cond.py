"""A reference picture's tokens: behind those of the image in every block, and in no site that does not name them."""

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.recording.intervention import Intervention
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.reader import load_capture
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.recording.writer import CaptureWriter
from flux_ir.sites import Site, all_sites, block_outputs, match_sites, sites_of
from tests.recording.listeners import IMG_TOKENS, TXT_TOKENS, hooks_on
from tests.recording.test_recorder_sites import forward_by_hand

COND_TOKENS = 5
EVERY = all_sites(2, 3, cond=True)


@pytest.fixture
def forward(tiny_inputs):
    """Arguments of a forward with a reference picture, and the same with its tokens among those of the image."""

    def make(*, batch=1, dtype=torch.float32, seed=0, guidance=None):
        inputs = tiny_inputs(batch=batch, dtype=dtype, seed=seed, guidance=guidance)
        cond = torch.randn(batch, COND_TOKENS, 64, generator=torch.Generator().manual_seed(9)).to(dtype)
        ids = torch.zeros(batch, COND_TOKENS, 3)
        ids[..., 0], ids[..., 2] = 1, torch.arange(COND_TOKENS)
        joined = inputs._replace(img=torch.cat([inputs.img, cond], 1), img_ids=torch.cat([inputs.img_ids, ids], 1))
        return (*inputs, cond, ids), joined

    return make


@pytest.mark.parametrize("batch", [1, 3])
def test_every_site_is_what_the_equations_say(tiny_flux, forward, batch):
    model = tiny_flux(guidance=True)
    given, joined = forward(batch=batch, guidance=3.5)
    sink = MemorySink()
    with Recorder(model, EVERY, sink):
        velocity = model(*given)
    assert velocity.shape == (batch, IMG_TOKENS, 64)
    assert sink.contexts[0].img.shape[1] == IMG_TOKENS
    assert sink.contexts[0].cond_tokens == COND_TOKENS
    by_hand = forward_by_hand(model, joined)  # its image half: image, then reference
    for (_, site), value in sink.values.items():
        if site.stream == "cond":
            expected = by_hand[Site(site.kind, site.block, "img", site.part)][:, IMG_TOKENS:]
        elif site.stream == "txt":
            expected = by_hand[site]
        else:
            expected = by_hand[site][:, : IMG_TOKENS + (TXT_TOKENS if site.stream is None else 0)]
        assert value.shape == expected.shape, str(site)
        torch.testing.assert_close(value.double(), expected, atol=1e-4, rtol=1e-4, msg=str(site))
    assert {site for _, site in sink.values} == set(EVERY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_giving_back_what_came_changes_no_bit_at_any_site(tiny_flux, forward, dtype):
    model = tiny_flux(dtype=dtype)
    given, _ = forward(batch=2, dtype=dtype)
    plain = model(*given)
    for site in EVERY:
        with Intervention(model, {site: lambda value, step: value.clone()}):
            assert torch.equal(model(*given), plain), str(site)
    assert hooks_on(model) == 0


def test_an_edit_reaches_the_tokens_of_its_site_and_no_others(tiny_flux, forward):
    model = tiny_flux()
    given, _ = forward(batch=2)
    for changed in [site for site in EVERY if site.part is None]:
        before, after = MemorySink(), MemorySink()
        streams = ("img", "txt", "cond")
        same_block = [Site(changed.kind, changed.block, stream) for stream in streams]
        with Recorder(model, same_block, before):
            model(*given)
        with Intervention(model, {changed: lambda value, step: 2 * value}), Recorder(model, same_block, after):
            model(*given)
        for site in same_block:
            reached = site == changed or (changed.stream is None and site.stream != "cond")
            factor = 2 if reached else 1
            assert torch.equal(after.read(site, 0), factor * before.read(site, 0)), (str(changed), str(site))


def test_a_reference_reaches_the_picture_and_is_not_the_same_as_none(tiny_flux, forward):
    model = tiny_flux()
    given, joined = forward()
    assert not torch.equal(model(*given), model(*given[:-2]))
    torch.testing.assert_close(model(*given), model(*joined)[:, :IMG_TOKENS], atol=1e-6, rtol=0)
    with pytest.raises(FluxIRError, match="need their positions"):
        model(*given[:-1])


def test_a_streamed_network_has_the_same_bits(tiny_flux, forward):
    resident = tiny_flux()
    weights = resident.state_dict()
    streamed = StreamedFlux(resident.params, lambda tensor, name: tensor.copy_(weights[name]), "cpu", torch.float32)
    given, _ = forward()
    sink = MemorySink()
    with torch.no_grad(), Recorder(streamed, "double.1.cond", sink):
        assert torch.equal(streamed(*given), resident(*given))
    assert sink.read("double.1.cond", 0).shape == (1, COND_TOKENS, 64)


def test_sites_of_a_reference_need_one(tiny_flux, tiny_inputs, tiny_flux_params):
    model = tiny_flux()
    with (
        pytest.raises(
            FluxIRError, match=r"double\.0\.cond is of a reference picture, and the model is run without one"
        ),
        Recorder(model, "double.0.cond"),
    ):
        model(*tiny_inputs())
    with pytest.raises(FluxIRError, match=r"single\.2\.cond is of a reference picture, and this run has none"):
        CapturePlan(
            tiny_flux_params,
            [Site("single", 2, "cond")],
            (1.0, 0.0),
            txt_tokens=7,
            img_tokens=12,
            guidance=1.0,
            metadata={},
        )


def test_patterns_match_a_reference_only_by_name():
    assert all(site.stream != "cond" for site in match_sites(["*", "double.*", "single.?"], EVERY))
    assert list(map(str, match_sites(["double.*.cond"], EVERY))) == ["double.0.cond", "double.1.cond"]
    assert len(match_sites(["*.cond*"], EVERY)) == 2 * 7 + 3 * 7
    assert sites_of("single.1*.cond", 2, 3) == [Site("single", 1, "cond")]
    assert Site.parse("single.1.cond.update").whole == Site.parse("single.1.cond.update")
    with pytest.raises(
        FluxIRError, match="names tokens of a reference picture, which this model takes none of"
    ) as error:
        match_sites(["*.cond"], all_sites(2, 3))
    assert "flux-dev-kontext" in error.value.hint


def test_the_file_has_the_token_map_and_each_stream_under_its_name(tmp_path, tiny_flux, forward):
    model = tiny_flux()
    sites = sorted([*block_outputs(2, 3), *match_sites(["double.1.cond", "single.2.cond"], EVERY)])
    plan = CapturePlan(
        model.params,
        sites,
        (1.0, 0.5, 0.0),
        txt_tokens=TXT_TOKENS,
        img_tokens=IMG_TOKENS,
        guidance=1.0,
        metadata={"model": "tiny"},
        dtype=torch.float32,
        cond_tokens=COND_TOKENS,
    )
    memory, path = MemorySink(), tmp_path / "capture.pt"
    with CaptureWriter(path, plan) as writer, Recorder(model, sites, writer), Recorder(model, sites, memory):
        for seed in range(2):
            model(*forward(seed=seed)[0])
    capture = load_capture(path)
    assert capture.metadata["tokens"] == {"txt": TXT_TOKENS, "img": IMG_TOKENS, "cond": COND_TOKENS}
    assert capture.sites == sites
    for (step, site), value in memory.values.items():
        assert torch.equal(capture.read(site, step), value), str(site)
        assert capture.shape(site) == tuple(value.shape)
    assert capture.read("single.1.img", 1).shape[1] == IMG_TOKENS
    assert capture.context(1).img.shape[1] == IMG_TOKENS
    contents = torch.load(path, mmap=True, weights_only=True)
    assert [len(pair) for pair in contents["double_blocks"]["block_1"]] == [2, 2]
    assert list(contents["sites"]) == ["double.1.cond", "single.2.cond"]
    with pytest.raises(FluxIRError, match=r"single\.1\.cond was not captured"):
        capture.read("single.1.cond", 0)


def test_a_reference_that_was_not_planned_is_an_error(tmp_path, tiny_flux, forward):
    model = tiny_flux()
    plan = CapturePlan(
        model.params,
        [Site("single", 0)],
        (1.0, 0.0),
        txt_tokens=TXT_TOKENS,
        img_tokens=IMG_TOKENS,
        guidance=1.0,
        metadata={},
        dtype=torch.float32,
    )
    with (
        pytest.raises(FluxIRError, match="must have 0 tokens of a reference picture, as planned: got 5"),
        CaptureWriter(tmp_path / "capture.pt", plan) as writer,
        Recorder(model, plan.sites, writer),
    ):
        model(*forward()[0])


def test_steps_are_counted_from_the_first_one_that_is_run(tiny_flux, tiny_inputs):
    model, sink, seen = tiny_flux(), MemorySink(), []
    with (
        Recorder(model, "single.0", sink, steps=[3], first_step=2),
        Intervention(model, {"single.0": lambda value, step: seen.append(step) or value}, first_step=2),
    ):
        for _ in range(2):
            model(*tiny_inputs())
    assert list(sink.contexts) == [3]
    assert seen == [2, 3]
    with pytest.raises(FluxIRError, match="saw no forward"), Recorder(model, "single.0", first_step=2):
        pass
