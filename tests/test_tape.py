"""Functions that run from tapes, with operators of PyTorch alone.

Blocks, their kernels and their exchanges do so in tests of their own.
"""

import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize('function', [views, statistics])
def test_same_results(function, play):
    for i in range(5):
        torch.manual_seed(i)
        x, weight = torch.randn(2, 4, 3, 5), torch.randn(3, 4)
        results, runs = play(function, x, weight)
        assert runs == min(i + 1, 2)
        expected = function(x, weight)
        torch.testing.assert_close(results, expected, rtol=0, atol=0)
        for result, other in zip(results, expected, strict=True):
            if result is not None:
                assert result.stride() == other.stride()
    assert any(result is x or result is weight for result in results)


def test_operands_that_start_elsewhere(play):
    """In their memory, as parts of others do."""

    def halves(x):
        return [x[2:] + x[:2], x[2:]]

    memory = torch.arange(12.0)
    for start in (0, 4, 8):
        for _ in range(3):
            (total, half), _ = play(halves, memory[start : start + 4])
        assert total.tolist() == [2 * start + 2, 2 * start + 4]
        assert half.tolist() == [start + 2, start + 3]


@pytest.mark.parametrize(
    'change',
    [
        lambda x: x[:1],
        lambda x: x.double(),
        lambda x: torch.cat([x[:1], x])[1:],  # not as aligned
        lambda x: (x, 1),
        lambda x: [x],
    ],
)
def test_other_operands_have_other_tapes(change, play):
    """By sizes, dtypes, alignment, numbers and whatever else there is."""

    def double(x, *_):
        return [2 * (x[0] if isinstance(x, list) else x)]

    x = torch.randn(2, 3)
    for _ in range(3):
        play(double, x)
    changed = change(x)
    operands = changed if isinstance(changed, tuple) else (changed,)
    _, runs = play(double, *operands)
    assert runs == 3


def test_autocast(play):
    """What it casts is cast, what it is kept from is not."""

    def products(x):
        with torch.autocast('cpu', enabled=False):
            exact = x @ x
        return [exact, x @ x]

    for _ in range(3):
        with torch.autocast('cpu', torch.bfloat16):
            (exact, rounded), runs = play(products, torch.randn(4, 4))
        assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert runs == 2
    for dtype in (torch.float32, torch.float16):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            (exact, rounded), runs = play(products, torch.randn(4, 4))
        assert rounded.dtype == dtype


@torch.inference_mode()
def test_copies_in_inference_mode(play):
    """There, operators that may copy are not taken apart."""

    def copies(x):
        return [x.mT.contiguous(), x.mT.reshape(-1), x.reshape(-1)]

    for i in range(4):
        x = torch.arange(6.0).view(2, 3) + i
        results, runs = play(copies, x)
        torch.testing.assert_close(results, copies(x), rtol=0, atol=0)
    assert runs == 2


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


def test_memory_like_operands(play):
    """Has their strides, along sides of 1 too."""

    def copy(x):
        return [torch.empty_like(x).copy_(x), torch.empty_like(x).double()]

    x = torch.randn(4, 1, 3, 2)
    for step in (6, 1, 7, 7):
        operand = x.as_strided(x.shape, (6, step, 2, 1))
        (like, _), runs = play(copy, operand)
        assert like.stride() == torch.empty_like(operand).stride()
        torch.testing.assert_close(like, x, rtol=0, atol=0)
    assert runs == 2


def test_how_many(play, monkeypatch):
    """Are recorded; the others run as they are."""
    monkeypatch.setattr(tape, 'MAX_TAPES', 1)
    for expected in ([1, 2, 2], [1, 2, 3]):
        runs = [play(f, torch.ones(3))[1] for f in [lambda x: [x + 1]] * 3]
        assert runs == expected


def test_none_within_a_mode(play):
    """Whoever watches operators sees all of them."""
    from torch.utils.flop_counter import FlopCounterMode

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
    for runs, operands in enumerate([(x, x), (x, x), (y, y)], 1):
        (out,), count = play(difference, *operands)
        assert count == min(runs, 2)
        assert out.tolist() == 3 * [-operands[0][0]]
    for runs, operands in enumerate([(x, y), (y, x), (x, y), (x, x)], 3):
        (out,), count = play(difference, *operands)
        assert count == min(runs, 4)
        assert torch.equal(out, *difference(*operands))


@pytest.mark.parametrize(
    'pattern, other',
    [
        (lambda x: (x, None), lambda x: (None, x)),
        (lambda x: (x, 1), lambda x: (1, x)),
        (lambda x: ([x], x), lambda x: (x, [x])),
    ],
)
def test_keys_tell_where_tensors_are(pattern, other):
    x = torch.ones(3)
    assert tape.describe(pattern(x))[1] != tape.describe(other(x))[1]


def test_how_many_numbers(monkeypatch):
    """Of keys are given; others stand for themselves."""
    monkeypatch.setattr(tape, 'MAX_TAPES', len(tape._numbers) + 1)
    keys = [(object(),) for _ in range(3)]
    numbers = [tape.number(key) for key in keys]
    assert numbers[1:] == keys[1:]
    assert [tape.number(key) for key in keys] == numbers
