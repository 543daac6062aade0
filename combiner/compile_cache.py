"""The folder in which JAX keeps compiled programs, so that the next start of the same command need not compile.

It is `compiled/…` in the folder that the environment variable COMBINER_CACHE names, or by default in
`$XDG_CACHE_HOME/combiner`, or `~/.cache/combiner`. JAX_COMPILATION_CACHE_DIR names another folder, and
JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing. Nothing limits its size, and it may be removed at any time.

JAX does not write these files atomically, and never replaces one: of a program whose file is still being written it
warns, and compiles it. If a kill cut the file off, this happens at each start, until the folder is removed.
"""

import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax
from absl import logging

from combiner import paths

LEAST_SECONDS = 0.2  # to compile: programs that compile faster are not kept


def folder() -> Path:
    """Returns the folder, one for each kind of processor.

    A program for a CPU uses the instructions of the CPU that it was compiled on, and a home can be shared by machines.

    Raises:
        ValueError: as `paths.local`.
    """
    base = os.environ.get('COMBINER_CACHE')
    root = paths.local(base, 'COMBINER_CACHE') if base else paths.cache_dir()
    return root.absolute() / 'compiled' / f'{platform.machine()}-{_processor()}'


def _processor() -> str:
    """Returns a short hash of the instructions that the processor has."""
    try:
        found = re.search(r'^(?:flags|Features)\s*:.*', Path('/proc/cpuinfo').read_text(encoding='utf-8'), re.MULTILINE)
    except OSError:
        found = None
    text = found[0] if found else platform.processor()
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def enable() -> None:
    """Lets JAX keep compiled programs, unless it is configured already; a folder that cannot be written is logged."""
    config: Any = jax.config  # its settings are not in its types
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    try:
        chosen = folder()
        chosen.mkdir(parents=True, exist_ok=True)
        if not os.access(chosen, os.W_OK):
            raise PermissionError(None, 'it is read-only', str(chosen))
    except (OSError, ValueError) as error:
        logging.warning(
            'compiled programs are not kept (%s); COMBINER_CACHE or JAX_COMPILATION_CACHE_DIR names a folder for them, '
            'JAX_ENABLE_COMPILATION_CACHE=0 turns this off',
            error,
        )
        return
    jax.config.update('jax_compilation_cache_dir', str(chosen))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', LEAST_SECONDS)
