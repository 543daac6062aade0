"""HTML: elements, sortable tables, embedded pictures."""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

PNG = b'\x89PNG\r\n\x1a\n'


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: that is shown; not HTML.
        value: number by which the column is sorted; None to sort by the text.
        before: HTML in front of the text.
    """

    text: str
    value: float | None = None
    before: str = ''


def element(name: str, *content: str, **attributes: str | None) -> str:
    """Returns an HTML element.

    Args:
        name: of the element.
        *content: HTML.
        **attributes: values, which are escaped, by name, with a hyphen for every underscore but a last one; None to
            leave an attribute out.
    """
    shown = ''.join(
        f' {key.removesuffix("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f'<{name}{shown}>{"".join(content)}</{name}>'


def paragraph(text: str, **attributes: str) -> str:
    """Returns a paragraph of plain text."""
    return element('p', html.escape(text), **attributes)


def image(path: Path, alt: str) -> str:
    """Returns an embedded picture.

    Raises:
        ValueError: the file is no PNG.
    """
    data = path.read_bytes()
    if not data.startswith(PNG):
        raise ValueError(f'{path.name} is no PNG file')
    source = f'data:image/png;base64,{base64.b64encode(data).decode()}'
    return f'<img src="{source}" alt="{html.escape(alt)}">'


def figure(content: str, caption: str, **attributes: str) -> str:
    """Returns a figure of HTML with a caption of plain text."""
    return element('figure', content, element('figcaption', html.escape(caption)), **attributes)


def head(*names: str) -> str:
    """Returns a row of headings for columns, by which a reader can sort the table."""
    return element('tr', *(element('th', html.escape(name), scope='col', data_sort='') for name in names))


def table(head_rows: Iterable[str], body: Iterable[Sequence[Cell]], caption: str) -> str:
    """Returns a table.

    Args:
        head_rows: HTML.
        body: rows, whose first cells are headings.
        caption: plain text that says what the table shows, for readers that hear it.
    """
    rows = (
        element('tr', _cell('th', first, scope='row'), *(_cell('td', each) for each in rest)) for first, *rest in body
    )
    whole = element(
        'table',
        element('caption', html.escape(caption)),
        element('thead', *head_rows),
        element('tbody', *rows),
    )
    return element('div', whole, class_='wide', tabindex='0', role='group', aria_label=caption)


def _cell(name: str, cell: Cell, **attributes: str) -> str:
    known = cell.value is not None and math.isfinite(cell.value)
    value = repr(cell.value) if known else None
    return element(name, cell.before, html.escape(cell.text), data_value=value, **attributes)
