"""
Stage 1's images: filters LAION's metadata as the paper did and downloads what is left with img2dataset, as
tar shards of 384 x 384 JPEGs. See readme.md for sizes, times and where the metadata comes from.

    pip install img2dataset pyarrow
    python data/laion/prepare.py METADATA --max_images 1000000

METADATA is a folder of parquet files with the columns URL, TEXT, WIDTH, HEIGHT and pwatermark. A killed run
goes on where it was, by the same command.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.settings import Count, Pixels, read_settings, same_as_before

COLUMNS = ["URL", "TEXT", "WIDTH", "HEIGHT", "pwatermark"]


def keep(table):
    """The rows that the paper keeps: shorter side > 512 pixels, aspect ratio 0.5 to 2, watermark < 0.5."""
    import pyarrow.compute as pc

    width, height = table["WIDTH"], table["HEIGHT"]
    shorter, longer = pc.min_element_wise(width, height), pc.max_element_wise(width, height)
    good = pc.and_(pc.greater(shorter, 512), pc.less_equal(longer, pc.multiply(shorter, 2)))
    return table.filter(pc.and_(good, pc.less(table["pwatermark"], 0.5)))  # a missing value counts as no


def filter_metadata(source: Path, files: list[Path], folder: Path, max_images: int | None) -> int:
    """Writes URL and TEXT of the rows that are kept, one parquet file for each in `source`. Returns how many
    rows. What exists is not made again."""
    import pyarrow.parquet as pq
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    count = read = 0
    targets = {}
    for path in tqdm(files, desc="filtering", unit=" files"):
        target = folder / "-".join(path.relative_to(source).parts)
        if targets.setdefault(target, path) != path:
            raise ValueError(f"{targets[target]} and {path} would both be {target}: rename one")
        try:
            read += pq.read_metadata(path).num_rows
        except Exception as error:  # Arrow's do not name the file
            raise ValueError(f"{path} cannot be read: {error}") from error
        if target.exists():
            count += pq.read_metadata(target).num_rows
        else:
            missing = set(COLUMNS) - set(pq.read_schema(path).names)
            if missing:
                raise ValueError(f"{path} has no column {min(missing)}: is it LAION's metadata?")
            table = keep(pq.read_table(path, columns=COLUMNS)).select(["URL", "TEXT"])
            table = table.slice(0, max_images - count) if max_images else table
            pq.write_table(table, target.with_suffix(".tmp"))
            os.replace(target.with_suffix(".tmp"), target)
            count += len(table)
        if max_images and count >= max_images:
            break
    print(f"{count:,} of {read:,} images pass the paper's filter")
    return count


@dataclass
class PrepareConfig:
    metadata: Path  # folder of LAION's parquet files
    out: Path = HERE / "shards"
    max_images: Count | None = None  # stop filtering there
    image_size: Pixels = 384
    processes: Annotated[int, 1, 1024] = os.cpu_count()
    threads: Annotated[int, 1, 1024] = 64  # downloads at a time, in each process
    images_per_shard: Count = 10_000
    distributor: str = "multiprocessing"  # or pyspark, to spread over machines


def main(argv=None):
    args = read_settings(PrepareConfig, argv, __doc__)
    try:
        from img2dataset import download  # it needs pyarrow, too
    except ImportError as error:
        sys.exit(f"error: {error.name} is missing, install it with: pip install img2dataset pyarrow")
    files = sorted(args.metadata.rglob("*.parquet"))
    if not files:
        sys.exit(f"error: there are no parquet files in {args.metadata}; readme.md tells where to get them")
    filtered = args.out.with_name(args.out.name + "-metadata")
    made_with = {name: getattr(args, name) for name in ("max_images", "image_size", "images_per_shard")}
    try:
        same_as_before(filtered / "settings.json", made_with, "give it as it was, or choose another --out")
        count = filter_metadata(args.metadata, files, filtered, args.max_images)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if not count:
        sys.exit(f"error: of the images in {args.metadata} none passes the filter")
    args.out.mkdir(parents=True, exist_ok=True)
    # sizes are asked for once more: the metadata may be out of date
    download(str(filtered), input_format="parquet", url_col="URL", caption_col="TEXT",
             output_folder=str(args.out), output_format="webdataset", image_size=args.image_size,
             resize_mode="center_crop", encode_quality=95, number_sample_per_shard=args.images_per_shard,
             processes_count=args.processes, thread_count=args.threads, min_image_size=512,
             max_aspect_ratio=2.0, retries=1, distributor=args.distributor, incremental_mode="incremental")
    broken = [p for p in args.out.glob("*.tar") if not p.with_name(f"{p.stem}_stats.json").exists()]
    if broken:
        sys.exit(f"error: {len(broken)} shards are not finished, such as {broken[0]}: run this again")
    print(f"done: {len(list(args.out.glob('*.tar')))} shards in {args.out}")


if __name__ == "__main__":
    main()
