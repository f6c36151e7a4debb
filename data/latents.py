"""
Computes the moments of every image's latents ahead, so that training reads them instead of running the VAE:

    python data/latents.py data/laion                                   # then train.py --latents
    torchrun --nproc_per_node=8 data/latents.py data/laion              # the same, on eight GPUs

writes latents.npy, (images, 8, S / 8, S / 8) half precision, beside the data: 37 kB an image of 384 pixels. Mean and
log-variance are kept, not a sample, so each visit draws anew from the posterior, as it does without this. A killed run
goes on where it was, by the same command, which also tries again what could not be read: until it can be, such an image
has no latents, and training skips and names it.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.quiet import quiet  # before what imports transformers
from data.loader import ImageTextDataset, describe_latents
from data.processes import gather, leave, one_first, run, share_work, together
from data.settings import Count, Pixels, Settings, Text, Whole, parse_settings
from vlv import DiffusionDecoder, VLVConfig

TO_DO, DONE, UNREADABLE = 0, 1, 2  # of an image, in latents.done.npy


@dataclass
class LatentsConfig(Settings):
    data: Text
    diffusion_model: Text = VLVConfig.diffusion_model
    image_size: Pixels = VLVConfig.image_size
    batch_size: Count = 64
    num_workers: Whole = 4


class Images(torch.utils.data.Dataset):
    """Index -> (index, image or None, what is wrong with it or None)."""

    def __init__(self, dataset: ImageTextDataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        try:
            return i, self.dataset.read(i)["image"], None
        except (OSError, ValueError) as error:
            return i, None, " ".join(str(error).split())


def collate(items):
    """(indices and images (B, 3, S, S) of those that could be read, [(index, sentence)] of the others)"""
    good = [(i, image) for i, image, _ in items if image is not None]
    images = torch.stack([image for _, image in good]) if good else None
    return [i for i, _ in good], images, [(i, sentence) for i, _, sentence in items if sentence]


def open_files(folder: Path, mode: str) -> list[np.ndarray]:
    """[moments, done], memory-mapped."""
    return [np.load(folder / name, mmap_mode=mode) for name in ("latents.npy", "latents.done.npy")]


def make_files(folder: Path, about: dict, shape: tuple) -> None:
    """Makes the files, unless they are there already and of the same images."""
    try:
        moments, done = open_files(folder, "r")
        if json.loads((folder / "latents.json").read_text()) == about and moments.shape == shape and done.shape == shape[:1]:
            return
    except (OSError, ValueError):  # none, or not whole
        pass
    (folder / "latents.json").unlink(missing_ok=True)
    array = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, shape)
    with open(folder / "latents.npy", "r+b") as file:  # now, and not by a signal when the disk is full
        os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    np.save(folder / "latents.done.npy", np.zeros(shape[0], np.uint8))
    (folder / "latents.json").write_text(json.dumps(about))


@torch.inference_mode()
def main(argv=None):
    config = parse_settings(LatentsConfig, argv, __doc__)
    quiet()
    rank, world_size, device = share_work()
    dataset = one_first(lambda: ImageTextDataset(config.data, config.image_size))
    model = VLVConfig(diffusion_model=config.diffusion_model, image_size=config.image_size, num_queries=1)
    decoder = together(lambda: DiffusionDecoder(model).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32))
    side = config.image_size // decoder.pipeline.vae_scale_factor
    shape = (len(dataset), 2 * decoder.vae.config.latent_channels, side, side)
    about = describe_latents(dataset, config.diffusion_model)
    together(lambda: make_files(dataset.folder, about, shape) if rank == 0 else None)
    moments, done = together(lambda: open_files(dataset.folder, "r+"))

    left = np.flatnonzero(done != DONE)  # neighbours stay together: they lie beside each other in shards and in latents.npy
    batches = [left[at : at + config.batch_size] for at in range(0, len(left), config.batch_size)]
    loader = torch.utils.data.DataLoader(Images(dataset), batch_sampler=batches[rank::world_size], collate_fn=collate,
                                         num_workers=config.num_workers, pin_memory=device.type == "cuda")  # fmt: skip
    finished, problems = [], []
    for number, (indices, images, unreadable) in enumerate(tqdm(loader, desc="latents", unit="batch", disable=rank > 0), 1):
        if indices:
            values = decoder.encode_image(images.to(device, non_blocking=True)).half().cpu().numpy()
            # what is too large for half precision would read as missing
            moments[indices] = np.clip(values, np.finfo(np.float16).min, np.finfo(np.float16).max)
        for i, sentence in unreadable:
            moments[i] = np.nan
            tqdm.write(f"not read: {sentence}")
            problems.append(i)
        finished += indices
        if number % 100 == 0 or number == len(loader):
            moments.flush()  # on the disk before it counts as done
            done[finished], done[problems] = DONE, UNREADABLE
            done.flush()
            finished = []
    unread = sum(gather(len(problems)))
    if unread:
        leave(f"error: {unread:,} of {len(dataset):,} images could not be read; the same command tries them again, and training"
              " skips those that are left")  # fmt: skip
    if world_size > 1:
        dist.barrier()


if __name__ == "__main__":
    run(main)
