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
import os
import resource
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data.quiet import quiet  # before what imports transformers
from data.checkpoint import Journal, Saver, checkpoints, find_checkpoint, own
from data.loader import ImageTextDataset, SyntheticDataset, WithNoise, batch_indices, collate, seeds_of
from data.plot import draw_curves
from data.processes import SIGNALS, gather, join_processes, leave, listen_to_signals, one_first, prepare_device, run
from data.processes import start_workers, together
from data.results import panel
from data.settings import Count, Seed, Text, Whole, check_names, read_flags, read_json
from vlv import VLV, VLVConfig, load_config, to_device

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


BAD_STEPS = 10  # so many non-finite steps in a row end the run


RECIPE = {  # the paper's
    1: dict(batch_size=512, max_steps=200_000, learning_rate=5e-5, lr_schedule="cosine", data="data/laion"),
    2: dict(batch_size=64, max_steps=100_000, learning_rate=1e-5, lr_schedule="linear", data="data/captions6m"),
}


def read_settings(argv) -> dict:
    """The settings that the JSON file and the flags give. Raises ValueError with the nearest name for unknown ones."""
    flags = read_flags(TrainConfig, argv, __doc__,
                       config="JSON file with settings, and with those of one stage under stage1 or stage2")  # fmt: skip
    settings = {}
    if "config" in flags:
        path = flags.pop("config")
        settings = read_json(path)
        names = [f.name for f in dataclasses.fields(TrainConfig)]
        stages = {key: settings.pop(key, {}) for key in ("stage1", "stage2")}
        check_names(settings, names, path)
        for key, values in stages.items():
            if not isinstance(values, dict):
                raise ValueError(f"{path}: {key} is {values!r}, but must be an object: {{...}}")
            check_names(values, [name for name in names if name != "stage"], f"{path}, {key}")
        settings |= stages.get(f"stage{flags.get('stage', settings.get('stage', 1))}", {})
    return settings | flags


def resolve(settings: dict, world_size: int) -> TrainConfig:
    """The run's settings, checked."""
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
    shape = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * shape


def speed_up(model: VLV, config: TrainConfig) -> None:
    """What makes the model's parts faster or smaller, and changes what they compute by rounding at most."""
    for name, part in model.parts().items():
        if config.channels_last and name in ("vae", "unet"):
            part.to(memory_format=torch.channels_last)
        for module in part.values() if isinstance(part, torch.nn.ModuleDict) else [part]:
            if name in config.gradient_checkpointing:
                (module.enable_gradient_checkpointing if name == "unet" else module.gradient_checkpointing_enable)()
            if config.compile and name in ("davit", "vae", "unet"):
                (module.encoder if name == "vae" else module).compile()


def loss_of(model, batch: dict, device: torch.device) -> torch.Tensor:
    """The model's loss, a scalar, of a batch as collate makes it."""
    images, moments = (to_device(batch[name], device) for name in ("image", "moments"))
    return model(images, batch["caption"], batch["noise"], moments)


def count_flops(model: VLV, sample: dict, device: torch.device) -> int:
    """FLOPs that one sample needs, forward and backward, without what checkpointing computes twice."""
    with FlopCounterMode(display=False) as counter:
        loss_of(model, collate([sample]), device).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured: what a perfect program could reach here."""
    n, repeats = (8192, 30) if device.type == "cuda" else (2048, 4)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2 * n**3 / best


def peak_memory(device: torch.device) -> float:
    """GB: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def cost(images: float, rate: float, processes: int, config: TrainConfig) -> str:
    hours = images / rate / 3600
    return f"{hours:,.1f} h, ${hours * processes * config.usd_per_gpu_hour:,.0f} at ${config.usd_per_gpu_hour:.2f} a GPU-hour"


def main(argv=None):
    # --- settings and device: each process finds out by itself whether they are right ----------------------------------
    quiet()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    is_main = rank == 0
    say = tqdm.write if is_main else lambda *args, **kwargs: None
    try:
        settings = read_settings(argv)
        config = resolve(settings, world_size)
        device = prepare_device(config.device)
    except ValueError as error:
        leave(f"error: {error}")
    if world_size > 1:
        join_processes("nccl" if device.type == "cuda" else "gloo")

    # --- the run's folder, data and model: what is wrong with them on one process ends all -----------------------------
    run_dir = Path(config.out_dir) / f"stage{config.stage}"

    def find_source():
        """Where the run starts from: (checkpoint or None for the pretrained models, whether this run wrote it)."""
        steps = [] if config.benchmark else checkpoints(run_dir)
        if steps and not config.resume:
            raise ValueError(f"{run_dir} already holds a run: add --resume to continue it, or choose another --out_dir")
        if steps:
            return steps[-1], True
        if config.init_from:
            source = find_checkpoint(config.init_from)
        elif config.stage == 2 and not config.random_init:
            source = find_checkpoint(Path(config.out_dir) / "stage1")
            trainer = read_json(source / "trainer.json") if (source / "trainer.json").exists() else {}
            if trainer.get("step", 0) < trainer.get("max_steps", 0):
                raise ValueError(
                    f"stage 1 is not finished: {source} is step {trainer['step']:,} of {trainer['max_steps']:,}; finish it with"
                    f" --stage 1 --resume, or start from it as it is with --init_from {source}"
                )
        else:
            return None, False
        return source, False

    def open_data():
        """The data sets for training and, or None, for validation."""
        if config.benchmark:
            return SyntheticDataset(config.image_size, config.max_caption_tokens, config.reads_moments), None
        kwargs = dict(size=config.image_size, with_captions=config.stage == 2,
                      latents_of=config.diffusion_model if config.reads_moments else None)  # fmt: skip
        validation = ImageTextDataset(config.val_data, captions=config.val_captions, **kwargs) if config.val_data else None
        return ImageTextDataset(config.data, captions=config.captions, **kwargs), validation

    lock, owner = together(lambda: own(run_dir) if is_main and not config.benchmark else (None, None))
    source, resumes = together(find_source)
    owner = together(lambda: owner or config.benchmark or (run_dir / ".lock").read_text())
    if len(seen := set(gather((str(source), owner)))) > 1:
        leave(f"error: {run_dir} must be on storage that all machines see, but the processes find different things there: {seen}")

    # what no flag says, the checkpoint does
    model_settings = {name: value for name, value in settings.items() if name in VLVConfig.__dataclass_fields__}
    model_settings["stage"] = config.stage
    if config.stage == 2 and not resumes:
        model_settings.setdefault("caption_end", "token")  # which is learned from now on, whatever the captions ended with
    if source:
        saved = together(lambda: load_config(source))
        config = dataclasses.replace(config, **dataclasses.asdict(saved) | model_settings)
    dataset, val_dataset = one_first(open_data)  # who comes first on a machine builds the index

    torch.manual_seed(config.seed)  # the same new weights on every process
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    where = dict(for_training=True, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    if source:
        model = together(lambda: VLV.from_pretrained(source, **where, **model_settings))
    else:
        model = together(lambda: VLV(VLVConfig(**model_settings), **where))

    # --- precision, optimizer, and the state of a run that goes on -------------------------------------------------------
    # no cache: a step uses each weight once, and what is cached gradient checkpointing could not free
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    if config.benchmark:  # before checkpointing, which computes more than is needed
        with autocast():
            flops = count_flops(model, dataset[0], device)
    speed_up(model, config)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    adamw = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8,
                 weight_decay=config.weight_decay, fused=True)  # fmt: skip
    # The weights that learn stay in float32: at a learning rate of 1e-5 bfloat16 would round most updates away. What
    # that costs in memory, AdamW's two moments, is shared out among the processes (ZeRO's first stage).
    if world_size > 1:
        optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, **adamw)
        for p in params:  # gradients live in DDP's buckets from the start: none is ever there twice
            p.grad = torch.zeros((), device=device).expand_as(p)
        ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    else:
        optimizer, ddp = torch.optim.AdamW(params, **adamw), model
    about = dict(max_steps=config.max_steps, batch_size=config.batch_size, seed=config.seed, samples=len(dataset),
                 fingerprint_of_data=dataset.fingerprint)  # fmt: skip
    saver, start = Saver(run_dir, model, optimizer, about), 0

    def restore():
        """Brings the optimizer back; returns the step. Raises ValueError when this is not the run that was saved."""
        if not (source / "trainer.json").exists():
            raise ValueError(f"{source} has no trainer.json, so it cannot be continued: choose another --out_dir, and start"
                             f" from it with --init_from {source}")  # fmt: skip
        trainer = read_json(source / "trainer.json")
        for name in ("batch_size", "seed", "samples", "fingerprint_of_data"):
            if trainer.get(name) != about[name] and not config.accept_changes:
                raise ValueError(
                    f"{run_dir} was started with {name} {trainer.get(name)}, and now it is {about[name]}: give it as it was, or"
                    " add --accept_changes to go on with what is new"
                )
        saver.restore(source)
        return trainer["step"]

    if resumes:
        start = together(restore)
    grad_accum_steps = config.batch_size // (world_size * config.micro_batch_size)
    warm_up = 2 if device.type == "cuda" else 1  # steps of a benchmark that are not measured
    if config.benchmark:
        config.max_steps = warm_up + config.benchmark

    # --- what this run is, and what it writes ----------------------------------------------------------------------------
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    gradients = sum(p.numel() for p in params) * 4 / 1e9
    data = "synthetic images" if config.benchmark else f"{len(dataset):,} samples from {config.data}"
    say(f"starting from {source or ('random weights' if config.random_init else 'the pretrained models')}, with {data}")
    say(f"stage {config.stage}, steps {start:,} to {config.max_steps:,}: {config.batch_size} images = {world_size} processes x"
        f" {grad_accum_steps} x {config.micro_batch_size}, {'bf16' if bf16 else 'fp32'} on {device.type}, learning rate"
        f" {config.learning_rate:g} ({config.lr_schedule})")  # fmt: skip
    say(model.describe())
    say(f"  memory a process: {weights:.2f} GB of weights, {gradients:.2f} GB of gradients,"
        f" {2 * gradients / world_size:.2f} GB of optimizer state, and the activations")  # fmt: skip
    journal = Journal(run_dir, start, is_main and not config.benchmark, config.tensorboard)
    journal.write(Path.write_text, "settings.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    if is_main:
        journal.skip(dataset.broken_shards)

    def over_ranks(values, op=dist.ReduceOp.SUM) -> list[float]:
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64).to(device) for v in values])
        if world_size > 1:
            dist.all_reduce(values, op)
        return values.tolist()

    @torch.no_grad()
    def evaluate(step):
        """Loss on the first validation images, with noise and timesteps that depend on the image alone; a picture."""
        model.eval()
        total, count = 0.0, 0
        mine = list(range(min(config.eval_images, len(val_dataset))))[rank::world_size]
        noisy = WithNoise(val_dataset, model.decoder.draw_noise)
        for at in range(0, len(mine), config.micro_batch_size):
            indices = mine[at : at + config.micro_batch_size]
            batch = collate([noisy[place] for place in zip(indices, seeds_of(0, 0, indices))])
            if batch["unreadable"]:
                continue
            with autocast():
                loss = loss_of(model, batch, device)
            total, count = total + loss.item() * len(indices), count + len(indices)
        total, count = over_ranks([total, count])
        if is_main and config.eval_pictures:
            images = torch.stack([val_dataset[i]["image"] for i in range(min(config.eval_pictures, len(val_dataset)))])
            with autocast():
                prompt_embeds = model.embed(images.to(device))
                redrawn = model.decoder.reconstruct(prompt_embeds)
                captions = [""] * len(images)
                if config.stage == 2:
                    captions = model.caption_head.generate(prompt_embeds, max_new_tokens=config.max_caption_tokens)
            picture = panel([[image, drawn] for image, drawn in zip(images, redrawn)], captions)
            journal.show(step, picture, captions)
        model.train()
        return total / count if count else None

    def end_save() -> bool:
        """Waits until the checkpoint is whole; returns whether it is."""
        problem = saver.end()
        if problem:
            say(f"error: step {saver.step:,} is not saved: {problem}; the next try is {config.save_interval:,} steps after it")
        return problem is None

    def stop(sentence):
        bar.close()
        if saver.thread is not None:
            end_save()
        saver.close()
        leave(sentence)

    # --- the loop ------------------------------------------------------------------------------------------------------
    def places(micro_step):  # of this process's micro-batch in the step's global batch
        at = (micro_step * world_size + rank) * config.micro_batch_size
        return range(at, at + config.micro_batch_size)

    def micro_batches():
        for step in range(start, config.max_steps):
            indices = batch_indices(len(dataset), config.batch_size, config.seed, step)
            for mine in map(places, range(grad_accum_steps)):
                yield list(zip((indices[p] for p in mine), seeds_of(config.seed, step, mine)))

    if __name__ == "__main__" and not config.benchmark:  # from here on there is something to save
        listen_to_signals()
    loader = start_workers(torch.utils.data.DataLoader(
        WithNoise(dataset, model.decoder.draw_noise), batch_sampler=micro_batches(), collate_fn=collate,
        num_workers=config.num_workers, pin_memory=device.type == "cuda"))  # fmt: skip
    losses, skipped, bad_steps, bad_in_a_row, waited, clock, last = [], 0, 0, 0, 0.0, time.perf_counter(), start
    bar = tqdm(total=config.max_steps * config.batch_size, initial=start * config.batch_size, unit="img",
               desc=f"stage {config.stage}", disable=not is_main, unit_scale=True, mininterval=0.5)  # fmt: skip
    for step in range(start, config.max_steps):
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_losses, unreadable = [], None
        for micro_step in range(grad_accum_steps):
            before = time.perf_counter()
            batch = next(loader)
            waited += time.perf_counter() - before
            skipped += len(batch["skipped"])
            journal.skip(batch["skipped"])
            unreadable = unreadable or batch["unreadable"]
            torch.manual_seed(seeds_of(config.seed, step, places(micro_step)[:1])[0])  # dropout
            # under no_sync both the forward and the backward pass, or DDP would synchronize all the same
            last_micro_step = micro_step == grad_accum_steps - 1
            with nullcontext() if last_micro_step or world_size == 1 else ddp.no_sync():
                with autocast():
                    loss = loss_of(ddp, batch, device) / grad_accum_steps
                loss.backward()
            step_losses.append(loss.detach() * grad_accum_steps)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip)
        # The one look at the device a step: every rank must decide alike.
        finite = torch.isfinite(torch.stack([grad_norm, *step_losses])).all()
        flags = [~finite, bool(SIGNALS), unreadable is not None, saver.is_writing]
        bad, stopping, no_data, writing = over_ranks(flags, dist.ReduceOp.MAX)
        if no_data:
            stop("error: " + "; ".join(sorted({sentence for sentence in gather(unreadable) if sentence})))
        if bad:
            bad_steps, bad_in_a_row = bad_steps + 1, bad_in_a_row + 1
        else:
            optimizer.step()
            losses, bad_in_a_row = losses + step_losses, 0
        # with several processes the gradients stay where they are, in DDP's buckets
        optimizer.zero_grad(set_to_none=world_size == 1)
        bar.update(config.batch_size)

        done, now = step + 1, time.perf_counter()
        finished = done == config.max_steps
        reason = None
        if stopping and not finished:
            causes = sorted({cause for causes in gather(SIGNALS) for cause in causes})
            reason = f"stopped by {' and '.join(causes)} after step {done:,}"
        if config.benchmark:
            if done == warm_up:
                clock, last = now, done
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            continue
        if done % config.log_interval == 0 or finished:
            total, count, all_skipped = over_ranks([sum(losses), len(losses), skipped])
            loss = total / count if count else None
            rate, waiting = (done - last) * config.batch_size / (now - clock), waited / (now - clock)
            bar.set_postfix(loss=f"{loss or math.nan:.4f}", data=f"{waiting:.0%}")
            grad_norm = grad_norm.item() if math.isfinite(grad_norm) else None
            journal.log(step=done, loss=loss, lr=lr, grad_norm=grad_norm, images_per_second=rate, waiting_for_data=waiting,
                        skipped=int(all_skipped), non_finite_steps=bad_steps)  # fmt: skip
            if done - start == 2 * config.log_interval:
                takes = cost(config.max_steps * config.batch_size, rate, world_size, config)
                say(f"{rate:,.1f} images/s, {waiting:.0%} of the time waiting for data, {peak_memory(device):.1f} GB at the peak;"
                    f" the {config.max_steps:,} steps take {takes}")  # fmt: skip
            losses, waited, clock, last = [], 0.0, now, done
            seen = (done - start) * config.batch_size
            if all_skipped > 10 + 0.01 * seen:
                reason = (f"error: {int(all_skipped):,} of {seen:,} samples could not be read: see {run_dir / 'skipped.txt'} and"
                          f" mend the data; stopped after step {done:,}")  # fmt: skip
        if bad_in_a_row == BAD_STEPS:
            stop(f"error: loss or gradient was not finite {BAD_STEPS} steps in a row, up to step {done:,}; the last checkpoint"
                  f" in {run_dir} is untouched by them: look at the data, or lower the learning rate")  # fmt: skip
        if done % config.eval_interval == 0 or finished:
            if val_dataset is not None:
                val_loss = evaluate(done)
                journal.log(step=done, val_loss=val_loss)
                say(f"step {done:,}: validation loss {val_loss or math.nan:.5f}")
            journal.write(draw_curves, "curves.png")
        saves = done % config.save_interval == 0 or finished or reason is not None
        before = time.perf_counter()
        if saver.thread is not None and (saves or not writing):
            end_save()
        if saves:
            saver.begin(done)
            say(f"step {done:,} is being saved; training stood still for {time.perf_counter() - before:.2f} s")
        if finished and not end_save():
            stop("error: the run is done, but its weights could not be saved; mend that and add --resume")
        if reason:
            saved = finished or end_save()
            stop(f"{reason}, which is {'saved' if saved else 'not saved'}; go on with --resume")
        clock += time.perf_counter() - now  # what is not a step does not count
    bar.close()
    if config.benchmark:
        rate, recipe = config.benchmark * config.batch_size / (now - clock), RECIPE[config.stage]
        takes = cost(recipe["max_steps"] * recipe["batch_size"], rate, world_size, config)
        rate, memory = rate / world_size, peak_memory(device)
        peak = matrix_peak(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        say(f"{rate:.3g} images/s a process | {flops / 1e12:.3f} TFLOP an image | {rate * flops / 1e12:.3g} TFLOP/s |"
            f" {rate * flops / peak:.0%} of the measured matrix peak of {peak / 1e12:.3g} TFLOP/s | {memory:.1f} GB |"
            f" stage {config.stage} whole: {takes}")  # fmt: skip
    else:
        say(f"done: {find_checkpoint(run_dir)}")
    if world_size > 1:
        dist.barrier()
    saver.close()
    if lock:
        lock.close()


if __name__ == "__main__":
    run(main)
