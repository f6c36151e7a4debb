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
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image
from tqdm import tqdm

from data.settings import printable
from vlv import to_pixels

IMAGE_ENDINGS = tuple(".png .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .avif"
                      " .heic .heif .jp2 .j2k .apng .tga .ico .psd".split())
COMPANIONS = (".txt", ".json", ".jsonl", ".html", ".tar", ".npy", ".bin")  # beside images
INDEX_VERSION = 3  # of what read_shard takes from a shard
# Reasons why it leaves something out
SECOND_IMAGE, NO_IMAGE = "images beside another of their key are left out", "texts have no image"
TWICE, OTHER_KIND = "names come twice, and the last is taken", "files are of other kinds"


def walk(folder: Path) -> tuple[list[Path], list[str]]:
    """All files below a folder, also behind links, sorted, without hidden ones (thumbnail caches and the
    like); and a sentence for each that is out of reach."""
    files, problems, seen = [], [], set()
    fail = lambda error: problems.append(f"{printable(error.filename)}: {error.strerror}")
    for root, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(root)
        if real in seen:  # a link led back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(root, name)
                if path.is_file():
                    files.append(path)
                else:
                    problems.append(f"{printable(path)}: it is a link that leads nowhere, or no file")
    return sorted(files), problems


def is_shard(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def packed(files: list[Path]) -> list[str]:
    """A sentence for each compressed tar file."""
    found = [path for path in files if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", path.name, re.IGNORECASE)]
    return [printable(f"{path}: a compressed tar file: unpack it, as with gunzip") for path in found]


def is_image(path: Path) -> bool:
    """By its ending, or, where that is unknown, by what is in it."""
    if path.suffix.lower() in (*IMAGE_ENDINGS, *COMPANIONS):
        return path.suffix.lower() in IMAGE_ENDINGS
    try:
        with Image.open(path):
            return True
    except Exception:  # of any of Pillow's plugins
        return False


def read_captions(path: Path) -> dict[Path, bytes]:
    """{image file: caption} of the captions.jsonl that sample.py writes, or of a folder with it. Raises
    ValueError."""
    path, found = path / "captions.jsonl" if path.is_dir() else path, {}
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            record = json.loads(line)
            if record["caption"]:
                found[Path(record["image"]).resolve()] = record["caption"].encode()
    except OSError as error:
        raise ValueError(f"captions of a folder of images are JSON lines: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}, is none with image and caption") from error
    return found


def decode_text(data: bytes) -> str:
    """Raises OSError for what is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise OSError("its caption is not UTF-8: convert it, as iconv does") from None


class ImageTextDataset(torch.utils.data.Dataset):
    """Images, their captions and their latents' moments.

    folder: holds *.tar shards at any depth, or else images. resize: see VLVConfig. with_captions: an image
    without one is unreadable. captions: data/caption.py's --out for the shards, to replace their texts;
    images without a line there are left out; for a folder of images sample.py's captions.jsonl. latents_of:
    the text-to-image model whose moments data/latents.py has computed ahead; None: no moments. `fingerprint`
    is the same as long as the samples are; `problems` are sentences about what is there and cannot be used.
    Raises ValueError if there is nothing to read."""

    def __init__(self, folder, size: int, with_captions=False, latents_of: str | None = None, captions="",
                 resize="bicubic"):
        self.folder, self.size, self.resize, self.with_captions = Path(folder), size, resize, with_captions
        if not str(folder):
            raise ValueError("the data folder's name is empty")
        if not self.folder.is_dir():
            is_file = self.folder.exists()
            hint = "is a file: name a folder" if is_file else "does not exist; make it, or name another"
            raise ValueError(f"data folder {folder} {hint}")
        files, self.problems = walk(self.folder)
        self.problems += packed(files)
        self.shards, self.files, self.captions = [path for path in files if is_shard(path)], [], None
        images = [path for path in files if is_image(path)]
        if self.shards:
            if captions and not Path(captions).is_dir():
                raise ValueError(f"captions must be a folder of JSON lines ({captions}) for tar shards")
            if captions:
                names = [shard.relative_to(self.folder).with_suffix(".jsonl") for shard in self.shards]
                self.captions = [Path(captions) / name for name in names]
            if images:
                loose = f"{len(images):,} images beside the tar shards are left out"
                self.problems.append(f"{self.folder}: {loose}, such as {images[0]}")
            self.problems += self.load_index(Path(captions) if captions else self.folder)
            with_text, lacks = np.count_nonzero(self.index[:, 4]), "its shards hold no KEY.txt"
        else:
            if captions:
                lines = read_captions(Path(captions))
                pairs = [(path, lines.get(path.resolve())) for path in images]
                pairs = [(path, text) for path, text in pairs if text]
            else:
                texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
                pairs = [(path, texts.get(path.with_suffix(""))) for path in images]
                known = {path for pair in pairs for path in pair}
                silent = {*COMPANIONS} - {".txt"}
                others = [path for path in files if path not in known and path.suffix.lower() not in silent]
                if others:
                    count = f"{len(others):,} files are no images that can be read, or texts without one"
                    self.problems.append(printable(f"{self.folder}: {count}, such as {others[0]}"))
            self.files, self.texts = [path for path, _ in pairs], [text for _, text in pairs]
            names = "\n".join(str(f.relative_to(self.folder)) for f in self.files)
            self.fingerprint = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
            with_text, lacks = len(self.texts) - self.texts.count(None), "no image has a NAME.txt beside it"
        self.summary = f"{len(self):,} samples from {self.folder}, {with_text:,} of them with captions"
        if not len(self):
            recipe = self.folder / "prepare.py"
            hint = f"; fill it with: python {recipe}" if recipe.exists() else ""
            raise ValueError(f"data folder {folder} holds neither images nor tar shards{hint}")
        if with_captions and not with_text:
            raise ValueError(f"data folder {folder} has no captions, which stage 2 needs: {lacks}")
        self.moments = open_latents(self, latents_of) if latents_of else None

    def __str__(self):
        return self.summary

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
            source, text = self.files[i], self.texts[i]
            name = printable(source)
        try:
            caption = ""
            if self.with_captions and text:
                caption = decode_text(text if isinstance(text, bytes) else text.read_bytes())
            if self.with_captions and not caption:
                raise OSError("no caption")
            image = to_pixels(source, self.size, self.resize)
        except OSError as error:
            raise OSError(f"{name}: {error}") from error
        moments = None if self.moments is None else torch.from_numpy(np.array(self.moments[i]))
        if moments is not None and not moments.isfinite().all():
            raise OSError(f"{name}: it has no latents: data/latents.py could not read it; run that again")
        return {"image": image, "caption": caption or None, "moments": moments}

    def read_member(self, shard: int, image_offset: int, image_size: int, text_offset: int, text_size: int):
        """(name, image file, text as bytes) of a sample in a shard. text_size: below 0 of a JSON file."""
        with open(self.shards[shard], "rb") as file:
            header = os.pread(file.fileno(), 100, image_offset - 512)  # begins with the member's name
            image = io.BytesIO(os.pread(file.fileno(), image_size, image_offset))
            text = b"" if self.captions else os.pread(file.fileno(), abs(text_size), text_offset)
        if self.captions:
            with open(self.captions[shard], "rb") as file:
                text = os.pread(file.fileno(), text_size, text_offset)
        if text_size < 0 or self.captions:
            text = (json.loads(text)["caption"] or "").encode(errors="replace")
        member = header.split(bytes(1))[0].decode(errors="replace")
        return printable(f"{self.shards[shard]}:{member}"), image, text

    def load_index(self, cache: Path) -> list[str]:
        """Sets `index`, (n, 5) int64, memory-mapped: number of the shard, and what index_shard says; and
        `fingerprint`. Returns sentences about what cannot be used. The index is built by all cores, and kept
        in the folder `cache` (or with the hub's files, where that is read-only) until a file changes."""
        files = [(shard, str(shard.relative_to(self.folder))) for shard in self.shards]
        files += [(lines, str(lines.relative_to(cache))) for lines in self.captions or [] if lines.exists()]
        stamp = [[name, file.stat().st_size, file.stat().st_mtime_ns] for file, name in files]
        if not os.access(cache, os.W_OK):
            cache = Path(HF_HOME, "vlv", hashlib.sha256(str(cache.resolve()).encode()).hexdigest()[:16])
        array_file, stamp_file = cache / "index.bin", cache / "index.json"
        with suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
            saved = json.loads(stamp_file.read_text(encoding="utf-8"))
            if saved["shards"] == stamp and saved["version"] == INDEX_VERSION:
                self.fingerprint = index_fingerprint(array_file, stamp)
                self.index = np.memmap(array_file, np.int64, mode="r").reshape(-1, 5)
                if self.fingerprint == saved["fingerprint"]:
                    return saved["problems"]
        problems, count, left_out = [], len(self.shards), {}
        unfinished = Path(f"{array_file}.{os.uname().nodename}.{os.getpid()}")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stamp_file.unlink(missing_ok=True)
            with ProcessPoolExecutor(min(os.cpu_count(), count)) as pool, open(unfinished, "wb") as file:
                found = pool.map(index_shard, self.shards, self.captions or [None] * count)
                bar = tqdm(found, desc=f"indexing {self.folder}", total=count, disable=count < 10)
                for number, (spans, broken, others) in enumerate(bar):
                    np.insert(spans, 0, number, axis=1).tofile(file)
                    problems += broken
                    for kind, (many, example) in others.items():
                        before, first = left_out.get(kind, (0, example))
                        left_out[kind] = before + many, first
            for kind, (many, example) in left_out.items():
                problems.append(printable(f"{self.folder}: {many:,} {kind}, such as {example}"))
            if not unfinished.stat().st_size:
                where = f"with captions in {cache}" if self.captions else "in them"
                reason = "".join(f": {problem}" for problem in problems[:1])
                raise ValueError(f"{self.folder} has {count} tar shards, but no images {where}{reason}")
            os.replace(unfinished, array_file)
            self.fingerprint = index_fingerprint(array_file, stamp)
            saved = dict(version=INDEX_VERSION, shards=stamp, problems=problems, fingerprint=self.fingerprint)
            unfinished.write_text(json.dumps(saved), encoding="utf-8")
            os.replace(unfinished, stamp_file)
        except OSError as error:
            where = error.filename or f"{cache}, or /dev/shm"
            raise ValueError(f"cannot make the index of the data: {where}: {error.strerror}") from error
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        self.index = np.memmap(array_file, np.int64, mode="r").reshape(-1, 5)
        return problems


def find_shared(a: ImageTextDataset, b: ImageTextDataset) -> tuple[Path, Path] | None:
    """A file that two data sets both hold, by both names; of shards also copies are found."""
    sizes, files = {}, {(path.stat().st_dev, path.stat().st_ino): path for path in a.shards + a.files}
    for path in a.shards:
        sizes.setdefault(path.stat().st_size, []).append(path)
    for path in b.shards + b.files:
        state = path.stat()
        same = files.get((state.st_dev, state.st_ino))
        copies = sizes.get(state.st_size, []) if is_shard(path) else []
        same = same or next((other for other in copies if filecmp.cmp(other, path, shallow=False)), None)
        if same:
            return same, path
    return None


class SyntheticDataset(torch.utils.data.Dataset):
    """One random image with a caption of so many words, over and over, for benchmarks. moments_shape: (2C, h,
    w), as if moments had been computed ahead; None: no moments."""

    problems, fingerprint = [], "synthetic"

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


def read_shard(path: Path) -> tuple[list[str], np.ndarray, list[str], dict[str, list[str]]]:
    """The keys of a shard's n images; (n, 4) int64: image offset, image size, text offset, text size (0, 0
    without a text, below 0 of a JSON file with a "caption"); what is wrong with the shard; and names of what
    is left out, by the reason.

    As in webdataset, a sample's key ends at the first dot of the file's name: KEY.jpg and KEY.txt belong
    together, and so do KEY.image.png, KEY.mask.png and KEY.caption.txt."""
    places, links, problems, samples, again = {}, {}, [], {}, []
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if name in places:
                    again.append(name)
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
        problems.append(f"{path}: broken shard ({error}); the samples before the break are used")
        with suppress(OSError), open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                problems = [f"{path}: broken shard; it is compressed: unpack it with gunzip"]
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
            samples.setdefault(posixpath.join(folder, file.split(".")[0]), []).append(name)
    spans, left_out = {}, {SECOND_IMAGE: [], NO_IMAGE: [], TWICE: again, OTHER_KIND: []}
    for key, names in samples.items():
        # KEY.jpg goes before KEY.image.png, and that before KEY.mask.png
        names.sort(key=lambda name: (name.count("."), ".image." not in name, ".caption." not in name))
        of_kind = lambda *endings: [n for n in names if posixpath.splitext(n)[1].lower() in endings]
        images, texts, (at, size) = of_kind(*IMAGE_ENDINGS), of_kind(".txt"), (0, 0)
        jsons = of_kind(".json")
        left_out[OTHER_KIND] += {*names} - {*images, *texts, *jsons}
        left_out[SECOND_IMAGE] += images[1:]
        left_out[NO_IMAGE] += [] if images else texts
        if not images:
            continue
        captions = [] if texts else [places[name] for name in jsons if has_caption(path, *places[name])]
        if texts:
            at, size = places[texts[0]]
        elif captions:
            at, size = captions[0][0], -captions[0][1]
        spans[key] = *places[images[0]], at, size
    return list(spans), np.array(list(spans.values()), dtype=np.int64).reshape(-1, 4), problems, left_out


def has_caption(path: Path, at: int, size: int) -> bool:
    """Whether this part of the file is JSON with a "caption"."""
    try:
        with open(path, "rb") as file:
            return isinstance(json.loads(os.pread(file.fileno(), size, at))["caption"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def index_shard(path: Path, captions: Path | None = None) -> tuple[np.ndarray, list[str], dict]:
    """What read_shard says, without the keys; of what is left out {reason: (how many, an example)}. captions:
    JSON lines of this shard, whose places replace those of its texts; only images that have a line are
    kept."""
    keys, spans, problems, left_out = read_shard(path)
    left_out = {kind: (len(names), names[0]) for kind, names in left_out.items() if names}
    if not keys:
        left_out["shards hold no images"] = 1, str(path)
    if captions is None:
        return spans, problems, left_out
    lines, at, bad, count = {}, 0, [], 0
    for line in open(captions, "rb") if captions.exists() else []:
        try:
            record = json.loads(line)
            if not isinstance(record["caption"], str | None):
                raise TypeError
            shard, _, key = record["image"].partition(".tar/")
            if Path(shard).name == captions.stem:
                lines[key] = at, len(line)
            count += 1
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            bad.append(f"{captions}: byte {at:,} begins no line with image and caption")
        at += len(line)
    kept = [i for i, key in enumerate(keys) if key in lines]
    if not captions.exists():
        left_out["shards have no captions, as their files are not there"] = 1, str(captions)
    elif len(kept) < len(keys):
        left_out["images have no line among the captions"] = len(keys) - len(kept), str(captions)
    if len(kept) < count:
        left_out["lines of captions are of no image here, or come twice"] = count - len(kept), str(captions)
    if len(bad) > 1:
        bad[0] += f", nor do {len(bad) - 1:,} others"
    texts = np.array([lines[keys[i]] for i in kept], dtype=np.int64).reshape(-1, 2)
    left_out.pop(NO_IMAGE, None)
    return np.concatenate([spans[kept, :2], texts], 1), problems + bad[:1], left_out


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
    hint = (f"python data/latents.py {folder} --diffusion_model {model} --image_size {dataset.size}"
            f" --resize {dataset.resize}")
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
    other = {"resize": dataset.resize} if dataset.resize != "bicubic" else {}
    return other | dict(diffusion_model=model, image_size=dataset.size, images=len(dataset),
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
