"""Noise by seed, and packing there and back, on pictures that are not square."""

import pytest
import torch

from flux_ir.sampling.latents import get_noise, image_ids, pack, text_ids, unpack

HEIGHT, WIDTH = 48, 80  # 3 x 5 tokens


@pytest.mark.parametrize(("name", "height", "width", "seed"), [("256x256", 256, 256, 42), ("512x384", 512, 384, 0)])
def test_noise_equals_the_golden_noise_bit_for_bit(golden, name: str, height: int, width: int, seed: int) -> None:
    noise = get_noise(1, height, width, "cpu", torch.bfloat16, seed)
    assert torch.equal(noise, golden("sampling").tensors[f"noise.{name}.seed{seed}"])


def test_noise_is_the_bf16_draw_in_every_dtype() -> None:
    bf16 = get_noise(2, HEIGHT, WIDTH, "cpu", torch.bfloat16, 3)
    assert torch.equal(get_noise(2, HEIGHT, WIDTH, "cpu", torch.float32, 3), bf16.float())


def test_noise_of_sides_that_are_no_whole_tokens_is_rounded_up() -> None:
    assert get_noise(1, 50, 81, "cpu", torch.bfloat16, 0).shape == (1, 16, 8, 12)


def test_packing_and_unpacking_give_back_every_bit() -> None:
    latent = get_noise(2, HEIGHT, WIDTH, "cpu", torch.float32, 1)
    assert pack(latent).shape == (2, 15, 64)
    assert torch.equal(unpack(pack(latent), HEIGHT, WIDTH), latent)


def test_a_token_is_a_patch_with_channels_outermost() -> None:
    latent = get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, 1)
    row, column = 1, 3
    patch = latent[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(pack(latent)[0, row * 5 + column], patch.flatten())


def test_image_ids_are_row_and_column_and_text_ids_are_zero(golden) -> None:
    dev = golden("dev_like")
    assert torch.equal(image_ids(1, HEIGHT, WIDTH), dev.tensors["img_ids"])
    assert torch.equal(text_ids(1, 16), dev.tensors["txt_ids"])
    assert torch.equal(image_ids(3, HEIGHT, WIDTH)[2], image_ids(1, HEIGHT, WIDTH)[0])
