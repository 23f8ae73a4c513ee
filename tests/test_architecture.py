"""Who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'mmoverlock'
# Module: what it may import of the package, and of other packages beside the
# standard library. A module imports only from those above it.
ALLOWED = {
    '__init__': ([], []),
    'ops.environment': ([], ['torch', 'triton']),
    'ops.dynamic_conv.reference': ([], ['torch']),
    'ops.dynamic_conv.tiled': (
        ['ops.dynamic_conv.reference', 'ops.environment'],
        ['torch'],
    ),
    'ops.dynamic_conv.triton': ([], ['torch', 'triton']),
    'ops.dynamic_conv.__init__': (
        [
            'ops.dynamic_conv.reference',
            'ops.dynamic_conv.tiled',
            'ops.dynamic_conv.triton',
            'ops.environment',
        ],
        ['torch'],
    ),
    'ops.depthwise.triton': ([], ['torch', 'triton']),
    'ops.depthwise.__init__': (
        ['ops.depthwise.triton', 'ops.environment'],
        ['torch'],
    ),
    'ops.__init__': (
        ['ops.depthwise', 'ops.dynamic_conv', 'ops.environment'],
        [],
    ),
    'models.layers': (['ops'], ['torch']),
    'models.reparam': (['models.layers', 'ops'], ['torch']),
    'models.blocks': (['models.layers', 'models.reparam', 'ops'], ['torch']),
    'allocator': ([], []),
    'checkpoint_file': ([], ['mmengine', 'numpy', 'torch']),
    'checkpoint': (
        ['checkpoint_file', 'models.reparam'],
        ['mmengine', 'torch'],
    ),
    'models.fuse': (
        ['models.blocks', 'models.layers', 'models.reparam'],
        ['torch'],
    ),
    'models.overlock': (
        [
            'checkpoint',
            'models.blocks',
            'models.layers',
            'models.reparam',
            'ops',
            'ops.dynamic_conv',
        ],
        ['mmengine', 'torch'],
    ),
    'models.__init__': (['models.overlock'], []),
    'models.classification': ([], ['mmpretrain', 'torch']),
    'inference': (
        ['checkpoint', 'checkpoint_file'],
        ['cv2', 'mmcv', 'mmengine', 'numpy', 'torch'],
    ),
    'curves': ([], ['matplotlib']),
    'engine.hooks': (
        ['checkpoint', 'curves'],
        ['mmengine', 'numpy', 'torch'],
    ),
    'engine.optimizers': (['models.overlock'], ['mmcv', 'mmengine', 'torch']),
    'engine.strategy': (['models.blocks'], ['mmengine', 'torch']),
    'engine.__init__': (
        ['engine.hooks', 'engine.optimizers', 'engine.strategy'],
        [],
    ),
    'resume': (['checkpoint_file'], ['mmengine']),
    'data': ([], ['PIL', 'mmengine']),
    'cli': (
        ['allocator', 'checkpoint', 'data', 'engine', 'models'],
        ['mmengine', 'torch'],
    ),
}


def module_name(path):
    return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob('*.py')}


def imports(module):
    """(own modules, other packages) that a module imports, at any place."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            parts = module.split('.')[: -node.level]
            own.add('.'.join([*parts, *filter(None, [node.module])]))
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split('.')[0])
    return own, others - sys.stdlib_module_names


def test_modules_are_known():
    assert sorted(MODULES) == sorted(ALLOWED)


def test_order():
    """What a module may import stands above it."""
    order = [module.removesuffix('.__init__') for module in ALLOWED]
    for i, (own, _) in enumerate(ALLOWED.values()):
        assert set(own) <= set(order[:i]), order[i]


@pytest.mark.parametrize('module', ALLOWED)
def test_imports(module):
    own, others = imports(module)
    allowed_own, allowed_others = ALLOWED[module]
    assert own <= set(allowed_own)
    assert others <= set(allowed_others)
