"""
Images and captions from tar shards (KEY.jpg + KEY.txt, as img2dataset writes them) or plain folders
(NAME.png with NAME.txt), by random access: the batch of any training step can be read directly, so a run
resumes at once.
"""

import filecmp
import hashlib
import io
import json
import os
import posixpath
import re
import tarfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image
from tqdm import tqdm

from data.settings import printable, read_json, write_atomically, write_json
from vlv import to_pixels

IMAGE_ENDINGS = tuple(".png .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .avif"
                      " .heic .heif .jp2 .j2k .apng .tga .ico .psd".split())
COMPANIONS = (".txt", ".json", ".jsonl", ".html", ".tar", ".npy", ".bin")  # beside images
INDEX_VERSION = 4  # of what read_shard takes from a shard
SECOND_IMAGE = "images beside another of their key are left out"


def find_files(top: Path) -> SimpleNamespace:
    """What is below a folder, also behind links, sorted, without hidden files (thumbnail caches and the
    like): images, tar shards, texts and others; and problems, a sentence for each that is out of reach. Or
    what a file is."""
    files, seen = [top] if top.is_file() else [], set()
    found = SimpleNamespace(images=[], shards=[], texts=[], others=[], problems=[])
    fail = lambda error: found.problems.append(f"{printable(error.filename)}: {error.strerror}")
    for root, folders, names in () if files else os.walk(top, followlinks=True, onerror=fail):
        real = os.path.realpath(root)
        if real in seen:  # a link led back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    for path in sorted(files):
        ending = path.suffix.lower()
        if not path.is_file():
            found.problems.append(f"{printable(path)}: it is a link that leads nowhere, or no file")
        elif re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", path.name, re.IGNORECASE):
            found.problems.append(printable(f"{path}: a compressed tar file: unpack it, as with gunzip"))
        elif ending in IMAGE_ENDINGS:
            found.images.append(path)
        elif ending in (".tar", ".txt"):
            (found.shards if ending == ".tar" else found.texts).append(path)
        elif ending not in COMPANIONS:
            try:
                Image.open(path).close()  # its ending does not tell, but what is in it does
                found.images.append(path)
            except Exception:  # of any of Pillow's plugins
                found.others.append(path)
    return found


def read_part(path: Path, at: int, size: int = -1) -> bytes:
    with open(path, "rb") as file:
        file.seek(at)
        return file.read(size)


def read_captions(path: Path) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """{image: (first byte, -bytes) of its line} of JSON lines with a caption; and a sentence about lines that
    are something else. Raises OSError."""
    found, bad, at = {}, [], 0
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                image, caption = record["image"], record["caption"]
                if not isinstance(image, str) or not isinstance(caption, str | None):
                    raise TypeError
                if caption:
                    found[image] = at, -len(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                bad.append(at)
            at += len(line)
    about = [f"{path}: {len(bad):,} lines lack image or caption, the first at byte {bad[0]:,}"] if bad else []
    return found, about


class ImageTextDataset(torch.utils.data.Dataset):
    """Images, their captions and their latents' moments.

    folder: holds *.tar shards at any depth, or else images. resize: see VLVConfig. with_captions: an image
    without one is unreadable. captions: data/caption.py's --out, or sample.py's captions.jsonl for a folder
    of images, to replace their texts; images without a line there are left out. latents_of: the model whose
    moments data/latents.py has computed ahead; None: no moments. `fingerprint` is the same as long as the
    samples are; `problems` are sentences about what cannot be used. Raises ValueError if that is all."""

    attempts = 1000

    def __init__(self, folder, size: int, with_captions=False, latents_of: str | None = None, captions="",
                 resize="bicubic"):
        self.folder, self.size, self.resize, self.with_captions = Path(folder), size, resize, with_captions
        if not str(folder):
            raise ValueError("the data folder's name is empty")
        if not self.folder.is_dir():
            is_file = self.folder.exists()
            hint = "is a file: name a folder" if is_file else "does not exist; make it, or name another"
            raise ValueError(f"data folder {folder} {hint}")
        found = find_files(self.folder)
        self.problems, self.files = found.problems, found.shards or found.images
        if found.shards:
            self.open_shards(found.images, captions)
        else:
            self.open_files(found, captions)
        with_text = np.count_nonzero(self.index[:, 4])
        self.summary = f"{len(self):,} samples from {self.folder}, {with_text:,} of them with captions"
        if not len(self):
            recipe = self.folder / "prepare.py"
            hint = f"; fill it with: python {recipe}" if recipe.exists() else ""
            raise ValueError(f"data folder {folder} holds neither images nor tar shards{hint}")
        if with_captions and not with_text:
            lacks = "its shards hold no KEY.txt" if found.shards else "no image has a NAME.txt beside it"
            raise ValueError(f"data folder {folder} has no captions, which stage 2 needs: {lacks}")
        self.moments = load_latents(self, latents_of)[0] if latents_of else None

    def open_files(self, found: SimpleNamespace, captions: str) -> None:
        """Sets `text_files`, `fingerprint` and `index`, as open_shards does, of a folder of images."""
        if captions:
            lines = Path(captions, "captions.jsonl") if Path(captions).is_dir() else Path(captions)
            try:
                places, bad = read_captions(lines)
            except OSError as error:
                raise ValueError(f"captions of a folder of images are JSON lines: {error}") from error
            self.problems += bad
            places = {Path(image).resolve(): (lines, *place) for image, place in places.items()}
            texts = {path: places[path.resolve()] for path in self.files if path.resolve() in places}
            self.files = [*texts]
        else:
            places = {path.with_suffix(""): (path, 0, path.stat().st_size) for path in found.texts}
            texts = {path: places.get(path.with_suffix(""), (None, 0, 0)) for path in self.files}
            others = sorted({*found.others, *found.texts} - {text for text, _, _ in texts.values()})
            if others:
                count = f"{len(others):,} files are no images that can be read, or texts without one"
                self.problems.append(printable(f"{self.folder}: {count}, such as {others[0]}"))
        self.text_files = [text for text, _, _ in texts.values()]
        rows = [(number, 0, -1, at, size) for number, (_, at, size) in enumerate(texts.values())]
        self.index = np.array(rows, dtype=np.int64).reshape(-1, 5)
        names = "\n".join(str(f.relative_to(self.folder)) for f in self.files)
        self.fingerprint = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()

    def __len__(self):
        return len(self.index)

    def __getitem__(self, place: int | tuple[int, int]) -> dict:
        """place: i, or (i, seed). Returns read(i) with "seed", "skipped": [sentence] and "unreadable". A
        sample that cannot be read is skipped for the next that can; "skipped" names it. If `attempts` in a
        row cannot be read, "unreadable" is a sentence instead of None, and the image is black."""
        i, seed = place if isinstance(place, tuple) else (place, None)
        item = dict(seed=seed, skipped=[], unreadable=None)
        for attempt in range(min(len(self), self.attempts)):
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
        number, at, size, text_at, text_size = map(int, self.index[i])
        path, caption, moments = self.files[number], None, None
        try:
            if self.with_captions:
                text = read_part(self.text_files[number], text_at, abs(text_size)) if text_size else b""
                caption = (caption_in(text) or "" if text_size < 0 else text.decode("utf-8-sig")).strip()
                if not caption:
                    raise OSError("no caption")
            image = to_pixels(io.BytesIO(read_part(path, at, size)), self.size, self.resize)
            if self.moments is not None:
                moments = torch.from_numpy(np.array(self.moments[i]))
                if not moments.isfinite().all():
                    raise OSError("it has no latents: data/latents.py could not read it; run that again")
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, UnicodeDecodeError):
                error = "its caption is not UTF-8: convert it, as iconv does"
            name = str(path)
            if at:  # in a shard: before the image is its header, which begins with its name
                name += ":" + read_part(path, at - 512, 100).split(bytes(1))[0].decode(errors="replace")
            raise OSError(f"{printable(name)}: {error}") from None
        return {"image": image, "caption": caption, "moments": moments}

    def open_shards(self, images: list[Path], captions: str) -> None:
        """Sets `text_files`, one for each of `files`; `index`, (n, 5) int64: number of the file, and what
        index_shard says; and `fingerprint`. The index is kept in the folder (of the captions, if given; with
        the hub's files, where that is read-only) until a file changes."""
        cache, self.text_files = Path(captions or self.folder), self.files
        if captions:
            if not cache.is_dir():
                raise ValueError(f"captions must be a folder of JSON lines ({captions}) for tar shards")
            self.text_files = [cache / f.relative_to(self.folder).with_suffix(".jsonl") for f in self.files]
        if images:
            loose = f"{len(images):,} images beside the tar shards are left out"
            self.problems.append(f"{self.folder}: {loose}, such as {images[0]}")
        tops = {path: self.folder for path in self.files} | {path: cache for path in self.text_files}
        stamp = [[str(path.relative_to(top)), path.stat().st_size, path.stat().st_mtime_ns]
                 for path, top in tops.items() if path.exists()]
        if not os.access(cache, os.W_OK):
            cache = Path(HF_HOME, "vlv", hashlib.sha256(str(cache.resolve()).encode()).hexdigest()[:16])
        array_file, about_file = cache / "index.bin", cache / "index.json"
        try:
            about = read_json(about_file)
            if about != about | describe_index(array_file, stamp):
                raise ValueError
        except (OSError, ValueError):  # none yet, a damaged one, or one of other files
            try:
                cache.mkdir(parents=True, exist_ok=True)
                problems = write_atomically(array_file, self.write_index)
                about = describe_index(array_file, stamp) | {"problems": problems}
                write_json(about_file, about)
            except OSError as error:
                where = error.filename or f"{cache}, or /dev/shm"
                raise ValueError(f"cannot make the index of the data: {where}: {error.strerror}") from error
        self.problems += about["problems"]
        self.fingerprint = about["fingerprint"]
        self.index = np.memmap(array_file, np.int64, mode="r").reshape(-1, 5)

    def write_index(self, path: Path) -> list[str]:
        """Returns sentences about what cannot be used. Raises ValueError if that is all."""
        problems, left_out, count = [], {}, len(self.files)
        with ProcessPoolExecutor(min(os.cpu_count(), count)) as pool, open(path, "wb") as file:
            found = pool.map(index_shard, self.files, self.text_files)
            found = tqdm(found, desc=f"indexing {self.folder}", total=count, disable=count < 10)
            for number, (spans, broken, others) in enumerate(found):
                np.insert(spans, 0, number, axis=1).tofile(file)
                problems += broken
                for reason, names in others.items():
                    many, example = left_out.get(reason, (0, names[0]))
                    left_out[reason] = many + len(names), example
        for reason, (many, example) in left_out.items():
            problems.append(printable(f"{self.folder}: {many:,} {reason}, such as {example}"))
        if not path.stat().st_size:
            what = "images in them" if self.text_files == self.files else "images with captions"
            raise ValueError(f"{self.folder} has {count} tar shards, but no {what}: {problems[0]}")
        return problems


def check_apart(a: ImageTextDataset, b: ImageTextDataset) -> None:
    """Raises ValueError for a file that two data sets both hold; of shards also copies are found."""
    files, shards_of_size = {}, defaultdict(list)
    for path in a.files:
        state = path.stat()
        files[state.st_dev, state.st_ino] = path
        if path.suffix.lower() == ".tar":
            shards_of_size[state.st_size].append(path)
    for path in b.files:
        state = path.stat()
        copies = (s for s in shards_of_size[state.st_size] if filecmp.cmp(s, path, shallow=False))
        if same := files.get((state.st_dev, state.st_ino)) or next(copies, None):
            raise ValueError(f"training and validation share samples: {same} and {path}: take one away")


class SyntheticDataset(torch.utils.data.Dataset):
    """One random image with a caption of so many words, over and over, for benchmarks. moments_shape: (2C, h,
    w), as if moments had been computed ahead; None: no moments."""

    problems, summary, fingerprint = [], "synthetic images", "synthetic"

    def __init__(self, size: int, caption_words: int, moments_shape: tuple | None = None):
        moments = None if moments_shape is None else torch.zeros(moments_shape, dtype=torch.float16)
        self.item = dict(image=torch.randint(0, 256, (3, size, size), dtype=torch.uint8),
                         caption="a " * caption_words, moments=moments, skipped=[], unreadable=None)

    def __len__(self):
        return 1_000_000

    def __getitem__(self, place):
        return self.item | {"seed": place[1] if isinstance(place, tuple) else None}


def read_shard(path: Path) -> tuple[list[str], np.ndarray, list[str], dict[str, list[str]]]:
    """The keys of a shard's n images; (n, 4) int64: image offset, image size, text offset, text size (0, 0
    without a text, below 0 of a JSON file with a "caption"); what is wrong with the shard; and names of what
    is left out, by the reason.

    As in webdataset, a sample's key ends at the first dot of the file's name: KEY.jpg and KEY.txt belong
    together, and so do KEY.image.png, KEY.mask.png and KEY.caption.txt."""
    places, links, problems, samples, left_out = {}, {}, [], defaultdict(list), defaultdict(list)
    try:
        end = path.stat().st_size
        if read_part(path, 0, 2) == b"\x1f\x8b":
            raise tarfile.ReadError("it is compressed: unpack it with gunzip")
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if name in places:
                    left_out["names come twice, and the last is taken"].append(name)
                if member.isfile():
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("it ends in the middle of a file")
                    places[name] = member.offset_data, member.size
                elif member.issym() or member.islnk():
                    base = posixpath.dirname(name) if member.issym() else ""
                    links[name] = posixpath.normpath(posixpath.join(base, member.linkname))
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile stops without a word where no header is
                raise tarfile.ReadError("its end is missing")
    except (OSError, tarfile.TarError) as error:
        problems.append(f"{path}: broken shard ({error}); what is before the break is used")
    for name, target in links.items():
        for _ in range(8):  # links to links
            target = links.get(target, target)
        if target in places:
            places[name] = places[target]
        else:
            problems.append(printable(f"{path}:{name}: it is a link to {target}, which is not there"))
    for name in places:
        folder, file = posixpath.split(name)
        if not file.startswith("."):  # ._KEY.jpg is what macOS adds
            samples[posixpath.join(folder, file.split(".")[0])].append(name)
    spans = {}
    for key, names in samples.items():
        # KEY.jpg goes before KEY.image.png, and that before KEY.mask.png
        names.sort(key=lambda name: (name.count("."), ".image." not in name, ".caption." not in name))
        of_kind = lambda *endings: [n for n in names if posixpath.splitext(n)[1].lower() in endings]
        images, texts, jsons = of_kind(*IMAGE_ENDINGS), of_kind(".txt"), of_kind(".json")
        left_out["files are of other kinds"] += {*names} - {*images, *texts, *jsons}
        left_out[SECOND_IMAGE] += images[1:]
        if not images:
            left_out["texts have no image"] += texts
            continue
        captions = [places[name] for name in texts] or [(at, -size) for at, size in map(places.get, jsons)
                                                        if caption_in(read_part(path, at, size)) is not None]
        spans[key] = *places[images[0]], *(captions or [(0, 0)])[0]
    return list(spans), np.array(list(spans.values()), dtype=np.int64).reshape(-1, 4), problems, left_out


def caption_in(record: bytes) -> str | None:
    """The "caption" of a JSON object, if it is a text."""
    try:
        return json.loads(record)["caption"].encode(errors="replace").decode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def index_shard(path: Path, captions: Path) -> tuple[np.ndarray, list[str], dict[str, list[str]]]:
    """What read_shard says, without the keys. captions: the shard itself, or JSON lines to replace its texts;
    images without a line are left out."""
    keys, spans, problems, left_out = read_shard(path)
    left_out["shards hold no images"] = [] if keys else [str(path)]
    if captions != path:
        missing = [] if captions.exists() else [str(captions)]
        left_out["shards have no captions, as their files are not there"] = missing
        lines, bad = ({}, []) if missing else read_captions(captions)
        key_of = lambda image: f"/{image}".partition(f"/{captions.stem}.tar/")[2]
        texts = {key_of(image): place for image, place in lines.items()}
        kept = [i for i, key in enumerate(keys) if key in texts]
        left_out["images have no line among the captions"] = [key for key in keys if key not in texts]
        left_out["lines of captions are of no image here"] = [str(captions)] * (len(lines) - len(kept))
        spans[kept, 2:] = np.array([texts[keys[i]] for i in kept], dtype=np.int64).reshape(-1, 2)
        spans, problems = spans[kept], problems + bad
    return spans, problems, {reason: names for reason, names in left_out.items() if names}


def describe_index(array_file: Path, stamp: list) -> dict:
    """What index.json says of index.bin. The fingerprint is of the shards' names and sizes, and of every
    sample's place in them."""
    with open(array_file, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps([shard[:2] for shard in stamp]).encode())
    return dict(version=INDEX_VERSION, shards=stamp, fingerprint=digest.hexdigest())


def load_latents(dataset: ImageTextDataset, model: str, mode="r") -> tuple[np.ndarray, np.ndarray]:
    """What data/latents.py has computed, memory-mapped: (n, 2C, h, w) half, NaN for what could not be read;
    and (n) uint8, 0 for what is still to do. mode: "r+" to go on with that. Raises ValueError if they are of
    other images, or not finished."""
    folder = dataset.folder
    try:
        moments, done = [np.load(folder / f"latents{kind}.npy", mode) for kind in ("", ".done")]
        if {"resize": "bicubic"} | read_json(folder / "latents.json") != describe_latents(dataset, model):
            raise ValueError("they are of other images or another model")
        if not len(moments) == len(done) == len(dataset) or (mode == "r" and (done == 0).any()):
            raise ValueError("they are not finished")
    except (OSError, ValueError) as error:
        flags = f"--diffusion_model {model} --image_size {dataset.size} --resize {dataset.resize}"
        raise ValueError(f"{folder} has no latents ({error}); compute them with: python data/latents.py"
                         f" {folder} {flags}") from error
    return moments, done


def describe_latents(dataset: ImageTextDataset, model: str) -> dict:
    """What latents depend on; kept beside them. Older ones say no resize, and are bicubic."""
    return dict(diffusion_model=model, image_size=dataset.size, resize=dataset.resize, images=len(dataset),
                data=dataset.fingerprint)


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


@torch.autocast("cpu", enabled=False)  # which cannot stack moments in half precision
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
