"""Functions that run from tapes, with operators of PyTorch alone.

Blocks, their kernels and their exchanges do so in tests of their own.
"""

import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmoverlock.ops.environment import recorder

tape = pytest.importorskip('mmoverlock.ops.tape', exc_type=ImportError)


@pytest.fixture
def play(monkeypatch):
    """Plays a function of operands; how often it ran so far."""
    monkeypatch.setattr(tape, '_tapes', {})
    monkeypatch.setattr(tape, '_runs', Counter())
    monkeypatch.setattr(tape, 'MIN_RUNS', 2)
    runs = Counter()

    @torch.no_grad()
    def play(function, *operands):
        def run():
            runs[function] += 1
            return function(*operands), 'facts'

        tensors, key = tape.describe(operands)
        results, facts = tape.play(run, tensors, (function, *key))
        assert facts == 'facts'
        return results, runs[function]

    return play


def views(x, weight):
    """Of an operand, of memory and of a result, some of them changed."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    out = rows.new_empty(2, len(rows), 3)
    first, second = out.unbind()
    first.addmm_(rows, weight.mT, beta=0)
    second.copy_(first.flip(1)[:, ::2].repeat(1, 2)[:, 1:])
    second += rows[1:2, :3].double().float()
    return [out, second.view(torch.int32), None, x, torch.cat([first, second])]


def statistics(x, weight):
    """Several results, of which some are not read."""
    y, mean, _ = torch.native_batch_norm(
        x, None, None, None, None, True, 0.1, eps=1e-5
    )
    torch._foreach_mul_([y, mean], [2.0, 3.0])
    return [y, mean, weight]


def copies(x):
    """By operators that inference mode does not take apart."""
    return [x.mT.contiguous(), x.mT.reshape(-1), x.reshape(-1)]


def likes(x):
    """In memory of an operand's strides."""
    return [
        torch.empty_like(x).copy_(x),
        torch.empty_like(x, dtype=torch.double).copy_(x),
    ]


MEMORY = torch.arange(40.0)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    'function, draw',
    [
        (views, lambda i: (torch.randn(2, 4, 3, 5), torch.randn(3, 4))),
        (statistics, lambda i: (torch.randn(2, 4, 3, 5), torch.randn(3, 4))),
        (copies, lambda i: (torch.randn(2, 3),)),
        # Parts of a memory
        (lambda x: [x[2:] + x[:2], x[2:]], lambda i: (MEMORY[4 * i :][:4],)),
        # Strides along sides of 1
        (likes, lambda i: (MEMORY.as_strided((4, 1, 3, 2), (6, i, 2, 1)),)),
    ],
)
def test_same_results(function, draw, mode, play):
    """And strides; a tape is recorded in the second run."""
    with mode():
        for i in range(6):
            torch.manual_seed(i)
            operands = draw(i)
            results, runs = play(function, *operands)
            assert runs == min(i + 1, 2)
            expected = function(*operands)
            torch.testing.assert_close(results, expected, rtol=0, atol=0)
            for result, other in zip(results, expected, strict=True):
                if result is not None:
                    assert result.stride() == other.stride()
                    is_one = [result is operand for operand in operands]
                    assert is_one == [other is operand for operand in operands]


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    'one, other',
    [
        ((X,), (X[:1],)),
        ((X,), (X.double(),)),
        ((X,), (torch.cat([X[:1], X])[1:],)),  # not as aligned
        ((X,), (X, 1)),
        ((X,), ([X],)),
        ((X, None), (None, X)),
        ((X, 1), (1, X)),
        (([X], X), (X, [X])),
    ],
)
def test_other_operands_have_other_tapes(one, other):
    """By sizes, dtypes, alignment, numbers, and where tensors are."""
    assert tape.describe(one)[1] != tape.describe(other)[1]


def test_autocast(play):
    """A tape casts as autocast does, and nothing where that is off."""

    def products(x):
        with torch.autocast('cpu', enabled=False):
            exact = x @ x
        return [exact, x @ x]

    for dtype, expected in (
        *[(torch.bfloat16, 1), (torch.bfloat16, 2), (torch.bfloat16, 2)],
        *[(torch.float16, 3), (torch.float32, 4)],
    ):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            (exact, rounded), runs = play(products, torch.randn(4, 4))
        assert (exact.dtype, rounded.dtype) == (torch.float32, dtype)
        assert runs == expected


HIDDEN = torch.ones(3)


@torch.library.custom_op('tests::twice', mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


def not_compiled(x):
    if recorder() is not None:
        recorder().launch(None, (x,))
    return [x + 1]


@pytest.mark.parametrize(
    'function',
    [
        not_compiled,
        lambda x: [x + HIDDEN],
        lambda x: [x * x.sum().item()],
        lambda x: [twice(x)],
    ],
)
def test_what_is_never_recorded(function, play):
    """Unknown launches, tensors and operators, and numbers that are read."""
    for i in range(5):
        (out,), runs = play(function, x := torch.randn(3))
        assert runs == i + 1
        torch.testing.assert_close([out], function(x))


def test_memory_is_given_back(play, monkeypatch):
    """Behind the last step that reads it; what nobody reads is not taken."""
    made = []
    empty_strided = torch.empty_strided

    def allocate(*args, **kwargs):
        assert not any(reference() is not None for reference in made)
        out = empty_strided(*args, **kwargs)
        made.append(weakref.ref(out))
        return out

    def chain(x):
        for _ in range(2):
            y = x.new_empty(x.shape)
            x = y.copy_(x).view(-1).sum()[None]
            torch.empty_like(y)
        z = torch.empty_like(x)
        z.copy_(x)  # from which its memory comes, as a result
        del z
        y = torch.empty_like(x)
        return [y.copy_(x) + 0]

    monkeypatch.setattr(torch, 'empty_strided', allocate)
    for _ in range(3):
        (out,), _ = play(chain, torch.ones(5))
    assert out == 5
    assert len(made) == 4


def test_how_many(play, monkeypatch):
    """Are recorded; others run as they are, and keys stand for themselves."""
    monkeypatch.setattr(tape, 'MAX_TAPES', 1)
    for expected in ([1, 2, 2], [1, 2, 3]):
        runs = [play(f, torch.ones(3))[1] for f in [lambda x: [x + 1]] * 3]
        assert runs == expected
    monkeypatch.setattr(tape, 'MAX_TAPES', len(tape._numbers) + 1)
    keys = [(object(),) for _ in range(3)]
    numbers = [tape.number(key) for key in keys]
    assert numbers[1:] == keys[1:]
    assert [tape.number(key) for key in keys] == numbers


def test_none_within_a_mode(play):
    """Whoever watches operators sees all of them."""

    def product(x):
        return [x @ x]

    for _ in range(3):
        play(product, torch.ones(3, 3))
    with FlopCounterMode(display=False) as mode:
        _, runs = play(product, torch.ones(3, 3))
    assert (runs, mode.get_total_flops()) == (3, 54)


def test_operands_that_are_one_tensor(play):
    """They read as one, so a tape is not for others; that of others is."""

    def difference(x, y):
        return [x - 2 * y]

    x, y = torch.ones(3), torch.full((3,), 5.0)
    for operands, runs in (
        *[((x, x), 1), ((x, x), 2), ((y, y), 2)],
        *[((x, y), 3), ((y, x), 4), ((x, y), 4), ((x, x), 4)],
    ):
        (out,), count = play(difference, *operands)
        assert count == runs
        assert torch.equal(out, *difference(*operands))
