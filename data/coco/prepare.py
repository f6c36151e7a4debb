"""
COCO's published zip files to tar shards of images with their human captions; the paper's 30,000 images.

    python data/coco/prepare.py val2014.zip annotations_trainval2014.zip

writes shards/00000.tar, ... with KEY.jpg as it is in the zip file, KEY.txt (the first caption) and KEY.json
(all of them). A killed run goes on where it was, by the same command. readme.md says where the files are.
"""

import hashlib
import json
import os
import sys
import tarfile
import zipfile
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
from data.settings import Count, NonNegative, add_to_tar, read_settings, same_as_before


@dataclass
class PrepareConfig:
    images: Path  # zip file with the images
    annotations: Path  # zip file with captions_val2014.json
    out: Path = HERE / "shards"
    count: Count = 30_000  # images
    seed: NonNegative = 0  # chooses them
    shard_size: Count = 250  # images: the piece of work that evaluate.py gives to a process


@contextmanager
def open_zip(path: Path):
    """A zip file to read from. Raises ValueError, with its name, for one that is broken, encrypted or of an
    unknown method."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_captions(path: Path) -> dict[str, dict]:
    """{file name: {"image_id", "captions"}} of the images with captions. Raises ValueError if the zip file is
    another one."""
    with open_zip(path) as archive:
        name = next((n for n in archive.namelist() if Path(n).name == "captions_val2014.json"), None)
        if name is None:
            raise ValueError(f"{path} holds no captions_val2014.json, as annotations_trainval2014.zip does")
        data = json.loads(archive.read(name))
    try:
        captions = defaultdict(list)
        for note in sorted(data["annotations"], key=lambda note: note["id"]):
            captions[note["image_id"]].append(" ".join(note["caption"].split()))
        images = {image["file_name"]: image["id"] for image in data["images"] if captions[image["id"]]}
        return {name: {"image_id": i, "captions": captions[i]} for name, i in images.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: captions_val2014.json is not as COCO's is: {error!r}") from error


def read_caption_lines(path: Path) -> dict[str, str]:
    """{key: caption} of JSON lines by any program, in a file or a folder of them. The key is an image's name
    without folder and ending. Raises ValueError, with the line, for anything else."""
    from data.loader import IMAGE_ENDINGS  # here, as it imports torch

    captions = {}
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(open(file, encoding="utf-8", errors="backslashreplace"), 1):
            try:
                record = json.loads(line)
                name = Path(str(record["image"])).name
                caption = " ".join((record["caption"] or "").split())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f'{file}, line {number} is not {{"image": NAME, "caption": TEXT}}') from None
            stem, ending = os.path.splitext(name)
            captions[stem if ending.lower() in IMAGE_ENDINGS else name] = caption
    return captions


def choose(names, count: int, seed: int) -> list[str]:
    """`count` of the names, the same ones for ever: those whose hash with the seed is the least."""
    return sorted(sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:count])


def write_shard(shard: Path, archive: zipfile.ZipFile, samples: list[tuple]) -> None:
    """samples: [(the image's name in the archive, its record in read_captions), ...]"""
    with tarfile.open(shard.with_suffix(".tmp"), "w") as tar:
        for name, record in samples:
            stem, ending = os.path.splitext(Path(name).name)
            members = {ending: archive.read(name), ".txt": record["captions"][0].encode(),
                       ".json": json.dumps(record).encode()}
            for end, data in members.items():
                add_to_tar(tar, stem + end, data)
    shard.with_suffix(".tmp").rename(shard)


def main(argv=None):
    args = read_settings(PrepareConfig, argv, __doc__)
    settings = dict(count=args.count, seed=args.seed, shard_size=args.shard_size)
    try:
        captions = read_captions(args.annotations)
        with open_zip(args.images) as archive:
            members = {Path(name).name: name for name in archive.namelist()}
            known = sorted(captions.keys() & members.keys())
            if len(known) < args.count:
                raise ValueError(f"{args.images} holds {len(known):,} images that have captions, and not"
                                 f" {args.count:,}: give COCO's val2014.zip, or lower --count")
            same_as_before(args.out / "settings.json", settings, "choose another --out")
            samples = [(members[name], captions[name]) for name in choose(known, args.count, args.seed)]
            for at in tqdm(range(0, len(samples), args.shard_size), unit=" shards"):
                shard = args.out / f"{at // args.shard_size:05d}.tar"
                if not shard.exists():
                    write_shard(shard, archive, samples[at : at + args.shard_size])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"done: {args.count:,} images in {args.out}")


if __name__ == "__main__":
    main()
