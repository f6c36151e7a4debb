"""
COCO's published zip files to tar shards of images with their human captions; the paper's 30,000 images, by a fixed seed.

    python data/coco/prepare.py val2014.zip annotations_trainval2014.zip

writes shards/00000.tar, ... with KEY.jpg as it is in the zip file, KEY.txt (the first caption) and KEY.json (all of them).
A killed run goes on where it was, by the same command. readme.md says where the files are.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
from data.settings import Count, Seed, Settings, parse_settings, same_as_before


@dataclass
class PrepareConfig(Settings):
    images: Path  # zip file with the images
    annotations: Path  # zip file with captions_val2014.json
    out: Path = HERE / "shards"
    count: Count = 30_000  # images
    seed: Seed = 0
    shard_size: Count = 250  # images: the piece of work that evaluate.py gives to a process


def read_captions(path: Path) -> dict[str, dict]:
    """{file name: {"image_id", "captions"}} of the images that have captions. Raises ValueError when the zip file has no
    captions_val2014.json, or another one."""
    with zipfile.ZipFile(path) as archive:
        name = next((n for n in archive.namelist() if Path(n).name == "captions_val2014.json"), None)
        if name is None:
            raise ValueError(f"{path} holds no captions_val2014.json: give COCO's annotations_trainval2014.zip")
        data = json.loads(archive.read(name))
    try:
        captions = defaultdict(list)
        for note in sorted(data["annotations"], key=lambda note: note["id"]):
            captions[note["image_id"]].append(" ".join(note["caption"].split()))
        return {i["file_name"]: {"image_id": i["id"], "captions": captions[i["id"]]} for i in data["images"] if captions[i["id"]]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: captions_val2014.json is not as COCO's is: {error!r}") from error


def choose(names, count: int, seed: int) -> list[str]:
    """`count` of the names, the same ones for ever: those whose hash with the seed is the least."""
    return sorted(sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:count])


def main(argv=None):
    args = parse_settings(PrepareConfig, argv, __doc__)
    try:
        captions = read_captions(args.annotations)
        with zipfile.ZipFile(args.images) as archive:
            members = {Path(name).name: name for name in archive.namelist()}
            known = sorted(captions.keys() & members.keys())
            if len(known) < args.count:
                raise ValueError(f"{args.images} holds {len(known):,} images that have captions in {args.annotations}, and not"
                                 f" {args.count:,}: give COCO's val2014.zip, or a lower --count")  # fmt: skip
            same_as_before(args.out / "settings.json", dict(count=args.count, seed=args.seed, shard_size=args.shard_size),
                           "choose another --out")  # fmt: skip
            chosen = choose(known, args.count, args.seed)
            for at in tqdm(range(0, len(chosen), args.shard_size), unit=" shards"):
                shard = args.out / f"{at // args.shard_size:05d}.tar"
                if shard.exists():
                    continue
                with tarfile.open(shard.with_suffix(".tmp"), "w") as tar:
                    for name in chosen[at : at + args.shard_size]:
                        first, everything = captions[name]["captions"][0], json.dumps(captions[name])
                        stem, ending = os.path.splitext(name)
                        for end, data in [(ending, archive.read(members[name])), (".txt", first.encode()),
                                          (".json", everything.encode())]:  # fmt: skip
                            info = tarfile.TarInfo(stem + end)
                            info.size = len(data)
                            tar.addfile(info, io.BytesIO(data))
                shard.with_suffix(".tmp").rename(shard)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        sys.exit(f"error: {error}")
    print(f"done: {args.count:,} images in {args.out}")


if __name__ == "__main__":
    main()
