"""Concept maps against those of the published code, in all its runs."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.maps.concepts import ConceptMapper, concept_maps, default_blocks
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sampling.denoise import euler_step


@pytest.fixture(scope="module")
def concept_golden(golden):
    return golden("concept_maps")


def run_of(found, run):
    """The network of one of the runs, and its tensors by name."""
    params = FluxParams(**found.params)
    weights = found.weights
    if run == "square":
        params = replace(params, guidance_embed=False)
        weights = {name: value for name, value in weights.items() if not name.startswith("guidance_in")}
    model = Flux(params)
    model.load_state_dict(weights)
    tensors = {n.removeprefix(f"{run}."): t for n, t in found.tensors.items() if n.startswith(f"{run}.")}
    return model.eval().requires_grad_(False), tensors


def walk(model, tensors):
    img, times, velocities = tensors["img"], tensors["timesteps"].tolist(), []
    ids, txt, y = (tensors["img_ids"], tensors["txt"], tensors["vec"])
    for t_curr, t_prev in pairwise(times):
        velocity = model(img, ids, txt, tensors["txt_ids"], torch.tensor([t_curr]).float(), y, tensors["guidance"])
        velocities.append(velocity)
        img = euler_step(img, velocity, t_curr, t_prev)
    return velocities


@pytest.mark.parametrize("run", ["square", "guided", "rect"])
def test_scores_maps_and_heat_maps_are_those_of_the_published_code(concept_golden, run):
    model, tensors = run_of(concept_golden, run)
    plain, found = walk(model, tensors), {}
    keep = lambda step, block, scores: found.setdefault((step, block), scores)  # noqa: E731
    recorded = MemorySink(), MemorySink()
    with Recorder(model, "double.*.txt*", recorded[0]):
        walk(model, tensors)
    with (
        Recorder(model, "double.*.txt*", recorded[1]),
        ConceptMapper(model, tensors["concepts"], keep, blocks=range(4)),
    ):
        velocities = walk(model, tensors)
    for step in range(2):
        assert torch.equal(velocities[step], plain[step])
        # Not 1e-5, and maps to 5e-5: guidance turns sinusoids by up to 3,500, and one ulp in 3 of 128 frequencies is
        # worth 1e-5 (`guided` goes from 1.1e-5 to 4e-6, `rect` from 8e-6 to 1.2e-5). Probably exp differs by processor.
        torch.testing.assert_close(velocities[step], tensors[f"pred.{step}"], rtol=0, atol=2e-5)
    assert all(torch.equal(value, recorded[1].values[key]) for key, value in recorded[0].values.items())
    scores = torch.stack([torch.stack([found[step, block] for block in range(4)]) for step in range(2)])
    torch.testing.assert_close(scores, tensors["scores"], rtol=1e-5, atol=1e-4)
    maps = torch.stack([torch.stack([concept_maps(block) for block in step]) for step in scores])
    torch.testing.assert_close(maps.reshape(tensors["maps"].shape), tensors["maps"], rtol=0, atol=5e-5)
    grid = tensors["heatmap"].shape
    torch.testing.assert_close(maps.mean(dim=(0, 1)).reshape(grid), tensors["heatmap"], rtol=0, atol=5e-5)
    late = maps[1, 2:].mean(dim=0).reshape(grid)
    torch.testing.assert_close(late, tensors["heatmap.layers_2_3.step_1"], rtol=0, atol=5e-5)


def test_the_last_fifth_of_the_double_blocks_is_looked_at():
    assert default_blocks(19) == [15, 16, 17, 18]
    assert default_blocks(4) == [3]


def test_chosen_blocks_and_steps_have_the_scores_they_have_among_all(concept_golden):
    model, tensors = run_of(concept_golden, "rect")
    found = {}
    keep = lambda step, block, scores: found.setdefault((step, block), scores)  # noqa: E731
    with ConceptMapper(model, tensors["concepts"], keep, blocks=[2], steps=[1]):
        walk(model, tensors)
    assert found.keys() == {(1, 2)}
    torch.testing.assert_close(found[1, 2], tensors["scores"][1, 2], rtol=0, atol=1e-4)


def test_streamed_blocks_give_the_same_scores(concept_golden):
    model, tensors = run_of(concept_golden, "rect")
    weights = model.state_dict()
    streamed = StreamedFlux(model.params, lambda target, name: target.copy_(weights[name]), "cpu", torch.float32)
    found = {}
    for network, key in ((model, "resident"), (streamed, "streamed")):
        keep = lambda step, block, scores, key=key: found.setdefault((key, step, block), scores)  # noqa: E731
        with ConceptMapper(network, tensors["concepts"], keep, blocks=range(4)):
            walk(network, tensors)
    for step, block in product(range(2), range(4)):
        assert torch.equal(found["resident", step, block], found["streamed", step, block])


def test_a_model_that_is_not_run_is_told(concept_golden):
    model, tensors = run_of(concept_golden, "square")
    with (
        pytest.raises(FluxIRError, match="concept mapper saw no forward"),
        ConceptMapper(model, tensors["concepts"], lambda *_: None),
    ):
        pass
