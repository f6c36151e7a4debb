"""What train.py and sample.py leave behind: checkpoints, log, curves, sheets of pictures, and a page to look at."""

import hashlib
import html
import json
import math
import os
import re
import textwrap
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data.distributed import RANK
from data.loader import read_part
from data.settings import append, printable, write_atomically, write_lines
from vlv import find_folder

COLORS = {"loss": "#1f5fbf", "val_loss": "#d1495b"}  # of curves.png


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, the newest last."""
    found = {int(path.name[5:]): path for path in run_dir.glob("step-*") if re.fullmatch(r"step-\d+", path.name)}
    return {step: found[step] for step in sorted(found)}


def find_checkpoint(name: str | Path) -> Path:
    """A checkpoint's folder; the newest of the run there, or of the last stage there; or what was downloaded of
    a hub id. Raises OSError if there is none."""
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
    """A run's log.jsonl, which the first process writes, and skipped.txt. `records`: the lines of log.jsonl; those
    after `step` are taken out, as they come again."""

    def __init__(self, run_dir: Path, step: int):
        self.run_dir, self.path, self.records = run_dir, run_dir / "log.jsonl", []
        self.skipped, self.waited = set(), 0.0  # sentences; seconds for data, since the last line
        for line in self.path.open() if RANK == 0 and self.path.exists() else []:
            with suppress(ValueError):  # half a line, of a full disk
                self.records.append(json.loads(line))
        self.records = [record for record in self.records if record["step"] <= step] if step else []
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
        """Names samples that could not be read, each once, on any process."""
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


def panel(rows: list[list], captions: list[str], heads: list[str] | None = None) -> Image.Image:
    """A picture of rows of images, (3, S, S) uint8 tensors or PIL images of side S, each row over its
    caption, with heads over the columns. Small images are enlarged pixel by pixel."""
    to_array = lambda image: np.asarray(image.permute(1, 2, 0).cpu())
    as_image = lambda image: image if isinstance(image, Image.Image) else Image.fromarray(to_array(image))
    rows = [[as_image(image) for image in row] for row in rows]
    side = max(1, 192 // rows[0][0].width) * rows[0][0].width
    width, font, line = len(rows[0]) * (side + 4) - 4, ImageFont.load_default(14), 18
    texts = [textwrap.wrap(caption, max(10, width // 8)) for caption in captions]
    heights = [side + 4 + (line * len(text) + 6 if text else 0) for text in texts]
    sheet = Image.new("RGB", (width, sum(heights) - 4 * (not texts[-1]) + (line if heads else 0)), "white")
    draw, top = ImageDraw.Draw(sheet), line if heads else 0
    for column, head in enumerate(heads or []):
        draw.text((column * (side + 4) + 4, 0), head, "black", font)
    for row, text, height in zip(rows, texts, heights):
        for column, image in enumerate(row):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (column * (side + 4), top))
        for number, words in enumerate(text):
            draw.text((4, top + side + 3 + line * number), words, "black", font)
        top += height
    return sheet


PAGE = """<!doctype html><!-- made by vlv -->
<html lang="en"><meta charset="utf-8"><title>Captions</title>
<style>
  body { font: 1rem/1.45 system-ui, sans-serif; max-width: 76rem; margin: 1rem auto; padding: 0 1rem }
  figure { display: flex; flex-wrap: wrap; gap: 1rem; margin: 0; padding: 1rem 0; border-top: 1px solid #ccc }
  img { max-width: 100%; max-height: 24rem } figcaption { flex: 1 1 18rem; overflow-wrap: anywhere }
</style>
<p>Each row: the image; redrawn from its embedding and from its caption, where asked for; the caption.</p>"""


def write_page(path: Path, records: list[dict]) -> None:
    """A page of the lines of captions.jsonl, unless there is one of the user's. Pictures off the screen are not
    loaded, so that a browser takes thousands."""
    if path.exists() and not path.read_text(errors="replace").startswith(PAGE[:39]):
        return
    figure = ('<figure><img src="{}" alt="" loading="lazy" decoding="async"><figcaption><p dir="auto">{}</p>'
              "<code>{}</code></figcaption></figure>")
    lines = [PAGE]
    for record in records:
        picture, image = record["picture"], record["image"]
        source = quote(os.fsencode(picture)) if picture else Path(image).absolute().as_uri()
        lines.append(figure.format(source, html.escape(record["caption"] or ""), html.escape(printable(image))))
    write_lines(path, lines)
