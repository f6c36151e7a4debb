"""
Images and captions from tar shards (KEY.jpg + KEY.txt, as img2dataset writes them) or plain folders
(NAME.png with NAME.txt), by random access: the batch of any training step can be read directly, so a run
resumes at once.
"""

import hashlib
import io
import json
import os
import tarfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from data.settings import printable

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")


def find_images(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted, without hidden ones (thumbnail caches and the like)."""
    found = [p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".")]
    return sorted(p for p in found if p.is_file())


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits, which Pillow would clip, as uint8. White is 1 for fractions, else the
    least of 8, 12 and 16 bits that holds the brightest value. Raises ValueError for others."""
    low, high = values.min(), values.max()
    whites = [1] if values.dtype.kind == "f" and high <= 1 else [255, 4095, 65535]
    white = next((w for w in whites if high <= w), None)
    if white is None or not low >= 0:
        raise ValueError(f"its values go from {low:g} to {high:g}: 0 to 1, or 8, 12 or 16 bits are known")
    if values.dtype.kind == "f":
        return (values * (255 / white)).round().astype(np.uint8)
    return (values.astype(np.int64) // ((white + 1) // 256)).astype(np.uint8)


def open_image(file, size: int | None = None) -> Image.Image:
    """Opens any picture as RGB: upright (EXIF), transparency on white, 16 bits as 8, an animation's first
    frame.

    file: path or binary file. size: the side in pixels that is needed; lets JPEG decode large originals
    smaller. Raises OSError."""
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
    except UnidentifiedImageError as error:  # its own text names an object in memory
        raise OSError("broken image: its format is unknown") from error
    except Exception as error:  # on broken files Pillow's plugins raise whatever they stumble over
        raise OSError(getattr(error, "strerror", None) or f"broken image: {error}") from error


def crop_image(image: Image.Image, size: int) -> torch.Tensor:
    """The centre square, resized to (3, size, size) uint8. Cropped before it is resized: a very narrow
    picture would become enormous."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (size, size):
        # reducing_gap shrinks large pictures in two steps, several times faster and hardly visibly
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ImageTextDataset(torch.utils.data.Dataset):
    """Images, their captions and their latents' moments.

    folder: holds *.tar shards at any depth, or else images. with_captions: an image without one is
    unreadable. captions: data/caption.py's --out for the shards, to replace their texts; images without a
    line there are left out. latents_of: the text-to-image model whose moments data/latents.py has computed
    ahead; None: no moments. `fingerprint` is the same as long as the samples are. Raises ValueError if there
    is nothing to read."""

    def __init__(self, folder, size: int, with_captions=False, latents_of: str | None = None, captions=""):
        self.folder, self.size, self.with_captions, self.broken_shards = Path(folder), size, with_captions, []
        if not self.folder.is_dir():
            raise ValueError(f"data folder {folder} does not exist; make it, or name another")
        self.shards, self.files, self.captions = sorted(self.folder.rglob("*.tar")), [], None
        if captions:
            if not self.shards or not Path(captions).is_dir():
                raise ValueError(f"captions must be a folder of JSON lines ({captions}) for tar shards")
            names = [shard.relative_to(self.folder).with_suffix(".jsonl") for shard in self.shards]
            self.captions = [Path(captions) / name for name in names]
        if self.shards:
            cache = Path(captions) if captions else self.folder
            self.index, self.broken_shards, self.fingerprint = self.load_index(cache)
            has_texts, lacks = self.index[:, 3].any(), "its shards hold no KEY.txt"
        else:
            self.files = find_images(self.folder)
            names = "\n".join(str(f.relative_to(self.folder)) for f in self.files)
            self.fingerprint = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
            has_texts = any(f.with_suffix(".txt").exists() for f in self.files)
            lacks = "no image has a NAME.txt beside it"
        if not len(self):
            recipe = self.folder / "prepare.py"
            hint = f"; fill it with: python {recipe}" if recipe.exists() else ""
            raise ValueError(f"data folder {folder} holds neither images nor tar shards{hint}")
        if with_captions and not has_texts:
            raise ValueError(f"data folder {folder} has no captions, which stage 2 needs: {lacks}")
        self.moments = open_latents(self, latents_of) if latents_of else None

    def __str__(self):
        return f"{len(self):,} samples from {self.folder}"

    def __len__(self):
        return len(self.index) if self.shards else len(self.files)

    def __getitem__(self, place: int | tuple[int, int]) -> dict:
        """place: i, or (i, seed). Returns read(i) with "seed", "skipped": [sentence] and "unreadable". A
        sample that cannot be read is skipped for the next that can; "skipped" names it. If a thousand in a
        row cannot be read, "unreadable" is a sentence instead of None, and the image is black."""
        i, seed = place if isinstance(place, tuple) else (place, None)
        item = dict(seed=seed, skipped=[], unreadable=None)
        for attempt in range(min(len(self), 1000)):
            try:
                return self.read((i + attempt) % len(self)) | item
            except OSError as error:
                item["skipped"].append(" ".join(str(error).split()))
        count, last = len(item["skipped"]), item["skipped"][-1]
        item["unreadable"] = f"{count} samples in a row cannot be read in {self.folder}; the last: {last}"
        black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        moments = None if self.moments is None else torch.from_numpy(np.array(self.moments[0]))
        return item | dict(image=black, caption="", moments=moments)

    def read(self, i: int) -> dict:
        """Sample i: {"image": (3, size, size) uint8, "caption": text or None, "moments": (2C, h, w) half or
        None}. Raises OSError, with the sample's name."""
        if self.shards:
            name, source, text = self.read_member(*(int(v) for v in self.index[i]))
        else:
            name, source, text = printable(self.files[i]), self.files[i], ""
            if self.with_captions and source.with_suffix(".txt").exists():
                text = source.with_suffix(".txt").read_text(errors="replace")
        if self.with_captions and not text.strip():
            raise OSError(f"{name}: no caption")
        try:
            image = crop_image(open_image(source, self.size), self.size)
        except OSError as error:
            raise OSError(f"{name}: {error}") from error
        moments = None if self.moments is None else torch.from_numpy(np.array(self.moments[i]))
        if moments is not None and not moments.isfinite().all():
            raise OSError(f"{name}: it has no latents: data/latents.py could not read it; run that again")
        return {"image": image, "caption": text.strip() or None, "moments": moments}

    def read_member(self, shard: int, image_offset: int, image_size: int, text_offset: int, text_size: int):
        """(name, image file, text) of a sample in a shard."""
        with open(self.shards[shard], "rb") as file:
            header = os.pread(file.fileno(), 100, image_offset - 512)  # begins with the member's name
            image = io.BytesIO(os.pread(file.fileno(), image_size, image_offset))
            text = os.pread(file.fileno(), text_size, text_offset).decode(errors="replace")
        if self.captions:
            with open(self.captions[shard], "rb") as file:
                text = json.loads(os.pread(file.fileno(), text_size, text_offset)).get("caption") or ""
        member = header.split(bytes(1))[0].decode(errors="replace")
        return printable(f"{self.shards[shard]}:{member}"), image, text

    def load_index(self, cache: Path) -> tuple:
        """(n, 5) int64, memory-mapped: number of the shard, and what index_shard says; a sentence for each
        broken shard; a fingerprint of all that. Built by all cores, and kept in the folder `cache` until a
        file changes."""
        array_file, stamp_file = cache / "index.bin", cache / "index.json"
        files = [(shard, str(shard.relative_to(self.folder))) for shard in self.shards]
        files += [(lines, str(lines.relative_to(cache))) for lines in self.captions or [] if lines.exists()]
        stamp = [[name, file.stat().st_size, file.stat().st_mtime_ns] for file, name in files]
        with suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
            saved = json.loads(stamp_file.read_text())
            if saved["shards"] == stamp and index_fingerprint(array_file, stamp) == saved["fingerprint"]:
                array = np.memmap(array_file, np.int64, mode="r").reshape(-1, 5)
                return array, saved["broken"], saved["fingerprint"]
        broken, count = [], len(self.shards)
        unfinished = Path(f"{array_file}.{os.uname().nodename}.{os.getpid()}")
        try:
            stamp_file.unlink(missing_ok=True)
            with ProcessPoolExecutor(min(os.cpu_count(), count)) as pool, open(unfinished, "wb") as file:
                found = pool.map(index_shard, self.shards, self.captions or [None] * count)
                bar = tqdm(found, desc=f"indexing {self.folder}", total=count, disable=count < 10)
                for number, (spans, problem) in enumerate(bar):
                    np.insert(spans, 0, number, axis=1).tofile(file)
                    broken += [problem] if problem else []
            if not unfinished.stat().st_size:
                where = f"with captions in {cache}" if self.captions else "in them"
                reason = "".join(f": {problem}" for problem in broken[:1])
                raise ValueError(f"{self.folder} has {count} tar shards, but no images {where}{reason}")
            os.replace(unfinished, array_file)
            fingerprint = index_fingerprint(array_file, stamp)
            unfinished.write_text(json.dumps({"shards": stamp, "broken": broken, "fingerprint": fingerprint}))
            os.replace(unfinished, stamp_file)
        except OSError as error:
            raise ValueError(f"cannot write the index of the data, in {cache}: {error}") from error
        finally:
            unfinished.unlink(missing_ok=True)
        return np.memmap(array_file, np.int64, mode="r").reshape(-1, 5), broken, fingerprint


class SyntheticDataset(torch.utils.data.Dataset):
    """One random image with a caption of so many words, over and over, for benchmarks. moments_shape: (2C, h,
    w), as if moments had been computed ahead; None: no moments."""

    broken_shards, fingerprint = [], "synthetic"

    def __init__(self, size: int, caption_words: int, moments_shape: tuple | None = None):
        moments = None if moments_shape is None else torch.zeros(moments_shape, dtype=torch.float16)
        self.item = dict(image=torch.randint(0, 256, (3, size, size), dtype=torch.uint8),
                         caption="a " * caption_words, moments=moments, skipped=[], unreadable=None)

    def __str__(self):
        return "synthetic images"

    def __len__(self):
        return 1_000_000

    def __getitem__(self, place):
        return self.item | {"seed": place[1] if isinstance(place, tuple) else None}


def read_shard(path: Path) -> tuple[list[str], np.ndarray, str | None]:
    """The keys of a shard's n images; (n, 4) int64: image offset, image size, text offset, text size (0, 0
    without a text); and what is wrong with the shard, or None."""
    samples, problem = {}, None
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and member.offset_data + member.size > end:
                    raise tarfile.ReadError("it ends in the middle of a file")
                key, ending = os.path.splitext(member.name)
                at = 0 if ending.lower() in IMAGE_ENDINGS else 2 if ending == ".txt" else None
                if member.isfile() and at is not None:
                    samples.setdefault(key, [0, 0, 0, 0])[at : at + 2] = member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile stops without a word where no header is
                raise tarfile.ReadError("its end is missing")
    except (OSError, tarfile.TarError) as error:
        problem = f"{path}: broken shard ({error}); the {len(samples)} samples before the break are used"
        with suppress(OSError), open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                problem = f"{path}: broken shard; it is compressed: unpack it with gunzip"
    samples = {key: spans for key, spans in samples.items() if spans[0]}
    return list(samples), np.array(list(samples.values()), dtype=np.int64).reshape(-1, 4), problem


def index_shard(path: Path, captions: Path | None = None) -> tuple[np.ndarray, str | None]:
    """What read_shard says, without the keys. captions: JSON lines of this shard, whose places replace those
    of its texts; only images that have a line are kept."""
    keys, spans, problem = read_shard(path)
    if captions is None:
        return spans, problem
    lines, at = {}, 0
    for line in open(captions, "rb") if captions.exists() else []:
        try:
            lines[json.loads(line)["image"].partition(".tar/")[2]] = at, len(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            problem = problem or f"{captions}: byte {at:,} begins no line with image and caption"
        at += len(line)
    kept = [i for i, key in enumerate(keys) if key in lines]
    texts = np.array([lines[keys[i]] for i in kept], dtype=np.int64).reshape(-1, 2)
    return np.concatenate([spans[kept, :2], texts], 1), problem


def index_fingerprint(array_file: Path, stamp: list) -> str:
    """A hash of the shards' names and sizes, and of every sample's place in them."""
    with open(array_file, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps([shard[:2] for shard in stamp]).encode())
    return digest.hexdigest()


def open_latents(dataset: ImageTextDataset, model: str) -> np.ndarray:
    """data/latents.py's (n, 2C, h, w) half, memory-mapped; NaN for what could not be read then. Raises
    ValueError if they are of other images, or not finished."""
    folder = dataset.folder
    hint = f"python data/latents.py {folder} --diffusion_model {model} --image_size {dataset.size}"
    try:
        moments, done = [np.load(folder / f"latents{kind}.npy", mmap_mode="r") for kind in ("", ".done")]
        if json.loads((folder / "latents.json").read_text()) != describe_latents(dataset, model):
            raise ValueError("they are of other images or another model")
        if not len(moments) == len(done) == len(dataset) or (done == 0).any():
            raise ValueError("they are not finished")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no latents ({error}); compute them with: {hint}") from error
    return moments


def describe_latents(dataset: ImageTextDataset, model: str) -> dict:
    """What latents depend on; kept beside them."""
    return dict(diffusion_model=model, image_size=dataset.size, images=len(dataset), data=dataset.fingerprint)


@lru_cache(maxsize=1)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """4 bytes a sample: 160 MB for 40 million, made in a second or two."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(length, dtype=np.uint32))


def batch_indices(length: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The samples of a step's global batch: all samples shuffled, each once an epoch; a function of seed and
    step."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(permutation(length, seed, p // length)[p % length]) for p in positions]


def seeds_of(seed: int, step: int, positions) -> list[int]:
    """A seed for each sample, from its position in the step: noise is the same on any number of processes."""
    sequences = [np.random.SeedSequence([seed, step, position]) for position in positions]
    return [int(sequence.generate_state(1, np.uint64)[0] >> 1) for sequence in sequences]


def micro_batches(samples: int, batch_size: int, micro_batch_size: int, seed: int, steps, rank, world_size):
    """Yields this process's micro-batches, step after step: [(sample, its seed), ...]."""
    for step in steps:
        indices = batch_indices(samples, batch_size, seed, step)
        for first in range(rank * micro_batch_size, batch_size, world_size * micro_batch_size):
            positions = range(first, first + micro_batch_size)
            yield list(zip(indices[first : first + micro_batch_size], seeds_of(seed, step, positions)))


def collate(items: list[dict], draw_noise=None) -> dict:
    """A batch: "image" (B, 3, S, S) uint8; "caption", B texts; "moments" (B, 2C, h, w) or None; "noise", what
    draw_noise(seeds) returns; "seed", of dropout; "skipped", sentences; "unreadable", a sentence or None."""
    moments = [item["moments"] for item in items]
    return {
        "image": torch.stack([item["image"] for item in items]),
        "caption": [item["caption"] for item in items],
        "moments": None if moments[0] is None else torch.stack(moments),
        "noise": draw_noise([item["seed"] for item in items]) if draw_noise else None,
        "seed": items[0]["seed"],
        "skipped": [sentence for item in items for sentence in item["skipped"]],
        "unreadable": next((item["unreadable"] for item in items if item["unreadable"]), None),
    }
