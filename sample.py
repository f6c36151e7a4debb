"""
Captions images and redraws them.

    python sample.py                              # a bundled picture, with the newest checkpoint in out/ or the toy
    python sample.py photos/ cat.jpg --ckpt out/stage2
    python sample.py --mix A.png B.png            # some queries of one image, the rest of the other
    torchrun --nproc_per_node=8 sample.py --captions_only data/laion/shards --out captions       # a whole data set

prints "PATH: CAPTION" a line, and writes into --out for each image STEM.png (original | redrawn from the embedding |
redrawn from the caption's text), a line {"image": ..., "caption": ..., "picture": "STEM.png"} of captions.jsonl, and
index.html to look at them. A second call with the same --out adds to these, and replaces those of the same image.

With --captions_only it draws nothing, any number of processes share the work, and a killed one goes on by the same command.
Of tar shards the lines are in one file each: 00000.jsonl, {"image": "00000.tar/KEY", "caption": ...}.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from tqdm import tqdm

from data.quiet import quiet  # before what imports transformers
from data.captions import Images, Part, Source, Work, find_shards
from data.checkpoint import find_checkpoint, fingerprint
from data.loader import find_images
from data.pretrained import choose_dtype
from data.processes import SIGNALS, gather, leave, rank_and_world_size, run, share_work, start_workers, together
from data.results import Results, is_drawn, panel
from data.settings import Beams, Count, Guidance, Seed, Settings, Steps, Text, Whole
from data.settings import parse_settings, printable, same_as_before
from vlv import VLV, load_config

BUNDLED = Path(__file__).parent / "data" / "shapes" / "vlv"
BUNDLED_PICTURE = BUNDLED.parent / "example.png"


@dataclass
class SampleConfig(Settings):
    images: tuple[Text, ...]  # images, tar shards, and folders of either; none: a bundled picture
    mix: tuple[Text, Text] | None = None  # compose two images instead
    split: Whole | None = None  # mix takes so many queries of the first image, the rest of the second; None: half
    ckpt: Text | None = None  # checkpoint folder or downloaded hub id; None: the newest in out/, else the bundled toy
    out: Path = Path("samples")
    num_inference_steps: Steps = 50
    guidance_scale: Guidance = 2.0
    seed: Seed = 0
    num_beams: Beams | None = None  # None: 4, as in the paper; of tar shards 1, which is several times faster
    max_new_tokens: Count = 300  # a caption ends by itself, or here
    batch_size: Count | None = None  # images at once; None: 8, or 64 with --captions_only
    captions_only: bool = False  # no pictures
    # auto: bf16 on GPUs that have it, and for large models on CPUs; else fp32. fp16 is for older GPUs
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    num_workers: Annotated[int, ">= 0", "<= 256"] = 4  # processes that read and decode images ahead
    usd_per_gpu_hour: Annotated[float, "> 0"] = 2.5  # only for what it says about its cost


ENCODED_AT_ONCE = 8  # images; they need more memory than what is generated


def choose_checkpoint(ckpt: str | None) -> Path:
    """The one named, else the newest in out/, else the bundled toy."""
    if ckpt is None:
        try:
            return find_checkpoint("out")
        except OSError:
            return BUNDLED
    return find_checkpoint(ckpt)


def collect(names: tuple[str, ...], results: Results) -> tuple[list[Source], list[str]]:
    """The shards and image files that files and folders stand for, but not what this program drew into such a folder; and a
    sentence for each that stands for none."""
    paths, shards, problems, drawn = [], [], [], {results.folder.resolve() / name for name in results.pictures}
    for name in map(Path, names):
        if name.is_dir():
            found = [path for path in find_images(name) if not (path.resolve() in drawn and is_drawn(path))]
            has_shards = any(name.rglob("*.tar"))
            paths += found
            if has_shards:
                shards.append(name)
            if not found and not has_shards:
                problems.append(f"{name}: the folder holds no images")
        elif not name.exists():
            problems.append(f"{name}: there is no such file")
        elif name.suffix == ".tar":
            shards.append(name)
        else:
            paths.append(name)
    sources = find_shards(shards)
    if paths:
        sources.insert(0, Source("captions", paths=paths))
    return sources, problems


def check(args: SampleConfig, world_size: int) -> Path:
    """The checkpoint. Raises ValueError for settings that cannot be together."""
    if args.mix and (args.images or args.captions_only):
        raise ValueError("--mix names its two images itself, and draws: leave others, and --captions_only, out")
    if args.split is not None and not args.mix:
        raise ValueError("--split needs --mix A B")
    if world_size > 1 and not args.captions_only:
        raise ValueError("pictures are drawn by one process: add --captions_only, or start without torchrun")
    folder = choose_checkpoint(args.ckpt)
    config = load_config(folder)
    if args.captions_only and config.stage == 1:
        raise ValueError(f"--captions_only needs a stage-2 checkpoint, but {folder} is one of stage 1")
    if args.split is not None and args.split > config.num_queries:
        raise ValueError(f"split is {args.split}, but the checkpoint has {config.num_queries} queries: choose 0 to that")
    return folder


def plan(args: SampleConfig, folder: Path, results: Results) -> tuple[Work, list]:
    """The work, and its batches that are not done."""
    sources, problems = collect(args.mix or args.images or (str(BUNDLED_PICTURE),), results)
    if args.mix and (problems or [source.count for source in sources] != [2]):
        raise ValueError(f"--mix takes two image files: {problems[0] if problems else 'a folder is none'}")
    shards = any(source.shard for source in sources)
    size = 2 if args.mix else args.batch_size or (64 if args.captions_only else 8)
    settings = dict(checkpoint=fingerprint(folder), num_beams=args.num_beams or (1 if shards else 4), precision=args.precision,
                    max_new_tokens=args.max_new_tokens, batch_size=size)  # fmt: skip
    work = Work(args.out, sources, settings, problems)
    if shards and args.captions_only:
        work.check_is_ours()
        same_as_before(args.out / "settings.json", settings, "choose another --out")
    work.count()
    if not args.captions_only:
        return work, work.batches()
    work.finish(results)  # what a killed call had just done
    return work, work.to_do()


def express(model: VLV, token_embeds: torch.Tensor, num_beams: int, args: SampleConfig) -> tuple[list, list[list]]:
    """ẑ, (B, N, D) -> B captions (None in stage 1), and columns of B pictures: redrawn from the embedding, from the caption."""
    draw = dict(num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale, seed=args.seed)
    prompt_embeds, captions, columns = model.decoder.encode_text(token_embeds), [None] * len(token_embeds), []
    if model.config.stage == 2:
        captions = model.caption_head.generate(prompt_embeds, num_beams, args.max_new_tokens)
    if not args.captions_only:
        columns.append(model.decoder.reconstruct(prompt_embeds, **draw))
        if model.config.stage == 2:
            columns.append(model.decoder.reconstruct(captions, **draw))
    return captions, columns


def mix(items: list[dict], token_embeds: torch.Tensor, split: int | None) -> tuple[list[dict], torch.Tensor]:
    """Of two images one item, with `split` queries of the first (None: half) and the rest of the second."""
    split = token_embeds.shape[1] // 2 if split is None else split
    joined = {key: joint.join(item[key] for item in items) for key, joint in [("name", " + "), ("stem", "+")]}
    return [joined], torch.cat([token_embeds[0, :split], token_embeds[1, split:]])[None]


def work_through(args: SampleConfig, model: VLV, device: torch.device, work: Work, batches: list, results: Results | None) -> int:
    """Captions, draws and writes down this process's share of the batches. Returns how many images that were."""
    rank, world_size = rank_and_world_size()
    total, left = sum(source.count for source in work.sources), sum(len(work.places(batch)) for batch in batches)
    mine = batches[rank * len(batches) // world_size : (rank + 1) * len(batches) // world_size]
    loader = start_workers(torch.utils.data.DataLoader(
        Images(work.sources, model.config.image_size), batch_sampler=map(work.places, mine), collate_fn=list,
        num_workers=min(args.num_workers, max(0, len(mine) - 1))))  # fmt: skip
    part, written, waited, start = Part(work), 0, 0.0, time.perf_counter()
    bar = tqdm(total=total, initial=total - left, unit=" captions", disable=rank > 0 or left <= work.batch_size, smoothing=0.02)
    for batch in mine:
        before = time.perf_counter()
        items = next(loader)
        waited += time.perf_counter() - before
        good = [item for item in items if not item["problem"]]
        good = [] if args.mix and len(good) < 2 else good
        if good:
            images = torch.from_numpy(np.stack([item["image"] for item in good]))
            token_embeds = torch.cat([model.encoder(some.to(device)) for some in images.split(ENCODED_AT_ONCE)])
            rows = [[image] for image in images]
            if args.mix:
                good, token_embeds, rows = *mix(good, token_embeds, args.split), [list(images)]
            captions, columns = express(model, token_embeds, work.made_with["num_beams"], args)
            for i, (item, caption) in enumerate(zip(good, captions)):
                item["caption"] = caption
                if not args.captions_only:
                    picture = panel([rows[i] + [column[i] for column in columns]], [caption or ""])
                    results.add(item["name"], caption, picture, item["stem"])
        if args.captions_only:
            part.add(batch, items)
        for item in good if world_size == 1 and not work.sources[batch[0]].shard else []:  # after it is kept
            said = " ".join((item["caption"] or "(no caption: stage 1)").split())
            print(f"{printable(item['name'])}: {printable(said)}", flush=True)
        work.problems += [item["problem"] for item in items if item["problem"]]
        written, seconds = written + len(good), time.perf_counter() - start
        per_dollar = written / seconds * 3600 / args.usd_per_gpu_hour
        bar.set_postfix_str(f"{per_dollar:,.0f} per dollar, {waited / seconds:.0%} waiting for images", refresh=False)
        bar.update(min(len(items) * world_size, total - bar.n))  # the others are as fast
        if SIGNALS:
            leave("stopped by the end of torchrun; the same command goes on", alone=True)
    part.close()
    bar.close()
    return written


@torch.inference_mode()
def main(argv=None) -> int:
    args = parse_settings(SampleConfig, argv, __doc__)
    quiet()
    rank, world_size, device = share_work()
    is_main, results, written = rank == 0, None, 0
    try:
        folder = together(lambda: check(args, world_size))
        results = together(lambda: Results(args.out) if is_main else None)
        work, batches = gather(together(lambda: plan(args, folder, results) if is_main else None))[0]
        together(work.check_is_shared)
        if batches:
            dtype, with_unet = choose_dtype(args.precision, device, folder), not args.captions_only
            model = together(lambda: VLV.from_pretrained(folder, with_unet=with_unet, dtype=dtype, device=device))
            if is_main:
                toy = "; the bundled toy knows nothing but small coloured shapes" if folder == BUNDLED else ""
                print(f"checkpoint {folder}, stage {model.config.stage}, {dtype} on {device.type}{toy}", file=sys.stderr)
            written = work_through(args, model, device, work, batches, results)
        written = sum(gather(written))
        if is_main:
            if args.captions_only:
                work.finish(results)
            else:
                results.write_all()
    except BrokenPipeError:
        raise
    except OSError as error:
        leave(f"error: cannot write into {args.out}: {error.strerror or error}; what is done is kept there", alone=world_size > 1)
    finally:
        if results:
            results.close()
    problems = gather(work.problems)[0]
    if is_main:
        if written or not problems:
            what = "captions are" if args.captions_only else "pictures, captions.jsonl and index.html are"
            print(f"{what} in {args.out}/" + ("" if batches else "; nothing was left to do"), file=sys.stderr)
        for problem in problems[:100]:
            print(f"error: {printable(problem)}", file=sys.stderr)
        if len(problems) > 100:
            print(f"error: and {len(problems) - 100:,} more: see {args.out / 'unreadable.txt'}", file=sys.stderr)
    return 1 if problems else 0


STOPPED = "stopped; what was printed is kept, and the same command does the rest"

if __name__ == "__main__":
    if "RANK" in os.environ:
        run(lambda: sys.exit(main()), STOPPED)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except BrokenPipeError:  # as of `sample.py photos | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit("error: nobody reads what is printed any more")
