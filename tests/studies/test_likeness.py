"""Distance, cosine and CKA of two runs' outputs, and their means over generations, against direct formulas."""

import pytest
import torch

from flux_ir.studies.likeness import AT_ONCE, Table, measure, summary


def direct_cka(pairs):
    """Debiased linear CKA by its definition in float64, HSIC summed over the pairs (Song et al., 2012, eq. 5)."""

    def hsic(x, y):
        n, one = len(x), torch.ones(len(x), dtype=torch.float64)
        k, other = ((side @ side.T).fill_diagonal_(0) for side in (x, y))
        whole = (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
        return ((k @ other).trace() + whole - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3))

    doubled = [(x.double(), y.double()) for x, y in pairs]
    own_x, cross, own_y = (sum(hsic(p[a], p[b]) for p in doubled) for a, b in ((0, 0), (0, 1), (1, 1)))
    return (cross / (own_x * own_y).sqrt()).item()


def draw(seed, tokens=30, width=9):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, width + 1)


def table_of(*pairs, run="free", cka_tokens=10**6):
    table = Table()
    for pair in pairs:
        table.add(run, "img", "double.0", measure(*pair, cka_tokens))
    return table


def cells(found, measured, run="free"):
    return found[run]["img"][measured]["double.0"]


def test_a_tensor_beside_itself_is_exactly_like_itself():
    (one,) = cells(summary([table_of((draw(0), draw(0)))], ["a"]), "cka")
    likeness = measure(draw(0), draw(0), 30)
    assert (likeness.distance, one["mean"]) == (0.0, 1.0)
    assert likeness.cosine == pytest.approx(1, abs=1e-15)


def test_cka_over_pictures_is_that_of_the_direct_formula():
    pairs = [(draw(n), draw(n).roll(1, 1) + draw(n + 50)) for n in range(3)]
    found = summary([table_of(pair) for pair in pairs], ["a", "b", "c"])
    (one,) = cells(found, "cka")
    assert one["mean"] == pytest.approx(direct_cka(pairs), abs=1e-6)  # six digits are kept
    alone = measure(*pairs[0], 30).hsic
    assert alone.cross / (alone.own_x * alone.own_y) ** 0.5 == pytest.approx(direct_cka(pairs[:1]), abs=1e-10)


def test_cka_of_more_tokens_than_fit_at_once_and_of_fewer_than_there_are():
    x = draw(0, tokens=AT_ONCE + 100, width=5)
    y = x.flip(1).tanh() + x
    hsic = measure(x, y, 10**6).hsic
    assert hsic.cross / (hsic.own_x * hsic.own_y) ** 0.5 == pytest.approx(direct_cka([(x, y)]), abs=1e-9)
    some = torch.linspace(0, len(x) - 1, 50).round().long()
    assert measure(x, y, 50).hsic == pytest.approx(measure(x[some], y[some], 50).hsic)
    assert measure(x, y, 0).hsic is None
    assert measure(x[:3], y[:3], 50).hsic is None
    assert cells(summary([table_of((x, y), cka_tokens=0)], ["a"]), "cka") == [{"mean": None, "low": None, "high": None}]


def test_generations_of_a_prompt_stay_together_and_one_prompt_has_no_interval():
    same = [table_of((draw(n), draw(n) * factor)) for n, factor in ((0, 1.1), (1, 1.3), (2, 2.0))]
    (one,) = cells(summary(same, ["a", "a", "a"]), "distance")
    assert one == {"mean": pytest.approx(1.4 / 3, rel=1e-5), "low": None, "high": None}
    (one,) = cells(summary(same, ["a", "a", "b"]), "distance")
    assert (one["low"], one["high"]) == (pytest.approx(0.2, rel=1e-5), pytest.approx(1.0, rel=1e-5))
    assert one["mean"] == pytest.approx(1.4 / 3, rel=1e-5)


def test_a_run_of_some_generations_is_summed_up_over_those():
    tables = [table_of((draw(0), 2 * draw(0))), table_of((draw(1), 3 * draw(1)))]
    tables[0].add("itself", "img", "double.0", measure(draw(0), draw(0), 30))
    found = summary(tables, ["a", "b"])
    assert cells(found, "distance", "itself")[0]["mean"] == 0.0
    assert cells(found, "distance")[0]["mean"] == pytest.approx(1.5)


def test_a_table_comes_back_from_its_lists_to_the_last_bit():
    table = table_of((draw(0), draw(1)), (draw(2), draw(3)))
    assert Table.from_json(table.to_json()).values == table.values
