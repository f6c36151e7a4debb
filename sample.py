"""
Captions images and redraws them.

    python sample.py                              # a bundled picture, with the newest in out/ or the toy
    python sample.py photos/ cat.jpg --ckpt out/stage2
    python sample.py photos/ --captions_only
    python sample.py --mix A.png B.png            # some queries of one image, the rest of the other

prints "PATH: CAPTION" a line, and writes into --out for each image STEM.png (original | redrawn from the
embedding | redrawn from the caption's text), a line {"image": ..., "caption": ..., "picture": "STEM.png"} of
captions.jsonl, and index.html to look at them. Another call with the same --out does what is new or changed.
Of a picture that is not square the centre is taken: --fit pad takes all of it.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tqdm import tqdm

from data.distributed import WORLD_SIZE, run_and_exit, select_device
from data.loader import find_files
from data.results import Results, panel, report, write_beside
from data.run import checkpoint_fingerprint
from data.settings import Count, Steps, NonNegative, printable, read_settings
from vlv import VLV, find_checkpoint, load_config, select_dtype

TOY = Path(__file__).parent / "data" / "shapes" / "vlv"


@dataclass
class SampleConfig:
    images: tuple[Path, ...]  # image files and folders of them; none: a bundled picture
    mix: tuple[Path, Path] | None = None  # compose two images instead
    split: NonNegative | None = None  # queries from mix's first image, the rest from the second; None: half
    ckpt: str | None = None  # folder, or hub id that was downloaded; None: the newest in out/, else the toy
    out: Path = Path("samples")
    # Another text-to-image model than the checkpoint's, with its CLIPs, so captions may change. SDXL and SD 3
    # name the same CLIPs: one may draw what was learned with the other, but nobody has shown that it can.
    draw_with: str = ""
    captions_only: bool = False  # no pictures, so neither UNet nor VAE is needed
    overwrite: bool = False  # do again what was done before, of the same file and with the same settings
    # Captions beside the images, too: NAME.txt, as kohya's trainer reads them, metadata.jsonl, as datasets.
    beside: tuple[Literal["txt", "metadata"], ...] = ()
    fit: Literal["crop", "pad", "squash"] = "crop"  # the centre square; all, on white; all, squeezed
    num_inference_steps: Steps = 50
    guidance_scale: Annotated[float, 0, 1000] = 2.0
    seed: NonNegative = 0  # of the noise that each picture starts from, and of sampled captions
    num_beams: Annotated[int, 1, 100] = 4
    temperature: Annotated[float, 0, 100] = 0.0  # above 0: captions are sampled, without beams
    top_p: Annotated[float, 0.001, 1] = 1.0  # sample from the fewest tokens whose probabilities sum to this
    num_captions: Count = 1  # of each image, sampled; pictures are drawn from the first
    max_new_tokens: Count | None = None  # a caption ends by itself, or here; None: where training cut it
    batch_size: Count = 8  # images at once
    # auto: bf16 on GPUs that have it, and for large models on CPUs; else fp32. fp16 is for older GPUs
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"


def choose_checkpoint(args: SampleConfig) -> Path:
    """The checkpoint that is named, else the newest in out/, else the bundled toy. Raises OSError or
    ValueError for settings that it cannot have."""
    default = "out" if any(Path("out").glob("*/step-*/config.json")) else TOY
    checkpoint = find_checkpoint(default if args.ckpt is None else args.ckpt)
    config = load_config(checkpoint)
    if args.captions_only and config.stage == 1:
        raise ValueError(f"--captions_only needs a stage-2 checkpoint, but {checkpoint} is one of stage 1")
    if args.mix and (args.images or args.captions_only):
        raise ValueError("--mix names its two images itself, and draws: leave images and --captions_only out")
    if (args.num_captions > 1 or args.top_p < 1) and not args.temperature:
        raise ValueError("--num_captions and --top_p are for sampled captions: add --temperature 1")
    if args.draw_with and args.captions_only:
        raise ValueError("--draw_with draws: leave --captions_only out")
    if args.beside and (args.mix or config.stage == 1):
        raise ValueError("--beside writes captions of images: it needs stage 2, and no --mix")
    if args.split is not None and not args.mix:
        raise ValueError("--split needs --mix A B")
    if args.split is not None and args.split > config.num_queries:
        raise ValueError(f"split is {args.split}, but the checkpoint has {config.num_queries} queries")
    return checkpoint


def find_images(args: SampleConfig, results: Results) -> tuple[list[Path], list[str]]:
    """The image files that are meant, without what this program drew itself; and a sentence for each name
    that stands for none."""
    drawn = {(results.folder / (record["picture"] or "")).resolve() for record in results.records.values()}
    files, problems = [], []
    for name in args.mix or args.images or [TOY.parent / "example.png"]:
        found = find_files(name)
        images = [path for path in found.images if path.resolve() not in drawn]
        files += images
        problems += found.problems
        if found.shards:
            problems.append(f"{name}: for shards there is python data/caption.py {name} --out captions")
        elif not images and not found.problems:
            problems.append(f"{name}: no images are there")
        if found.others:
            count = len(found.others)
            tqdm.write(f"no images: {count} files, such as {printable(found.others[0])}", file=sys.stderr)
    if args.mix and (problems or len(files) != 2):
        raise ValueError(f"--mix takes two image files: {'; '.join(problems) or f'here are {len(files)}'}")
    return files, problems


def made_of(path: Path, args: SampleConfig, fingerprint: str) -> str:
    """What a result depends on, in short."""
    names = ("captions_only", "draw_with", "fit", "num_inference_steps", "guidance_scale", "seed",
             "num_beams", "temperature", "top_p", "num_captions", "max_new_tokens", "precision")
    parts = [path.stat().st_size, path.stat().st_mtime_ns, fingerprint, *(getattr(args, n) for n in names)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def say(record: dict) -> None:
    for caption in record.get("captions", [record["caption"]]):
        said = " ".join((caption or "(no caption: stage 1)").split())
        tqdm.write(f"{printable(record['image'])}: {printable(said)}", file=sys.stdout)


@torch.inference_mode()
def main(argv=None) -> int:
    args = read_settings(SampleConfig, argv, __doc__)
    try:
        if WORLD_SIZE > 1:
            raise ValueError("one process does this; data/caption.py captions data sets with several")
        checkpoint, device = choose_checkpoint(args), select_device(args.device)
        results = Results(args.out)
        files, problems = find_images(args, results)
        dtype = select_dtype(args.precision, device, checkpoint)
        other = dict(diffusion_model=args.draw_with, family="any") if args.draw_with else {}
        model = VLV.from_pretrained(checkpoint, with_unet=not args.captions_only, dtype=dtype, device=device,
                                    **other)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    is_toy = checkpoint.resolve() == TOY.resolve()
    toy = "; the bundled toy knows nothing but small coloured shapes" if is_toy else ""
    stage = model.config.stage
    print(f"checkpoint {checkpoint}, stage {stage}, {dtype} on {device.type}{toy}", file=sys.stderr)
    draw = [args.num_inference_steps, args.guidance_scale, args.seed]
    names = ("num_beams", "temperature", "top_p", "max_new_tokens")
    generate = {name: getattr(args, name) for name in names}
    size, fingerprint = 2 if args.mix else args.batch_size, checkpoint_fingerprint(checkpoint)
    captioned = {}  # image file -> caption, of this call or one before
    try:
        made = {} if args.mix else {str(path): made_of(path, args, fingerprint) for path in files}
        for path in [] if args.overwrite or args.mix else [*files]:
            record = results.records.get(str(path), {})
            if record.get("made_of") == made[str(path)]:
                say(record)
                captioned[path] = record["caption"]
                files.remove(path)
        if captioned:
            print(f"done before: {len(captioned):,}; --overwrite does them again", file=sys.stderr)
        for at in tqdm(range(0, len(files), size), disable=len(files) <= size, unit=" batches"):
            pictures = []
            for path in files[at : at + size]:
                try:
                    pictures.append((path, model.pixels(path, args.fit)[0]))
                except OSError as error:
                    problems.append(" ".join(str(error).split()))
            if len(pictures) < (2 if args.mix else 1):
                continue
            paths, images = zip(*pictures)
            token_embeds = model.encoder(torch.stack(images))  # ẑ, (B, N, D)
            names, rows = [(str(path), path.stem) for path in paths], [[image] for image in images]
            if args.mix:
                split = token_embeds.shape[1] // 2 if args.split is None else args.split
                token_embeds = torch.cat([token_embeds[0, :split], token_embeds[1, split:]])[None]
                names = [(f"{paths[0]} + {paths[1]} at {split}", f"{paths[0].stem}+{paths[1].stem}")]
                rows = [[*images]]
            prompt_embeds = model.decoder.encode_text(token_embeds)  # c, (B, N, D)
            captions, columns = [[None]] * len(names), []
            if stage == 2:
                texts, each = [], args.num_captions
                repeated = prompt_embeds.repeat_interleave(each, 0)
                # sampled captions depend on no other image's
                for c in repeated.split(each) if args.temperature else [repeated]:
                    torch.manual_seed(args.seed)
                    texts += model.caption_head.generate(c, **generate)
                captions = [texts[first : first + each] for first in range(0, len(texts), each)]
            if not args.captions_only:
                columns.append(model.decoder.reconstruct(prompt_embeds, *draw))
                if stage == 2:
                    columns.append(model.decoder.reconstruct([texts[0] for texts in captions], *draw))
            for (name, stem), texts, row, *drawn in zip(names, captions, rows, *columns):
                picture = panel([row + drawn], [""]) if drawn else None
                more = {"captions": texts} if len(texts) > 1 else {}
                more |= dict(checkpoint=str(checkpoint), made_of=made.get(name))
                say(results.add(name, texts[0], picture, stem, **more))
                captioned[Path(name)] = texts[0]
        results.finish()
        problems += write_beside(captioned, args.beside, args.overwrite)
    except OSError as error:
        sys.exit(f"error: {error.filename or args.out}: {error.strerror or error}; what is done is kept")
    if captioned:
        print(f"captions.jsonl, index.html and what was drawn are in {args.out}/", file=sys.stderr)
    return report(problems)


if __name__ == "__main__":
    run_and_exit(main, "stopped; what was printed is kept")
