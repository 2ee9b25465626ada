"""A page as one self-contained HTML file, for light and dark mode, large and small screens."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mmmilan.files import write_text

PAPER_LINK = {'The paper (MILAN, arXiv 2208.06049)': 'https://arxiv.org/abs/2208.06049'}
STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #5b6472; --line: #d9dde3; --paper: #fff; --link: #1d4ed8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #a3acb9; --line: #3b4250; --paper: #14171c; --link: #8ab4ff } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word }
a { color: var(--link) } h1 { margin-bottom: 0; line-height: 1.2 } h2 { margin-top: 2.5rem; line-height: 1.25 }
.lead, .note, figcaption, footer { color: var(--soft) } .verdict { font-size: 1.15rem; font-weight: 600 }
code { font-size: .9em; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse }
th, td { padding: .35rem .9rem; text-align: left } thead th { border-bottom: 2px solid var(--ink) }
tbody tr { border-bottom: 1px solid var(--line) }
td { white-space: nowrap } td small { color: var(--soft); display: block }
td:not(:first-child), th:not(:first-child) { font-variant-numeric: tabular-nums; text-align: right }
.gallery td, .gallery th { padding: 2px; text-align: center } .gallery td { vertical-align: top }
.gallery { --side: clamp(104px, calc((min(100vw, 1080px) - 3rem) / var(--columns) - 4px), 240px) }
.gallery th { font-size: .8rem; line-height: 1.25; vertical-align: bottom; max-width: var(--side) }
.gallery td:first-child, .gallery th:first-child { text-align: center } .gallery tbody tr { border: 0 }
.gallery img { width: var(--side); display: block; margin: 0 auto }
.gallery img[src^='data:image/png'] { image-rendering: pixelated }
.gallery caption { caption-side: bottom; text-align: left; color: var(--soft); font-size: .9rem }
.gallery small { line-height: 1.2; max-width: var(--side); white-space: normal }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1rem; align-items: start }
.pictures figure { margin: 0 } .pictures img { width: 100%; height: auto; display: block }
.pictures figcaption { font-size: .85rem } .pictures small { display: block; color: var(--ink) }
.chart { background: #fff; color: #1f2937; border-radius: 6px; padding: .5rem; margin: 1rem 0; width: fit-content;
  max-width: 100%; overflow-x: auto } .chart svg, .chart img { max-width: 100%; height: auto; display: block }
.curves { display: flex; flex-wrap: wrap; gap: .5rem }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: 0; list-style: none; font-size: .9rem }
.legend i { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .4em }
@media (max-width: 640px) {
  th, td { padding: .3rem .5rem } td { white-space: normal } td:first-child { overflow-wrap: anywhere }
  .stack, .stack tbody { display: block } .stack thead { display: none }
  .stack tr { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); align-items: start;
    padding: .6rem 0 }
  .stack [data-column]::before { content: attr(data-column); display: block;
    color: var(--soft); font-size: .8rem; line-height: 1.25 }
  .stack td, .stack td:first-child { padding: 2px; text-align: left }
  .wide td:first-child { grid-column: 1 / -1; font-weight: 600 }
  .gallery { --side: 100% } .gallery tr { grid-template-columns: repeat(auto-fit, minmax(104px, 1fr)) }
  .gallery td { display: flex; flex-direction: column } .gallery td::before { order: 1 } .gallery small { order: 2 } }
"""
WIDE = 5  # columns; a table of so many is stacked on a narrow screen
SMALL = 96  # pixels; images up to this side are stored without loss, as PNG
# names of models and classes, and texts of users, may hold $, which is no formula
plain_text = matplotlib.rc_context({'text.parse_math': False})


class Page:
    """Collects sections, then writes them as one HTML file that loads no other file.

    Args:
        title: Title of the page.
        lead: A sentence or two below the title.
        links: Text -> address of further reading.
    """

    def __init__(self, title: str, lead: str, links: dict[str, str] | None = None) -> None:
        self.title = title
        self.parts = [f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>']
        if links:
            anchors = [f'<a href="{html.escape(url)}">{html.escape(text)}</a>' for text, url in links.items()]
            self.parts.append(f'<p>{" · ".join(anchors)}</p>')

    def heading(self, text: str, explanation: str) -> None:
        """Start a section with a title and an explanation of what it shows."""
        self.parts.append(f'<h2>{html.escape(text)}</h2><p>{html.escape(explanation)}</p>')

    def paragraph(self, text: str, kind: str = 'note') -> None:
        """Add a paragraph of kind 'verdict' (emphasised), 'note' (in a softer colour) or 'code' (a command)."""
        text = html.escape(text)
        self.parts.append(f'<p><code>{text}</code></p>' if kind == 'code' else f'<p class="{kind}">{text}</p>')

    def table(self, header: list[str], rows: list[list[str]], values: list[list[float | None]] | None = None) -> None:
        """Add a table of texts. On a narrow screen its cells wrap, or stand below the name of their row.

        Args:
            header: Names of the columns; the first column names the rows.
            rows: The cells; in each cell, lines after the first are set small.
            values: The numbers of the cells after the first of each row, None for cells that do not compete. The
                maximum of a column is set in bold, in every row that reaches it.
        """
        best, stack = best_cells(values or []), len(header) >= WIDE
        head = ''.join(f'<th>{html.escape(cell)}</th>' for cell in header)
        body = ''
        for i, row in enumerate(rows):
            cells = (table_cell(cell, (i, j) in best, header[j] if j and stack else '') for j, cell in enumerate(row))
            body += f'<tr>{"".join(cells)}</tr>'
        kind = ' class="stack wide"' if stack else ''
        table = f'<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        self.parts.append(f'<div class="scroll">{table}</div>')

    def gallery(
        self, header: list[str], rows: list[list[np.ndarray]], names: list[str], notes: list[list[str]] | None = None
    ) -> None:
        """Add a table of pictures. On a narrow screen a row is a grid of pictures over the names of their columns.

        Args:
            header: What each column shows.
            rows: RGB uint8 images [H, W, 3].
            names: What each row shows; with the column's name it is the alternative text of a picture.
            notes: A few words below each picture.
        """
        head = ''.join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
        body = ''
        for i, row in enumerate(rows):
            cells = ''
            for j, image in enumerate(row):
                note = notes[i][j] if notes else ''
                alt = f'{header[j]}: {names[i]}' + (f', {note}' if note else '')
                below = f'<small>{html.escape(note)}</small>' if note else ''
                cells += f'<td data-column="{html.escape(header[j])}">{_img(image, alt)}{below}</td>'
            body += f'<tr>{cells}</tr>'
        style = f'style="--columns: {len(header)}"'
        table = f'<table class="gallery stack" {style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        self.parts.append(f'<div class="scroll" tabindex="0">{table}</div>')

    def pictures(self, pictures: Iterable[tuple[str, str, str]]) -> None:
        """Add pictures that lie beside the page and are loaded when they are seen.

        Args:
            pictures: Of each the path relative to the page, its title and a few words below it.
        """
        figures = ''
        for path, title, note in pictures:
            address, alt = quote(path, errors='surrogateescape'), html.escape(f'{title}: {note}' if note else title)
            figures += f'<figure><a href="{address}"><img loading="lazy" alt="{alt}" src="{address}"></a>'
            figures += f'<figcaption>{html.escape(title)}<small>{html.escape(note)}</small></figcaption></figure>'
        self.parts.append(f'<div class="pictures">{figures}</div>')

    def legend(self, names: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> None:
        """Add a legend of names and their colours (RGB, 0 to 255)."""
        entries = [
            f'<li><i style="background:rgb{tuple(colour)}"></i>{html.escape(name)}</li>'
            for name, colour in zip(names, colours, strict=True)
        ]
        self.parts.append(f'<ul class="legend">{"".join(entries)}</ul>')

    def curves(self, curves: dict[str, tuple[list[float], list[float]]]) -> None:
        """Add a chart for each curve (epochs, values) by its name, with a description for screen readers."""
        charts = ''
        for name, (epochs, values) in curves.items():
            description = html.escape(f'{name}: from {values[0]:.3g} to {values[-1]:.3g} over the epochs')
            element = draw_curve(epochs, values, name)
            charts += element.replace('<svg', f'<svg role="img" aria-label="{description}"', 1)
        self.parts.append(f'<div class="chart curves">{charts}</div>')

    def figure(self, png: bytes, description: str) -> None:
        """Add a picture at its own width, with a description for screen readers."""
        data = base64.b64encode(png).decode()
        image = f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
        self.parts.append(f'<div class="chart" tabindex="0">{image}</div>')

    def write(self, path: Path, footer: str) -> None:
        """Write the page, whole or not at all."""
        document = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{html.escape(self.title)}</title><style>{STYLE}</style></head><body><main>{"".join(self.parts)}'
            f'</main><footer><p>{html.escape(footer)}</p></footer></body></html>'
        )
        write_text(path, document)


def table_cell(text: str, best: bool, column: str) -> str:
    """A cell: its first line, in bold if it is the best, then the others, small; its column, if rows are stacked."""
    first, *others = html.escape(text).split('\n')
    first = f'<b>{first}</b>' if best else first
    column = f' data-column="{html.escape(column)}"' if column else ''
    return f'<td{column}>{first}{"".join(f"<small>{line}</small>" for line in others)}</td>'


def best_cells(values: list[list[float | None]]) -> set[tuple[int, int]]:
    """Row and column of each column's maximum; columns are counted from 1, as column 0 holds the names of the rows."""
    best = set()
    for column in range(max(map(len, values), default=0)):
        scores = {row: cells[column] for row, cells in enumerate(values) if cells[column] is not None}
        if len(scores) > 1:
            best |= {(row, column + 1) for row, score in scores.items() if score == max(scores.values())}
    return best


def _img(image: np.ndarray, alt: str) -> str:
    """An image element that contains the image, as JPEG if a side has more than ``SMALL`` pixels, else as PNG."""
    kind, options = ('png', []) if max(image.shape[:2]) <= SMALL else ('jpeg', [cv2.IMWRITE_JPEG_QUALITY, 90])
    encoded = cv2.imencode(f'.{kind}', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1]
    data = base64.b64encode(encoded.tobytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">'


@plain_text
def draw_curve(epochs: list[float], values: list[float], title: str) -> str:
    """Draw values over epochs as an SVG element."""
    figure = Figure(figsize=(3.4, 2.4), layout='constrained')
    axes = figure.subplots()
    axes.plot(epochs, values, color='#2563eb', linewidth=1.2, marker='o' if len(values) < 30 else None, markersize=3)
    axes.set(title=title, xlabel='epoch')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25)
    buffer = io.StringIO()
    figure.savefig(buffer, format='svg')
    text = buffer.getvalue()
    return text[text.index('<svg') :]
