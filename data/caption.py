"""
Captions whole data sets: tar shards, with any number of processes, through any number of kills.

    torchrun --nproc_per_node=8 data/caption.py data/laion/shards --ckpt out/stage2 --out captions

For each shard there is one file in --out, complete or absent: 00000.jsonl, with a line {"image":
"00000.tar/KEY", "caption": ...} for each image; of one that cannot be read the caption is null, and "error"
says why. A killed call goes on by the same command, and has lost at most a shard a process. Each process
captions shards of its own, in batches that are always the same images: so the captions are always the same.
"""

import io
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import two_clips  # noqa: F401  for SDXL and SD 3
from data.distributed import RANK, WORLD_SIZE, compile_parts, run_and_exit, select_device, select_dtype
from data.distributed import start_workers
from data.loader import describe_left_out, find_files, read_part, read_shard
from data.results import checkpoint_fingerprint, find_checkpoint
from data.settings import Count, read_settings, same_as_before, write_lines
from vlv import VLV, CaptionHead, VLVConfig, load_config, to_pixels


@dataclass
class CaptionConfig:
    shards: Path  # a folder of tar files, or one of them
    ckpt: str = "out/stage2"  # a checkpoint folder, or a hub id that was downloaded
    out: Path = Path("captions")  # with several machines: on storage that all of them see
    num_beams: Annotated[int, 1, 100] = 1  # the paper's 4 are several times slower
    max_new_tokens: Count = 300  # a caption ends by itself, or here
    # images at once; None: 256 on a GPU, else 64. It cannot be changed later: choose less if memory is short
    batch_size: Count | None = None
    # auto: bf16 on GPUs that have it, and for large models on CPUs; else fp32. fp16 is for older GPUs
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    num_workers: Annotated[int, 0, 256] = 4  # processes that read and decode images ahead


class ShardImages(torch.utils.data.Dataset):
    """The images of a tar file. name: what lines call it, such as "00000.tar"."""

    def __init__(self, path: Path, name: str, config: VLVConfig):
        self.path, self.name, self.config = path, name, config
        images, _, self.left_out = read_shard(path)
        self.keys, self.spans = [*images], [*images.values()]

    def __getitems__(self, indices: list[int]) -> dict:
        """{"lines": a record for each image, "images": (n, 3, S, S) uint8 of those that can be read}"""
        lines, images = [{"image": f"{self.name}/{self.keys[i]}", "caption": None} for i in indices], []
        for i, line in zip(indices, lines):
            try:
                data = io.BytesIO(read_part(self.path, *self.spans[i]))
                images.append(to_pixels(data, self.config.image_size, self.config.resize).numpy())
            except OSError as error:
                line["error"] = " ".join(str(error).split())
        return {"lines": lines, "images": np.stack(images) if images else None}


def caption_shard(args: CaptionConfig, model: VLV, dataset: ShardImages) -> list[dict]:
    """The lines of a shard."""
    count, size, lines = len(dataset.keys), args.batch_size, []
    batches = [range(first, min(count, first + size)) for first in range(0, count, size)]
    bar = tqdm(total=count, desc=dataset.name, unit=" images", leave=False, disable=RANK > 0)
    for batch in start_workers(dataset, batches, min(args.num_workers, len(batches))):
        if batch["images"] is not None:
            images = torch.from_numpy(batch["images"]).to(model.device)
            # Eight at a time, for less memory, and always eight, as other numbers would be compiled anew.
            eights = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % 8)).split(8)
            c = torch.cat([model.embed(eight) for eight in eights])[: len(images)]
            captions = iter(generate(model.caption_head, c, args.num_beams, args.max_new_tokens))
            for line in batch["lines"]:
                line["caption"] = None if "error" in line else next(captions)
        lines += batch["lines"]
        bar.update(len(batch["lines"]))
    return lines


# --- fast decoding ---------------------------------------------------------------------------------------


def generate(head: CaptionHead, c: torch.Tensor, num_beams: int, max_new_tokens: int) -> list[str]:
    """As CaptionHead.generate; without beams, on a GPU, by a recorded step. What is compiled runs eagerly
    here, as captions' lengths differ."""
    llm, cache = head.llm, StaticCache(head.llm.config, max_cache_len=c.shape[1] + max_new_tokens)
    can_record = c.is_cuda and llm._can_compile_fullgraph and not getattr(llm.config, "alibi", False)
    with torch.compiler.set_stance("force_eager"):
        # A sliding window has a length that is no tensor.
        if num_beams == 1 and can_record and all(type(layer) is StaticLayer for layer in cache.layers):
            return head.decode(greedy_search(head, head.mlp(c).to(llm.dtype), cache, max_new_tokens))
        return head.generate(c, num_beams, max_new_tokens)


@torch.no_grad()
def greedy_search(head: CaptionHead, prefix, cache: StaticCache, max_new_tokens: int) -> torch.Tensor:
    """Returns the token ids, (B, T), that head.llm.generate finds after prefix, (B, N, width). There each
    token waits for Python, for one image as long as for 256; here a GPU records a step and replays it."""
    eos = head.tokenizer.eos_token_id
    logits = head.llm(inputs_embeds=prefix, past_key_values=cache, logits_to_keep=1).logits
    token = logits.argmax(-1)  # (B, 1)
    ids = [token.clone()]

    def step():
        following = head.llm(input_ids=token, past_key_values=cache).logits.argmax(-1)
        token.copy_(following.masked_fill(token == eos, eos))  # what has ended stays so

    run = step
    # Whether all have ended is asked now and then, as the answer is waited for.
    while len(ids) < max_new_tokens and not (len(ids) % 16 == 0 and (token == eos).all()):
        if prefix.is_cuda and len(ids) == 3:  # two steps have set up what is to be recorded
            run = record(step)
        else:
            run()
        ids.append(token.clone())
    return torch.cat(ids, 1)


def record(step):
    """Runs a step, and returns what runs it again: a CUDA graph; or step, if it waits for values."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if any("synchronizing CUDA operation" in str(warning.message) for warning in warned):
        return step
    graph = torch.cuda.CUDAGraph()
    # What is recorded is not run; other threads may go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


@torch.inference_mode()
def main(argv=None) -> None:
    args = read_settings(CaptionConfig, argv, __doc__)
    device, checkpoint = select_device("auto"), find_checkpoint(args.ckpt)
    args.batch_size = args.batch_size or (256 if device.type == "cuda" else 64)
    if load_config(checkpoint).stage == 1:
        raise ValueError(f"captions need a stage-2 checkpoint, but {checkpoint} is one of stage 1")
    top, shards = args.shards if args.shards.is_dir() else args.shards.parent, find_files(args.shards).shards
    if not shards:
        raise ValueError(f"{args.shards}: no tar shards are there; sample.py captions images")
    names = ("num_beams", "precision", "max_new_tokens", "batch_size")
    settings = {name: getattr(args, name) for name in names}
    settings["checkpoint"] = checkpoint_fingerprint(checkpoint)
    files = {shard: args.out / shard.relative_to(top).with_suffix(".jsonl") for shard in shards}
    if any(out.exists() for out in files.values()) and not (args.out / "settings.json").exists():
        raise ValueError(f"{args.out} has files that were not written by this program: choose another --out")
    same_as_before(args.out / "settings.json", settings, "choose another --out")
    left = [shard for shard in shards[RANK::WORLD_SIZE] if not files[shard].exists()]
    if left:
        dtype = select_dtype(args.precision, device, checkpoint)
        model = VLV.from_pretrained(checkpoint, with_unet=False, dtype=dtype, device=device)
        if device.type == "cuda":
            compile_parts(model)
    for shard in tqdm(left, unit=" shards", disable=RANK > 0 or not left):
        dataset = ShardImages(shard, shard.relative_to(top).as_posix(), model.config)
        lines = caption_shard(args, model, dataset)
        dataset.left_out["images cannot be read"] = [line["image"] for line in lines if "error" in line]
        for problem in describe_left_out(dataset.left_out):
            tqdm.write(problem, sys.stderr)
        files[shard].parent.mkdir(parents=True, exist_ok=True)
        write_lines(files[shard], [json.dumps(line, ensure_ascii=False) for line in lines])
    print(f"process {RANK}: all of its shards' captions are in {args.out}/", file=sys.stderr)


if __name__ == "__main__":
    run_and_exit(main)
