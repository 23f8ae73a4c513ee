"""The classifiers: parity with the release, losses, recipe and a real run."""

import golden
import pytest
import torch
from mmengine.config import Config
from tiny import ARCH as TINY
from tiny import HALF_FORMATS, ROOT, run_tool

from mmoverlock.models import OverLoCK

pytest.importorskip('mmpretrain')

from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from mmoverlock.models.classification import OverLoCKClsHead

CONFIGS = ROOT / 'configs' / 'imagenet'


def config(arch):
    return Config.fromfile(CONFIGS / f'overlock_{arch}_300e.py')


def classifier(arch, **backbone):
    """The classifier of a config, without drop path."""
    init_default_scope('mmpretrain')
    cfg = config(arch).model
    cfg.backbone.update(drop_path_rate=0.0, **backbone)
    return MODELS.build(cfg)


def tiny(**head):
    torch.manual_seed(0)
    backbone = OverLoCK(TINY, classifier=True)
    head = OverLoCKClsHead(5, backbone.out_channels, **head)
    head.init_weights()
    return backbone, head


def image(batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 64, 64, generator=generator)


# ----------------------------------------------------------------- parity


def release_name(name):
    """What the release calls a parameter: all is at its top level."""
    return name.removeprefix('backbone.').removeprefix('head.')


def tensors_of(model):
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        release_name(name): tensor
        for name, tensor in named.items()
        if name.startswith(('backbone.', 'head.'))
    }


def drawn_classifier(arch):
    """A classifier with the weights of the golden figures, in float64."""
    with torch.device('meta'):
        model = classifier(arch)
    shapes = {name: t.shape for name, t in tensors_of(model).items()}
    drawn = golden.state_dict(shapes)
    model.load_state_dict(
        {name: drawn[release_name(name)] for name in model.state_dict()},
        assign=True,
    )
    return model


@pytest.mark.parametrize('arch', ['xt', 't'])
def test_names_and_shapes(arch):
    """With its two prefixes, the state dict is exactly the release's."""
    with torch.device('meta'):
        state = classifier(arch).state_dict()
    assert all(name.startswith(('backbone.', 'head.')) for name in state)
    shapes = {release_name(name): list(t.shape) for name, t in state.items()}
    assert shapes == golden.load(f'keys_cls_{arch}')
    assert len(shapes) == len(state)


@pytest.mark.parametrize(
    'name', [name for name in golden.files('cls') if 'train' not in name]
)
def test_inference(name):
    figures = golden.load(name)
    model = drawn_classifier(figures['arch']).eval()
    x = golden.image(figures['input'])
    with torch.no_grad():
        golden.assert_outputs_agree([model(x)], figures)
        model.backbone.switch_to_deploy()
        golden.assert_outputs_agree([model(x)], figures)
    with torch.device('meta'):
        deployed = classifier(figures['arch'], deploy=True)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    merged = deployed.state_dict().items()
    assert {name: t.shape for name, t in merged} == shapes


def test_training():
    """Both logits, gradients and buffers of a training step."""
    figures = golden.load('cls_xt_train_4x64')
    model = drawn_classifier('xt').train()
    x = golden.image(figures['input']).requires_grad_()
    feats = model.extract_feat(x)
    logits = model.head(feats), model.head.aux_logits(feats)
    golden.assert_training_agrees(logits, x, tensors_of(model), figures)


@pytest.mark.parametrize(
    'arch, parameters, without_aux, deployed',
    [
        ('xt', 17307272, 16969600, 16791384),
        ('t', 34990472, 34476448, 33981064),
        ('s', 58309772, 57795748, 56670476),
        ('b', 98012968, 97434816, 95520680),
    ],
)
def test_parameter_counts(arch, parameters, without_aux, deployed):
    with torch.device('meta'):
        model = classifier(arch)
        merged = classifier(arch, deploy=True)
    total, aux, merged = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (model, model.head.aux_head, merged)
    )
    assert (total, total - aux, merged) == (parameters, without_aux, deployed)


# --------------------------------------------------------------- backbone


def test_outputs():
    """The Overview-Net's map and the Focus-Net's, which are not normed."""
    backbone, _ = tiny()
    outputs = backbone(image())
    assert backbone.out_strides == (32, 32)
    assert [tuple(output.shape) for output in outputs] == [
        (2, channels, 2, 2) for channels in backbone.out_channels
    ]
    assert all(output.is_contiguous() for output in outputs)
    assert not any('extra_norm' in name for name in backbone.state_dict())


@pytest.mark.parametrize(
    'kwargs', [dict(out_indices=(0, 1, 3)), dict(fuse_overview=True)]
)
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match='classifier=True .*got '):
        OverLoCK(TINY, classifier=True, **kwargs)


def test_other_heads_read_the_last_map():
    init_default_scope('mmpretrain')
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='OverLoCK', arch=TINY, classifier=True),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=5, in_channels=40),
        )
    ).eval()
    _, focus = model.backbone(image())
    expected = model.head.fc(focus.mean((2, 3)))
    torch.testing.assert_close(model(image()), expected)


# ------------------------------------------------------------------- head


def samples(labels):
    return [DataSample().set_gt_label(label) for label in labels]


def mixed(scores):
    return [DataSample().set_gt_score(torch.tensor(s)) for s in scores]


def test_every_parameter_gets_a_gradient():
    backbone, head = tiny()
    losses = head.loss(backbone(image()), samples([1, 3]))
    sum(losses.values()).backward()
    for module in (backbone, head):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('weight', [None, 0.25])
def test_losses(weight):
    backbone, head = tiny(
        **({} if weight is None else {'aux_loss_weight': weight})
    )
    feats = backbone(image())
    losses = head.loss(feats, samples([1, 3]))
    targets = torch.tensor([1, 3])
    main, aux = (
        torch.nn.functional.cross_entropy(logits, targets)
        for logits in (head(feats), head.aux_logits(feats))
    )
    assert set(losses) == {'loss_cls', 'loss_aux'}
    torch.testing.assert_close(losses['loss_cls'], main)
    torch.testing.assert_close(losses['loss_aux'], aux * (weight or 0.4))


def test_soft_labels():
    """What mixup makes of labels, with the recipe's label smoothing."""
    backbone, head = tiny(loss=config('xt').model.head.loss)
    feats = [output.detach() for output in backbone(image())]
    scores = [[0.7, 0.3, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]]
    losses = head.loss(feats, mixed(scores))
    smooth = 0.9 * torch.tensor(scores) + 0.1 / 5
    main = -(smooth * head(feats).log_softmax(1)).sum(1).mean()
    aux = -(smooth * head.aux_logits(feats).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses['loss_cls'], main)
    torch.testing.assert_close(losses['loss_aux'], 0.4 * aux)


@pytest.mark.parametrize('dtype', HALF_FORMATS)
def test_losses_are_in_full_precision(dtype):
    backbone, head = tiny()
    feats = [output.detach() for output in backbone(image())]
    with torch.autocast('cpu', dtype):
        losses = head.loss(feats, samples([1, 3]))
    expected = head.loss(feats, samples([1, 3]))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.02, atol=0.02)


def test_inference_does_without_the_auxiliary_head():
    backbone, head = tiny()
    backbone.eval(), head.eval()
    feats = backbone(image())
    logits = head(feats)
    del head.aux_head
    torch.testing.assert_close(head(feats), logits)
    hidden = head.pre_logits(feats)
    assert hidden.shape == (2, 1024)
    torch.testing.assert_close(
        head.head[-1](hidden[..., None, None])[..., 0, 0], logits
    )
    first, _ = head.predict(feats)
    torch.testing.assert_close(first.pred_score, logits[0].softmax(0))
    assert first.pred_label == logits[0].argmax()


def test_initialization():
    _, head = tiny()
    for name, parameter in head.named_parameters():
        if name.endswith('bias'):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 10000:
            std = parameter.detach().std().item()
            assert std == pytest.approx(0.02, rel=0.1), name


def test_head_without_classifier():
    backbone, head = OverLoCK(TINY), tiny()[1]
    with pytest.raises(ValueError, match='classifier=True.*got 4'):
        head(backbone(image()))


# ----------------------------------------------------------------- recipe


def test_tools(tmp_path):
    """An iteration of the unmodified recipe on ImageNet's layout."""
    data, work_dir = tmp_path / 'imagenet', tmp_path / 'work'
    run_tool('make_sample_data', 'imagenet', data, '--images=4', '--size=96')
    cfg = config('xt')
    cfg.model.backbone.arch = TINY
    cfg.model.head.in_channels = [32, 40]
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data)
        loader.dataset.pipeline[1].scale = 64
        if split != 'train':
            loader.dataset.pipeline[2].crop_size = 64
    cfg.train_cfg.max_epochs = cfg.default_hooks.logger.interval = 1
    cfg.dump(tmp_path / 'config.py')
    log = run_tool('train', tmp_path / 'config.py', '--work-dir', work_dir)
    assert 'Epoch(train) [1][1/1]' in log
    assert 'loss_cls' in log and 'loss_aux' in log and 'grad_norm' in log
    assert 'accuracy/top5' in log
    checkpoint = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    averaged, trained = checkpoint['state_dict'], checkpoint['ema_state_dict']
    names = {f'module.{name}' for name in averaged}
    assert names == set(trained) - {'steps'}
    log = run_tool(
        *('test', tmp_path / 'config.py', work_dir / 'epoch_1.pth'),
        *('--work-dir', work_dir / 'test'),
    )
    assert 'accuracy/top1' in log
