"""
The processes of a run: how they join, agree, ask each other, and leave. One process is a run, too.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

PARENT = os.getppid()  # torchrun, where it started this process
SIGNALS = []  # what asked this process to save and leave
BAD_STEPS = 10  # so many non-finite steps in a row end a training run
ASKS_TO_LEAVE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def rank_and_world_size() -> tuple[int, int]:
    """This process's number, and how many torchrun started on all machines."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(sentence: str) -> None:
    """Prints, on the first process, above a progress bar."""
    if rank_and_world_size()[0] == 0:
        tqdm.write(sentence)


def prepare_device(device: str) -> torch.device:
    """This process's device, of cuda, cpu or auto (cuda where there is a GPU for each process, else cpu). Raises ValueError
    when it is not there."""
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if device == "cpu" or device == "auto" and gpus < local_world_size:
        if local_world_size > 1:  # processes that each take every core slow each other down tenfold
            torch.set_num_threads(max(1, os.cpu_count() // local_world_size))
        return torch.device("cpu")
    if local_world_size > gpus:
        where = "no CUDA GPU is here" if not gpus else f"{local_world_size} processes were started, but {gpus} GPUs are here"
        raise ValueError(f"{where}: start with --nproc_per_node={max(1, gpus)} where there are GPUs, or add --device cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def to_device(x: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """x on the device, or None for None. From pinned memory, so that the host does not wait for a GPU."""
    if x is None or device.type != "cuda":
        return x if x is None else x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def join_processes(backend: str, patience: timedelta = timedelta(hours=1)) -> None:
    """Makes the process group of all that torchrun started, and waits for them. patience: how long one may wait for another,
    which may be indexing a new data folder."""
    # After a restart torchrun may hand out the old store, with the addresses of the dead in it: each attempt writes under
    # its own number. (Machines count attempts apart; for several the README has another way.)
    store, rank, world_size = next(rendezvous("env://", timeout=patience))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
    dist.barrier()
    watch_torchrun()


def share_work() -> tuple[int, int, torch.device]:
    """(rank, number of processes, device) of a process that does its share of work without gradients. Who is done waits for the
    others as long as they take. Raises ValueError as prepare_device does."""
    rank, world_size = rank_and_world_size()
    device = prepare_device("auto")
    if world_size > 1:
        join_processes("gloo", timedelta(days=30))
    return rank, world_size, device


def watch_torchrun() -> None:
    """Has this process save and leave when torchrun is gone (killed, or out of memory): nobody else would end it, and it
    would go on holding its GPU. Where it waits in vain for the others, it dies."""

    def watch():
        while os.getppid() == PARENT:
            time.sleep(1)
        SIGNALS.append("the end of torchrun")
        time.sleep(120)
        os.write(2, b"error: torchrun is gone, and the other processes do not answer; go on with --resume\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def gather(value) -> list:
    """Every process's value, by rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def together(task):
    """task() on every process. Where it fails on any, all leave, and each reason is said once."""
    result = problem = None
    try:
        result = task()
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = sorted({p for p in gather(problem) if p})
    if problems:
        leave(f"error: {'; '.join(problems)}")
    return result


def over_processes(values, device: torch.device, op=dist.ReduceOp.SUM) -> list[float]:
    """The sum of each value, a number or a scalar tensor, over all processes; or its greatest, with ReduceOp.MAX."""
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64).to(device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values.tolist()


class Watch:
    """What the processes of a training run must decide alike: whether a step counts, and whether the run goes on.

    counts: whether the step is one, that is, every loss and gradient is finite and every image could be read.
    error: why the run ends without another save. reason: why it saves and ends. is_saving: whether a process still writes a
    checkpoint.
    """

    def __init__(self, run_dir, max_steps: int, device: torch.device):
        self.run_dir, self.max_steps, self.device, self.unreadable = run_dir, max_steps, device, None
        self.skipped, self.not_finite, self.in_a_row = 0, 0, 0  # samples of this process; steps
        self.error = self.reason = None

    def see(self, batch: dict) -> None:
        """Notes what the loader says of a micro-batch."""
        self.skipped += len(batch["skipped"])
        self.unreadable = self.unreadable or batch["unreadable"]

    def agree(self, step: int, numbers: torch.Tensor, is_saving: bool) -> None:
        """After a step's backward pass; the one look at the device a step. numbers: its losses and the gradient's norm."""
        flags = [~numbers.isfinite().all(), bool(SIGNALS), self.unreadable is not None, is_saving]
        not_finite, signalled, unreadable, self.is_saving = map(bool, over_processes(flags, self.device, dist.ReduceOp.MAX))
        self.counts = not (not_finite or unreadable)
        self.not_finite += not_finite
        self.in_a_row = self.in_a_row + 1 if not_finite else 0
        if unreadable:
            self.error = "error: " + "; ".join(sorted({sentence for sentence in gather(self.unreadable) if sentence}))
        elif self.in_a_row == BAD_STEPS:
            self.error = (f"error: loss or gradient was not finite {BAD_STEPS} steps in a row, up to step {step:,}; the last checkpoint"
                          f" in {self.run_dir} is untouched by them: look at the data, or lower the learning rate")  # fmt: skip
        elif signalled and step < self.max_steps:
            causes = sorted({cause for causes in gather(SIGNALS) for cause in causes})
            self.reason = f"stopped by {' and '.join(causes)} after step {step:,}"

    def count_skipped(self, step: int, seen: int) -> int:
        """How many of the `seen` samples were skipped, by all processes; more than one in a hundred end the run."""
        skipped = int(over_processes([self.skipped], self.device)[0])
        if skipped > 10 + 0.01 * seen:
            self.reason = (f"error: {skipped:,} of {seen:,} samples could not be read: see {self.run_dir}/skipped.txt and mend the"
                           f" data; stopped after step {step:,}")  # fmt: skip
        return skipped


def one_first(task):
    """together(task), but on each machine one process goes before the others, who find what it made."""
    goes_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = together(lambda: task() if goes_first else None)
    return together(lambda: result if goes_first else task())


def leave(sentence, alone: bool = False):
    """Ends the program for a reason that a restart does not mend, so torchrun is told not to try one. One process says why;
    alone: this one, as the others do not know of it."""
    is_local_main = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not dist.is_initialized() and not is_local_main:
        time.sleep(60)  # the first process of this machine finds the same, and says so; then torchrun ends this one
    if (alone or is_local_main) and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.getppid() == PARENT:
        for number in ASKS_TO_LEAVE:
            signal.signal(number, signal.SIG_IGN)
        os.kill(PARENT, signal.SIGTERM)
    says = alone or (dist.get_rank() == 0 if dist.is_initialized() else is_local_main)
    sys.exit(str(sentence) if says else 1)


def listen_to_signals() -> None:
    """From now on a signal to leave is noted in SIGNALS."""
    for number in ASKS_TO_LEAVE:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, lambda number, frame: SIGNALS.append("a signal"))


def start_workers(loader: torch.utils.data.DataLoader):
    """The loader's iterator. torchrun, terminals and clusters signal its processes, too, when they ask a run to leave; these
    are deaf to that, as the step that is under way needs them, and end with the run."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKS_TO_LEAVE)  # which a child inherits
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKS_TO_LEAVE)
        atexit.register(end_workers)


def end_workers() -> None:
    """Python would ask them to leave, too, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def run(main, stopped: str = "stopped before there was anything to save") -> None:
    """Runs a program that other processes take part in, and ends this one. At once: where another was killed, Python's way
    of ending waits for it for ever. So would destroy_process_group, now and then: DDP then holds gloo's group last, whose
    destructor waits for a thread that waits for Python's lock (torch 2.13). Nobody calls it."""
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    code = 0
    try:
        try:
            main()
        except torch.OutOfMemoryError as error:
            leave("error: the GPU's memory is full: lower the (micro-)batch size; train.py also has --gradient_checkpointing"
                  f" unet bart llm ({error})", alone=True)  # fmt: skip
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    end_workers()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


class Unbreakable:
    """A stream whose errors do not end a run: a log on a full disk, a closed pipe."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            return 0

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            pass
