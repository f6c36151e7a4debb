"""
Stage 2's images with captions: turns the authors' published set (parquet files with the columns image and
caption) into tar shards of 384-pixel JPEGs and their captions. See readme.md for sizes.

    pip install pyarrow
    hf download --repo-type dataset ccvl/LAION-High-Qualtiy-Pro-6M-VLV --local-dir captions6m-parquet
    python data/captions6m/prepare.py captions6m-parquet

Each parquet file becomes one shard; done.txt names those that are finished, also when their shard was moved
away for validation. A killed run goes on where it was, by the same command.
"""

import io
import os
import signal
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
from data.distributed import end_with_parent
from data.settings import Pixels, add_to_tar, read_settings, same_as_before, write_atomically
from vlv import open_image


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


def convert(names: tuple[Path, Path], size: int) -> tuple[int, list[str]]:
    """Writes the shard of one parquet file, unless no row is good. names: of both. Returns (number of
    samples, a sentence for each row left out). Raises ValueError."""
    try:
        return write_shard(*names, size)
    except Exception as error:  # Arrow's do not name the file
        raise ValueError(f"{names[0]}: {' '.join(str(error).split())}") from error


def write_shard(path: Path, target: Path, size: int) -> tuple[int, list[str]]:
    import pyarrow.parquet as pq

    count, problems, temporary = 0, [], target.with_suffix(".tmp")
    with pq.ParquetFile(path) as parquet, tarfile.open(temporary, "w") as tar:
        columns = parquet.schema_arrow.names
        if not {"image", "caption"} <= set(columns):
            raise ValueError(f"it has no columns image and caption, only {', '.join(columns)}")
        batches = parquet.iter_batches(batch_size=64, columns=["image", "caption"])
        for row, sample in enumerate(sample for batch in batches for sample in batch.to_pylist()):
            image, caption = sample["image"], sample["caption"]
            image = image.get("bytes") if isinstance(image, dict) else image  # datasets' Image feature
            try:
                if not isinstance(image, bytes) or not isinstance(caption, str) or not caption.strip():
                    raise ValueError("no image bytes" if not isinstance(image, bytes) else "no caption")
                members = [(".jpg", shrink(image, size)), (".txt", caption.strip().encode())]
            except Exception as error:  # whatever Pillow's plugins stumble over
                problems.append(f"{path}, row {row}: {' '.join(str(error).split())}")
                continue
            for ending, data in members:
                add_to_tar(tar, f"{target.stem.replace('.', '-')}-{row:08d}{ending}", data)  # a key has no dot
            count += 1
    if count:
        os.replace(temporary, target)
    temporary.unlink(missing_ok=True)
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
    names, empty, done_file = {}, [], args.out / "done.txt"
    try:
        for path in files:
            name = "-".join(path.relative_to(args.parquet).with_suffix("").parts)
            if name in names:
                raise ValueError(f"{names[name]} and {path} would both be {name}.tar: rename one")
            names[name] = path
        same_as_before(args.out / "settings.json", {"image_size": args.image_size}, "choose another --out")
        done = {path.stem for path in args.out.glob("*.tar")}
        done.update(done_file.read_text(encoding="utf-8").splitlines() if done_file.exists() else [])
        text = "".join(f"{name}\n" for name in sorted(done))
        write_atomically(done_file, lambda file: file.write_text(text, encoding="utf-8"))
        todo = {name: path for name, path in names.items() if name not in done}
        pool = ProcessPoolExecutor(args.processes, initializer=end_with_parent, initargs=(signal.SIGKILL,))
        with (pool, open(args.out / "left_out.txt", "a", 1) as file,
              open(done_file, "a", 1, encoding="utf-8") as finished):
            pairs = [(path, args.out / f"{name}.tar") for name, path in todo.items()]
            jobs = zip(todo, pool.map(partial(convert, size=args.image_size), pairs))
            for name, (count, problems) in tqdm(jobs, total=len(todo), unit=" files"):
                total, left_out = total + count, left_out + len(problems)
                file.writelines(problem + "\n" for problem in problems)
                if count:
                    finished.write(f"{name}\n")
                else:
                    empty.append(names[name])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"done: {total:,} new samples in {args.out}; {left_out} left out, which left_out.txt names")
    if empty:
        sys.exit(f"error: {len(empty)} files gave no sample, such as {empty[0]}: see left_out.txt")


if __name__ == "__main__":
    main()
