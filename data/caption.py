"""
Captions whole data sets: tar shards, with any number of processes, through any number of kills.

    torchrun --nproc_per_node=8 data/caption.py data/laion/shards --ckpt out/stage2 --out captions

takes tar files and folders of them. For each there is one file in --out, complete or absent:

    00000.jsonl         a line {"image": "00000.tar/KEY", "caption": ...} for each image that can be read
    unreadable.txt      what cannot be read
    .parts/             what is not finished, and what of each shard cannot be read

A killed call goes on by the same command. Each process captions shards of its own, in batches that are always
the same images: so the captions are the same, however often the work is stopped. A shard that is newer than
its captions is captioned again.
"""

import fcntl
import io
import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.distributed import RANK, WORLD_SIZE, all_gather, compile_if_possible, exit_reasons
from data.distributed import init_process_group, on_every_rank, run_and_exit, select_device, start_workers
from data.loader import SECOND_IMAGE, find_files, read_part, read_shard
from data.results import report
from data.run import checkpoint_fingerprint
from data.settings import TEXT, Count, printable, read_settings, same_as_before, write_lines
from vlv import VLV, VLVConfig, find_checkpoint, load_config, select_dtype, to_pixels


@dataclass
class CaptionConfig:
    shards: tuple[Path, ...]  # tar files, and folders of them
    ckpt: str = "out/stage2"  # a checkpoint folder, or a hub id that was downloaded
    out: Path = Path("captions")  # with several machines: on storage that all of them see
    num_beams: Annotated[int, 1, 100] = 1  # the paper's 4 are several times slower
    max_new_tokens: Count = 300  # a caption ends by itself, or here
    # images at once; None: 256 on a GPU, else 64. It cannot be changed later: choose less if memory is short
    batch_size: Count | None = None
    # auto: bf16 on GPUs that have it, and for large models on CPUs; else fp32. fp16 is for older GPUs
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    num_workers: Annotated[int, 0, 256] = 4  # processes that read and decode images ahead
    usd_per_gpu_hour: Annotated[float, 0.001, 1000] = 2.5  # only for what it says about its cost


class Shard:
    """A tar file, and the files of its captions."""

    def __init__(self, path: Path, name: str, out: Path):
        self.path, self.name, self.final = path, name, out / f"{name}.jsonl"
        self.part, self.unreadable = out / ".parts" / f"{name}.jsonl", out / ".parts" / f"{name}.txt"

    def is_done(self) -> bool:
        """Whether its captions are complete, and not older than the shard."""
        return self.final.exists() and self.final.stat().st_mtime >= self.path.stat().st_mtime

    def start(self, batch_size: int):
        """Opens the unfinished captions, for this process alone; one that outlives a killed call is waited
        for. Only whole batches are kept. Returns the file, and how many images it has."""
        self.part.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.part, "a+b")
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tqdm.write(f"waiting for the process that still captions {self.path}")
                fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        lines = file.readlines()
        count = sum(line.endswith(b"\n") for line in lines) // batch_size * batch_size
        file.truncate(sum(map(len, lines[:count])))
        return file, count

    def finish(self, problems: list[str]) -> None:
        """Turns complete lines into the final file. If this is killed, it can be done again."""
        records = [json.loads(line) for line in open(self.part, **TEXT)]
        problems = problems + [record["problem"] for record in records if "problem" in record]
        write_lines(self.unreadable, [printable(sentence) for sentence in problems])
        self.final.parent.mkdir(parents=True, exist_ok=True)
        captions = [json.dumps(record, ensure_ascii=False) for record in records if "caption" in record]
        write_lines(self.final, captions)
        self.part.unlink()


def read_images(indices, shard: Shard, keys: list[str], spans, config: VLVConfig) -> list[dict]:
    """Of each image {"image": "00000.tar/KEY", "pixels": (3, S, S) uint8, or else "problem": a sentence}."""
    items = [{"image": f"{shard.name}.tar/{keys[i]}"} for i in indices]
    for i, item in zip(indices, items):
        try:
            data = io.BytesIO(read_part(shard.path, *map(int, spans[i, :2])))
            item["pixels"] = to_pixels(data, config.image_size, config.resize)
        except OSError as error:
            reason = " ".join(str(error).split())
            item["problem"] = f"{item['image']}: cannot be read as an image: {reason}"
    return items


def prepare(args: CaptionConfig) -> tuple[Path, list[Shard], list[str]]:
    """(checkpoint, shards, a sentence for each file that is out of reach). Raises ValueError or OSError if
    there are no shards, two of them would have one captions file, or these would mix with others."""
    checkpoint, shards, problems = find_checkpoint(args.ckpt), {}, []
    for name in args.shards:
        found = find_files(name)
        problems += found.problems
        if not found.shards:
            hints = ["no tar shards are there; sample.py captions images", *found.problems]
            raise ValueError(f"{name}: {'; '.join(hints)}")
        for path in found.shards:
            relative = path.relative_to(name if name.is_dir() else name.parent).with_suffix("").as_posix()
            shard = shards.setdefault(relative, Shard(path, relative, args.out))
            if shard.path != path:
                raise ValueError(f"{shard.path} and {path} would both be {relative}.jsonl: use two --out")
    if not shards:
        raise ValueError("name tar shards, or folders of them")
    if load_config(checkpoint).stage == 1:
        raise ValueError(f"captions need a stage-2 checkpoint, but {checkpoint} is one of stage 1")
    note = args.out / "settings.json"
    others = [shard.final for shard in shards.values() if shard.final.exists() and not note.exists()]
    if others:
        raise ValueError(f"{others[0]} was not written by this program: choose another --out")
    names = ("num_beams", "precision", "max_new_tokens", "batch_size")
    settings = {name: getattr(args, name) for name in names}
    settings["checkpoint"] = checkpoint_fingerprint(checkpoint)
    same_as_before(note, settings, "choose another --out")
    return checkpoint, list(shards.values()), problems


def caption_shard(args: CaptionConfig, model: VLV, device: torch.device, shard: Shard):
    """Captions what is left of a shard. Yields after each batch: how many images, seconds waited for them."""
    file, done = shard.start(args.batch_size)
    if shard.is_done():  # the process that held the file has finished it
        shard.part.unlink(missing_ok=True)
        return
    keys, spans, problems, left_out = read_shard(shard.path)
    problems += [f"{shard.path}:{name}: another image has its key" for name in left_out[SECOND_IMAGE]]
    problems += [] if keys or problems else [f"{shard.path}: it holds no images"]
    size = args.batch_size
    batches = [range(first, min(len(keys), first + size)) for first in range(done, len(keys), size)]
    read = partial(read_images, shard=shard, keys=keys, spans=spans, config=model.config)
    loader = start_workers(range(len(keys)), batches, min(args.num_workers, len(batches)), collate_fn=read)
    for _ in batches:
        start = time.perf_counter()
        items = next(loader)
        waited = time.perf_counter() - start
        good = [item for item in items if "pixels" in item]
        if good:
            images = torch.stack([item.pop("pixels") for item in good]).to(device)
            # eight at a time, for less memory, and always eight, as other numbers would be compiled anew
            eights = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(good) % 8)).split(8)
            prompt_embeds = torch.cat([model.embed(eight) for eight in eights])[: len(good)]
            captions = model.caption_head.generate(prompt_embeds, args.num_beams, args.max_new_tokens)
            for item, caption in zip(good, captions):
                item["caption"] = caption
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        file.write(lines.encode(TEXT["encoding"], TEXT["errors"]))
        file.flush()
        yield len(items), waited
    shard.finish(problems)


@torch.inference_mode()
def main(argv=None) -> int:
    args = read_settings(CaptionConfig, argv, __doc__)
    device = on_every_rank(lambda: select_device("auto"))
    args.batch_size = args.batch_size or (256 if device.type == "cuda" else 64)
    init_process_group("gloo", hours=720)  # who is done waits for the others
    checkpoint, shards, unreadable = on_every_rank(lambda: prepare(args))
    mine = [shard for shard in shards if not shard.is_done()][RANK::WORLD_SIZE]
    how = dict(with_unet=False, dtype=select_dtype(args.precision, device, checkpoint), device=device)
    model = on_every_rank(lambda: VLV.from_pretrained(checkpoint, **how) if mine else None)
    if mine:
        compile_if_possible(model, device)
    count, waited, start = 0, 0.0, time.perf_counter()
    bar = tqdm(total=len(mine), unit=" shards", disable=RANK > 0 or not mine)
    try:
        for shard in mine:
            for images, seconds in caption_shard(args, model, device, shard):
                count += images
                waited += seconds
                elapsed = time.perf_counter() - start
                per_dollar = count / elapsed * 3600 / args.usd_per_gpu_hour
                rate, waiting = count / elapsed * WORLD_SIZE, waited / elapsed
                bar.set_postfix_str(f"{rate:,.1f}/s, {per_dollar:,.0f} per dollar, {waiting:.0%} waiting")
                if exit_reasons:
                    sys.exit("stopped by the end of torchrun; the same command goes on")
            bar.update()
        all_gather(None)  # the others are done, too
        if RANK > 0:
            return 0
        for shard in shards:
            if shard.unreadable.exists():
                unreadable += shard.unreadable.read_text(encoding="utf-8").splitlines()
        if unreadable or (args.out / "unreadable.txt").exists():
            write_lines(args.out / "unreadable.txt", unreadable)
    except OSError as error:
        sys.exit(f"error: {error.filename or args.out}: {error.strerror or error}; what is done is kept")
    bar.close()
    print(f"captions are in {args.out}/" + ("" if mine else "; nothing was left to do"), file=sys.stderr)
    return report(unreadable)


if __name__ == "__main__":
    run_and_exit(main, "stopped; the same command goes on")
