"""tools/train.py and tools/test.py: real runs, and what users get wrong."""

import importlib.util
import os
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import get_priority
from PIL import Image
from torch import nn

from mmoverlock import cli

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

ROOT = tiny.ROOT
MASK_RCNN = ROOT / 'configs' / 'mask_rcnn' / 'overlock_xt_1x.py'
train, test = map(tiny.load_tool, ('train', 'test'))


@pytest.mark.parametrize(
    'name',
    sorted({p.stem for p in ROOT.glob('tools/*.py')} - {'make_sample_data'}),
)
def test_main_sets_up_the_process(name, monkeypatch):
    """Before it looks at anything."""
    called = []
    monkeypatch.setattr(cli, 'set_up', lambda: called.append(name))
    tiny.run_tool(name, '--help')
    assert called == [name]


# ------------------------------------------------------------------- runs


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A detector's, whose data are there, and a checkpoint that is empty."""
    path = tiny.detector(tmp_path_factory.mktemp('detector'))
    path.with_name('empty.pth').touch()
    return path


def test_train_and_resume(trained, tmp_path):
    """--resume goes on where the checkpoint stopped, in all its state."""
    config, work_dir, log = trained('detector')
    assert 'coco/segm_mAP' in log
    assert (work_dir / 'curves.png').exists()
    first = work_dir / 'epoch_1.pth'
    log = tiny.run_tool(
        *('train', config, '--work-dir', tmp_path, '--resume', first),
        *('--auto-scale-lr', '--cfg-options', 'train_cfg.max_epochs=2'),
    )
    assert 'Scaling the original LR by 0.125' in log  # 2 images, not 16
    assert 'resumed epoch: 1, iter: 2' in log
    assert 'Epoch(train) [2][1/2]' in log
    assert 'Epoch(train) [1]' not in log
    for epoch, path in enumerate((first, tmp_path / 'epoch_2.pth'), 1):
        state = torch.load(path, weights_only=False)
        assert state['meta']['epoch'] == epoch
        assert state['meta']['iter'] == 2 * epoch
        assert state['optimizer']['state'][0]['step'] == 2 * epoch
        assert 'param_schedulers' in state


def test_resume_latest(trained, tmp_path):
    """--resume alone takes what last_checkpoint of the work dir names."""
    (tmp_path / 'last_checkpoint').write_text('gone.pth')
    args = train.build_parser().parse_args(
        [str(MASK_RCNN), '--resume', '--work-dir', str(tmp_path)]
    )
    cfg = Config({'work_dir': str(tmp_path)})
    with pytest.raises(train.cli.CheckpointError, match='gone.pth'):
        train.apply_options(cfg, args)
    named = trained('detector')[1] / 'epoch_1.pth'
    (tmp_path / 'last_checkpoint').write_text(str(named))
    train.apply_options(cfg, args)
    assert cfg.resume and cfg.load_from == str(named)
    (tmp_path / 'last_checkpoint').unlink()
    train.apply_options(cfg, args)
    assert cfg.resume and cfg.load_from is None


def run_test(trained, kind, checkpoint, tmp_path):
    """Run tools/test.py; return the log, results and names of pictures."""
    config, work_dir, _ = trained(kind)
    log = tiny.run_tool(
        *('test', config, work_dir / checkpoint, '--work-dir', tmp_path),
        *('--out', tmp_path / 'new' / 'out.pkl'),
        *('--show-dir', tmp_path / 'drawn'),
    )
    results = pickle.loads((tmp_path / 'new' / 'out.pkl').read_bytes())
    drawn = sorted((tmp_path / 'drawn').rglob('*.??g'))
    assert len(drawn) == len({Path(r['img_path']).name for r in results}) > 0
    return log, results, drawn


def test_test_detector(trained, tmp_path):
    log, results, drawn = run_test(
        trained, 'detector', 'epoch_1.pth', tmp_path
    )
    assert 'coco/bbox_mAP' in log and 'coco/segm_mAP' in log
    assert [Path(r['img_path']).name for r in results] == [
        f'{500000 + i:012d}.jpg' for i in (1, 2)
    ]
    for result, picture in zip(results, drawn, strict=True):
        instances = result['pred_instances']
        assert len(instances['bboxes']) == len(instances['masks']) > 0
        assert instances['masks'][0]['size'] == list(result['ori_shape'])
        original = np.asarray(Image.open(result['img_path']), dtype=int)
        picture = np.asarray(Image.open(picture), dtype=int)
        prediction = picture[:, original.shape[1] :]  # the truth is left of it
        assert abs(prediction - original).max() > 64


def test_test_segmentor(trained, tmp_path):
    log, results, _ = run_test(trained, 'segmentor', 'iter_2.pth', tmp_path)
    assert 'mIoU' in log
    for result in results:
        labels = result['pred_sem_seg']['data']
        assert labels.shape == (1, *result['ori_shape'])
        assert 'seg_logits' not in result


def test_test_classifier(trained, tmp_path):
    log, results, _ = run_test(trained, 'classifier', 'epoch_2.pth', tmp_path)
    assert 'accuracy/top1' in log
    assert [r['gt_label'].item() for r in results] == [0] * 4 + [1] * 4
    assert all(r['pred_score'].shape == (2,) for r in results)


@pytest.mark.parametrize('wrapped', [False, True])
def test_fuse(monkeypatch, config, wrapped):
    """--fuse fuses what is tested: with EMAHook, the averaged weights."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    runner = mock.Mock(model=nn.DataParallel(model) if wrapped else model)
    monkeypatch.setattr(test.cli, 'build_runner', lambda *_, **__: runner)
    argv = [str(config), str(config.with_name('empty.pth'))]
    test.main(argv)
    assert not runner.register_hook.called
    test.main([*argv, '--fuse'])
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


def test_no_test_set(mistake, tmp_path):
    (tmp_path / 'empty.pth').touch()
    for loader in ({}, {'test_dataloader': None}):
        Config({'model': {}, **loader}).dump(tmp_path / 'config.py')
        files = tmp_path / 'config.py', tmp_path / 'empty.pth'
        assert f'{files[0]} has no test set' in mistake('test', *files)


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


def test_summarize(trained):
    _, work_dir, _ = trained('detector')
    out = tiny.run_tool('summarize', work_dir, '--images=2')
    assert str(work_dir / 'epoch_1.pth') in out
    assert 'segm_mAP_50: ' in out
    for name in ('curves.png', 'predictions.png'):
        assert str(work_dir / name) in out
        picture = np.asarray(Image.open(work_dir / name))
        assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 100


# --------------------------------------------------------------- mistakes


def test_summarize_nothing(mistake, tmp_path):
    assert 'no config in' in mistake('summarize', tmp_path)


def test_config_missing(mistake, monkeypatch):
    message = mistake('train', MASK_RCNN.with_name('overlock_tx_1x.py'))
    assert 'overlock_tx_1x.py does not exist' in message
    assert 'did you mean' in message and str(MASK_RCNN) in message
    monkeypatch.chdir(ROOT)
    message = tiny.run_tool('train', 'overlock_xt_1x', status=2)
    assert 'configs/mask_rcnn/overlock_xt_1x.py' in message


def test_config_that_cannot_be_read(mistake, tmp_path):
    assert 'no .py or .yml' in mistake('train', ROOT / 'LICENSE')
    config = tmp_path / 'config.py'
    config.write_text("_base_ = 'nowhere.py'")
    assert 'nowhere.py' in mistake('train', config)


def test_checkpoint_missing(mistake):
    assert 'checkpoint no.pth does not' in mistake('test', MASK_RCNN, 'no.pth')
    for option in (
        ['--resume', 'no.pth'],
        ['--cfg-options', 'load_from=no.pth'],
        ['--cfg-options', 'model.backbone.init_cfg.checkpoint=no.pth'],
    ):
        message = mistake('train', MASK_RCNN, *option)
        assert 'checkpoint no.pth does not exist' in message


def test_coco_missing(mistake):
    message = mistake('train', MASK_RCNN)
    assert 'data/coco/train2017/ does not exist' in message
    assert 'train_dataloader.dataset' in message
    for word in ('train2017.zip', 'val2017.zip', 'annotations_trainval2017.z'):
        assert word in message
    assert 'cocodataset.org' in message
    assert 'python tools/make_sample_data.py coco data/coco\n' in message


@pytest.mark.parametrize(
    ('option', 'words'),
    [
        (
            'train_dataloader.dataset.ann_file=annotations/no.json',
            '{folder}/coco/annotations/no.json does not exist',
        ),
        (
            'val_evaluator.ann_file=no.json',
            'val_evaluator.ann_file no.json does not exist',
        ),
        (
            'val_dataloader.dataset.data_prefix.img=nowhere',
            '{folder}/coco/nowhere does not exist (val_dataloader.dataset)',
        ),
    ],
)
def test_coco_file_missing(mistake, config, option, words):
    message = mistake('train', config, '--cfg-options', option)
    assert words.format(folder=config.parent) in message


def test_testing_needs_the_test_set(mistake, config):
    message = mistake(
        *('test', config, config.with_name('empty.pth'), '--cfg-options'),
        'train_dataloader.dataset.data_root=nowhere',
        'test_dataloader.dataset.data_prefix.img=elsewhere',
    )
    assert '/coco/elsewhere does not exist (test_dataloader.dataset)' in (
        message
    )


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
def test_other_data_missing(mistake, tmp_path, dataset, what, help_text):
    config = tmp_path / 'config.py'
    loader = {'dataset': dataset}
    Config({'train_dataloader': loader, 'model': {}}).dump(config)
    message = mistake('train', config)
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
    assert words in mistake('train', MASK_RCNN, '--cfg-options', option)


def test_data_that_is_downloaded():
    dataset = {'type': 'CIFAR10', 'data_root': 'nowhere', 'split': 'train'}
    cfg = Config({'train_dataloader': {'dataset': dataset}})
    train.data.check_data(cfg, 'train')


def test_option_set_twice(mistake):
    message = mistake(
        *('train', MASK_RCNN, '--cfg-options', 'model.backbone.init_cfg=None'),
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
    message = mistake('train', MASK_RCNN, '--cfg-options', option)
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
    message = mistake('train', MASK_RCNN)
    assert 'mmcv._ext' in message and '--no-build-isolation' in message


def test_launcher_without_gpu(mistake, monkeypatch, config):
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')
    message = mistake('train', config, '--launcher', 'slurm')
    assert '--launcher slurm needs GPUs' in message
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
        *('train', MASK_RCNN, '--auto-scale-lr'),
        *('--cfg-options', 'auto_scale_lr=None'),
    )
    assert 'auto_scale_lr.base_batch_size' in message


def test_out_is_no_pickle(mistake, config):
    checkpoint = config.with_name('empty.pth')
    message = mistake('test', config, checkpoint, '--out', 'out.json')
    assert 'out.json does not end in .pkl' in message


def test_show_dir_without_scope(mistake, tmp_path):
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'empty.pth'
    checkpoint.touch()
    loader = {'dataset': {'type': 'CIFAR10'}}
    Config({'model': {}, 'test_dataloader': loader}).dump(config)
    message = mistake('test', config, checkpoint, '--show-dir', 'drawn')
    assert 'mmdet, mmseg, mmpretrain' in message


def test_unknown_argument(config, tmp_path):
    """A new key that the class does not know is the user's mistake."""
    key = 'model.backbone.drop_pathrate'
    message = tiny.run_tool(
        *('train', config, '--work-dir', tmp_path),
        *('--cfg-options', f'{key}=0.1'),
        status=2,
    )
    assert 'Traceback' not in message
    assert f'--cfg-options {key}: ' in message
    assert "unexpected keyword argument 'drop_pathrate'" in message


def test_other_type_errors_keep_their_traceback():
    with pytest.raises(TypeError, match='other'):
        with train.cli.explain_failures(Config(), {'model.x': 1}):
            raise TypeError("unexpected keyword argument 'other'")


def test_download_fails(config, tmp_path):
    url = 'http://127.0.0.1:9/overlock.pth'  # nothing listens there
    key = 'model.backbone.init_cfg'
    message = tiny.run_tool(
        *('train', config, '--work-dir', tmp_path, '--cfg-options'),
        *(f'{key}._delete_=True', f'{key}.type=Pretrained'),
        f'{key}.checkpoint={url}',
        status=2,
    )
    assert 'Traceback' not in message
    assert f'cannot download {url}' in message
    assert f'{key}.checkpoint=FILE' in message and f'{key}=None' in message
