"""Draw a miniature dataset in the layout of COCO 2017, ADE20K or ImageNet.

The pictures are drawn by this program: simple shapes on textured
backgrounds. Nothing is downloaded and nothing is a photograph. File names,
annotation formats, category ids and category names are those of the real
dataset, so that a config written for it runs unmodified, for a first run or
a test of the whole pipeline. Scores on these pictures say nothing about the
real dataset.
"""

import argparse
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track

MARKER = 'sample_data.json'
FORMAT_VERSION = 1
NOTE = 'Drawn by tools/make_sample_data.py, not downloaded.'
SPLITS = ('train', 'val')

MIN_VISIBLE = 0.75  # of an object's area: none is hidden more than this
OVERSAMPLING = 4  # of the outlines, for smooth edges
PATTERNS = ('gradient', 'stripes', 'checks', 'smooth')

# ---------------------------------------------------------------- outlines
# Polygons of shape (K, 2), x right and y down, centred, about 1 across.


def mirrored(half):
    """Completes the right half of an outline symmetric about x = 0."""
    half = np.array(half)
    return np.concatenate([half, half[::-1] * (-1, 1)])


def disc():
    angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    return 0.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def flower():
    angle = np.linspace(0, 2 * math.pi, 100, endpoint=False)
    radius = 0.35 + 0.15 * np.cos(5 * angle)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def crescent():
    angle = np.linspace(-1.25, 1.25, 40)
    middle = np.stack([np.sin(angle), np.cos(angle) - 0.65], axis=1)
    normal = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    half_width = 0.25 * np.sqrt(np.cos(angle * math.pi / 2.5))[:, None]
    outer, inner = middle + half_width * normal, middle - half_width * normal
    return 0.5 * np.concatenate([outer, inner[::-1]])


def slice_of_disc():
    angle = np.linspace(-0.33, 0.33, 20)
    arc = np.stack([np.sin(angle), 0.5 - np.cos(angle)], axis=1)
    return np.concatenate([[(0, 0.5)], arc])


def rectangle(aspect):
    return mirrored([(0.5 / aspect, -0.5), (0.5 / aspect, 0.5)])


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
    'banana': crescent(),
    'pizza': slice_of_disc(),
    'remote': rectangle(aspect=3.2),
    'sports ball': disc(),
}
COCO_FIRST_ID = {'train': 1, 'val': 500_001}
COCO_EMPTY_EVERY = 20  # the 20th, 40th, ... image shows no object
COCO_CROWD_EVERY = 10  # the 5th, 15th, ... image shows a crowd


class Stuff(NamedTuple):
    """How a background class of ADE20K looks.

    Attributes:
        index (int): Value in the label maps, 1 to 150.
        dark (tuple[int, int, int]): RGB at the pattern's 0.
        light (tuple[int, int, int]): RGB at the pattern's 1.
        pattern (str): One of ``PATTERNS``.
        period (float): Of the pattern, as a share of the long side.
        angle (float): Direction of change, in radians, 0 for along x.
        ridge (float): Height of the upper edge's ups and downs, as a share
            of the image height. Defaults to 0, a straight edge.
    """

    index: int
    dark: tuple
    light: tuple
    pattern: str
    period: float
    angle: float
    ridge: float = 0


VERTICAL = math.pi / 2
WALL = Stuff(1, (205, 185, 160), (232, 220, 200), 'stripes', 0.07, 0)
SKY = Stuff(3, (90, 150, 230), (205, 226, 248), 'gradient', 1, VERTICAL)
FLOOR = Stuff(4, (112, 72, 46), (156, 108, 70), 'checks', 0.1, 0.5)
CEILING = Stuff(6, (232, 232, 228), (252, 252, 250), 'gradient', 1, VERTICAL)
ROAD = Stuff(7, (66, 66, 72), (98, 98, 102), 'smooth', 0.03, 0)
GRASS = Stuff(10, (34, 98, 30), (104, 168, 62), 'smooth', 0.025, 0, 0.03)
MOUNTAIN = Stuff(17, (84, 74, 84), (160, 146, 146), 'smooth', 0.12, 0, 0.22)
SEA = Stuff(27, (14, 70, 116), (62, 132, 168), 'stripes', 0.045, VERTICAL)
SAND = Stuff(47, (198, 170, 112), (232, 210, 160), 'smooth', 0.06, 0, 0.04)

# From the top of the picture to its bottom.
ADE_SCENES = (
    (SKY, MOUNTAIN, GRASS),
    (SKY, SEA, SAND),
    (SKY, GRASS, ROAD),
    (MOUNTAIN, SEA),
    (CEILING, WALL, FLOOR),
    (WALL, FLOOR),
)
ADE_INDICES = {
    'airplane': 91,
    'ball': 120,
    'book': 68,
    'flower': 67,
    'tent': 115,
}
ADE_OUTLINES = {
    'airplane': AIRPLANE,
    'ball': disc(),
    'book': rectangle(aspect=1.4),
    'flower': flower(),
    'tent': TRIANGLE,
}
ADE_FOLDERS = {'train': 'training', 'val': 'validation'}

# Folder, label and outline.
IMAGENET_CLASSES = (
    ('n02690373', 404, AIRPLANE),  # airliner
    ('n03291819', 549, rectangle(aspect=1.4)),  # envelope
    ('n03792972', 672, TRIANGLE),  # mountain tent
    ('n04074963', 761, rectangle(aspect=3.2)),  # remote control
    ('n04409515', 852, disc()),  # tennis ball
    ('n07753592', 954, crescent()),  # banana
    ('n07873807', 963, slice_of_disc()),  # pizza
    ('n11939491', 985, flower()),  # daisy
)

# ----------------------------------------------------------------- drawing


def pattern(rng, kind, height, width, period, angle):
    """Draws a grey pattern, H x W, values in [0, 1].

    The kind is one of ``PATTERNS``, the period in pixels, the angle that of
    the direction of change in radians, 0 for along x.
    """
    if kind == 'smooth':
        cells = math.ceil(height / period), math.ceil(width / period)
        coarse = Image.fromarray(rng.random(cells, dtype=np.float32))
        grey = coarse.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(grey).clip(0, 1)
    y, x = np.mgrid[:height, :width]
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    if kind == 'gradient':
        return (along - along.min()) / np.ptp(along)
    if kind == 'stripes':
        return 0.5 + 0.5 * np.sin(2 * math.pi * along / period)
    if kind == 'checks':
        return (along // period + across // period) % 2
    raise ValueError(f'pattern {kind!r} is none of {PATTERNS}')


def between(dark, light, grey):
    """Colours an H x W pattern, from dark at 0 to light at 1."""
    dark, light = np.asarray(dark, float), np.asarray(light, float)
    return dark + grey[..., None] * (light - dark)


def textured(rng, height, width, colour, contrast):
    """Draws a random texture, H x W x 3, that varies about an RGB colour."""
    kind = rng.choice(PATTERNS)
    period = max(height, width) * rng.uniform(0.04, 0.25)
    grey = pattern(rng, kind, height, width, period, rng.uniform(0, math.pi))
    change = rng.uniform(-contrast, contrast, 3)
    return between(colour - change, colour + change, grey)


def coverage(outline, height, width):
    """The share of each pixel that lies inside an outline, H x W."""
    scale = OVERSAMPLING
    image = Image.new('L', (width * scale, height * scale))
    points = [tuple(point) for point in outline * scale]
    ImageDraw.Draw(image).polygon(points, fill=255)
    return np.asarray(image.reduce(scale)) / 255


def signed_area(points):
    """Area of a polygon (K, 2); positive for clockwise on the screen."""
    x, y = np.transpose(points)
    return 0.5 * (x * np.roll(y, -1) - y * np.roll(x, -1)).sum()


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
            rng (numpy.random.Generator): Source of colour and texture.
            name (str): The object's class.
            outlines (list[ndarray]): Its parts, each (K, 2) in pixels.
            crowd (bool): Whether the parts are objects of a crowd.

        Returns:
            bool: Whether it was drawn.
        """
        height, width = self.owner.shape
        covers = [coverage(outline, height, width) for outline in outlines]
        mask = np.max(covers, axis=0) >= 0.5
        area = sum(abs(signed_area(outline)) for outline in outlines)
        objects = [*self.objects, Drawn(name, area, crowd)]
        owner = np.where(mask, len(objects), self.owner)
        visible = np.bincount(owner.ravel(), minlength=len(objects) + 1)[1:]
        areas = np.array([drawn.area for drawn in objects])
        if (visible < MIN_VISIBLE * areas).any():
            return False
        self.objects, self.owner = objects, owner
        for cover in covers:
            self._paint(rng, cover[..., None])
        return True

    def _paint(self, rng, cover):
        rows, columns = cover.any(axis=(1, 2)), cover.any(axis=(0, 2))
        if not rows.any():  # a part outside the picture
            return
        behind = self.pixels[rows][:, columns].reshape(-1, 3)

        def contrast(colour):
            return np.quantile(np.linalg.norm(behind - colour, axis=1), 0.1)

        colour = max(rng.uniform(15, 240, (8, 3)), key=contrast)
        fill = textured(rng, *self.owner.shape, colour, contrast=25)
        self.pixels = self.pixels + cover * (fill - self.pixels)

    def masks(self):
        """The visible pixels of each object, a list of H x W arrays."""
        return [self.owner == k + 1 for k in range(len(self.objects))]

    def jpeg(self, rng):
        """The picture with pixel noise, as the bytes of a JPEG file."""
        noise = rng.normal(0, rng.uniform(1, 6), self.pixels.shape)
        pixels = np.clip(self.pixels + noise, 0, 255).astype(np.uint8)
        return encoded(pixels, 'JPEG', quality=92)


def encoded(array, image_format, **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, image_format, **options)
    return buffer.getvalue()


def begin(split, index, size, seed):
    """What an image begins with; no other image has a part in it.

    Args:
        split (str): 'train' or 'val'.
        index (int): The image's number in its split, from 1.
        size (int): The long side in pixels.
        seed (int): The dataset's seed.

    Returns:
        tuple[numpy.random.Generator, int, int]: Source of randomness, height
        and width, landscape or portrait.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    short = int(rng.integers(math.ceil(0.75 * size), size + 1))
    return rng, *((size, short) if rng.random() < 0.5 else (short, size))


def textured_canvas(rng, height, width):
    """A canvas with a random texture."""
    colour = rng.uniform(40, 215, 3)
    return Canvas(textured(rng, height, width, colour, contrast=40))


def placed(rng, outline, centre, size, max_tilt):
    """An outline in pixels, at a random tilt and slightly stretched."""
    tilt = rng.uniform(-max_tilt, max_tilt)
    cos, sin = math.cos(tilt), math.sin(tilt)
    stretched = outline * size * rng.uniform(0.9, 1, 2)
    return stretched @ np.array([(cos, sin), (-sin, cos)]) + centre


def scatter(rng, canvas, outlines, max_tilt):
    """Draws 1 to 4 objects of the outlines, which go by class name."""
    height, width = canvas.owner.shape
    for _ in range(rng.integers(1, 5)):
        for _ in range(20):  # places, until one hides no object too much
            name = str(rng.choice(list(outlines)))
            size = min(height, width) * rng.uniform(0.25, 0.5)
            centre = rng.uniform(0.15, 0.85, 2) * (width, height)
            outline = placed(rng, outlines[name], centre, size, max_tilt)
            if canvas.draw(rng, name, [outline]):
                break


# -------------------------------------------------------------------- COCO


def draw_crowd(rng, canvas):
    """Draws a clump of small objects of one class as one crowd."""
    height, width = canvas.owner.shape
    name = str(rng.choice(list(COCO_OUTLINES)))
    size = 0.1 * min(height, width)
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    cells = [(x, y) for x in (-1.5, -0.5, 0.5, 1.5) for y in (-1, 0, 1)]
    centres = middle + size * (cells + rng.uniform(-0.3, 0.3, (12, 2)))
    parts = [
        placed(rng, COCO_OUTLINES[name], centre, size, math.pi)
        for centre in centres
    ]
    canvas.draw(rng, name, parts, crowd=True)


def draw_coco(split, index, size, seed):
    """Draws an image of the COCO layout: a canvas and its JPEG file."""
    rng, height, width = begin(split, index, size, seed)
    canvas = textured_canvas(rng, height, width)
    if index % COCO_EMPTY_EVERY:
        if index % COCO_CROWD_EVERY == COCO_CROWD_EVERY // 2:
            draw_crowd(rng, canvas)
        scatter(rng, canvas, COCO_OUTLINES, max_tilt=math.pi)
    return canvas, canvas.jpeg(rng)


def boundary_loops(mask):
    """Traces a mask along the edges of its pixels.

    Args:
        mask (ndarray): H x W, bool.

    Returns:
        list[ndarray]: Closed polygons (K, 2) of pixel corners (x, y),
        clockwise on the screen around every 4-connected part, counter-
        clockwise around every hole.
    """
    padded = np.pad(mask, 1)
    # Every edge between a pixel of the mask and one outside it, as the
    # corner where it begins and its direction, the mask on its right.
    steps = ((1, 0), (0, 1), (-1, 0), (0, -1))
    sides = (  # the neighbour beyond the edge, the pixel's corner
        (padded[:-2, 1:-1], (0, 0)),
        (padded[1:-1, 2:], (1, 0)),
        (padded[2:, 1:-1], (1, 1)),
        (padded[1:-1, :-2], (0, 1)),
    )
    edges = {}  # ordered, as a set is not
    for direction, (neighbour, corner) in enumerate(sides):
        begins = np.argwhere(mask & ~neighbour)[:, ::-1] + corner
        edges.update({(x, y, direction): None for x, y in begins.tolist()})

    loops = []
    remaining = edges.copy()
    while remaining:
        edge = next(iter(remaining))
        loop = []
        heading = None
        while edge in remaining:
            del remaining[edge]
            x, y, direction = edge
            if direction != heading:
                loop.append((x, y))
            heading = direction
            x, y = x + steps[heading][0], y + steps[heading][1]
            # A right turn first: parts that meet in a corner are separate.
            turns = ((x, y, (heading + turn) % 4) for turn in (1, 0, -1))
            edge = next(turn for turn in turns if turn in edges)
        loops.append(np.array(loop))
    return loops


def polygons(mask):
    """Outlines of a mask's parts, cut so that none encloses a hole.

    Args:
        mask (ndarray): H x W, bool.

    Returns:
        list[ndarray]: Polygons (K, 2) of pixel corners (x, y). Together
        they cover exactly the mask.
    """
    loops = boundary_loops(mask)
    for loop in loops:
        if signed_area(loop) < 0:
            row = (loop[:, 1].min() + loop[:, 1].max()) // 2
            above, below = mask.copy(), mask.copy()
            above[row:] = False
            below[:row] = False
            return polygons(above) + polygons(below)
    return loops


def run_lengths(mask):
    """COCO's uncompressed RLE: column by column, the first run of zeros."""
    flat = np.concatenate([[False], mask.ravel(order='F')])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(changes, prepend=0, append=mask.size).tolist()
    return {'size': list(mask.shape), 'counts': counts}


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
    (top, bottom), (left, right) = (
        np.flatnonzero(mask.any(axis=axis))[[0, -1]] for axis in (1, 0)
    )
    box = left, top, right - left + 1, bottom - top + 1
    if crowd:
        segmentation = run_lengths(mask)
    else:
        segmentation = [
            polygon.ravel().astype(float).tolist()
            for polygon in polygons(mask)
        ]
    return {
        'segmentation': segmentation,
        'area': float(mask.sum()),
        'iscrowd': int(crowd),
        'bbox': [float(value) for value in box],
    }


def write_coco(out, split, indices, size, seed):
    """Writes a split in the layout of COCO 2017; see `DATASETS`."""
    categories = coco_categories()
    ids = {category['name']: category['id'] for category in categories}
    images, annotations = [], []
    for index in indices:
        canvas, jpeg = draw_coco(split, index, size, seed)
        image_id = COCO_FIRST_ID[split] + index - 1
        height, width = canvas.owner.shape
        file_name = f'{image_id:012d}.jpg'
        write(out / f'{split}2017' / file_name, jpeg)
        images.append(
            {
                'license': 1,
                'file_name': file_name,
                'height': height,
                'width': width,
                'id': image_id,
            }
        )
        drawn = zip(canvas.objects, canvas.masks(), strict=True)
        for number, (item, mask) in enumerate(drawn):
            annotations.append(
                {
                    **coco_annotation(mask, item.crowd),
                    'image_id': image_id,
                    'category_id': ids[item.name],
                    'id': 10 * image_id + number,
                }
            )
    contents = {
        'info': {'description': NOTE, 'version': str(FORMAT_VERSION)},
        'licenses': [
            {'id': 1, 'name': 'None: drawn, no photographs', 'url': ''}
        ],
        'images': images,
        'annotations': annotations,
        'categories': categories,
    }
    path = out / 'annotations' / f'instances_{split}2017.json'
    write(path, json.dumps(contents).encode())


# ------------------------------------------------------------------ ADE20K


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
    for layer, stuff in enumerate(scene):
        period = stuff.period * max(height, width)
        grey = pattern(rng, stuff.pattern, height, width, period, stuff.angle)
        light = rng.uniform(-15, 15, 3)
        fill = between(stuff.dark + light, stuff.light + light, grey)
        if layer == 0:
            edge = np.full(width, -2)
        else:
            middle = (layer + rng.uniform(-0.2, 0.2)) / len(scene)
            slope = rng.uniform(-0.08, 0.08) * np.linspace(-1, 1, width)
            knots = rng.uniform(-0.5, 0.5, 9) * stuff.ridge
            ups_and_downs = np.interp(
                np.linspace(0, 8, width), np.arange(9), knots
            )
            edge = height * (middle + slope + ups_and_downs)
        below = rows >= edge
        pixels[below] = fill[below]
        labels[below] = stuff.index
        labels[abs(rows - edge) < 1] = 0
    return pixels, labels


def draw_ade20k(split, index, size, seed):
    """Draws an image of the ADE20K layout.

    Returns:
        tuple[Canvas, ndarray, bytes]: The drawing, its label map (uint8,
        H x W, 0 for unlabelled) and its JPEG file.
    """
    rng, height, width = begin(split, index, size, seed)
    pixels, labels = draw_scene(rng, height, width)
    canvas = Canvas(pixels)
    scatter(rng, canvas, ADE_OUTLINES, max_tilt=0.5)
    for item, mask in zip(canvas.objects, canvas.masks(), strict=True):
        labels[mask] = ADE_INDICES[item.name]
    return canvas, labels, canvas.jpeg(rng)


def write_ade20k(out, split, indices, size, seed):
    """Writes a split in the layout of ADE20K; see `DATASETS`."""
    folder = ADE_FOLDERS[split]
    for index in indices:
        _, labels, jpeg = draw_ade20k(split, index, size, seed)
        name = f'ADE_{split}_{index:08d}'
        write(out / 'images' / folder / f'{name}.jpg', jpeg)
        label_file = out / 'annotations' / folder / f'{name}.png'
        write(label_file, encoded(labels, 'PNG'))


# ---------------------------------------------------------------- ImageNet


def draw_imagenet(split, index, size, seed):
    """Draws an image of one object: its folder, label and JPEG file."""
    rng, height, width = begin(split, index, size, seed)
    canvas = textured_canvas(rng, height, width)
    number = index % len(IMAGENET_CLASSES)
    folder, label, outline = IMAGENET_CLASSES[number]
    extent = min(height, width) * rng.uniform(0.5, 0.8)
    centre = rng.uniform(0.4, 0.6, 2) * (width, height)
    canvas.draw(rng, folder, [placed(rng, outline, centre, extent, math.pi)])
    return folder, label, canvas.jpeg(rng)


def write_imagenet(out, split, indices, size, seed):
    """Writes a split in the layout of ImageNet; see `DATASETS`.

    The lists in meta/ say which labels the folders have: without them,
    mmpretrain wants all 1000 folders.
    """
    lines = []
    for index in indices:
        folder, label, jpeg = draw_imagenet(split, index, size, seed)
        stem = folder if split == 'train' else 'ILSVRC2012_val'
        name = f'{folder}/{stem}_{index:08d}.JPEG'
        write(out / split / name, jpeg)
        lines.append(f'{name} {label}\n')
    write(out / 'meta' / f'{split}.txt', ''.join(lines).encode())


# ------------------------------------------------------------ command line

# Another layout is one more entry: write(out, split, indices, size, seed) of
# a folder (Path), 'train' or 'val', numbers of images from 1, the long side
# of the images in pixels and the dataset's seed.
DATASETS = {
    'coco': write_coco,
    'ade20k': write_ade20k,
    'imagenet': write_imagenet,
}


def replace(path, contents):
    """Writes a file, which is either whole or not there at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.partial')
    partial.write_bytes(contents)
    partial.replace(path)


def write(path, contents):
    """Writes a file of the dataset, never over any other.

    Raises:
        FileExistsError: If there is a file with other contents.
    """
    if not path.exists():
        replace(path, contents)
    elif path.read_bytes() != contents:
        raise FileExistsError(
            f'{path} is not a file of this dataset: choose another OUT, or '
            'remove it yourself'
        )


def write_marker(out, arguments, complete):
    """Records in a dataset's folder what it holds."""
    marker = {**arguments, 'note': NOTE, 'complete': complete}
    replace(out / MARKER, json.dumps(marker, indent=2).encode() + b'\n')


def read_marker(out):
    """What a folder's marker says, empty if it has none of this tool's."""
    try:
        marker = json.loads((out / MARKER).read_bytes())
    except (OSError, ValueError):
        return {}
    drawn = isinstance(marker, dict) and marker.get('note') == NOTE
    return marker if drawn else {}


def claim(out, arguments):
    """Makes a folder the own one of a dataset drawn from these arguments.

    Returns:
        bool: Whether the dataset is there already, complete.

    Raises:
        FileExistsError: If the folder holds anything else.
    """
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        write_marker(out, arguments, complete=False)
        return False
    marker = read_marker(out)
    found = {key: marker.get(key) for key in arguments}
    if found == arguments:
        return marker.get('complete') is True
    if marker:
        problem = f'holds sample data drawn with other arguments, {found}'
    else:
        problem = 'exists and is not a folder of drawn sample data'
    raise FileExistsError(
        f'{out} {problem}: choose another OUT, or remove it yourself'
    )


def integer(low, high):
    """An argument type: an integer in [low, high]."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f'{text!r} is not an integer from {low} to {high}'
            )
        return value

    return parse


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
        'data/ade/ADEChallengeData2016; absent, empty, or left by an '
        'interrupted run of the same command',
    )
    parser.add_argument(
        '--images',
        type=integer(1, 100_000),
        default=400,
        help='training images; a fifth as many more, at least 8, are drawn '
        'for validation. Defaults to %(default)s',
    )
    parser.add_argument(
        '--size',
        type=integer(64, 4096),
        default=256,
        help='long side of the images in pixels. Defaults to %(default)s',
    )
    parser.add_argument(
        '--seed',
        type=integer(0, 2**32 - 1),
        default=0,
        help='what all drawings follow from. Defaults to %(default)s',
    )
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    arguments = {
        'dataset': args.dataset,
        'images': args.images,
        'size': args.size,
        'seed': args.seed,
        'format_version': FORMAT_VERSION,
    }
    counts = {'train': args.images, 'val': max(8, args.images // 5)}
    summary = ' and '.join(f'{counts[split]} {split}' for split in SPLITS)
    try:
        if claim(args.out, arguments):
            print(f'Already there: {summary} images in {args.out}. {NOTE}')
            return
        for split in SPLITS:
            indices = track(
                range(1, counts[split] + 1),
                description=f'{args.dataset} {split}',
                console=Console(stderr=True),
            )
            DATASETS[args.dataset](
                args.out, split, indices, args.size, args.seed
            )
        write_marker(args.out, arguments, complete=True)
    except OSError as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(f'Wrote {summary} images to {args.out}. {NOTE}')


if __name__ == '__main__':
    main()
