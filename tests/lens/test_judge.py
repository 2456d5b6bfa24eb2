"""How prompts are split for a lens."""

import pytest

from flux_ir.errors import FluxIRError
from flux_ir.lens.judge import split_prompts


def test_all_generations_of_a_prompt_are_in_one_part_and_no_part_is_empty():
    prompts = [f"prompt {number % 10}" for number in range(30)]
    parts = split_prompts(prompts, 0.3)
    assert set(parts) == {"fit", "choose", "held_out"}
    assert parts[:10] == parts[10:20] == parts[20:]
    assert parts[:10].count("held_out") == 3
    assert set(split_prompts(["a", "b", "c"], 0.99)) == {"fit", "choose", "held_out"}


def test_two_prompts_are_too_few():
    with pytest.raises(FluxIRError, match="takes 3 or more: got 2"):
        split_prompts(["a", "b", "a"], 0.2)
