"""The processes that torchrun starts: their devices, what they agree on, signals, and their end."""

import ctypes
import os
import pickle
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

# What torchrun says: RANK among all processes, LOCAL_RANK among those of this machine
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE, LOCAL_WORLD_SIZE = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # each asks a run to save and end
stop_signals = []  # those that have come
is_running = False  # whether there is something to save
store = None  # where the processes leave word for each other


def print_once(text: str) -> None:
    """Prints on the first process, above the progress bar."""
    if RANK == 0:
        tqdm.write(text)


# --- devices ---------------------------------------------------------------------------------------------


def select_device(name: str) -> torch.device:
    """This process's device. auto: cuda if there is a GPU for each process, else mps (a Mac's GPU), else cpu.
    Raises ValueError if the device is not here."""
    is_here = {"cuda": torch.cuda.device_count() >= LOCAL_WORLD_SIZE,
               "mps": torch.backends.mps.is_available() and LOCAL_WORLD_SIZE == 1, "cpu": True}
    name = next(name for name in is_here if is_here[name]) if name == "auto" else name
    if not is_here[name]:
        raise ValueError(f"{name} is not here for each of {LOCAL_WORLD_SIZE} processes (CUDA GPUs here:"
                         f" {torch.cuda.device_count()}): change --nproc_per_node, or add --device cpu")
    if name == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    elif LOCAL_WORLD_SIZE > 1:  # torchrun says one; all cores for each would slow all down tenfold
        torch.set_num_threads(max(1, os.cpu_count() // LOCAL_WORLD_SIZE))
    return torch.device(name, LOCAL_RANK) if name == "cuda" else torch.device(name)


def select_dtype(precision: str, device: torch.device, checkpoint: Path | None = None) -> torch.dtype:
    """precision: fp32, bf16, fp16; auto: bf16 on GPUs that have it and, for a large checkpoint, on CPUs."""
    if precision == "auto":
        size = sum(file.stat().st_size for file in checkpoint.glob("model*.safetensors")) if checkpoint else 0
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if on_gpu or device.type != "cuda" and size > 5e8 else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def compile_parts(model) -> None:
    """torch.compile of a VLV, part by part: nets as a whole; of layers that repeat, each, which starts
    sooner. The convolutions' weights get the layout that compiled code likes."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each layer at its weights
    convolutional = [model.decoder.vae.encoder, model.decoder.unet] if model.decoder.unet else []
    for net in convolutional:
        net.to(memory_format=torch.channels_last)
    for net in [*model.encoder.davit.values(), *convolutional]:
        net.compile()
    for name, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer) and ".davit." not in name:
            layer.compile(dynamic=True if ".llm." in name else None)  # captions differ in length


# --- processes -------------------------------------------------------------------------------------------


def init_process_group(device: torch.device, hours: int = 1) -> None:
    """Joins the other processes, if any. hours: how long one waits for another."""
    global store
    if WORLD_SIZE > 1:
        timeout, backend = timedelta(hours=hours), "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = next(rendezvous("env://", timeout=timeout))[0]
        if LOCAL_WORLD_SIZE == WORLD_SIZE:
            # Without it no restart works: torchrun hands out the same store, with the addresses of the dead.
            store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=timeout)


def from_first(name: str, make):
    """make() of the first process, which the others wait for and get, too. Before loader workers are forked
    nothing else may be exchanged: gloo's thread may hold a lock of Python's when a child is forked."""
    if WORLD_SIZE == 1:
        return make()
    if RANK == 0:
        store.set(name, pickle.dumps(make()))
    return pickle.loads(store.get(name))


def all_gather(value) -> list:
    """Every process's value, by rank. It waits for all."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def end_with_parent(number: int) -> None:
    """This process gets a signal when its parent ends, however that ends. (Linux.)"""
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


if WORLD_SIZE > 1:
    end_with_parent(signal.SIGTERM)  # which is torchrun


def start_running() -> None:
    """From now on there is something to save: a signal is noted in `stop_signals`, and an error of any kind
    keeps its traceback."""
    global is_running
    is_running = True
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, lambda number, frame: stop_signals.append(number))


def init_worker(worker: int) -> None:
    """Signals reach a loader's workers, too, but the step that is under way needs them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def start_workers(dataset, batches, num_workers: int):
    """An iterator over dataset.__getitems__(indices), a dict, of each list of indices in batches. Batches
    hold NumPy arrays: tensors would go through shared memory, which is small in containers."""
    return iter(torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=num_workers,
                                            collate_fn=dict, worker_init_fn=init_worker))


def quiet() -> None:
    """For commands: libraries keep to themselves what a user cannot change."""
    warnings.filterwarnings("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def run_and_exit(main) -> None:
    """Runs a command. What it refuses before it runs, a ValueError or OSError, is one sentence. The process
    ends at once: Python's own end waits for ever for workers when an exception has left a loader behind."""
    quiet()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a narrow one, as ASCII, gets what it can take
        stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = "stopped; the same command goes on"
    except BaseException as error:
        is_refusal = isinstance(error, (ValueError, OSError)) and not is_running
        code = f"error: {error}" if is_refusal else traceback.format_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    with suppress(OSError, AttributeError):  # nobody reads it any more, or it is closed
        sys.stdout.flush()
    os._exit(1 if isinstance(code, str) else code or 0)
