"""``OverLoCK(cuda_graphs=True)``: passes that a GPU replays.

Without a GPU, a recording runs its function again and writes the results
where the first ones are, which is what a graph does to them.
"""

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext
from functools import partial

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
STEP = ['run', 'differentiate']  # of a recording
built = weakref.WeakSet()  # models


@pytest.fixture
def replays(monkeypatch):
    """Passes that were replayed, forward and backward, as they come."""
    calls = []
    for name in STEP:
        run = getattr(graphs.Recording, name)

        def counted(*args, name=name, run=run):
            calls.append(name)
            return run(*args)

        monkeypatch.setattr(graphs.Recording, name, counted)
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
    """Steps of an optimizer, with equal drops; all outputs.

    Images, which the network takes as they lie in memory, stay as they are.
    """
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    images, results = {}, []
    for step in range(steps):
        for i, shape in enumerate(shapes):
            seed = 10 * step + i
            x = draw(seed, shape).contiguous(memory_format=torch.channels_last)
            images[seed] = x
            with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
                outs = model(x)
            optimizer.zero_grad()
            loss_of(outs).backward()
            optimizer.step()
            results.append(outs)
    for seed, x in images.items():
        assert torch.equal(x, draw(seed, x.shape))
    return results


def gradients_of(model, *seeds):
    """Those of several images, added up."""
    model.zero_grad()
    for seed in seeds:
        loss_of(model(draw(seed))).backward()
    return [p.grad for p in model.parameters()]


def assert_same(models, run=train, **limits):
    """A function returns the same of both models, and leaves them the same."""
    torch.testing.assert_close(*map(run, models), **limits)
    states = (model.state_dict() for model in models)
    torch.testing.assert_close(*states, **limits)


@pytest.fixture
def recorded(replays):
    """A model that replays steps on images of SIZE, and one that does not."""
    models = build(), build(False)
    assert_same(models)
    replays.clear()
    return models


@pytest.mark.parametrize(
    'options, settings',
    [
        ({}, dict(shapes=(SIZE, OTHER))),
        ({}, dict(lr=0.1, half=True)),  # which keeps casts of weights
        (dict(drop_path_rate=0.5), {}),
        (dict(frozen_stages=2, norm_eval=True), {}),
    ],
)
def test_training(replays, options, settings):
    models = build(**options), build(False, **options)

    def run(model):
        if 'frozen_stages' in options:  # no gradients of these, either
            model.extra_norm['0'].requires_grad_(False)
            model.unused = nn.PReLU().to(DEVICE)
            del model.blocks4[-1]
        outs = train(model, **settings)
        grads = [p.grad is None for p in model.parameters()]
        return outs, grads, [[x.requires_grad for x in xs] for xs in outs]

    if 'drop_path_rate' in options and ON_GPU:
        run(models[0])  # a graph draws other numbers
    else:
        limits = dict(rtol=0.02, atol=0.02) if 'half' in settings else {}
        assert_same(models, run, **limits)
    assert replays == STEP * (6 if 'shapes' in settings else 3)


def test_inference(replays):
    """Of a fused model, and of as many sizes as are wanted."""
    models = fuse(build(1)), fuse(build(False))

    @torch.inference_mode()
    def run(model):
        return [model(draw(i, s)) for s in (SIZE, OTHER) for i in range(STEPS)]

    assert_same(models, run)
    assert replays == ['run'] * 3


def test_gradients_add_up(recorded, replays):
    """And what a pass has returned stays as it is."""
    model, _ = recorded
    outs = model(draw(4))
    grads = torch.autograd.grad(loss_of(outs), [*model.parameters()])
    kept = [t.clone() for t in (*outs, *grads)]
    recorded[1](draw(4))  # whose norms see it as well
    assert_same(recorded, lambda each: gradients_of(each, 1, 2, 3))
    assert replays == STEP * 4
    torch.testing.assert_close([*outs, *grads], kept, rtol=0, atol=0)


def test_two_passes_before_a_backward(recorded, replays):
    """The first is replayed; the second runs as it is."""

    def run(model):
        outs = model(draw(1)), model(draw(2))
        model.zero_grad()
        loss_of(outs[0] + outs[1]).backward()
        with torch.no_grad():  # of a teacher, say
            return model(draw(1)), [p.grad for p in model.parameters()]

    assert_same(recorded, run)
    assert replays == STEP
    model, _ = recorded
    model(draw(1))  # and is given up
    gradients_of(model, 2)
    assert replays == [*STEP, 'run', *STEP]


def test_passes_without_backward(replays):
    """Their kernels for gradients may not be compiled yet."""
    models = build(), build(False)
    assert_same(models, lambda each: [each(draw(i)) for i in range(STEPS)])
    assert not replays

    def run(model):
        for i in range(WARM_UPS + 1):  # of an output that is not the last
            model(draw(i))[0].sum().backward()
        grads = [p.grad for p in model.parameters()]
        # Layers behind it have a gradient of zero from a recording.
        return [0.0 if g is None else g.norm().item() for g in grads]

    assert_same(models, run)
    assert replays == STEP


def test_wrong_backward_passes(recorded):
    """One that comes twice, or when a parameter has changed."""
    model, _ = recorded
    loss = loss_of(model(draw(1)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='cuda_graphs=False'):
        loss.backward()
    loss = loss_of(model(draw(1)))
    with torch.no_grad():
        model.extra_norm['0'].weight += 1
    with pytest.raises(RuntimeError, match='inplace operation'):
        loss.backward()


def change(model):
    """Change one thing after the other; yield its name."""
    model.load_state_dict({k: 0.9 * v for k, v in model.state_dict().items()})
    yield 'values'
    norm = model.extra_norm['0']
    norm.weight = nn.Parameter(norm.weight.data)
    yield 'parameter'
    weights = [p for p in model.parameters() if p.ndim == 4]
    weight = next(p for p in weights if p.shape[0] == p.shape[1] > 1)
    weight.data = weight.data.transpose(0, 1)
    yield 'strides'
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    yield 'memory'
    norm = model.patch_embed1[1]
    norm.running_var = norm.running_var + 1
    yield 'buffer'
    norm.momentum = 0.5
    yield 'momentum'
    model.blocks1.requires_grad_(False)
    yield 'frozen'
    model.patch_embed1[2] = nn.ReLU()
    yield 'kind of a layer'
    model.out_indices = 2, 3
    yield 'setting'
    norm.eval()
    yield 'mode'
    if not ON_GPU:  # where a graph draws other numbers
        model.train()
        for part in model.modules():
            if isinstance(part, DropPath):
                part.drop_prob = 0.5
        yield 'rate'


def test_changes(recorded, replays):
    """Recordings of other parameters and settings are not replayed."""
    for changed, _ in zip(*map(change, recorded), strict=True):
        assert_same(recorded)
        assert replays == STEP * (STEPS if changed == 'values' else 3), changed
        replays.clear()


def test_parts_that_are_not_recorded(recorded, replays):
    """Those with hooks, which are called, and with norms of many processes."""
    model, _ = recorded
    norm = model.extra_norm['3']
    for register in (
        norm.register_forward_pre_hook,
        norm.register_full_backward_hook,
    ):
        calls = []
        handle = register(lambda *_, calls=calls: calls.append(1))
        gradients_of(model, 1)
        assert calls and not replays
        handle.remove()
        gradients_of(model, 1)
        assert replays == STEP
        replays.clear()
    model.extra = nn.SyncBatchNorm(2).to(DEVICE)
    train(model)
    assert not replays
    model.extra.eval()  # with fixed statistics
    train(model)
    assert replays == STEP * 3


def test_passes_that_are_not_replayed(recorded, replays):
    """As more than values is asked of them."""

    def run(model):
        x = draw(1).requires_grad_()
        loss_of(model(x)).backward()
        return x.grad

    assert_same(recorded, run)
    model, _ = recorded
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


@pytest.mark.parametrize('failing', [1, 2])  # forward, backward
def test_what_cannot_be_recorded(replays, monkeypatch, failing):
    """Is tried once, and said once."""
    calls, said = [], []
    run = graphs.record

    def fail(*args):
        calls.append(args)
        if len(calls) == failing:
            raise AttributeError('operation not permitted')
        return run(*args)

    monkeypatch.setattr(graphs, 'record', fail)
    monkeypatch.setattr(
        graphs, 'print_log', lambda text, **_: said.append(text)
    )
    models = build(), build(False)
    assert_same(models, partial(train, shapes=(SIZE, OTHER)))
    text = 'There are no CUDA graphs: AttributeError: operation not permitted'
    assert said == [text] and not replays and len(calls) == failing


def test_memory_is_released(replays, monkeypatch):
    """With a model, without a search for garbage."""
    if not ON_GPU:  # where what runs again is kept
        monkeypatch.setattr(graphs, 'record', lambda f, *_: (bool, f()))
    train(model := build())
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


def test_copies(recorded, replays):
    """They have recordings of their own."""
    model, _ = recorded
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        gradients_of(each, 1)
        assert not replays and each.graphs.most == graphs.MOST
        train(each)
        assert replays.count('run') == 4
        replays.clear()


def test_ddp(replays, process_group):
    model, plain = build(), build(False)
    wrapped = DistributedDataParallel(model)
    assert_same((model, plain), lambda m: train(wrapped if m is model else m))
    assert replays == STEP * 3


@pytest.mark.skipif(ON_GPU, reason='for machines without a GPU')
def test_cpu(recorded, replays, monkeypatch):
    """A model that is moved there trains as any, without recordings."""
    monkeypatch.undo()
    assert_same(recorded)
    assert not recorded[0].graphs._recordings and not replays
