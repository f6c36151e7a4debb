"""
Computes the moments of every image's latents ahead, so that training reads them instead of running the VAE:

    python data/latents.py data/laion                                   # then train.py --latents
    torchrun --nproc_per_node=8 data/latents.py data/laion              # the same, on eight GPUs

writes latents.npy, (images, 8, S / 8, S / 8) half precision, beside the data: 37 kB an image of 384 pixels.
Mean and log-variance are kept, not a sample: each visit draws anew from the posterior, as it does without
this. A killed run goes on where it was by the same command, which also tries again what could not be read.
Until it can, such an image has no latents, and training skips and names it.
"""

import json
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.distributed import all_gather, exit_run, init_process_group, init_worker, main_rank_first
from data.distributed import on_every_rank, print_once, quiet, rank_and_world_size, run_and_exit
from data.distributed import select_device, start_workers
from data.loader import ImageTextDataset, describe_latents
from data.settings import Count, Pixels, NonNegative, read_settings
from vlv import VLVConfig, load_decoder

TO_DO, DONE, UNREADABLE = 0, 1, 2  # of an image, in latents.done.npy


@dataclass
class LatentsConfig:
    data: str
    diffusion_model: str = VLVConfig.diffusion_model
    image_size: Pixels = VLVConfig.image_size
    resize: Literal["bicubic", "bilinear"] = VLVConfig.resize  # as of the VLV that is trained
    batch_size: Count = 64
    num_workers: NonNegative = 4


class IndexedImages(torch.utils.data.Dataset):
    """Index -> (index, image or None, why it cannot be read or None)."""

    def __init__(self, dataset: ImageTextDataset):
        self.dataset = dataset

    def __getitem__(self, i):
        try:
            return i, self.dataset.read(i)["image"], None
        except OSError as error:
            return i, None, " ".join(str(error).split())


def open_files(folder: Path) -> list[np.ndarray]:
    """[moments, done], memory-mapped."""
    return [np.load(folder / name, mmap_mode="r+") for name in ("latents.npy", "latents.done.npy")]


def make_files(folder: Path, made_of: dict, shape: tuple) -> None:
    """Makes the files, unless they are there already and of the same images."""
    try:
        moments, done = open_files(folder)
        same = json.loads((folder / "latents.json").read_text()) == made_of
        if same and moments.shape == shape and done.shape == shape[:1]:
            return
    except (OSError, ValueError):  # none, or not whole
        pass
    (folder / "latents.json").unlink(missing_ok=True)
    array = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, shape)
    with open(folder / "latents.npy", "r+b") as file:  # now, and not by a signal when the disk is full
        os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    np.save(folder / "latents.done.npy", np.zeros(shape[0], np.uint8))
    (folder / "latents.json").write_text(json.dumps(made_of))


@torch.inference_mode()
def main(argv=None):
    config = read_settings(LatentsConfig, argv, __doc__)
    quiet()
    rank, world_size = rank_and_world_size()
    device = select_device("auto")
    if world_size > 1:
        init_process_group("gloo", timedelta(days=30))  # who is done waits for the others
    dataset = main_rank_first(lambda: ImageTextDataset(config.data, config.image_size, resize=config.resize))
    model = VLVConfig(diffusion_model=config.diffusion_model, image_size=config.image_size, num_queries=1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decoder = on_every_rank(lambda: load_decoder(model, dtype, with_unet=True)).to(device)
    for problem in dataset.problems:
        print_once(problem)
    channels, *size = decoder.latent_shape
    shape, made_of = (len(dataset), 2 * channels, *size), describe_latents(dataset, config.diffusion_model)
    on_every_rank(lambda: make_files(dataset.folder, made_of, shape) if rank == 0 else None)
    moments, done = on_every_rank(lambda: open_files(dataset.folder))

    to_do = np.flatnonzero(done != DONE)  # in order: neighbours lie beside each other on the disk
    batches = [to_do[first : first + config.batch_size] for first in range(0, len(to_do), config.batch_size)]
    batches = batches[rank::world_size]
    loader = torch.utils.data.DataLoader(IndexedImages(dataset), batch_sampler=batches, collate_fn=list,
                                         num_workers=config.num_workers, worker_init_fn=init_worker)
    finished, unreadable = [], []
    bar = tqdm(start_workers(loader), desc="latents", unit="batch", total=len(batches), disable=rank > 0)
    for number, items in enumerate(bar, 1):
        images = {i: image for i, image, _ in items if image is not None}
        if images:
            values = decoder.encode_image(torch.stack([*images.values()]).to(device)).half().cpu().numpy()
            # what is too large for half precision would read as missing
            moments[[*images]] = np.clip(values, np.finfo(np.float16).min, np.finfo(np.float16).max)
            finished += images
        for i, image, problem in items:
            if image is None:
                moments[i] = np.nan
                tqdm.write(f"not read: {problem}")
                unreadable.append(i)
        if number % 100 == 0 or number == len(batches):
            moments.flush()  # on the disk before it counts as done
            done[finished], done[unreadable] = DONE, UNREADABLE
            done.flush()
            finished = []
    count = sum(all_gather(len(unreadable)))
    if count:
        exit_run(f"error: {count:,} of {len(dataset):,} images could not be read; the same command tries them"
                 " again, and training skips those that are left")


if __name__ == "__main__":
    run_and_exit(main, "stopped; the same command goes on")
