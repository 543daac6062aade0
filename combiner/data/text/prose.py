"""English prose without a download: the Python language reference, and docstrings of installed packages.

A document is a topic of `pydoc_data.topics`, or the docstrings of one module of the standard library or of an
installed package. Only paragraphs of sentences are kept, not examples, tables, signatures and headings. The text
depends on the versions of Python and of the packages: store `fingerprint()` with everything that is made from it.
"""

import ast
import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import SupportsIndex

from combiner.data.indices import checked
from combiner.data.task import SPLITS

# Module -> the distribution that installs it.
PACKAGES = {
    'flax': 'flax',
    'jax': 'jax',
    'matplotlib': 'matplotlib',
    'numpy': 'numpy',
    'optax': 'optax',
    'scipy': 'scipy',
    'skimage': 'scikit-image',
    'sklearn': 'scikit-learn',
}
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_EXCLUDED = {'__pycache__', 'site-packages', 'dist-packages', 'idlelib', 'lib2to3', 'pydoc_data'}
_HELD_OUT_PERCENT = 5  # of documents for validation, and as many for test
_PARAGRAPH_CHARACTERS = 100
_OTHER_CHARACTERS = 0.15  # the largest share of a paragraph that is neither letters nor space
_DOCUMENT_CHARACTERS = 1000
_PARAGRAPHS = re.compile(r'\n[ \t]*\n\s*')
_SENTENCES = re.compile(r'[A-Z"\'`*].*[.?!:]', re.DOTALL)  # as a whole: from a capital to the end of a sentence
_NO_LETTERS = re.compile(r'[^\w\s]|[\d_]')
# A line of an example, one under a heading, or the start of a list of parameters.
_NO_PROSE = re.compile(r'^\s*>>> |^\s*[-=~^]{3,}\s*$|^[A-Z]\w+:$|^\S+ ?: ', re.MULTILINE)
_STRINGS = re.compile(rb'"""(.*?)"""', re.DOTALL)


class Prose:
    """A random-access source of the documents of a split, ordered by key; memory holds all splits.

    Args:
        split: 'train', 'validation' or 'test': about 90, 5 and 5 % of the documents. A repeated paragraph is only in
            the first document by key.

    Raises:
        ValueError: the split is unknown.
        FileNotFoundError: a package of `PACKAGES` is not installed.
    """

    def __init__(self, split: str):
        if split not in SPLITS:
            raise ValueError(f'unknown split {split!r} of prose; known: {", ".join(SPLITS)}')
        self._records = [(key, text) for key, text in _documents() if split_of(key) == split]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict:
        """Returns `{'text': str, 'key': 'pydoc_data/assert'}`.

        Raises:
            IndexError: there is no such document.
        """
        index = checked(index, len(self), 'document')
        key, text = self._records[index]
        return {'text': text, 'key': key}


def split_of(key: str) -> str:
    """Returns the split of a document; it depends only on the document's key."""
    percent = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % 100
    return SPLITS[1 + percent // _HELD_OUT_PERCENT] if percent < 2 * _HELD_OUT_PERCENT else SPLITS[0]


@functools.cache
def fingerprint() -> str:
    """Returns 16 hexadecimal digits of a SHA-256 over the documents of all splits.

    Raises:
        FileNotFoundError: a package of `PACKAGES` is not installed.
    """
    return hashlib.sha256(json.dumps(_documents()).encode()).hexdigest()[:16]


def package_folder(module: str) -> Path:
    """Returns the folder of a package of `PACKAGES`, without importing it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f'prose uses the docstrings of {module}, which is not installed; pip install {PACKAGES[module]}'
        )
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _documents() -> tuple[tuple[str, str], ...]:
    digests: set[bytes] = set()
    documents = []
    with _collector_paused():
        found = sorted(_raw_documents())
    for key, text in found:
        paragraphs = []
        for paragraph in filter(_is_prose, _PARAGRAPHS.split(text.strip())):
            digest = hashlib.sha256(' '.join(paragraph.split()).encode()).digest()
            if digest not in digests:
                digests.add(digest)
                paragraphs.append(paragraph)
        prose = '\n\n'.join(paragraphs)
        if len(prose) >= _DOCUMENT_CHARACTERS:
            documents.append((key, prose))
    return tuple(documents)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pauses the garbage collector, which takes two fifths of the time in which a thousand modules are parsed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < _PARAGRAPH_CHARACTERS or not _SENTENCES.fullmatch(paragraph) or _NO_PROSE.search(paragraph):
        return False
    return len(_NO_LETTERS.findall(paragraph)) <= _OTHER_CHARACTERS * len(paragraph)


def _raw_documents() -> Iterator[tuple[str, str]]:
    for name, text in topics.topics.items():
        yield f'pydoc_data/{name}', text
    roots = [('python', Path(sysconfig.get_paths()['stdlib'])), *((name, package_folder(name)) for name in PACKAGES)]
    for name, root in roots:
        for path in _modules(root):
            text = _docstrings(path)
            if text:
                yield f'{name}/{path.relative_to(root).with_suffix("").as_posix()}', text


def _modules(folder: Path) -> Iterator[Path]:
    """Yields Python files, without tests, and without other packages inside the standard library's folder."""
    for path in folder.iterdir():
        if 'test' in path.name or path.name in _EXCLUDED:
            continue
        if path.is_dir():
            yield from _modules(path)
        elif path.suffix == '.py':
            yield path


def _docstrings(path: Path) -> str:
    source = path.read_bytes()
    # Parsing is slow, and most files have too little text.
    if sum(map(len, _STRINGS.findall(source))) < 2 * _DOCUMENT_CHARACTERS:
        return ''
    try:
        tree = ast.parse(source)
    except SyntaxError:  # templates and files for other versions of Python
        return ''
    return '\n\n'.join(_nested_docstrings(tree))


def _nested_docstrings(node: _Documented) -> Iterator[str]:
    """Yields docstrings in the order of the file: module, classes, methods; visiting all nodes would be slow."""
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, _Documented):
            yield from _nested_docstrings(child)
