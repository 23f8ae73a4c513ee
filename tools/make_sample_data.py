"""Draw a miniature dataset in the layout of COCO 2017, ADE20K or ImageNet.

The pictures are drawn by this program: simple shapes on textured
backgrounds. Nothing is downloaded and nothing is a photograph. File names,
annotation formats, category ids and category names are those of the real
dataset, so that a config written for it runs unmodified, for a first run or
a test of the whole pipeline. Scores on these pictures say nothing about the
real dataset.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_masks
from rich.console import Console
from rich.progress import track

NOTE = 'Drawn by tools/make_sample_data.py, not downloaded.'
SPLITS = ('train', 'val')
MIN_VISIBLE = 0.75  # of an object's area: none is hidden more than this

# ---------------------------------------------------------------- outlines
# Polygons of shape (K, 2), x right and y down, centered, about 1 across.


def mirrored(half):
    """Completes the right half of an outline symmetric about x = 0."""
    half = np.array(half)
    return np.concatenate([half, half[::-1] * (-1, 1)])


def rays(angle):
    """Unit vectors (K, 2) at angles to the upward direction."""
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def rectangle(aspect):
    return mirrored([(0.5 / aspect, -0.5), (0.5 / aspect, 0.5)])


TURN = np.linspace(0, 2 * math.pi, 100, endpoint=False)
DISC = 0.5 * rays(TURN)
FLOWER = (0.35 + 0.15 * np.cos(5 * TURN))[:, None] * rays(TURN)
ARC = np.linspace(-1.25, 1.25, 40)
WIDTHS = 0.125 * np.sqrt(np.cos(ARC * math.pi / 2.5))[:, None]
CRESCENT = np.concatenate(
    [(0.5 + WIDTHS) * rays(ARC), ((0.5 - WIDTHS) * rays(ARC))[::-1]]
) + (0, 0.33)
SLICE = np.concatenate([[(0, 0.5)], rays(np.linspace(-0.33, 0.33, 20))])
SLICE[1:] += (0, 0.5)
TRIANGLE = mirrored([(0, -0.45), (0.5, 0.45)])
AIRPLANE = mirrored(
    [
        *[(0, -0.5), (0.07, -0.42), (0.08, -0.15)],  # nose
        *[(0.5, 0.1), (0.5, 0.22), (0.08, 0.1)],  # wing
        *[(0.06, 0.32), (0.22, 0.42), (0.22, 0.5), (0, 0.46)],  # tail
    ]
)

# -------------------------------------------------------------- categories

# By supercategory, in the order of the ids.
COCO_NAMES = {
    'person': 'person',
    'vehicle': 'bicycle, car, motorcycle, airplane, bus, train, truck, boat',
    'outdoor': 'traffic light, fire hydrant, stop sign, parking meter, bench',
    'animal': 'bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, '
    'giraffe',
    'accessory': 'backpack, umbrella, handbag, tie, suitcase',
    'sports': 'frisbee, skis, snowboard, sports ball, kite, baseball bat, '
    'baseball glove, skateboard, surfboard, tennis racket',
    'kitchen': 'bottle, wine glass, cup, fork, knife, spoon, bowl',
    'food': 'banana, apple, sandwich, orange, broccoli, carrot, hot dog, '
    'pizza, donut, cake',
    'furniture': 'chair, couch, potted plant, bed, dining table, toilet',
    'electronic': 'tv, laptop, mouse, remote, keyboard, cell phone',
    'appliance': 'microwave, oven, toaster, sink, refrigerator',
    'indoor': 'book, clock, vase, scissors, teddy bear, hair drier, '
    'toothbrush',
}
COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_OUTLINES = {
    'airplane': AIRPLANE,
    'banana': CRESCENT,
    'pizza': SLICE,
    'remote': rectangle(aspect=3.2),
    'sports ball': DISC,
}
COCO_FIRST_ID = {'train': 1, 'val': 500_001}
COCO_EMPTY_EVERY = 20  # the 20th, 40th, ... image shows no object
COCO_CROWD_EVERY = 10  # the 5th, 15th, ... image shows a crowd

# Value in the label maps, 1 to 150, and color.
ADE_STUFF = {
    'wall': (1, (218, 202, 180)),
    'sky': (3, (150, 190, 240)),
    'floor': (4, (134, 90, 58)),
    'ceiling': (6, (242, 242, 240)),
    'road': (7, (82, 82, 87)),
    'grass': (10, (69, 133, 46)),
    'mountain': (17, (122, 110, 115)),
    'sea': (27, (38, 101, 142)),
    'sand': (47, (215, 190, 136)),
}
# From the top of the picture to its bottom.
ADE_SCENES = (
    ('sky', 'mountain', 'grass'),
    ('sky', 'sea', 'sand'),
    ('sky', 'grass', 'road'),
    ('mountain', 'sea'),
    ('ceiling', 'wall', 'floor'),
    ('wall', 'floor'),
)
ADE_OUTLINES = {
    'airplane': AIRPLANE,
    'ball': DISC,
    'book': rectangle(aspect=1.4),
    'flower': FLOWER,
    'tent': TRIANGLE,
}
ADE_OBJECTS = dict(airplane=91, ball=120, book=68, flower=67, tent=115)
ADE_FOLDERS = {'train': 'training', 'val': 'validation'}

# Folder, label and outline.
IMAGENET_CLASSES = (
    ('n02690373', 404, AIRPLANE),  # airliner
    ('n03291819', 549, rectangle(aspect=1.4)),  # envelope
    ('n03792972', 672, TRIANGLE),  # mountain tent
    ('n04074963', 761, rectangle(aspect=3.2)),  # remote control
    ('n04409515', 852, DISC),  # tennis ball
    ('n07753592', 954, CRESCENT),  # banana
    ('n07873807', 963, SLICE),  # pizza
    ('n11939491', 985, FLOWER),  # daisy
)

# ----------------------------------------------------------------- drawing


def textured(rng, height, width, color, contrast):
    """Draws stripes or clouds, H x W x 3, that vary about an RGB color."""
    period = max(height, width) * rng.uniform(0.04, 0.25)
    if rng.random() < 0.5:
        angle = rng.uniform(0, math.pi)
        y, x = np.mgrid[:height, :width]
        along = x * math.cos(angle) + y * math.sin(angle)
        gray = np.sin(2 * math.pi * along / period)
    else:
        cells = math.ceil(height / period), math.ceil(width / period)
        coarse = rng.uniform(-1, 1, cells).astype(np.float32)
        gray = cv2.resize(
            coarse, (width, height), interpolation=cv2.INTER_CUBIC
        )
    return color + gray[..., None] * rng.uniform(-contrast, contrast, 3)


class Drawn(NamedTuple):
    """An object of a canvas: its class, its unhidden area, if a crowd."""

    name: str
    area: float
    crowd: bool


class Canvas:
    """A picture on which objects are drawn, later ones over earlier ones.

    Args:
        pixels (ndarray): The background, H x W x 3, RGB in [0, 255].

    Attributes:
        owner (ndarray): H x W, the object seen at each pixel: k for the
            k-th of ``objects``, counted from 1, and 0 for the background.
        objects (list[Drawn]): What was drawn.
    """

    def __init__(self, pixels):
        self.pixels = pixels
        self.owner = np.zeros(pixels.shape[:2], int)
        self.objects = []

    def draw(self, rng, name, outlines, crowd=False):
        """Draws an object, unless too little of any object stayed visible.

        Args:
            rng (numpy.random.Generator): Source of color and texture.
            name (str): The object's class.
            outlines (list[ndarray]): Its parts, each (K, 2) in pixels.
            crowd (bool): Whether the parts are objects of a crowd.

        Returns:
            bool: Whether it was drawn.
        """
        mask = np.zeros(self.owner.shape, np.uint8)
        for outline in outlines:
            cv2.fillPoly(mask, [outline.round().astype(np.int32)], 1)
        mask = mask > 0
        area = sum(cv2.contourArea(o.astype(np.float32)) for o in outlines)
        objects = [*self.objects, Drawn(name, area, crowd)]
        owner = np.where(mask, len(objects), self.owner)
        visible = np.bincount(owner.ravel(), minlength=len(objects) + 1)[1:]
        areas = np.array([drawn.area for drawn in objects])
        if (visible < MIN_VISIBLE * areas).any():
            return False
        self.objects, self.owner = objects, owner
        behind = self.pixels[mask]

        def contrast(color):
            return np.quantile(np.linalg.norm(behind - color, axis=1), 0.1)

        color = max(rng.uniform(15, 240, (8, 3)), key=contrast)
        self.pixels[mask] = textured(rng, *mask.shape, color, 25)[mask]
        return True

    def seen(self):
        """Yield every object and where it is seen, H x W."""
        for number, drawn in enumerate(self.objects, 1):
            yield drawn, self.owner == number

    def save(self, rng, path):
        """Writes the picture with pixel noise as a JPEG file."""
        noise = rng.normal(0, rng.uniform(1, 6), self.pixels.shape)
        pixels = np.clip(self.pixels + noise, 0, 255).astype(np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, 'JPEG', quality=92)


def blank_images(split, count, size, seed):
    """Yield what each image of a split starts from.

    Args:
        split (str): 'train' or 'val'.
        count (int): How many images there are.
        size (int): The long side in pixels.
        seed (int): The dataset's seed.

    Yields:
        tuple[int, numpy.random.Generator, int, int]: The number of the image,
        from 1, a source of randomness in which no other image has a part,
        height and width, landscape or portrait.
    """
    for index in track(
        range(1, count + 1), description=split, console=Console(stderr=True)
    ):
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        short = int(rng.integers(math.ceil(0.75 * size), size + 1))
        shape = (size, short) if rng.random() < 0.5 else (short, size)
        yield index, rng, *shape


def textured_canvas(rng, height, width):
    """A canvas with a random texture."""
    color = rng.uniform(40, 215, 3)
    return Canvas(textured(rng, height, width, color, contrast=40))


def placed(rng, outline, center, size, max_tilt):
    """An outline in pixels, at a random tilt and slightly stretched."""
    tilt = rng.uniform(-max_tilt, max_tilt)
    cos, sin = math.cos(tilt), math.sin(tilt)
    stretched = outline * size * rng.uniform(0.9, 1, 2)
    return stretched @ np.array([(cos, sin), (-sin, cos)]) + center


def scatter(rng, canvas, outlines, max_tilt):
    """Draws 1 to 4 objects of the outlines, which go by class name."""
    height, width = canvas.owner.shape
    for _ in range(rng.integers(1, 5)):
        for _ in range(20):  # places, until one hides no object too much
            name = str(rng.choice(list(outlines)))
            size = min(height, width) * rng.uniform(0.25, 0.5)
            center = rng.uniform(0.15, 0.85, 2) * (width, height)
            outline = placed(rng, outlines[name], center, size, max_tilt)
            if canvas.draw(rng, name, [outline]):
                break


def draw_crowd(rng, canvas):
    """Draws a clump of small objects of one class as one crowd."""
    height, width = canvas.owner.shape
    name = str(rng.choice(list(COCO_OUTLINES)))
    size = 0.1 * min(height, width)
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    cells = [(x, y) for x in (-1.5, -0.5, 0.5, 1.5) for y in (-1, 0, 1)]
    parts = [
        placed(rng, COCO_OUTLINES[name], center, size, math.pi)
        for center in middle + size * np.array(cells)
    ]
    canvas.draw(rng, name, parts, crowd=True)


def draw_scene(rng, height, width):
    """Draws layers of stuff, one below the other.

    Returns:
        tuple[ndarray, ndarray]: The picture, H x W x 3, and its label map,
        H x W, with 0 along the lines where two layers meet.
    """
    scene = ADE_SCENES[rng.integers(len(ADE_SCENES))]
    pixels = np.zeros((height, width, 3))
    labels = np.zeros((height, width), np.uint8)
    rows = np.arange(height)[:, None]
    for layer, name in enumerate(scene):
        slope = rng.uniform(-0.08, 0.08) * np.linspace(-1, 1, width)
        middle = (layer + rng.uniform(-0.2, 0.2)) / len(scene)
        edge = height * (middle + slope) if layer else np.full(width, -2)
        below = rows >= edge
        value, color = ADE_STUFF[name]
        pixels[below] = textured(rng, height, width, color, 20)[below]
        labels[below] = value
        labels[abs(rows - edge) < 1] = 0
    return pixels, labels


# ----------------------------------------------------------------- writing


def coco_categories():
    """The 80 categories of COCO with their ids, in the order of the ids."""
    ids = (i for i in range(1, 91) if i not in COCO_UNUSED_IDS)
    return [
        {'supercategory': group, 'id': next(ids), 'name': name}
        for group, names in COCO_NAMES.items()
        for name in names.split(', ')
    ]


def coco_annotation(mask, crowd):
    """Area, box and segmentation of a mask, as COCO writes them."""
    mask = np.asfortranarray(mask, np.uint8)
    runs = coco_masks.encode(mask)
    segmentation = runs | {'counts': runs['counts'].decode()}
    if not crowd:
        # OpenCV's contours go through centers of pixels: take smaller ones.
        contours, _ = cv2.findContours(
            mask.repeat(2, 0).repeat(2, 1),
            cv2.RETR_EXTERNAL,
            cv2.CHAIN_APPROX_SIMPLE,
        )
        segmentation = [((c.ravel() + 0.5) / 2).tolist() for c in contours]
    return {
        'segmentation': segmentation,
        'area': float(coco_masks.area(runs)),
        'iscrowd': int(crowd),
        'bbox': coco_masks.toBbox(runs).tolist(),
    }


def write_coco(out, split, blanks):
    """Writes a split in the layout of COCO 2017; see `DATASETS`."""
    categories = coco_categories()
    ids = {category['name']: category['id'] for category in categories}
    images, annotations = [], []
    for index, rng, height, width in blanks:
        canvas = textured_canvas(rng, height, width)
        if index % COCO_EMPTY_EVERY:
            if index % COCO_CROWD_EVERY == COCO_CROWD_EVERY // 2:
                draw_crowd(rng, canvas)
            scatter(rng, canvas, COCO_OUTLINES, max_tilt=math.pi)
        image_id = COCO_FIRST_ID[split] + index - 1
        file_name = f'{image_id:012d}.jpg'
        canvas.save(rng, out / f'{split}2017' / file_name)
        images.append(
            dict(
                license=1,
                file_name=file_name,
                height=height,
                width=width,
                id=image_id,
            )
        )
        for number, (item, mask) in enumerate(canvas.seen()):
            numbers = dict(
                image_id=image_id,
                category_id=ids[item.name],
                id=10 * image_id + number,
            )
            annotations.append(coco_annotation(mask, item.crowd) | numbers)
    contents = dict(
        info={'description': NOTE},
        licenses=[dict(id=1, name='None: drawn, no photographs', url='')],
        images=images,
        annotations=annotations,
        categories=categories,
    )
    path = out / 'annotations' / f'instances_{split}2017.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(contents))


def write_ade20k(out, split, blanks):
    """Writes a split in the layout of ADE20K; see `DATASETS`."""
    folder = ADE_FOLDERS[split]
    (out / 'annotations' / folder).mkdir(parents=True)
    for index, rng, height, width in blanks:
        pixels, labels = draw_scene(rng, height, width)
        canvas = Canvas(pixels)
        scatter(rng, canvas, ADE_OUTLINES, max_tilt=0.5)
        for item, mask in canvas.seen():
            labels[mask] = ADE_OBJECTS[item.name]
        name = f'ADE_{split}_{index:08d}'
        canvas.save(rng, out / 'images' / folder / f'{name}.jpg')
        path = out / 'annotations' / folder / f'{name}.png'
        Image.fromarray(labels).save(path)


def write_imagenet(out, split, blanks):
    """Writes a split in the layout of ImageNet; see `DATASETS`.

    The lists in meta/ say which labels the folders have: without them,
    mmpretrain wants all 1000 folders.
    """
    lines = []
    for index, rng, height, width in blanks:
        canvas = textured_canvas(rng, height, width)
        number = index % len(IMAGENET_CLASSES)
        folder, label, outline = IMAGENET_CLASSES[number]
        extent = min(height, width) * rng.uniform(0.5, 0.8)
        center = rng.uniform(0.4, 0.6, 2) * (width, height)
        outline = placed(rng, outline, center, extent, math.pi)
        canvas.draw(rng, folder, [outline])
        stem = folder if split == 'train' else 'ILSVRC2012_val'
        name = f'{folder}/{stem}_{index:08d}.JPEG'
        canvas.save(rng, out / split / name)
        lines.append(f'{name} {label}\n')
    path = out / 'meta' / f'{split}.txt'
    path.parent.mkdir(exist_ok=True)
    path.write_text(''.join(lines))


# Another layout is one more entry: write(out, split, blanks) of a folder
# (Path), 'train' or 'val', and `blank_images`.
DATASETS = {
    'coco': write_coco,
    'ade20k': write_ade20k,
    'imagenet': write_imagenet,
}


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'dataset', choices=DATASETS, help='the layout to follow'
    )
    parser.add_argument(
        'out',
        type=Path,
        help="what a config's data_root names, such as data/coco or "
        'data/ade/ADEChallengeData2016; absent or empty',
    )
    parser.add_argument(
        '--images',
        type=int,
        default=400,
        help='training images; a fifth as many more, at least 8, are drawn '
        'for validation. Defaults to %(default)s',
    )
    size = 'long side of the images in pixels. Defaults to %(default)s'
    parser.add_argument('--size', type=int, default=256, help=size)
    seed = 'what all drawings follow from. Defaults to %(default)s'
    parser.add_argument('--seed', type=int, default=0, help=seed)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.out.exists() and (args.out.is_file() or any(args.out.iterdir())):
        parser.error(
            f'{args.out} is not empty: choose another OUT, or remove it '
            'yourself'
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'DRAWN.txt').write_text(f'{NOTE}\n')
    counts = {'train': args.images, 'val': max(8, args.images // 5)}
    for split, count in counts.items():
        blanks = blank_images(split, count, args.size, args.seed)
        DATASETS[args.dataset](args.out, split, blanks)
    summary = ' and '.join(f'{counts[split]} {split}' for split in SPLITS)
    print(f'Wrote {summary} images to {args.out}. {NOTE}')


if __name__ == '__main__':
    main()
