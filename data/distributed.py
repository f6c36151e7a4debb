"""The processes that torchrun started: their devices, agreement, signals and end."""

import atexit
import os
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from contextlib import suppress
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

PARENT = os.getppid()  # torchrun, if it started this process
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # each asks a run to save and exit
# What torchrun says: RANK among all processes, LOCAL_RANK among those of this machine
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE, LOCAL_WORLD_SIZE = (int(os.environ.get(f"{name}WORLD_SIZE", 1)) for name in ("", "LOCAL_"))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
exit_reasons = []  # why this process was asked to exit


class Stream:
    """stdout or stderr of a program that goes on when nobody reads it any more, or its disk is full, or it is
    closed, or knows ASCII alone."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        with suppress(AttributeError):  # of a notebook
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def quiet() -> None:
    """For commands: printing never fails, and libraries keep to themselves what a user cannot change."""
    if not isinstance(sys.stdout, Stream):
        sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    warnings.filterwarnings("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def print_once(text: str) -> None:
    """Prints on rank 0, above the progress bar."""
    if RANK == 0:
        tqdm.write(text)


def select_device(name: str) -> torch.device:
    """This process's device. auto: cuda if there is a GPU for each process, else mps (a Mac's GPU), else cpu.
    Raises ValueError if the device is not here."""
    is_here = {"cuda": torch.cuda.device_count() >= LOCAL_WORLD_SIZE,
               "mps": torch.backends.mps.is_available() and LOCAL_WORLD_SIZE == 1, "cpu": True}
    if name == "auto":
        name = next(name for name in is_here if is_here[name])
    if not is_here[name]:
        raise ValueError(f"{name} is not here for each of {LOCAL_WORLD_SIZE} processes (CUDA GPUs here:"
                         f" {torch.cuda.device_count()}): change --nproc_per_node, or add --device cpu")
    if name == "cuda":
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        return device
    if LOCAL_WORLD_SIZE > 1:  # processes that each take every core slow each other down tenfold
        torch.set_num_threads(max(1, os.cpu_count() // LOCAL_WORLD_SIZE))
    return torch.device(name)


def compile_if_possible(model, device: torch.device) -> bool:
    """Compiles a VLV on a GPU on which torch.compile works: it needs Triton, a C compiler, Python's headers.
    What of the model cannot be compiled runs eagerly, and torch says so. Returns whether it was compiled."""
    if device.type != "cuda":
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # of any of its layers
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        print_once(f"note: torch.compile does not work here, so this is slower: {reason}")
        return False
    torch._dynamo.config.suppress_errors = True
    model.compile()
    return True


def init_process_group(backend: str, hours: int = 1) -> None:
    """Joins the other processes, if any. hours: how long one waits for another, as for its index."""
    timeout = timedelta(hours=hours)
    if WORLD_SIZE == 1:
        return
    store = next(rendezvous("env://", timeout=timeout))[0]
    if LOCAL_WORLD_SIZE == WORLD_SIZE:
        # after a restart torchrun hands out the same store, with the addresses of the dead in it
        store = dist.PrefixStore(f"restart {RESTARTS}", store)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=timeout)
    all_gather(None)  # all are there
    threading.Thread(target=follow_parent, args=(PARENT, 120), daemon=True).start()


def follow_parent(parent: int, seconds: float) -> None:
    """Ends this process after its parent: within so many seconds, in which a run saves and exits."""
    while os.getppid() == parent:
        time.sleep(1)
    exit_reasons.append("the end of torchrun")
    time.sleep(seconds)
    os._exit(1)


def note_signals() -> None:
    """From now on a signal is noted in `exit_reasons`, and the run exits after its step."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, lambda number, frame: exit_reasons.append("a signal"))


def init_worker(worker: int) -> None:
    """Signals reach a loader's workers, too, but the step that is under way needs them; so they end with the
    process that started them, also where they wait for a pipe that nobody reads any more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # through a pipe: shared memory may be small (64 MB in a container), and a kill leaves it behind
    ForkingPickler.register(torch.Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))
    threading.Thread(target=follow_parent, args=(os.getppid(), 0), daemon=True).start()


def start_workers(dataset, batches, num_workers: int, **kwargs):
    """An iterator over a DataLoader. batches: lists of indices. Not just after the processes have spoken: a
    child that is forked while gloo's thread lets go of a tensor waits for ever for a lock of Python's
    (CPython 3.11)."""
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=num_workers,
                                         worker_init_fn=init_worker, **kwargs)
    if dist.is_initialized():
        time.sleep(0.5)
    try:
        iterator = iter(loader)
    except OSError as error:
        sys.exit(f"error: no process can be started to load data ({error}): --num_workers 0 does without")
    if num_workers:  # Python's end would send them SIGTERM, which they ignore, and wait for ever
        end = weakref.WeakMethod(iterator._shutdown_workers)
        # the queues are held, as the garbage collector may else close them before it tells the workers to end
        atexit.register(lambda queues=iterator._index_queues: end() and end()())
    return iterator


def all_gather(value) -> list:
    """Every process's value, by rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def all_reduce(values: list, device: torch.device, op=dist.ReduceOp.SUM) -> list[float]:
    """The sum (ReduceOp.MAX: the greatest) of each number or scalar tensor over all processes."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    values = torch.stack([torch.as_tensor(value, dtype=dtype).to(device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values.tolist()


def on_every_rank(task):
    """task() on every process. If one raises ValueError or OSError, all exit, and the reason is said."""
    result = problem = None
    try:
        result = task()
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = sorted({p for p in all_gather(problem) if p})
    if problems:
        exit_run(f"error: {'; '.join(problems)}")
    return result


def main_rank_first(task):
    """on_every_rank(task), but one process of each machine goes first; the others find what it made."""
    result = on_every_rank(lambda: task() if LOCAL_RANK == 0 else None)
    return on_every_rank(lambda: task() if LOCAL_RANK else result)


def exit_run(sentence: str, run_dir: Path | None = None) -> None:
    """Exits on every rank; the first says why. run_dir: the reason goes into its stopped.txt, where
    torchrun's restarts find it and exit, too."""
    rank = RANK if dist.is_initialized() else LOCAL_RANK
    if rank > 0 and not dist.is_initialized():
        time.sleep(60)  # torchrun ends this process once the first one has spoken
    if rank == 0 and run_dir:
        with suppress(OSError):
            (run_dir / "stopped.txt").write_text(sentence + "\n", encoding="utf-8", errors="backslashreplace")
    sys.exit(1 if rank else sentence)


def run_and_exit(main, interrupted: str) -> None:
    """Runs a program and ends this process at once. Python's own way waits for processes that were killed; so
    does destroy_process_group, now and then, in torch 2.13."""
    quiet()
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except torch.OutOfMemoryError as error:
        code = ("error: the GPU's memory is full: lower the (micro-)batch size; train.py also has"
                f" --gradient_checkpointing unet bart llm ({error})")
    except KeyboardInterrupt:
        code = interrupted
    except BaseException:
        code = traceback.format_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(code, str) else code or 0)
