"""
Measures a VLV on held-out scenes of the shapes world, where the truth is known.

    python data/shapes/evaluate.py --ckpt data/shapes/vlv        # 1,000 scenes, ten minutes on two cores

Captions: how many are exactly right, order free, and how many of their attributes. Pictures: pixel error, and
what is seen in them: an object counts as found where one is drawn, its colour, shape, size and place are each
compared with the true scene's, and its position in pixels. The first row measures the eye itself, on the
original pictures.
"""

import json
import re
import sys
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from prepare import BACKGROUNDS, COLORS, PLACES, RESOLUTION, SHAPES, SIZES, SPLITS
from prepare import coverage, describe, describe_precisely, draw, scenes
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data import two_clips  # noqa: F401  for SDXL and SD 3
from data.distributed import quiet
from data.results import find_checkpoint, panel
from data.settings import Count, Steps, NonNegative, read_settings
from vlv import VLV, DiffusionDecoder

ATTRIBUTES = ("size", "color", "shape", "place")
BORDER = (SIZES["small"][1] + SIZES["large"][0]) / 2  # half width between small and large


def parse(caption: str) -> dict:
    """What a caption says: {"background": name or None, "objects": [{size, color, shape, place}, ...]}."""
    one_of = lambda words: f"({'|'.join(sorted(words, key=len, reverse=True))})"
    size, color, shape, place = map(one_of, (SIZES, COLORS, SHAPES, PLACES))
    things = re.findall(rf"\ba {size} {color} {shape} at the {place}\b", caption)
    background = re.search(rf"on a ({'|'.join(BACKGROUNDS)}) background$", caption)
    return dict(background=background and background[1], objects=[dict(zip(ATTRIBUTES, t)) for t in things])


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a boolean picture, each as a boolean picture."""
    left, regions = mask.copy(), []
    while left.any():
        region = np.zeros_like(mask)
        region[np.unravel_index(left.argmax(), mask.shape)] = True
        while True:
            grown = region.copy()
            grown[1:] |= region[:-1]
            grown[:-1] |= region[1:]
            grown[:, 1:] |= region[:, :-1]
            grown[:, :-1] |= region[:, 1:]
            grown &= mask
            if (grown == region).all():
                break
            region = grown
        regions.append(region)
        left &= ~region
    return regions


def regions_of(pixels: np.ndarray, ground: np.ndarray) -> list[np.ndarray]:
    """Where objects are, each as a boolean picture: what is at least half covered by one of the palette's
    colours, connected and of one colour. Two objects may be so near that their blurred edges touch."""
    palette = np.array(list(COLORS.values()), float) - ground
    difference = pixels - ground
    # each pixel as a mixture of the background and that colour of the palette which leaves least unexplained
    alpha = np.clip(difference @ palette.T / np.square(palette).sum(1), 0, 1)  # (32, 32, colours)
    rest = np.square(difference[:, :, None] - alpha[..., None] * palette).sum(-1)
    color = rest.argmin(-1)
    covered = np.take_along_axis(alpha, color[..., None], -1)[..., 0] >= 0.5
    regions = []
    for region in components(covered):
        parts = [part for k in range(len(palette)) for part in components(region & (color == k))]
        parts = [part for part in parts if part.sum() >= 8]  # slivers belong to what they cling to
        regions += parts if len(parts) > 1 else [region]
    return [region for region in regions if region.sum() >= 8]


def see(image: Image.Image) -> dict:
    """Finds the shapes in a picture: a scene as prepare.sample_scene makes it, without knowing the true one.

    Each region gets the nearest colour of the palette. Area and centroid give position and size for each kind
    of shape, and the kind whose drawing is nearest is taken.
    """
    pixels = np.asarray(image, dtype=np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])  # shapes keep away from it
    ground = np.median(border, axis=0)
    nearest = lambda color, palette: min(palette, key=lambda name: np.abs(color - palette[name]).sum())
    difference = np.linalg.norm(pixels - ground, axis=-1)
    regions, objects = regions_of(pixels, ground), []
    for region in regions:
        core = region & (difference >= np.quantile(difference[region], 0.5))
        color = np.median(pixels[core], axis=0)
        around = region.copy()  # and the partly covered pixels at its edge, but for those of other regions
        for shift, axis in [(1, 0), (-1, 0), (1, 1), (-1, 1)]:
            around |= np.roll(region, shift, axis)
        for other in regions:
            around &= region | ~other
        direction = (color - ground) / max(1, np.square(color - ground).sum())
        alpha = np.clip((pixels - ground) @ direction, 0, 1) * around
        area = alpha.sum()
        v, u = np.mgrid[:RESOLUTION, :RESOLUTION] + 0.5
        x, y = (alpha * u).sum() / area, (alpha * v).sum() / area
        fits = [dict(shape="circle", x=x, y=y, r=(area / np.pi) ** 0.5),
                dict(shape="square", x=x, y=y, r=area**0.5 / 1.8),
                dict(shape="triangle", x=x, y=y - (area / 2) ** 0.5 / 3, r=(area / 2) ** 0.5)]
        found = min(fits, key=lambda fit: np.square(coverage(**fit) - alpha).sum())
        column, row = (max(0, min(2, int(3 * found[axis] / RESOLUTION))) for axis in "xy")
        size = "small" if found["r"] < BORDER else "large"
        objects.append(found | dict(color=nearest(color, COLORS), size=size, place=PLACES[row * 3 + column]))
    return dict(background=nearest(ground, BACKGROUNDS), objects=objects)


def pair(truth: list[dict], found: list[dict], cost) -> list[tuple]:
    """Pairs each true object with at most one found, at the least total cost: [(true, found or None),
    ...]."""
    candidates = sorted(found, key=lambda f: min(cost(t, f) for t in truth))[:4]
    candidates += [None] * len(truth)
    total = lambda order: sum(1e3 if f is None else cost(t, f) for t, f in zip(truth, order))
    return list(zip(truth, min(permutations(candidates, len(truth)), key=total)))


def score_captions(truths: list[dict], captions: list[str]) -> dict:
    exact = right = attributes = 0
    wrong = lambda t, f: sum(t[a] != f[a] for a in ATTRIBUTES)
    for truth, caption in zip(truths, captions):
        said = parse(caption)
        pairs = pair(truth["objects"], said["objects"], wrong)
        errors = sum(len(ATTRIBUTES) if f is None else wrong(t, f) for t, f in pairs)
        errors += truth["background"] != said["background"]
        count = len(ATTRIBUTES) * len(truth["objects"]) + 1
        right, attributes = right + count - errors, attributes + count
        exact += errors == 0 and len(said["objects"]) == len(truth["objects"])
    return dict(exact=exact / len(truths), attributes=right / attributes)


def judge(truth: dict, picture: Image.Image) -> dict:
    """What is right in one picture: its PSNR in dB; for each true object whether it was found and its
    attributes are right; of the found ones the errors of position and half width, in pixels; whether nothing
    is wrong."""
    error = np.square(np.asarray(draw(truth), float) - np.asarray(picture, float)).mean()
    seen = see(picture)
    pairs = pair(truth["objects"], seen["objects"], distance)
    found = [both for both in pairs if both[1] is not None]
    right = [[f is not None] + [f is not None and t[a] == f[a] for a in ATTRIBUTES] for t, f in pairs]
    same_background = seen["background"] == truth["background"]
    perfect = bool(np.all(right) and len(seen["objects"]) == len(pairs) and same_background)
    return dict(psnr=10 * np.log10(255**2 / max(error, 1e-2)), right=right, perfect=perfect,
                offsets=[distance(*p) for p in found], size_errors=[abs(t["r"] - f["r"]) for t, f in found])


def distance(t: dict, f: dict) -> float:
    return float(np.hypot(t["x"] - f["x"], t["y"] - f["y"]))


def summarize(judged: list[dict]) -> dict:
    """Of judged pictures: the mean PSNR, the shares of true objects that were found and rightly drawn, the
    mean errors of position and half width of the found ones, and the share of pictures with nothing wrong."""
    shares = np.mean([row for j in judged for row in j["right"]], axis=0).tolist()
    mean = lambda name: float(np.mean([j[name] for j in judged]))
    found_mean = lambda name: float(np.mean([v for j in judged for v in j[name]] or [np.nan]))
    shares = dict(zip(("found",) + ATTRIBUTES, shares))
    return dict(psnr=mean("psnr"), **shares, offset=found_mean("offsets"),
                size_error=found_mean("size_errors"), perfect=mean("perfect"))


def score_pictures(truths: list[dict], pictures: list[Image.Image]) -> dict:
    return summarize([judge(truth, picture) for truth, picture in zip(truths, pictures)])


def noise_of(decoder: DiffusionDecoder, seeds) -> tuple:
    """The denoising loss's noise of each image, from its own seed: the same in every batch."""
    side, noise = decoder.image_size // decoder.pipeline.vae_scale_factor, []
    for seed in seeds:
        torch.manual_seed(seed)
        normal = torch.randn(2, decoder.vae.config.latent_channels, side, side)
        noise.append((*normal, decoder.draw_timesteps(1, "cpu")[0]))
    return tuple(map(torch.stack, zip(*noise)))


def images_of(truths: list[dict]) -> torch.Tensor:
    """(n, 3, 32, 32) uint8"""
    pixels = np.stack([np.array(draw(truth)) for truth in truths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


ROWS = ("original", "VAE alone", "embedding", "generated caption", "true caption", "true caption with map",
        "embedding of another")


@dataclass
class EvaluateConfig:
    ckpt: str = str(HERE / "vlv")
    images: Annotated[int, 1, SPLITS["val"]] = SPLITS["val"]  # others were not kept from training
    seed_of_scenes: NonNegative = 0  # 0: the validation scenes; a fifth of others' captions were trained on
    rows: tuple[Literal[ROWS], ...] = ROWS
    num_inference_steps: Steps = 25
    guidance_scale: Annotated[float, 0, 1000] = 2.0
    num_beams: Annotated[int, 1, 100] = 4
    batch_size: Count = 50
    seed: NonNegative = 0
    picture: Path | None = None  # write originals, redrawn from embedding and from caption, there
    json: Path | None = None  # write the figures there, too


@torch.inference_mode()
def main(argv=None):
    quiet()
    args = read_settings(EvaluateConfig, argv, __doc__)
    try:
        model = VLV.from_pretrained(find_checkpoint(args.ckpt))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    decoder, captioner = model.decoder, model.caption_head
    truths = list(scenes("val", args.images, args.seed_of_scenes))
    originals = images_of(truths)
    rows = {row: [] for row in args.rows if row != "generated caption" or captioner}
    captions, ended, losses = [], [], {"empty prompt": 0.0, "true caption": 0.0, "embedding": 0.0}
    if type(decoder) is not DiffusionDecoder:  # of texts it needs what the pipeline pools of them
        losses = {"embedding": 0.0}
    prompt_embeds = torch.cat([model.embed(batch) for batch in originals.split(args.batch_size)])

    steps, scale = args.num_inference_steps, args.guidance_scale

    def redraw(row, prompt):
        if row in rows:
            rows[row] += decoder.reconstruct(prompt, steps, scale, args.seed)

    for at in tqdm(range(0, len(truths), args.batch_size), desc="evaluating", unit=" batches"):
        here = slice(at, at + args.batch_size)
        images, embeds, true_captions = originals[here], prompt_embeds[here], [*map(describe, truths[here])]
        if "original" in rows:
            rows["original"] += map(draw, truths[here])
        if "VAE alone" in rows:
            decoded = decoder.vae.decode(decoder.vae.encode(images / 127.5 - 1).latent_dist.mode()).sample
            rows["VAE alone"] += decoder.pipeline.image_processor.postprocess(decoded)
        redraw("embedding", embeds)
        redraw("embedding of another", prompt_embeds.roll(1, 0)[here])
        redraw("true caption", true_captions)
        redraw("true caption with map", [*map(describe_precisely, truths[here])])
        noise = noise_of(decoder, range(at, at + len(images)))
        texts = {"empty prompt": [""] * len(images), "true caption": true_captions}
        for name in losses:
            c = decoder.encode_prompt(texts[name]) if name in texts else embeds
            losses[name] += decoder.denoising_loss(images, c, noise=noise).item() * len(images)
        if captioner is not None:
            said = captioner.generate(embeds, args.num_beams)
            ids = captioner.tokenizer(said, add_special_tokens=False).input_ids  # as many as are taught: it was cut
            captions, ended = captions + said, ended + [len(i) < captioner.max_tokens for i in ids]
            redraw("generated caption", captions[here])
    losses = {name: total / len(truths) for name, total in losses.items()}
    result = {"images": len(truths), "denoising_loss": losses}
    print(f"{args.ckpt} on {len(truths)} held-out scenes, {steps} steps, guidance {scale}")
    print("denoising loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    if captioner is not None:
        result["captions"] = score_captions(truths, captions) | dict(ended=float(np.mean(ended)))
        print("captions: {exact:.1%} exactly right, {attributes:.2%} of attributes right, {ended:.1%} ended"
              " by themselves".format(**result["captions"]))
    print(f"{'redrawn from':22} PSNR dB | found  colour  shape   size  place | all right | off by px")
    for name, pictures in rows.items():
        result[name] = score_pictures(truths, pictures)
        print("{:22} {psnr:7.2f} | {found:5.1%}  {color:6.1%} {shape:6.1%} {size:6.1%} {place:6.1%} |"
              " {perfect:9.1%} | {offset:.2f}".format(name, **result[name]))
    if args.picture:
        columns = [row for row in ("original", "embedding", "generated caption") if row in rows]
        panel(list(zip(*(rows[name] for name in columns))), captions or [""] * len(truths)).save(args.picture)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
