"""
Stage 2's images with captions: turns the authors' published set (parquet files with the columns image and
caption) into tar shards of 384-pixel JPEGs and their captions. See readme.md for sizes.

    pip install pyarrow
    hf download --repo-type dataset ccvl/LAION-High-Qualtiy-Pro-6M-VLV --local-dir captions6m-parquet
    python data/captions6m/prepare.py captions6m-parquet

Each parquet file becomes one shard. A killed run goes on where it was, by the same command.
"""

import io
import os
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
from data.loader import open_image
from data.settings import Pixels, read_settings, same_as_before


def shrink(data: bytes, size: int) -> bytes:
    """A JPEG whose shorter side is `size`; smaller images, and JPEGs of that size, are kept as they are."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "JPEG" and min(image.size) <= size:
            return data
    image = open_image(io.BytesIO(data), size)
    if min(image.size) > size:
        scale = size / min(image.size)
        image = image.resize([max(size, round(n * scale)) for n in image.size], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def convert(path: Path, source: Path, out: Path, size: int) -> tuple[int, list[str]]:
    """Writes the shard of one parquet file. Returns (number of samples, a sentence for each left out)."""
    import pyarrow.parquet as pq

    target = out / f"{'-'.join(path.relative_to(source).with_suffix('').parts)}.tar"
    if target.exists():
        return 0, []
    count, problems, temporary = 0, [], target.with_suffix(".tmp")
    with pq.ParquetFile(path) as parquet, tarfile.open(temporary, "w") as tar:
        columns = parquet.schema_arrow.names
        if not {"image", "caption"} <= set(columns):
            raise ValueError(f"{path} has no columns image and caption, only {', '.join(columns)}")
        batches = parquet.iter_batches(batch_size=64, columns=["image", "caption"])
        for row, sample in enumerate(sample for batch in batches for sample in batch.to_pylist()):
            image, caption = sample["image"], sample["caption"]
            image = image.get("bytes") if isinstance(image, dict) else image  # datasets' Image feature
            try:
                if not isinstance(image, bytes) or not (caption and caption.strip()):
                    raise ValueError("no image bytes" if not isinstance(image, bytes) else "no caption")
                members = [(".jpg", shrink(image, size)), (".txt", caption.strip().encode())]
            except Exception as error:  # whatever Pillow's plugins stumble over
                problems.append(f"{path}, row {row}: {' '.join(str(error).split())}")
                continue
            for ending, data in members:
                info = tarfile.TarInfo(f"{target.stem}-{row:08d}{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            count += 1
    os.replace(temporary, target)
    return count, problems


@dataclass
class PrepareConfig:
    parquet: Path  # folder of parquet files
    out: Path = HERE / "shards"
    image_size: Pixels = 384
    processes: Annotated[int, 1, 1024] = os.cpu_count()


def main(argv=None):
    args = read_settings(PrepareConfig, argv, __doc__)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        sys.exit("error: pyarrow is missing, install it with: pip install pyarrow")
    files = sorted(args.parquet.rglob("*.parquet"))
    if not files:
        sys.exit(f"error: there are no parquet files in {args.parquet}; download them as {__file__} says")
    total = left_out = 0
    try:
        same_as_before(args.out / "settings.json", {"image_size": args.image_size}, "choose another --out")
        with ProcessPoolExecutor(args.processes) as pool, open(args.out / "left_out.txt", "a", 1) as file:
            jobs = pool.map(partial(convert, source=args.parquet, out=args.out, size=args.image_size), files)
            for count, problems in tqdm(jobs, total=len(files), unit=" files"):
                total, left_out = total + count, left_out + len(problems)
                file.writelines(problem + "\n" for problem in problems)
    except Exception as error:  # of a parquet file, or of the disk
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"done: {total:,} new samples in {args.out}; {left_out} left out, which left_out.txt names")


if __name__ == "__main__":
    main()
