"""
Captions of whole data sets, by any number of processes, in pieces that survive any kill. In the folder --out:

    00000.jsonl       a line {"image": "00000.tar/KEY", "caption": ...} for each image of 00000.tar: all of them, or no file yet
    captions.jsonl    the same of images that lie in no shard
    unreadable.txt    what could not be read
    .parts/           what is not finished: a line an image, in files of batches that follow each other

A batch is always the same images, so its captions are, too, whoever computes them and however often the run was killed.
"""

import hashlib
import io
import json
import os
import shutil
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from data.checkpoint import sync, write_whole
from data.loader import crop_image, open_image, read_shard, read_spans
from data.results import TEXT, Results, write_lines
from data.settings import printable, read_json

read_shard_once = lru_cache(maxsize=2)(read_shard)  # a worker's batches come from one shard after the other


@dataclass
class Source:
    """A shard, or all images that lie in none."""

    name: str  # its results are OUT/NAME.jsonl
    shard: Path | None = None
    paths: list[Path] = field(default_factory=list)
    count: int = 0
    problem: str | None = None

    def __post_init__(self):
        self.count = self.count or len(self.paths)

    def read(self, i: int, size: int) -> dict:
        """{"name", "stem": of its picture, "image": (3, size, size) uint8, or None where it cannot be read, "problem": why}. The
        image is NumPy's, which goes through a pipe: torch's would lie in shared memory, where a kill leaves it."""
        if self.shard:
            keys, spans, _ = read_shard_once(self.shard)
            name, stem, file = f"{self.name}.tar/{keys[i]}", Path(keys[i]).name, None
        else:
            file = self.paths[i]
            name, stem = str(file), file.stem
        try:
            if self.shard:
                file = io.BytesIO(read_spans(self.shard, (int(spans[i, 1]), int(spans[i, 0])))[0])
            return dict(name=name, stem=stem, image=crop_image(open_image(file, size), size).numpy(), problem=None)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            problem = f"{name}: cannot be read as an image: {' '.join(str(error).split())}"
            return dict(name=name, stem=stem, image=None, problem=problem)


class Images(torch.utils.data.Dataset):
    """Index (number of the source, i) -> Source.read."""

    def __init__(self, sources: list[Source], size: int):
        self.sources, self.size = sources, size

    def __getitem__(self, place):
        return self.sources[place[0]].read(place[1], self.size)


def find_shards(names: list[Path]) -> list[Source]:
    """The shards that tar files and folders of them stand for. Raises ValueError where two would have one name."""
    found = {}
    for name in names:
        for shard in sorted(name.rglob("*.tar")) if name.is_dir() else [name]:
            relative = shard.relative_to(name if name.is_dir() else name.parent).with_suffix("").as_posix()
            if relative in found and found[relative].shard != shard:
                raise ValueError(f"{found[relative].shard} and {shard} would both be {relative}.jsonl: give each its own --out")
            found[relative] = Source(relative, shard)
    return list(found.values())


def count_shard(shard: Path) -> tuple[int, str | None]:
    keys, _, problem = read_shard(shard)
    return len(keys), problem


class Work:
    """What is to be captioned into a folder, and what of it is done. One process looks, and says it to the others."""

    def __init__(self, out: Path, sources: list[Source], made_with: dict, problems: list[str]):
        self.named, self.problems = problems, list(problems)  # sentences about what cannot be read
        self.out, self.sources, self.made_with, self.parts = out, sources, made_with, out / ".parts"
        self.batch_size = made_with["batch_size"]
        for source in sources:
            if not source.shard:  # other images or other settings are other work
                about = json.dumps([made_with, [str(path) for path in source.paths]])
                source.name = f"captions-{hashlib.sha256(about.encode(errors='surrogateescape')).hexdigest()[:16]}"

    def count(self) -> None:
        """How many images each shard holds: once, by all cores. What was made of a shard that has changed goes."""
        shards = [source for source in self.sources if source.shard]
        if not shards:
            return
        self.parts.mkdir(parents=True, exist_ok=True)
        file = self.parts / "counts.json"
        try:
            known = read_json(file)
        except ValueError:  # none yet, or half of one
            known = {}
        stats = {s.name: [s.shard.stat().st_size, s.shard.stat().st_mtime_ns] for s in shards}
        new = [s for s in shards if known.get(s.name, [None])[0] != stats[s.name] or known[s.name][2]]
        with ProcessPoolExecutor(max(1, min(os.cpu_count(), len(new)))) as pool:
            counts = pool.map(count_shard, [s.shard for s in new])
            bar = tqdm(zip(new, counts), total=len(new), desc="counting images", unit=" shards", disable=len(new) < 10)
            for source, (count, problem) in bar:
                before = known.get(source.name, [stats[source.name], count])
                if before[0][0] != stats[source.name][0] or before[1] != count:
                    tqdm.write(f"{source.shard} has changed, and is captioned anew")
                    self.final(source).unlink(missing_ok=True)
                    shutil.rmtree(self.parts / source.name, ignore_errors=True)
                known[source.name] = [stats[source.name], count, problem]
        write_whole(file, lambda path: path.write_text(json.dumps(known)))
        for source in shards:
            _, source.count, source.problem = known[source.name]

    def final(self, source: Source) -> Path:
        return self.out / f"{source.name}.jsonl"

    def noted(self, source: Source) -> Path:
        """Where it stands what of a source cannot be read."""
        return self.parts / f"{source.name if source.shard else 'captions'}.unreadable"

    def batches_of(self, source: Source) -> int:
        return -(-source.count // self.batch_size)

    def places(self, batch: tuple[int, int]) -> list[tuple[int, int]]:
        """The images of a batch."""
        number, at = batch
        stop = min(self.sources[number].count, (at + 1) * self.batch_size)
        return [(number, i) for i in range(at * self.batch_size, stop)]

    def batches(self) -> list[tuple[int, int]]:
        """All: (number of the source, number of the batch in it)."""
        return [(number, at) for number, source in enumerate(self.sources) for at in range(self.batches_of(source))]

    def to_do(self) -> list[tuple[int, int]]:
        """The batches of which not every line is there."""
        left = []
        for number, source in enumerate(self.sources):
            if source.shard and self.final(source).exists():
                continue
            done = set()
            for start, part in self.parts_of(source):
                lines = sum(1 for _ in records_of(part))
                last = start + lines >= source.count
                done.update(range(start // self.batch_size, self.batches_of(source) if last else (start + lines) // self.batch_size))
            left += [(number, at) for at in range(self.batches_of(source)) if at not in done]
        return left

    def parts_of(self, source: Source) -> list[tuple[int, Path]]:
        """[(number of its first image, file)], in order"""
        return sorted((int(path.name.split("-")[0]), path) for path in (self.parts / source.name).glob("*.jsonl"))

    def finish(self, results: Results) -> None:
        """Makes results of all that is done, also by killed calls, and names what cannot be read."""
        self.keep_others(results)
        for source in self.sources:
            self.finish_one(source, results)
        self.problems = self.named + self.unreadable()

    def finish_one(self, source: Source, results: Results | None = None) -> None:
        """Makes the results of a source out of its parts, if it is all there. Where this is killed, it can be done again."""
        if source.problem and not source.count:
            return
        if source.shard and self.final(source).exists():
            shutil.rmtree(self.parts / source.name, ignore_errors=True)  # where it was killed the last time
            return
        parts, expected, captions, problems = self.parts_of(source), 0, [], []
        for start, part in parts:
            for i, (line, record) in enumerate(records_of(part), start):
                if i == expected:  # two processes may have done the same, when one outlived a killed run
                    expected += 1
                    problem = record.get("problem")
                    problems += [problem] if problem else []
                    captions += [] if problem else [line if source.shard else record]
        if expected < source.count:
            return
        self.note(source, problems)
        if source.shard:
            self.final(source).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.final(source), lambda path: (path.write_text("".join(captions), **TEXT), sync(path)))
        else:
            for record in captions:
                results.add(record["image"], record["caption"])
            results.write_all()
        shutil.rmtree(self.parts / source.name, ignore_errors=True)

    def note(self, source: Source, problems: list[str]) -> None:
        """What of a source cannot be read, in place of what was noted of it before."""
        file = self.noted(source)
        if source.problem:
            problems = [source.problem, *problems]
        file.parent.mkdir(parents=True, exist_ok=True)
        if problems or file.exists():
            write_lines(file, [printable(problem) + "\n" for problem in problems])

    def keep_others(self, results: Results) -> None:
        """What killed calls with other images or settings had done goes into captions.jsonl."""
        mine = {source.name for source in self.sources}
        for folder in self.parts.glob("captions-*"):
            if folder.name not in mine:
                for part in sorted(folder.glob("*.jsonl")):
                    for _, record in records_of(part):
                        if not record.get("problem"):
                            results.add(record["image"], record["caption"])
                results.write_all()
                shutil.rmtree(folder, ignore_errors=True)

    def unreadable(self) -> list[str]:
        """The sentences, which are also in unreadable.txt."""
        lines = []
        for source in self.sources:
            file = self.noted(source)
            if source.problem and not source.count:
                lines.append(printable(source.problem))
            elif file.exists():
                with open(file, **TEXT) as opened:
                    lines += [line.rstrip("\n") for line in opened]
        target = self.out / "unreadable.txt"
        if lines or target.exists():
            write_lines(target, [line + "\n" for line in lines])
        return lines

    def check_is_ours(self) -> None:
        """Raises ValueError where results are there that this program has not written."""
        found = [self.final(source) for source in self.sources if source.shard and self.final(source).exists()]
        if found and not (self.out / "settings.json").exists():
            raise ValueError(f"{found[0]} was not written by this program: choose another --out")

    def check_is_shared(self) -> None:
        """Raises ValueError where the folder is not the one that the first process sees."""
        if not (self.out / ".lock").exists():
            raise ValueError(f"{self.out} must be on storage that all machines see")


class Part:
    """A process's own file of batches of one source that follow each other. Where these are all of a shard, its results are
    made at once."""

    def __init__(self, work: Work):
        self.work, self.first, self.next, self.file = work, None, None, None

    def add(self, batch: tuple[int, int], items: list[dict]) -> None:
        """Writes a batch's lines, all at once."""
        source = self.work.sources[batch[0]]
        if batch != self.next:
            self.close()
            self.first = batch
            folder = self.work.parts / source.name
            folder.mkdir(parents=True, exist_ok=True)
            # a name that no other process writes to, not even one that outlives a killed run
            self.file = open(folder / f"{batch[1] * self.work.batch_size:09d}-{uuid.uuid4().hex[:12]}.jsonl", "x", **TEXT)
        lines = []
        for item in items:
            kind = "problem" if item["problem"] else "caption"
            lines.append(json.dumps({"image": item["name"], kind: item[kind]}, ensure_ascii=False) + "\n")
        self.file.write("".join(lines))
        self.file.flush()
        self.next = (batch[0], batch[1] + 1)
        if source.shard and self.first[1] == 0 and self.next[1] == self.work.batches_of(source):
            self.work.finish_one(source)

    def close(self) -> None:
        if self.file:
            self.file.close()


def records_of(part: Path):
    """Yields (line, record) of the whole lines of a part."""
    with open(part, **TEXT) as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                return
            if not line.endswith("\n"):
                return
            yield line, record
