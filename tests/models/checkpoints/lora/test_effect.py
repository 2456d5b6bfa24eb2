"""How much a LoRA changes each block."""

import pytest
import torch

from flux_ir.models.checkpoints.load import Weights, load_flux
from flux_ir.models.checkpoints.lora.effect import block_of, lengths, matrices, relative_changes
from flux_ir.models.checkpoints.lora.read import read_lora
from tests.models.checkpoints.lora.layouts import draw_factors, kohya


def test_blocks_stand_in_depth_order_with_the_change_of_all_their_matrices(base):
    some = {name: f for name, f in draw_factors(base.flux).items() if name.startswith(("single_blocks.1", "double"))}
    lora = read_lora(kohya(some, base.flux, base.path("lora")), base.spec, strength=7.0)
    before = base.flux.state_dict()
    measured = list(lengths(lora, Weights(base.flux, base.source).read_into, matrices(before)))
    changes = relative_changes(measured)
    assert list(changes) == [
        *("img_in", "time_in", "vector_in", "txt_in", "double.0", "double.1"),
        *("single.0", "single.1", "single.2", "final_layer"),
    ]
    assert [block for block, change in changes.items() if change] == ["double.0", "double.1", "single.1"]
    at_one = read_lora(lora.path, base.spec)
    after = load_flux(base.spec, base.source, "cpu", torch.float32, loras=[at_one]).state_dict()
    own = [name for name in matrices(before) if block_of(name) == "single.1"]
    changed = sum((after[name].double() - before[name].double()).square().sum() for name in own)
    whole = sum(before[name].double().square().sum() for name in own)
    assert changes["single.1"] == pytest.approx(float((changed / whole).sqrt()), rel=1e-5)


def test_a_weight_belongs_to_its_block_or_its_module():
    assert block_of("double_blocks.12.img_attn.qkv.weight") == "double.12"
    assert block_of("single_blocks.3.linear1.weight") == "single.3"
    assert block_of("final_layer.linear.weight") == "final_layer"
    assert block_of("encoder.block.11.layer.0.SelfAttention.q.weight") == "t5.11"
    assert block_of("text_model.encoder.layers.2.mlp.fc1.weight") == "clip.2"
