"""Which path is taken, and that it can be asked for."""

import subprocess
import sys

import pytest
import torch

from flux_ir.sae.kernels import choose, cpu, reference
from flux_ir.sae.kernels.reference import AdamStep


def test_a_cpu_takes_the_cpus_path():
    assert choose.path_for(torch.zeros(1)) == "cpu"
    assert choose.path_for(torch.zeros(1, dtype=torch.float64)) == "cpu"


def test_a_device_without_kernels_takes_the_reference():
    assert choose.path_for(torch.zeros(1, device="meta")) == "reference"


def test_a_path_can_be_asked_for_and_the_choice_comes_back_after_an_error():
    with choose.using("reference"):
        assert choose.path_for(torch.zeros(1)) == "reference"
        with choose.using("cpu"):
            assert choose.path_for(torch.zeros(1, device="meta")) == "cpu"
        assert choose.path_for(torch.zeros(1)) == "reference"
    with pytest.raises(ValueError, match="stop"), choose.using("reference"):
        raise ValueError("stop")
    assert choose.path_for(torch.zeros(1)) == "cpu"


def test_both_paths_give_the_same_code_through_the_door():
    draw = torch.Generator().manual_seed(0)
    x, encoder, b_enc = (torch.randn(*shape, generator=draw) for shape in ((6, 8), (700, 8), (700,)))
    code = choose.encode_top_k(x, encoder, b_enc, 3)
    with choose.using("reference"):
        expected = choose.encode_top_k(x, encoder, b_enc, 3)
    torch.testing.assert_close(code.values.sort(1, descending=True).values, expected.values)
    assert torch.equal(code.indices.sort(1).values, expected.indices.sort(1).values)


@pytest.mark.parametrize("most", [cpu.DENSE_BELOW * 2, cpu.DENSE_BELOW * 2 + 1])
def test_few_used_features_are_multiplied_densely(most):
    indices = torch.arange(most).repeat(2)[: most // 2 * 2 + 2 * (most % 2)].view(-1, 2)
    assert (cpu._Used.of(indices, 5000) is not None) == (most <= cpu.DENSE_BELOW * 2)


def test_adam_through_the_door_steps_in_place():
    weight = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    same, gradient = weight.clone(), torch.randn(5, 4)
    choose.adam_rows_(
        weight, gradient.clone(), torch.zeros(5, 4), torch.zeros(5, 4), AdamStep(1, lr=0.1, unit_rows=True)
    )
    reference.adam_rows_(same, gradient, torch.zeros(5, 4), torch.zeros(5, 4), AdamStep(1, lr=0.1, unit_rows=True))
    torch.testing.assert_close(weight, same)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(5))


def test_triton_is_not_imported_on_a_cpu():
    program = (
        "import sys, flux_ir.sae.kernels.choose as c, torch; c.path_for(torch.zeros(1)); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
