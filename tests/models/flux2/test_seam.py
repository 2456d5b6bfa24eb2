"""What stands for FLUX.1 beyond recording stands for FLUX.2, which comes through the same protocol."""

import torch

from flux_ir.maps.concepts import ConceptMapper
from flux_ir.recording.intervention import Intervention
from flux_ir.recording.recorder import Recorder
from flux_ir.sae.evaluation.baselines import Neurons
from flux_ir.sites import Site
from flux_ir.steering.dose import neuron_outputs

SITES = ("double.1.img.neurons", "double.0.txt.neurons", "single.2.neurons")


def test_neurons_are_decoded_without_a_bias(tiny_flux2, tiny_flux2_inputs):
    model = tiny_flux2()
    with Recorder(model, [*SITES, "double.*.mlp"]) as recorder:
        model(*tiny_flux2_inputs())
    for name in SITES[:2]:
        site = Site.parse(name)
        decoded = Neurons.of(model, site, k=192).target(recorder.sink.read(site, 0)[0])
        expected = recorder.sink.read(name.replace("neurons", "mlp"), 0)[0]
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_neuron_adds_its_output_times_the_shared_gate(tiny_flux2, tiny_flux2_inputs):
    model, inputs, number = tiny_flux2(), tiny_flux2_inputs(), 5
    vec = model.conditioning(inputs.timesteps, inputs.y)

    def turned_up(value, step):
        value[..., number] += 1
        return value

    for name in SITES:
        site = Site.parse(name)
        update = name.replace("neurons", "update")
        with Recorder(model, update) as before:
            model(*inputs)
        with Intervention(model, {site: turned_up}), Recorder(model, update) as after:
            model(*inputs)
        change = after.sink.read(update, 0) - before.sink.read(update, 0)
        expected = neuron_outputs(model, site, vec)[:, number]
        torch.testing.assert_close(change, expected.expand_as(change), rtol=0, atol=1e-4)


def test_a_concept_that_is_the_whole_text_passes_the_blocks_as_the_text_does(tiny_flux2, tiny_flux2_inputs):
    model, inputs = tiny_flux2(), tiny_flux2_inputs()
    inputs = inputs._replace(txt=inputs.txt[:, :1], txt_ids=inputs.txt_ids[:, :1])
    scores = {}
    mapper = ConceptMapper(model, inputs.txt, lambda step, block, value: scores.update({block: value}), blocks=[0, 1])
    alone = model(*inputs)
    with mapper, Recorder(model, "double.1.txt") as recorder:
        assert torch.equal(model(*inputs), alone)
    torch.testing.assert_close(mapper._stream, recorder.sink.read("double.1.txt", 0), rtol=0, atol=1e-5)
    assert {block: value.shape for block, value in scores.items()} == {0: (1, 1, 12), 1: (1, 1, 12)}
