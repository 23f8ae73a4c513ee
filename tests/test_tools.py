"""tools/train.py and tools/test.py: real runs, and what users get wrong."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import get_priority
from PIL import Image
from tiny import load_tool
from torch import nn

from mmoverlock import cli

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'
MASK_RCNN = ROOT / 'configs' / 'mask_rcnn' / 'overlock_xt_1x.py'


train, test, summarize = map(load_tool, ('train', 'test', 'summarize'))


def run(*command, status=0):
    """Run a tool in a process of its own; return its stdout and stderr."""
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    env = os.environ | {
        'PYTHONPATH': os.pathsep.join(filter(None, paths)),
        'OMP_NUM_THREADS': '1',
        'CUDA_VISIBLE_DEVICES': '',
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    'name', sorted({p.stem for p in TOOLS.glob('*.py')} - {'make_sample_data'})
)
def test_main_sets_up_the_process(name, monkeypatch, capsys):
    """Before it looks at anything."""
    called = []
    monkeypatch.setattr(cli, 'set_up', lambda: called.append(name))
    with pytest.raises(SystemExit):
        load_tool(name).main(['--help'])
    assert called == [name]


# ------------------------------------------------------------------- runs

ARCH = 'model.backbone.arch'
TINY = [
    'model.backbone.init_cfg=None',
    f'{ARCH}._delete_=True',
    f'{ARCH}.depths=[1,1,1,1]',
    f'{ARCH}.channels=[8,16,24,32]',
    f'{ARCH}.focus_depths=[1,1]',
    f'{ARCH}.focus_heads=[2,2]',
    'model.neck.in_channels=[8,16,32,40]',
    'model.neck.out_channels=16',
    'model.rpn_head.in_channels=16',
    'model.rpn_head.feat_channels=16',
    'model.roi_head.bbox_roi_extractor.out_channels=16',
    'model.roi_head.bbox_head.in_channels=16',
    'model.roi_head.bbox_head.fc_out_channels=32',
    'model.roi_head.mask_roi_extractor.out_channels=16',
    'model.roi_head.mask_head.in_channels=16',
    'model.roi_head.mask_head.conv_out_channels=16',
    'model.train_cfg.rcnn.sampler.num=32',
    'model.test_cfg.rcnn.score_thr=0.0',
    'model.test_cfg.rcnn.max_per_img=5',
    'default_hooks.visualization.score_thr=0.0',
]


def data_options(data_root, scale=96):
    """Options that put a COCO config on small local images."""
    options = [
        f'train_dataloader.dataset.pipeline.2.scale=({scale},{scale})',
        f'val_dataloader.dataset.pipeline.1.scale=({scale},{scale})',
        f'test_dataloader.dataset.pipeline.1.scale=({scale},{scale})',
    ]
    for split in ('train', 'val', 'test'):
        options += [
            f'{split}_dataloader.dataset.data_root={data_root}',
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        ]
    for split in ('val', 'test'):
        options += [
            f'{split}_evaluator.ann_file={data_root}/annotations/'
            'instances_val2017.json',
            f'{split}_dataloader.dataset.indices=2',
        ]
    return options


OVERLOCK = {
    'type': 'OverLoCK',
    'arch': {
        'depths': (1, 1, 1, 1),
        'channels': (8, 16, 24, 32),
        'focus_depths': (1, 1),
        'focus_heads': (2, 2),
    },
}


def write_config(path, train_set, test_set, evaluator, **settings):
    """Write a config of 3 training iterations of 2 images."""
    loader = {'batch_size': 2, 'num_workers': 0}
    shuffled = {'type': 'DefaultSampler', 'shuffle': True}
    ordered = {'type': 'DefaultSampler', 'shuffle': False}
    test_loader = {**loader, 'dataset': test_set, 'sampler': ordered}
    config = {
        'custom_imports': {'imports': ['mmoverlock.models']},
        'train_dataloader': {
            **loader,
            'dataset': train_set,
            'sampler': shuffled,
        },
        'test_dataloader': test_loader,
        'test_evaluator': evaluator,
        'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': 3},
        'test_cfg': {},
        'optim_wrapper': {'optimizer': {'type': 'AdamW', 'lr': 1e-3}},
        'default_hooks': {
            'logger': {'type': 'LoggerHook', 'interval': 1},
            'checkpoint': {
                'type': 'CheckpointHook',
                'by_epoch': False,
                'interval': 3,
            },
        },
        'log_processor': {'by_epoch': False},
        **settings,
    }
    Config(config).dump(path)


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'coco'
    run(
        TOOLS / 'make_sample_data.py',
        'coco',
        folder,
        '--images=4',
        '--size=96',
    )
    return folder


@pytest.fixture(scope='module')
def detector(tmp_path_factory, coco):
    """Work dir of one epoch of Mask R-CNN, and its log."""
    work_dir = tmp_path_factory.mktemp('mask_rcnn')
    options = [*TINY, *data_options(coco), 'train_cfg.max_epochs=1']
    log, _ = run(
        *(TOOLS / 'train.py', MASK_RCNN, '--work-dir', work_dir),
        *('--auto-scale-lr', '--cfg-options', *options),
        'default_hooks.logger.interval=1',
    )
    return work_dir, log


def test_train_detector(detector):
    work_dir, log = detector
    state = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    assert (state['meta']['epoch'], state['meta']['iter']) == (1, 2)
    assert {'optimizer', 'param_schedulers'} <= state.keys()
    assert 'Scaling the original LR by 0.125' in log  # 2 images, not 16
    assert 'coco/segm_mAP' in log


def test_resume(detector, coco, tmp_path):
    """--resume goes on where the checkpoint stopped, in all its state."""
    before = torch.load(detector[0] / 'epoch_1.pth', weights_only=False)
    options = [*TINY, *data_options(coco), 'train_cfg.max_epochs=2']
    log, _ = run(
        *(TOOLS / 'train.py', MASK_RCNN, '--work-dir', tmp_path),
        *('--resume', detector[0] / 'epoch_1.pth', '--cfg-options', *options),
        'default_hooks.logger.interval=1',
    )
    assert 'resumed epoch: 1, iter: 2' in log
    assert 'Epoch(train) [2][1/2]' in log
    assert 'Epoch(train) [1]' not in log
    after = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    assert (after['meta']['epoch'], after['meta']['iter']) == (2, 4)
    for state, steps in ((before, 2), (after, 4)):
        assert state['optimizer']['state'][0]['step'] == steps


def test_resume_latest(detector, coco, tmp_path):
    """--resume alone takes what last_checkpoint of the work dir names."""
    (tmp_path / 'last_checkpoint').write_text('gone.pth')
    args = train.build_parser().parse_args(
        [str(MASK_RCNN), '--resume', '--work-dir', str(tmp_path)]
    )
    cfg = Config({'work_dir': str(tmp_path)})
    with pytest.raises(train.cli.CheckpointError, match='gone.pth'):
        train.apply_options(cfg, args)
    named = detector[0] / 'epoch_1.pth'
    (tmp_path / 'last_checkpoint').write_text(str(named))
    train.apply_options(cfg, args)
    assert cfg.resume and cfg.load_from == str(named)
    (tmp_path / 'last_checkpoint').unlink()
    train.apply_options(cfg, args)
    assert cfg.resume and cfg.load_from is None


def test_test_detector(detector, coco, tmp_path):
    options = [*TINY, *data_options(coco)]
    log, _ = run(
        *(TOOLS / 'test.py', MASK_RCNN, detector[0] / 'epoch_1.pth'),
        *('--work-dir', tmp_path, '--out', tmp_path / 'new' / 'out.pkl'),
        *('--show-dir', tmp_path / 'drawn', '--cfg-options', *options),
    )
    assert 'coco/bbox_mAP' in log and 'coco/segm_mAP' in log
    names = ['000000500001.jpg', '000000500002.jpg']
    results = pickle.loads((tmp_path / 'new' / 'out.pkl').read_bytes())
    assert [Path(r['img_path']).name for r in results] == names
    for result in results:
        instances = result['pred_instances']
        assert len(instances['bboxes']) == len(instances['masks']) > 0
        assert instances['masks'][0]['size'] == list(result['ori_shape'])
    for name in names:
        original = np.asarray(Image.open(coco / 'val2017' / name), dtype=int)
        drawn = np.asarray(Image.open(tmp_path / 'drawn' / name), dtype=int)
        prediction = drawn[:, original.shape[1] :]  # the truth is left of it
        assert abs(prediction - original).max() > 64


@pytest.mark.parametrize('wrapped', [False, True])
def test_fuse(monkeypatch, coco, detector, wrapped):
    """--fuse fuses what is tested: with EMAHook, the averaged weights."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    runner = mock.Mock(model=nn.DataParallel(model) if wrapped else model)
    monkeypatch.setattr(test.cli, 'build_runner', lambda *_, **__: runner)
    argv = [str(MASK_RCNN), str(detector[0] / 'epoch_1.pth')]
    options = ['--cfg-options', *data_options(coco)]
    test.main([*argv, *options])
    assert not runner.register_hook.called
    test.main([*argv, '--fuse', *options])
    [[hook]] = [call.args for call in runner.register_hook.call_args_list]
    average = EMAHook()
    average.before_run(runner)
    nn.init.ones_(average.ema_model.module[0].weight)
    x = torch.randn(2, 3, 4, 4)
    before, expected = model(x), average.ema_model.module(x)
    assert not torch.allclose(before, expected)
    hooks = sorted((hook, average), key=lambda h: get_priority(h.priority))
    for each in hooks:
        each.before_test_epoch(runner)
    tested = runner.model.module if wrapped else runner.model
    assert hasattr(tested[1], 'fused')
    torch.testing.assert_close(tested(x), expected)
    for each in hooks:
        each.after_test_epoch(runner)
    torch.testing.assert_close(tested(x), expected)
    torch.testing.assert_close(model(x), before)


def test_no_test_set(mistake, tmp_path_factory):
    folder = tmp_path_factory.mktemp('configs')
    (folder / 'empty.pth').touch()
    for loader in ({}, {'test_dataloader': None}):
        Config({'model': {}, **loader}).dump(folder / 'config.py')
        files = folder / 'config.py', folder / 'empty.pth'
        assert f'{files[0]} has no test set' in mistake(test, *files)


def test_tta_of_several_sets():
    """All are read by the pipeline; what is around them is not."""
    sets = [dict(type='CocoDataset', pipeline=[]) for _ in range(3)]
    inner = dict(type='ConcatDataset', datasets=sets[1:])
    repeated = dict(type='RepeatDataset', dataset=inner)
    outer = dict(type='ConcatDataset', datasets=[sets[0], repeated])
    cfg = Config(
        dict(
            test_dataloader=dict(dataset=outer),
            model=dict(type='A'),
            tta_model=dict(type='B'),
            tta_pipeline=[dict(type='C')],
        )
    )
    test.augment_test_time(cfg)
    assert cfg.model == dict(type='B', module=dict(type='A'))
    wrapped = cfg.test_dataloader.dataset
    leaves = [wrapped.datasets[0], *wrapped.datasets[1].dataset.datasets]
    assert [leaf.pipeline for leaf in leaves] == [cfg.tta_pipeline] * 3
    assert 'pipeline' not in wrapped


def test_summarize(detector):
    work_dir, _ = detector
    out, _ = run(TOOLS / 'summarize.py', work_dir, '--images=2')
    assert str(work_dir / 'epoch_1.pth') in out
    assert 'segm_mAP_50: ' in out
    for name in ('curves.png', 'predictions.png'):
        assert str(work_dir / name) in out
        picture = np.asarray(Image.open(work_dir / name))
        assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 100


@pytest.fixture(scope='module')
def segmentation(tmp_path_factory):
    """Config and data root of a small segmenter."""
    folder = tmp_path_factory.mktemp('segmentation')
    data_root = folder / 'ade'
    run(
        *(TOOLS / 'make_sample_data.py', 'ade20k', data_root),
        *('--images=4', '--size=96'),
    )
    loading = [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}]
    loading[1]['reduce_zero_label'] = True
    resize = {'type': 'Resize', 'scale': (64, 64)}
    dataset = {'type': 'ADE20KDataset', 'data_root': str(data_root)}
    train_set, test_set = (
        {
            **dataset,
            'data_prefix': {
                'img_path': f'images/{split}',
                'seg_map_path': f'annotations/{split}',
            },
            'pipeline': pipeline,
        }
        for split, pipeline in (
            ('training', [*loading, resize, {'type': 'PackSegInputs'}]),
            (
                'validation',
                [loading[0], resize, loading[1], {'type': 'PackSegInputs'}],
            ),
        )
    )
    config = folder / 'segmenter.py'
    write_config(
        config,
        train_set,
        {**test_set, 'indices': 2},
        {'type': 'IoUMetric'},
        default_scope='mmseg',
        model={
            'type': 'EncoderDecoder',
            'data_preprocessor': {
                'type': 'SegDataPreProcessor',
                'size': (64, 64),
                'test_cfg': {'size_divisor': 32},
            },
            'backbone': OVERLOCK,
            'decode_head': {
                'type': 'FCNHead',
                'in_channels': 40,
                'in_index': 3,
                'channels': 8,
                'num_convs': 1,
                'num_classes': 150,
                'norm_cfg': {'type': 'BN'},
            },
            'test_cfg': {'mode': 'whole'},
        },
    )
    return config, data_root


def test_segmentation(segmentation, tmp_path):
    config, _ = segmentation
    work_dir = tmp_path / 'work'
    log, _ = run(TOOLS / 'train.py', config, '--work-dir', work_dir)
    assert 'Iter(train) [3/3]' in log
    log, _ = run(
        *(TOOLS / 'test.py', config, work_dir / 'iter_3.pth'),
        *('--work-dir', work_dir, '--out', tmp_path / 'out.pkl'),
        *('--show-dir', tmp_path / 'drawn'),
    )
    assert 'mIoU' in log
    results = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert len(results) == 2
    for result in results:
        labels = result['pred_sem_seg']['data']
        assert labels.shape == (1, *result['ori_shape'])
        assert 'seg_logits' not in result
    drawn = sorted((tmp_path / 'drawn/vis_data/vis_image').iterdir())
    assert len(drawn) == 2


def test_classification(tmp_path):
    random = np.random.default_rng(0)
    for name in ('train/a', 'train/b', 'val/a', 'val/b'):
        folder = tmp_path / 'data' / name
        folder.mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f'{i}.png')
    pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'PackInputs'}]
    train_set, test_set = (
        {
            'type': 'CustomDataset',
            'data_root': str(tmp_path / 'data'),
            'data_prefix': split,
            'pipeline': pipeline,
        }
        for split in ('train', 'val')
    )
    config = tmp_path / 'classifier.py'
    write_config(
        config,
        train_set,
        test_set,
        {'type': 'Accuracy'},
        default_scope='mmpretrain',
        model={
            'type': 'ImageClassifier',
            'data_preprocessor': {
                'num_classes': 2,
                'mean': [127.5] * 3,
                'std': [64.0] * 3,
                'to_rgb': True,
            },
            'backbone': {**OVERLOCK, 'out_indices': (3,)},
            'neck': {'type': 'GlobalAveragePooling'},
            'head': {
                'type': 'LinearClsHead',
                'num_classes': 2,
                'in_channels': 40,
                'topk': (1,),
            },
        },
    )
    work_dir = tmp_path / 'work'
    log, _ = run(TOOLS / 'train.py', config, '--work-dir', work_dir)
    assert 'Iter(train) [3/3]' in log
    log, _ = run(
        *(TOOLS / 'test.py', config, work_dir / 'iter_3.pth'),
        *('--work-dir', work_dir, '--out', tmp_path / 'out.pkl'),
        *('--show-dir', tmp_path / 'drawn'),
    )
    assert 'accuracy/top1' in log
    results = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert [r['gt_label'].item() for r in results] == [0] * 3 + [1] * 3
    assert all(r['pred_score'].shape == (2,) for r in results)
    assert list((tmp_path / 'drawn').iterdir())


# --------------------------------------------------------------- mistakes


@pytest.fixture
def mistake(capsys, tmp_path, monkeypatch):
    """Run main() where it must fail; return the paragraph it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')

    def fail(tool, *argv):
        with pytest.raises(SystemExit) as stop:
            tool.main([str(arg) for arg in argv])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        name = Path(tool.__file__).name
        assert message.startswith(f'{name}: ')
        assert message.count('\n') == 1
        assert not any(tmp_path.iterdir())
        return message

    return fail


def test_summarize_nothing(mistake, tmp_path_factory):
    message = mistake(summarize, tmp_path_factory.mktemp('empty'))
    assert 'no config in' in message


def test_config_missing(mistake):
    message = mistake(train, MASK_RCNN.with_name('overlock_tx_1x.py'))
    assert 'overlock_tx_1x.py does not exist' in message
    assert 'did you mean' in message and str(MASK_RCNN) in message


def test_config_missing_elsewhere(mistake, monkeypatch):
    tool = train.main
    monkeypatch.setattr(train, 'main', lambda a: (os.chdir(ROOT), tool(a)))
    message = mistake(train, 'overlock_xt_1x')
    assert 'configs/mask_rcnn/overlock_xt_1x.py' in message


def test_config_is_no_config(mistake):
    assert 'no .py or .yml' in mistake(train, ROOT / 'LICENSE')


def test_config_base_missing(mistake, tmp_path_factory):
    config = tmp_path_factory.mktemp('configs') / 'config.py'
    config.write_text("_base_ = 'nowhere.py'")
    assert 'nowhere.py' in mistake(train, config)


def test_checkpoint_missing(mistake, coco):
    assert 'checkpoint no.pth does not' in mistake(test, MASK_RCNN, 'no.pth')
    for option in (
        ['--resume', 'no.pth'],
        ['--cfg-options', 'load_from=no.pth'],
        ['--cfg-options', 'model.backbone.init_cfg.checkpoint=no.pth'],
    ):
        message = mistake(train, MASK_RCNN, *option)
        assert 'checkpoint no.pth does not exist' in message


def test_coco_missing(mistake):
    message = mistake(train, MASK_RCNN)
    assert 'data/coco/train2017/ does not exist' in message
    assert 'train_dataloader.dataset' in message
    for word in ('train2017.zip', 'val2017.zip', 'annotations_trainval2017.z'):
        assert word in message
    assert 'cocodataset.org' in message
    assert 'python tools/make_sample_data.py coco data/coco\n' in message


def test_coco_file_missing(mistake, coco):
    options = data_options(coco)
    file = 'train_dataloader.dataset.ann_file=annotations/no.json'
    message = mistake(train, MASK_RCNN, '--cfg-options', *options, file)
    assert f'{coco}/annotations/no.json does not exist' in message
    options.append('val_evaluator.ann_file=no.json')
    message = mistake(train, MASK_RCNN, '--cfg-options', *options)
    assert 'val_evaluator.ann_file no.json does not exist' in message


@pytest.mark.parametrize(
    ('split', 'tool_argv'),
    [('val', (train,)), ('test', (test, 'checkpoint'))],
)
def test_data_by_command(mistake, coco, tmp_path_factory, split, tool_argv):
    """Training reads the validation set too, testing only the test set."""
    checkpoint = tmp_path_factory.mktemp('checkpoint') / 'empty.pth'
    checkpoint.touch()
    tool, *rest = tool_argv
    options = data_options(coco)
    options.append(f'{split}_dataloader.dataset.data_prefix.img=nowhere')
    if tool is test:
        options.append('train_dataloader.dataset.data_root=nowhere')
    message = mistake(
        *(tool, MASK_RCNN, *[checkpoint for _ in rest]),
        *('--cfg-options', *options),
    )
    assert f'{coco}/nowhere does not exist' in message
    assert f'({split}_dataloader.dataset)' in message


DATA_HELP = [
    (
        {
            'type': 'ADE20KDataset',
            'data_root': 'data/ade',
            'data_prefix': {'img_path': 'images/training'},
        },
        'ADEChallengeData2016.zip',
        'make_sample_data.py ade20k data/ade\n',
    ),
    (
        {'type': 'ImageNet', 'data_root': 'data/imagenet', 'split': 'train'},
        'data/imagenet/train does not exist',
        'image-net.org',
    ),
    (
        {'type': 'CityscapesDataset', 'data_root': 'data/cityscapes'},
        'data/cityscapes/ does not exist',
        'train_dataloader.dataset',
    ),
    (
        {
            'type': 'RepeatDataset',
            'dataset': {
                'type': 'ConcatDataset',
                'datasets': [{'type': 'Mine', 'data_root': 'mine'}],
            },
        },
        'mine/ does not exist',
        'train_dataloader.dataset.dataset.datasets.0',
    ),
]


@pytest.mark.parametrize(('dataset', 'what', 'help_text'), DATA_HELP)
def test_other_data_missing(
    mistake, tmp_path_factory, dataset, what, help_text
):
    config = tmp_path_factory.mktemp('configs') / 'config.py'
    Config({'train_dataloader': {'dataset': dataset}, 'model': {}}).dump(
        config
    )
    message = mistake(train, config)
    assert what in message
    assert help_text in message


@pytest.mark.parametrize(
    ('option', 'words'),
    [
        ('foo', "KEY=VALUE, not 'foo'"),
        ('a=[1,(2]', 'brackets'),
        ('modle.type=A', 'there is no modle; did you mean model'),
        ('model.bakbone.arch=t', 'bakbone in model; did you mean backbone?'),
        ('model.bakbone.arch._delete_=True', 'there is no bakbone in model'),
        ('model.backbone.arch.depths=1', 'add model.backbone.arch._delete_='),
        ('param_scheduler.2.end=5', 'param_scheduler is a list of 2'),
        ('param_scheduler.x.end=5', 'param_scheduler is a list of 2'),
        ('param_scheduler.0=5', 'param_scheduler is a list of 2'),
        (
            'data_root=/data/coco/',
            'data_root is a variable of the config file, which is used while '
            'it is read; set what is made from it: '
            'test_dataloader.dataset.data_root, test_evaluator.ann_file, '
            'train_dataloader.dataset.data_root, '
            'val_dataloader.dataset.data_root, val_evaluator.ann_file\n',
        ),
        ('train_pipeline.0.type=A', 'train_pipeline is a variable'),
    ],
)
def test_bad_option(mistake, option, words):
    assert words in mistake(train, MASK_RCNN, '--cfg-options', option)


def test_data_that_is_downloaded():
    dataset = {'type': 'CIFAR10', 'data_root': 'nowhere', 'split': 'train'}
    cfg = Config({'train_dataloader': {'dataset': dataset}})
    train.data.check_data(cfg, 'train')


def test_option_set_twice(mistake):
    message = mistake(
        *(train, MASK_RCNN, '--cfg-options', 'model.backbone.init_cfg=None'),
        'model.backbone.init_cfg.type=Pretrained',
    )
    assert 'both model.backbone.init_cfg and' in message


def test_good_options():
    """New leaves, list elements, Runner's arguments and replaced dicts."""
    cfg = Config.fromfile(MASK_RCNN)
    options = {
        'model.backbone.with_cp': True,
        'param_scheduler.1.milestones': [1],
        'randomness.seed': 0,
        'find_unused_parameters': True,
        'model.backbone.arch._delete_': True,
        'model.backbone.arch.depths': (1, 1, 1, 1),
    }
    train.cli.check_options(cfg, options)
    cfg.merge_from_dict(options)
    assert cfg.model.backbone.arch == {'depths': (1, 1, 1, 1)}
    assert cfg.param_scheduler[1].milestones == [1]
    assert cfg.randomness.seed == 0


def test_blanks_in_options(mistake):
    """mmengine would remove them in silence."""
    parser = train.build_parser()
    path = '/data/My Drive (old)/coco'
    options = [
        f'load_from={path}',
        'work_dir= plain ',
        'param_scheduler=[1, 2]',
    ]
    args = parser.parse_args(['config.py', '--cfg-options', *options])
    assert args.cfg_options == {
        'load_from': path,
        'work_dir': 'plain',
        'param_scheduler': [1, 2],
    }
    option = 'test_dataloader.dataset.metainfo.classes=[traffic light,car]'
    message = mistake(train, MASK_RCNN, '--cfg-options', option)
    assert f'{option}: blanks in the elements of a list' in message


def test_options_are_not_censored():
    """Who types them may type code; paths have brackets, types have dots."""
    values = {
        'load_from': 'runs(1)/epoch_1.pth',
        'work_dir': '__import__("os")',
        'optim_wrapper.optimizer.type': 'torch.optim.SGD',
    }
    given = [f'{key}={value}' for key, value in values.items()]
    scale = 'train_dataloader.dataset.pipeline.2.scale=(96,96)'
    argv = [str(MASK_RCNN), '--cfg-options', *given, scale]
    cfg = train.cli.load_config(train.build_parser().parse_args(argv))
    assert cfg.load_from == values['load_from']
    assert cfg.work_dir == values['work_dir']
    assert cfg.optim_wrapper.optimizer.type == 'torch.optim.SGD'
    assert cfg.train_dataloader.dataset.pipeline[2].scale == (96, 96)


def test_ops_missing(mistake, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name: None if name == 'mmcv._ext' else find_spec(name),
    )
    message = mistake(train, MASK_RCNN)
    assert 'mmcv._ext' in message and '--no-build-isolation' in message


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_launcher_without_gpu(mistake, monkeypatch, coco, launcher):
    monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', '0')
    monkeypatch.setattr(train.cli, 'get_device', lambda: 'cpu')
    options = ['--cfg-options', *data_options(coco)]
    message = mistake(train, MASK_RCNN, '--launcher', launcher, *options)
    assert f'--launcher {launcher} needs GPUs' in message
    assert 'torchrun' in message


def test_local_rank_under_mpi(monkeypatch):
    """mmengine reads LOCAL_RANK, which mpirun does not set."""
    monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', '3')
    monkeypatch.setenv('LOCAL_RANK', '0')
    argv = [str(MASK_RCNN), '--launcher', 'mpi']
    train.cli.load_config(train.build_parser().parse_args(argv))
    assert os.environ['LOCAL_RANK'] == '3'


def test_amp(monkeypatch):
    cfg = Config.fromfile(MASK_RCNN)
    args = train.build_parser().parse_args([str(MASK_RCNN), '--amp'])
    monkeypatch.setattr(train, 'get_device', lambda: 'mps')
    with pytest.raises(train.cli.UserError, match='mps'):
        train.apply_options(cfg, args)
    monkeypatch.setattr(train, 'get_device', lambda: 'cuda')
    train.apply_options(cfg, args)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    cfg.optim_wrapper.type = 'OptimWrapperDict'
    with pytest.raises(train.cli.UserError, match='OptimWrapperDict'):
        train.apply_options(cfg, args)


def test_auto_scale_lr_without_base(mistake):
    message = mistake(
        *(train, MASK_RCNN, '--auto-scale-lr'),
        *('--cfg-options', 'auto_scale_lr=None'),
    )
    assert 'auto_scale_lr.base_batch_size' in message


def test_out_is_no_pickle(mistake, coco, tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp('checkpoint') / 'empty.pth'
    checkpoint.touch()
    options = ['--cfg-options', *data_options(coco)]
    message = mistake(
        test, MASK_RCNN, checkpoint, '--out', 'out.json', *options
    )
    assert 'out.json does not end in .pkl' in message


def test_show_dir_without_scope(mistake, tmp_path_factory):
    folder = tmp_path_factory.mktemp('configs')
    (folder / 'empty.pth').touch()
    loader = {'dataset': {'type': 'CIFAR10'}}
    Config({'model': {}, 'test_dataloader': loader}).dump(folder / 'config.py')
    message = mistake(
        *(test, folder / 'config.py', folder / 'empty.pth'),
        *('--show-dir', 'drawn'),
    )
    assert 'mmdet, mmseg, mmpretrain' in message


def test_unknown_argument(coco, tmp_path):
    """A new key that the class does not know is the user's mistake."""
    key = 'model.backbone.drop_pathrate'
    _, message = run(
        *(TOOLS / 'train.py', MASK_RCNN, '--work-dir', tmp_path),
        *('--cfg-options', *data_options(coco), f'{key}=0.1'),
        status=2,
    )
    assert 'Traceback' not in message
    assert f'--cfg-options {key}: ' in message
    assert "unexpected keyword argument 'drop_pathrate'" in message


def test_other_type_errors_keep_their_traceback():
    with pytest.raises(TypeError, match='other'):
        with train.cli.explain_failures(Config(), {'model.x': 1}):
            raise TypeError("unexpected keyword argument 'other'")


def test_download_fails(coco, tmp_path):
    url = 'http://127.0.0.1:9/overlock.pth'  # nothing listens there
    key = 'model.backbone.init_cfg'
    _, message = run(
        *(TOOLS / 'train.py', MASK_RCNN, '--work-dir', tmp_path),
        *('--cfg-options', *data_options(coco), *TINY[1:]),
        f'{key}.checkpoint={url}',
        status=2,
    )
    assert 'Traceback' not in message
    assert f'cannot download {url}' in message
    assert f'{key}.checkpoint=FILE' in message and f'{key}=None' in message
