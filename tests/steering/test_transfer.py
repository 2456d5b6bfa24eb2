"""Transfer between two runs of a tiny network: what is chosen, and what keeps its bits."""

import pytest
import torch

from flux_ir import FluxIRError
from flux_ir.models.text import TextEmbedding
from flux_ir.sampling.schedule import get_schedule
from flux_ir.sites import Site
from flux_ir.steering.dose import Painter, Variant
from flux_ir.steering.pairs import judged_region, read_pairs
from flux_ir.steering.tradeoff import dominated, pareto
from flux_ir.steering.transfer import METHODS, SWEPT, Chosen, Reach, Unit, choose, compare_runs
from tests.recording.listeners import hooks_on
from tests.steering.conftest import GRID, TXT_TOKENS

SITE = Site.parse("double.1.img")
LAST = Site.parse("single.2.img")
STEPS = 2
LEFT = torch.arange(GRID.tokens) % GRID.columns == 0


@pytest.fixture
def painter(tiny_flux, tiny_autoencoder):
    times = get_schedule(STEPS, GRID.tokens, shift=False)
    return Painter(tiny_flux(), tiny_autoencoder(), GRID, times, 1.0, torch.float32, None)


@pytest.fixture
def variants(tiny_inputs):
    """The original and the edited prompt; they share CLIP's vector, which modulates the last layer."""
    ours, theirs = tiny_inputs(), tiny_inputs(seed=1)
    return [Variant(row, 0.0, 3, TextEmbedding(txt, ours.y), None) for row, txt in (("a", ours.txt), ("b", theirs.txt))]


def compared(painter, variants, saes, inside=LEFT, values="spatial"):
    reach = Reach(inside, frozenset(range(STEPS)))
    words = {"txt_tokens": TXT_TOKENS, "most": 8, "draws": 1, "key": "a", "values": values}
    return compare_runs(painter, *variants, saes, reach, **words)


def test_strength_zero_changes_no_bit_and_every_method_moves_the_picture(painter, variants, tiny_sae):
    for values in ("spatial", "quantile"):
        difference = compared(painter, variants, {SITE: tiny_sae()}, values=values)
        (plain,) = painter.make(variants[:1])
        for method in METHODS:
            k = 4 if method in SWEPT else None
            doses = [variants[0]._replace(steering=difference.edits(method, strength, k)) for strength in (0.0, 1.0)]
            zero, one = painter.make(doses)
            assert torch.equal(zero.latent, plain.latent), method
            assert not torch.equal(one.latent, plain.latent), method
    assert hooks_on(painter.model) == 0


def test_whole_activations_behind_the_last_block_give_the_edited_picture_to_the_bit(painter, variants, tiny_sae):
    difference = compared(painter, variants, {LAST: tiny_sae(str(LAST))}, inside=None)
    edit = variants[0]._replace(steering=difference.edits("activations", 1.0))
    edited, moved = painter.make([variants[1], edit])
    assert torch.equal(edited.latent, moved.latent)


def test_a_run_set_to_its_own_features_keeps_its_bits(painter, variants, tiny_sae):
    difference = compared(painter, variants, {SITE: tiny_sae()})
    back = [difference.edits(method, 2.0, 8) for method in SWEPT]
    plain, *same = painter.make([variants[1], *(variants[1]._replace(steering=edit) for edit in back)])
    assert all(torch.equal(plain.latent, made.latent) for made in same)


def test_two_runs_that_are_the_same_are_refused(painter, variants, tiny_sae):
    with pytest.raises(FluxIRError, match="the same tokens"):
        compared(painter, [variants[0], variants[0]], {SITE: tiny_sae()})


def test_units_are_chosen_by_their_share_over_all_sites():
    other = Site.parse("single.1.img")
    ours = {SITE: torch.tensor([6.0, 2, 2, 0]), other: torch.tensor([10.0, 10, 0])}
    theirs = {SITE: torch.tensor([1.0, 1, 1, 2]), other: torch.tensor([0.0, 5, 5])}
    chosen = choose(ours, theirs)
    assert [(unit.site, unit.number) for unit in chosen.subtracted] == [(other, 0), (SITE, 0)]
    assert [(unit.site, unit.number) for unit in chosen.added] == [(other, 2), (SITE, 3)]
    assert [round(unit.share, 6) for unit in chosen.added] == [0.5, 0.4]
    assert chosen.first(1) == Chosen((Unit(other, 0, 0.5),), chosen.added[:1])


def test_the_front_is_what_no_other_point_beats():
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        points = [tuple(point) for point in torch.randint(0, 5, (8, 2), generator=draw).tolist()]
        beaten = [
            any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points) for p in points
        ]  # as low in both, and not the same point
        assert pareto(points) == [not lost for lost in beaten]


def test_the_dominated_area_is_counted_once():
    assert dominated([(0.5, 0.5), (0.25, 0.75), (0.5, 0.5), (2.0, 0.0)]) == pytest.approx(0.25 + 0.25 * 0.25)
    assert dominated([(0.0, 0.0)]) == 1.0
    assert dominated([(0.0, 1.2)]) == 0.0


LINES = [
    ('{"prompt": "a"}', "line 2: a pair has a prompt and an edited_prompt: it lacks edited_prompt"),
    ('{"prompt": "a", "edited_prompt": "a"}', "line 2: the two prompts of a pair must differ"),
    ('{"prompt": "a", "edited_prompt": "b", "regoin": [0]}', "line 2: a pair has no 'regoin'"),
    ('{"prompt": "a", "edited_prompt": "b", "region": [0, 1]}', "line 2: a region is left, top, right, bottom"),
    ('{"prompt": "a", "edited_prompt": "b", "seed": -1}', "line 2: seed must be"),
    ("{", "line 2 must be JSON"),
]


@pytest.mark.parametrize(("line", "message"), LINES)
def test_a_line_that_is_no_pair_is_named(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": "a", "edited_prompt": "b", "region": [0, 0, 16, 16], "seed": 4}}\n{line}\n')
    with pytest.raises(FluxIRError, match=message):
        read_pairs(path)


def test_prompts_outside_flux_tinys_world_have_no_judge(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "edited_prompt": "b"}\n')
    (pair,) = read_pairs(path)
    assert judged_region(pair, (), GRID) is None
