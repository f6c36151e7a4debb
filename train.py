"""
Trains VLV. One loop, both stages: stage 1 learns to redraw images, stage 2 to caption them from c.

    python train.py --stage 1 --config data/shapes/config.json         # the toy world, on a laptop
    torchrun --nproc_per_node=8 train.py --stage 1                     # the paper's run, on one machine
    torchrun --nproc_per_node=8 train.py --stage 2 --resume            # go on where a killed run was

A flag overrides the JSON file of --config, and both override the model's settings in the checkpoint that the
run starts from, and the paper's recipe. A run writes into OUT_DIR/stage1 (or stage2):

    step-000100/                  a checkpoint, complete or absent; the last two and the best are kept
        config.json, model.safetensors, ...      for VLV.from_pretrained
        trainer.json, optimizer-*.safetensors    to go on from: the step, and AdamW's state
    log.jsonl, curves.png, step-000100.png       losses and speed; validation images, also redrawn
    settings.json, skipped.txt                   what was given, for --config; samples that cannot be read
"""

import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import two_clips  # noqa: F401  for Stable Diffusion XL and 3
from data.distributed import RANK, WORLD_SIZE, all_gather, compile_parts, from_first, init_process_group
from data.distributed import print_once, run_and_exit, select_device, select_dtype, start_running
from data.distributed import start_workers, stop_signals
from data.loader import ImageTextDataset, UnreadableData, check_apart, micro_batches
from data.results import Log, checkpoints, draw_curves, find_checkpoint, panel
from data.settings import Count, NonNegative, parse_with_file, read_json, write_json
from vlv import VLV, VLVConfig, load_config, read_weights, write_weights

BAD_STEPS = 10  # so many non-finite steps in a row end a run
EVAL_BATCH = 8  # validation images at once


@dataclass
class TrainConfig:
    """The settings of a run. Those of the model are VLVConfig's, and flags, too. None: RECIPE's, if it is not
    said otherwise."""

    config: Path | None = None  # JSON file with settings; those of one stage under stage1 or stage2
    data: str | None = None  # tar shards of KEY.jpg + KEY.txt, or a folder of images; stage 1 needs no texts
    captions: str = ""  # data/caption.py's --out for these shards, in the place of their texts
    val_data: str = ""  # the same for validation; empty: no validation
    val_captions: str = ""
    out_dir: Path = Path("out")  # with several machines: on storage that all of them see
    init_from: str = ""  # the checkpoint to start from, of either stage; empty, in stage 2: OUT_DIR/stage1
    resume: bool = False  # continue the newest checkpoint of this run, or start if there is none yet
    device: Literal["cuda", "mps", "cpu", "auto"] = "cuda"  # auto: what is there
    seed: NonNegative = 0  # decides the order of the data, every noise and every dropout
    batch_size: Count | None = None  # images a step, over all processes
    micro_batch_size: Count | None = None  # images a forward pass; None: what 80 GB hold at the paper's size
    max_steps: Count | None = None
    learning_rate: Annotated[float, 0, 1] | None = None
    lr_schedule: Literal["cosine", "linear"] | None = None  # to zero at max_steps
    warmup_steps: NonNegative = 0  # the paper has none
    beta1: Annotated[float, 0, 0.9999] = 0.9
    beta2: Annotated[float, 0, 0.9999] = 0.99
    weight_decay: Annotated[float, 0, 1] = 0.01
    grad_clip: Annotated[float, 1e-9, 1e9] = 1.0  # of the gradient's norm
    # bf16: autocast over float32 weights; frozen ones are stored in bf16. auto: bf16 where a GPU has it
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = True  # torch.compile, on CUDA alone: minutes at the first start
    gradient_checkpointing: tuple[Literal["unet", "bart", "llm"], ...] = ()  # less memory, but slower
    latents: bool = False  # read the VAE's moments, computed ahead by data/latents.py
    num_workers: Annotated[int, 0, 256] = 4  # processes a rank that decode images; 0: none, for tiny images
    log_interval: Count = 10  # steps
    eval_interval: Count = 1000  # steps
    save_interval: Count = 1000  # steps
    eval_images: Count = 512  # how many validation images the loss is measured on
    eval_pictures: NonNegative = 8  # how many of them are drawn; 0: none
    usd_per_gpu_hour: Annotated[float, 0, 1000] = 2.5  # only for what the run says about its cost


RECIPE = {  # the paper's, by stage
    1: dict(data="data/laion", batch_size=512, max_steps=200_000, learning_rate=5e-5, lr_schedule="cosine"),
    2: dict(data="data/captions6m", batch_size=64, max_steps=100_000, learning_rate=1e-5,
            lr_schedule="linear"),
}


def read_config(argv) -> tuple[TrainConfig, dict, dict]:
    """(the run's settings; given ones of the model, and stage; all given but resume). Raises ValueError."""
    recipes = {name: f"{RECIPE[1][name]} in stage 1, {RECIPE[2][name]} in stage 2" for name in RECIPE[1]}
    given = {"stage": 1} | parse_with_file(argv, __doc__, TrainConfig, VLVConfig, defaults=recipes)
    of_run = given.keys() & {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**(RECIPE[given["stage"]] | {name: given[name] for name in of_run}))
    share = config.batch_size // WORLD_SIZE
    config.micro_batch_size = config.micro_batch_size or math.gcd(share, 64 if given["stage"] == 1 else 8)
    if config.batch_size % (WORLD_SIZE * config.micro_batch_size):
        raise ValueError(f"batch_size {config.batch_size} does not divide into {WORLD_SIZE} processes and"
                         f" micro-batches of {config.micro_batch_size}: choose a multiple of their product")
    given.pop("resume", None)  # settings.json is a --config for another run
    return config, {name: given[name] for name in given.keys() - of_run}, given


# --- a step ----------------------------------------------------------------------------------------------


def learning_rate(step: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def autocast(config: TrainConfig):
    """bf16 where the run has it. Without autocast's cache: a step uses each weight once, and gradient
    checkpointing could not free what is cached."""
    enabled = config.precision == "bf16"
    return torch.autocast(config.device, torch.bfloat16, enabled=enabled, cache_enabled=False)


def train_step(ddp, optimizer, batches, step: int, config: TrainConfig) -> tuple[dict, torch.Tensor]:
    """One step of AdamW on batch_size images, and on as many captions in stage 2. batches: this process's
    micro-batches. Returns this process's mean losses by name, and the norm of the gradient, which is averaged
    over all processes: where it is not finite, all of them leave the weights as they are."""
    grad_accum_steps = config.batch_size // (WORLD_SIZE * config.micro_batch_size)
    losses = defaultdict(float)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    for micro_step in range(grad_accum_steps):
        images, captions, moments = to_device(next(batches), config.device)
        # Dropout, timesteps and noise depend on the micro-batch's place in the step, on any number of GPUs.
        place = micro_step * WORLD_SIZE + RANK
        seed = np.random.SeedSequence([config.seed, step, place]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed >> 1))
        ddp.require_backward_grad_sync = micro_step == grad_accum_steps - 1  # exchanged once a step
        with autocast(config):
            micro_losses = ddp(images, captions, moments)
        (sum(micro_losses.values()) / grad_accum_steps).backward()
        for name, loss in micro_losses.items():
            losses[name] += loss.detach() / grad_accum_steps
    norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), config.grad_clip)
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=WORLD_SIZE == 1)  # DDP's gradients stay where they are, in buckets
    return losses, norm


def to_device(batch: dict, device: str) -> tuple[torch.Tensor, list[str], torch.Tensor | None]:
    """images, (B, 3, S, S) uint8, captions, and moments, (B, 2C, S / 8, S / 8) half, or None."""
    moments = batch["moments"]
    if moments is not None:
        moments = torch.from_numpy(moments).to(device)
    return torch.from_numpy(batch["images"]).to(device), batch["captions"], moments


def make_optimizer(model: VLV, config: TrainConfig) -> tuple:
    """(optimizer, the model, in DDP if there are several processes). What learns stays in float32: at a
    learning rate of 1e-5 bfloat16 would round most updates away. The memory that this costs, AdamW's two
    moments, is shared out among the processes (ZeRO's first stage)."""
    params = [p for p in model.parameters() if p.requires_grad]
    adamw = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8,
                 weight_decay=config.weight_decay, fused=True)
    if WORLD_SIZE == 1:
        return torch.optim.AdamW(params, **adamw), model
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes nearly as long to import as torch

    optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, **adamw)
    for p in params:  # gradients live in DDP's buckets from the start: none is ever there twice
        p.grad = torch.zeros((), device=p.device).expand_as(p)
    return optimizer, DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def checkpoint_activations(model: VLV, config: TrainConfig) -> None:
    if "unet" in config.gradient_checkpointing and model.decoder.unet:
        model.decoder.unet.enable_gradient_checkpointing()
    if "bart" in config.gradient_checkpointing:
        for net in model.encoder.bart.values():
            net.activation_checkpointing_enable()
    if "llm" in config.gradient_checkpointing and model.caption_head:
        model.caption_head.llm.activation_checkpointing_enable()


def describe(model: VLV) -> str:
    """A line for each part of the model, also those that were added: how much of it learns."""
    counts = defaultdict(lambda: np.zeros(2, np.int64))
    for name, p in model.named_parameters():
        counts[".".join(name.split(".")[:2])] += p.numel(), p.numel() * p.requires_grad
    return "\n".join(f"  {part:22} {count:>13,} parameters, {learning:>13,} of them learn"
                     for part, (count, learning) in counts.items())


# --- data -------------------------------------------------------------------------------------------------


def open_data(config: TrainConfig, model: VLVConfig) -> tuple:
    """(data set for training, for validation or None). model: its settings. Raises ValueError."""
    settings = dict(size=model.image_size, resize=model.resize, with_captions=model.stage == 2,
                    latents_of=model.diffusion_model if config.latents and model.denoises else None)
    dataset = ImageTextDataset(config.data, captions=config.captions, **settings)
    if not config.val_data:
        return dataset, None
    val_dataset = ImageTextDataset(config.val_data, captions=config.val_captions, replace=False, **settings)
    check_apart(dataset, val_dataset)
    return dataset, val_dataset


def read_batches(loader, log: Log):
    """Yields what the workers have read, and notes what they skipped and how long they were waited for."""
    while True:
        start = time.perf_counter()
        try:
            batch = next(loader)
        except UnreadableData as error:  # of a worker: behind its traceback
            sys.exit(f"error: {str(error).rpartition('UnreadableData: ')[2].strip()}")
        log.waited += time.perf_counter() - start
        log.skip(batch["skipped"])
        yield batch


# --- validation ------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: VLV, dataset: ImageTextDataset, config: TrainConfig, log: Log, step: int) -> None:
    """Logs the mean losses on the first validation images, which the processes share. The noise depends on an
    image's place alone, so that losses can be compared. The first process draws some of the images."""
    model.eval()
    found, indices = [], range(min(config.eval_images, len(dataset)))
    with torch.compiler.set_stance("force_eager"), autocast(config):  # other sizes would be compiled anew
        for start in range(RANK * EVAL_BATCH, len(indices), WORLD_SIZE * EVAL_BATCH):
            batch = dataset.__getitems__(indices[start : start + EVAL_BATCH])
            log.skip(batch["skipped"])
            if count := len(batch["images"]):
                torch.manual_seed(start)
                losses = model(*to_device(batch, config.device))
                found += [{name: loss.item() for name, loss in losses.items()}] * count
        batch = dataset.__getitems__(indices[: config.eval_pictures] if RANK == 0 else [])
        if len(batch["images"]):
            images, captions = torch.from_numpy(batch["images"]), [""] * len(batch["images"])
            if model.caption_head:
                both = zip(model.caption([*images]), batch["captions"])
                captions = [f"{caption}  (true: {true})" for caption, true in both]
            sheet = panel([*zip(images, model.reconstruct([*images]))], captions)
            sheet.save(log.run_dir / f"step-{step:06d}.png")
    model.train()
    means = mean_losses(found)
    log.add(step, **{f"val_{name}": value for name, value in means.items()})
    print_once(f"step {step:,}: validation " + ", ".join(f"{name} {means[name]:.5f}" for name in means))


def mean_losses(found: list[dict]) -> dict[str, float]:
    """{"loss": the sum, and each loss by its name}, the mean of what all processes have found."""
    found = sum(all_gather(found), [])
    means = {name: sum(losses[name] for losses in found) / len(found) for name in found[0]} if found else {}
    return {"loss": sum(means.values()) if means else math.nan} | means


# --- checkpoints ------------------------------------------------------------------------------------------


def save_checkpoint(run_dir: Path, model: VLV, optimizer, trainer: dict, best: int | None) -> None:
    """Writes step-STEP, by all processes: the first writes the model, each its share of AdamW's state.
    trainer: what trainer.json says. best: the step whose checkpoint stays, beside the last two."""
    folder, share = run_dir / "saving", f"optimizer-{RANK + 1:05d}-of-{WORLD_SIZE:05d}.safetensors"
    folder.mkdir(exist_ok=True)
    names = {p: name for name, p in model.named_parameters()}
    state = getattr(optimizer, "optim", optimizer).state  # of ZeroRedundancyOptimizer the share here
    state = {f"{names[p]}.{kind}": value for p, values in state.items() for kind, value in values.items()}
    write_weights(folder / share, state, {})
    sync(folder / share)
    if RANK == 0:
        model.save_pretrained(folder)
        write_json(folder / "trainer.json", trainer)
    all_gather(None)  # waits until every process has written its share
    if RANK == 0:
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        os.rename(folder, run_dir / f"step-{trainer['step']:06d}")
        sync(run_dir)
        for number, old in [*checkpoints(run_dir).items()][:-2]:
            if number != best:
                os.rename(old, folder)  # no half of it counts as a checkpoint
                shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk, if the file system can say so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def load_optimizer(checkpoint: Path, model: VLV, optimizer) -> None:
    """Reads this process's share of AdamW's state, whoever wrote it. Raises ValueError if some is missing."""
    saved, names = read_weights(checkpoint, "optimizer")[0], {p: name for name, p in model.named_parameters()}
    optimizer = getattr(optimizer, "optim", optimizer)
    if not saved:  # no step was finite yet
        return
    for p in [p for group in optimizer.param_groups for p in group["params"]]:
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            if f"{names[p]}.{kind}" not in saved:
                raise ValueError(f"{checkpoint} has no optimizer state of {names[p]}, which was not trained:"
                                 f" start from it with --init_from, in another --out_dir")
            optimizer.state[p][kind] = saved[f"{names[p]}.{kind}"][...].to(p.device)


def find_start(run_dir: Path, config: TrainConfig, stage: int) -> tuple[Path | None, dict]:
    """(the checkpoint to start from, None: only pretrained models; the trainer.json of one to resume, or {}).
    Raises ValueError or OSError if that is unclear."""
    own = [*checkpoints(run_dir).values()]
    if own and not config.resume:
        raise ValueError(f"{run_dir} already holds a run: add --resume to go on, or choose another --out_dir")
    if own:
        trainer = read_json(own[-1] / "trainer.json")
        if "settings" not in trainer:
            raise ValueError(f"{own[-1]} is of an older version, which cannot be resumed: choose another"
                             f" --out_dir, and start from it with --init_from {own[-1]}")
        return own[-1], trainer
    if stage == 1 or config.init_from:
        return find_checkpoint(config.init_from) if config.init_from else None, {}
    checkpoint = find_checkpoint(config.out_dir / "stage1")
    trainer = read_json(checkpoint / "trainer.json")
    step, max_steps = trainer["step"], trainer["max_steps"]
    if step < max_steps:
        raise ValueError(f"stage 1 is not finished: {checkpoint} is step {step:,} of {max_steps:,}: finish"
                         f" it, or start from it as it is with --init_from {checkpoint}")
    return checkpoint, {}


def lock(folder: Path):
    """Makes this process the one writer of a folder, until the file that this returns is closed, and clears
    what a killed one was saving there. Raises ValueError if another writer is alive."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder} belongs to a run that is alive: wait, or choose another") from None
    except OSError as error:  # a file system without locks
        tqdm.write(f"{folder} cannot be locked ({error}): take care that no second run writes into it")
    shutil.rmtree(folder / "saving", ignore_errors=True)  # of a process that was killed
    return file


# --- a run ------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    # --- settings: what is wrong with them ends the run before anything is loaded
    config, of_model, given = read_config(argv)
    stage, run_dir = given["stage"], config.out_dir / f"stage{given['stage']}"
    device = select_device(config.device)
    init_process_group(device)  # first of all: when a process dies, the others notice by its connections
    dtype = select_dtype(config.precision, device)
    config.device, config.precision = device.type, "bf16" if dtype == torch.bfloat16 else "fp32"

    # --- where it starts
    locked = lock(run_dir) if RANK == 0 else None  # an open file: closing it would end the lock
    checkpoint, resumed = from_first("start", lambda: find_start(run_dir, config, stage))
    step = resumed.get("step", 0)
    if stage == 2 and not resumed:
        of_model.setdefault("caption_end", "token")  # which is learned from now on
    saved = load_config(checkpoint) if checkpoint else VLVConfig()
    model_config = dataclasses.replace(saved, **of_model)  # as from_pretrained does: the data depend on it
    if saved.stage > stage:
        print_once(f"note: stage 1 has no caption head, so that of {checkpoint} is left out")

    # --- data
    opened = open_data(config, model_config) if RANK == 0 else None  # which writes the index, if there is none
    from_first("index", lambda: None)
    dataset, val_dataset = opened or open_data(config, model_config)
    if resumed and resumed["data"] != dataset.fingerprint:
        raise ValueError(f"{run_dir} was trained on other data than {config.data}: choose another --out_dir,"
                         f" and start from it with --init_from {checkpoint}")
    settings = json.loads(json.dumps(given, default=str))  # as trainer.json has them: lists, not tuples
    before = resumed.get("settings", settings)
    for name in sorted(settings.keys() | before.keys()):
        if before.get(name) != settings.get(name):
            print_once(f"note: --{name} was {before.get(name)!r}, and is now {settings.get(name)!r}")
    trainer = {"max_steps": config.max_steps, "data": dataset.fingerprint, "settings": settings}
    log = Log(run_dir, step)
    for problem in dataset.problems + (val_dataset.problems if val_dataset else []):
        print_once(problem)
    indices = micro_batches(len(dataset), config.batch_size, config.micro_batch_size, config.seed,
                            range(step, config.max_steps), RANK, WORLD_SIZE)
    batches = read_batches(start_workers(dataset, indices, config.num_workers), log)

    # --- model and optimizer
    torch.manual_seed(config.seed)  # the same new weights on every process
    with_unet = model_config.denoises or bool(val_dataset and config.eval_pictures)
    model = VLV.from_pretrained(checkpoint, dtype=dtype, device=device, with_unet=with_unet,
                                for_training=True, **of_model).train()
    checkpoint_activations(model, config)
    if config.compile and device.type == "cuda":
        compile_parts(model)
    optimizer, ddp = make_optimizer(model, config)
    if resumed:
        load_optimizer(checkpoint, model, optimizer)
    if RANK == 0:
        write_json(run_dir / "settings.json", settings)
    print_once(f"starting from {checkpoint or 'the pretrained models'}, with {dataset.summary}\n"
               f"stage {stage}, steps {step:,} to {config.max_steps:,} of {config.batch_size} images on"
               f" {WORLD_SIZE} x {device.type} in {config.precision}, {config.micro_batch_size} at once\n"
               f"{describe(model)}")

    # --- the loop
    start_running()
    bar = tqdm(total=config.max_steps * config.batch_size, initial=step * config.batch_size, unit="img",
               desc=f"stage {stage}", disable=RANK > 0, unit_scale=True, mininterval=0.5)
    run_began, stop = time.perf_counter(), False
    durations, losses = [], []  # since the last line of the log
    bad_steps = bad_in_a_row = 0
    if val_dataset and step == 0:
        evaluate(model, val_dataset, config, log, step)
    while step < config.max_steps and not stop:
        step_began = time.perf_counter()
        step_losses, norm = train_step(ddp, optimizer, batches, step, config)
        if norm.isfinite():
            losses.append({name: loss.item() for name, loss in step_losses.items()})
            bad_in_a_row = 0
        else:
            bad_steps, bad_in_a_row = bad_steps + 1, bad_in_a_row + 1
        durations.append(time.perf_counter() - step_began)
        step += 1
        is_last, stop = (step == config.max_steps), any(all_gather(bool(stop_signals)))
        bar.update(config.batch_size)
        if bad_in_a_row == BAD_STEPS:
            sys.exit(f"error: the gradient was not finite {BAD_STEPS} steps in a row, up to step {step:,};"
                     f" the checkpoints in {run_dir} are good: look at data and learning rate")
        if step % config.log_interval == 0 or is_last:
            means, seconds = mean_losses(losses), sum(durations)
            hours = (time.perf_counter() - run_began) / 3600
            speed = {"images_per_second": len(durations) * config.batch_size / seconds,
                     "waiting_for_data": log.waited / seconds}
            if device.type == "cuda":
                speed["dollars"] = hours * WORLD_SIZE * config.usd_per_gpu_hour
            log.add(step, **means, lr=learning_rate(step - 1, config), grad_norm=norm.item(), **speed,
                    skipped=sum(all_gather(len(log.skipped))), non_finite_steps=bad_steps)
            bar.set_postfix(loss=f"{means['loss']:.4f}", data=f"{speed['waiting_for_data']:.0%}")
            durations, losses, log.waited = [], [], 0.0
        if step % config.save_interval == 0 or is_last or stop:  # first: a signal does not wait for pictures
            save_checkpoint(run_dir, model, optimizer, trainer | {"step": step}, log.best())
        if (step % config.eval_interval == 0 or is_last) and not stop:
            if val_dataset:
                evaluate(model, val_dataset, config, log, step)
            if RANK == 0:
                draw_curves(run_dir / "curves.png", log.records)
    bar.close()
    if step < config.max_steps:
        sys.exit(f"stopped after step {step:,}, which is saved; go on with --resume" if RANK == 0 else 1)
    print_once(f"done: {run_dir / f'step-{step:06d}'}; the best that is saved: {log.best() or step}")


if __name__ == "__main__":
    run_and_exit(main)
