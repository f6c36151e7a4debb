"""
Captions images and redraws them.

    python sample.py                              # a bundled picture, with the newest checkpoint in out/ or the toy
    python sample.py photos/ cat.jpg --ckpt out/stage2
    python sample.py --mix A.png B.png            # some queries of one image, the rest of the other

prints "PATH: CAPTION" a line, and writes into --out for each image STEM.png (original | redrawn from the embedding |
redrawn from the caption's text) and a line {"image": ..., "caption": ..., "picture": "STEM.png"} of captions.jsonl. A second
call with the same --out adds to these, and replaces those of the same image.
"""

import json
import logging
import os
import sys
import textwrap
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before the import, which already warns
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from data.checkpoint import find_checkpoint, lock, write_whole
from data.loader import crop_image, find_images, open_image
from data.settings import Beams, Count, Guidance, Seed, Settings, Steps, Text, Whole, parse_settings, printable
from vlv import VLV

HERE = Path(__file__).parent
BUNDLED = HERE / "data" / "shapes" / "vlv"
BUNDLED_PICTURE = HERE / "data" / "shapes" / "example.png"


@dataclass
class SampleConfig(Settings):
    images: tuple[Text, ...]  # images and folders of images; none: a bundled picture
    mix: tuple[Text, Text] | None = None  # compose two images instead
    split: Whole | None = None  # mix takes so many queries of the first image, the rest of the second; None: half
    ckpt: Text | None = None  # checkpoint folder; None: the newest in out/, else the bundled toy
    out: Path = Path("samples")
    num_inference_steps: Steps = 50
    guidance_scale: Guidance = 2.0
    seed: Seed = 0
    num_beams: Beams = 4
    max_new_tokens: Count = 300  # a caption ends by itself, or here
    batch_size: Count = 8
    captions_only: bool = False  # no pictures


def quiet():
    """No warnings of libraries that the user can do nothing about."""
    warnings.filterwarnings("ignore")
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
    if ckpt is None:
        try:
            return find_checkpoint("out")
        except OSError:
            return BUNDLED
    return find_checkpoint(ckpt)


def is_drawn(path: Path) -> bool:
    """Whether a file is a picture that Results drew, and not another one of its name."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == "vlv"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


class Results:
    """What is in the folder --out: captions.jsonl, a line {"image", "caption", "picture"} for each image, and the pictures
    that it names. Nothing else there is touched. Raises ValueError for a captions.jsonl of another program, OSError when
    something cannot be written."""

    def __init__(self, folder: Path):
        self.lock, _ = lock(folder)  # two calls at a time would each take the other's lines away
        self.folder, self.path, self.records = folder, folder / "captions.jsonl", {}
        # "backslashreplace" makes JSON's own escape of a name's byte that is not UTF-8
        self.text = dict(encoding="utf-8", errors="backslashreplace", newline="\n")
        for line in open(self.path, **self.text) if self.path.exists() else []:
            try:
                record = json.loads(line)
                if not isinstance(record.get("picture"), str | None):
                    raise TypeError
                self.records[str(record["image"])] = {key: record.get(key) for key in ("image", "caption", "picture")}
            except (ValueError, KeyError, TypeError, AttributeError):
                if line.endswith("\n"):  # else a call was killed while it wrote
                    raise ValueError(f"{self.path} was not written by this program: choose another --out") from None
        self.pictures = {record["picture"] for record in self.records.values() if record["picture"]}
        self.write_all()
        self.file = open(self.path, "a", **self.text)

    def add(self, image: str, caption: str | None, picture: Image.Image | None, stem: str) -> None:
        """Replaces this image's result, if there was one. The picture is STEM.png, or STEM-2.png, ... where that is another's."""
        before = self.records.pop(image, {"picture": None})["picture"]
        self.pictures.discard(before)
        replaces = before is not None and is_drawn(self.folder / before)
        name = None
        if picture is not None:
            name = before if replaces else self.free_name(stem)
            mark = PngInfo()
            mark.add_text("Software", "vlv")
            write_whole(self.folder / name, lambda path: picture.save(path, "png", pnginfo=mark))
            self.pictures.add(name)
        elif replaces:
            (self.folder / before).unlink()  # it shows another caption
        self.records[image] = {"image": image, "caption": caption, "picture": name}
        self.file.write(json.dumps(self.records[image], ensure_ascii=False) + "\n")
        self.file.flush()

    def free_name(self, stem: str) -> str:
        name, number = f"{stem}.png", 1
        while name in self.pictures or os.path.lexists(self.folder / name) and not is_drawn(self.folder / name):
            number += 1
            name = f"{stem}-{number}.png"
        return name

    def write_all(self) -> None:
        """One line an image: what add() has replaced goes."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self.records.values()]
        if lines:
            write_whole(self.path, lambda path: path.write_text("".join(lines), **self.text))

    def close(self) -> None:
        (self.folder / ".lock").unlink(missing_ok=True)
        self.lock.close()


def collect(names: tuple[str, ...], results: Results) -> tuple[list[Path], list[str]]:
    """The image files that files and folders stand for, but not what this program drew into such a folder; and a sentence
    for each that stands for none."""
    paths, problems, drawn = [], [], {results.folder.resolve() / name for name in results.pictures}
    for name in map(Path, names):
        if name.is_dir():
            found = [path for path in find_images(name) if not (path.resolve() in drawn and is_drawn(path))]
            problems += [] if found else [f"{name}: the folder holds no images"]
        elif name.exists():
            found = [name]
        else:
            found, problems = [], [*problems, f"{name}: there is no such file"]
        paths += found
    return paths, problems


@torch.inference_mode()
def main(argv=None) -> int:
    args = parse_settings(SampleConfig, argv, __doc__)
    quiet()
    device, results = "cuda" if torch.cuda.is_available() else "cpu", None
    try:
        if args.mix and args.images:
            raise ValueError("--mix names its two images itself: leave the others out")
        if args.split is not None and not args.mix:
            raise ValueError("--split needs --mix A B")
        folder = choose_checkpoint(args.ckpt)
        results = Results(args.out)
        paths, problems = collect(args.mix or args.images or (str(BUNDLED_PICTURE),), results)
        if args.mix and (problems or not all(Path(name).is_file() for name in args.mix)):
            raise ValueError(f"--mix takes two image files: {problems[0] if problems else 'a folder is none'}")
        model = VLV.from_pretrained(folder).to(device)
        config = model.config
        if args.captions_only and config.stage == 1:
            raise ValueError(f"--captions_only needs a stage-2 checkpoint, but {folder} is one of stage 1")
        split = config.num_queries // 2 if args.split is None else args.split
        if split > config.num_queries:
            raise ValueError(f"split is {split}, but the checkpoint has {config.num_queries} queries: choose 0 to that")
    except (ValueError, OSError) as error:
        if results:
            results.close()
        sys.exit(f"error: {printable(error)}")
    knows = "redraws images, and captions them" if config.stage == 2 else "redraws images; stage 2 would teach it captions"
    toy = "; the bundled toy knows nothing but small coloured shapes" if folder == BUNDLED else ""
    print(f"checkpoint {folder}: {knows}{toy}", file=sys.stderr)

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
            row = originals[i] + [column[i] for column in pictures]
            results.add(name, caption, panel([row], [caption or ""]) if pictures else None, stems[i])
            said = "(no caption: stage 1)" if caption is None else " ".join(caption.split())
            print(f"{printable(name)}: {printable(said)}", flush=True)  # after it is kept

    readable, images, written = [], [], 0
    try:
        for number, path in enumerate(tqdm(paths, disable=len(paths) <= args.batch_size, unit=" images"), 1):
            try:
                images.append(crop_image(open_image(path, config.image_size), config.image_size))
                readable.append(path)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                problems.append(f"{path}: cannot be read as an image: {' '.join(str(error).split())}")
            if readable and (len(readable) == args.batch_size or number == len(paths)) and not args.mix:
                token_embeds = model.encoder(torch.stack(images).to(device))
                write([str(p) for p in readable], [[i] for i in images], [p.stem for p in readable], token_embeds)
                written, readable, images = written + len(readable), [], []
        if args.mix and len(readable) == 2:
            a, b = model.encoder(torch.stack(images).to(device))
            names = [" + ".join(str(p) for p in readable)]
            write(names, [images], ["+".join(p.stem for p in readable)], torch.cat([a[:split], b[split:]])[None])
            written = 1
        results.write_all()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        problems.append(f"cannot write into {args.out}: {error.strerror or error}; {written:,} results are kept there")
    finally:
        results.close()
    if written:
        what = "captions.jsonl is" if args.captions_only else "pictures and captions.jsonl are"
        print(f"{what} in {args.out}/", file=sys.stderr)
    for problem in problems:
        print(f"error: {printable(problem)}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; what was printed is kept, and the same command does the rest anew")
    except BrokenPipeError:  # as of `sample.py photos | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit("error: nobody reads what is printed any more")
