"""The demo's report: one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
from pathlib import Path

import cv2
import numpy as np

from mmmilan.files import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } .lead, figcaption, footer { color: #6b7280 }
table { border-collapse: collapse } th, td { padding: .35rem .9rem; text-align: left }
thead th { border-bottom: 2px solid #1f2937 } tbody tr { border-bottom: 1px solid #e5e7eb }
td:not(:first-child) { font-variant-numeric: tabular-nums; text-align: right } tr.best { font-weight: 600 }
.gallery td { padding: 2px; text-align: center } .gallery th { font-size: .8rem; text-align: center; padding: 2px }
.gallery tbody tr { border: 0 } .gallery img { width: 142px; display: block; image-rendering: pixelated }
svg, p img { max-width: 100%; height: auto }
"""


class Page:
    """Collects sections, then writes them as one HTML file without outside references."""

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self.parts = [f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>']

    def heading(self, text: str, explanation: str) -> None:
        self.parts.append(f'<h2>{html.escape(text)}</h2><p>{html.escape(explanation)}</p>')

    def table(self, header: list[str], rows: list[list[str]], best: int | None = None) -> None:
        """A table of texts; row ``best`` is set in bold."""
        head = ''.join(f'<th>{html.escape(cell)}</th>' for cell in header)
        body = ''
        for i, row in enumerate(rows):
            cells = ''.join(f'<td>{html.escape(cell)}</td>' for cell in row)
            body += f'<tr class="best">{cells}</tr>' if i == best else f'<tr>{cells}</tr>'
        self.parts.append(f'<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')

    def gallery(self, header: list[str], rows: list[list[np.ndarray]]) -> None:
        """A table of RGB uint8 images [H, W, 3]."""
        head = ''.join(f'<th>{html.escape(cell)}</th>' for cell in header)
        body = ''.join('<tr>' + ''.join(f'<td>{_img(image)}</td>' for image in row) + '</tr>' for row in rows)
        self.parts.append(f'<table class="gallery"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')

    def figure(self, png: bytes, description: str) -> None:
        """A picture as wide as it is, described for those who do not see it."""
        data = base64.b64encode(png).decode()
        self.parts.append(f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{data}"></p>')

    def svg(self, element: str) -> None:
        self.parts.append(element)

    def write(self, path: Path, footer: str) -> None:
        """Write the page, whole or not at all."""
        document = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f'<style>{STYLE}</style></head><body>{"".join(self.parts)}<footer><p>{html.escape(footer)}</p></footer>'
            '</body></html>'
        )
        write_text(path, document)


def _img(image: np.ndarray) -> str:
    encoded = cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(encoded.tobytes()).decode()}">'
