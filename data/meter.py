"""
How fast a run is, and what it will cost.
"""

import resource
import sys
import time

import torch


def peak_memory(device: torch.device) -> float:
    """GB: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Meter:
    """A run's clock. It times steps alone, not validation, pictures and saves between them.

    flops: of one image, forward and backward. batch_size: images a step, over all processes. total: images of
    the whole stage."""

    def __init__(self, flops, batch_size: int, total: int, processes: int, device, usd_per_gpu_hour: float):
        self.flops, self.batch_size, self.total, self.processes = flops, batch_size, total, processes
        self.device, self.usd_per_gpu_hour = device, usd_per_gpu_hour
        self.warm_up = 2 if device.type == "cuda" else 1  # steps in which kernels are compiled and chosen
        self.seconds, self.waited, self.logged = [], [], 0  # of each step; how many the log has

    def start_step(self) -> None:
        self.began = time.perf_counter()
        self.waited.append(0.0)

    def next(self, loader) -> dict:
        """The loader's next batch."""
        start = time.perf_counter()
        batch = next(loader)
        self.waited[-1] += time.perf_counter() - start
        return batch

    def end_step(self) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        if self.device.type == "cuda" and len(self.seconds) == self.warm_up:
            torch.cuda.reset_peak_memory_stats()

    def speed(self, first: int) -> dict[str, float]:
        """Of the steps from number `first` on."""
        seconds = sum(self.seconds[first:])
        return {"images_per_second": len(self.seconds[first:]) * self.batch_size / seconds,
                "waiting_for_data": sum(self.waited[first:]) / seconds}

    def since_logged(self) -> dict[str, float]:
        """speed() of the steps since the last call."""
        first, self.logged = self.logged, len(self.seconds)
        return self.speed(first)

    def summary(self) -> str:
        """A sentence about all steps but the warm-up's."""
        if len(self.seconds) <= self.warm_up:
            return "too few steps to say how fast they are"
        rate, waiting = self.speed(self.warm_up).values()
        each, hours = rate / self.processes, self.total / rate / 3600
        dollars = hours * self.processes * self.usd_per_gpu_hour
        return (f"{rate:,.3g} images/s ({each:.3g} a process), {waiting:.0%} of the time waiting for data |"
                f" {self.flops / 1e12:.3g} TFLOP an image, {each * self.flops / 1e12:.3g} TFLOP/s a process |"
                f" {peak_memory(self.device):.1f} GB at the peak | the whole stage:"
                f" {f'{hours:,.1f} h' if hours >= 1 else f'{60 * hours:.0f} min'},"
                f" ${dollars:,.0f} at ${self.usd_per_gpu_hour:.2f} a GPU-hour")
