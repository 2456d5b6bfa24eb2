"""What whole runs take, held against networks, published sizes and the measured peak of the full size."""

import pytest
import torch

from flux_ir.models.footprint import CUDA_HOST_BYTES, Work, autoencoder_bytes, footprint, parts_of
from flux_ir.models.memory import DEVICE_BASE_BYTES, HOST_BASE_BYTES, activation_bytes, elements
from flux_ir.models.placement import plan
from flux_ir.models.registry import MODELS, get_spec
from flux_ir.models.split import runs_of, with_parts_beside
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


def test_split_blocks_take_the_share_of_their_device_and_all_compute():
    placement = with_parts_beside(plan(4, multi_gpu="blocks"), SCHNELL.flux)
    takes = footprint(SCHNELL, placement, torch.bfloat16, SMALL)
    parts, runs = parts_of(SCHNELL, torch.bfloat16), runs_of(SCHNELL.flux, placement.blocks)
    working = activation_bytes(SCHNELL.flux, SMALL.tokens, torch.bfloat16)
    for run in runs:
        beside = sum(parts) - parts.transformer if run.device == placement.t5 else 0
        least = DEVICE_BASE_BYTES + 2 * run.elements + beside
        assert least < takes.devices[run.device] <= least + max(working, 10**9)
    assert sum(run.elements for run in runs) * 2 == parts.transformer


def test_sharded_processes_have_a_part_of_the_blocks_and_two_gathered_ones():
    whole, sharded = (
        footprint(SCHNELL, plan(1), torch.bfloat16, SMALL._replace(encoders_go=True), sharded_over=ranks)
        for ranks in (1, 8)
    )
    counts = elements(SCHNELL.flux)
    held = (counts.outside + -(-sum(counts.blocks) // 8) + 2 * max(counts.blocks)) * 2
    text = parts_of(SCHNELL, torch.bfloat16)
    assert whole.fullest - sharded.fullest > parts_of(SCHNELL, torch.bfloat16).transformer - held - text.t5 - text.clip
    assert sharded.fullest > held
    assert sharded.host == 8 * whole.host


def test_encoders_that_go_leave_their_room_to_the_transformer():
    stay, go = (
        footprint(SCHNELL, plan(0), torch.bfloat16, SMALL._replace(encoders_go=goes)).host for goes in (False, True)
    )
    parts = parts_of(SCHNELL, torch.bfloat16)
    assert stay - go == parts.t5 + parts.clip
    more = footprint(SCHNELL, plan(0), torch.bfloat16, SMALL._replace(batch=8, encoders_go=True)).host
    assert more - go > 6 * activation_bytes(SCHNELL.flux, SMALL.tokens, torch.bfloat16)


def test_larger_pictures_and_blocks_that_stay_take_more():
    blocks = plan(1, offload="blocks")
    few = footprint(SCHNELL, blocks, torch.bfloat16, SMALL)
    assert footprint(SCHNELL, blocks, torch.bfloat16, SMALL, resident=[3]).fullest > few.fullest
    large = Work(1024 * 1024, 4352)
    assert footprint(SCHNELL, blocks, torch.bfloat16, large).fullest > few.fullest
    assert autoencoder_bytes(SCHNELL, 1024**2, torch.bfloat16) == pytest.approx(1.95e9, rel=0.01)
