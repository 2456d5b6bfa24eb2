"""T5 with its blocks streamed gives the same vectors, and its layers are recorded as ever."""

import pytest
import torch

from flux_ir.models.text.encoders import load_t5

PROMPTS = ["a red circle", "a blue square on the left"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_blocks_give_the_same_vectors(text_folders, dtype):
    t5 = [load_t5(text_folders.t5, text_folders.t5, 9, "cpu", dtype, streamed=streamed) for streamed in (False, True)]
    resident, streamed = t5
    for _ in range(2):  # the stream goes round
        one_by_one = torch.cat([resident([prompt]) for prompt in PROMPTS])
        assert torch.equal(one_by_one, streamed(PROMPTS))
    inside = [parameter.is_meta for parameter in streamed.model.encoder.block.parameters()]
    assert any(inside)
    assert not streamed.model.shared.weight.is_meta
