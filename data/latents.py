"""
Computes the moments of every image's latents ahead, so that training reads them instead of running the VAE:

    python data/latents.py data/laion                                   # then train.py --latents
    torchrun --nproc_per_node=8 data/latents.py data/laion              # the same, on eight GPUs

writes latents.npy, (images, 8, S / 8, S / 8) half precision, beside the data: 37 kB an image of 384 pixels. Mean and
log-variance are kept, not a sample, so each visit draws anew from the posterior, as it does without this. A killed run
goes on where it was, by the same command.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.loader import ImageTextDataset, describe_latents
from sample import quiet
from train import join_processes
from vlv import DiffusionDecoder, VLVConfig


class Batches(torch.utils.data.Dataset):
    """Batch number -> (batch number, images). What cannot be read is black here; training skips it by itself."""

    def __init__(self, dataset: ImageTextDataset, numbers: list[int], batch_size: int):
        self.dataset, self.numbers, self.batch_size = dataset, numbers, batch_size

    def __len__(self):
        return len(self.numbers)

    def read(self, i):
        try:
            return self.dataset.read(i)["image"]
        except (OSError, ValueError):
            return torch.zeros(3, self.dataset.size, self.dataset.size, dtype=torch.uint8)

    def __getitem__(self, k):
        first = self.numbers[k] * self.batch_size
        return first, torch.stack([self.read(i) for i in range(first, min(first + self.batch_size, len(self.dataset)))])


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--diffusion_model", default=VLVConfig.diffusion_model)
    parser.add_argument("--image_size", type=int, default=VLVConfig.image_size)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=4)
    args = parser.parse_args(argv)
    quiet()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    try:
        dataset = ImageTextDataset(args.data, args.image_size)
        config = VLVConfig(diffusion_model=args.diffusion_model, image_size=args.image_size, num_queries=1)
        decoder = DiffusionDecoder(config).to(device, torch.bfloat16 if cuda else torch.float32)
        about, batches = describe_latents(dataset, args.diffusion_model), -(-len(dataset) // args.batch_size)
        paths = [args.data / name for name in ("latents.json", "latents.npy", "latents.done.npy")]
        if rank == 0 and not (paths[0].exists() and json.loads(paths[0].read_text()) == about | {"batch": args.batch_size}):
            paths[0].unlink(missing_ok=True)
            side = args.image_size // decoder.pipeline.vae_scale_factor
            shape = (len(dataset), 2 * decoder.vae.config.latent_channels, side, side)
            array = np.lib.format.open_memmap(paths[1], "w+", np.float16, shape)
            with open(paths[1], "r+b") as file:  # now, and not by a signal when the disk is full
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
            np.save(paths[2], np.zeros(batches, np.uint8))
            paths[0].write_text(json.dumps(about | {"batch": args.batch_size}))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}" if rank == 0 else 1)
    if world_size > 1:
        join_processes("gloo")
    moments, done = np.load(paths[1], mmap_mode="r+"), np.load(paths[2], mmap_mode="r+")
    left = [b for b in range(rank, batches, world_size) if not done[b]]
    loader = torch.utils.data.DataLoader(Batches(dataset, left, args.batch_size), batch_size=None,
                                         num_workers=args.num_workers, pin_memory=cuda)  # fmt: skip
    finished = []
    for first, images in tqdm(loader, desc="latents", unit="batch", disable=rank > 0):
        values = decoder.encode_image(images.to(device, non_blocking=True)).half().cpu().numpy()
        moments[first : first + len(values)] = values
        finished.append(first // args.batch_size)
        if len(finished) % 100 == 0 or len(finished) == len(left):
            moments.flush()  # on the disk before it counts as done
            done[finished] = 1
            done.flush()
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
