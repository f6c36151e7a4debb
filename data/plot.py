"""
Line plots with error bars, by Pillow alone: a run's curves.png, and the figures of data/shapes/experiments.py.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.checkpoint import write_whole

COLORS = ("#1f5fbf", "#d1495b", "#2e8b57", "#e0912f", "#7d4fb0", "#5f6b73")


@dataclass
class Plot:
    """One pair of axes. lines: name -> [(x, y) or (x, y, error), ...], None for y where there is no value."""

    title: str
    lines: dict[str, list[tuple]]
    x_label: str = ""
    log_x: bool = False
    dots: bool = False  # at each point
    ticks: list[float] = field(default_factory=list)  # of x; empty: round numbers


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers from low to high."""
    span = high - low
    power = 10 ** math.floor(math.log10(span / count))
    step = power * next(factor for factor in (1, 2, 5, 10) if power * factor * count >= span)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A tick's label: 0.2, 30k."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{round(value, 10):g}"


def draw_plots(plots: list[Plot], width: int = 420, height: int = 300, columns: int = 3) -> Image.Image:
    """The plots side by side, `columns` in a row, drawn at twice their size in pixels."""
    columns = min(columns, len(plots))
    rows = -(-len(plots) // columns)
    sheet = Image.new("RGB", (2 * width * columns, 2 * height * rows), "white")
    for number, plot in enumerate(plots):
        sheet.paste(draw_plot(plot, 2 * width, 2 * height), (2 * width * (number % columns), 2 * height * (number // columns)))
    return sheet


def draw_plot(plot: Plot, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(26), ImageFont.load_default(22)
    draw.text((width / 2, 12), plot.title, "black", font, "ma")
    points = [(*p, 0.0)[:3] for line in plot.lines.values() for p in line if p[1] is not None and math.isfinite(p[1])]
    left, right, top, bottom = 110, width - 30, 60 + 30 * len(plot.lines), height - 80
    if not points:
        draw.text((width / 2, height / 2), "nothing yet", "grey", font, "mm")
        return image
    across = math.log10 if plot.log_x else float
    xs = [across(p[0]) for p in points] + [across(tick) for tick in plot.ticks]
    ys = [p[1] + sign * p[2] for p in points for sign in (-1, 1)]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    x_high += (x_high == x_low) * 1.0
    margin = 0.05 * (y_high - y_low) or abs(0.1 * y_high) or 1.0
    y_low, y_high = y_low - margin, y_high + margin
    at = lambda x, y: (left + (across(x) - x_low) / (x_high - x_low) * (right - left),
                       bottom - (y - y_low) / (y_high - y_low) * (bottom - top))  # fmt: skip
    for y in round_ticks(y_low, y_high):
        draw.line([(left, at(points[0][0], y)[1]), (right, at(points[0][0], y)[1])], "#e4e4e4", 2)
        draw.text((left - 10, at(points[0][0], y)[1]), short(y), "black", small, "rm")
    for x in plot.ticks or ([] if plot.log_x else round_ticks(x_low, x_high)):
        draw.line([(at(x, y_low)[0], bottom), (at(x, y_low)[0], bottom + 8)], "black", 2)
        draw.text((at(x, y_low)[0], bottom + 12), short(x), "black", small, "ma")
    draw.text(((left + right) / 2, height - 36), plot.x_label, "black", small, "ma")
    draw.rectangle([left, top, right, bottom], outline="black", width=2)
    for number, (name, line) in enumerate(plot.lines.items()):
        color = COLORS[number % len(COLORS)]
        draw.line([(left, 68 + 30 * number), (left + 40, 68 + 30 * number)], color, 5)
        draw.text((left + 52, 68 + 30 * number), name, "black", small, "lm")
        places = [at(p[0], p[1]) for p in line if p[1] is not None and math.isfinite(p[1])]
        if len(places) > 1:
            draw.line(places, color, 4, "curve")
        for x, y, error in ((*p, 0.0)[:3] for p in line if p[1] is not None):
            if error:
                draw.line([at(x, y - error), at(x, y + error)], color, 3)
            if plot.dots or len(places) == 1:
                draw.ellipse([at(x, y)[0] - 6, at(x, y)[1] - 6, at(x, y)[0] + 6, at(x, y)[1] + 6], color)
    return image


def draw_curves(path: Path) -> None:
    """Draws what the log.jsonl beside it says: losses and speed of a run."""
    records = []
    for line in (path.parent / "log.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # half a line, written as the disk was full
            pass
    curve = lambda name: [(record["step"], record[name]) for record in records if record.get(name) is not None]
    losses = {"training": curve("loss"), "validation": curve("val_loss")}
    plots = [Plot("loss", {name: points for name, points in losses.items() if points}, "step"),
             Plot("speed", {"images a second": curve("images_per_second")}, "step"),
             Plot("learning rate", {"learning rate": curve("lr")}, "step")]  # fmt: skip
    write_whole(path, lambda file: draw_plots(plots).save(file, "png"))
