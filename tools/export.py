"""Export a model: ``python tools/export.py CONFIG [CHECKPOINT] --out FILE``.

The file takes an image. It returns the logits of a classifier, the logits of a
segmentor at the image's size, or the maps of a detector's neck; with
--backbone-only, the maps of any model's backbone. Norms, branches and
residuals are fused into convolutions. The image is (1, C, H, W), as the test
pipeline of the config makes it, and normalized; the order of the channels,
their mean and their deviation are printed, and stored in ONNX files as
metadata.

The size is fixed, to --shape, because ContMix is laid out for it, unless
--dynamic is given: then H and W may be any multiples of 32 from 224 to 4096,
and ContMix gathers every window, which takes more time, and memory for 169
copies of half the channels at stride 16. TorchScript files have fixed sizes
only. All have standard operators only.

Every file is run after it is written, and compared with the model. ONNX needs
the packages onnx and onnxscript, and onnxruntime for the comparison.
"""

import argparse
import importlib.util
import logging
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mmoverlock import cli
from mmoverlock.inference import (
    ConfigError,
    build_pipeline,
    init_model,
    input_channels,
)
from mmoverlock.models.blocks import FocusBlock
from mmoverlock.models.fuse import fuse
from mmoverlock.models.layers import PointwiseConv, scale_shift
from mmoverlock.models.reparam import DilatedReparamConv

PARTS = {  # of models that are exported, by package
    'mmdet': ('backbone', 'neck'),
    'mmseg': ('backbone', 'neck', 'decode_head'),
    'mmpretrain': ('backbone', 'neck', 'head'),
}
SHAPES = {'mmdet': (800, 1344), 'mmseg': (512, 512), 'mmpretrain': (224, 224)}
MULTIPLE, LEAST, MOST = 32, 224, 4096  # of dynamic heights and widths
DYNAMIC_SHAPE = 256, 320
TOLERANCE = 1e-4  # of differences, to the largest value of an output


# --------------------------------------------------- what exporters can read


class PlainConv(nn.Module):
    """`PointwiseConv` without its choice by the map's size."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x, scale=None, shift=None):
        return F.conv2d(scale_shift(x, scale, shift), self.weight, self.bias)


class MatrixPool(nn.Module):
    """Adaptive average pooling of maps of any size, as matrix products."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        rows, columns = (self.shares(length, x) for length in x.shape[2:])
        return rows @ x @ columns.mT

    def shares(self, length, like):
        cell = torch.arange(self.size, device=like.device)[:, None]
        index = torch.arange(length, device=like.device)
        start = cell * length // self.size
        end = ((cell + 1) * length + self.size - 1) // self.size
        inside = ((index >= start) & (index < end)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


def make_exportable(model, dynamic):
    """Replace modules of a fused model by equal ones for exporters."""
    for module in [*model.modules()]:
        if dynamic and isinstance(module, FocusBlock):
            module.contmix_backend = 'reference'  # for maps of any size
        for name, child in module.named_children():
            if isinstance(child, PointwiseConv):
                setattr(module, name, PlainConv(child))
            elif isinstance(child, DilatedReparamConv):
                setattr(module, name, child.lk_origin)
            elif dynamic and isinstance(child, nn.AdaptiveAvgPool2d):
                size = child.output_size
                size = size if isinstance(size, int) else size[0]
                if size > 1:
                    setattr(module, name, MatrixPool(size))


class Exported(nn.Module):
    """From a normalized image to what parts of a model make, one by one."""

    def __init__(self, model, names):
        super().__init__()
        parts = (getattr(model, name, None) for name in names)
        self.parts = nn.ModuleList(filter(None, parts))
        self.align_corners = None
        if names[-1] == 'decode_head':
            self.align_corners = model.decode_head.align_corners

    def forward(self, image):
        outputs = image
        for part in self.parts:
            outputs = part(outputs)
        if self.align_corners is not None:
            outputs = F.interpolate(
                outputs,
                image.shape[2:],
                mode='bilinear',
                align_corners=self.align_corners,
            )
        return (outputs,) if torch.is_tensor(outputs) else tuple(outputs)


# ------------------------------------------------------------------ formats


def write_onnx(program, path, names, metadata):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        onnx = torch.onnx.export(
            program, input_names=['image'], output_names=names, verbose=False
        )
    onnx.model.metadata_props.update(metadata)
    onnx.save(path)


def run_onnx(path):
    if not importlib.util.find_spec('onnxruntime'):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(
        path, providers=['CPUExecutionProvider']
    )
    return lambda image: [
        torch.from_numpy(output)
        for output in session.run(None, {'image': image.numpy()})
    ]


def write_torch_export(program, path, names, metadata):
    torch.export.save(program, path)


def write_torchscript(program, path, names, metadata):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # Traced from the program, which has no Python functions left.
        (image,), _ = program.example_inputs
        module = torch.jit.trace(program.module(), image, check_trace=False)
        module.save(path)


def run_torch_export(path):
    return torch.export.load(path).module()


# By format: the suffix of its files, and how to write and to load them.
FORMATS = {
    'onnx': ('.onnx', write_onnx, run_onnx),
    'torch-export': ('.pt2', write_torch_export, run_torch_export),
    'torchscript': ('.pt', write_torchscript, torch.jit.load),
}


@torch.no_grad()
def write_file(model, cfg, args, shape):
    """Write the file and compare it with the model.

    Args:
        model (nn.Module): On the CPU.
        cfg (Config): Its config.
        args (argparse.Namespace): The arguments.
        shape (tuple[int, int]): Height and width to trace with.

    Returns:
        dict[tuple[int, int], float] | None: The largest differences, relative
        to the largest value of an output, by height and width; None where
        there is no runtime.
    """
    parts = ('backbone',) if args.backbone_only else PARTS[cfg.default_scope]
    module = Exported(model, parts).eval()
    sizes, dimensions = [shape], None
    if args.dynamic:
        sizes += [(LEAST, LEAST + MULTIPLE), (shape[0] + MULTIPLE, LEAST)]
        limits = dict(min=LEAST // MULTIPLE, max=MOST // MULTIPLE)
        rows, columns = (
            torch.export.Dim(name, **limits) for name in ('rows', 'columns')
        )
        dimensions = ({2: MULTIPLE * rows, 3: MULTIPLE * columns},)
    torch.manual_seed(0)
    images = [torch.randn(1, input_channels(model), *size) for size in sizes]
    expected = [module(image) for image in images]
    make_exportable(fuse(model), args.dynamic)
    module(images[0])  # ContMix's layout is made once, and not while tracing
    program = torch.export.export(
        module, (images[0],), dynamic_shapes=dimensions, strict=False
    )
    names = [f'map_{i}' for i in range(len(expected[0]))]
    if parts[-1].endswith('head'):
        names = ['logits']
    path = str(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _, write, load = FORMATS[args.format]
    write(program, path, names, normalization(model, cfg))
    run = load(path)
    if run is None:
        return None
    differences = {}
    for size, image, wanted in zip(sizes, images, expected, strict=True):
        differences[size] = max(
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(run(image), wanted, strict=True)
        )
    return differences


def normalization(model, cfg):
    """Channels, mean and deviation of the input, as text by name."""
    steps = []
    with suppress(ConfigError):  # there may be no pipeline
        steps = build_pipeline(cfg).transforms
    preprocessor, channels = model.data_preprocessor, input_channels(model)
    if channels == 3:  # loaded as BGR
        names = '_channel_conversion', 'channel_conversion', 'to_rgb'
        turned = any(getattr(preprocessor, name, False) for name in names)
        channels = 'RGB' if turned else 'BGR'
    found = {'channels': str(channels)}
    steps = [step for step in steps if type(step).__name__ == 'Normalize']
    for source in (preprocessor, *steps):
        for name in ('mean', 'std'):
            if hasattr(source, name):
                values = getattr(source, name).flatten()
                found[name] = ', '.join(f'{value:g}' for value in values)
    return found


# ------------------------------------------------------------- command line


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file or URL; default: random weights',
    )
    parser.add_argument('--format', choices=FORMATS, default='onnx')
    parser.add_argument('--out', required=True, type=Path, metavar='FILE')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='size of the image in pixels; default: '
        + ', '.join(f'{h} {w} ({scope})' for scope, (h, w) in SHAPES.items()),
    )
    parser.add_argument(
        '--dynamic',
        action='store_true',
        help='any size, see above; --shape is what it is traced with',
    )
    parser.add_argument(
        '--backbone-only',
        action='store_true',
        help='leave out the neck and heads',
    )
    cli.add_config_arguments(parser)
    return parser


def check(args, cfg):
    """Check what cannot be exported; returns the shape to trace with."""
    scope = cfg.get('default_scope')
    if scope not in SHAPES:
        raise cli.UserError(
            f'{args.config} has the default_scope {scope}, not one of '
            + ', '.join(SHAPES)
        )
    suffix = FORMATS[args.format][0]
    if args.out.suffix != suffix:
        raise cli.UserError(
            f'--format {args.format} writes {suffix} files, not {args.out}'
        )
    if args.format == 'onnx':
        for package in ('onnx', 'onnxscript'):
            if not importlib.util.find_spec(package):
                raise cli.UserError(
                    f'--format onnx needs {package}: pip install {package}'
                )
    if args.dynamic and args.format == 'torchscript':
        raise cli.UserError(
            '--dynamic: TorchScript files have a fixed size, because their '
            'shapes are traced as numbers; take --format onnx or torch-export'
        )
    default = DYNAMIC_SHAPE if args.dynamic else SHAPES[scope]
    shape = tuple(args.shape or default)
    if min(shape) < 1:
        raise cli.UserError(
            f'--shape takes a height and a width in pixels, not {shape}'
        )
    if args.dynamic and any(
        side % MULTIPLE or not LEAST <= side <= MOST for side in shape
    ):
        raise cli.UserError(
            f'--dynamic takes multiples of {MULTIPLE} from {LEAST} to '
            f'{MOST}, not --shape {shape[0]} {shape[1]}'
        )
    return shape


def main(argv=None):
    cli.set_up()
    logging.getLogger('onnx_ir').setLevel(logging.ERROR)
    logging.getLogger('onnxscript').setLevel(logging.ERROR)
    with cli.user_errors('export.py'):
        args = build_parser().parse_args(argv)
        cfg = cli.load_config(args)
        shape = check(args, cfg)
        if args.checkpoint:
            cli.check_file(args.checkpoint, 'checkpoint')
        with cli.explain_failures(cfg, args.cfg_options):
            model = init_model(cfg, args.checkpoint)
        head = getattr(model, 'decode_head', None)
        if head and not args.backbone_only and not hasattr(head, 'cls_seg'):
            raise cli.UserError(
                f'the output of {type(head).__name__} is no map of logits; '
                'only --backbone-only works with it'
            )
        differences = write_file(model, cfg, args, shape)
    print(f'{args.out}: image normalized with {normalization(model, cfg)}')
    if differences is None:
        print('not compared with the model: onnxruntime is not installed')
        return
    for size, difference in differences.items():
        print(f'{size[0]} x {size[1]}: differs by {difference:.1e} at most')
    if max(differences.values()) > TOLERANCE:
        sys.exit(f'export.py: that is more than {TOLERANCE}, so do not use it')


if __name__ == '__main__':
    main()
