"""Pages that people look at: one HTML file each, pictures inside, for light and dark, for wide screens and phones.

    page.write("index.html", "Title", "what this is", page.table(head, rows), page.cards([page.card(image, names)]))

Every function but write gives a piece of HTML; text is escaped where it enters. Pages ask nothing of the network.

What it leaves out: scripts, and any chart but lines.
"""

import base64
import html
import io
import math
import os
from pathlib import Path

STYLE = """
:root{color-scheme:light dark;--ink:light-dark(#1c1c1a,#e8e6e0);--dim:light-dark(#6b6a65,#9b9a94);
--line:light-dark(#dcdad2,#3a3935);--paper:light-dark(#fbfaf7,#191917);--good:light-dark(#0a7d4b,#4cc38a);
--c0:light-dark(#2456b3,#8ab4f8);--c1:light-dark(#b3402a,#f2917b);--c2:light-dark(#0a7d4b,#4cc38a);
--c3:light-dark(#8a5a00,#e3b341)}
body{background:var(--paper);color:var(--ink);max-width:60rem;margin:auto;padding:1.2rem;
font:16px/1.5 system-ui,"Apple SD Gothic Neo","Noto Sans KR","Noto Sans CJK KR","Malgun Gothic",sans-serif}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}p{color:var(--dim)}
.wide{overflow-x:auto;margin-bottom:1.4rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .8rem .25rem 0;text-align:right;border-bottom:1px solid var(--line);font-weight:normal}
td:first-child,th:first-child{text-align:left}td+td{white-space:nowrap}th{color:var(--dim)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:1rem}
.card{display:flex;gap:.8rem;border:1px solid var(--line);border-radius:.5rem;padding:.7rem;overflow-wrap:anywhere}
.row{display:flex;flex-wrap:wrap;gap:.4rem;margin:.2rem 0 .8rem}.card>.row{flex:none}
img{max-width:100%;background:#fff;border-radius:.3rem;object-fit:contain;flex:none}
ol{margin:.1rem 0 .4rem;padding-left:1.1rem;font-size:.85rem}b{font-size:.85rem;font-weight:600}
small{display:block;font-size:.85rem}.right{color:var(--good);font-weight:600}.right::after{content:" ✓"}
svg{width:100%;height:auto}svg text{fill:var(--dim);font-size:11px}svg .axis{stroke:var(--line)}
svg polyline{fill:none;stroke-width:2}.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
"""


def write(path, title, intro, *parts):
    """Write a page. title and intro are text, parts are pieces of HTML."""
    write_whole(path, '<!doctype html><html lang="en"><meta charset="utf-8">\n'
                '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n"
                f'<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>\n{"".join(parts)}</html>\n')


def write_whole(path, text):
    """Write a file of text whole or not at all: on a full disk what was there stays. What is no Unicode becomes "?"."""
    temporary = Path(f"{path}.{os.getpid()}")
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def heading(title, text=""):
    """A heading, and a paragraph under it."""
    return f"<h2>{html.escape(title)}</h2>" + (f"<p>{html.escape(text)}</p>" if text else "")


def table(head, rows):
    """A table: head and each row are lists of text, the first of each to the left, the others to the right."""
    lines = [[f"<th>{html.escape(cell)}</th>" for cell in head]]
    lines += [[f"<td>{html.escape(cell)}</td>" for cell in row] for row in rows]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f'<div class="wide"><table>{body}</table></div>'


def picture(image, side=72, name=""):
    """A PIL image, shown side pixels wide and high at most, and stored at twice that for fine screens. name: what it
    shows."""
    image = image.copy()
    image.thumbnail((2 * side, 2 * side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    source, name = base64.b64encode(buffer.getvalue()).decode(), html.escape(name)
    return f'<img alt="{name}" title="{name}" width="{side}" height="{side}" src="data:image/png;base64,{source}">'


def names(title, found, language=""):
    """A list of names under a title: found is [(text, whether it is right)], the best first."""
    items = "".join(f"<li{' class=right' if right else ''}>{html.escape(text)}</li>" for text, right in found)
    return f'<b lang="{language}">{html.escape(title)}</b><ol lang="{language}">{items}</ol>'


def lines(title, texts):
    """Lines of text under a title."""
    return f"<b>{html.escape(title)}</b>" + "".join(f"<small>{html.escape(text)}</small>" for text in texts)


def card(image, body):
    """A picture (from picture) and what stands beside it."""
    return f'<div class="card">{image}<div>{body}</div></div>'


def cards(many):
    """Cards side by side, as many as fit."""
    return f'<div class="cards">{"".join(many)}</div>'


def row(pictures):
    """Pictures in a row."""
    return f'<div class="row">{"".join(pictures)}</div>'


def plot(title, series, dots=False, unit="steps"):
    """Lines over x from 0, y from 0: series is {label: [(x, y)]}, four at most; "" where there are fewer than two points."""
    series = {label: line for label, line in series.items() if line}
    points = [point for line in series.values() for point in line]
    if len(points) < 2:
        return ""
    last, highest = max(x for x, _ in points), max(y for _, y in points) or 1
    power = 10 ** math.floor(math.log10(highest / 4))
    tick = next(power * n for n in (1, 2, 2.5, 5, 10) if 4 * power * n >= highest)  # four round steps reach the highest
    W, H, left, base = 640, 220, 44, 196

    def place(x, y):
        return round(left + (W - left - 70) * x / last, 1), round(base - (base - 12) * y / (4 * tick), 1)
    parts = []
    for i in range(5):
        _, y = place(0, tick * i)
        parts.append(f'<line class="axis" x1="{left}" x2="{W - 70}" y1="{y}" y2="{y}"/>'
                     f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{tick * i:g}</text>')
    for i, (label, line) in enumerate(series.items()):
        places = [place(*point) for point in line]
        parts.append(f'<g class="c{i}"><polyline stroke="currentColor" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        parts += [f'<circle r="3.5" fill="currentColor" cx="{x}" cy="{y}"/>' for x, y in places if dots]
        parts.append(f'<text x="{W - 62}" y="{24 + 16 * i}" style="fill:currentColor">{html.escape(label)}</text></g>')
    parts.append(f'<text x="{left}" y="{base + 18}">0</text>'
                 f'<text x="{W - 70}" y="{base + 18}" text-anchor="end">{last:,} {unit}</text>')
    return f'{heading(title)}<svg viewBox="0 0 {W} {H}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
