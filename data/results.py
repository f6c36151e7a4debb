"""What train.py and sample.py leave behind: checkpoints, log, curves, sheets of pictures, and a page."""

import hashlib
import html
import json
import math
import os
import textwrap
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data.distributed import RANK
from data.loader import read_part
from data.settings import append, printable, read_json_lines, write_atomically, write_lines
from vlv import find_folder

COLORS = {"loss": "#1f5fbf", "val_loss": "#d1495b"}  # of curves.png


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, the newest last."""
    found = {int(path.name[5:]): path for path in run_dir.glob("step-*") if path.name[5:].isdecimal()}
    return dict(sorted(found.items()))


def find_checkpoint(name: str | Path) -> Path:
    """A checkpoint's folder; the newest of the run there, or of the last stage there; or what was downloaded
    of a hub id. Raises OSError if there is none."""
    folder = Path(name).expanduser()
    for run in (folder, folder / "stage2", folder / "stage1"):
        if (found := checkpoints(run)) and not (folder / "config.json").exists():
            return [*found.values()][-1]
    return find_folder(name)


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """Tells checkpoints apart: a hash of config.json, and of the ends of the weights' files."""
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for path in sorted(checkpoint.glob("model*.safetensors")):
        digest.update(read_part(path, 0, 2**20) + read_part(path, max(0, path.stat().st_size - 2**20)))
    return digest.hexdigest()[:16]


class Log:
    """A run's log.jsonl, which the first process writes, and skipped.txt. `records`: the lines of log.jsonl;
    those after `step` are taken out, as they come again."""

    def __init__(self, run_dir: Path, step: int):
        self.run_dir, self.path = run_dir, run_dir / "log.jsonl"
        self.records = [record for record in read_json_lines(self.path) if step and record["step"] <= step]
        self.skipped, self.waited = set(), 0.0  # sentences; seconds for data, since the last line
        if RANK == 0:
            write_lines(self.path, map(json.dumps, self.records))

    def add(self, step: int, **values) -> None:
        """A line for log.jsonl, with null for what is not finite."""
        self.records.append({"step": step} | {n: v if math.isfinite(v) else None for n, v in values.items()})
        if RANK == 0:
            append(self.path, json.dumps(self.records[-1]))

    def best(self) -> int | None:
        """The step with the least validation loss, of those whose checkpoint is there."""
        losses = {r["step"]: r["val_loss"] for r in self.records if r.get("val_loss") is not None}
        return min(losses.keys() & checkpoints(self.run_dir).keys(), key=losses.get, default=None)

    def skip(self, sentences: list[str]) -> None:
        """Names samples that could not be read, each once a process and start."""
        for sentence in sentences:
            if sentence not in self.skipped:
                self.skipped.add(sentence)
                append(self.run_dir / "skipped.txt", sentence)
                tqdm.write(f"skipped: {sentence}")


def draw_curves(path: Path, records: list[dict]) -> None:
    """Draws the losses in records, the lines of log.jsonl, on a logarithmic scale."""
    image = Image.new("RGB", (1200, 800), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(24)
    lines = {name: [(r["step"], math.log10(max(r[name], 1e-9))) for r in records if r.get(name) is not None]
             for name in COLORS}
    points = np.array([point for line in lines.values() for point in line] or [(0, 0.0)])
    (first, low), (last, high) = points.min(0), points.max(0)
    x = lambda step: np.interp(step, [first, last], [120, 1160])
    y = lambda value: np.interp(value, [low, high], [740, 80])
    for step, value in np.linspace((first, low), (last, high), 5):
        draw.line([(120, y(value)), (1160, y(value))], "#e4e4e4", 2)
        draw.text((110, y(value)), f"{10 ** value:.3g}", "black", font, "rm")
        draw.text((x(step), 752), f"{step:.6g}", "black", font, "ma")
    for number, (name, line) in enumerate(lines.items()):
        draw.text((120 + 360 * number, 24), name, COLORS[name], font)
        draw.line([(x(step), y(value)) for step, value in line], COLORS[name], 4)
    write_atomically(path, lambda file: image.save(file, "png"))


def panel(rows: list[list], captions: list[str]) -> Image.Image:
    """A picture of rows of images, (3, S, S) uint8 tensors or PIL images of side S, each row over its
    caption. Small images are enlarged pixel by pixel."""
    to_array = lambda image: np.asarray(image.permute(1, 2, 0).cpu() if torch.is_tensor(image) else image)
    cells = np.stack([[to_array(image) for image in row] for row in rows])  # (rows, columns, S, S, 3)
    scale, columns = max(1, 192 // cells.shape[2]), cells.shape[1]
    cells = cells.repeat(scale, 2).repeat(scale, 3)
    texts = [textwrap.wrap(caption, max(10, columns * cells.shape[3] // 8)) for caption in captions]
    below = 4 + 18 * max(map(len, texts))
    cells = np.pad(cells, ((0, 0), (0, 0), (0, below), (0, 4), (0, 0)), constant_values=255)
    sheet = Image.fromarray(np.vstack([np.hstack(row) for row in cells]))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, text in enumerate(texts, 1):
        draw.text((4, row * cells.shape[2] - below), "\n".join(text), "black", font)
    return sheet


PAGE = """<!doctype html><!-- made by vlv --><meta charset="utf-8"><title>Captions</title>
<style>img { max-width: 100%; max-height: 24rem }</style>
<p>Each picture: the image; redrawn from its embedding and from its caption, where asked for."""


def write_page(path: Path, records: list[dict]) -> None:
    """A page of the lines of captions.jsonl, unless there is one of the user's. Pictures off the screen are
    not loaded, so that a browser takes thousands."""
    if path.exists() and "<!-- made by vlv -->" not in path.read_text(errors="replace"):
        return
    lines = [PAGE]
    for record in records:
        picture, image = record["picture"], record["image"]
        source = quote(os.fsencode(picture)) if picture else Path(image).as_uri()
        caption, name = html.escape(record["caption"] or ""), html.escape(printable(image))
        lines.append(f'<p><img src="{source}" alt="" loading="lazy"><br>{caption}<br><code>{name}</code>')
    write_lines(path, lines)
