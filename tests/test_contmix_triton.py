"""ContMix as Triton kernels, against the definition.

Without a GPU they run in Triton's interpreter (see conftest.py), where they
take double precision too.
"""

import os
import subprocess
import sys

import pytest
import torch
from test_contmix import call, differentiate, draw

from mmoverlock.ops.dynamic_conv import resolve_backend

triton = pytest.importorskip('triton', '3.6')
tl = pytest.importorskip('triton.language')
contmix_triton = pytest.importorskip('mmoverlock.ops.dynamic_conv.triton')

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
EXACT = torch.float64 if DEVICE == 'cpu' else torch.float32
# Errors relative to the largest number
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


def here(operands, dtype=EXACT, maps=None):
    """Operands on the device, in a dtype, query and value in another one."""
    return {
        name: tensor.detach()
        .to(DEVICE, maps or dtype if name in ('query', 'value') else dtype)
        .requires_grad_()
        for name, tensor in operands.items()
    }


def check(actual, operands, tolerance):
    expected = differentiate(operands, 'reference')
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        if one.numel() == 0:
            continue
        error = (one.cpu().double() - other).abs()
        assert (error <= tolerance * other.abs().amax()).all()


@pytest.mark.parametrize(
    'batch, height, width, kernel_size, groups, channels, layout, rows',
    [
        (1, 7, 7, 7, 1, (3, 2), 'contiguous', 4),  # as small as the kernel
        (2, 5, 17, 5, 2, (3, 2), 'channels_last', 8),
        (1, 11, 5, 5, 1, (16, 16), 'strided', 4),
        (1, 3, 37, 3, 1, (20, 9), 'contiguous', 4),  # two tiles of pixels
        (1, 14, 19, 13, 1, (8, 8), 'channels_last', 16),
        (1, 17, 17, 17, 1, (1, 1), 'contiguous', 16),  # wider rows of taps
        (0, 9, 9, 7, 2, (3, 2), 'contiguous', 4),
    ],
)
def test_agrees_with_reference(
    batch,
    height,
    width,
    kernel_size,
    groups,
    channels,
    layout,
    rows,
    monkeypatch,
):
    """Outputs and all gradients; taller tiles take the interpreter less."""
    if DEVICE == 'cpu':
        monkeypatch.setattr(contmix_triton, 'ROWS', rows)
    operands = draw(batch, height, width, kernel_size, groups, channels)
    actual = differentiate(here(operands), 'triton', layout)
    check(actual, operands, TOLERANCES[EXACT])


@pytest.mark.parametrize(
    'maps', [torch.float32, torch.float16, torch.bfloat16]
)
def test_formats(maps):
    """Maps in a format, the rest in single precision, as in training."""
    operands = draw(1, 5, 6, 3, channels=(4, 3))
    rounded = here(operands, torch.float32, maps)
    actual = differentiate(rounded, 'triton')
    assert actual[0].dtype == actual[1].dtype == actual[3].dtype == maps
    operands = {k: v.detach().cpu().double() for k, v in rounded.items()}
    operands = {k: v.requires_grad_() for k, v in operands.items()}
    check(actual, operands, TOLERANCES[maps])


def test_logits_are_made_in_single_precision():
    """Some are hundreds, whose differences TF32 rounds off."""
    operands = draw(1, 5, 6, 3, groups=1, channels=(16, 2))
    operands = {
        name: tensor.detach() * (10 if name in ('query', 'key') else 1)
        for name, tensor in operands.items()
    }
    expected = call(operands, 'reference')
    actual = call(here(operands, torch.float32), 'triton').cpu().double()
    assert (actual - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.skipif(DEVICE == 'cuda', reason='needs double precision')
def test_gradcheck():
    operands = here(draw(1, 3, 4, 3, groups=1, channels=(2, 1)))
    names = list(operands)
    assert torch.autograd.gradcheck(
        lambda *args: call(dict(zip(names, args, strict=True)), 'triton'),
        tuple(operands.values()),
        fast_mode=True,
    )


def test_same_results_every_time():
    """Exactly, and none that depends on uninitialized memory."""
    operands = here(draw(1, 5, 17, 3))
    first = differentiate(operands, 'triton')
    torch.use_deterministic_algorithms(True)  # fills memory with NaN
    try:
        second = differentiate(operands, 'triton')
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


def test_gradient_without_strides():
    """That of a sum is one number, expanded."""
    operands = draw(1, 3, 4, 3)
    results = []
    for backend, inputs in (
        ('reference', operands),
        ('triton', here(operands)),
    ):
        call(inputs, backend).sum().backward()
        results.append(inputs['query'].grad.cpu().double())
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_compiles_without_graph_breaks():
    operands = here(draw(1, 5, 5, 3))
    compiled = torch.compile(
        lambda operands: call(operands, 'triton'),
        fullgraph=True,
        backend='aot_eager',
    )
    actual = torch.autograd.grad(
        compiled(operands).square().sum(), list(operands.values())
    )
    expected = torch.autograd.grad(
        call(operands, 'triton').square().sum(), list(operands.values())
    )
    torch.testing.assert_close(actual, expected)


def test_custom_operator_is_well_formed():
    operands = here(draw(1, 3, 4, 3))
    query, key, value, weight, bias, small, large = operands.values()
    filters = (key.flatten(2).unflatten(1, (2, -1)) @ weight.T).detach()
    torch.library.opcheck(
        torch.ops.mmoverlock.contmix.default,
        (query, filters.requires_grad_(), bias, small, large, value),
    )


@triton.jit
def _write_offsets(out, strides):
    at = tl.arange(0, 4)
    to = contmix_triton._at(at, at, at, (0, 1, 16, 4))
    tl.store(out + to, contmix_triton._at(at, at, at, strides))


def test_offsets_have_64_bits():
    """Even if indices and strides have 32."""
    strides = 0, 2**30 + 1, 2**30 + 2, 2**30 + 4
    offsets = torch.empty(64, dtype=torch.int64, device=DEVICE)
    _write_offsets[(1,)](offsets, strides)
    assert offsets.tolist() == [
        y * strides[2] + x * strides[3] + channel * strides[1]
        for y in range(4)
        for x in range(4)
        for channel in range(4)
    ]


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmoverlock.ops.dynamic_conv import triton as module

arch, values, queries = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sizes = dict(
    FIRST=25, K=13, ROWS=module.ROWS, COLS=module.COLS, PIXELS=module.PIXELS,
    TAPS=16, REGION=32, SPAN=32, QC=16, VC=16, UPCAST=False,
)
dtypes = dict.fromkeys(['value', 'out', 'grad', 'grad_value'], '*' + values)
dtypes['query'] = '*' + queries
for name in ('filters', 'bias', 'table', 'lse'):
    dtypes[name] = dtypes['grad_' + name] = '*fp32'
dtypes['grad_query'] = '*fp32'
for kernel in sys.argv[4:]:
    kernel = getattr(module, kernel)
    signature, constants, divisible = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in sizes:
            constants[name] = sizes[name]
            signature[name] = 'constexpr'
        elif name.endswith('strides'):  # channels_last
            signature[name] = 'i32', 'constexpr', 'i32', 'i32'
            constants[i, 1] = 1
            divisible |= {(i, j): [['tt.divisibility', 16]] for j in (0, 2, 3)}
        else:
            signature[name] = dtypes.get(name, 'i32')
            if name in dtypes or name.endswith('channels'):
                divisible[i,] = [['tt.divisibility', 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, divisible),
        target=GPUTarget('cuda', arch, 32),
        options=dict(num_warps=module.ROWS),
    )
    print(len(compiled.asm['cubin']), compiled.metadata.shared)
"""
KERNELS = '_forward', '_backward_positions', '_backward_pixels'


def compile_for(tmp_path, arch, values, queries):
    """Shared memory of the kernels, compiled with no GPU there."""
    run = subprocess.run(
        [sys.executable, '-c', COMPILE, str(arch), values, queries, *KERNELS],
        env={
            **os.environ,
            'TRITON_INTERPRET': '0',
            'TRITON_CACHE_DIR': str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    sizes = [line.split() for line in run.stdout.splitlines()]
    assert len(sizes) == len(KERNELS)
    return [int(shared) for _, shared in sizes]


@pytest.mark.parametrize(
    'arch, values, queries',
    [
        (90, 'bf16', 'bf16'),
        *(
            pytest.param(arch, *formats, marks=pytest.mark.slow)
            for arch in (80, 90)
            for formats in (('fp32', 'fp32'), ('fp16', 'fp16'))
        ),
        pytest.param(80, 'bf16', 'bf16', marks=pytest.mark.slow),
    ],
)
def test_compiles_for_gpus(tmp_path, arch, values, queries):
    """The interpreter takes what the compiler does not."""
    shared = compile_for(tmp_path, arch, values, queries)
    assert max(shared) <= 99 * 1024  # what the smallest of these GPUs has


def test_ops_do_not_need_triton():
    code = "import sys; sys.modules['triton'] = None; import mmoverlock.models"
    subprocess.run([sys.executable, '-c', code], check=True)


def test_missing_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)
    with pytest.raises(ImportError, match='needs triton 3.6 or later.*cannot'):
        resolve_backend('triton')
    assert resolve_backend('auto') == 'tiled'


def test_old_triton(monkeypatch):
    monkeypatch.setattr(triton, '__version__', '3.5.1')
    with pytest.raises(ImportError, match='this is triton 3.5.1 with torch'):
        resolve_backend('triton')


def test_cpu(monkeypatch):
    monkeypatch.setattr(contmix_triton, 'INTERPRET', False)
    with pytest.raises(ValueError, match="'triton' needs a GPU"):
        call(draw(1, 3, 4, 3), 'triton')
