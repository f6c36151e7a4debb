"""
A training run: where it starts, its checkpoints, log and speed. Its folder is OUT_DIR/stage1 or stage2:

    step-000100/        a checkpoint, complete or absent; the last two and the best are kept
        config.json, model.safetensors       for VLV.from_pretrained; with 8 processes, 8 files of each
        trainer.json, optimizer.safetensors  to go on from: the step, and AdamW's state by parameter name
    saving/             the next checkpoint, not complete yet
    log.jsonl, curves.png, step-000100.png, settings.json; skipped.txt and stopped.txt, if there is a reason
    .lock               held by the one process that may write here
"""

import fcntl
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data.distributed import RANK, RESTARTS, WORLD_SIZE, all_gather, exit_run, on_every_rank, print_once
from data.loader import read_part
from data.settings import TEXT, read_json, write_atomically, write_json, write_lines
from vlv import checkpoints, find_checkpoint, read_weights, sync, write_about, write_weights

PATIENCE = 1800  # seconds that a run waits for a batch
COLORS = {"loss": "#1f5fbf", "val_loss": "#d1495b"}  # of curves.png; lighter: the parts of stage 2's loss
COLORS |= {"denoising_loss": "#7fb2e5", "val_denoising_loss": "#f0a3ad"}
COLORS |= {"caption_loss": "#55b59a", "val_caption_loss": "#e0a13c"}


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """Tells checkpoints apart: a hash of config.json, and of the ends of the weights' files."""
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for path in sorted(checkpoint.glob("model*.safetensors")):
        digest.update(read_part(path, 0, 2**20))
        digest.update(read_part(path, max(0, path.stat().st_size - 2**20)))
    return digest.hexdigest()[:16]


def lock(folder: Path):
    """Makes this process the one writer of a folder, until the file that this returns is closed. Raises
    ValueError if another writer is alive."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(f"{folder} belongs to another run, {file.read()}: wait, or choose another") from None
    except OSError as error:  # a file system without locks
        tqdm.write(f"{folder} cannot be locked ({error}): take care that no second run writes into it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename} since {time.strftime('%F %T')}")
    file.flush()
    return file


def open_run(run_dir: Path | None, init_from: str, resume: bool, stage1: Path | None) -> tuple:
    """Takes the run's folder, and finds where the run starts. Exits if that cannot be, or where torchrun
    restarts a run that has ended for a reason.

    run_dir: None for a run that writes nothing. stage1: the run that this one follows, if any. Returns (a
    file to keep open, checkpoint or None for the pretrained models, whether that is this run's own)."""
    is_writer = run_dir is not None and RANK == 0
    if run_dir and RESTARTS and (run_dir / "stopped.txt").exists():
        sys.exit(1)
    locked = on_every_rank(lambda: lock(run_dir) if is_writer else None)
    owner = ""
    if is_writer:
        with suppress(OSError):
            (run_dir / "stopped.txt").unlink()  # a new start removes the reason
        shutil.rmtree(run_dir / "saving", ignore_errors=True)  # of a process that was killed
        locked.seek(0)
        owner = locked.read()  # opening the file again, and closing it, would give the lock up
    checkpoint, resumes = on_every_rank(lambda: find_start(run_dir, init_from, resume, stage1))
    if run_dir and not is_writer and (run_dir / ".lock").exists():
        owner = (run_dir / ".lock").read_text()
    seen = set(all_gather((str(checkpoint), owner)))
    if len(seen) > 1:
        exit_run(f"error: {run_dir} must be on storage that all machines see, but here they see {seen}")
    return locked, checkpoint, resumes


def find_start(run_dir: Path | None, init_from: str, resume: bool, stage1: Path | None) -> tuple:
    """(checkpoint or None, whether it is this run's own). Raises ValueError or OSError if that is unclear."""
    own = checkpoints(run_dir) if run_dir else []
    if own and not resume:
        raise ValueError(f"{run_dir} already holds a run: add --resume to go on, or choose another --out_dir")
    if own:
        return own[-1], True
    if init_from or stage1 is None:
        return find_checkpoint(init_from) if init_from else None, False
    checkpoint = find_checkpoint(stage1)
    trainer = read_json(checkpoint / "trainer.json") if (checkpoint / "trainer.json").exists() else {}
    step, max_steps = trainer.get("step", 0), trainer.get("max_steps", 0)
    if step < max_steps:
        raise ValueError(f"stage 1 is not finished: {checkpoint} is step {step:,} of {max_steps:,}: finish"
                         f" it, or start from it as it is with --init_from {checkpoint}")
    return checkpoint, False


class Checkpointer:
    """Saves and restores a run. Each process writes its share: some of the weights, and the optimizer's state
    that it holds. So nothing is gathered, and any number of processes can go on from it. started_with: what a
    run must not change, by name. problem: why the last save failed, or None."""

    def __init__(self, run_dir: Path | None, model, optimizer: torch.optim.Optimizer, started_with: dict):
        self.run_dir, self.model, self.started_with, self.problem = run_dir, model, started_with, None
        self.optimizer = getattr(optimizer, "optim", optimizer)  # of ZeroRedundancyOptimizer the share here
        self.names = {p: name for name, p in model.named_parameters()}

    def restore(self, checkpoint: Path, accept_changes: bool) -> int:
        """Reads the optimizer's state; returns the step. Raises ValueError if there is none, or if the run
        was started with something else and that is not accepted."""
        if not (checkpoint / "trainer.json").exists():
            raise ValueError(f"{checkpoint} has no trainer.json, so it cannot be continued: choose another"
                             f" --out_dir, and start from it with --init_from {checkpoint}")
        trainer = read_json(checkpoint / "trainer.json")
        for name, value in self.started_with.items():
            before = trainer.get(name, value)
            if name == "max_steps" and before != value:
                print_once(f"note: max_steps was {before:,} and is now {value:,}: so the learning rate jumps"
                           " to what the new schedule has for this step")
            elif before != value and not accept_changes:
                raise ValueError(f"{self.run_dir} was started with {name} {before}, and now it is {value}:"
                                 " give it as it was, or add --accept_changes")
        if trainer["step"] > self.started_with["max_steps"]:
            raise ValueError(f"{self.run_dir} is at step {trainer['step']:,}, which is past max_steps"
                             f" {self.started_with['max_steps']:,}")
        saved = read_weights(checkpoint, "optimizer")
        for p in [p for group in self.optimizer.param_groups for p in group["params"]] if saved else []:
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                name = f"{self.names[p]}.{kind}"
                if name not in saved:
                    raise ValueError(f"{checkpoint} trained other parts: it has no optimizer state {name}")
                self.optimizer.state[p][kind] = saved[name][...].to(p.device)
        return trainer["step"]

    def save(self, step: int, best: int | None = None) -> None:
        """Writes step-STEP, by all processes together. A failure is said, and the run goes on. best: the step
        whose checkpoint stays, beside the last two."""
        if self.run_dir is None:
            return
        start, folder = time.perf_counter(), self.run_dir / "saving"
        part = f"-{RANK + 1:05d}-of-{WORLD_SIZE:05d}" if WORLD_SIZE > 1 else ""
        weights = self.model.learned_state()
        by_size = sorted(weights, key=lambda name: -weights[name].numel())
        mine = {name: weights[name] for name in by_size[RANK::WORLD_SIZE]}
        state = {f"{self.names[p]}.{kind}": value
                 for p, values in self.optimizer.state.items() for kind, value in values.items()}
        problem = None
        try:
            folder.mkdir(exist_ok=True)
            write_weights(folder / f"model{part}.safetensors", mine, self.model.config)
            write_weights(folder / f"optimizer{part}.safetensors", state, self.model.config)
            if RANK == 0:
                write_json(folder / "trainer.json", {"step": step} | self.started_with)
                write_about(folder, self.model)
            sync(folder)
        except (OSError, ValueError) as error:
            problem = str(error)
        problem = next((p for p in all_gather(problem) if p), None)
        if RANK == 0:
            try:
                if not problem:
                    os.rename(folder, self.run_dir / f"step-{step:06d}")
                    sync(self.run_dir)
            except OSError as error:
                problem = str(error)
            shutil.rmtree(folder, ignore_errors=True)
            older = [path for path in checkpoints(self.run_dir) if int(path.name[5:]) < step]
            for old in [path for path in older[:-1] if int(path.name[5:]) != best] if not problem else []:
                with suppress(OSError):  # one that cannot be removed harms nothing
                    os.rename(old, folder)  # no half of it counts as a checkpoint
                    shutil.rmtree(folder)
        self.problem = all_gather(problem)[0]
        if self.problem:
            print_once(f"error: step {step:,} is not saved: {self.problem}; the next save tries again")
        else:
            print_once(f"step {step:,} is saved in {time.perf_counter() - start:.1f} s")


class Log:
    """The files beside a run's checkpoints. The run can do without them: where one cannot be written, it says
    so and goes on. `records`: the lines of log.jsonl, the same on every rank; those after step `start` are
    taken out, as they come again."""

    def __init__(self, run_dir: Path | None, start: int, tensorboard: bool = False):
        self.run_dir, self.board = run_dir, None
        path, records = run_dir and run_dir / "log.jsonl", []
        for line in path.open() if run_dir and RANK == 0 and path.exists() else []:
            with suppress(ValueError):  # an incomplete line, which a full disk leaves
                records.append(json.loads(line))
        self.records = all_gather([record for record in records if record["step"] <= start])[0]
        self.write("log.jsonl", lambda path: write_lines(path, map(json.dumps, self.records)))
        if tensorboard and run_dir and RANK == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run_dir / "tensorboard", purge_step=start + 1)

    def write(self, name: str, write, on_any_rank: bool = False) -> None:
        """Calls write(RUN_DIR/NAME)."""
        if self.run_dir and (RANK == 0 or on_any_rank):
            try:
                write(self.run_dir / name)
            except OSError as error:
                tqdm.write(f"error: {self.run_dir / name} is not written: {error.strerror or error}")

    def scalars(self, step: int, **values) -> None:
        """Adds a line to log.jsonl, with null for what is not finite."""
        values = {name: v if v is not None and math.isfinite(v) else None for name, v in values.items()}
        self.records.append({"step": step, **values})
        self.write("log.jsonl", lambda path: append(path, json.dumps(self.records[-1])))
        for name, value in values.items() if self.board else ():
            if value is not None:
                self.board.add_scalar(name, value, step)

    def best_step(self, saved: bool = False) -> int | None:
        """The step with the least validation loss; saved: of those whose checkpoint is there."""
        losses = {r["step"]: r["val_loss"] for r in self.records if r.get("val_loss") is not None}
        found = checkpoints(self.run_dir) if self.run_dir else []
        there = {int(path.name[5:]) for path in found} if saved else losses
        return min(losses.keys() & there, key=losses.get, default=None)

    def pictures(self, step: int, sheet, captions: list[str]) -> None:
        self.write(f"step-{step:06d}.png", sheet.save)
        if self.board:
            self.board.add_image("pictures", np.asarray(sheet), step, dataformats="HWC")
            self.board.add_text("captions", "\n".join(f"1. {caption}" for caption in captions), step)
            self.board.flush()

    def skipped(self, sentences: list[str]) -> None:
        """Notes samples that could not be read, on whatever rank."""
        for sentence in sentences:
            self.write("skipped.txt", lambda path: append(path, sentence), on_any_rank=True)
            tqdm.write(f"skipped: {sentence}")


def append(path: Path, line: str) -> None:
    with open(path, "a", **TEXT) as file:
        file.write(line + "\n")


def draw_curves(path: Path, records: list[dict]) -> None:
    """Draws the losses in records, the lines of log.jsonl, on a logarithmic scale."""
    image = Image.new("RGB", (1200, 800), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(24)
    log = lambda value: math.log10(max(value, 1e-9))
    lines = {name: [(r["step"], log(r[name])) for r in records if r.get(name) is not None] for name in COLORS}
    lines = {name: line for name, line in lines.items() if line}
    points = np.array([point for line in lines.values() for point in line] or [(0, 0.0)])
    (first, low), (last, high) = points.min(0), points.max(0)
    x = lambda step: np.interp(step, [first, last], [120, 1160])
    y = lambda value: np.interp(value, [low, high], [740, 80])
    for step, value in np.linspace((first, low), (last, high), 5):
        draw.line([(120, y(value)), (1160, y(value))], "#e4e4e4", 2)
        draw.text((110, y(value)), f"{10 ** value:.3g}", "black", font, "rm")
        draw.text((x(step), 752), f"{step:.6g}", "black", font, "ma")
    for number, (name, line) in enumerate(lines.items()):
        pixels = [(x(step), y(value)) for step, value in line]
        draw.text((120 + 360 * (number // 2), 8 + 32 * (number % 2)), name, COLORS[name], font)
        draw.line(pixels, COLORS[name], 4)
        draw.circle(pixels[-1], 6, COLORS[name])
    write_atomically(path, lambda file: image.save(file, "png"))


class Meter:
    """A run's clock. It times steps alone, not validation, pictures and saves between them. flops: of one
    image, forward and backward."""

    def __init__(self, config, flops: int, device: torch.device):
        self.batch_size, self.usd_per_gpu_hour = config.batch_size, config.usd_per_gpu_hour
        self.total = config.max_steps * config.batch_size  # images of the whole stage
        self.flops, self.device = flops, device
        self.warm_up = 2 if device.type == "cuda" else 1  # steps in which kernels are compiled and chosen
        self.steps = []  # of each its seconds, and how many of them it waited for data

    def start_step(self) -> None:
        self.began, self.waited = time.perf_counter(), 0.0

    def next(self, loader) -> dict:
        """The loader's next batch. Exits if there is none for half an hour."""
        start = time.perf_counter()
        try:
            batch = next(loader)
        except RuntimeError as error:
            if "timed out" in str(error):
                sys.exit(f"error: no data came for {PATIENCE // 60} minutes: look at the disk, or try"
                         " --num_workers 0; --resume goes on")
            if "is killed" in str(error):
                sys.exit(f"error: a process that loads data was killed ({str(error).splitlines()[0]}): if the"
                         " memory was full, lower --num_workers; --resume goes on")
            raise
        self.waited += time.perf_counter() - start
        return batch

    def end_step(self) -> None:
        self.steps.append((time.perf_counter() - self.began, self.waited))
        if self.device.type == "cuda" and len(self.steps) == self.warm_up:
            torch.cuda.reset_peak_memory_stats()

    def speed(self, first: int) -> dict[str, float]:
        """Of the steps from number `first` on; below 0: of the last steps."""
        seconds, waited = map(sum, zip(*self.steps[first:]))
        return {"images_per_second": len(self.steps[first:]) * self.batch_size / seconds,
                "waiting_for_data": waited / seconds}

    def peak(self) -> int:
        """The most bytes that this process has held at once; of a GPU's memory, since the warm-up."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def summary(self) -> str:
        """A sentence about all steps but the warm-up's."""
        if len(self.steps) <= self.warm_up:
            return "too few steps to say how fast they are"
        rate, waiting = self.speed(self.warm_up).values()
        each, hours = rate / WORLD_SIZE, self.total / rate / 3600
        dollars = ""
        if self.device.type == "cuda":
            usd = hours * WORLD_SIZE * self.usd_per_gpu_hour
            dollars = f", ${usd:,.0f} at ${self.usd_per_gpu_hour:.2f} a GPU-hour"
        return (f"{rate:,.3g} images/s ({each:.3g} a process), {waiting:.0%} of the time waiting for data |"
                f" {self.flops / 1e12:.3g} TFLOP an image, {each * self.flops / 1e12:.3g} TFLOP/s a process |"
                f" {self.peak() / 1e9:.1f} GB at the peak | the whole stage:"
                f" {f'{hours:,.1f} h' if hours >= 1 else f'{60 * hours:.0f} min'}{dollars}")
