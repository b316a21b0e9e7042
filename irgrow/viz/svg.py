"""SVG as text: a canvas that collects elements and knows how large it has become."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
Point = tuple[float, float]


def number(value: float) -> str:
    """A coordinate, short: at most one decimal."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def text_width(text: str, size: float) -> float:
    """About how wide a text is in this font size, on the safe side."""
    return size * sum(0.32 if c in "ijlt.,·'()[]{}|! f" else 0.88 if c in "mwMW" else 0.58 for c in text)


class Canvas:
    """Elements in drawing order, and the box that holds them."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._box: list[float] = [float("inf"), float("inf"), float("-inf"), float("-inf")]

    def include(self, *points: Point) -> None:
        """The picture reaches at least to these points."""
        for x, y in points:
            self._box = [min(self._box[0], x), min(self._box[1], y), max(self._box[2], x), max(self._box[3], y)]

    def raw(self, text: str) -> None:
        self._parts.append(text)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 11,
        anchor: str = "middle",
        weight: str = "",
        css: str = "t",
    ) -> None:
        """One line of text; `y` is its base line."""
        width = text_width(text, size)
        left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        self.include((left, y - size), (left + width, y + 0.3 * size))
        bold = f' font-weight="{weight}"' if weight else ""
        self.raw(
            f'<text class="{css}" x="{number(x)}" y="{number(y)}" font-size="{number(size)}" '
            f'text-anchor="{anchor}"{bold}>{escape(text)}</text>'
        )

    def circle(self, x: float, y: float, r: float, css: str, title: str = "") -> None:
        self.include((x - r, y - r), (x + r, y + r))
        self.raw(f'<circle class="{css}" cx="{number(x)}" cy="{number(y)}" r="{number(r)}"{_titled(title, "circle")}')

    def rectangle(
        self, x: float, y: float, width: float, height: float, css: str, title: str = "", round: float = 2
    ) -> None:
        self.include((x, y), (x + width, y + height))
        self.raw(
            f'<rect class="{css}" x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}" '
            f'rx="{number(round)}"{_titled(title, "rect")}'
        )

    def path(self, data: str, css: str, title: str = "", **attributes: str) -> None:
        """A path; its points must be included by the caller."""
        more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.raw(f'<path class="{css}" d="{data}"{more}{_titled(title, "path")}')

    def lines(self, segments: Iterable[tuple[float, float, float, float]], css: str, **attributes: str) -> None:
        """Straight lines as one path."""
        data = "".join(f"M{number(a)} {number(b)}L{number(c)} {number(d)}" for a, b, c, d in segments)
        if data:
            self.path(data, css, **attributes)

    def finish(self, *, style: str, title: str, description: str, margin: float = 16) -> str:
        """The picture as a file's text."""
        left, top = self._box[0] - margin, self._box[1] - margin
        width, height = self._box[2] - left + margin, self._box[3] - top + margin
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{number(width)}" height="{number(height)}" '
            f'viewBox="{number(left)} {number(top)} {number(width)} {number(height)}" '
            f'font-family="{FONT}" role="img">\n<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>\n'
            f"<style>{style}</style>\n"
        )
        return head + "\n".join(self._parts) + "\n</svg>\n"


def _titled(title: str, element: str) -> str:
    return f"><title>{escape(title)}</title></{element}>" if title else "/>"
