"""One block edited at a time: what each kind of edit is, that a neutral one changes no bit, and what controls are."""

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.flux1.attention import rotary_table, rotate
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.intervention import Intervention
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.steering.regions import Grid
from flux_ir.studies.atlas import PATCHES, Ablation, Batch, Bench, ablations_of, changes_of, sites_of
from flux_ir.studies.atlas_table import row_of, wilson
from tests.recording.listeners import hooks_on

BLOCKS = ("double.1", "single.0")
GRID = Grid(48, 32)
TIMES = [1.0, 0.7, 0.3, 0.0]


def text(params, seed):
    draw = torch.Generator().manual_seed(seed)
    txt, y = (torch.randn(2, *shape, generator=draw) for shape in ((7, params.context_in_dim), (params.vec_in_dim,)))
    return TextEmbedding(txt, y)


@pytest.fixture
def model(tiny_flux):
    return tiny_flux()


@pytest.fixture
def bench(tiny_autoencoder):
    return Bench(tiny_autoencoder(), GRID, TIMES, 1.0, torch.float32, shift=0)


@pytest.fixture
def batch(model):
    return Batch((3, 4), text(model.params, 1), text(model.params, 2))


def same(run, other):
    return torch.equal(run.latents, other.latents) and torch.equal(run.pictures, other.pictures)


def test_an_edit_that_changes_nothing_gives_the_bytes_of_no_edit(model, bench, batch):
    plain = bench.unedited(model, batch)
    itself = batch._replace(other_text=batch.text)
    for block in BLOCKS:
        kinds = ("rotary", *PATCHES)  # a shift of 0; what its own run computed
        again, own = bench.other(model, itself, [site for kind in kinds for site in sites_of(kind, block)])
        assert same(again, plain)
        for kind in kinds:
            for ablation in (Ablation(kind), Ablation(kind, "late"), Ablation(kind, control=True)):
                assert same(bench.edited(model, batch, plain, block, ablation, own), plain), (block, ablation)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_a_skipped_block_is_a_network_without_it(model, bench, batch, block):
    plain = bench.unedited(model, batch)
    skipped = bench.edited(model, batch, plain, block, Ablation("skip"))
    kind, number = block.split(".")
    without = model.twin()
    del getattr(without, f"{kind}_blocks")[int(number)]
    assert same(skipped, bench.unedited(without, batch))
    assert not same(skipped, plain)


def test_the_steps_before_a_window_are_those_of_the_unedited_run(model, bench, batch):
    plain = bench.unedited(model, batch)
    late = bench.edited(model, batch, plain, "single.1", Ablation("skip", "late"))
    steps = bench.windows["late"]
    with Intervention(model, changes_of("skip", "single.1", model.params, 0, None), steps=steps):
        whole = bench.unedited(model, batch)
    assert same(whole, late)
    assert all(torch.equal(a, b) for a, b in zip(whole.states[: steps.start + 1], plain.states, strict=False))


def test_the_last_block_leaves_its_text_to_nobody(model, bench, batch):
    plain = bench.unedited(model, batch)
    assert same(bench.edited(model, batch, plain, "single.2", Ablation("txt_update")), plain)
    of_image = bench.edited(model, batch, plain, "single.2", Ablation("img_update"))
    assert same(of_image, bench.edited(model, batch, plain, "single.2", Ablation("skip")))


def test_patched_image_tokens_of_the_last_block_give_the_other_velocity(model, bench, batch):
    """At the first step both runs are in the same state: only the text and its pooled vector differ."""
    plain = bench.unedited(model, batch)
    sites = sites_of("patch_img", "single.2")
    _, sink = bench.other(model, batch, sites)
    changes = changes_of("patch_img", "single.2", model.params, 0, sink)
    seen = MemorySink()
    with Intervention(model, changes), Recorder(model, sites, seen):
        bench.unedited(model, batch)
    for step in range(3):
        assert torch.equal(seen.read(sites[0], step), sink.read(sites[0], step))
    assert not same(bench.edited(model, batch, plain, "single.2", Ablation("patch_img"), sink), plain)


def test_shifted_keys_are_those_of_tokens_that_stand_elsewhere(model):
    params = model.params
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(2, params.num_heads, 12, params.head_dim, generator=draw)
    places = torch.zeros(1, 12, 3)
    places[0, :, 1], places[0, :, 2] = torch.arange(12) // 3, torch.arange(12) % 3
    places = places.expand(2, -1, -1)
    moved = places + torch.tensor([0.0, 2.0, 2.0])
    turned, expected = (rotate(keys, rotary_table(ids, params.axes_dim, params.theta)) for ids in (places, moved))
    (change,) = changes_of("rotary", "single.1", params, 2, None).values()
    flat = turned.transpose(1, 2).flatten(2)
    torch.testing.assert_close(change(flat, 0), expected.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["skip", "attn", "rotary", "patch_img"])
def test_a_control_moves_every_token_as_far_along_one_direction(model, bench, batch, kind):
    bench = bench._replace(shift=1)
    plain = bench.unedited(model, batch)
    block = "double.1"
    sites = sites_of(kind, block)
    _, sink = bench.other(model, batch, sites)
    before, moved = MemorySink(), []
    with Recorder(model, sites, before):
        bench.unedited(model, batch)
    for control in (False, True):
        seen = MemorySink()
        with Recorder(model, sites, seen):
            bench.edited(model, batch, plain, block, Ablation(kind, control=control), sink)
        moved.append([seen.read(site, 0) - before.read(site, 0) for site in sites])
    if kind != "skip":  # an update is rounded where it is put into the stream
        for edit, control in zip(*moved, strict=True):
            torch.testing.assert_close(control.norm(dim=-1), edit.norm(dim=-1), atol=1e-4, rtol=1e-3)
    (direction, *_) = moved[1]
    along = torch.nn.functional.normalize(direction, dim=-1)
    likeness = (along @ along[:, :1].transpose(1, 2)).abs()
    assert likeness[direction.norm(dim=-1) > 1e-3].min() > 0.99


def test_no_hook_is_left_whatever_raises(model, bench, batch):
    plain = bench.unedited(model, batch)
    empty = MemorySink()
    with pytest.raises(FluxIRError, match="not recorded"):
        bench.edited(model, batch, plain, "double.0", Ablation("patch_img"), empty)
    assert hooks_on(model) == 0
    assert same(bench.unedited(model, batch), plain)


def test_what_is_asked_for_comes_in_one_order():
    steps = {"all": range(2), "early": range(1), "late": range(1, 2)}
    found = ablations_of(("mlp", "skip"), ("skip",), ("mlp",), steps)
    names = [one.name for one in found]
    assert names == ["skip_all", "skip_early", "skip_late", "mlp_all", "mlp_all_control"]


def test_a_row_counts_what_was_right_and_is_wrong_now():
    def numbers(own, other, latent, identical=False):
        return {
            "identical": identical,
            "psnr_db": None if identical else 20.0,
            "latent": latent,
            "right": {"own": own, "other": other},
        }

    yes, no = [True] * 6, [False] * 6
    half = [True, True, True, False, False, False]
    plain = [numbers(yes, no, 0.0), numbers(yes, half, 0.0), numbers(half, no, 0.0)]
    runs = [numbers(half, yes, 0.2), numbers(yes, half, 0.0, identical=True), numbers(no, no, 0.4)]
    row = row_of("single.1", Ablation("patch_img"), runs, plain, ["a", "a", "b"])
    assert (row.pictures, row.identical) == (3, 1)
    assert row.latent.mean == pytest.approx((0.1 + 0.4) / 2)  # prompts count alike
    assert row.lost.mean == pytest.approx((0.25 + 1.0) / 2)
    assert row.lost_of["number"].mean == pytest.approx(1 / 3)
    assert row.lost_of["place"].mean == pytest.approx(1 / 2)  # of the two that had it right
    assert row.taken.mean == pytest.approx((0.5 + 0.0) / 2)
    assert row.lpips is None


def test_wilson_is_that_of_scipy():
    from scipy.stats import binomtest

    for hits, n in ((0, 10), (3, 16), (16, 16)):
        low, high = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits / n, n) == pytest.approx((hits / n, low, high))
