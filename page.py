"""HTML pages, each a single file that contains its images, for wide and narrow screens.

    import page
    shown = [page.card(page.image(pil_image), page.lines("apple", ["0.31", "0.24"]))]
    page.write("index.html", "Title", "A sentence below it.",
               page.table(["name", "score"], [["apple", "0.31"]]),
               page.cards(shown))

Functions escape the text in their arguments and return pieces of HTML as strings; write() joins
pieces into a page. A page loads nothing from the network and follows the reader's light or dark
mode.

From top to bottom: writing a file, text and tables, images and cards, line charts, the style. This
file needs no package and no other file of the project; callers open images with Pillow.

Not included: scripts, and charts other than lines.
"""

import base64
import html
import io
import math
import os
from pathlib import Path
from urllib.parse import quote

# ---- writing a file ----

def write(path, title, intro, *parts):
    """Write a page: title and intro are text, parts are pieces of HTML."""
    title, intro = html.escape(title), html.escape(intro)
    write_text(path, f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1><p>{intro}</p>
{"".join(parts)}</html>
""")


def write_text(path, text):
    """Write a text file in UTF-8, atomically. If writing fails, the old file stays.

    Lone surrogates, which UTF-8 cannot encode, become "?". An OSError names `path`.
    """
    temporary = Path(f"{path}.{os.getpid()}")
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


# ---- text and tables ----

def heading(title, text=""):
    """A heading, and a paragraph below it if there is text."""
    paragraph = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<h2>{html.escape(title)}</h2>{paragraph}"


def table(head, rows):
    """A table. head and each row are lists of text; the first column is aligned left."""
    def table_row(tag, cells):
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{cells}</tr>"

    parts = [table_row("th", head)] + [table_row("td", row) for row in rows]
    return f'<div class="wide"><table>{"".join(parts)}</table></div>'


def links(found):
    """A list of links to files in the page's folder. found: [(file name, text)]."""
    items = [f'<li><a href="{quote(os.fsencode(name))}">{html.escape(text)}</a></li>'
             for name, text in found]
    return f"<ul>{''.join(items)}</ul>"


def names(title, found, language=""):
    """A title and a numbered list of names, the best first.

    found: [(name, whether it is right)]; right ones are marked. language: that of the title and the
    names, such as "ko".
    """
    items = []
    for name, is_right in found:
        mark = ' class="right"' if is_right else ""
        items.append(f"<li{mark}>{html.escape(name)}</li>")
    language = html.escape(language)
    return (f'<b lang="{language}">{html.escape(title)}</b>'
            f'<ol lang="{language}">{"".join(items)}</ol>')


def lines(title, texts):
    """A title and lines of text below it."""
    texts = "".join(f"<small>{html.escape(text)}</small>" for text in texts)
    return f"<b>{html.escape(title)}</b>{texts}"


# ---- images and cards ----

def image(pil_image, side=72, name=""):
    """A PIL image in a square of `side` pixels. name: what it shows, for the tooltip.

    It is stored at up to twice this size, for screens of high resolution.
    """
    pil_image = pil_image.copy()
    pil_image.thumbnail((2 * side, 2 * side))
    buffer = io.BytesIO()
    pil_image.save(buffer, "PNG")
    content = base64.b64encode(buffer.getvalue()).decode()
    name = html.escape(name)
    return (f'<img alt="{name}" title="{name}" width="{side}" height="{side}" '
            f'src="data:image/png;base64,{content}">')


def row(images):
    """A row of images, each made by image()."""
    return f'<div class="row">{"".join(images)}</div>'


def card(left, body):
    """A frame. left: from image() or row(). body, to the right of it: from names() or lines()."""
    return f'<div class="card">{left}<div>{body}</div></div>'


def cards(many):
    """A grid of cards, with as many columns as fit."""
    return f'<div class="cards">{"".join(many)}</div>'


# ---- line charts ----

def plot(title, series, dots=False, unit="steps", start=0):
    """A heading and a line chart. The y axis starts at 0.

    series: {label: [(x, y)]}, at most four. dots: mark each point. unit: that of x. start: where
    the x axis starts. Returns "" if there are fewer than two points.
    """
    series = {label: points for label, points in series.items() if points}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    if len(xs) < 2:
        return ""
    last, step = max(xs), _round_step(max(ys))
    last = last if last > start else start + 1
    legend = []
    shapes = [f'<path class="grid" d="M0 {y}h100"/>' for y in (0, 25, 50, 75, 100)]
    for i, (label, points) in enumerate(series.items()):
        # Both axes of the SVG go from 0 to 100, and its y axis points down.
        positions = [(round(100 * (x - start) / (last - start), 2), round(100 - 25 * y / step, 2))
                     for x, y in points]
        line = " ".join(f"{x},{y}" for x, y in positions)
        shapes.append(f'<g class="c{i}"><polyline points="{line}"/>')
        if dots:
            # A line of length 0 with round ends. A circle would be scaled to an ellipse.
            shapes += [f'<path class="dot" d="M{x} {y}h0"/>' for x, y in positions]
        shapes.append("</g>")
        legend.append(f'<span class="c{i}">{html.escape(label)}</span>')
    ticks = "".join(f"<span>{step * i:g}</span>" for i in (4, 3, 2, 1, 0))
    return (f'{heading(title)}<div class="chart"><div class="legend">{"".join(legend)}</div>'
            f'<div class="y">{ticks}</div>'
            f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
            f'aria-label="{html.escape(title)}">{"".join(shapes)}</svg>'
            f'<div class="x"><span>{start:,}</span><span>{last:,} {html.escape(unit)}</span></div>'
            '</div>')


def _round_step(highest):
    """The smallest of 1, 2, 2.5 and 5 times powers of ten such that 4 steps reach `highest`."""
    highest = highest if highest > 1e-12 else 1
    power = 10 ** math.floor(math.log10(highest / 4))
    return next(power * n for n in (1, 2, 2.5, 5, 10) if 4 * power * n >= highest)


# ---- the style ----

STYLE = """
:root {
  color-scheme: light dark;
  --ink: light-dark(#1c1c1a, #e8e6e0); --dim: light-dark(#6b6a65, #9b9a94);
  --line: light-dark(#dcdad2, #3a3935); --paper: light-dark(#fbfaf7, #191917);
  --right: light-dark(#0a7d4b, #4cc38a);
}
.c0 { color: light-dark(#2456b3, #8ab4f8) } .c1 { color: light-dark(#b3402a, #f2917b) }
.c2 { color: light-dark(#0a7d4b, #4cc38a) } .c3 { color: light-dark(#8a5a00, #e3b341) }

/* keep-all: break Korean lines between words, and not inside them. */
body { background: var(--paper); color: var(--ink); max-width: 60rem; margin: auto; padding: 1.2rem;
  word-break: keep-all; overflow-wrap: break-word; font: 16px/1.5 system-ui, "Apple SD Gothic Neo",
  "Noto Sans KR", "Noto Sans CJK KR", "Malgun Gothic", sans-serif }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } p { color: var(--dim) }
b { font-size: .85rem; font-weight: 600 } small { display: block; font-size: .85rem }
ol { margin: .1rem 0 .4rem; padding-left: 1.1rem; font-size: .85rem }
.right { color: var(--right); font-weight: 600 } .right::after { content: " ✓" }

.wide { overflow-x: auto; margin-bottom: 1.4rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  text-align: right; font-weight: normal }
th { color: var(--dim) } td + td { white-space: nowrap }
td:first-child, th:first-child { text-align: left }

img { max-width: 100%; background: #fff; border-radius: .3rem; object-fit: contain; flex: none }
.row { display: flex; flex-wrap: wrap; gap: .4rem; margin: .2rem 0 .8rem }
.card > .row { flex: none }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)) }
.card { display: flex; gap: .8rem; border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem; overflow-wrap: anywhere }

/* Labels of a chart are HTML, because they must keep their size while the lines are scaled. */
.chart { display: grid; grid-template-columns: auto 1fr; gap: .5rem; font-size: .8rem;
  color: var(--dim) }
.legend, .x { grid-column: 2; display: flex; flex-wrap: wrap; gap: 0 1rem }
.x { justify-content: space-between }
.y { display: flex; flex-direction: column; justify-content: space-between; text-align: right;
  line-height: 1rem; margin: -.5rem 0 }
svg { width: 100%; height: 13rem; overflow: visible; fill: none; stroke: currentColor }
svg * { vector-effect: non-scaling-stroke } .grid { stroke: var(--line) }
polyline { stroke-width: 2 } .dot { stroke-width: 7; stroke-linecap: round }
"""
