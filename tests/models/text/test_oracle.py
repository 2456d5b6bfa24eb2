"""T5 and CLIP's text tower on equal weights: transformers' numbers to the bit, in float32 and bfloat16."""

from functools import partial

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from flux_ir.models.checkpoints.pretrained import load_pretrained, read_params
from flux_ir.models.text.clip import ClipPhrase, ClipText, ClipTextParams
from flux_ir.models.text.t5 import T5Encoder, T5Params, distance_buckets

DTYPES = [torch.float32, torch.bfloat16]
# No text of one token: a single vector times a matrix depends on how the matrix lies in memory. (Prompts are padded.)
LENGTHS = [2, 7, 77, 300]
BATCHES = [1, 3]


def saved(model, folder):
    """The folder of a random network in which every weight counts, biases too."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
    model.save_pretrained(folder)
    return folder


def token_ids(batch, length, *, end):
    """Texts of several lengths, each with its end and padding behind it; the last is full, the first empty.

    No other token is the end. The end 37 pads too, as CLIP's does: the first of them counts.
    """
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 37, (batch, length), generator=draw)
    for row, used in zip(ids, torch.linspace(0, length - 1, batch).long().tolist(), strict=True):
        row[used], row[used + 1 :] = end, end if end == 37 else 0
    return ids


T5_SHAPES = {
    "as the first": {"feed_forward_proj": "relu", "d_kv": 8, "num_heads": 5},
    "as 1.1": {"feed_forward_proj": "gated-gelu", "d_kv": 8, "num_heads": 5},
    "wide heads, few buckets": {
        "feed_forward_proj": "gated-gelu",
        "d_kv": 24,
        "num_heads": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
    },
    "one head, a coarse norm": {
        "feed_forward_proj": "gated-gelu",
        "d_kv": 16,
        "num_heads": 1,
        "relative_attention_num_buckets": 64,
        "layer_norm_epsilon": 1e-3,
    },
}


@pytest.fixture(scope="module", params=T5_SHAPES.values(), ids=T5_SHAPES)
def t5_folder(request, tmp_path_factory):
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=48, d_ff=56, num_layers=3, **request.param)
    return saved(T5EncoderModel(config), tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_t5_is_that_of_transformers(t5_folder, dtype):
    params = read_params(T5Params, t5_folder, what="T5")
    ours = load_pretrained(T5Encoder, params, t5_folder, "cpu", dtype, what="T5", aliases={}, left_out=())
    theirs = T5EncoderModel.from_pretrained(t5_folder, dtype=dtype)
    # One tensor, which transformers has under two names.
    assert ours.state_dict().keys() == theirs.state_dict().keys() - {"encoder.embed_tokens.weight"}
    for batch in BATCHES:
        for length in LENGTHS:
            ids = token_ids(batch, length, end=1)
            assert torch.equal(ours(ids), theirs(input_ids=ids).last_hidden_state), (batch, length)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 20)])
def test_distances_fall_into_the_buckets_of_transformers(buckets, max_distance):
    distance = torch.arange(-700, 700)
    attention = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=5))
    of_transformers = attention.encoder.block[0].layer[0].SelfAttention._relative_position_bucket
    expected = of_transformers(distance, num_buckets=buckets, max_distance=max_distance)
    assert torch.equal(distance_buckets(distance, buckets, max_distance), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "heads", "eps"), [("quick_gelu", 5, 1e-5), ("gelu", 1, 1e-5), ("gelu", 8, 0.01)]
)
@pytest.mark.parametrize("end", [1, 2, 37], ids=["end-known", "end-as-published", "end-elsewhere"])
@torch.no_grad()
def test_the_text_tower_is_that_of_transformers(tmp_path, dtype, activation, heads, eps, end):
    """Also with 2 for the end, as published: then the largest number of a text is its end."""
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=300,
        hidden_act=activation,
        layer_norm_eps=eps,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=end,
    )
    torch.manual_seed(0)
    folder = saved(CLIPTextModelWithProjection(config), tmp_path)
    params = read_params(ClipTextParams, folder, what="CLIP")
    kind = partial(ClipPhrase, projection_dim=config.projection_dim)
    ours = load_pretrained(kind, params, folder, "cpu", dtype, what="CLIP", aliases={}, left_out=())
    theirs = CLIPTextModelWithProjection.from_pretrained(folder, dtype=dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ClipText(params).state_dict().keys() == theirs.state_dict().keys() - {"text_projection.weight"}
    for batch in BATCHES:
        for length in LENGTHS:
            ids = token_ids(batch, length, end=49 if end == 2 else end)
            out = theirs(input_ids=ids)
            assert torch.equal(ours.text_model(ids), out.last_hidden_state), (batch, length)
            assert torch.equal(ClipText.forward(ours, ids), theirs.text_model(input_ids=ids).pooler_output)
            torch.testing.assert_close(ours(ids), out.text_embeds, atol=1e-5, rtol=1e-5)  # of one vector a text
