"""A folder of maps as `flux-ir maps` leaves it, made without a model: every value is known."""

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux_ir.files import write_json

ROWS, COLUMNS = 2, 3
BLOCKS, STEPS = ["double.0", "single.0"], [0, 2]
GROUPS = {"words": 0.2, "padding": 0.3, "image": 0.5, "registers": 0.0}


def value_of(block: str, step: int, word: int, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """A map with one token that stands out: the number of its block, step and word."""
    map_ = torch.full((rows * columns,), 0.01)
    map_[(BLOCKS.index(block) + 2 * STEPS.index(step) + word) % (rows * columns)] = 0.1 + 0.1 * word
    return map_.unflatten(0, (rows, columns))


def make_map_folder(
    folder: Path, *, prompt: str = "red and blue", heads: int = 0, grid: tuple[int, int] = (ROWS, COLUMNS)
) -> Path:
    """Two words, a patch, two concepts (mapped in the double block alone), two blocks, two steps."""
    folder.mkdir(parents=True)
    for step in STEPS:
        kept = {}
        for block in BLOCKS:
            words = torch.stack([value_of(block, step, word, *grid) for word in range(2)])
            kept[f"{block}/to_words"] = words if not heads else torch.stack([words * (1 + h) for h in range(heads)])
            kept[f"{block}/from_words"] = words / 2
            kept[f"{block}/value_to_words"] = 100 * words
            kept[f"{block}/from_patches"] = words[:1].clone()
            kept[f"{block}/to_groups"] = torch.stack([share * torch.ones(grid) for share in GROUPS.values()])
            if block.startswith("double"):
                kept[f"{block}/concepts"] = torch.stack([words[0], 1 - words[0]])
        save_file(kept, folder / f"step_{step}.safetensors")
    Image.new("RGB", (16 * grid[1] * 4, 16 * grid[0] * 4), (255, 255, 255)).save(folder / "picture.jpg")
    facts = {"model": "flux-tiny", "prompt": prompt, "seed": 7, "size": [16 * grid[1], 16 * grid[0]], "grid": grid}
    facts |= {"blocks": BLOCKS, "steps": STEPS, "timesteps": [1.0, 0.75, 0.5, 0.25, 0.0], "patches": [4]}
    facts |= {"words": [{"word": "red", "tokens": [0]}, {"word": "blue", "tokens": [2]}]}
    write_json(folder / "maps.json", facts | {"concepts": ["sky", "tree"], "mass": {"all": GROUPS}})
    return folder
