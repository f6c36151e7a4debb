"""
Captions images and redraws them.

    python sample.py                              # a bundled picture, with the newest checkpoint in out/ or the toy
    python sample.py photos/ cat.jpg --ckpt out/stage2
    python sample.py --mix A.png B.png            # some queries of one image, the rest of the other

prints "PATH: CAPTION" a line, and writes into --out for each image STEM.png (original | redrawn from the embedding |
redrawn from the caption's text) and a line {"image": ..., "caption": ...} of captions.jsonl.
"""

import argparse
import json
import logging
import os
import sys
import textwrap
import warnings
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before the import, which already warns
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data.loader import crop_image, find_images, open_image
from vlv import VLV, find_checkpoint

HERE = Path(__file__).parent
BUNDLED = HERE / "data" / "shapes" / "vlv"
BUNDLED_PICTURE = HERE / "data" / "shapes" / "example.png"


def quiet():
    """No warnings of libraries that the user can do nothing about, and no bars for what loads in a moment."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("PIL").setLevel(logging.ERROR)


def panel(rows: list[list], captions: list[str]) -> Image.Image:
    """A picture of rows of images, (3, S, S) uint8 tensors or PIL images of side S, each row over its caption.
    Small images are enlarged pixel by pixel."""
    rows = [[i if isinstance(i, Image.Image) else Image.fromarray(np.asarray(i.permute(1, 2, 0))) for i in r] for r in rows]
    side = max(1, 192 // rows[0][0].width) * rows[0][0].width
    width, font, line = len(rows[0]) * (side + 4) - 4, ImageFont.load_default(14), 18
    texts = [textwrap.wrap(caption, max(10, width // 8)) for caption in captions]
    heights = [side + 4 + (line * len(text) + 6 if text else 0) for text in texts]
    sheet = Image.new("RGB", (width, sum(heights) - 4 * (not texts[-1])), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for row, text, height in zip(rows, texts, heights):
        for column, image in enumerate(row):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (column * (side + 4), top))
        for number, words in enumerate(text):
            draw.text((4, top + side + 3 + line * number), words, "black", font)
        top += height
    return sheet


def choose_checkpoint(ckpt: str | None) -> Path:
    """The one named, else the newest in out/, else the bundled toy."""
    if ckpt:
        return find_checkpoint(ckpt)
    trained = [p.parent for p in Path("out").glob("**/step-*/config.json") if p.parent.suffix == ""]
    return max(trained, key=lambda p: (p / "config.json").stat().st_mtime, default=BUNDLED)


def collect(names: list[str]) -> tuple[list[Path], list[str]]:
    """The image files that files and folders stand for, and a sentence for each that stands for none."""
    paths, problems = [], []
    for name in map(Path, names):
        found = find_images(name) if name.is_dir() else [name]
        problems += [] if found else [f"{name}: the folder holds no images"]
        paths += found
    return paths, problems


def free_name(stem: str, taken: set[str]) -> str:
    """`stem`, or stem-2, stem-3, ... where another image of this call has it."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


@torch.inference_mode()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("images", nargs="*", help="images and folders of images")
    parser.add_argument("--mix", nargs=2, metavar=("A", "B"), help="compose two images instead")
    parser.add_argument("--split", type=int, metavar="K", help="--mix takes K queries of A, the rest of B; default half")
    parser.add_argument("--ckpt", help="checkpoint folder; default: the newest in out/, else the bundled toy")
    parser.add_argument("--out", default="samples", type=Path)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=300, help="a caption ends by itself, or here")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--captions_only", action="store_true", help="no pictures")
    args = parser.parse_args(argv)
    quiet()
    for name in ("num_inference_steps", "num_beams", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            sys.exit(f"error: --{name} is {getattr(args, name)}, but must be at least 1")
    paths, problems = collect(args.mix or args.images or [str(BUNDLED_PICTURE)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        folder = choose_checkpoint(args.ckpt)
        model = VLV.from_pretrained(folder).to(device)
        config = model.config
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    knows = "redraws images, and captions them" if config.stage == 2 else "redraws images; stage 2 would teach it captions"
    toy = "; the bundled toy knows nothing but small coloured shapes" if folder == BUNDLED else ""
    print(f"checkpoint {folder}: {knows}{toy}", file=sys.stderr)
    if args.captions_only and config.stage == 1:
        sys.exit(f"error: --captions_only needs a stage-2 checkpoint, but {folder} is one of stage 1")
    split = config.num_queries // 2 if args.split is None else args.split
    if not 0 <= split <= config.num_queries:
        sys.exit(f"error: --split is {split}, but the checkpoint has {config.num_queries} queries: choose 0 to that")

    taken: set[str] = set()
    records = open(args.out / "captions.jsonl", "w")

    def write(names: list[str], originals: list[list[torch.Tensor]], stems: list[str], token_embeds: torch.Tensor):
        """Captions and redraws ẑ, (B, N, D), of B images (or pairs of them) and writes it all down."""
        draw = dict(num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale, seed=args.seed)
        with torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext():
            prompt_embeds = model.decoder.encode_text(token_embeds)
            captions = [None] * len(names)
            if config.stage == 2:
                captions = model.caption_head.generate(prompt_embeds, args.num_beams, args.max_new_tokens)
            pictures = []
            if not args.captions_only:
                pictures.append(model.decoder.reconstruct(prompt_embeds, **draw))
                if config.stage == 2:
                    pictures.append(model.decoder.reconstruct(captions, **draw))
        for i, (name, caption) in enumerate(zip(names, captions)):
            print(f"{name}: {'(no caption: stage 1)' if caption is None else ' '.join(caption.split())}", flush=True)
            records.write(json.dumps({"image": name, "caption": caption}, ensure_ascii=False) + "\n")
            if pictures:
                row = originals[i] + [column[i] for column in pictures]
                panel([row], [caption or ""]).save(args.out / f"{free_name(stems[i], taken)}.png")
        records.flush()

    readable, images = [], []
    for path in tqdm(paths, disable=len(paths) <= args.batch_size, unit=" images"):
        try:
            images.append(crop_image(open_image(path, config.image_size), config.image_size))
            readable.append(path)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            problems.append(f"{path}: cannot be read as an image: {str(error).splitlines()[0]}")
        if readable and (len(readable) == args.batch_size or path == paths[-1]) and not args.mix:
            token_embeds = model.encoder(torch.stack(images).to(device))
            write([str(p) for p in readable], [[i] for i in images], [p.stem for p in readable], token_embeds)
            readable, images = [], []
    if args.mix and len(readable) == 2:
        a, b = model.encoder(torch.stack(images).to(device))
        names = [" + ".join(str(p) for p in readable)]
        write(names, [images], ["+".join(p.stem for p in readable)], torch.cat([a[:split], b[split:]])[None])
    records.close()
    if not args.captions_only and taken:
        print(f"pictures and captions.jsonl are in {args.out}/", file=sys.stderr)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
