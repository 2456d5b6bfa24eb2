import pytest
import torch
from safetensors import safe_open

from flux_ir.activations.shards import (
    ShardLayout,
    ShardTensor,
    ShardWriter,
    images_per_shard,
    read_shard,
    site_key,
)
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site

SITE = Site.parse("single.1.img")


def layout_of(images=3, dtype=torch.bfloat16):
    return ShardLayout(
        {
            site_key(SITE, 2): ShardTensor(dtype, (images, 4, 6)),
            "img_positions": ShardTensor(torch.int32, (images, 4)),
        },
        rows={"ids": [f"{n:016x}" for n in range(images)], "prompts": ['a "red" Kreis ⚫'] * images},
        facts={"model": "tiny", "txt_tokens": 7},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_any_safetensors_reader_opens_a_shard(tmp_path, dtype):
    values = torch.randn(3, 4, 6).to(dtype)
    positions = torch.arange(12, dtype=torch.int32).view(3, 4)
    with ShardWriter(tmp_path / "a", layout_of(dtype=dtype)) as writer:
        for image in (2, 0, 1):
            writer.write("single.1.img/step_2", image, values[image : image + 1])
        writer.write("img_positions", 0, positions)
    with safe_open(tmp_path / "a", framework="pt") as file:
        read = file.get_tensor("single.1.img/step_2")
        assert read.view(torch.uint8).equal(values.view(torch.uint8))
        assert file.get_tensor("img_positions").equal(positions)
        assert file.metadata()["model"] == '"tiny"'


def test_header_says_where_the_images_of_a_site_lie(tmp_path):
    values = torch.randn(3, 4, 6, dtype=torch.float32)
    with ShardWriter(tmp_path / "a", layout_of(dtype=torch.float32)) as writer:
        writer.write("single.1.img/step_2", 0, values)
    shard = read_shard(tmp_path / "a")
    offset, nbytes = shard.span("single.1.img/step_2", 1, 3)
    content = bytearray((tmp_path / "a").read_bytes()[offset : offset + nbytes])
    assert torch.frombuffer(content, dtype=torch.float32).view(2, 4, 6).equal(values[1:])
    assert (shard.images, shard.metadata["prompts"][1]) == (3, 'a "red" Kreis ⚫')


def test_bytes_are_a_function_of_the_content_alone(tmp_path):
    assert layout_of().header() == layout_of().header()
    assert len(layout_of().header()) % 64 == 0


@pytest.mark.parametrize(("size", "images"), [(1, 64), (4 * 10**6, 64), (5 * 10**6, 51), (10**9, 1)])
def test_a_shard_ends_at_64_generations_or_256_mb(size, images):
    assert images_per_shard(size) == images


def test_a_shard_that_is_cut_or_no_shard_is_refused(tmp_path):
    with ShardWriter(tmp_path / "a", layout_of()):
        pass
    content = (tmp_path / "a").read_bytes()
    for bad in (content[:-1], content[:40], b"", b"not a shard at all", content + b"\0"):
        (tmp_path / "a").write_bytes(bad)
        with pytest.raises(FluxIRError, match=r"must (be a shard|have)"):
            read_shard(tmp_path / "a")


def test_a_system_without_pwrite_writes_the_same_bytes(tmp_path, monkeypatch):
    """As Windows."""
    values = torch.randn(3, 4, 6).bfloat16()
    for name in ("with", "without"):
        with ShardWriter(tmp_path / name, layout_of()) as writer:
            for image in (2, 0, 1):
                writer.write("single.1.img/step_2", image, values[image : image + 1])
        monkeypatch.delattr("os.pwrite", raising=False)
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()
