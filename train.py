"""
Trains VLV. One loop, both stages: stage 1 learns to redraw images, stage 2 to read the embedding aloud.

    python train.py --stage 1 --config data/shapes/config.json         # the toy world, on a laptop
    torchrun --nproc_per_node=8 train.py --stage 1                     # the paper's run, on one machine
    torchrun --nproc_per_node=8 train.py --stage 2 --resume            # go on where a killed run was

A flag overrides the JSON file of --config, the file overrides the checkpoint's settings, and these override
the paper's recipe. A run writes into OUT_DIR/stage1 (or stage2): step-000100/ (checkpoints: the last two, and
the one with the best validation loss), log.jsonl, curves.png and step-000100.png (validation images, and what
is redrawn of them).
"""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data.distributed import RANK, WORLD_SIZE, all_gather, all_reduce, compile_if_possible, exit_reasons
from data.distributed import exit_run, init_process_group, main_rank_first, note_signals, on_every_rank
from data.distributed import print_once, run_and_exit, select_device, start_workers
from data.loader import ImageTextDataset, SyntheticDataset, check_apart, collate, micro_batches, seeds_of
from data.results import panel
from data.run import PATIENCE, Checkpointer, Log, Meter, draw_curves, open_run
from data.settings import Count, NonNegative, parse_with_file, write_json
from vlv import VLV, VLVConfig, is_trained, load_config, select_dtype

BAD_STEPS = 10  # so many non-finite steps in a row end a run
ONLY_NOW = ("config", "family", "resume", "accept_changes", "benchmark")  # not in settings.json


@dataclass
class TrainConfig(VLVConfig):
    """Every setting of a run, beside those of the model. None: the stage's value in RECIPE."""

    config: Path | None = None  # JSON file with settings; those of one stage under stage1 or stage2
    data: str | None = None  # tar shards of KEY.jpg + KEY.txt, or a folder of images; stage 1 needs no texts
    captions: str = ""  # data/caption.py's --out for these shards, in the place of their texts
    val_data: str = ""  # the same for validation; empty: no validation
    val_captions: str = ""
    out_dir: Path = Path("out")  # with several machines: on storage that all of them see
    init_from: str = ""  # the checkpoint to start from, of either stage; empty, in stage 2: OUT_DIR/stage1
    resume: bool = False  # continue the newest checkpoint of this run, or start if there is none yet
    accept_changes: bool = False  # resume with other data, batch size or seed than the run was started with
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
    compile: bool | None = None  # torch.compile, minutes at the first start; None: on GPUs where it works
    gradient_checkpointing: tuple[Literal["unet", "bart", "llm"], ...] = ()  # less memory, but slower
    latents: bool = False  # read the VAE's moments, computed ahead by data/latents.py
    num_workers: Annotated[int, 0, 256] = 4  # processes a rank that decode images; 0: none, for tiny images
    log_interval: Count = 10  # steps
    eval_interval: Count = 1000  # steps
    save_interval: Count = 1000  # steps
    eval_images: Count = 512  # how many validation images the loss is measured on
    eval_pictures: NonNegative = 8  # how many of them are drawn; 0: none
    benchmark: NonNegative = 0  # measure so many steps on synthetic images, and write nothing
    tensorboard: bool = False  # write log, pictures and captions for TensorBoard, too
    usd_per_gpu_hour: Annotated[float, 0, 1000] = 2.5  # only for what the run says about its cost

    def of_the_model(self) -> dict:
        """The settings that are VLVConfig's."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(VLVConfig)}


RECIPE = {  # the paper's
    1: dict(batch_size=512, max_steps=200_000, learning_rate=5e-5, lr_schedule="cosine", data="data/laion"),
    2: dict(batch_size=64, max_steps=100_000, learning_rate=1e-5, lr_schedule="linear",
            data="data/captions6m"),
}


def merge_settings(given: dict, saved: dict, world_size: int) -> TrainConfig:
    """The one place where settings meet: the paper's recipe, then those of the checkpoint that the run starts
    from, then those given by file and flags. Raises ValueError for settings that cannot be together."""
    stage = given.get("stage", 1)
    config = TrainConfig(**RECIPE[stage] | saved | {"stage": stage} | given)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("TensorBoard is missing: pip install tensorboard, or leave --tensorboard out")
    share = config.batch_size // world_size
    config.micro_batch_size = config.micro_batch_size or math.gcd(share, 64 if stage == 1 else 8)
    if not share or config.batch_size % (world_size * config.micro_batch_size):
        raise ValueError(f"batch_size {config.batch_size} does not divide into {world_size} processes and"
                         f" micro-batches of {config.micro_batch_size}: choose a multiple of their product")
    return config


def learning_rate(step: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def open_data(config: TrainConfig) -> tuple:
    """(data set for training, for validation or None). Raises ValueError if there is nothing to read."""
    latents_of = config.diffusion_model if config.latents and config.denoises else None
    common = dict(size=config.image_size, resize=config.resize, with_captions=config.stage == 2,
                  latents_of=latents_of)
    dataset, val_dataset = ImageTextDataset(config.data, captions=config.captions, **common), None
    if config.val_data:
        val_dataset = ImageTextDataset(config.val_data, captions=config.val_captions, **common)
        check_apart(dataset, val_dataset)
    return dataset, val_dataset


def load_model(config: TrainConfig, checkpoint: Path | None, device: torch.device, dtype: torch.dtype) -> VLV:
    """The model in training mode, with what makes it faster or smaller, which changes rounding at most."""
    has_unet = config.denoises or bool(config.val_data and config.eval_pictures)
    model = VLV.from_pretrained(checkpoint, dtype=dtype, device=device, for_training=True, with_unet=has_unet,
                                **config.of_the_model())
    parts = model.parts()
    if config.compile:
        torch._dynamo.config.suppress_errors = False  # what cannot be compiled is an error
        model.compile()
    elif config.compile is None:
        compile_if_possible(model, device)
    if "unet" in config.gradient_checkpointing and has_unet:
        parts["unet"].enable_gradient_checkpointing()
    if "bart" in config.gradient_checkpointing:
        for net in parts["bart"].values():
            net.activation_checkpointing_enable()
    if "llm" in config.gradient_checkpointing and "llm" in parts:
        parts["llm"].activation_checkpointing_enable()
    return model.train()


def make_autocast(device: torch.device, dtype: torch.dtype):
    """What makes the autocast of a step: to bf16, or none for another dtype. No cache: a step uses each
    weight once, and gradient checkpointing could not free what is cached."""
    bf16 = dtype == torch.bfloat16
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def make_optimizer(model: VLV, config: TrainConfig) -> tuple:
    """(optimizer, parameters that learn, the model, in DDP if there are several processes). What learns stays
    in float32: at a learning rate of 1e-5 bfloat16 would round most updates away. The memory that this costs,
    AdamW's two moments, is shared out among the processes (ZeRO's first stage)."""
    params = [p for p in model.parameters() if p.requires_grad]
    adamw = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8,
                 weight_decay=config.weight_decay, fused=True)
    if WORLD_SIZE == 1:
        return torch.optim.AdamW(params, **adamw), params, model
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes nearly as long to import as torch

    optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, **adamw)
    for p in params:  # gradients live in DDP's buckets from the start: none is ever there twice
        p.grad = torch.zeros((), device=p.device).expand_as(p)
    ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    return optimizer, params, ddp


def loss_of(model, batch: dict, device: torch.device) -> torch.Tensor:
    """The model's loss, a scalar, of a batch as collate makes it."""
    images = batch["image"].to(device, non_blocking=True)
    moments = None if batch["moments"] is None else batch["moments"].to(device, non_blocking=True)
    return model(images, batch["caption"], batch["noise"], moments)


def count_flops(model: VLV, sample: dict, device: torch.device) -> int:
    """FLOPs that one sample needs, forward and backward."""
    model.eval()
    unet = model.parts().get("unet")
    is_checkpointed = unet is not None and unet.is_gradient_checkpointing
    if is_checkpointed:  # in evaluation, too: its forward pass would count twice
        unet.disable_gradient_checkpointing()
    # eagerly: what torch's compiler (2.13) meets first under a counter it never compiles; and attention as
    # matrix products: other kernels are not counted on every device
    eager, products = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, eager, products:
        loss_of(model, collate([sample]), device).backward()
    if is_checkpointed:
        unet.enable_gradient_checkpointing()
    model.zero_grad(set_to_none=True)
    model.train()
    return counter.get_total_flops()


def validation_losses(model: VLV, val_dataset, config: TrainConfig, make_batch) -> dict[str, float]:
    """The loss on the first validation images, which the processes share, with noise that depends on the
    image alone; and its parts. NaN if no image can be read."""
    mine = list(range(min(config.eval_images, len(val_dataset))))[RANK::WORLD_SIZE]
    totals, count = dict.fromkeys(["loss", *model.losses], 0.0), 0  # named since count_flops
    for at in range(0, len(mine), config.micro_batch_size):
        indices = mine[at : at + config.micro_batch_size]
        items = [val_dataset[place] for place in zip(indices, seeds_of(0, 0, indices))]
        batch = make_batch(items)
        if not batch["unreadable"]:
            losses = {"loss": loss_of(model, batch, model.device), **model.losses}
            totals = {name: total + losses[name].item() * len(indices) for name, total in totals.items()}
            count += len(indices)
    *sums, count = all_reduce([*totals.values(), count], model.device)
    return {f"val_{name}": value / count if count else math.nan for name, value in zip(totals, sums)}


@torch.no_grad()
def evaluate(model: VLV, val_dataset, config: TrainConfig, make_batch, autocast, log: Log, step: int) -> None:
    """Logs the loss on the validation images, and the first of them redrawn and captioned."""
    model.eval()
    with autocast(), torch.compiler.set_stance("force_eager"):  # other sizes would be compiled anew
        losses = validation_losses(model, val_dataset, config, make_batch)
        if RANK == 0 and config.eval_pictures:
            items = [val_dataset[i] for i in range(min(config.eval_pictures, len(val_dataset)))]
            images = torch.stack([item["image"] for item in items])
            prompt_embeds = model.embed(images.to(model.device))
            captions = [""] * len(items)
            if config.stage == 2:
                captions = model.caption_head.generate(prompt_embeds)
                captions = [f"{caption}  (true: {item['caption']})" for caption, item in zip(captions, items)]
            rows = list(zip(images, model.decoder.reconstruct(prompt_embeds)))
            log.pictures(step, panel(rows, captions), captions)
    model.train()
    log.scalars(step, **losses)
    words = ", ".join(f"{name.removeprefix('val_')} {value:.5f}" for name, value in losses.items())
    best = " (the best so far)" if log.best_step() == step else ""
    print_once(f"step {step:,}: validation {words}{best}")


def describe_run(model: VLV, config: TrainConfig, initialized_from, dataset, start: int, runs_in) -> str:
    """What the run is, with a line for each part of the model: trained or frozen, and how many parameters."""
    grad_accum_steps = config.batch_size // (WORLD_SIZE * config.micro_batch_size)
    lines = [f"starting from {initialized_from}, with {dataset.summary}",
             f"stage {config.stage}, steps {start:,} to {config.max_steps:,}: {config.batch_size} images ="
             f" {WORLD_SIZE} processes x {grad_accum_steps} x {config.micro_batch_size} in {runs_in},"
             f" learning rate {config.learning_rate:g} ({config.lr_schedule})"]
    for name, part in model.parts().items():
        learns = "trained" if is_trained(part) else "frozen "
        lines.append(f"  {name:14} {learns} {sum(p.numel() for p in part.parameters()):>13,} parameters")
    return "\n".join(lines)


def run(argv=None, saves_on_signals: bool = False) -> Meter:
    """A whole run, or what is left of it. Returns its clock."""
    # --- settings: what is wrong with them ends the run before anything is loaded
    defaults = {name: f"{RECIPE[1][name]} in stage 1, {RECIPE[2][name]} in stage 2" for name in RECIPE[1]}
    given = on_every_rank(lambda: parse_with_file(TrainConfig, argv, __doc__, defaults))
    config = on_every_rank(lambda: merge_settings(given, {}, WORLD_SIZE))
    device = on_every_rank(lambda: select_device(config.device))
    init_process_group("nccl" if device.type == "cuda" else "gloo")
    run_dir = None if config.benchmark else config.out_dir / f"stage{config.stage}"  # None: writes nothing
    stage1 = config.out_dir / "stage1" if config.stage == 2 and not config.random_init else None
    locked, checkpoint, resumes = open_run(run_dir, config.init_from, config.resume, stage1)
    if checkpoint:
        saved = on_every_rank(lambda: dataclasses.asdict(load_config(checkpoint)))
        if config.stage == 2 and not resumes:
            saved["caption_end"] = "token"  # which is learned from now on
        config = on_every_rank(lambda: merge_settings(given, saved, WORLD_SIZE))
        if saved["stage"] > config.stage:
            print_once(f"note: stage 1 has no caption head, so that of {checkpoint} is left out")

    # --- data, model, optimizer
    dtype = select_dtype(config.precision, device)
    autocast = make_autocast(device, dtype)
    if not config.benchmark:
        dataset, val_dataset = main_rank_first(lambda: open_data(config))  # who comes first builds the index
    torch.manual_seed(config.seed)  # the same new weights on every process
    model = on_every_rank(lambda: load_model(config, checkpoint, device, dtype))
    if config.benchmark:
        moments = config.latents and config.denoises
        shape = (2 * model.decoder.latent_shape[0], *model.decoder.latent_shape[1:]) if moments else None
        dataset, val_dataset = SyntheticDataset(config.image_size, config.max_caption_tokens, shape), None
    with autocast():
        flops = count_flops(model, dataset[0], device)
    meter = Meter(config, flops, device)
    if config.benchmark:
        config.max_steps = meter.warm_up + config.benchmark
    optimizer, params, ddp = make_optimizer(model, config)
    names = ("max_steps", "batch_size", "seed", "prompt", "image_size", "encoder_image_size", "resize",
             "learning_rate", "lr_schedule", "warmup_steps", "beta1", "beta2", "weight_decay", "grad_clip")
    started_with = {name: getattr(config, name) for name in names}
    started_with |= dict(samples=len(dataset), fingerprint_of_data=dataset.fingerprint)
    checkpointer = Checkpointer(run_dir, model, optimizer, started_with)
    start = on_every_rank(lambda: checkpointer.restore(checkpoint, config.accept_changes) if resumes else 0)

    # --- log and loader
    initialized_from = checkpoint or ("random weights" if config.random_init else "the pretrained models")
    runs_in = f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} on {device.type}"
    print_once(describe_run(model, config, initialized_from, dataset, start, runs_in))
    log = Log(run_dir, start, config.tensorboard)
    if start < config.max_steps:
        settings = dataclasses.asdict(config) | {"micro_batch_size": given.get("micro_batch_size")}
        settings = {name: settings[name] for name in settings if name not in ONLY_NOW}
        log.write("settings.json", lambda path: write_json(path, settings))
    log.skipped(dataset.problems if RANK == 0 else [])
    if saves_on_signals:  # from here on there is something to save
        note_signals()
    grad_accum_steps = config.batch_size // (WORLD_SIZE * config.micro_batch_size)
    make_batch = partial(collate, draw_noise=model.decoder.draw_noise if config.denoises else None)
    batches = micro_batches(len(dataset), config.batch_size, config.micro_batch_size, config.seed,
                            range(start, config.max_steps), RANK, WORLD_SIZE)
    loader = start_workers(dataset, batches, config.num_workers, pin_memory=device.type == "cuda",
                           timeout=PATIENCE if config.num_workers else 0, collate_fn=make_batch)
    bar = tqdm(total=config.max_steps * config.batch_size, initial=start * config.batch_size, unit="img",
               desc=f"stage {config.stage}", disable=RANK > 0, unit_scale=True, mininterval=0.5)
    losses = []  # (loss, its parts) of each micro-batch since the last line of the log
    skipped = not_finite = not_finite_in_a_row = 0
    reason = None  # why the run ends before its last step
    is_due = start % config.eval_interval == 0 or start == config.max_steps
    is_done = any(record["step"] == start and "val_loss" in record for record in log.records)
    if is_due and val_dataset is not None and not is_done:  # at the start, or missed
        evaluate(model, val_dataset, config, make_batch, autocast, log, start)

    for step in range(start + 1, config.max_steps + 1):
        # --- a step: batches, loss, backward, clip, step
        meter.start_step()
        lr = learning_rate(step - 1, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_losses, unreadable = [], None
        for micro_step in range(grad_accum_steps):
            batch = meter.next(loader)
            log.skipped(batch["skipped"])
            skipped += len(batch["skipped"])
            unreadable = unreadable or batch["unreadable"]
            if WORLD_SIZE > 1:  # gradients are exchanged once a step; DDP reads this in the forward pass
                ddp.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            torch.manual_seed(batch["seed"])  # dropout
            with autocast():
                loss = loss_of(ddp, batch, device)
            (loss / grad_accum_steps).backward()
            step_losses.append(torch.stack([loss.detach(), *model.losses.values()]))
        grad_norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip)
        is_finite = torch.stack([grad_norm, *(part[0] for part in step_losses)]).isfinite().all()
        flags = [~is_finite, bool(exit_reasons), bool(unreadable)]  # all must decide alike
        bad, stop, failed = all_reduce(flags, device, dist.ReduceOp.MAX)
        if failed:
            exit_run("error: " + "; ".join(sorted({s for s in all_gather(unreadable) if s})), run_dir)
        not_finite += bad
        not_finite_in_a_row = not_finite_in_a_row + 1 if bad else 0
        if not bad:
            optimizer.step()
            losses += step_losses
        optimizer.zero_grad(set_to_none=WORLD_SIZE == 1)  # DDP's gradients stay where they are, in buckets
        meter.end_step()
        bar.update(config.batch_size)

        # --- log, save, evaluate
        is_last = step == config.max_steps
        if not_finite_in_a_row == BAD_STEPS:
            exit_run(f"error: loss or gradient not finite {BAD_STEPS} steps in a row, up to step {step:,};"
                     f" the checkpoints in {run_dir} are good: look at data and learning rate", run_dir)
        if stop and not is_last:
            causes = " and ".join(sorted(set(sum(all_gather(exit_reasons), []))))
            reason = f"stopped by {causes} after step {step:,}"
        if step % config.log_interval == 0 or is_last:
            sums = sum(losses) if losses else torch.zeros(1 + len(model.losses))
            *sums, count, all_skipped = all_reduce([*sums, len(losses), skipped], device)
            mean_loss, *parts = [value / count if count else math.nan for value in sums]
            losses = []
            speed = meter.speed(-config.log_interval)
            bar.set_postfix(loss=f"{mean_loss:.4f}", data=f"{speed['waiting_for_data']:.0%}")
            log.scalars(step, loss=mean_loss, **dict(zip(model.losses, parts)), lr=lr,
                        grad_norm=grad_norm.item(), **speed, skipped=int(all_skipped),
                        non_finite_steps=int(not_finite))
            seen = (step - start) * config.batch_size
            if all_skipped > 10 + 0.01 * seen:
                reason = (f"error: {all_skipped:,.0f} of {seen:,} samples could not be read: see"
                          f" {run_dir}/skipped.txt and fix the data; stopped after step {step:,}")
        if is_last or (step - start == 2 * config.log_interval and not config.benchmark):
            print_once(meter.summary())
        if step % config.save_interval == 0 or is_last or reason:
            checkpointer.save(step, log.best_step(saved=True))
        if reason:
            saved = "not saved" if checkpointer.problem else "saved"
            exit_run(f"{reason}, which is {saved}; go on with --resume", run_dir)
        if step % config.eval_interval == 0 or is_last:
            if val_dataset is not None:
                evaluate(model, val_dataset, config, make_batch, autocast, log, step)
            log.write("curves.png", lambda path: draw_curves(path, log.records))

    bar.close()
    if checkpointer.problem:
        exit_run("error: the run is done, but could not be saved; fix that and add --resume", run_dir)
    best = log.best_step(saved=True)
    better = f"; the best that is saved: step-{best:06d}" if best not in (None, config.max_steps) else ""
    print_once(f"done: {run_dir / f'step-{config.max_steps:06d}' if run_dir else 'nothing is saved'}{better}")
    all_gather(None)  # the others are done, too
    if locked:
        locked.close()
    return meter


def main(argv=None, saves_on_signals: bool = False) -> None:
    run(argv, saves_on_signals)


if __name__ == "__main__":
    run_and_exit(partial(main, saves_on_signals=True), "stopped before there was anything to save")
