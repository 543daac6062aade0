"""Parts of pages that are written by commands, each between two comments with its name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from combiner import atomic


def filled(text: str, parts: Mapping[str, str]) -> str:
    """Returns a page with these parts, by name: what is between `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        ValueError: the page has no such comments, or has them more than once.
    """
    for name, part in parts.items():
        marked = re.compile(rf'(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)', re.DOTALL)
        if len(marked.findall(text)) != 1:
            raise ValueError(
                f'the page must have the comments <!-- {name} --> and <!-- /{name} --> once each; '
                'a part goes between them'
            )
        text = marked.sub(lambda found, part=part: f'{found[1]}\n{part}\n\n{found[2]}', text)
    return text


def fill(page: Path, parts: Mapping[str, str]) -> None:
    """Replaces these parts of a page; raises as `filled`."""
    atomic.write_text(page, filled(page.read_text(encoding='utf-8'), parts))


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (head, ['---'] * len(head), *lines))
