"""Memory that is used again: never twice at once, and again once it is free."""

import torch

from flux_ir.sae.kernels.spare_memory import SpareMemory


def test_memory_is_used_again_once_no_tensor_refers_to_it():
    spare = SpareMemory(most=2)
    first = spare.empty((4, 8), torch.float32)
    view, address = first[1:], first.data_ptr()
    del first
    other = spare.empty((4, 8), torch.float32)
    assert other.data_ptr() != address, "a view still refers to it"
    del view
    again = spare.empty((2, 8), torch.bfloat16)
    assert again.data_ptr() == address
    assert again.shape == (2, 8)
    assert again.dtype == torch.bfloat16


def test_no_more_waits_than_asked():
    spare = SpareMemory(most=2)
    tensors = [spare.empty((100,), torch.float32) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 5
    del tensors
    spare.empty((1000,), torch.float32)
    assert len(spare._free) <= 3


def test_a_gradient_keeps_its_memory_as_long_as_it_lives():
    spare = SpareMemory(most=4)
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    weight.grad = spare.empty((3, 3), torch.float32).fill_(1)
    for _ in range(5):
        spare.empty((3, 3), torch.float32).fill_(7)
    assert weight.grad.eq(1).all()
