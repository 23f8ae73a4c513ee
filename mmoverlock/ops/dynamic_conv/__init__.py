"""The public ContMix operator, and which backend of it runs.

========= ===================================================================
reference the definition, on any device; slow, and takes much memory
tiled     matrix products in plain PyTorch, on any device; exportable
triton    kernels for NVIDIA GPUs
========= ===================================================================

'auto' is 'triton' where it can run and 'tiled' elsewhere, by measurement
(benchmarks/NOTES.md).
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..backends import check_backend, takes_triton
from .reference import contmix_reference
from .tiled import contmix_tiled


def contmix_triton(*args) -> Tensor:
    """See :func:`contmix`; Triton is imported with the first call."""
    from .triton import contmix_triton as run

    return run(*args)


BACKENDS = {
    'reference': contmix_reference,
    'tiled': contmix_tiled,
    'triton': contmix_triton,
}


def contmix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: tuple[Tensor, Tensor],
    backend: str = 'auto',
    scale: float = 1.0,
) -> Tensor:
    """Context-mixing dynamic convolution (section 3.3 of the paper).

    Every position, in each of G groups, makes its own k x k and K x K kernel
    from its affinity to S^2 region centers of the context prior, and mixes
    its neighborhood with them: the first half of the channels with the small
    kernel, the second half with the large one::

        A = scale query^T key                  (H * W) x S^2, per group
        D = A weight^T + bias                  (H * W) x (k^2 + K^2)
        kernel = softmax(D + relative position bias), over k^2 and over K^2
        out[n] = sum over the window of n of kernel[n, tap] * value[tap]

    Windows are clamped to lie inside the map, as in neighborhood attention.
    Kernels are made in single precision at least, under autocast too; the
    mixing is done in the dtype of ``value``.

    Args:
        query (Tensor): (B, G * c, H, W).
        key (Tensor): (B, G * c, S, S), the region centers.
        value (Tensor): (B, C, H, W), C a multiple of 2 * G.
        weight (Tensor): (k^2 + K^2, S^2), shared by the groups.
        bias (Tensor): (k^2 + K^2, ).
        rpb (tuple[Tensor, Tensor]): Relative position biases of the two
            kernels, (G, 2k - 1, 2k - 1) and (G, 2K - 1, 2K - 1). The group
            count and the (odd) kernel sizes are read from them.
        backend (str): 'reference', 'tiled', 'triton' or 'auto'; see the top
            of this module. Defaults to 'auto'.
        scale (float): Of the affinities. Defaults to 1.

    Returns:
        Tensor: (B, C, H, W), of the dtype of ``value``.

    Raises:
        ValueError: If the backend is unknown or cannot run on this device,
            the shapes disagree, or the map is smaller than a kernel.
        ImportError: If the backend needs what is not installed.
    """
    check_backend(backend, ('auto', *BACKENDS))
    _check_shapes(query, key, value, weight, bias, rpb)
    operands = query, key, value, weight, bias, tuple(rpb)
    if backend == 'auto':
        takes_kernels = takes_triton(
            backend, value, contmix_triton, *operands, scale
        )
        backend = 'triton' if takes_kernels else 'tiled'
    if backend == 'triton':  # which converts on the fly
        return BACKENDS[backend](*operands, scale)
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, weight, bias, *rpb = (
        tensor.to(dtype) for tensor in (query, key, weight, bias, *rpb)
    )
    key = key * scale  # the smallest of what could be scaled
    device = value.device.type
    exact = (
        nullcontext()
        if device == 'meta'
        else torch.autocast(device, enabled=False)
    )
    with exact:
        return BACKENDS[backend](query, key, value, weight, bias, tuple(rpb))


def enlarged_size(size: Sequence[int], kernel_size: int) -> list[int] | None:
    """The size that a map is enlarged to for the kernels of ContMix.

    Args:
        size (Sequence[int]): Height and width.
        kernel_size (int): Size of the large kernel.

    Returns:
        list[int] | None: The shorter side is the kernel's, the other one in
        proportion; None if neither is shorter than the kernel.
    """
    short = min(size)
    if short >= kernel_size:
        return None
    factor = kernel_size / short
    return [
        kernel_size if side == short else int(factor * side) for side in size
    ]


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: tuple[Tensor, Tensor],
) -> None:
    groups = len(rpb[0])
    sizes = [(table.shape[-1] + 1) // 2 for table in rpb]
    if any(
        table.shape != (groups, 2 * k - 1, 2 * k - 1) or k % 2 == 0
        for table, k in zip(rpb, sizes, strict=True)
    ):
        raise ValueError(
            'rpb must be two (groups, 2k - 1, 2k - 1) tables with odd k, '
            f'got {[tuple(table.shape) for table in rpb]}'
        )
    batch, channels, height, width = query.shape
    expected = {
        'query': (query, (batch, channels // groups * groups, height, width)),
        'key': (key, (batch, channels, *key.shape[2:])),
        'value': (
            value,
            (
                batch,
                value.shape[1] // (2 * groups) * 2 * groups,
                height,
                width,
            ),
        ),
        'weight': (
            weight,
            (sum(k**2 for k in sizes), key.shape[2:].numel()),
        ),
        'bias': (bias, (sum(k**2 for k in sizes),)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f'{name} has shape {tuple(tensor.shape)}, expected {shape} '
                f'for {groups} groups and kernel sizes {sizes}'
            )
    if min(height, width) < max(sizes):
        raise ValueError(
            f'the {height} x {width} map is smaller than the '
            f'{max(sizes)} x {max(sizes)} kernel'
        )
