"""Formats that cannot be read are called by their names, whatever network they were made of."""

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.inspect import inspect
from flux_ir.models.text import load_t5

INT32, UINT8 = torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 4, dtype=torch.uint8)
KINDS = {
    "packed for the kernels of nunchaku (SVDQuant)": {"qkv_proj.qweight": UINT8, "qkv_proj.wscales": torch.ones(1)},
    "in the format of GPTQ": {
        "qkv.qweight": INT32,
        "qkv.qzeros": INT32,
        "qkv.scales": torch.ones(1),
        "qkv.g_idx": INT32,
    },
    "in the format of AWQ or GPTQ": {"qkv.qweight": INT32, "qkv.qzeros": INT32, "qkv.scales": torch.ones(1)},
    "in the format of torchao": {"qkv._weight_qdata": UINT8, "qkv._weight_scale": torch.ones(1)},
    "in the format of compressed-tensors": {"qkv.weight_packed": INT32, "qkv.weight_scale": torch.ones(1)},
    "in the format of HQQ": {"qkv.W_q": UINT8},
    "NVFP4, whose scales lie in the order of a GPU's units": {
        "qkv.weight": UINT8,
        "qkv.weight_scale": torch.ones(1).to(torch.float8_e4m3fn),
        "qkv.weight_scale_2": torch.ones(()),
    },
    "MXFP8, whose scales lie in the order of a GPU's units": {
        "qkv.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "qkv.weight_scale": torch.ones(4, 1).to(torch.float8_e8m0fnu),
    },
    "quanto's of 4 or 2 bits": {
        "qkv.weight._data._data": UINT8,
        "qkv.weight._scale": torch.ones(1),
        "qkv.weight._shift": torch.ones(1),
    },
}


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("network", ["of FLUX", "packed whole"])
def test_a_format_that_cannot_be_read_is_refused_by_its_name(state, write, tiny_spec, what, network):
    codes = {f"double_blocks.0.img_attn.{name}": tensor for name, tensor in KINDS[what].items()}
    path = write(codes | (state if network == "of FLUX" else {}))
    with pytest.raises(FluxIRError) as error:
        inspect(tiny_spec(), "transformer", path, "--checkpoint")
    assert error.value.message.startswith(
        f"{path} (from --checkpoint) holds quantised weights that cannot be read: they are {what} (first double_blocks"
    )
    assert error.value.hint.endswith("in bfloat16, float16, float32, float8, scaled float8, GGUF or bitsandbytes NF4")


def test_a_text_encoder_of_such_a_format_is_refused_by_its_name(write, text_folders):
    path = write({"encoder.block.0.layer.0.SelfAttention.q.qweight": INT32})
    with pytest.raises(FluxIRError, match=r"the text encoder in .* are packed for the kernels of one program"):
        load_t5(path, text_folders.t5, 7, "cpu", torch.float32, config={})


def test_a_part_of_a_file_that_is_not_asked_for_may_be_of_any_format(state, write, same):
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    other = {"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.qweight": INT32}
    assert same(write(prefixed | other), {name: tensor.double() for name, tensor in state.items()})
