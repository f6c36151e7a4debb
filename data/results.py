"""
What sample.py writes: pictures, captions.jsonl, and index.html to look at them.
"""

import html
import json
import os
import textwrap
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from data.checkpoint import lock, write_whole
from data.loader import IMAGE_ENDINGS

# "backslashreplace" makes JSON's own escape of a name's byte that is not UTF-8
TEXT = dict(encoding="utf-8", errors="backslashreplace", newline="\n")


def panel(rows: list[list], captions: list[str]) -> Image.Image:
    """A picture of rows of images, (3, S, S) uint8 tensors or PIL images of side S, each row over its caption.
    Small images are enlarged pixel by pixel."""
    rows = [[i if isinstance(i, Image.Image) else Image.fromarray(np.asarray(i.permute(1, 2, 0))) for i in r] for r in rows]
    side = max(1, 192 // rows[0][0].width) * rows[0][0].width
    width, font, line = len(rows[0]) * (side + 4) - 4, ImageFont.load_default(14), 18
    texts = [textwrap.wrap(caption, max(10, width // 8)) for caption in captions]
    heights = [side + 4 + (line * len(text) + 6 if text else 0) for text in texts]
    sheet = Image.new("RGB", (width, sum(heights) - 4 * (not texts[-1])), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for row, text, height in zip(rows, texts, heights):
        for column, image in enumerate(row):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (column * (side + 4), top))
        for number, words in enumerate(text):
            draw.text((4, top + side + 3 + line * number), words, "black", font)
        top += height
    return sheet


def write_lines(path: Path, lines) -> None:
    """The file, whole, with these lines, each of which has its end."""
    write_whole(path, lambda unfinished: unfinished.write_text("".join(lines), **TEXT))


def read_captions(path: Path) -> dict[str, str]:
    """{key: caption} of JSON lines; an image's key is the last part of its name, without an image's ending."""
    captions = {}
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(open(file, **TEXT), 1):
            try:
                record = json.loads(line)
                name = str(record["image"]).rsplit("/", 1)[-1]
                caption = record["caption"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}, line {number}: must be {{\"image\": NAME, \"caption\": TEXT}}") from None
            stem, ending = os.path.splitext(name)
            captions[stem if ending.lower() in IMAGE_ENDINGS else name] = " ".join((caption or "").split())
    return captions


def is_drawn(path: Path) -> bool:
    """Whether a file is a picture that Results drew, and not another one of its name."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == "vlv"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


class Results:
    """What is in the folder --out: captions.jsonl, a line {"image", "caption", "picture"} for each image, the pictures that it
    names, and index.html, which shows them. Nothing else there is touched. Raises ValueError for a captions.jsonl of another
    program, OSError when something cannot be written."""

    def __init__(self, folder: Path):
        self.lock, _ = lock(folder)  # two calls at a time would each take the other's lines away
        self.folder, self.path, self.records = folder, folder / "captions.jsonl", {}
        for line in open(self.path, **TEXT) if self.path.exists() else []:
            try:
                record = json.loads(line)
                if not isinstance(record.get("picture"), str | None):
                    raise TypeError
                self.records[str(record["image"])] = {key: record.get(key) for key in ("image", "caption", "picture")}
            except (ValueError, KeyError, TypeError, AttributeError):
                if line.endswith("\n"):  # else a call was killed while it wrote
                    raise ValueError(f"{self.path} was not written by this program: choose another --out") from None
        self.pictures = {record["picture"] for record in self.records.values() if record["picture"]}
        self.write_all()

    def add(self, image: str, caption: str | None, picture: Image.Image | None = None, stem: str = "") -> None:
        """Replaces this image's result, if there was one. The picture is STEM.png, or STEM-2.png, ... where that is another's."""
        before = self.records.pop(image, {"picture": None})["picture"]
        self.pictures.discard(before)
        replaces = before is not None and is_drawn(self.folder / before)
        name = None
        if picture is not None:
            name = before if replaces else self.free_name(stem)
            mark = PngInfo()
            mark.add_text("Software", "vlv")
            write_whole(self.folder / name, lambda path: picture.save(path, "png", pnginfo=mark))
            self.pictures.add(name)
        elif replaces:
            (self.folder / before).unlink()  # it shows another caption
        self.records[image] = {"image": image, "caption": caption, "picture": name}
        with open(self.path, "a", **TEXT) as file:
            file.write(json.dumps(self.records[image], ensure_ascii=False) + "\n")

    def free_name(self, stem: str) -> str:
        name, number = f"{stem}.png", 1
        while name in self.pictures or os.path.lexists(self.folder / name) and not is_drawn(self.folder / name):
            number += 1
            name = f"{stem}-{number}.png"
        return name

    def write_all(self) -> None:
        """One line an image, as what add() has replaced goes; and the page."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self.records.values()]
        if lines:
            write_lines(self.path, lines)
        page = self.folder / "index.html"
        if self.pictures and (not page.exists() or open(page, **TEXT).readline() == PAGE.split("\n")[0] + "\n"):
            write_lines(page, [self.page()])

    def page(self) -> str:
        """The pictures beside their captions. Those that are not on the screen are neither loaded nor laid out, so that a
        browser takes thousands."""
        figures = []
        for record in self.records.values():
            if record["picture"]:
                width, height = panel_size(self.folder / record["picture"])
                figures.append(
                    f'<figure><img src="{quote(os.fsencode(record["picture"]))}" width="{width}" height="{height}" alt=""'
                    f' loading="lazy" decoding="async"><figcaption><p dir="auto">{html.escape(record["caption"] or "")}</p>'
                    f"<code>{html.escape(record['image'])}</code></figcaption></figure>\n"
                )
        return PAGE + "".join(figures)

    def close(self) -> None:
        (self.folder / ".lock").unlink(missing_ok=True)
        self.lock.close()


def panel_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError):  # the user has removed it
        return 0, 0


PAGE = """<!doctype html><!-- made by vlv -->
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Captions</title>
<style>
  body { font: 1rem/1.45 system-ui, sans-serif; max-width: 76rem; margin: 1rem auto; padding: 0 1rem; color: #222; background: #fff }
  figure { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; margin: 0; padding: 1rem 0; border-top: 1px solid #ccc;
           content-visibility: auto; contain-intrinsic-size: auto 17rem }
  img { max-width: min(100%, 48rem); height: auto; flex: none; align-self: flex-start }
  figcaption { flex: 1 1 18rem; overflow-wrap: anywhere }
  p { margin: 0 0 .5rem }
  code { color: #777; font-size: .8rem }
</style>
<h1>Captions</h1>
<p>Each row: the image, redrawn from its embedding, redrawn from its caption; and the caption.</p>
"""
