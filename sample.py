"""
Captions images and redraws them.

    python sample.py                              # a bundled picture, with the newest in out/ or the toy
    python sample.py photos/ cat.jpg --ckpt out/stage2
    python sample.py photos/ --captions_only
    python sample.py --mix A.png B.png            # some queries of one image, the rest of the other

prints "PATH: CAPTION" a line, and writes into --out for each image STEM.png (original | redrawn from the
embedding | redrawn from the caption's text), a line {"image": ..., "caption": ..., "picture": "STEM.png"} of
captions.jsonl, and index.html to look at them. Another call with the same --out adds to these, and replaces
those of the same images.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tqdm import tqdm

from data.distributed import quiet, select_device, select_dtype
from data.loader import is_image, walk
from data.results import Results, panel, report
from data.settings import Count, Steps, NonNegative, printable, read_settings
from vlv import VLV, find_checkpoint, load_config, to_pixels

TOY = Path(__file__).parent / "data" / "shapes" / "vlv"
COMPANIONS = (".txt", ".json", ".jsonl", ".html")  # beside images, no others are missed


@dataclass
class SampleConfig:
    images: tuple[Path, ...]  # image files and folders of them; none: a bundled picture
    mix: tuple[Path, Path] | None = None  # compose two images instead
    split: NonNegative | None = None  # queries from mix's first image, the rest from the second; None: half
    ckpt: str | None = None  # folder, or hub id that was downloaded; None: the newest in out/, else the toy
    out: Path = Path("samples")
    captions_only: bool = False  # no pictures, so neither UNet nor VAE is needed
    num_inference_steps: Steps = 50
    guidance_scale: Annotated[float, 0, 1000] = 2.0
    seed: NonNegative = 0  # of the noise that each picture starts from
    num_beams: Annotated[int, 1, 100] = 4
    max_new_tokens: Count = 300  # a caption ends by itself, or here
    batch_size: Count = 8  # images at once
    # auto: bf16 on GPUs that have it, and for large models on CPUs; else fp32. fp16 is for older GPUs
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"


def choose_checkpoint(args: SampleConfig) -> Path:
    """The checkpoint that is named, else the newest in out/, else the bundled toy. Raises OSError or
    ValueError for settings that it cannot have."""
    try:
        checkpoint = find_checkpoint("out" if args.ckpt is None else args.ckpt)
    except OSError:
        if args.ckpt is not None:
            raise
        checkpoint = TOY
    config = load_config(checkpoint)
    if args.captions_only and config.stage == 1:
        raise ValueError(f"--captions_only needs a stage-2 checkpoint, but {checkpoint} is one of stage 1")
    if args.mix and (args.images or args.captions_only):
        raise ValueError("--mix names its two images itself, and draws: leave images and --captions_only out")
    if args.split is not None and not args.mix:
        raise ValueError("--split needs --mix A B")
    if args.split is not None and args.split > config.num_queries:
        raise ValueError(f"split is {args.split}, but the checkpoint has {config.num_queries} queries")
    return checkpoint


def find_files(args: SampleConfig, results: Results) -> tuple[list[Path], list[str]]:
    """The image files that are meant, without what this program drew itself; and a sentence for each name
    that stands for none."""
    drawn = {(results.folder / name).resolve() for name in results.pictures}
    files, problems = [], []
    for name in args.mix or args.images or [TOY.parent / "example.png"]:
        there, out_of_reach = walk(name) if name.is_dir() else ([name], [])
        found = [path for path in there if path.resolve() not in drawn and (path == name or is_image(path))]
        shards = [path for path in there if path.suffix == ".tar"]
        problems += out_of_reach
        if shards:
            problems.append(f"{shards[0]}: for shards there is python data/caption.py {name} --out captions")
        elif not name.exists():
            problems.append(f"{name}: there is no such file")
        elif not found:
            problems.append(f"{name}: the folder holds no images")
        files += [path for path in found if path.exists() and path not in shards]
        others = [path for path in there if path.suffix not in COMPANIONS and path not in {*found, *shards}]
        others = [path for path in others if path.resolve() not in drawn]
        if others:
            tqdm.write(f"{len(others)} files are no images, such as {printable(others[0])}", file=sys.stderr)
    if args.mix and (problems or any(map(os.path.isdir, args.mix))):
        raise ValueError(f"--mix takes two image files: {problems[0] if problems else 'a folder is none'}")
    return files, problems


def read_images(paths: list[Path], size: int, resize: str) -> tuple[list, list[torch.Tensor], list[str]]:
    """(paths, (3, size, size) uint8 images) of those that can be read, and a sentence for each other."""
    good, images, problems = [], [], []
    for path in paths:
        try:
            images.append(to_pixels(path, size, resize))
            good.append(path)
        except OSError as error:
            problems.append(f"{path}: cannot be read as an image: {' '.join(str(error).split())}")
    return good, images, problems


@torch.inference_mode()
def main(argv=None) -> int:
    args = read_settings(SampleConfig, argv, __doc__)
    quiet()
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("one process does this; data/caption.py captions data sets with several")
        checkpoint, device = choose_checkpoint(args), select_device(args.device)
        results = Results(args.out)
        files, problems = find_files(args, results)
        dtype = select_dtype(args.precision, device, checkpoint)
        model = VLV.from_pretrained(checkpoint, with_unet=not args.captions_only, dtype=dtype, device=device)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    is_toy = checkpoint.resolve() == TOY.resolve()
    toy = "; the bundled toy knows nothing but small coloured shapes" if is_toy else ""
    stage = model.config.stage
    print(f"checkpoint {checkpoint}, stage {stage}, {dtype} on {device.type}{toy}", file=sys.stderr)
    draw = [args.num_inference_steps, args.guidance_scale, args.seed]
    size = 2 if args.mix else args.batch_size
    written = 0
    try:
        for at in tqdm(range(0, len(files), size), disable=len(files) <= size, unit=" batches"):
            config = model.config
            paths, images, unreadable = read_images(files[at : at + size], config.image_size, config.resize)
            problems += unreadable
            if not images or (args.mix and len(images) < 2):
                continue
            token_embeds = model.encoder(torch.stack(images).to(device))  # ẑ, (B, N, D)
            names, rows = [(str(path), path.stem) for path in paths], [[image] for image in images]
            if args.mix:
                split = token_embeds.shape[1] // 2 if args.split is None else args.split
                token_embeds = torch.cat([token_embeds[0, :split], token_embeds[1, split:]])[None]
                names, rows = [(" + ".join(map(str, paths)), "+".join(path.stem for path in paths))], [images]
            prompt_embeds = model.decoder.encode_text(token_embeds)  # c, (B, N, D)
            captions, columns = [None] * len(names), []
            if stage == 2:
                captions = model.caption_head.generate(prompt_embeds, args.num_beams, args.max_new_tokens)
            if not args.captions_only:
                columns.append(model.decoder.reconstruct(prompt_embeds, *draw))
                if stage == 2:
                    columns.append(model.decoder.reconstruct(captions, *draw))
            for (name, stem), caption, row, *drawn in zip(names, captions, rows, *columns):
                picture = panel([row + drawn], [caption or ""]) if drawn else None
                results.add(name, caption, picture, stem)
                written += 1
                said = " ".join((caption or "(no caption: stage 1)").split())
                tqdm.write(f"{printable(name)}: {printable(said)}", file=sys.stdout)
        results.finish()
    except BrokenPipeError:  # nobody reads what is printed any more, as in `sample.py photos | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.exit(f"error: {error.filename or args.out}: {error.strerror or error}; what is done is kept")
    if written:
        what = "captions are" if args.captions_only else "pictures, captions.jsonl and index.html are"
        print(f"{what} in {args.out}/", file=sys.stderr)
    return report(problems)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; what was printed is kept")
