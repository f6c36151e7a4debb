"""
Draws the shapes world: small pictures of coloured shapes, and captions that say what words can.

    python data/shapes/prepare.py            # 30,000 training and 1,000 validation scenes, seconds

writes data/shapes/{train,val}/00000.tar, ... with KEY.png, KEY.txt and KEY.json, and shards.json, which names
the shards: a second call replaces what the first one wrote, and nothing else. Position and size vary
continuously while the caption names only one of nine places and one of two sizes, so an image embedding can
know more than the caption. No validation caption occurs in training. See readme.md.
"""

import io
import json
import os
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.settings import Count, NonNegative, add_to_tar, read_json, read_settings, write_json

RESOLUTION = 32  # pixels; small enough to train on a laptop
COLORS = {
    "red": (225, 35, 35),
    "yellow": (245, 215, 40),
    "green": (40, 165, 60),
    "cyan": (60, 210, 225),
    "blue": (40, 70, 225),
    "purple": (165, 50, 200),
}
BACKGROUNDS = {"white": (250,) * 3, "grey": (128,) * 3, "black": (15,) * 3, "brown": (110, 72, 40)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (2.8, 3.8), "large": (5.0, 6.5)}  # range of the half width, in pixels
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
JITTER = 3.5  # pixels around a place's middle, less than half the distance of two places
MAP = "abcdefghijklmnop"  # columns and rows of 2 pixels, for exact descriptions
SPLITS = {"train": 30_000, "val": 1_000}


def sample_scene(rng: np.random.Generator) -> dict:
    """A random scene: {"background": name, "objects": [{size, color, shape, place, x, y, r}, ...]}, with x, y
    and half width r in pixels. Objects are in reading order, at different places, and overlap nothing."""
    count = rng.choice([1, 2, 3], p=[0.2, 0.4, 0.4])
    while True:
        objects = []
        for place in sorted(rng.choice(9, size=count, replace=False)):
            size = str(rng.choice(list(SIZES)))
            r = rng.uniform(*SIZES[size])
            middle = (np.array([place % 3, place // 3]) + 0.5) * RESOLUTION / 3
            low = np.maximum(middle - JITTER, r + 0.5)
            high = np.minimum(middle + JITTER, RESOLUTION - r - 0.5)
            x, y = rng.uniform(low, high)
            color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
            x, y, r = round(x, 3), round(y, 3), round(r, 3)
            objects.append(dict(size=size, color=color, shape=shape, place=PLACES[place], x=x, y=y, r=r))
        pairs = [(a, b) for i, a in enumerate(objects) for b in objects[:i]]
        # squares reach furthest at their corners; between two shapes are 1.5 pixels of background
        if all(max(abs(a["x"] - b["x"]), abs(a["y"] - b["y"])) > a["r"] + b["r"] + 1.5 for a, b in pairs):
            return dict(background=str(rng.choice(list(BACKGROUNDS))), objects=objects)


def coverage(shape: str, x: float, y: float, r: float) -> np.ndarray:
    """The share of each pixel that the shape covers, (32, 32) in [0, 1], from the distance to its outline."""
    v, u = np.mgrid[:RESOLUTION, :RESOLUTION] + 0.5
    u, v = u - x, v - y
    if shape == "circle":
        distance = np.hypot(u, v) - r
    elif shape == "square":
        distance = np.maximum(abs(u), abs(v)) - 0.9 * r  # 0.9: looks as large as the circle
    elif shape == "triangle":  # standing on its base, as wide as high
        distance = np.maximum(v - r, (2 * abs(u) - (v + r)) / 5**0.5)
    return np.clip(0.5 - distance, 0, 1)


def draw(scene: dict) -> Image.Image:
    """The scene as an RGB picture, anti-aliased, so that sub-pixel positions can be seen."""
    pixels = np.ones((RESOLUTION, RESOLUTION, 3)) * BACKGROUNDS[scene["background"]]
    for o in scene["objects"]:
        alpha = coverage(o["shape"], o["x"], o["y"], o["r"])[..., None]
        pixels = pixels * (1 - alpha) + alpha * COLORS[o["color"]]
    return Image.fromarray(pixels.round().astype(np.uint8))


def describe(scene: dict) -> str:
    """The caption: "a small blue circle at the top left and ... on a white background"."""
    things = [f"a {o['size']} {o['color']} {o['shape']} at the {o['place']}" for o in scene["objects"]]
    return " and ".join(things) + f" on a {scene['background']} background"


def describe_precisely(scene: dict) -> str:
    """The caption with map references, "a small blue circle at k f size c": column and row (2 pixels each)
    and size (0.4 pixels each) as letters. Only the drawing model has read such texts, too."""
    things = []
    for o in scene["objects"]:
        column, row = MAP[int(o["x"] / 2)], MAP[int(o["y"] / 2)]
        size = MAP[int((o["r"] - SIZES["small"][0]) / 0.4)]
        things.append(f"a {o['size']} {o['color']} {o['shape']} at {column} {row} size {size}")
    return " and ".join(things) + f" on a {scene['background']} background"


def scenes(split: str, count: int, seed: int = 0, exclude: set[str] = frozenset()):
    """Yields `count` scenes with captions that are not in `exclude`; scene i depends on seed, split and i."""
    for i in range(count):
        rng = np.random.default_rng([seed, *split.encode(), i])
        scene = sample_scene(rng)
        while exclude and describe(scene) in exclude:
            scene = sample_scene(rng)
        yield scene


def validation_captions(seed: int = 0) -> set[str]:
    """What no training or pretraining scene may say."""
    return {describe(scene) for scene in scenes("val", SPLITS["val"], seed)}


def write_shard(path: Path, items) -> None:
    """Writes [(key, scene), ...] as one tar; complete or absent, because it is written beside and renamed."""
    with tarfile.open(path.with_suffix(".tmp"), "w") as tar:
        for key, scene in items:
            png = io.BytesIO()
            draw(scene).save(png, "png")
            texts = [("txt", describe(scene).encode()), ("json", json.dumps(scene).encode())]
            for ending, data in [("png", png.getvalue()), *texts]:
                add_to_tar(tar, f"{key}.{ending}", data)
    os.replace(path.with_suffix(".tmp"), path)


@dataclass
class PrepareConfig:
    out: Path = HERE  # for train/ and val/
    train: Count = SPLITS["train"]  # scenes
    seed: NonNegative = 0
    shard_size: Count = 10_000  # scenes a tar


def clear(folder: Path) -> None:
    """Removes the shards that an earlier call wrote: fewer scenes would leave some of them among the new
    ones. Raises ValueError if the folder holds other shards."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = read_json(folder / "shards.json")["shards"] if (folder / "shards.json").exists() else []
    others = sorted({path.name for path in folder.glob("*.tar")} - set(ours))
    if others:
        raise ValueError(f"{folder} holds shards that this did not write, such as {others[0]}: name another")
    for name in ours:
        (folder / name).unlink(missing_ok=True)


def main(argv=None):
    args = read_settings(PrepareConfig, argv, __doc__)
    held_out = validation_captions(args.seed)
    for split, count in [("train", args.train), ("val", SPLITS["val"])]:
        folder = args.out / split
        shards = [f"{shard:05d}.tar" for shard in range(-(-count // args.shard_size))]
        clear(folder)
        write_json(folder / "shards.json", {"scenes": count, "seed": args.seed, "shards": shards})
        stream = scenes(split, count, args.seed, exclude=held_out if split == "train" else frozenset())
        stream = enumerate(tqdm(stream, total=count, desc=split, unit=" scenes"))
        for number, name in enumerate(shards):
            size = min(args.shard_size, count - number * args.shard_size)
            items = ((f"{i:09d}", scene) for i, scene in (next(stream) for _ in range(size)))
            write_shard(folder / name, items)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
