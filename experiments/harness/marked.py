"""Parts of pages that are written by commands, each between two comments with its name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from combiner import atomic


def fill(page: Path, parts: Mapping[str, str]) -> None:
    """Replaces these parts of a page, by name: what is between `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        ValueError: the page has no such comments.
    """
    text = page.read_text(encoding='utf-8')
    for name, part in parts.items():
        marked = re.compile(rf'(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)', re.DOTALL)
        if not marked.search(text):
            raise ValueError(f'{page} has no comments <!-- {name} --> and <!-- /{name} -->, between which a part goes')
        text = marked.sub(lambda found, part=part: f'{found[1]}\n{part}\n\n{found[2]}', text)
    atomic.write_text(page, text)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (head, ['---'] * len(head), *lines))
