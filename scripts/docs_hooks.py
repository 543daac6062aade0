"""Hooks of mkdocs, which builds the website of the documentation (mkdocs.yml, scripts/docs.sh).

The pages are written for the repository: they link to files outside `docs/`, and write mathematics between dollars. On
the website these files are pages or downloads below `repository/`, and mathematics is MathML, which browsers draw.
"""

import html
import logging
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from latex2mathml.converter import convert  # pyright: ignore[reportMissingImports]  # of the extra `docs`
from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
DOCS, MOUNTED = 'docs/', 'repository/'
LANGUAGES = {'.py': 'python', '.sh': 'bash', '.yml': 'yaml', '.txt': 'text', '.css': 'css'}  # shown as pages

FENCE = re.compile(r'^```.*?^```', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(?<=\]\()([^)\s]+)')
NAMED_BY_FILE = re.compile(r'\[[\w/]+\.md\](?=\(([^)#\s]+))')  # a link whose text is the name of a page's file
TITLE = re.compile(r'^# (.+)', re.MULTILINE)
MATHEMATICS = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
SOURCE = '<details class="mkdocstrings-source"'
LOADED = re.compile(r'<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|href)="((?:https?:)?//[^"]+)"')

log = logging.getLogger('mkdocs.hooks.combiner')


def in_repository(uri: str) -> str:
    """Returns the path in the repository of a page of the site."""
    path = uri.removeprefix(MOUNTED) if uri.startswith(MOUNTED) else DOCS + uri
    return path.removesuffix('.md') if Path(path.removesuffix('.md')).suffix in LANGUAGES else path


def site_uri(path: str) -> str:
    """Returns the URI on the site of a file of the repository."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return MOUNTED + path + ('.md' if Path(path).suffix in LANGUAGES else '')


def local_links(text: str) -> list[str]:
    """Returns the targets of links to other files of the repository, outside of code."""
    return [link for link in LINK.findall(FENCE.sub('', text)) if not urlsplit(link).scheme and link[0] != '#']


def target(page: str, link: str) -> str:
    """Returns the path in the repository to which a link of a page leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link.partition('#')[0]))


def named_by_title(page: str, text: str) -> str:
    """Replaces the text of links that is the name of a file by the title of this page."""

    def titled(found: re.Match[str]) -> str:
        title = TITLE.search((ROOT / target(page, found[1])).read_text(encoding='utf-8'))
        return f'[{title[1]}]' if title else found[0]

    return NAMED_BY_FILE.sub(titled, text)


def mounted(path: str, config: Any) -> Any:
    """Returns the file of the site that shows a file of the repository; of code, a page with this code."""
    language = LANGUAGES.get(Path(path).suffix)
    if language is None:
        return File.generated(config, site_uri(path), abs_src_path=str(ROOT / path))
    code = (ROOT / path).read_text(encoding='utf-8')
    text = f'---\nsearch: {{exclude: true}}\n---\n# {path}\n\n~~~~{language}\n{code}~~~~\n'
    return File.generated(config, site_uri(path), content=text)


def on_files(files: Any, config: Any) -> Any:
    """Adds every file of the repository that a page links to, and those that these link to."""
    pages = [DOCS + file.src_uri for file in files.documentation_pages()]
    added: set[str] = set()
    while pages:
        page = pages.pop()
        if Path(page).suffix != '.md':
            continue
        for link in local_links((ROOT / page).read_text(encoding='utf-8')):
            path = target(page, link)
            if path.startswith(DOCS) or path in added or not (ROOT / path).is_file():
                continue
            added.add(path)
            files.append(mounted(path, config))
            pages.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes the links between files of the repository links between pages of the site."""
    source = in_repository(page.file.src_uri)
    if not source.endswith('.md'):
        return markdown

    def rewritten(found: re.Match[str]) -> str:
        link = found[0]
        if urlsplit(link).scheme or link[0] == '#':
            return link
        _, hash_, anchor = link.partition('#')
        return posixpath.relpath(site_uri(target(source, link)), posixpath.dirname(page.file.src_uri)) + hash_ + anchor

    parts = re.split(f'({FENCE.pattern})', markdown, flags=FENCE.flags)
    return ''.join(
        part if part.startswith('```') else LINK.sub(rewritten, named_by_title(source, part)) for part in parts
    )


def on_page_content(content: str, **_: Any) -> str:
    """Draws mathematics, and leaves the source code of the API out of the search."""

    def drawn(found: re.Match[str]) -> str:
        return convert(html.unescape(found[3]), display='block' if found[2] == '[' else 'inline')

    content = content.replace(SOURCE, f'{SOURCE} data-search-exclude')
    return MATHEMATICS.sub(drawn, content)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warns of what a page would load from another host."""
    for address in LOADED.findall(output):
        log.warning('%s loads %s from another host', page.file.src_uri, address)
    return output
