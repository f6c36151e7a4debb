"""
What a checkpoint is: a folder, complete or absent, with

    config.json                                what the model is made of
    model.safetensors                          the learned weights; of several processes model-00001-of-00008.safetensors, ...
    trainer.json, optimizer.safetensors        for a run that goes on: the step, and AdamW's state by the parameters' names

A run keeps the last two of them as step-000100, step-000200, ... beside `saving` (the next one, not whole yet), `removing`
(an old one) and .lock.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data.processes import gather, join_processes, leave, prepare_device, rank_and_world_size, run, say, together
from data.settings import Settings, Text, check_names, parse_settings, read_json


MODEL_CARD = """---
library_name: vlv
pipeline_tag: image-to-text
---

# A Vision-Language-Vision auto-encoder (VLV, arXiv 2507.07104)

The learned weights, of stage {stage}. It captions images (stage 2) and redraws them from its embedding.

| | |
|---|---|
| vision encoder | {encoder} |
| text-to-image model, frozen | {diffusion_model} |
| language model | {llm} |

    python sample.py photo.jpg --ckpt USER/NAME

The rest of the vision encoder and the text-to-image model are read from the models named above.
"""


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_json(file: Path, values: dict) -> None:
    """A JSON file, on the disk when this returns."""
    file.write_text(json.dumps(values, indent=2) + "\n")
    sync(file)


def write_whole(path: Path, write) -> None:
    """write(path), so that the file is whole or as it was."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_folder(folder: Path, write, ours: tuple[str, ...]) -> None:
    """write(new folder), which then takes the name. The folder is always the old one or the new one, whole. Raises OSError,
    also where it holds other files than those that are `ours`; then nothing has changed."""
    others = {p.name for p in folder.iterdir()} - set(ours) if folder.is_dir() else ()
    if others or folder.is_file():
        raise OSError(f"{folder} holds something else ({min(others, default='a file')}): choose a new folder")
    new, old = (folder.with_name(f".{folder.name}.vlv-{kind}") for kind in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        write(new)
        sync(new)  # on the disk before the name is
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)  # find_checkpoint finds it there, should we die before the next line
    os.rename(new, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], config) -> None:
    """A safetensors file, on the disk when this returns. Raises OSError when it cannot be written, ValueError when there is
    an infinity or a NaN to be written."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    try:
        save_file(tensors, file, {"format": "pt", "config": json.dumps(dataclasses.asdict(config))})
        os.chmod(file, file.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it
        sync(file)
    except (OSError, SafetensorError) as error:  # a full disk, in the words of two libraries
        raise OSError(f"cannot write {file}: {' '.join(str(error).split())}") from error


def write_about(folder: Path, model) -> None:
    """What a checkpoint has beside its weights: config.json and, where the LLM has learned, its configuration and tokenizer."""
    if "llm" in model.config.learned:
        model.caption_head.llm.config.save_pretrained(folder / "llm")
        model.caption_head.tokenizer.save_pretrained(folder / "llm")
    write_json(folder / "config.json", dataclasses.asdict(model.config))


def save_model(folder: Path, model) -> None:
    """A VLV's folder; see VLV.save_pretrained."""

    def write(new: Path):
        write_about(new, model)
        (new / "README.md").write_text(MODEL_CARD.format(**vars(model.config)))
        write_tensors(new / "model.safetensors", model.learned_state(), model.config)

    write_folder(folder, write, ("config.json", "model.safetensors", "llm", "README.md"))


def open_tensors(folder: Path, kind: str, mapped: bool = False):
    """Yields each of a checkpoint's safetensors files of a kind, model or optimizer, opened. mapped: tensors that are used as
    they are cost no reading and no memory of their own; converted ones would be in memory twice. Raises OSError when one
    cannot be read."""
    files = sorted(folder.glob(f"{kind}*.safetensors"))
    if not files:
        raise OSError(f"the checkpoint {folder} has no {kind}.safetensors")
    for file in files:
        try:
            with safe_open(file, "pt", backend="mmap" if mapped else "pread") as tensors:
                yield tensors
        except (OSError, SafetensorError) as error:
            raise OSError(f"{file} cannot be read: {error}") from error


def read_config(folder: Path, cls, may_change: tuple[str, ...]):
    """A checkpoint's configuration, a cls. Raises ValueError for one that is not its weights' own, but for the fields that may
    change: a changed image_size would go unnoticed, and caption badly."""
    file = folder / "config.json"
    values = read_json(file)
    check_names(values, [f.name for f in dataclasses.fields(cls)], file)
    try:
        config = cls(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    for weights in open_tensors(folder, "model"):
        saved = json.loads((weights.metadata() or {}).get("config", "{}"))
        for name, value in saved.items():
            here = json.loads(json.dumps(getattr(config, name, value)))
            if name not in may_change and here != value:
                raise ValueError(f"{file}: {name} is {here!r}, but the weights beside it were saved with {value!r}")
    return config


def fingerprint(folder: Path) -> str:
    """Tells checkpoints apart: of config.json, and of the beginning and the end of each file of weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("model*.safetensors")):
        with open(file, "rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(0, file.stat().st_size - 2**20))
            digest.update(opened.read())
    return digest.hexdigest()[:16]


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, from the oldest to the newest."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / "config.json").exists()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def find_checkpoint(folder: str | Path) -> Path:
    """`folder` itself when it is a checkpoint, else the newest of its own, else the newest of its runs' (stage1, ...), else
    the checkpoint of that hub id, if it was downloaded. Raises OSError."""
    if not str(folder):
        raise OSError("an empty name is no checkpoint folder")
    folder = Path(folder)
    old = folder.with_name(f".{folder.name}.vlv-old")  # write_folder died between its two renames
    for candidate in [folder, *checkpoints(folder)[::-1], old]:
        if (candidate / "config.json").exists():
            return candidate
    below = [found for run in folder.glob("*/") for found in checkpoints(run)[-1:]]
    if below:
        return max(below, key=lambda p: (p / "config.json").stat().st_mtime)
    try:
        return find_checkpoint(snapshot_download(str(folder), local_files_only=True))  # what `hf download` brought
    except (HFValidationError, LocalEntryNotFoundError):
        pass
    raise OSError(f"there is no checkpoint in {folder}; train one with python train.py, download one with hf download, or name"
                  " another folder")  # fmt: skip


def lock(folder: Path) -> tuple:
    """Makes this process the one writer of a folder, for as long as it lives and keeps the file that this returns open (and,
    as POSIX has it, opens it no second time). Returns the file and its text. Raises ValueError when another writer is
    alive."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read() or "one that has just started"
        raise ValueError(f"{folder} belongs to another run, {owner}: wait for its end, or choose another folder") from None
    except OSError as error:  # a file system without locks
        tqdm.write(f"{folder} cannot be locked ({error}): take care that no second run writes into it")
    owner = f"process {os.getpid()} on {os.uname().nodename} since {time.strftime('%F %T')}"
    file.truncate(0)
    file.write(owner)
    file.flush()
    os.fsync(file.fileno())
    return file, owner


def own(run_dir: Path) -> tuple:
    """lock, and nothing is left there of writers that were killed."""
    locked = lock(run_dir)
    for leftover in ("saving", "removing"):
        shutil.rmtree(run_dir / leftover, ignore_errors=True)
    return locked


def find_start(run_dir: Path | None, init_from: str, resume: bool, stage1: Path | None) -> tuple[Path | None, bool]:
    """Where a run starts from: (checkpoint, or None for the pretrained models; whether this run wrote it). Raises ValueError or
    OSError when that is not clear. stage1: the run of stage 1 that it follows, if any."""
    own_checkpoints = checkpoints(run_dir) if run_dir else []
    if own_checkpoints and not resume:
        raise ValueError(f"{run_dir} already holds a run: add --resume to continue it, or choose another --out_dir")
    if own_checkpoints:
        return own_checkpoints[-1], True
    if init_from:
        return find_checkpoint(init_from), False
    if stage1 is None:
        return None, False
    source = find_checkpoint(stage1)
    trainer = read_json(source / "trainer.json") if (source / "trainer.json").exists() else {}
    if trainer.get("step", 0) < trainer.get("max_steps", 0):
        raise ValueError(
            f"stage 1 is not finished: {source} is step {trainer['step']:,} of {trainer['max_steps']:,}; finish it with"
            f" --stage 1 --resume, or start from it as it is with --init_from {source}"
        )
    return source, False


def open_run(run_dir: Path | None, *start) -> tuple:
    """Makes the first process the one writer of run_dir (None: of nothing). Returns the file that says so, to be kept open, and
    what find_start(run_dir, *start) returns, the same on every process. Leaves the program when that cannot be."""
    is_writer = run_dir is not None and rank_and_world_size()[0] == 0
    file, owner = together(lambda: own(run_dir) if is_writer else (None, None))
    source, resumes = together(lambda: find_start(run_dir, *start))
    if run_dir is not None:
        owner = together(lambda: owner or (run_dir / ".lock").read_text())
    seen = set(gather((str(source), owner)))
    if len(seen) > 1:
        leave(f"error: {run_dir} must be on storage that all machines see, but the processes find different things there: {seen}")
    return file, source, resumes


class Saver:
    """Writes a run's checkpoints while the run goes on. Each process copies its share to the host, which is all that training
    waits for, and writes it in a thread; when all are done the folder gets its name.

    The weights are shared out by size; the optimizer's state is written by the process that holds it, under the names of
    the parameters. So nothing is gathered, and any number of processes can go on from it.

    run_dir: None saves nothing. about: what the run was started with, which travels with its checkpoints. saved: whether the last
    checkpoint that was begun is whole.
    """

    def __init__(self, run_dir: Path | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer, about: dict):
        self.run_dir, self.model, self.about, self.saved = run_dir, model, about, True
        self.optimizer = getattr(optimizer, "optim", optimizer)  # of ZeroRedundancyOptimizer, this process's share
        self.names = {p: name for name, p in model.named_parameters()}
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.part = f"-{self.rank + 1:05d}-of-{self.world_size:05d}" if self.world_size > 1 else ""
        self.step = self.thread = self.problem = self.removal = None

    def restore(self, folder: Path, accept_changes: bool) -> int:
        """Reads this process's share of the optimizer's state, and no other; returns the step. Raises ValueError when it is not
        there, and where the run was started with something else, unless that is accepted."""
        if not (folder / "trainer.json").exists():
            raise ValueError(f"{folder} has no trainer.json, so it cannot be continued: choose another --out_dir, and start"
                             f" from it with --init_from {folder}")  # fmt: skip
        trainer = read_json(folder / "trainer.json")
        for name, value in self.about.items():
            if name != "max_steps" and trainer.get(name) != value and not accept_changes:
                raise ValueError(
                    f"{self.run_dir} was started with {name} {trainer.get(name)}, and now it is {value}: give it as it was, or"
                    " add --accept_changes to go on with what is new"
                )
        mine = {self.names[p]: p for group in self.optimizer.param_groups for p in group["params"]}
        found = set()
        for tensors in open_tensors(folder, "optimizer"):
            for key in tensors.keys():
                name, _, kind = key.rpartition(".")
                found.add(name)
                if name in mine:
                    self.optimizer.state[mine[name]][kind] = tensors.get_tensor(key).to(mine[name].device)
        missing = set(mine) - found
        if found and missing:
            raise ValueError(f"{folder} was trained with other parts: it has no optimizer state of {min(missing)}")
        return trainer["step"]

    def begin(self, step: int) -> None:
        """Copies what is to be saved, once the save before it is done; a thread writes it."""
        if self.run_dir is None:
            return
        start = time.perf_counter()
        self.end()
        weights = self.model.learned_state()
        shares = [[] for _ in range(self.world_size)]  # the largest first, each to whom has least
        sizes = [0] * self.world_size
        for name in sorted(weights, key=lambda name: -weights[name].numel()):
            least = sizes.index(min(sizes))
            shares[least].append(name)
            sizes[least] += weights[name].numel()
        state = {f"{self.names[p]}.{kind}": v for p, values in self.optimizer.state.items() for kind, v in values.items()}
        copies = copy_to_host({name: weights[name] for name in shares[self.rank]}), copy_to_host(state)
        if any(p.is_cuda for p in self.names):
            torch.cuda.synchronize()
        self.step, self.problem = step, "the thread that writes has died"
        self.thread = threading.Thread(target=self.write, args=(step, *copies), daemon=True)
        self.thread.start()
        say(f"step {step:,} is being saved; training stood still for {time.perf_counter() - start:.2f} s")

    def write(self, step: int, weights: dict, state: dict) -> None:
        """Writes this process's share of the folder; notes in `problem` why that failed, or None."""
        folder = self.run_dir / "saving"
        try:
            folder.mkdir(exist_ok=True)
            write_tensors(folder / f"model{self.part}.safetensors", weights, self.model.config)
            write_tensors(folder / f"optimizer{self.part}.safetensors", state, self.model.config)
            if self.rank == 0:
                write_json(folder / "trainer.json", {"step": step} | self.about)
                write_about(folder, self.model)
            sync(folder)
            self.problem = None
        except (OSError, ValueError) as error:
            self.problem = str(error)

    @property
    def is_writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def end(self) -> None:
        """Where a checkpoint was begun, waits for every process's thread and names the folder, or says why it is not saved; the
        last two are kept."""
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        problems = [p for p in gather(self.problem) if p]
        folder = self.run_dir / "saving"
        if self.rank == 0:
            try:
                if not problems:
                    os.rename(folder, self.run_dir / f"step-{self.step:06d}")
                    sync(self.run_dir)
            except OSError as error:
                problems = [str(error)]
            if problems:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                self.prune()
        problems = gather(problems)[0]
        self.saved = not problems
        if problems:
            say(f"error: step {self.step:,} is not saved: {problems[0]}; the next save tries again")

    def prune(self) -> None:
        """Removes all checkpoints before the last two, in a thread: that takes long on some disks. What cannot be removed
        stays, and fails nothing."""
        if self.removal is not None:
            self.removal.join()
        old = [p for p in checkpoints(self.run_dir) if int(p.name[5:]) < self.step][:-1]
        self.removal = threading.Thread(target=remove, args=(old, self.run_dir / "removing"), daemon=True)
        self.removal.start()

    def close(self) -> None:
        """Waits until what was begun is saved, and old checkpoints are removed."""
        self.end()
        if self.removal is not None:
            self.removal.join()


def copy_to_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies; those of a GPU's tensors in pinned memory, at the bus's full speed, and complete after the next
    torch.cuda.synchronize()."""
    how = dict(device="cpu", copy=True, non_blocking=True, memory_format=torch.contiguous_format)
    return {name: tensor.detach().to(**how) for name, tensor in tensors.items()}


class Journal:
    """The files beside a run's checkpoints, which it can do without: where one cannot be written, the run says so and goes
    on. What log.jsonl says of steps after `start`, from where the run goes on, is taken out, as it comes again.
    run_dir: None writes nothing. tensorboard: write the same for TensorBoard, too, into RUN_DIR/tensorboard."""

    def __init__(self, run_dir: Path | None, start: int, tensorboard: bool = False):
        self.run_dir, self.board = run_dir, None
        self.writes_log = run_dir is not None and rank_and_world_size()[0] == 0
        self.write(partial(cut_log, start=start), "log.jsonl")
        if tensorboard and self.writes_log:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run_dir / "tensorboard", purge_step=start + 1)

    def write(self, function, name: str, *args) -> None:
        """function(RUN_DIR/NAME, *args), on the process that keeps the log."""
        if self.writes_log:
            self.attempt(function, name, *args)

    def attempt(self, function, name: str, *args) -> None:
        try:
            function(self.run_dir / name, *args)
        except OSError as error:
            tqdm.write(f"error: {self.run_dir / name} is not written: {error.strerror or error}")

    def log(self, step: int, **values) -> None:
        """A line of log.jsonl; what is not finite, JSON has no word for."""
        values = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        self.write(append, "log.jsonl", json.dumps({"step": step, **values}))
        for name, value in values.items() if self.board else ():
            if value is not None:
                self.write(lambda path: self.board.add_scalar(name, value, step), "tensorboard")

    def show(self, step: int, picture, captions: list[str]) -> None:
        """Keeps what the model draws and says after `step` steps; picture: a PIL image."""
        self.write(lambda path: picture.save(path), f"step-{step:06d}.png")
        if self.board:
            self.write(lambda path: self.board.add_image("pictures", np.asarray(picture), step, dataformats="HWC"), "tensorboard")
            text = "\n".join(f"{number}. {caption}" for number, caption in enumerate(captions, 1))
            self.write(lambda path: self.board.add_text("captions", text, step), "tensorboard")
            self.write(lambda path: self.board.flush(), "tensorboard")

    def skip(self, sentences: list[str]) -> None:
        """Notes samples that could not be read, of whatever process."""
        for sentence in sentences:
            self.attempt(append, "skipped.txt", sentence)
            tqdm.write(f"skipped: {sentence}")


def append(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(line + "\n")


def cut_log(path: Path, start: int) -> None:
    """Leaves only the lines of steps up to `start`; the file as it is, where that fails."""

    def belongs(line):
        try:
            return json.loads(line)["step"] <= start
        except (ValueError, KeyError, TypeError):  # half a line, written as the disk was full
            return False

    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if belongs(line)]
    if kept != lines:
        write_whole(path, lambda unfinished: unfinished.write_text("".join(kept)))


def remove(folders: list[Path], removing: Path) -> None:
    """Removes folders under the name `removing`, so that no half of one counts as a checkpoint."""
    for folder in folders:
        try:
            os.rename(folder, removing)
            shutil.rmtree(removing)
        except OSError as error:
            tqdm.write(f"the old checkpoint {folder} is not removed: {error}")


@dataclass
class SpeedConfig(Settings):
    folder: Text
    gigabytes: Annotated[float, "> 0", "<= 1000"]  # of float32 weights that learn; AdamW's state is twice that
    learned = ()


class Weights(torch.nn.Module):
    """So many gigabytes of weights, in matrices as a language model has them."""

    def __init__(self, config: SpeedConfig):
        super().__init__()
        shape, self.config = (2048, 11_008), config
        count = max(1, round(config.gigabytes * 1e9 / (4 * shape[0] * shape[1])))
        self.layers = torch.nn.ParameterList(torch.ones(shape) for _ in range(count))

    def learned_state(self) -> dict[str, torch.Tensor]:
        return self.state_dict()


def measure() -> None:
    """Saves a large state as a run does, and says how long training would have stood still."""
    config = parse_settings(SpeedConfig, None, "torchrun --nproc_per_node=8 -m data.checkpoint FOLDER GIGABYTES")
    device = prepare_device("auto")
    if "RANK" in os.environ:
        join_processes("nccl" if device.type == "cuda" else "gloo")
    model = Weights(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = Saver(Path(config.folder), model, optimizer, {})
    for p in list(model.parameters())[saver.rank :: saver.world_size]:  # as ZeroRedundancyOptimizer shares it out
        optimizer.state[p] = {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
    owned = together(lambda: own(saver.run_dir) if saver.rank == 0 else None)
    say(f"{3 * config.gigabytes:g} GB by {saver.world_size} processes")
    for step in (1, 2):  # the first allocates what the others use again
        saver.begin(step)
        start = time.perf_counter()
        saver.end()
        if not saver.saved:
            leave(1)
        say(f"{time.perf_counter() - start:.1f} s later it is on the disk")
    saver.close()
    if owned:
        owned[0].close()


if __name__ == "__main__":
    run(measure)
