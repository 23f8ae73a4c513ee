"""``OverLoCK(cuda_graphs=True)``: passes that a GPU replays.

Without a GPU, a recording runs its function again and writes the results
where the first ones are, which is what a graph does to them.
"""

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext

import pytest
import tiny
import torch
from networks import backbone, loss_of, noise
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel

from mmoverlock.models import graphs
from mmoverlock.models.fuse import fuse
from mmoverlock.models.layers import DropPath

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
ARCH = dict(tiny.ARCH, kernel_sizes=(5, 5, 5, 5))
SIZE, OTHER = (2, 3, 48, 48), (2, 3, 48, 80)
WARM_UPS = graphs.WARM_UPS if ON_GPU else 1
STEPS = WARM_UPS + 3
built = weakref.WeakSet()  # models


@pytest.fixture
def replays(monkeypatch):
    """Passes that were replayed, forward and backward, as they come."""
    calls = []

    def count(name):
        run = getattr(graphs.Recording, name)

        def counted(recording, *args):
            calls.append(name)
            return run(recording, *args)

        monkeypatch.setattr(graphs.Recording, name, counted)

    count('run')
    count('differentiate')
    if not ON_GPU:
        monkeypatch.setattr(graphs, 'record', record)
        monkeypatch.setattr(graphs, 'WARM_UPS', WARM_UPS)
        for name in ('graph_pool_handle', 'device', 'Stream'):
            monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
        monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', bool)
        monkeypatch.setattr(graphs, 'is_on_gpu', lambda x: True)
        monkeypatch.setattr(
            torch.cuda.amp.common, 'amp_definitely_not_available', bool
        )
    return calls


def record(function, pool, stream):
    """In place of :func:`mmoverlock.models.graphs.record`."""
    buffers = [buffer for model in built for buffer in model.buffers()]
    kept = [b.clone() for b in buffers]
    with torch.random.fork_rng():
        results = function()
    for buffer, value in zip(buffers, kept, strict=True):
        buffer.data.copy_(value)  # a recording computes nothing

    is_grad_enabled = torch.is_grad_enabled()

    def replay():
        with torch.set_grad_enabled(is_grad_enabled):
            news = function()
        for old, new in zip(results, news, strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)

    return replay, results


def build(cuda_graphs=True, **options):
    model = backbone(ARCH, cuda_graphs=cuda_graphs, **options)
    built.add(model)
    return model.to(DEVICE)


def draw(seed, shape=SIZE):
    return noise(*shape, seed=seed).to(DEVICE)


def train(model, steps=STEPS, shapes=(SIZE,), lr=1e-3, half=False):
    """Steps of an optimizer; all outputs."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    results = []
    for step in range(steps):
        for i, shape in enumerate(shapes):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
                outs = model(draw(10 * step + i, shape))
            optimizer.zero_grad()
            loss_of(outs).backward()
            optimizer.step()
            results.append(outs)
    return results


def check_same(model, other):
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def recorded(**options):
    """A model that replays steps on images of SIZE, and one that does not."""
    model, plain = build(**options), build(False, **options)
    for each in (model, plain):
        torch.manual_seed(0)
        train(each)
    return model, plain


def backward_passes(model, *seeds):
    """Gradients, added up."""
    for seed in seeds:
        loss_of(model(draw(seed))).backward()
    return [p.grad for p in model.parameters()]


def take_out(model):
    """A block, and have a parameter that has no gradient."""
    del model.blocks4[-1]
    model.unused = nn.PReLU().to(DEVICE)


@pytest.mark.parametrize(
    'shapes, options, change',
    [
        ((SIZE, OTHER), {}, bool),
        ((SIZE,), dict(drop_path_rate=0.5), bool),
        ((SIZE,), dict(classifier=True), bool),
        ((SIZE,), {}, take_out),
        (
            *((SIZE,), dict(frozen_stages=2, norm_eval=True)),
            # And the output behind them
            lambda model: model.extra_norm['0'].requires_grad_(False),
        ),
    ],
)
def test_training(replays, shapes, options, change):
    model, plain = build(**options), build(False, **options)
    results = []
    for each in (model, plain):
        change(each)
        torch.manual_seed(1)
        results.append(train(each, shapes=shapes))
    assert replays == ['run', 'differentiate'] * 3 * len(shapes)
    for outs, others in zip(*results, strict=True):
        for out, other in zip(outs, others, strict=True):
            assert out.requires_grad == other.requires_grad
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
    if options.get('drop_path_rate') and ON_GPU:
        return  # a graph draws other numbers
    torch.testing.assert_close(*results)
    check_same(model, plain)


def test_inference(replays):
    model, plain = fuse(build()), fuse(build(False))
    with torch.inference_mode():
        for i in range(STEPS):
            torch.testing.assert_close(model(draw(i)), plain(draw(i)))
    assert replays == ['run'] * 3


def test_training_with_validation(replays):
    model, plain = recorded()
    replays.clear()
    results = []
    for each in (model, plain):
        outs = []
        for i in range(STEPS):
            with torch.no_grad():
                outs.append(each.eval()(draw(i)))
            train(each.train(), 1)
        results.append(outs)
    torch.testing.assert_close(*results)
    check_same(model, plain)
    validated = ['run', 'run', 'differentiate'] * 3
    assert replays == ['run', 'differentiate'] * WARM_UPS + validated


def test_autocast(replays):
    """Casts of weights that autocast keeps are not what is replayed."""
    results = [train(m, lr=0.1, half=True) for m in (build(), build(False))]
    assert len(replays) == 6
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_gradients_add_up(replays):
    """And what a pass has returned stays as it is."""
    model, plain = recorded()
    outs = model(draw(4))
    grads = torch.autograd.grad(loss_of(outs), [*model.parameters()])
    kept = [t.clone() for t in (*outs, *grads)]
    replays.clear()
    actual, expected = (backward_passes(m, 1, 2, 3) for m in (model, plain))
    assert replays == ['run', 'differentiate'] * 3
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close([*outs, *grads], kept, rtol=0, atol=0)


def test_outputs_that_no_loss_takes(replays):
    model, plain = recorded()
    for each in (model, plain):
        each(draw(1))[1].sum().backward()
    assert replays[6:] == ['run', 'differentiate']
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        expected = torch.zeros_like(q) if q.grad is None else q.grad
        torch.testing.assert_close(p.grad, expected)


def test_two_passes_before_a_backward(replays):
    """The first is replayed; the second runs as it is, and says so."""
    model, plain = recorded()
    replays.clear()
    results = []
    for each in (model, plain):
        outs = each(draw(1)), each(draw(2))
        loss_of(outs[0] + outs[1]).backward()
        results.append([p.grad for p in each.parameters()])
    assert replays == ['run', 'differentiate']
    torch.testing.assert_close(*results)
    with torch.no_grad():  # of a teacher, say
        outs = model(draw(1)), plain(draw(1))
    torch.testing.assert_close(*outs)
    replays.clear()
    model(draw(1))  # and is given up
    backward_passes(model, 2)
    assert replays == ['run', 'run', 'differentiate']


def test_images_stay(replays):
    model, _ = recorded()
    model.graphs._forget()
    images = [draw(i).to(memory_format=torch.channels_last) for i in range(9)]
    for x in images:
        loss_of(model(x)).backward()
    assert replays[-1] == 'differentiate'
    for i, x in enumerate(images):
        assert torch.equal(x, draw(i))


def test_passes_without_backward(replays):
    """Their kernels for gradients may not be compiled yet."""
    model = build()
    for i in range(STEPS):
        model(draw(i))
    assert not replays
    for i in range(WARM_UPS + 1):  # of an output that is not the last
        model(draw(i))[0].sum().backward()
    assert replays == ['run', 'differentiate']


def test_wrong_backward_passes(replays):
    """One that comes twice, or when a parameter has changed."""
    model, _ = recorded()
    loss = loss_of(model(draw(1)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='cuda_graphs=False'):
        loss.backward()
    loss = loss_of(model(draw(1)))
    with torch.no_grad():
        model.extra_norm['0'].weight += 1
    with pytest.raises(RuntimeError, match='inplace operation'):
        loss.backward()


def wrap(model):
    norm = model.extra_norm['0']
    norm.weight = nn.Parameter(norm.weight.data)


def transpose(model):
    weights = [p for p in model.parameters() if p.ndim == 4]
    weight = next(p for p in weights if p.shape[0] == p.shape[1] > 1)
    weight.data = weight.data.transpose(0, 1)


def move(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def drop(model):
    for part in model.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.5


def load(model):
    model.load_state_dict({k: 0.9 * v for k, v in model.state_dict().items()})


SAME = (
    load,
    lambda model: model.extra_norm['0'].register_buffer('other', None),
)
OTHERS = (
    *(wrap, transpose, move),
    lambda model: model.blocks1.requires_grad_(False),
    lambda model: model.patch_embed1[1].register_buffer(
        'running_var', model.patch_embed1[1].running_var + 1
    ),
    lambda model: setattr(model.patch_embed2[1], 'momentum', 0.5),
    lambda model: setattr(model.patch_embed1, '2', nn.ReLU()),
    lambda model: setattr(model, 'out_indices', (2, 3)),
    drop,  # the last, as a graph draws other numbers
)


def test_changes(replays):
    """Recordings of other parameters and settings are not replayed."""
    model, plain = recorded()
    for i, change in enumerate((*SAME, *OTHERS)):
        replays.clear()
        for each in (model, plain):
            change(each)
            torch.manual_seed(0)
            train(each)
        steps = STEPS if change in SAME else 3
        assert replays == ['run', 'differentiate'] * steps, i
        if change is not drop or not ON_GPU:
            check_same(model, plain)


def test_hooks_are_called(replays):
    model, _ = recorded()
    norm = model.extra_norm['3']
    for register in (
        norm.register_forward_hook,
        norm.register_forward_pre_hook,
        norm.register_full_backward_hook,
    ):
        calls = []
        handle = register(lambda *_, calls=calls: calls.append(1))
        replays.clear()
        backward_passes(model, 1)
        assert calls and not replays
        handle.remove()
        backward_passes(model, 1)
        assert replays


def test_what_runs_as_it_is(replays):
    model, plain = recorded()
    replays.clear()
    x, y = draw(1).requires_grad_(), draw(1).requires_grad_()
    loss_of(model(x)).backward()
    loss_of(plain(y)).backward()
    torch.testing.assert_close(x.grad, y.grad)
    with torch.autograd.detect_anomaly(check_nan=False):
        model(draw(1))
    with torch.autograd.graph.save_on_cpu():
        model(draw(1))
    with torch.no_grad(), forward_ad.dual_level():
        model.eval()(draw(1))
    handle = register_module_forward_hook(lambda *_: None)
    model(draw(1))
    handle.remove()
    torch.jit.trace(model.eval(), draw(1), check_trace=False)
    assert not replays


def test_sync_bn(replays):
    model = build(norm_cfg=dict(type='SyncBN')).eval()
    train(model)  # its norms have fixed statistics
    assert len(replays) == 6
    model.extra = nn.SyncBatchNorm(2)
    replays.clear()
    train(model)
    assert not replays


def test_number_of_sizes(replays):
    model = build(1)
    train(model, shapes=(SIZE, OTHER))
    assert len(replays) == 6


@pytest.mark.parametrize('failing', [1, 2])  # forward, backward
def test_what_cannot_be_recorded(replays, monkeypatch, failing):
    calls = []
    run = graphs.record

    def fail(*args):
        calls.append(args)
        if len(calls) == failing:
            raise AttributeError('operation not permitted')
        return run(*args)

    monkeypatch.setattr(graphs, 'record', fail)
    said = []
    monkeypatch.setattr(
        graphs, 'print_log', lambda text, **_: said.append(text)
    )
    model, plain = recorded()
    train(model, shapes=(OTHER,))
    train(plain, shapes=(OTHER,))
    check_same(model, plain)
    text = 'There are no CUDA graphs: AttributeError: operation not permitted'
    assert said == [text] and not replays and len(calls) == failing


def test_memory_is_released(replays, monkeypatch):
    """With a model, without a search for garbage."""
    if not ON_GPU:  # where what runs again is kept
        monkeypatch.setattr(graphs, 'record', lambda f, *_: (bool, f()))
    model, _ = recorded()
    (recording,) = model.graphs._recordings.values()
    recording = weakref.ref(recording)
    weight = weakref.ref(model.patch_embed1[0].weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None and recording() is None
    finally:
        gc.enable()


def test_move_away(replays, monkeypatch):
    model, _ = recorded()
    monkeypatch.setattr(graphs, 'is_on_gpu', lambda x: False)
    model(draw(1))
    assert not model.graphs._recordings


def test_copies(replays):
    model, plain = recorded()
    replays.clear()
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        each.zero_grad()
        backward_passes(each, 1)
        assert not replays and each.graphs.most == graphs.MOST
        train(each)
        assert replays.count('run') == 4
        replays.clear()


def test_ddp(replays, process_group):
    model, plain = build(), build(False)
    train(DistributedDataParallel(model))
    train(plain)
    assert len(replays) == 6
    check_same(model, plain)


@pytest.mark.skipif(ON_GPU, reason='for machines without a GPU')
def test_cpu():
    """The same config trains on a CPU."""
    check_same(*recorded())
