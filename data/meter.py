"""
How fast a run is, and what it will cost.
"""

import math
import resource
import time
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCounter(TorchDispatchMode):
    """Adds up, in `flops`, what torch's formulas say of each operation that runs in it. (So does torch's FlopCounterMode; what it
    does beside that takes many times as long as a small model itself, at the start of each run.)"""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(operation, "overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured: what a perfect program could reach here."""
    n, repeats = (8192, 30) if device.type == "cuda" else (1024, 1)
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


@dataclass
class Timed:
    """Seconds that so many steps took, and how many of them went by waiting for data."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class Meter:
    """A run's clock. It counts the time of steps alone, not of validation, pictures and saves between them.

    flops: that one image needs, forward and backward. batch_size: images a step, over all processes. images: of the whole stage.
    """

    def __init__(self, flops: int, batch_size: int, images: float, processes: int, device: torch.device, usd_per_gpu_hour: float):
        self.flops, self.batch_size, self.images, self.processes = flops, batch_size, images, processes
        self.device, self.usd_per_gpu_hour = device, usd_per_gpu_hour
        self.peak = matrix_peak(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.warm_up = 2 if device.type == "cuda" else 1  # steps, in which kernels are compiled and chosen; the sentence leaves them out
        self.lap, self.all, self.waited = Timed(), Timed(), 0.0

    def start_step(self) -> None:
        self.began, self.waited = time.perf_counter(), 0.0

    def wait(self, loader) -> dict:
        """The next batch."""
        before = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - before
        return batch

    def end_step(self) -> None:
        seconds = time.perf_counter() - self.began
        if self.warm_up:
            self.warm_up -= 1
            if self.device.type == "cuda" and not self.warm_up:
                torch.cuda.reset_peak_memory_stats()
            counts = [self.lap]
        else:
            counts = [self.lap, self.all]
        for timed in counts:
            timed.steps, timed.seconds, timed.waited = timed.steps + 1, timed.seconds + seconds, timed.waited + self.waited

    def end_lap(self) -> dict:
        """What the log says of the steps since the last call."""
        lap, self.lap = self.lap, Timed()
        return {"images_per_second": lap.steps * self.batch_size / lap.seconds, "waiting_for_data": lap.waited / lap.seconds}

    def sentence(self) -> str:
        """Of the run so far."""
        if not self.all.steps:
            return "too few steps to say how fast they are"
        rate = self.all.steps * self.batch_size / self.all.seconds
        each = rate / self.processes  # images a second
        hours = self.images / rate / 3600
        takes = f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
        dollars = hours * self.processes * self.usd_per_gpu_hour
        return (f"{rate:,.3g} images/s ({each:.3g} a process), {self.all.waited / self.all.seconds:.0%} of the time waiting for data |"
                f" {self.flops / 1e12:.3g} TFLOP an image | {each * self.flops / 1e12:.3g} TFLOP/s a process,"
                f" {each * self.flops / self.peak:.0%} of the {self.peak / 1e12:.3g} TFLOP/s of a large matrix product |"
                f" {peak_memory(self.device):.1f} GB at the peak | the whole stage: {takes},"
                f" ${dollars:,.0f} at ${self.usd_per_gpu_hour:.2f} a GPU-hour")  # fmt: skip
