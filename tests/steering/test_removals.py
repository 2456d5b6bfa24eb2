"""What removals say together, and which features are removed."""

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.steering.attribution import Estimates
from flux_ir.steering.removals import Removal, agreement, choose, compare_changes


def estimates(change):
    dots = torch.tensor([change], dtype=torch.float32)
    counts = torch.ones(len(change), dtype=torch.int64)
    return Estimates(dots, dots, counts, counts, dots[0] != 0)


def test_the_largest_estimates_are_chosen_over_all_autoencoders_and_the_rest_is_drawn():
    found = choose([estimates([0.0, 3.0, 1.0, 5.0]), estimates([4.0, 0.0, 0.5])], 3, 9)
    assert found.candidates == [(0, 3), (1, 0), (0, 1)]
    assert set(found.controls) == {(0, 2), (1, 2)}
    assert found.active == 5


def test_more_controls_contain_fewer_and_candidates_are_never_among_them():
    many = [estimates(torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist())]
    five, nine, later = (choose(many, candidates, controls) for candidates, controls in ((3, 5), (3, 9), (10, 30)))
    assert nine.controls[:5] == five.controls
    assert later.controls == [key for key in choose(many, 3, 50).controls if key not in later.candidates][:30]


def test_without_an_active_feature_there_is_nothing_to_choose():
    with pytest.raises(FluxIRError, match="no feature is active"):
        choose([estimates([0.0, 0.0])], 1, 1)


def test_changes_at_once_against_changes_alone():
    x, y = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    found = compare_changes([(0, 1), (0, 2)], [x, y], torch.tensor([6.0, 8.0]), size=10.0, estimate=2.5)
    assert found.sum_of_effects == pytest.approx(0.5)
    assert found.sum_of_sizes == pytest.approx(0.7)
    assert found.effect_of_sum == pytest.approx(1.0)
    assert found.ratio == pytest.approx(2.0)
    assert found.cosine == pytest.approx(1.0)
    assert found.estimate == pytest.approx(0.25)
    none = compare_changes([(0, 1)], [torch.zeros(2)], torch.zeros(2), size=1.0, estimate=0.0)
    assert none.ratio is None
    assert none.cosine is None


def removals(estimate, exact, chosen):
    nothing = (None, None, None, None, None, ())
    return [Removal(0, "double.1.img", 0, c, e, x, *nothing) for e, x, c in zip(estimate, exact, chosen, strict=True)]


def test_agreement_is_of_ranks():
    estimate, exact = [5.0, 4.0, 3.0, 2.0, 1.0, 0.5], [50.0, 30.0, 40.0, 2.0, 3.0, 1.0]
    found = agreement(removals(estimate, exact, [True] * 3 + [False] * 3), best=2)
    assert found.spearman == pytest.approx(1 - 6 * 4 / (6 * 35))
    assert found.spearman_candidates == pytest.approx(0.5)
    assert found.spearman_controls == pytest.approx(0.5)
    assert found.recall == 0.5
    equal = agreement(removals([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [True] * 3), best=1)
    assert equal.spearman is None
    assert equal.spearman_controls is None
