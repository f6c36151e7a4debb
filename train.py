"""
Trains VLV. One loop, both stages: stage 1 learns to redraw images (images only), stage 2 to read the embedding aloud.

    python train.py --stage 1 --config data/shapes/config.json         # the toy world, on a laptop
    torchrun --nproc_per_node=8 train.py --stage 1                     # the paper's run, one node
    torchrun --nproc_per_node=8 train.py --stage 2 --resume            # go on where a killed run was

Flags override the JSON file of --config, the file overrides the defaults, and the defaults are the paper's recipe.
A run writes into OUT_DIR/stage1 (or stage2): step-000100/ (checkpoints, the last two), log.jsonl, curves.png,
step-000100.png.
"""

import dataclasses
import importlib.util
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.quiet import quiet  # before what imports transformers
from data.checkpoint import Journal, Saver, find_checkpoint, open_run
from data.loader import ImageTextDataset, SyntheticDataset, WithNoise, collate, micro_batches, seeds_of
from data.meter import FlopCounter, Meter
from data.plot import draw_curves
from data.processes import Watch, join_processes, leave, listen_to_signals, one_first, over_processes, prepare_device
from data.processes import rank_and_world_size, run, say, start_workers, to_device, together
from data.results import panel
from data.settings import Count, Seed, Text, Whole, read_flags_and_file
from vlv import VLV, VLVConfig, load_config

Share = Annotated[float, ">= 0", "<= 1"]


@dataclass
class TrainConfig(VLVConfig):
    """Every setting of a run, next to those of the model. None: the stage's value in RECIPE."""

    data: Text = "data/laion"  # tar shards of KEY.jpg + KEY.txt, or a folder of images; stage 1 needs no captions
    captions: str = ""  # a folder of JSON lines by `sample.py --captions_only DATA --out CAPTIONS`, instead of KEY.txt
    val_data: str = ""  # the same for validation; empty: no validation
    val_captions: str = ""
    out_dir: Text = "out"  # with several machines: on storage that all of them see
    init_from: str = ""  # the checkpoint to start from, of either stage; empty, in stage 2: the newest in OUT_DIR/stage1
    resume: bool = False  # continue the newest checkpoint of this run, or start if there is none yet
    accept_changes: bool = False  # resume with other data, batch size or seed than the run was started with
    device: Literal["cuda", "cpu", "auto"] = "cuda"  # auto: cuda where there is a GPU for each process, else cpu
    seed: Seed = 0  # decides the order of the data, every noise and every dropout
    batch_size: Count | None = None  # images a step, over all processes
    # images a forward pass; None: a process's share of batch_size, as far as 80 GB hold it at the paper's size
    micro_batch_size: Count | None = None
    max_steps: Count | None = None
    learning_rate: Share | None = None
    lr_schedule: Literal["cosine", "linear"] | None = None  # to zero at max_steps
    warmup_steps: Whole = 0  # the paper has none
    beta1: Annotated[float, ">= 0", "< 1"] = 0.9
    beta2: Annotated[float, ">= 0", "< 1"] = 0.99
    weight_decay: Share = 0.01
    grad_clip: Annotated[float, "> 0"] = 1.0  # of the gradient's norm
    # fp32; bf16: autocast over fp32 weights, and what is never learned is stored in bf16; auto: bf16 where the GPU has it
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = True  # the layout in which convolutions are faster
    compile: bool = False  # torch.compile of the frozen nets: minutes at the start
    gradient_checkpointing: tuple[Literal["unet", "bart", "llm"], ...] = ()  # less memory, their forward pass twice
    latents: bool = False  # read the VAE's moments, computed ahead by data/latents.py
    num_workers: Annotated[int, ">= 0", "<= 256"] = 4  # processes a rank that decode images; 0: none, good for tiny images
    log_interval: Count = 10  # steps
    eval_interval: Count = 1000  # steps
    save_interval: Count = 1000  # steps
    eval_images: Count = 512  # how many validation images the loss is measured on
    eval_pictures: Whole = 8  # how many of them are drawn; 0: none
    benchmark: Whole = 0  # measure so many steps on synthetic images, and save nothing
    tensorboard: bool = False  # write log, pictures and captions for TensorBoard, too
    usd_per_gpu_hour: Annotated[float, ">= 0"] = 2.5  # only for what the run says about its cost

    @property
    def reads_moments(self) -> bool:
        """Whether the latents' moments come with the images; a stage that does not denoise needs none."""
        return self.latents and self.denoises


RECIPE = {  # the paper's
    1: dict(batch_size=512, max_steps=200_000, learning_rate=5e-5, lr_schedule="cosine", data="data/laion"),
    2: dict(batch_size=64, max_steps=100_000, learning_rate=1e-5, lr_schedule="linear", data="data/captions6m"),
}


def resolve(settings: dict, world_size: int) -> TrainConfig:
    """The run's settings, checked: those that are given, else the stage's recipe, else the defaults. Raises ValueError."""
    given = {name: value for name, value in settings.items() if value is not None}
    config = TrainConfig(**(RECIPE.get(settings.get("stage", 1), {}) | given))
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("TensorBoard is missing: install it with pip install tensorboard, or leave --tensorboard out")
    share, rest = divmod(config.batch_size, world_size)
    config.micro_batch_size = config.micro_batch_size or math.gcd(share, 64 if config.stage == 1 else 8)
    if rest or not share or share % config.micro_batch_size:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide into {world_size} processes and micro-batches of"
            f" {config.micro_batch_size}: choose a multiple of their product"
        )
    return config


def learning_rate(step: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def open_data(config: TrainConfig) -> tuple[ImageTextDataset, ImageTextDataset | None]:
    """For training, and for validation. Raises ValueError when there is nothing to read."""
    latents_of = config.diffusion_model if config.reads_moments else None
    kwargs = dict(size=config.image_size, with_captions=config.stage == 2, latents_of=latents_of)
    val_dataset = None
    if config.val_data:
        val_dataset = ImageTextDataset(config.val_data, captions=config.val_captions, **kwargs)
    return ImageTextDataset(config.data, captions=config.captions, **kwargs), val_dataset


def speed_up(model: VLV, config: TrainConfig) -> None:
    """What makes the model's parts faster or smaller, and changes what they compute by rounding at most."""
    parts = model.parts()
    if config.channels_last and "unet" in parts:
        parts["vae"].to(memory_format=torch.channels_last)
        parts["unet"].to(memory_format=torch.channels_last)
    if config.compile:
        parts["davit"]["tower"].compile()
        parts["davit"]["projector"].compile()
        if "unet" in parts:
            parts["vae"].encoder.compile()
            parts["unet"].compile()
    if "unet" in config.gradient_checkpointing and "unet" in parts:
        parts["unet"].enable_gradient_checkpointing()
    if "bart" in config.gradient_checkpointing:
        parts["bart"]["encoder"].activation_checkpointing_enable()
        parts["bart"]["decoder"].activation_checkpointing_enable()
    if "llm" in config.gradient_checkpointing and "llm" in parts:
        parts["llm"].activation_checkpointing_enable()


def loss_of(model, batch: dict, device: torch.device) -> torch.Tensor:
    """The model's loss, a scalar, of a batch as collate makes it."""
    images, moments = to_device(batch["image"], device), to_device(batch["moments"], device)
    return model(images, batch["caption"], batch["noise"], moments)


def count_flops(model: VLV, sample: dict, device: torch.device) -> int:
    """FLOPs that one sample needs, forward and backward, without what checkpointing computes twice."""
    model.eval()
    with FlopCounter() as counter:
        loss_of(model, collate([sample]), device).backward()
    model.zero_grad(set_to_none=True)
    return counter.flops


@torch.no_grad()
def evaluate(model: VLV, val_dataset, config: TrainConfig, device: torch.device) -> float | None:
    """The loss on the first validation images, with noise and timesteps that depend on the image alone; None where none can be
    read. The processes share the images."""
    rank, world_size = rank_and_world_size()
    mine = list(range(min(config.eval_images, len(val_dataset))))[rank::world_size]
    noisy = WithNoise(val_dataset, model.decoder.draw_noise)
    total, count = 0.0, 0
    for at in range(0, len(mine), config.micro_batch_size):
        indices = mine[at : at + config.micro_batch_size]
        batch = collate([noisy[place] for place in zip(indices, seeds_of(0, 0, indices))])
        if not batch["unreadable"]:
            total += loss_of(model, batch, device).item() * len(indices)
            count += len(indices)
    total, count = over_processes([total, count], device)
    return total / count if count else None


@torch.no_grad()
def show(model: VLV, val_dataset, config: TrainConfig, device: torch.device):
    """The first validation images, redrawn and in stage 2 captioned: (a PIL image, captions)."""
    images = torch.stack([val_dataset[i]["image"] for i in range(min(config.eval_pictures, len(val_dataset)))])
    prompt_embeds = model.embed(images.to(device))
    redrawn = model.decoder.reconstruct(prompt_embeds)
    captions = [""] * len(images)
    if config.stage == 2:
        captions = model.caption_head.generate(prompt_embeds, max_new_tokens=config.max_caption_tokens)
    return panel(list(zip(images, redrawn)), captions), captions


def describe_run(model: VLV, config: TrainConfig, source, dataset, start: int, grad_accum_steps: int, bf16: bool,
                 device: torch.device) -> str:  # fmt: skip
    """What the run is, on a few lines; one for each part of the model: trained or frozen, and how many parameters."""
    world_size = rank_and_world_size()[1]
    beginning = source or ("random weights" if config.random_init else "the pretrained models")
    lines = [
        f"starting from {beginning}, with {dataset}",
        f"stage {config.stage}, steps {start:,} to {config.max_steps:,}: {config.batch_size} images = {world_size} processes x"
        f" {grad_accum_steps} x {config.micro_batch_size}, {'bf16' if bf16 else 'fp32'} on {device.type}, learning rate"
        f" {config.learning_rate:g} ({config.lr_schedule})",
    ]
    for name, part in model.parts().items():
        is_trained = any(p.requires_grad for p in part.parameters())
        count = sum(p.numel() for p in part.parameters())
        lines.append(f"  {name:12} {'trained' if is_trained else 'frozen '} {count:>13,} parameters")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    lines += [
        f"  {'total':12} {trained:,} of {total:,} parameters are trained",
        f"  memory a process: {weights:.2f} GB of weights, {4 * trained / 1e9:.2f} GB of gradients,"
        f" {8 * trained / 1e9 / world_size:.2f} GB of optimizer state, and the activations",
    ]
    return "\n".join(lines)


def main(argv=None):
    # --- settings, the run's folder, data: what is wrong with them ends the run before anything is loaded ------------------
    quiet()
    rank, world_size = rank_and_world_size()
    try:
        settings = read_flags_and_file(TrainConfig, argv, __doc__)
        config = resolve(settings, world_size)
        device = prepare_device(config.device)
    except ValueError as error:
        leave(f"error: {error}")
    if world_size > 1:
        join_processes("nccl" if device.type == "cuda" else "gloo")
    out_dir = Path(config.out_dir)
    run_dir = None if config.benchmark else out_dir / f"stage{config.stage}"  # None: nothing is written
    stage1 = out_dir / "stage1" if config.stage == 2 and not config.random_init else None
    lock, source, resumes = open_run(run_dir, config.init_from, config.resume, stage1)

    # what no flag says, the checkpoint does
    model_settings = {name: value for name, value in settings.items() if name in VLVConfig.__dataclass_fields__}
    model_settings["stage"] = config.stage
    if config.stage == 2 and not resumes:
        model_settings.setdefault("caption_end", "token")  # which is learned from now on, whatever the captions ended with
    if source:
        saved = together(lambda: load_config(source))
        config = dataclasses.replace(config, **dataclasses.asdict(saved) | model_settings)
    dataset = val_dataset = None
    if not config.benchmark:
        dataset, val_dataset = one_first(lambda: open_data(config))  # who comes first on a machine builds the index

    # --- model, optimizer, and the state of a run that goes on ---------------------------------------------------------------
    torch.manual_seed(config.seed)  # the same new weights on every process
    bf16 = config.precision == "bf16"
    if config.precision == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported()
    # no cache: a step uses each weight once, and what is cached gradient checkpointing could not free
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    where = dict(for_training=True, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    if source:
        model = together(lambda: VLV.from_pretrained(source, **where, **model_settings))
    else:
        model = together(lambda: VLV(VLVConfig(**model_settings), **where))
    images = config.max_steps * config.batch_size
    if config.benchmark:
        images = RECIPE[config.stage]["max_steps"] * RECIPE[config.stage]["batch_size"]
        moments = model.decoder.draw_noise([0])[0][0].flatten(0, 1) if config.reads_moments else None  # as large as noise for two
        dataset = SyntheticDataset(config.image_size, config.max_caption_tokens, moments)
    with autocast():  # before checkpointing, which computes more than is needed
        flops = count_flops(model, dataset[0], device)
    meter = Meter(flops, config.batch_size, images, world_size, device, config.usd_per_gpu_hour)
    if config.benchmark:
        config.max_steps = meter.warm_up + config.benchmark
    speed_up(model, config)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    adamw = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8,
                 weight_decay=config.weight_decay, fused=True)  # fmt: skip
    # The weights that learn stay in float32: at a learning rate of 1e-5 bfloat16 would round most updates away. What
    # that costs in memory, AdamW's two moments, is shared out among the processes (ZeRO's first stage).
    if world_size > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # takes nearly as long to import as torch

        optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, **adamw)
        for p in params:  # gradients live in DDP's buckets from the start: none is ever there twice
            p.grad = torch.zeros((), device=device).expand_as(p)
        ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    else:
        optimizer, ddp = torch.optim.AdamW(params, **adamw), model
    about = dict(max_steps=config.max_steps, batch_size=config.batch_size, seed=config.seed, samples=len(dataset),
                 fingerprint_of_data=dataset.fingerprint)  # fmt: skip
    saver, start = Saver(run_dir, model, optimizer, about), 0
    if resumes:
        start = together(lambda: saver.restore(source, config.accept_changes))

    # --- what the run says and writes, and the loader ------------------------------------------------------------------------
    grad_accum_steps = config.batch_size // (world_size * config.micro_batch_size)
    say(describe_run(model, config, source, dataset, start, grad_accum_steps, bf16, device))
    journal = Journal(run_dir, start, config.tensorboard)
    journal.write(Path.write_text, "settings.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    if rank == 0:
        journal.skip(dataset.broken_shards)
    if __name__ == "__main__" and run_dir:  # from here on there is something to save
        listen_to_signals()
    places = micro_batches(len(dataset), config.batch_size, config.micro_batch_size, config.seed, range(start, config.max_steps),
                           rank, world_size)  # fmt: skip
    loader = start_workers(torch.utils.data.DataLoader(
        WithNoise(dataset, model.decoder.draw_noise), batch_sampler=places, collate_fn=collate,
        num_workers=config.num_workers, pin_memory=device.type == "cuda"))  # fmt: skip
    watch, logged = Watch(run_dir, config.max_steps, device), []
    bar = tqdm(total=config.max_steps * config.batch_size, initial=start * config.batch_size, unit="img",
               desc=f"stage {config.stage}", disable=rank > 0, unit_scale=True, mininterval=0.5)  # fmt: skip

    # --- the loop ------------------------------------------------------------------------------------------------------------
    for step in range(start + 1, config.max_steps + 1):
        meter.start_step()
        lr = learning_rate(step - 1, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for micro_step in range(grad_accum_steps):
            batch = meter.wait(loader)
            journal.skip(batch["skipped"])
            watch.see(batch)
            if world_size > 1:  # gradients are exchanged once a step; DDP asks in the forward pass, too
                ddp.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            torch.manual_seed(batch["seed"][0])  # dropout
            with autocast():
                loss = loss_of(ddp, batch, device) / grad_accum_steps
            loss.backward()
            losses.append(loss.detach() * grad_accum_steps)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip)
        watch.agree(step, torch.stack([grad_norm, *losses]), saver.is_writing)
        if watch.counts:
            optimizer.step()
            logged += losses
        optimizer.zero_grad(set_to_none=world_size == 1)  # with several processes gradients stay where they are, in DDP's buckets
        meter.end_step()
        bar.update(config.batch_size)

        finished = step == config.max_steps
        if step % config.log_interval == 0 or finished:
            total, count = over_processes([sum(logged), len(logged)], device)
            loss = total / count if count else None
            speed, logged = meter.end_lap(), []
            skipped = watch.count_skipped(step, (step - start) * config.batch_size)
            bar.set_postfix(loss=f"{loss or math.nan:.4f}", data=f"{speed['waiting_for_data']:.0%}")
            journal.log(step=step, loss=loss, lr=lr, grad_norm=grad_norm.item(), **speed, skipped=skipped,
                        non_finite_steps=watch.not_finite)  # fmt: skip
        if step - start == 2 * config.log_interval or finished:
            say(meter.sentence())
        if watch.error:
            break
        if step % config.eval_interval == 0 or finished:
            if val_dataset is not None:
                model.eval()
                with autocast():
                    val_loss = evaluate(model, val_dataset, config, device)
                    if rank == 0 and config.eval_pictures:
                        journal.show(step, *show(model, val_dataset, config, device))
                model.train()
                journal.log(step=step, val_loss=val_loss)
                say(f"step {step:,}: validation loss {val_loss or math.nan:.5f}")
            journal.write(draw_curves, "curves.png")
        if not watch.is_saving:
            saver.end()
        if step % config.save_interval == 0 or finished or watch.reason:
            saver.begin(step)
        if watch.reason:
            break

    # --- the end -------------------------------------------------------------------------------------------------------------
    bar.close()
    saver.close()
    if watch.error:
        leave(watch.error)
    if watch.reason:
        leave(f"{watch.reason}, which is {'saved' if saver.saved else 'not saved'}; go on with --resume")
    if not saver.saved:
        leave("error: the run is done, but its weights could not be saved; mend that and add --resume")
    if run_dir:
        say(f"done: {find_checkpoint(run_dir)}")
    if world_size > 1:
        dist.barrier()
    if lock:
        lock.close()


if __name__ == "__main__":
    run(main)
