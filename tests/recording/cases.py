"""The sizes and metadata of the captures that tests write, and lists of what a file or a folder holds."""

import torch

TIMESTEPS = (1.0, 0.75, 0.5, 0.25, 0.0)
METADATA = {"generation_id": "0123abcd", "prompt": "ein größerer Kreis", "seed": 7, "num_steps": 4, "note": None}
TXT, IMG = 7, 12
SITES = ("double.1.img", "double.1.txt", "single.0", "single.2.img.neurons")


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, list | tuple) else []


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())
