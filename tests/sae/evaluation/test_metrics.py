"""Every number against its definition written out in float64, and sums that do not care how tokens were batched."""

import math
from typing import NamedTuple

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import ARCHITECTURES
from flux_ir.sae.evaluation.metrics import (
    OUTLIER_FACTOR,
    Deviation,
    Evaluator,
    density_of,
    evaluate,
    outlier_limits,
    to_json,
)


class Tokens(NamedTuple):
    """Activations with reconstructions and features, of three steps and both streams."""

    x: torch.Tensor
    x_hat: torch.Tensor
    features: torch.Tensor
    steps: torch.Tensor
    is_text: torch.Tensor


class Batch(NamedTuple):
    values: torch.Tensor
    steps: torch.Tensor
    is_text: torch.Tensor


class Halves:
    """A reconstructor whose features are the positive parts of the activations."""

    def encode(self, x):
        return x.clamp_min(0)

    def decode(self, features):
        return 0.5 * features


@pytest.fixture
def evaluated():
    draw = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(500, 12, generator=draw) + 100 * torch.randn(12, generator=draw)  # the mean dwarfs the spread
    x_hat = x + 0.5 * torch.randn(500, 12, generator=draw)
    features = (torch.randn(500, 20, generator=draw) - 1).clamp_min(0)
    features[:, 4] = 0
    steps = torch.randint(0, 3, (500,), generator=draw)
    return Tokens(x, x_hat, features, steps, torch.rand(500, generator=draw) < 0.3)


def added(evaluated, sizes):
    evaluator, start = Evaluator(), 0
    while start < len(evaluated.x):
        size = sizes[start % len(sizes)]
        evaluator.add(*(column[start : start + size] for column in evaluated))
        start += size
    return evaluator.result()


def by_hand(evaluated, rows):
    """FVU, cosine, L0, dead share, mean norms of the chosen rows, in float64."""
    x, x_hat, fired = evaluated.x[rows].double(), evaluated.x_hat[rows].double(), evaluated.features[rows] > 0
    return {
        "fvu": ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "cosine": torch.nn.functional.cosine_similarity(x, x_hat).mean(),
        "l0": fired.sum(1).double().mean(),
        "dead_share": (~fired.any(0)).double().mean(),
        "mean_norm": x.norm(dim=1).mean(),
        "mean_norm_reconstructed": x_hat.norm(dim=1).mean(),
        "squared_error": ((x - x_hat) ** 2).sum(),
        "squared_deviation": ((x - x.mean(0)) ** 2).sum(),
    }


def same(numbers, expected):
    return all(getattr(numbers, name) == pytest.approx(float(value), rel=1e-11) for name, value in expected.items())


def test_the_numbers_of_the_whole_set_are_their_definitions(evaluated):
    overall = added(evaluated, [64]).overall
    assert overall.tokens == 500
    assert same(overall, by_hand(evaluated, slice(None)))


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("text", [False, True])
def test_each_step_and_stream_is_a_set_of_its_own_with_its_own_mean(evaluated, step, text):
    result = added(evaluated, [100])
    in_step, in_stream = evaluated.steps == step, evaluated.is_text == text
    stream = "txt" if text else "img"
    assert same(result.per_group[step, stream], by_hand(evaluated, in_step & in_stream))
    assert same(result.per_step[step], by_hand(evaluated, in_step))
    assert same(result.per_stream[stream], by_hand(evaluated, in_stream))


def test_no_number_depends_on_the_size_of_the_batches(evaluated):
    whole, pieces = added(evaluated, [500]), added(evaluated, [1, 7, 30])
    assert same(pieces.overall, whole.overall._asdict())
    assert torch.equal(pieces.frequency, whole.frequency)
    assert pieces.density == whole.density
    # Averaging the FVU of batches is another number altogether: one token has no variance.
    assert math.isnan(added(Tokens(*(column[:1] for column in evaluated)), [1]).overall.fvu)


def test_sums_of_the_parts_are_the_sums_of_the_whole(evaluated):
    result = added(evaluated, [33])
    for parts in (result.per_step, result.per_stream, result.per_group):
        assert sum(numbers.tokens for numbers in parts.values()) == 500
        error = math.fsum(numbers.squared_error for numbers in parts.values())
        assert error == pytest.approx(result.overall.squared_error, rel=1e-12)
        # Each part is centred on its own mean, so the parts together deviate less than the whole.
        assert sum(numbers.squared_deviation for numbers in parts.values()) <= result.overall.squared_deviation


def test_adding_the_same_batches_again_gives_the_same_bits(evaluated):
    assert to_json(added(evaluated, [50])) == to_json(added(evaluated, [50]))


def test_one_step_and_stream_for_a_whole_batch_can_be_given_as_plain_values(evaluated):
    evaluator = Evaluator()
    evaluator.add(evaluated.x, evaluated.x_hat, evaluated.features, 2, True)
    assert list(evaluator.result().per_group) == [(2, "txt")]


def test_a_perfect_reconstruction_has_no_unexplained_variance_and_the_mean_all_of_it(evaluated):
    perfect, mean = Evaluator(), Evaluator()
    perfect.add(evaluated.x, evaluated.x, evaluated.features)
    mean.add(evaluated.x, evaluated.x.mean(0).expand_as(evaluated.x), evaluated.features)
    assert perfect.result().overall.fvu == 0
    assert mean.result().overall.fvu == pytest.approx(1, rel=1e-6)


def test_variance_is_exact_where_a_difference_of_float32_sums_has_no_digit_left():
    draw = torch.Generator().manual_seed(1)
    rows = 1e4 + 0.01 * torch.randn(1000, 3, generator=draw)
    deviation = Deviation(3)
    for part in rows.split(13):
        deviation.add(part)
    assert deviation.squares.item() == pytest.approx(
        ((rows.double() - rows.double().mean(0)) ** 2).sum().item(), rel=1e-9
    )


def test_the_density_counts_every_feature_once():
    frequency = torch.tensor([0.0, 1e-9, 1e-7, 0.01, 0.0101, 1.0], dtype=torch.float64)
    density = density_of(frequency)
    assert density.dead == 1
    assert sum(density.features) == 5
    assert density.features[0] == 2  # the rarest share the first bin
    assert density.features[-1] == 1  # a feature that always fires
    assert (density.log10_edges[0], density.log10_edges[-1]) == (-7, 0)
    place = density.log10_edges.index(-2.0)
    assert density.features[place] == 2


def test_evaluate_encodes_and_decodes_what_it_is_given(evaluated, monkeypatch):
    monkeypatch.setattr("flux_ir.sae.evaluation.metrics.DENSE_VALUES", 12 * 10)  # ten tokens at a time
    batches = [Batch(evaluated.x.bfloat16(), evaluated.steps, evaluated.is_text)]
    result = evaluate(Halves(), batches, d_sae=12)
    x = evaluated.x.bfloat16().float()
    expected = by_hand(evaluated._replace(x=x, x_hat=0.5 * x.clamp_min(0), features=x.clamp_min(0)), slice(None))
    assert same(result.overall, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_judged_by_its_own_reconstruction(evaluated, random_sae, architecture):
    sae = random_sae(architecture)
    result = evaluate(sae, [Batch(evaluated.x, evaluated.steps, evaluated.is_text)], d_sae=sae.config.d_sae)
    with torch.no_grad():
        expected = evaluated._replace(x_hat=sae(evaluated.x), features=sae.encode(evaluated.x))
    numbers = by_hand(expected, slice(None))
    assert result.overall.fvu == pytest.approx(numbers["fvu"].item(), rel=1e-5)
    assert result.overall.l0 == pytest.approx(numbers["l0"].item(), abs=0.01)


def test_json_has_no_word_for_what_is_undefined(evaluated):
    evaluator = Evaluator()
    evaluator.add(evaluated.x[:1], evaluated.x_hat[:1], evaluated.features[:1])
    written = to_json(evaluator.result())
    assert written["overall"]["fvu"] is None
    assert written["per_step_and_stream"]["0.img"]["tokens"] == 1


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(FluxIRError, match="needs at least one token: got none"):
        Evaluator().result()


def test_dictionaries_of_two_sizes_are_refused(evaluated):
    evaluator = Evaluator()
    evaluator.add(evaluated.x, evaluated.x_hat, evaluated.features)
    with pytest.raises(FluxIRError, match="must be alike"):
        evaluator.add(evaluated.x, evaluated.x_hat, evaluated.features[:, :5])


def with_sinks(evaluated, share=0.02, longer=300):
    """The tokens with a few of them far longer than the others, and whether each is one of these."""
    sink = torch.rand(len(evaluated.x), generator=torch.Generator().manual_seed(3)) < share
    factor = torch.where(sink, longer, 1)[:, None]
    return evaluated._replace(x=evaluated.x * factor, x_hat=evaluated.x_hat * factor), sink


@pytest.mark.parametrize("sizes", [[500], [64], [3, 50]])
def test_outliers_are_counted_and_every_number_is_given_without_them_too(evaluated, sizes):
    tokens, sink = with_sinks(evaluated)
    batches = [Batch(tokens.x, tokens.steps, tokens.is_text)]
    evaluator, start = Evaluator(outlier_limits(batches, [0, 1, 2])), 0
    while start < len(tokens.x):
        size = sizes[start % len(sizes)]
        evaluator.add(*(column[start : start + size] for column in tokens))
        start += size
    found = evaluator.result()
    assert same(found.overall, by_hand(tokens, slice(None)))
    assert found.outliers.tokens == sink.sum()
    assert same(found.outliers.overall, by_hand(tokens, ~sink))
    assert same(found.outliers.per_step[1], by_hand(tokens, ~sink & (tokens.steps == 1)))
    assert same(found.outliers.per_stream["txt"], by_hand(tokens, ~sink & tokens.is_text))
    error = ((tokens.x - tokens.x_hat).double() ** 2).sum(1)
    assert found.outliers.share_of_error == pytest.approx((error[sink].sum() / error.sum()).item())
    assert found.decided_by_outliers
    written = to_json(found)["outliers"]
    assert (written["longer_than_medians"], written["tokens"]) == (OUTLIER_FACTOR, int(sink.sum()))
    assert written["without"]["overall"]["fvu"] == pytest.approx(found.outliers.overall.fvu, rel=1e-7)


def test_each_step_and_stream_has_a_median_of_its_own(evaluated):
    text = evaluated.is_text[:, None]
    tokens = evaluated._replace(x=torch.where(text, 50 * evaluated.x, evaluated.x))  # long, and ordinary for text
    limits = outlier_limits([Batch(tokens.x, tokens.steps, tokens.is_text)], [0, 1, 2])
    found = Evaluator(limits)
    found.add(*tokens)
    assert found.result().outliers.tokens == 0
    assert not found.result().decided_by_outliers
    chosen = tokens.x[(tokens.steps == 2) & tokens.is_text].norm(dim=1).double()
    assert limits[2, "txt"] == pytest.approx(OUTLIER_FACTOR * chosen.median().item())


def test_limits_are_measured_on_as_many_batches_as_it_takes():
    draw = torch.Generator().manual_seed(0)
    read = 0

    def batches():
        nonlocal read
        for step in (0, 0, 1, 1, 1):
            read += 1
            yield Batch(torch.randn(3000, 4, generator=draw), torch.full((3000,), step), torch.zeros(3000).bool())

    assert outlier_limits(batches(), [0, 1]).keys() == {(0, "img"), (1, "img")}
    assert read == 4


def test_mean_and_largest_activation_are_those_of_the_tokens_a_feature_fires_on(evaluated):
    found = added(evaluated, [30])
    z = evaluated.features.double()
    expected = z.sum(0) / (z > 0).sum(0).clamp_min(1)
    torch.testing.assert_close(found.mean_active, expected.float())
    assert torch.equal(found.max_active, evaluated.features.amax(0))
    assert found.mean_active[4] == found.max_active[4] == 0


def test_a_cosine_of_tiny_tokens_is_a_cosine(evaluated):
    tiny = evaluated._replace(x=evaluated.x * 1e-12, x_hat=evaluated.x_hat * 1e-12)
    assert added(tiny, [64]).overall.cosine == pytest.approx(added(evaluated, [64]).overall.cosine, rel=1e-6)
    zeros = evaluated._replace(x_hat=torch.zeros_like(evaluated.x_hat))
    assert added(zeros, [64]).overall.cosine == 0
