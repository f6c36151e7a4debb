"""
Draws a run's curves.png, by Pillow alone.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.settings import write_whole

COLORS = {"loss": "#1f5fbf", "val_loss": "#d1495b"}


def draw_curves(path: Path, records: list[dict], width: int = 1200, height: int = 800) -> None:
    """Draws the losses in records, the lines of log.jsonl: of training in blue, of validation in red."""
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(24)
    lines = {name: [(r["step"], r[name]) for r in records if r.get(name) is not None] for name in COLORS}
    points = [point for line in lines.values() for point in line] or [(0, 0.0)]
    (first, last), (low, high) = [(min(values), max(values)) for values in zip(*points)]
    left, right, top, bottom = 120, width - 40, 40, height - 60
    x_scale, y_scale = (right - left) / ((last - first) or 1), (bottom - top) / ((high - low) or 1)
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + part * (right - left), bottom - part * (bottom - top)
        draw.line([(left, y), (right, y)], "#e4e4e4", 2)
        draw.text((left - 10, y), f"{low + part * (high - low):.3g}", "black", font, "rm")
        draw.text((x, bottom + 12), f"{first + part * (last - first):.0f}", "black", font, "ma")
    for number, (name, line) in enumerate(lines.items()):
        pixels = [(left + (step - first) * x_scale, bottom - (value - low) * y_scale) for step, value in line]
        draw.text((right - 10, top + 30 * number), name, COLORS[name], font, "ra")
        draw.line(pixels, COLORS[name], 4)
        for x, y in pixels[-1:]:
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], COLORS[name])
    write_whole(path, lambda file: image.save(file, "png"))
