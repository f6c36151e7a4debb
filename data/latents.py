"""
Computes the moments of every image's latents ahead, so that training reads them instead of running the VAE:

    python data/latents.py data/laion                                   # then train.py --latents
    torchrun --nproc_per_node=8 data/latents.py data/laion              # the same, on eight GPUs

writes latents/000000.npy, ... beside the data, each (1,024 images, 2C, S / 8, S / 8) in half precision,
complete or absent: 37 kB an image of 384 pixels (147 kB of SD 3). Mean and log-variance are kept, not a
sample: each visit draws anew from the posterior. A killed run goes on by the same command. An image that
cannot be read has no latents, and training skips and names it.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import two_clips  # noqa: F401  for SDXL and SD 3
from data.distributed import RANK, WORLD_SIZE, from_first, init_process_group, print_once, run_and_exit
from data.distributed import select_device, select_dtype, start_workers
from data.loader import LATENTS_A_FILE, ImageTextDataset, describe_latents
from data.settings import Count, NonNegative, Pixels, read_settings, same_as_before, write_atomically
from vlv import VLVConfig, load_decoder


@dataclass
class LatentsConfig:
    data: str
    diffusion_model: str = VLVConfig.diffusion_model
    image_size: Pixels = VLVConfig.image_size
    resize: Literal["bicubic", "bilinear"] = VLVConfig.resize  # as of the VLV that is trained
    batch_size: Count = 64
    num_workers: NonNegative = 4


@torch.inference_mode()
def main(argv=None) -> None:
    config = read_settings(LatentsConfig, argv, __doc__)
    device = select_device("auto")
    init_process_group(device)
    open_data = lambda: ImageTextDataset(config.data, config.image_size, resize=config.resize, replace=False)
    opened = open_data() if RANK == 0 else None  # which writes the index, if there is none
    from_first("index", lambda: None)
    dataset, folder = opened or open_data(), Path(config.data, "latents")
    for problem in dataset.problems:
        print_once(problem)
    about = describe_latents(dataset, config.diffusion_model)
    same_as_before(folder / "settings.json", about, "remove that folder to compute them anew")
    model = VLVConfig(diffusion_model=config.diffusion_model, image_size=config.image_size, num_queries=1)
    decoder = load_decoder(model, select_dtype("auto", device)).to(device)
    side = config.image_size // decoder.pipeline.vae_scale_factor
    shape = (2 * decoder.vae.config.latent_channels, side, side)

    size, files = config.batch_size, {}  # of each file that is to be made the images
    for first in range(0, len(dataset), LATENTS_A_FILE)[RANK::WORLD_SIZE]:
        file = folder / f"{first // LATENTS_A_FILE:06d}.npy"
        if not file.exists():
            files[file] = range(first, min(first + LATENTS_A_FILE, len(dataset)))
    batches = [images[at : at + size] for images in files.values() for at in range(0, len(images), size)]
    loader = start_workers(dataset, batches, config.num_workers)
    for file, indices in tqdm(files.items(), "latents", unit=" files", disable=RANK > 0):
        moments, content = np.full((len(indices), *shape), np.nan, np.float16), io.BytesIO()
        for _ in range(0, len(indices), size):
            batch = next(loader)
            if len(batch["images"]):
                values = decoder.encode_image(torch.from_numpy(batch["images"]).to(device)).float()
                values = values.clamp(-65504, 65504).half()  # what is too large would read as missing
                moments[np.array(batch["indices"]) - indices[0]] = values.cpu().numpy()
            for sentence in batch["skipped"]:
                tqdm.write(f"not read: {sentence}")
        np.save(content, moments)
        write_atomically(file, lambda path: path.write_bytes(content.getvalue()))


if __name__ == "__main__":
    run_and_exit(main)
