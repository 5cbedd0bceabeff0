"""A hash of the bits of a tensor, computed on its device: equal tensors have equal hashes on every rank and device."""

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element
_CHUNK = 2**20  # elements at a time, which bounds the workspace


@torch.no_grad()
def bit_hash(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum, modulo 2^64, of the elements' bits as integers, each times an odd number of its position.

    0-d int64, not read by the host; 0 for a tensor without elements. A change of one element is always seen: an odd
    factor loses no bit of it.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    factors = 2 * torch.arange(min(len(bits), _CHUNK), device=tensor.device) + 1
    for first, chunk in enumerate(bits.split(_CHUNK)):
        total += (chunk * (factors[: len(chunk)] + 2 * _CHUNK * first)).sum()
    return total


def bits_differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns which elements of two tensors of one shape and dtype differ in a bit: NaN may equal NaN, 0 is not -0."""
    integers = _INTEGERS[a.element_size()]
    return a.contiguous().view(integers) != b.contiguous().view(integers)
