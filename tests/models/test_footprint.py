"""What whole runs take, held against networks, published sizes and the measured peak of the full size."""

import pytest
import torch

from flux_ir.models.footprint import CUDA_HOST_BYTES, Work, autoencoder_bytes, footprint, parts_of
from flux_ir.models.memory import DEVICE_BASE_BYTES, HOST_BASE_BYTES
from flux_ir.models.placement import plan
from flux_ir.models.registry import MODELS, get_spec
from flux_ir.models.suite import Suite

SCHNELL = MODELS["flux-schnell"]
SMALL = Work(256 * 256, 512)


def test_the_published_sizes():
    parts = parts_of(SCHNELL, torch.bfloat16)
    assert round(parts.transformer / 1e9, 1) == 23.8
    assert round(parts.t5 / 1e9, 1) == 9.5
    assert parts.ae_encoder + parts.ae_decoder == 4 * 83_819_683


def test_parts_are_those_of_the_loaded_networks():
    from flux_ir import load_model

    spec = get_spec("flux-tiny")
    suite: Suite = load_model("flux-tiny", dtype="float32", device="cpu")
    parts = parts_of(spec, torch.float32)

    def taken(network):
        return sum(parameter.nbytes for parameter in network.parameters())

    with suite.text_encoders() as encoders, suite.autoencoder() as autoencoder:
        assert taken(suite.flux) == parts.transformer
        assert (taken(encoders.t5), taken(encoders.clip)) == (parts.t5, parts.clip)
        assert (taken(autoencoder.encoder), taken(autoencoder.decoder)) == (parts.ae_encoder, parts.ae_decoder)


def test_the_full_size_takes_what_was_measured():
    # 2.37 GB: benchmarks/full_size.py, 256 px, one step, every block captured, embeddings from a file.
    work = Work(256 * 256, 512, encodes=False, waiting_bytes=2**28)
    predicted = footprint(SCHNELL, plan(0, offload="blocks"), torch.bfloat16, work).host
    assert predicted == pytest.approx(2.37e9, rel=0.1)


def test_a_gpu_holds_all_parts_or_one_at_a_time_or_two_slots():
    parts = parts_of(SCHNELL, torch.bfloat16)
    peaks = {
        way: footprint(SCHNELL, plan(1, offload=way), torch.bfloat16, SMALL, waits_in_memory=True)
        for way in (False, "parts", "blocks")
    }
    assert peaks[False].fullest > sum(parts) + DEVICE_BASE_BYTES
    assert parts.transformer < peaks["parts"].fullest < parts.transformer + 2e9
    assert peaks["blocks"].fullest < 3e9
    assert peaks[False].host == HOST_BASE_BYTES + CUDA_HOST_BYTES
    assert peaks["parts"].host > sum(parts)
    assert 17e9 < peaks["blocks"].host < parts.transformer + 3e9


def test_spread_over_gpus_the_transformer_is_alone():
    spread = footprint(SCHNELL, plan(4, multi_gpu=True), torch.bfloat16, SMALL)
    assert len(spread.devices) == 4
    parts = parts_of(SCHNELL, torch.bfloat16)
    assert parts.transformer < spread.fullest < parts.transformer + 1.5e9


def test_larger_pictures_and_blocks_that_stay_take_more():
    blocks = plan(1, offload="blocks")
    few = footprint(SCHNELL, blocks, torch.bfloat16, SMALL)
    assert footprint(SCHNELL, blocks, torch.bfloat16, SMALL, resident=[3]).fullest > few.fullest
    large = Work(1024 * 1024, 4352)
    assert footprint(SCHNELL, blocks, torch.bfloat16, large).fullest > few.fullest
    assert autoencoder_bytes(SCHNELL, 1024**2, torch.bfloat16) == pytest.approx(1.95e9, rel=0.01)
