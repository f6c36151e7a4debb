"""What sample.py writes into --out: pictures, captions.jsonl, and index.html to look at them."""

import html
import itertools
import json
import os
import sys
import textwrap
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data.run import append, lock
from data.settings import TEXT, printable, write_atomically, write_lines


def panel(rows: list[list], captions: list[str], heads: list[str] | None = None) -> Image.Image:
    """A picture of rows of images, (3, S, S) uint8 tensors or PIL images of side S, each row over its
    caption, with heads over the columns. Small images are enlarged pixel by pixel."""
    to_array = lambda image: np.asarray(image.permute(1, 2, 0).cpu())
    as_image = lambda image: image if isinstance(image, Image.Image) else Image.fromarray(to_array(image))
    rows = [[as_image(image) for image in row] for row in rows]
    side = max(1, 192 // rows[0][0].width) * rows[0][0].width
    width, font, line = len(rows[0]) * (side + 4) - 4, ImageFont.load_default(14), 18
    box = bytes(font.getmask("\uffff"))  # which the font draws for letters that it does not have
    can_draw = lambda caption: not any(c.isprintable() and bytes(font.getmask(c)) == box for c in caption)
    captions = [c if can_draw(c) else "(caption not drawn: letters that this font lacks)" for c in captions]
    texts = [textwrap.wrap(caption, max(10, width // 8)) for caption in captions]
    heights = [side + 4 + (line * len(text) + 6 if text else 0) for text in texts]
    height = sum(heights) - 4 * (not texts[-1]) + (line if heads else 0)
    sheet = Image.new("RGB", (width, height), "white")
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


def report(problems: list[str]) -> int:
    """Says what could not be done, at most a hundred of it. Returns the program's exit code."""
    for problem in problems[:100]:
        print(f"error: {printable(problem)}", file=sys.stderr)
    if len(problems) > 100:
        print(f"error: and {len(problems) - 100:,} more", file=sys.stderr)
    return 1 if problems else 0


def write_beside(captions: dict[Path, str], kinds: tuple[str, ...], overwrite: bool) -> list[str]:
    """Captions beside their images: "txt", NAME.txt as kohya's trainer reads it; "metadata", metadata.jsonl
    as `datasets` reads it. Other texts that are there stay, unless overwrite. Returns a sentence for each."""
    problems, images = [], {}
    for image, caption in captions.items() if "txt" in kinds else ():
        path = image.with_suffix(".txt")
        before = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
        if images.setdefault(path, image) != image:
            problems.append(f"{path} is of {images[path]}, so {image} has none")
        elif before not in ("", caption) and not overwrite:
            problems.append(f"{path} holds another text, and stays: --overwrite replaces it")
        else:
            write_lines(path, [caption])
    for folder in {image.parent for image in captions} if "metadata" in kinds else ():
        path = folder / "metadata.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            records = {record["file_name"]: record for record in map(json.loads, lines)}
        except (ValueError, KeyError, TypeError):
            problems.append(f"{path} is no metadata.jsonl of images, and is left as it is")
            continue
        for image in [image for image in captions if image.parent == folder]:
            record = records.setdefault(image.name, {"file_name": image.name})
            if record.get("text", captions[image]) != captions[image] and not overwrite:
                problems.append(f"{path} has another text of {image.name}: --overwrite replaces it")
            else:
                record["text"] = captions[image]
        write_lines(path, [json.dumps(record, ensure_ascii=False) for record in records.values()])
    return problems


class Results:
    """captions.jsonl, a line {"image", "caption", "picture", "checkpoint", "made_of"} for each image; the
    pictures that it names; and index.html, which shows them. Other files in the folder stay. Raises
    ValueError for another program's captions.jsonl, OSError if something cannot be written."""

    def __init__(self, folder: Path):
        self.lock = lock(folder)  # two calls at a time would each take the other's lines away
        self.folder, self.path = folder, folder / "captions.jsonl"
        self.records = {}
        for line in open(self.path, **TEXT) if self.path.exists() else []:
            try:
                record = json.loads(line)
                record = {key: record[key] for key in ("image", "caption", "picture")} | record
                if record["picture"] and not (folder / record["picture"]).exists():
                    record |= {"picture": None, "made_of": None}  # it is to be drawn again
                self.records[record["image"]] = record
            except (ValueError, KeyError, TypeError):
                if line.endswith("\n"):  # else it is half a line of a call that was killed
                    hint = "was not written by this program: choose another --out"
                    raise ValueError(f"{self.path} {hint}") from None
        self.finish()

    def add(self, image: str, caption: str | None, picture: Image.Image | None, stem: str, **more) -> dict:
        """Replaces this image's result, if there was one; returns its record. The picture is STEM.png, or
        STEM-2.png, ... where that is another's. more: what else the line says."""
        before = self.records.pop(image, {"picture": None, "caption": None})
        name = before["picture"]
        if picture is not None:
            names = (f"{stem}.png" if n == 1 else f"{stem}-{n}.png" for n in itertools.count(1))
            name = name or next(free for free in names if not os.path.lexists(self.folder / free))
            write_atomically(self.folder / name, lambda file: picture.save(file, "png"))
        elif name and before["caption"] != caption:
            tqdm.write(f"{name} is removed: it was drawn from another caption", file=sys.stderr)
            (self.folder / name).unlink(missing_ok=True)
            name = None
        record = self.records[image] = {"image": image, "caption": caption, "picture": name} | more
        append(self.path, json.dumps(record, ensure_ascii=False))
        return record

    def finish(self) -> None:
        """Leaves one line an image, and writes the page, unless index.html is a file of the user's."""
        if self.records:
            write_lines(self.path, [json.dumps(r, ensure_ascii=False) for r in self.records.values()])
        page = self.folder / "index.html"
        if self.records and (not page.exists() or page.read_text(errors="replace").startswith(PAGE[:39])):
            write_lines(page, [PAGE, *(figure(record) for record in self.records.values())])


def figure(record: dict) -> str:
    """A row of the page. Pictures off the screen are not loaded, so that a browser takes thousands."""
    name = record["picture"]
    source = quote(os.fsencode(name)) if name else Path(record["image"]).absolute().as_uri()
    captions = "".join(f'<p dir="auto">{html.escape(text)}</p>' for text in record.get("captions") or
                       [record["caption"] or ""])
    about = html.escape(f"{record['image']}, by {record.get('checkpoint', 'an unknown checkpoint')}")
    return (f'<figure><img src="{source}" alt="" loading="lazy" decoding="async"><figcaption>{captions}'
            f"<code>{about}</code></figcaption></figure>")


PAGE = """<!doctype html><!-- made by vlv -->
<html lang="en"><meta charset="utf-8"><title>Captions</title>
<style>
  body { font: 1rem/1.45 system-ui, sans-serif; max-width: 76rem; margin: 1rem auto; padding: 0 1rem }
  figure { display: flex; flex-wrap: wrap; gap: 1rem; margin: 0; padding: 1rem 0; border-top: 1px solid #ccc }
  img { max-width: 100%; max-height: 24rem }
  figcaption { flex: 1 1 18rem; overflow-wrap: anywhere } code { color: #777 }
</style>
<p>Each row: the image; redrawn from its embedding and from its caption, where asked for; the caption.</p>"""
