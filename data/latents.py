"""
Computes the moments of every image's latents ahead, so that training reads them instead of running the VAE:

    python data/latents.py data/laion                                   # then train.py --latents
    torchrun --nproc_per_node=8 data/latents.py data/laion              # the same, on eight GPUs

writes latents.npy, (images, 2C, S / 8, S / 8) half precision, beside the data: 37 kB an image of 384 pixels
(147 kB of SD 3).
Mean and log-variance are kept, not a sample: each visit draws anew from the posterior, as it does without
this. A killed run goes on where it was by the same command, which also tries again what could not be read.
Until it can, such an image has no latents, and training skips and names it.
"""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.distributed import RANK, WORLD_SIZE, all_gather, exit_run, init_process_group, main_rank_first
from data.distributed import on_every_rank, print_once, run_and_exit, select_device, start_workers
from data.loader import ImageTextDataset, describe_latents, load_latents
from data.settings import Count, Pixels, NonNegative, read_settings, write_json
from vlv import VLVConfig, load_decoder, select_dtype

DONE, UNREADABLE = 1, 2  # of an image, in latents.done.npy; 0: to do


@dataclass
class LatentsConfig:
    data: str
    diffusion_model: str = VLVConfig.diffusion_model
    image_size: Pixels = VLVConfig.image_size
    resize: Literal["bicubic", "bilinear"] = VLVConfig.resize  # as of the VLV that is trained
    batch_size: Count = 64
    num_workers: NonNegative = 4


def make_files(dataset: ImageTextDataset, model: str, shape: tuple) -> None:
    """Makes the files, unless they are there already and of the same images."""
    with suppress(ValueError):
        load_latents(dataset, model, "r+")
        return
    folder = dataset.folder
    (folder / "latents.json").unlink(missing_ok=True)
    array = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, shape)
    with open(folder / "latents.npy", "r+b") as file:  # now, and not by a signal when the disk is full
        os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    np.save(folder / "latents.done.npy", np.zeros(shape[0], np.uint8))
    write_json(folder / "latents.json", describe_latents(dataset, model))


@torch.inference_mode()
def main(argv=None):
    config = read_settings(LatentsConfig, argv, __doc__)
    device = select_device("auto")
    init_process_group("gloo", hours=720)  # who is done waits for the others
    dataset = main_rank_first(lambda: ImageTextDataset(config.data, config.image_size, resize=config.resize))
    dataset.attempts = 1  # what cannot be read gets no latents
    model = VLVConfig(diffusion_model=config.diffusion_model, image_size=config.image_size, num_queries=1)
    dtype = select_dtype("auto", device)
    decoder = on_every_rank(lambda: load_decoder(model, dtype, with_unet=True)).to(device)
    for problem in dataset.problems:
        print_once(problem)
    channels, *size = decoder.latent_shape
    shape = (len(dataset), 2 * channels, *size)
    on_every_rank(lambda: make_files(dataset, config.diffusion_model, shape) if RANK == 0 else None)
    moments, done = on_every_rank(lambda: load_latents(dataset, config.diffusion_model, "r+"))

    to_do = np.flatnonzero(done != DONE)  # in order: neighbours lie beside each other on the disk
    batches = [to_do[first : first + config.batch_size] for first in range(0, len(to_do), config.batch_size)]
    batches = batches[RANK::WORLD_SIZE]
    loader = start_workers(dataset, batches, config.num_workers, collate_fn=list)
    finished, unreadable = [], []
    bar = tqdm(batches, desc="latents", unit="batch", disable=RANK > 0)
    for number, batch in enumerate(bar, 1):
        items = dict(zip(batch, next(loader)))
        images = {i: item["image"] for i, item in items.items() if not item["unreadable"]}
        if images:
            values = decoder.encode_image(torch.stack([*images.values()]).to(device)).half().cpu().numpy()
            # what is too large for half precision would read as missing
            moments[[*images]] = np.clip(values, np.finfo(np.float16).min, np.finfo(np.float16).max)
            finished += images
        for i, item in items.items():
            if item["unreadable"]:
                moments[i] = np.nan
                tqdm.write(f"not read: {item['skipped'][0]}")
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
