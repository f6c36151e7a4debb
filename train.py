"""
Trains VLV. One loop, both stages: stage 1 learns to redraw images (images only), stage 2 to read the embedding aloud.

    python train.py --stage 1 --config data/shapes/config.json         # the toy world, on a laptop
    torchrun --nproc_per_node=8 train.py --stage 1                     # the paper's run, one node
    torchrun --nproc_per_node=8 train.py --stage 2 --resume            # go on where a killed run was

Flags override the JSON file of --config, the file overrides the defaults, and the defaults are the paper's recipe.
A run writes into OUT_DIR/stage1 (or stage2): step-000100/ (checkpoints, the last two), log.jsonl, step-000100.png.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.loader import ImageTextDataset, batch_indices, collate
from sample import panel, quiet
from vlv import VLV, VLVConfig, check_names, find_checkpoint, load_config, read_json


@dataclass
class TrainConfig(VLVConfig):
    """Every setting of a run, next to those of the model. None: the stage's value in RECIPE."""

    data: str = "data/laion"  # tar shards of KEY.jpg + KEY.txt, or a folder of images; stage 1 needs no captions
    val_data: str = ""  # the same for validation; empty: no validation
    out_dir: str = "out"
    init_from: str = ""  # stage 2: the stage-1 checkpoint to start from; empty: the newest in OUT_DIR/stage1
    resume: bool = False  # continue the newest checkpoint of this run, or start if there is none yet
    seed: int = 0  # decides the order of the data, every noise and every dropout
    batch_size: int | None = None  # images a step, over all processes
    micro_batch_size: int | None = None  # images a forward pass; None: a process's share of batch_size at once
    max_steps: int | None = None
    learning_rate: float | None = None
    lr_schedule: str | None = None  # cosine or linear, to zero at max_steps
    warmup_steps: int = 0  # the paper has none
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # of the gradient's norm
    precision: str = "auto"  # fp32, bf16 (autocast over fp32 weights), or auto: bf16 where the GPU has it
    num_workers: int = 4  # processes a rank that decode images; 0: none, good for tiny images
    log_interval: int = 10  # steps
    eval_interval: int = 1000  # steps
    save_interval: int = 1000  # steps
    eval_images: int = 512  # how many validation images the loss is measured on
    eval_pictures: int = 8  # how many of them are drawn; 0: none


RECIPE = {  # the paper's
    1: dict(batch_size=512, max_steps=200_000, learning_rate=5e-5, lr_schedule="cosine", data="data/laion"),
    2: dict(batch_size=64, max_steps=100_000, learning_rate=1e-5, lr_schedule="linear", data="data/captions6m"),
}


def raise_value_error(message: str):
    raise ValueError(message)


def read_settings(argv) -> dict:
    """The settings that the JSON file and the flags give. Raises ValueError with the nearest name for unknown ones."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.error = raise_value_error
    parser.add_argument("--config", help="JSON file with settings, and with those of one stage under stage1 or stage2")
    for name, field in fields.items():
        kwargs = dict(default=argparse.SUPPRESS, help=f"default: {field.default!r}")
        if field.type is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **kwargs)
        elif name.endswith("_trains"):
            parser.add_argument(f"--{name}", nargs="+", metavar="PART", **kwargs)
        else:
            kind = next(t for t in (int, float, str) if t.__name__ in str(field.type))
            parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), **kwargs)
    flags, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        check_names([flag.split("=")[0].lstrip("-")], [*fields, "config"], "command line")
    flags = vars(flags)
    settings = {}
    if path := flags.pop("config"):
        settings = read_json(path)
        stage = flags.get("stage", settings.get("stage", 1))
        stages = {key: settings.pop(key, {}) for key in ("stage1", "stage2")}
        settings |= stages.get(f"stage{stage}", {})
        check_names([*settings, *stages["stage1"], *stages["stage2"]], list(fields), path)
    for name, value in (settings := settings | flags).items():
        want = fields[name].type
        if isinstance(value, int) and not isinstance(value, bool) and "float" in str(want):
            settings[name] = value = float(value)
        if not name.endswith("_trains") and not isinstance(value, want):
            raise ValueError(f"{name} is {value!r}, but must be {getattr(want, '__name__', want)}")
    return settings


def resolve(settings: dict, world_size: int) -> TrainConfig:
    """The run's settings, checked."""
    stage = settings.get("stage", 1)
    config = TrainConfig(**(RECIPE.get(stage, {}) | settings))
    share, rest = divmod(config.batch_size, world_size)
    config.micro_batch_size = config.micro_batch_size or share
    if rest or not share or config.micro_batch_size < 1 or share % config.micro_batch_size:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide into {world_size} processes and micro-batches of"
            f" {config.micro_batch_size}: choose a multiple of their product"
        )
    check_names([config.lr_schedule], ["cosine", "linear"], "lr_schedule")
    check_names([config.precision], ["auto", "fp32", "bf16"], "precision")
    for name in ("max_steps", "log_interval", "eval_interval", "save_interval"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}, but must be at least 1")
    return config


def learning_rate(step: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    shape = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * shape


def seeds_of(seed: int, step: int, positions) -> list[int]:
    """One seed a sample, from its place in the run alone: noise is the same on any number of processes."""
    return [int(np.random.SeedSequence([seed, step, p]).generate_state(1, np.uint64)[0] >> 1) for p in positions]


def main(argv=None):
    # --- processes and devices ---------------------------------------------------------------------------------------
    quiet()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, is_main = int(os.environ.get("LOCAL_RANK", 0)), rank == 0
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif world_size > 1:  # processes that each take every core slow each other down tenfold
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    say = print if is_main else lambda *args, **kwargs: None

    # --- settings, data and model: what is wrong with them is said in one sentence ---------------------------------------
    try:
        settings = read_settings(argv)
        config = resolve(settings, world_size)
        run_dir = Path(config.out_dir) / f"stage{config.stage}"
        has_run = any(run_dir.glob("step-*/config.json"))
        if has_run and not config.resume:
            raise ValueError(f"{run_dir} already holds a run: add --resume to continue it, or choose another --out_dir")
        if world_size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            if rank > 0:
                dist.barrier()  # rank 0 builds the index of the data, the others then find it
        dataset = ImageTextDataset(config.data, config.image_size, with_captions=config.stage == 2)
        val_dataset = None
        if config.val_data:
            val_dataset = ImageTextDataset(config.val_data, config.image_size, with_captions=config.stage == 2)
        if world_size > 1 and rank == 0:
            dist.barrier()
        torch.manual_seed(config.seed)  # the same new weights on every rank
        model_settings = {k: v for k, v in settings.items() if k in VLVConfig.__dataclass_fields__}
        source = run_dir if has_run else config.init_from or (Path(config.out_dir) / "stage1" if config.stage == 2 else "")
        if source:
            source = find_checkpoint(source)
            say(f"starting from {source}")
            if not has_run and config.stage == 2 and load_config(source).stage == 2:
                raise ValueError(f"{source} is a stage-2 checkpoint; stage 2 starts from one of stage 1 (--init_from)")
            model = VLV.from_pretrained(source, for_training=True, **{**model_settings, "stage": config.stage})
        else:
            model = VLV(VLVConfig(**model_settings), for_training=True)
    except (ValueError, OSError) as error:
        if dist.is_initialized() and world_size > 1:
            dist.destroy_process_group()
        sys.exit(f"error: {error}" if is_main else 1)
    model.to(device).train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8,
                                  weight_decay=config.weight_decay, fused=device.type == "cuda")  # fmt: skip
    start = 0
    if has_run:
        trainer = torch.load(source / "trainer.pt", map_location=device, weights_only=True)
        optimizer.load_state_dict(trainer["optimizer"])
        start = trainer["step"]
    ddp = DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model
    grad_accum_steps = config.batch_size // (world_size * config.micro_batch_size)
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    autocast = lambda: torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    say(f"stage {config.stage}: {len(dataset):,} samples from {config.data}, steps {start:,} to {config.max_steps:,} of"
        f" {config.batch_size} images ({world_size} processes x {config.micro_batch_size} x {grad_accum_steps}),"
        f" {'bf16' if bf16 else 'fp32'} on {device.type}\n{model.describe()}")  # fmt: skip
    run_dir.mkdir(parents=True, exist_ok=True)
    if is_main:
        (run_dir / "settings.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")

    def log(**values):
        if is_main:
            with open(run_dir / "log.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")

    def sum_over_ranks(*values) -> list[float]:
        sums = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
        if world_size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    @torch.no_grad()
    def evaluate(step):
        """Loss on the first validation images, with noise and timesteps that depend on the image alone; a picture."""
        model.eval()
        total, count = 0.0, 0
        mine = list(range(min(config.eval_images, len(val_dataset))))[rank::world_size]
        for at in range(0, len(mine), config.micro_batch_size):
            indices = mine[at : at + config.micro_batch_size]
            batch = collate([val_dataset[i] for i in indices])
            with autocast():
                loss = model(batch["image"].to(device), batch["caption"], seeds_of(0, 0, indices))
            total, count = total + loss.item() * len(indices), count + len(indices)
        total, count = sum_over_ranks(total, count)
        if is_main and config.eval_pictures:
            images = torch.stack([val_dataset[i]["image"] for i in range(min(config.eval_pictures, len(val_dataset)))])
            with autocast():
                prompt_embeds = model.embed(images.to(device))
                redrawn = model.decoder.reconstruct(prompt_embeds)
                captions = [""] * len(images)
                if config.stage == 2:
                    captions = model.caption_head.generate(prompt_embeds, max_new_tokens=config.max_caption_tokens)
            panel([[image, drawn] for image, drawn in zip(images, redrawn)], captions).save(run_dir / f"step-{step:06d}.png")
        model.train()
        return total / count

    def save(step):
        if is_main:
            model.save_pretrained(run_dir / f"step-{step:06d}", {"optimizer": optimizer.state_dict(), "step": step})
            for old in sorted(p for p in run_dir.glob("step-*") if p.is_dir())[:-2]:
                shutil.rmtree(old)

    # --- the loop ------------------------------------------------------------------------------------------------------
    def places(micro_step):  # of this process's micro-batch in the step's global batch
        at = (micro_step * world_size + rank) * config.micro_batch_size
        return range(at, at + config.micro_batch_size)

    def micro_batches():
        for step in range(start, config.max_steps):
            indices = batch_indices(len(dataset), config.batch_size, config.seed, step)
            yield from ([indices[p] for p in places(micro_step)] for micro_step in range(grad_accum_steps))

    loader = iter(torch.utils.data.DataLoader(dataset, batch_sampler=micro_batches(), collate_fn=collate,
                                              num_workers=config.num_workers, pin_memory=device.type == "cuda"))  # fmt: skip
    losses, skipped, clock, last = [], 0, time.perf_counter(), start
    bar = tqdm(total=config.max_steps * config.batch_size, initial=start * config.batch_size, unit="img",
               desc=f"stage {config.stage}", disable=not is_main, unit_scale=True, mininterval=0.5)  # fmt: skip
    for step in range(start, config.max_steps):
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro_step in range(grad_accum_steps):
            batch = next(loader)
            images = batch["image"].to(device, non_blocking=True)
            for sentence in batch["skipped"]:
                skipped += 1
                with open(run_dir / "skipped.txt", "a") as file:
                    file.write(sentence + "\n")
                tqdm.write(f"skipped: {sentence}")
            seeds = seeds_of(config.seed, step, places(micro_step))
            torch.manual_seed(seeds[0])  # dropout
            # under no_sync both the forward and the backward pass, or DDP would synchronize all the same
            last_micro_step = micro_step == grad_accum_steps - 1
            with nullcontext() if last_micro_step or world_size == 1 else ddp.no_sync():
                with autocast():
                    loss = ddp(images, batch["caption"], seeds) / grad_accum_steps
                loss.backward()
            losses.append(loss.detach() * grad_accum_steps)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update(config.batch_size)

        done, now = step + 1, time.perf_counter()
        finished = done == config.max_steps
        if done % config.log_interval == 0 or finished:
            total, count, all_skipped = sum_over_ranks(torch.stack(losses).sum(), len(losses), skipped)
            loss = total / count
            rate = (done - last) * config.batch_size / (now - clock)
            bar.set_postfix(loss=f"{loss:.4f}")
            log(step=done, loss=loss, lr=lr, grad_norm=grad_norm.item(), images_per_second=rate, skipped=int(all_skipped))
            losses, clock, last = [], time.perf_counter(), done
        if val_dataset is not None and (done % config.eval_interval == 0 or finished):
            val_loss = evaluate(done)
            log(step=done, val_loss=val_loss)
            if is_main:
                tqdm.write(f"step {done:,}: validation loss {val_loss:.5f}")
            clock = time.perf_counter()
        if done % config.save_interval == 0 or finished:
            save(done)
            clock = time.perf_counter()
    bar.close()
    say(f"done: {run_dir / f'step-{config.max_steps:06d}'}")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
