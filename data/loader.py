"""
Images and captions from tar shards (KEY.jpg + KEY.txt, as img2dataset writes them) or plain folders (NAME.png with
NAME.txt), by random access: any training step's batch can be fetched directly, so a run resumes at any step at once.
"""

import io
import json
import os
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")


def find_images(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted; hidden files (thumbnail caches and the like) are not looked at."""
    found = [p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".")]
    return sorted(p for p in found if p.is_file())


def open_image(file, size: int | None = None) -> Image.Image:
    """Opens any picture as RGB: upright (EXIF), transparency on white, 16 bits scaled to 8, first frame of animations.

    file: path or binary file. size: the side in pixels that will be needed; lets JPEG decode large originals smaller.
    Raises OSError, ValueError or Image.DecompressionBombError when it cannot be read.
    """
    try:
        with Image.open(file) as image:
            if size:
                image.draft("RGB", (size, size))
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits; Pillow would clip instead of scaling
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (SyntaxError, EOFError, ArithmeticError, IndexError, KeyError, TypeError) as error:  # Pillow, on broken files
        raise OSError(f"broken image: {error}") from error


def crop_image(image: Image.Image, size: int) -> torch.Tensor:
    """The centre square, resized to (3, size, size) uint8. Cropped before it is resized: a very narrow picture would
    otherwise become enormous."""
    # with reducing_gap Pillow shrinks large pictures in two steps, several times faster and hardly visible
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if (side, image.size) != (size, (size, size)):
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ImageTextDataset(torch.utils.data.Dataset):
    """Items {"image": (3, size, size) uint8, "caption": str or None, "skipped": [sentence, ...]}.

    folder: holds *.tar shards at any depth, or else images. with_captions: an image without one counts as broken.
    A sample that cannot be read is skipped for the next readable one, and named in that item's "skipped".
    Raises ValueError when there is nothing to read.
    """

    def __init__(self, folder: str | Path, size: int, with_captions: bool = False):
        self.folder, self.size, self.with_captions = Path(folder), size, with_captions
        if not self.folder.is_dir():
            raise ValueError(f"data folder {folder} does not exist; make it, or name another with --data/--val_data")
        self.shards = sorted(self.folder.rglob("*.tar"))
        self.files = [] if self.shards else find_images(self.folder)
        self.index = load_index(self.folder, self.shards) if self.shards else None
        if not len(self):
            raise ValueError(f"data folder {folder} holds neither images nor tar shards with images")

    def __len__(self):
        return len(self.index) if self.shards else len(self.files)

    def __getitem__(self, i):
        skipped = []
        for attempt in range(min(len(self), 1000)):
            try:
                return {**self.read((i + attempt) % len(self)), "skipped": skipped}
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                skipped.append(str(error))
        raise RuntimeError(f"{len(skipped)} samples in a row cannot be read in {self.folder}; the last: {skipped[-1]}")

    def read(self, i) -> dict:
        """Sample i itself. Raises OSError or ValueError, with its name, when it cannot be read."""
        if self.shards:
            shard, image_at, image_size, text_at, text_size = (int(v) for v in self.index[i])
            with open(self.shards[shard], "rb") as file:
                # a member's header, which begins with its name, lies 512 bytes before its data
                name, data, text = (
                    os.pread(file.fileno(), *span)
                    for span in [(100, image_at - 512), (image_size, image_at), (text_size, text_at)]
                )
            name, source = f"{self.shards[shard]}:{name.rstrip(bytes(1)).decode(errors='replace')}", io.BytesIO(data)
            text = text.decode(errors="replace") if text_at else None
        else:
            name = source = self.files[i]
            text_file = name.with_suffix(".txt")
            text = text_file.read_text(errors="replace") if self.with_captions and text_file.exists() else None
        if self.with_captions and not (text and text.strip()):
            raise ValueError(f"{name}: no caption")
        try:
            image = crop_image(open_image(source, self.size), self.size)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise OSError(f"{name}: {error}") from error
        return {"image": image, "caption": text.strip() if text else None}


def load_index(folder: Path, shards: list[Path]) -> np.ndarray:
    """(n, 5) int64, memory-mapped: shard, image offset, image size, text offset, text size; 0, 0 where there is no
    text. Built once, kept in `folder`, built again when a shard has changed."""
    array_file, stamp_file = folder / "index.npy", folder / "index.json"
    stamp = json.dumps([[str(s.relative_to(folder)), s.stat().st_size, s.stat().st_mtime_ns] for s in shards])
    if array_file.exists() and stamp_file.exists() and stamp_file.read_text() == stamp:
        return np.load(array_file, mmap_mode="r")
    rows = []
    for number, path in enumerate(tqdm(shards, desc=f"indexing {folder}", unit=" shards", disable=len(shards) < 10)):
        samples = {}  # key: [image offset, image size, text offset, text size]
        size = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    key, ending = os.path.splitext(member.name)
                    at = 0 if ending.lower() in IMAGE_ENDINGS else 2 if ending == ".txt" else None
                    if member.isfile() and at is not None and member.offset_data + member.size <= size:
                        samples.setdefault(key, [0, 0, 0, 0])[at : at + 2] = member.offset_data, member.size
        except (tarfile.TarError, OSError, EOFError) as error:
            print(f"{path} is broken ({error}): {len(samples)} samples before the break are used")
        rows += [[number, *spans] for spans in samples.values() if spans[0]]
    index = np.array(rows, dtype=np.int64).reshape(-1, 5)
    try:
        stamp_file.unlink(missing_ok=True)
        for file, write in [(array_file, lambda f: np.save(f, index)), (stamp_file, lambda f: f.write(stamp.encode()))]:
            with open(f"{file}.{os.getpid()}", "wb") as f:
                write(f)
            os.replace(f.name, file)
    except OSError:  # a read-only disk: index again next time
        pass
    return index


@lru_cache(maxsize=2)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def batch_indices(length: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The samples of a step's global batch: shuffled over everything, each once an epoch, a function of seed and step
    alone, whatever the number of processes."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(permutation(length, seed, p // length)[p % length]) for p in positions]


def collate(items: list[dict]) -> dict:
    """{"image": (B, 3, S, S) uint8, "caption": [str], "skipped": [sentence]}"""
    return {
        "image": torch.stack([item["image"] for item in items]),
        "caption": [item["caption"] for item in items],
        "skipped": [sentence for item in items for sentence in item["skipped"]],
    }
