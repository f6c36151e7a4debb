"""
Images and captions from tar shards (KEY.jpg + KEY.txt, as img2dataset writes them) or plain folders (NAME.png
with NAME.txt), by random access: the batch of any step can be read directly, so a run resumes at once.
"""

import hashlib
import io
import json
import os
import posixpath
import signal
import tarfile
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from tqdm import tqdm

from data.distributed import end_with_parent
from data.settings import printable, read_json, write_json
from vlv import to_pixels

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
COMPANIONS = (".json", ".jsonl", ".html", ".npy", ".parquet")  # what may lie beside images
INDEX_VERSION = 5
LATENTS_A_FILE = 1024


class UnreadableData(Exception):
    """More of the samples are broken than a run should go on with."""


def digest(parts: list) -> str:
    """A name for what has these parts."""
    return hashlib.sha256("\n".join(map(str, parts)).encode(errors="surrogateescape")).hexdigest()[:24]


def read_part(path: Path, at: int, size: int = -1) -> bytes:
    with open(path, "rb") as file:
        file.seek(at)
        return file.read(size)


def find_files(top: Path) -> SimpleNamespace:
    """What is below a folder, also behind links, sorted, without hidden files (thumbnail caches and the
    like): images, tar shards, texts, and others. Or what a file is."""
    files, seen = [top] if top.is_file() else [], set()
    found = SimpleNamespace(images=[], shards=[], texts=[], others=[])
    note = lambda error: found.others.append(Path(error.filename))  # a folder that cannot be read
    for root, folders, names in () if files else os.walk(top, followlinks=True, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(root)) in seen:  # a link led back
            folders.clear()
        else:
            files += [Path(root, name) for name in names if not name.startswith(".")]
        seen.add(real)
    kinds = {".tar": found.shards, ".txt": found.texts} | dict.fromkeys(IMAGE_ENDINGS, found.images)
    for path in sorted(files):
        ending = path.suffix.lower()
        if ending not in COMPANIONS:
            (kinds.get(ending, found.others) if path.is_file() else found.others).append(path)
    return found


class ImageTextDataset(torch.utils.data.Dataset):
    """Images, their captions and their latents' moments.

    folder: holds *.tar shards at any depth, or else images. resize: see VLVConfig. with_captions: an image
    without one counts as unreadable. captions: data/caption.py's --out, or sample.py's captions.jsonl for a
    folder of images, in the place of their texts; images without a line there are left out. latents_of: the
    model whose moments data/latents.py has computed ahead; None: no moments. replace: a sample that cannot be
    read is replaced by the next that can; else it is left out.
    `fingerprint` covers the number of images, and the names and sizes of their files; `problems` are
    sentences about what is left out. Raises ValueError if there is nothing to read."""

    def __init__(self, folder, size: int, with_captions=False, latents_of: str | None = None, captions="",
                 resize="bicubic", replace=True):
        self.folder, self.size, self.resize, self.with_captions = Path(folder), size, resize, with_captions
        self.replace, self.was_read, self.was_bad = replace, 0, 0  # samples, by this process
        if not str(folder) or not self.folder.is_dir():
            raise ValueError(f"data folder {str(folder)!r} does not exist: make it, or name another")
        found = find_files(self.folder)
        self.files = found.shards or found.images
        index = find_index(self.folder, found, captions)
        about = read_json(index / "about.json")
        self.problems, with_text = about["problems"], about["captions"]
        if not about["images"]:
            recipe = self.folder / "prepare.py"
            hint = f"; fill it with: python {recipe}" if recipe.exists() else ""
            raise ValueError("; ".join([f"data folder {folder} holds no images", *self.problems]) + hint)
        if with_captions and not with_text:
            raise ValueError(f"data folder {folder} has no captions (KEY.txt), which stage 2 needs")
        self.index = np.memmap(index / "rows", np.int64, "r").reshape(-1, 5)
        self.texts = np.memmap(index / "texts", np.uint8, "r") if with_text else b""
        self.summary = f"{len(self):,} samples from {self.folder}, {with_text:,} of them with captions"
        sizes = [f"{path.relative_to(self.folder)} {path.stat().st_size}" for path in self.files]
        self.fingerprint = digest([len(self), *sizes])
        self.latents = find_latents(self, latents_of) if latents_of else None

    def __len__(self):
        return len(self.index)

    def __getitems__(self, indices: list[int]) -> dict:
        """A batch: "indices" of its B samples; "images" (B, 3, size, size) uint8; "captions", B texts;
        "moments" (B, 2C, h, w) half or None; "skipped", a sentence for each sample that cannot be read.
        Raises UnreadableData when too many had to be replaced."""
        found, skipped = [], []
        for i in indices:
            while True:
                self.was_read += 1
                try:
                    found.append((i, *self.read(i)))
                    break
                except OSError as error:
                    skipped.append(" ".join(str(error).split()))
                    self.was_bad += 1
                    if not self.replace:
                        break
                i = (i + 1) % len(self)
                if self.was_bad > 10 + 0.01 * self.was_read:
                    raise UnreadableData(f"{self.was_bad:,} of {self.was_read:,} samples of {self.folder}"
                                         f" cannot be read; the last: {skipped[-1]}")
        indices, images, captions, moments = zip(*found) if found else [()] * 4
        images = np.stack(images) if found else np.empty((0, 3, self.size, self.size), np.uint8)
        moments = np.stack(moments) if found and self.latents else None
        return dict(indices=indices, images=images, captions=captions, moments=moments, skipped=skipped)

    def read(self, i: int) -> tuple[np.ndarray, str, np.ndarray | None]:
        """Sample i: the image, (3, size, size) uint8, its caption, "" where there is none, and its moments.
        Raises OSError, with the sample's name."""
        number, at, size, text_at, text_size = map(int, self.index[i])
        path, moments = self.files[number], None
        try:
            caption = bytes(self.texts[text_at : text_at + text_size])
            caption = caption.decode("utf-8-sig", "strict" if self.with_captions else "replace").strip()
            if self.with_captions and not caption:
                raise OSError("no caption")
            image = to_pixels(io.BytesIO(read_part(path, at, size)), self.size, self.resize).numpy()
            if self.latents:
                file, row = divmod(i, LATENTS_A_FILE)
                moments = np.load(self.latents / f"{file:06d}.npy", mmap_mode="r")[row].copy()
                if not np.isfinite(moments).all():
                    raise OSError("it has no latents: data/latents.py could not read it")
            return image, caption, moments
        except (OSError, UnicodeDecodeError) as error:
            reason = "its caption is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            name = str(path)
            if size >= 0:  # in a shard: before the image is its header, which begins with its name
                name += ":" + read_part(path, at - 512, 100).split(bytes(1))[0].decode(errors="replace")
            raise OSError(f"{printable(name)}: {reason}") from None


def check_apart(a: ImageTextDataset, b: ImageTextDataset) -> None:
    """Raises ValueError for a file that two data sets both hold."""
    files = {(path.stat().st_dev, path.stat().st_ino): path for path in a.files}
    for path in b.files:
        if same := files.get((path.stat().st_dev, path.stat().st_ino)):
            raise ValueError(f"training and validation share samples: {same} and {path}: take one away")


# --- the index -------------------------------------------------------------------------------------------


def find_index(folder: Path, found: SimpleNamespace, captions: str) -> Path:
    """The index of a folder's files with these captions, a folder with: rows, (n, 5) int64, the number of an
    image's file, its offset and size there (0, -1: all of it), and those of its caption in texts; and
    about.json. It is made if there is none. Its name is a hash of what it is of, and it lies with the hub's
    files, as data may lie where nothing can be written."""
    files, sources = found.shards or found.images, found.texts
    if captions and found.shards:
        sources = [Path(captions, path.relative_to(folder)).with_suffix(".jsonl") for path in files]
    elif captions:
        sources = [Path(captions, "captions.jsonl") if Path(captions).is_dir() else Path(captions)]
    stamps = [INDEX_VERSION]
    for path in [*files, *sources, *found.others]:
        state = path.stat() if path.exists() else None
        stamps.append(f"{path.absolute()} {state and (state.st_size, state.st_mtime_ns)}")
    home = Path(HF_HOME, "vlv")
    index = home / digest(stamps)
    if index.exists():
        return index
    left_out = {"files are neither images nor tar shards": found.others}
    left_out["images are beside tar shards"] = found.images if found.shards else []
    count = min(os.cpu_count(), max(1, len(files)))
    with ProcessPoolExecutor(count, initializer=end_with_parent, initargs=(signal.SIGKILL,)) as pool:
        if found.shards:
            entries = pool.map(index_shard, files, sources if captions else [None] * len(files))
        else:
            lines = read_captions(sources[0]) if captions else []
            lines = {Path(image).resolve(): text for image, text in lines} if captions else None
            entries = map(partial(index_image, lines=lines), files)
        entries = tqdm(entries, f"indexing {folder}", len(files), disable=len(files) < 10, unit=" files")
        home.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=home))
        write_index(unfinished, entries, left_out)
    with suppress(OSError):  # another process was faster
        os.rename(unfinished, index)
    return index


def write_index(index: Path, entries, left_out: dict[str, list]) -> None:
    """entries: of each file what index_shard returns."""
    left_out = defaultdict(list, left_out)
    with open(index / "rows", "wb") as rows, open(index / "texts", "wb") as texts:
        count = with_text = 0
        for number, (spans, captions, left_out_here) in enumerate(entries):
            sizes = np.array([len(caption) for caption in captions], dtype=np.int64)
            at = texts.tell() + np.cumsum(sizes) - sizes
            table = np.column_stack([np.full(len(spans), number), np.reshape(spans, (-1, 2)), at, sizes])
            table.astype(np.int64).tofile(rows)
            texts.write(b"".join(captions))
            count, with_text = count + len(spans), with_text + np.count_nonzero(sizes)
            for reason, names in left_out_here.items():
                left_out[reason] += names
    about = dict(images=count, captions=int(with_text), problems=describe_left_out(left_out))
    write_json(index / "about.json", about)


def describe_left_out(left_out: dict[str, list]) -> list[str]:
    """A sentence for each reason, with a number and an example."""
    return [printable(f"left out: {len(names):,} {reason}, such as {names[0]}")
            for reason, names in left_out.items() if names]


def index_image(path: Path, lines: dict[Path, str] | None) -> tuple[list, list[bytes], dict]:
    """See index_shard. lines: captions in the place of NAME.txt."""
    if lines is None:
        text = path.with_suffix(".txt")
        return [(0, -1)], [text.read_bytes() if text.is_file() else b""], {}
    if path.resolve() not in lines:
        return [], [], {"images have no line among the captions": [path]}
    return [(0, -1)], [encode(lines[path.resolve()])], {}


def encode(text: str) -> bytes:
    return text.encode(errors="replace")


def index_shard(path: Path, captions: Path | None) -> tuple[list, list[bytes], dict[str, list[str]]]:
    """(offset and size of each image, its caption or b"", names of what is left out by the reason). captions:
    JSON lines in the place of the shard's texts; images without a line are left out."""
    images, texts, left_out = read_shard(path)
    if captions is None:
        return [*images.values()], [texts.get(key, b"") for key in images], left_out
    lines = read_captions(captions) if captions.exists() else []
    texts = {image.partition(f"{captions.stem}.tar/")[2]: encode(text) for image, text in lines}
    without, unknown = images.keys() - texts.keys(), texts.keys() - images.keys()
    left_out["images have no line among the captions"] = [f"{path}:{key}" for key in without]
    left_out["lines of captions are of no image"] = [f"{captions}: {key}" for key in unknown]
    kept = [key for key in images if key in texts]
    return [images[key] for key in kept], [texts[key] for key in kept], left_out


def read_shard(path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, bytes], dict[str, list[str]]]:
    """({key: offset and size of its image}, {key: its text}, names of what is left out by the reason) of a
    tar file. As in webdataset, a sample's key ends at the first dot of the file's name. The first image of a
    key counts, and the first text."""
    images, texts, left_out = {}, {}, defaultdict(list)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = posixpath.split(posixpath.normpath(member.name))
                key, ending = posixpath.join(folder, name.split(".")[0]), posixpath.splitext(name)[1].lower()
                if member.isdir() or name.startswith(".") or ending in COMPANIONS:  # ._KEY.jpg is macOS's
                    continue
                if not member.isreg() or member.sparse is not None:
                    left_out["members are links or sparse"].append(f"{path}:{member.name}")
                elif member.offset_data + member.size > path.stat().st_size:
                    raise tarfile.ReadError("it ends in the middle of a file")
                elif ending == ".txt" and key not in texts:
                    texts[key] = tar.extractfile(member).read()
                elif ending in IMAGE_ENDINGS and key not in images:
                    images[key] = member.offset_data, member.size
                else:
                    left_out["members are other or second ones of a key"].append(f"{path}:{member.name}")
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile stops without a word where no header is
                raise tarfile.ReadError("its end is missing")
    except (OSError, tarfile.TarError) as error:
        left_out["shards are broken, and used up to the break"].append(f"{path} ({error})")
    left_out["texts have no image"] = [f"{path}:{key}" for key in texts.keys() - images.keys()]
    left_out["shards hold no images"] = [] if images else [str(path)]
    return images, texts, left_out


def read_captions(path: Path) -> list[tuple[str, str]]:
    """(image, caption) of JSON lines, but of those whose caption is null. Raises ValueError for a line that
    is something else, and OSError."""
    found = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                found += [(record["image"] + "", record["caption"] + "")] if record["caption"] else []
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {number} has no image and caption") from None
    return found


# --- latents that were computed ahead --------------------------------------------------------------------


def describe_latents(dataset: ImageTextDataset, model: str) -> dict:
    """What latents depend on; kept beside them."""
    return dict(diffusion_model=model, image_size=dataset.size, resize=dataset.resize,
                data=dataset.fingerprint)


def find_latents(dataset: ImageTextDataset, model: str) -> Path:
    """The folder of what data/latents.py has computed: 000000.npy, ... of (up to 1,024, 2C, h, w) half, NaN
    for what could not be read. Raises ValueError if they are of something else, or not all there."""
    folder, expected = dataset.folder / "latents", describe_latents(dataset, model)
    files = {folder / f"{number:06d}.npy" for number in range(-(-len(dataset) // LATENTS_A_FILE))}
    is_of_these = (folder / "settings.json").exists() and read_json(folder / "settings.json") == expected
    if not is_of_these or files - {*folder.iterdir()}:
        raise ValueError(f"{folder} has not the latents of exactly these images; compute them with: python"
                         f" data/latents.py {dataset.folder} --diffusion_model {model} --image_size"
                         f" {dataset.size} --resize {dataset.resize}")
    return folder


# --- what a step reads -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """4 bytes a sample: 160 MB for 40 million, made in a second or two."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(length, dtype=np.uint32))


def batch_indices(length: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The samples of a step's global batch: all samples shuffled, each once an epoch; a function of seed and
    step."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(permutation(length, seed, p // length)[p % length]) for p in positions]


def micro_batches(length: int, batch_size: int, micro_batch_size: int, seed: int, steps, rank, world_size):
    """Yields this process's micro-batches, step after step: lists of samples."""
    for step in steps:
        indices = batch_indices(length, batch_size, seed, step)
        for first in range(rank * micro_batch_size, batch_size, world_size * micro_batch_size):
            yield indices[first : first + micro_batch_size]
