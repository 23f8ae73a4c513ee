"""What users get wrong with the tools that run trained models.

Those to train, to test and to summarize are in test_tools.py.
"""

import numpy as np
import pytest
import tiny
from PIL import Image

tiny.need_openmmlab()
CLS = f'configs/{tiny.CONFIGS["cls"][0]}'
EXPORT = f'export {CLS} --out m.onnx'
PREDICT = 'predict FILES/cls.py FILES/cls.pth'
OPTION = f'{PREDICT} x --cfg-options'
KERNELS = 'visualize kernels FILES/cls.py FILES/cls.pth FILES/pictures/a.png'
PRIOR = 'visualize prior FILES/seg.py FILES/seg.pth'
TYPO = '--cfg-options model.backbone.dept=1'
FEW = '--cfg-options model.backbone.out_indices=(0,1)'
MASKS = 'configs/drop_in/overlock_t_mask2former_semantic.py'


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Models, and an image among results."""
    folder = tmp_path_factory.mktemp('files')
    for task in ('cls', 'seg'):
        tiny.write_model(task, folder)
    (folder / 'pictures').mkdir()
    pixels = np.zeros((90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(folder / 'pictures' / 'a.png')
    return folder


@pytest.mark.parametrize(
    ('command', 'words'),
    [
        ('predict FILES/cls.py no.pth x', 'checkpoint no.pth does not exist'),
        ('predict FILES/cls.py FILES/seg.pth x', 'does not fit the model'),
        (f'{OPTION} {tiny.TEST_SET}.type=CustomDataset', 'names the classes'),
        (f'{OPTION} default_scope=mmpose', 'default_scope mmpose'),
        # A second run would replace its inputs, or predict its results
        (f'{PREDICT} FILES/pictures/a.png', 'where results go'),
        (f'{PREDICT} FILES', 'where results go'),
        (f'{KERNELS} --at 64,0', '64,0 is outside of a, which'),
        (f'{KERNELS} --block 1', '1: stage 3 has blocks 0 to 0'),
        (f'{PRIOR} none', 'none: there is no such file'),
        (f'{PRIOR} x {FEW}', 'its out_indices are (0, 1)'),
        (f'get_flops {CLS} --shape 0 96', '--shape takes'),
        (f'get_flops {CLS} {TYPO}', "argument 'dept'"),
        (f'{EXPORT} --shape 0 96', '--shape takes a height'),
        (f'{EXPORT} --dynamic --shape 224 250', 'multiples of 32 from 224'),
        (f'{EXPORT} --dynamic --shape 192 224', 'multiples of 32 from 224'),
        (f'{EXPORT} --format torch-export', 'writes .pt2 files, not'),
        (f'{EXPORT} --cfg-options default_scope=mmpose', 'mmdet, mmseg, mm'),
        (
            f'export {CLS} --out m.pt --dynamic --format torchscript',
            'TorchScript files have a fixed size',
        ),
        (f'export {MASKS} --out m.onnx', '--backbone-only works with it'),
    ],
)
def test_mistake(files, monkeypatch, command, words):
    """The last line says it, and no result is written."""
    monkeypatch.chdir(tiny.ROOT)
    before = {*files.rglob('*')}
    name, *argv = command.replace('FILES', str(files)).split()
    if name in ('predict', 'visualize'):
        argv += '--out', files
    # Above it, mmengine logs what it builds.
    last = tiny.run_tool(name, *argv, status=2).splitlines()[-1]
    assert last.startswith(f'{name}.py: ') and words in last
    assert {*files.rglob('*')} == before
