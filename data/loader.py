"""
Images and captions from tar shards (KEY.jpg + KEY.txt, as img2dataset writes them) or plain folders (NAME.png with
NAME.txt), by random access: any training step's batch can be fetched directly, so a run resumes at any step at once.
"""

import hashlib
import io
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from data.settings import Pixels, Settings, Text, parse_settings, printable

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")


def find_images(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted; hidden files (thumbnail caches and the like) are not looked at."""
    found = [p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".")]
    return sorted(p for p in found if p.is_file())


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits, which Pillow would clip, as uint8. What white is the file does not say: it is the
    least of 8, 12 and 16 bits that holds the brightest value, and 1 for fractions. Raises ValueError for other ranges."""
    low, high = values.min(), values.max()
    fractions = values.dtype.kind == "f" and high <= 1
    white = next((w for w in ([1] if fractions else [255, 4095, 65535]) if high <= w), None)
    if white is None or not low >= 0:
        raise ValueError(f"its values go from {low:g} to {high:g}; 0 to 1, or 8, 12 or 16 bits are understood")
    if white in (4095, 65535) and values.dtype.kind != "f":
        return (values.astype(np.int64) >> (4 if white == 4095 else 8)).astype(np.uint8)
    return (values * (255 / white)).round().astype(np.uint8)


def open_image(file, size: int | None = None) -> Image.Image:
    """Opens any picture as RGB: upright (EXIF), transparency on white, 16 bits scaled to 8, first frame of animations.

    file: path or binary file. size: the side in pixels that will be needed; lets JPEG decode large originals smaller.
    Raises OSError, ValueError or Image.DecompressionBombError when it cannot be read.
    """
    try:
        with Image.open(file) as image:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            if size:
                image.draft("RGB", (size, size))
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":
                image = Image.fromarray(to_eight_bits(np.asarray(image)))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise OSError(error.strerror) from error
    except Image.DecompressionBombError:
        raise
    except UnidentifiedImageError as error:  # whose own text names an object in memory
        raise OSError("broken image: its format is unknown") from error
    except Exception as error:  # on broken files Pillow's plugins raise whatever they stumble over
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
    """Items {"image": (3, size, size) uint8, "caption": str or None, "moments": (8, size / 8, size / 8) half or None,
    "skipped": [sentence, ...], "unreadable": sentence or None}.

    folder: holds *.tar shards at any depth, or else images. with_captions: an image without one counts as broken.
    captions: the folder of JSON lines that `sample.py --captions_only FOLDER --out CAPTIONS` wrote of the shards. They take the
    place of the texts; images that have none are left out.
    latents_of: the text-to-image model whose moments data/latents.py has computed ahead; None: no moments.
    A sample that cannot be read is skipped for the next readable one, and named in that item's "skipped"; where a thousand
    in a row cannot, "unreadable" says so, and the image is black.
    `fingerprint` is the same as long as the samples are. Raises ValueError when there is nothing to read.
    """

    def __init__(self, folder: str | Path, size: int, with_captions=False, latents_of: str | None = None, captions: str = ""):
        self.folder, self.size, self.with_captions, self.broken_shards = Path(folder), size, with_captions, []
        if not self.folder.is_dir():
            raise ValueError(f"data folder {folder} does not exist; make it, or name another with --data or --val_data")
        self.shards = sorted(self.folder.rglob("*.tar"))
        self.files = [] if self.shards else find_images(self.folder)
        self.captions = None
        if captions:
            if not self.shards or not Path(captions).is_dir():
                what = f"{captions} is no folder" if self.shards else f"{folder} holds no tar shards; its images have NAME.txt"
                raise ValueError(f"captions must be a folder of JSON lines, of a folder of tar shards, but {what}")
            self.captions = [Path(captions) / s.relative_to(self.folder).with_suffix(".jsonl") for s in self.shards]
        if self.shards:
            keep = Path(captions) if captions else self.folder
            self.index, self.broken_shards, self.fingerprint = load_index(self.folder, self.shards, self.captions, keep)
        else:
            names = "\n".join(str(f.relative_to(self.folder)) for f in self.files)
            self.fingerprint = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
        if not len(self):
            recipe = self.folder / "prepare.py"
            mend = f"; fill it with: python {recipe}" if recipe.exists() else ""
            raise ValueError(f"data folder {folder} holds neither images nor tar shards{mend}")
        texts = self.index[:, 3] if self.shards else (f.with_suffix(".txt").exists() for f in self.files)
        if with_captions and not any(texts):
            ending = "its shards hold no KEY.txt" if self.shards else "no image has a NAME.txt beside it"
            raise ValueError(f"data folder {folder} has no captions, which stage 2 needs: {ending}")
        self.moments = open_latents(self, latents_of) if latents_of else None

    def __str__(self):
        return f"{len(self):,} samples from {self.folder}"

    def __len__(self):
        return len(self.index) if self.shards else len(self.files)

    def __getitem__(self, i):
        skipped = []
        for attempt in range(min(len(self), 1000)):
            try:
                return {**self.read((i + attempt) % len(self)), "skipped": skipped, "unreadable": None}
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                skipped.append(" ".join(str(error).split()))
        sentence = f"{len(skipped)} samples in a row cannot be read in {self.folder}; the last: {skipped[-1]}"
        image = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        moments = None if self.moments is None else torch.from_numpy(np.array(self.moments[0]))
        return {"image": image, "caption": "", "moments": moments, "skipped": skipped, "unreadable": sentence}

    def read(self, i) -> dict:
        """Sample i itself. Raises OSError or ValueError, with its name, when it cannot be read."""
        if self.shards:
            shard, image_at, image_size, text_at, text_size = (int(v) for v in self.index[i])
            # a member's header, which begins with its name, lies 512 bytes before its data
            spans, text_span = [(100, image_at - 512), (image_size, image_at)], (text_size, text_at)
            if self.captions:
                name, data = read_spans(self.shards[shard], *spans)
                text = json.loads(read_spans(self.captions[shard], text_span)[0]).get("caption")
            else:
                name, data, text = read_spans(self.shards[shard], *spans, text_span)
                text = text.decode(errors="replace") if text_at else None
            name = printable(f"{self.shards[shard]}:{name.split(bytes(1))[0].decode(errors='replace')}")
            source = io.BytesIO(data)
        else:
            source, name = self.files[i], printable(self.files[i])
            text_file = source.with_suffix(".txt")
            text = text_file.read_text(errors="replace") if self.with_captions and text_file.exists() else None
        if self.with_captions and not (text and text.strip()):
            raise ValueError(f"{name}: no caption")
        try:
            image = crop_image(open_image(source, self.size), self.size)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise OSError(f"{name}: {error}") from error
        moments = None if self.moments is None else torch.from_numpy(np.array(self.moments[i]))
        if moments is not None and not moments.isfinite().all():
            raise ValueError(f"{name}: it has no latents, as it could not be read when data/latents.py ran; run that again")
        return {"image": image, "caption": text.strip() if text else None, "moments": moments}


class WithNoise(torch.utils.data.Dataset):
    """The items of a data set, with a seed and the noise that it gives them: index (i, seed). So noise is drawn where images are
    decoded, by the loader's workers. draw_noise: DiffusionDecoder's; None: no noise."""

    def __init__(self, dataset, draw_noise):
        self.dataset, self.draw_noise = dataset, draw_noise

    def __getitem__(self, place):
        i, seed = place
        return self.dataset[i] | {"seed": seed, "noise": self.draw_noise([seed]) if self.draw_noise else None}


class SyntheticDataset(torch.utils.data.Dataset):
    """A random image with a caption of so many words, over and over; for benchmarks. moments: its latents' (8, size / 8, size / 8),
    or None."""

    broken_shards: list[str] = []
    fingerprint = "synthetic"

    def __init__(self, size: int, caption_words: int, moments: torch.Tensor | None = None):
        image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
        self.item = {"image": image, "caption": "a " * caption_words, "moments": moments, "skipped": [],
                     "unreadable": None}  # fmt: skip

    def __str__(self):
        return "synthetic images"

    def __len__(self):
        return 1_000_000

    def __getitem__(self, i):
        return self.item


def read_spans(path: Path, *spans: tuple[int, int]) -> list[bytes]:
    """(size, offset) each."""
    with open(path, "rb") as file:
        return [os.pread(file.fileno(), *span) for span in spans]


def tar_files(file, size: int):
    """Yields (name, offset, size) of the regular files in a tar. As tarfile does, and some times faster, since it looks
    at names and sizes alone: ten million samples have thirty million headers. Raises EOFError or ValueError."""
    at, extended = 0, {}
    while True:
        header = os.pread(file.fileno(), 512, at)
        if len(header) < 512:
            raise EOFError("its end is missing")
        if not any(header):  # an empty block ends the archive
            return
        if at == 0 and header[:2] == b"\x1f\x8b":
            raise ValueError("it is compressed: unpack it with gunzip, as samples are read from their places in it")
        if header[257:262] != b"ustar":
            raise ValueError(f"there is no tar header at byte {at:,}")
        kind, digits = header[156:157], header[124:136]
        length = int.from_bytes(digits[1:], "big") if digits[0] & 0x80 else int(digits.strip(b"\0 ") or b"0", 8)
        data_at = at + 512
        if kind in (b"x", b"L"):  # what the next header has no room for: pax records ("12 path=abc\n"), or a long GNU name
            data = os.pread(file.fileno(), length, data_at)
            if kind == b"L":
                extended[b"path"] = data.rstrip(b"\0")
            while kind == b"x" and data:
                count = int(data[: data.index(b" ")])
                key, _, value = data[data.index(b" ") + 1 : count - 1].partition(b"=")
                extended[key], data = value, data[count:]
        else:
            length = int(extended.get(b"size", length))
            if data_at + length > size:
                raise EOFError("it ends in the middle of a file")
            if kind in (b"0", b"\0"):
                name, prefix = (part.split(b"\0")[0] for part in (header[:100], header[345:500]))
                prefix = b"" if header[257:265] == b"ustar  \0" else prefix  # GNU tars keep other things there
                name = extended.get(b"path", prefix + b"/" + name if prefix else name)
                yield name.decode(errors="replace"), data_at, length
            extended = {}
        at = data_at + -(-length // 512) * 512


def read_shard(path: Path) -> tuple[list[str], np.ndarray, str | None]:
    """The keys of a shard's n images; (n, 4) int64: image offset, image size, text offset, text size (0, 0 where there is no
    text); and what is wrong with the shard, if anything."""
    samples, problem = {}, None
    try:
        with open(path, "rb") as file:
            for name, offset, size in tar_files(file, path.stat().st_size):
                key, ending = os.path.splitext(name)
                at = 0 if ending.lower() in IMAGE_ENDINGS else 2 if ending == ".txt" else None
                if at is not None:
                    samples.setdefault(key, [0, 0, 0, 0])[at : at + 2] = offset, size
    except (OSError, EOFError, ValueError) as error:
        problem = f"{path}: broken shard ({error}); of it, the {len(samples)} samples before the break are used"
    samples = {key: spans for key, spans in samples.items() if spans[0]}
    return list(samples), np.array(list(samples.values()), dtype=np.int64).reshape(-1, 4), problem


def index_shard(path: Path, captions: Path | None = None) -> tuple[np.ndarray, str | None]:
    """read_shard's places and problem. captions: sample.py's JSON lines for this shard, to take instead of its texts: of the
    images that have a line there, and of no others."""
    keys, spans, problem = read_shard(path)
    if captions is not None:
        places, at = {}, 0
        for line in open(captions, "rb") if captions.exists() else []:
            try:
                places[json.loads(line)["image"].partition(".tar/")[2]] = at, len(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                problem = problem or f"{captions}: byte {at:,} begins no line with image and caption; it is left out"
            at += len(line)
        kept = [i for i, key in enumerate(keys) if key in places]
        spans = spans[kept]
        spans[:, 2:] = [places[keys[i]] for i in kept] or np.empty((0, 2))
    return spans, problem


def load_index(folder: Path, shards: list[Path], captions: list[Path] | None = None, keep: Path | None = None):
    """(n, 5) int64, memory-mapped: shard and what read_shard says; a sentence for each broken shard; and a fingerprint of all
    that. captions: see index_shard. Built once, by all cores, kept in the folder `keep`, built again when a file has changed or
    the index is damaged."""
    keep = keep or folder
    array_file, stamp_file = keep / "index.bin", keep / "index.json"
    files = [(s, str(s.relative_to(folder))) for s in shards]
    files += [(c, str(c.relative_to(keep))) for c in captions or [] if c.exists()]
    stamp = [[name, file.stat().st_size, file.stat().st_mtime_ns] for file, name in files]
    try:
        saved = json.loads(stamp_file.read_text())
        if saved["shards"] == stamp and fingerprint_of(array_file, stamp) == saved["fingerprint"]:
            return np.memmap(array_file, np.int64, mode="r").reshape(-1, 5), saved["broken"], saved["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not one of ours
        pass
    broken, temporary = [], f"{array_file}.{os.uname().nodename}.{os.getpid()}"
    try:
        stamp_file.unlink(missing_ok=True)
        with ProcessPoolExecutor(min(os.cpu_count(), len(shards))) as pool, open(temporary, "wb") as file:
            found = pool.map(index_shard, shards, captions or [None] * len(shards))
            bar = tqdm(found, desc=f"indexing {folder}", unit=" shards", total=len(shards), disable=len(shards) < 10)
            for number, (spans, problem) in enumerate(bar):
                np.insert(spans, 0, number, axis=1).tofile(file)
                broken += [problem] if problem else []
        if not os.path.getsize(temporary):
            reason = f": {broken[0]}" if broken else ""
            what = f"with captions in {keep}" if captions else "in them"
            raise ValueError(f"data folder {folder} has {len(shards)} tar shards, but no images {what}{reason}")
        os.replace(temporary, array_file)
        fingerprint = fingerprint_of(array_file, stamp)
        Path(temporary).write_text(json.dumps({"shards": stamp, "broken": broken, "fingerprint": fingerprint}))
        os.replace(temporary, stamp_file)
    except OSError as error:
        raise ValueError(f"cannot write the index of the data, in {keep}: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return np.memmap(array_file, np.int64, mode="r").reshape(-1, 5), broken, fingerprint


def fingerprint_of(array_file: Path, stamp: list) -> str:
    """Of the shards' names and sizes, and of every sample's place in them."""
    with open(array_file, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps([shard[:2] for shard in stamp]).encode())
    return digest.hexdigest()


def open_latents(dataset: ImageTextDataset, model: str) -> np.ndarray:
    """data/latents.py's (n, 8, size / 8, size / 8) half, memory-mapped; NaN for what could not be read then. Raises
    ValueError when they are not these images' or not all there."""
    folder = dataset.folder
    mend = f"compute them with: python data/latents.py {folder} --diffusion_model {model} --image_size {dataset.size}"
    try:
        about = json.loads((folder / "latents.json").read_text())
        moments = np.load(folder / "latents.npy", mmap_mode="r")
        done = np.load(folder / "latents.done.npy", mmap_mode="r")
        same = describe_latents(dataset, model) == about and len(moments) == len(done) == len(dataset)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no latents computed ahead ({error}); {mend}") from error
    if not same:
        raise ValueError(f"the latents in {folder} are of other images or another model; {mend}")
    if (done == 0).any():
        raise ValueError(f"the latents in {folder} are not finished; {mend}")
    return moments


def describe_latents(dataset: ImageTextDataset, model: str) -> dict:
    """What latents depend on; kept beside them."""
    return {"diffusion_model": model, "image_size": dataset.size, "images": len(dataset), "data": dataset.fingerprint}


@lru_cache(maxsize=1)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """4 bytes a sample: 160 MB for 40 million, made in a second or two."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(length, dtype=np.uint32))


def batch_indices(length: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The samples of a step's global batch: shuffled over everything, each once an epoch, a function of seed and step
    alone, whatever the number of processes."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(permutation(length, seed, p // length)[p % length]) for p in positions]


def seeds_of(seed: int, step: int, positions) -> list[int]:
    """One seed a sample, from its place in the run alone: noise is the same on any number of processes."""
    return [int(np.random.SeedSequence([seed, step, p]).generate_state(1, np.uint64)[0] >> 1) for p in positions]


def micro_batches(samples: int, batch_size: int, micro_batch_size: int, seed: int, steps: range, rank: int, world_size: int):
    """Yields this process's micro-batches, step after step: [(sample, its seed), ...]."""
    for step in steps:
        indices = batch_indices(samples, batch_size, seed, step)
        for first in range(rank * micro_batch_size, batch_size, world_size * micro_batch_size):
            mine = range(first, first + micro_batch_size)  # places in the global batch
            yield list(zip(indices[first : first + micro_batch_size], seeds_of(seed, step, mine)))


def collate(items: list[dict]) -> dict:
    """{"image": (B, 3, S, S) uint8, "caption": [str], "moments": (B, 8, S / 8, S / 8) or None, "noise": see draw_noise, or
    None, "seed": [int or None], "skipped": [sentence], "unreadable": sentence or None}"""
    with_moments, with_noise = items[0]["moments"] is not None, items[0].get("noise") is not None
    return {
        "noise": [torch.cat(parts) for parts in zip(*(item["noise"] for item in items))] if with_noise else None,
        "moments": torch.stack([item["moments"] for item in items]) if with_moments else None,
        "image": torch.stack([item["image"] for item in items]),
        "caption": [item["caption"] for item in items],
        "seed": [item.get("seed") for item in items],
        "skipped": [sentence for item in items for sentence in item["skipped"]],
        "unreadable": next((item["unreadable"] for item in items if item["unreadable"]), None),
    }


@dataclass
class SpeedConfig(Settings):
    folder: Text
    size: Pixels


if __name__ == "__main__":  # python -m data.loader FOLDER SIZE: how many images a core reads, decodes and crops
    config = parse_settings(SpeedConfig, None, __doc__)
    try:
        dataset = ImageTextDataset(config.folder, config.size)
    except ValueError as error:
        raise SystemExit(f"error: {error}")
    indices, start = batch_indices(len(dataset), min(2000, len(dataset)), seed=0, step=0), time.perf_counter()
    for i in indices:
        dataset[i]
    print(f"{len(indices) / (time.perf_counter() - start):.0f} images/s on one core")
