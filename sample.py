"""
Captions images and redraws them.

    python sample.py                              # a bundled picture, with the newest in out/ or the toy
    python sample.py photos/ cat.jpg --ckpt out/stage2
    python sample.py photos/ --captions_only
    python sample.py --mix A.png B.png            # some queries of one image, the rest of the other

prints "PATH: CAPTION" a line, and writes into --out for each image STEM.png (original | redrawn from the
embedding | redrawn from the caption's text), a line {"image": ..., "caption": ..., "picture": "STEM.png"} of
captions.jsonl, and index.html to look at them. Another call with the same --out does the images that have no
line there. Of a picture that is not square the centre is taken: --fit pad takes all of it.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tqdm import tqdm

from data import two_clips  # noqa: F401  for Stable Diffusion XL and 3
from data.distributed import run_and_exit, select_device, select_dtype
from data.loader import find_files
from data.results import find_checkpoint, panel, write_page
from data.settings import TEXT, Count, NonNegative, Steps, append, printable, read_json_lines, read_settings
from data.settings import write_lines
from vlv import VLV, load_config

TOY = Path(__file__).parent / "data" / "shapes" / "vlv"


@dataclass
class SampleConfig:
    images: tuple[Path, ...]  # image files and folders of them; none: a bundled picture
    mix: tuple[Path, Path] | None = None  # compose two images instead
    split: NonNegative | None = None  # queries from mix's first image, the rest from the second; None: half
    ckpt: str | None = None  # folder, or hub id that was downloaded; None: the newest in out/, else the toy
    out: Path = Path("samples")
    captions_only: bool = False  # no pictures, so neither UNet nor VAE is needed
    overwrite: bool = False  # begin anew, without what an earlier call has written into --out
    txt: bool = False  # also write each caption beside its image, as NAME.txt, unless there is one
    fit: Literal["crop", "pad", "squash"] = "crop"  # the centre square; all, on white; all, squeezed
    num_inference_steps: Steps = 50
    guidance_scale: Annotated[float, 0, 1000] = 2.0
    seed: NonNegative = 0  # of the noise that each picture starts from
    num_beams: Annotated[int, 1, 100] = 4
    max_new_tokens: Count | None = None  # a caption ends by itself, or here; None: where training cut it
    # auto: bf16 on GPUs that have it, and for large models on CPUs; else fp32. fp16 is for older GPUs
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"


def read_records(path: Path) -> dict[str, dict]:
    """The lines of captions.jsonl by image. Raises ValueError for a file of another program."""
    try:
        lines = read_json_lines(path)
        records = [{key: line[key] for key in ("image", "caption", "picture")} for line in lines]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} was not written by this program: choose another --out") from None
    return {record["image"]: record for record in records}


def find_images(names, drawn: set[Path]) -> tuple[list[Path], list[str]]:
    """The image files that are meant, without those in `drawn`; and a sentence for each name without any."""
    files, problems = [], []
    for name in names:
        found = find_files(name)
        files += [path for path in found.images if path.resolve() not in drawn]
        if not found.images:
            problems.append(f"{name}: no images are there (tar shards are captioned by data/caption.py)")
        elif others := found.others + found.shards:
            example = printable(others[0])
            tqdm.write(f"{name}: {len(others):,} files are no images, such as {example}", sys.stderr)
    return files, problems


def mix(model: VLV, images: torch.Tensor, split: int | None) -> torch.Tensor:
    """c, (1, N, D), of the first queries of one image and the rest of another. images: (2, 3, S, S) uint8."""
    a, b = model.encoder(images)  # ẑ, (N, D) each
    split = len(a) // 2 if split is None else split
    if split > len(a):
        raise ValueError(f"split is {split}, but the checkpoint has {len(a)} queries")
    return model.decoder.encode_text(torch.cat([a[:split], b[split:]])[None])


@torch.inference_mode()
def main(argv=None) -> int:
    args = read_settings(SampleConfig, argv, __doc__)
    newest = "out" if any(Path("out").glob("stage?/step-*")) else TOY
    checkpoint = find_checkpoint(newest if args.ckpt is None else args.ckpt)
    device = select_device(args.device)
    if args.captions_only and (args.mix or load_config(checkpoint).stage == 1):
        raise ValueError(f"--captions_only needs no --mix, and a stage-2 checkpoint: {checkpoint} is none")
    if (args.mix and args.images) or (args.split is not None and not args.mix):
        raise ValueError("--mix names its two images itself, and --split is for --mix alone")
    lines = args.out / "captions.jsonl"
    records = read_records(lines)
    drawn = {(args.out / record["picture"]).resolve() for record in records.values() if record["picture"]}
    files, problems = find_images(args.images or [TOY.parent / "example.png"], drawn)
    dtype = select_dtype(args.precision, device, checkpoint)
    model = VLV.from_pretrained(checkpoint, dtype=dtype, device=device, with_unet=not args.captions_only)
    if args.overwrite:  # nothing is removed before the model is there
        records = {}
        for picture in drawn:
            picture.unlink(missing_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_lines(lines, [json.dumps(record, ensure_ascii=False) for record in records.values()])
    toy = "; the bundled toy knows nothing but small coloured shapes" if checkpoint == TOY else ""
    stage = model.config.stage
    tqdm.write(f"checkpoint {checkpoint}, stage {stage}, {dtype} on {device.type}{toy}", sys.stderr)
    how = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "seed")}
    todo = [args.mix] if args.mix else [(path,) for path in files]
    if done := sum(str(path.absolute()) in records for path in files):
        print(f"{done:,} were done before, by whatever checkpoint: --overwrite begins anew", file=sys.stderr)
    for paths in tqdm(todo, disable=len(todo) < 2, unit=" images"):
        name = " + ".join(str(path.absolute()) for path in paths)
        stem = "+".join(path.stem for path in paths)[:60]  # a file's name has at most 255 bytes
        name += f" at {args.split}" if args.split is not None else ""
        if name not in records:
            try:
                images = torch.cat([model.pixels(path, args.fit) for path in paths])
            except OSError as error:
                problems.append(str(error))
                continue
            c = mix(model, images, args.split) if args.mix else model.embed(images)
            caption = picture = None
            if model.caption_head:
                [caption] = model.caption_head.generate(c, args.num_beams, args.max_new_tokens)
            if not args.captions_only:
                pictures = [*images, *model.decoder.reconstruct(c, **how)]
                pictures += model.decoder.reconstruct(caption, **how) if caption else []
                picture, number = f"{stem}.png", 1
                while os.path.lexists(args.out / picture):
                    number += 1
                    picture = f"{stem}-{number}.png"
                panel([pictures], [""]).save(args.out / picture)
            records[name] = {"image": name, "caption": caption, "picture": picture}
            append(lines, json.dumps(records[name], ensure_ascii=False))
        caption, beside = records[name]["caption"], paths[0].with_suffix(".txt")
        said = "(no caption: stage 1)" if caption is None else " ".join(caption.split())
        tqdm.write(f"{printable(' + '.join(map(str, paths)))}: {printable(said)}", sys.stdout)
        if args.txt and caption and not args.mix and not beside.exists():
            beside.write_text(caption + "\n", **TEXT)
    write_page(args.out / "index.html", [*records.values()])
    print(f"captions.jsonl, index.html and what was drawn are in {args.out}/", file=sys.stderr)
    for problem in problems:
        print(f"error: {printable(problem)}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    run_and_exit(main)
