"""Paths as users write them: conversion to local paths and cloud paths, and errors about them."""

import argparse
import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec.config
from etils import epath

# A local file or folder, or one of a cloud store. Both have the methods of pathlib.
AnyPath = Path | epath.Path

# Orbax writes arrays, and ArrayRecord reads records, on local disks and in Google's store; in no other one.
_CLOUD = 'gs'

# `gs://bucket/run`; also `gs:/bucket/run`, which pathlib makes of it, and `machine:/run`, as scp takes it.
_REMOTE = re.compile(r'([A-Za-z][\w+.-]+):/', re.ASCII)
_CONFIG = re.compile(r'((?:[A-Za-z][\w+.-]+:(?=/))?[^:]*)(.*)', re.ASCII | re.DOTALL)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SAYS_FULL = re.compile(r'no space left|disk quota exceeded|os_error_code=.?(28|122)\b', re.IGNORECASE)


def local(path: str | os.PathLike[str], name: str = 'path') -> Path:
    """Returns the local file or folder that a user's path names.

    `~` and `~user` become home directories; `file:///x` and `file://localhost/x` become /x, with `%20` and the like
    decoded. Variables such as `$HOME` are not expanded: shells do that. A relative path stays relative.

    Args:
        path: the path from the user.
        name: what the path is, for error messages.

    Raises:
        ValueError: the path is empty, is on another machine or in a cloud (`gs://bucket/run`), or names a user that
            does not exist on this machine.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError(f'the {name} is empty; give a file or folder of this machine')
    if remote := _REMOTE.match(text):
        text = _of_url(text, remote[1], name)
    if text.startswith('~'):
        text = os.path.expanduser(text)
        if text.startswith('~'):
            user = text[1:].partition('/')[0]
            raise ValueError(f'{name} {str(path)!r}: there is no user {user!r}; for a folder, write ./~{user}')
    return Path(text)


def _of_url(text: str, scheme: str, name: str) -> str:
    rest = text[len(scheme) + 1 :]
    if scheme.lower() == 'file':
        host, slash, inside = rest[2:].partition('/') if rest.startswith('//') else ('', '/', rest.lstrip('/'))
        if slash and host in ('', 'localhost'):
            return '/' + unquote(inside)
        raise ValueError(f'{name} {text!r} is on another machine ({host}); write file:///FOLDER, or the folder itself')
    raise ValueError(
        f'{name} {text!r} is not a folder of this machine: cloud paths such as {scheme}:// are not supported here; '
        'copy it to a local folder, or mount it, and give that folder'
    )


def parse(path: str | os.PathLike[str], name: str = 'path') -> AnyPath:
    """Returns the file or folder that a user's path names: of this machine, as `local`, or of Google's cloud store.

    Raises:
        ValueError: as `local`, except for `gs://BUCKET/…`; packages for it are missing; the bucket does not exist or
            cannot be reached.
    """
    text = os.fspath(path)
    remote = _REMOTE.match(text)
    if not remote or remote[1].lower() != _CLOUD:
        return local(path, name)
    inside = text[len(_CLOUD) + 1 :].strip('/')
    _check_bucket(inside.partition('/')[0], f'{name} {text!r}')
    return epath.Path(f'{_CLOUD}://{inside}')


@functools.cache
def _check_bucket(bucket: str, what: str) -> None:
    """Raises ValueError unless a bucket exists and can be reached: otherwise Orbax would make one of that name."""
    if not bucket:
        raise ValueError(f'{what} has no bucket; write {_CLOUD}://BUCKET/FOLDER')
    # Another machine changes the store too: a kept list of its files would hide new checkpoints, or the other's beat.
    fsspec.config.conf.setdefault('gcs', {}).setdefault('use_listings_cache', False)
    try:
        import google.cloud.storage  # noqa: F401 # pyright: ignore[reportMissingImports] # Orbax needs it

        epath.Path(f'{_CLOUD}://{bucket}').stat()  # `exists` hides errors
    except ImportError as error:
        raise ValueError(f'{what} needs packages that are not installed ({error}); pip install gcsfs') from None
    except FileNotFoundError:
        raise ValueError(
            f'{what}: there is no bucket {bucket!r}, or it may not be listed; make it, or give another one'
        ) from None
    except Exception as error:  # of the network, of credentials: many kinds
        raise ValueError(
            f'{what} cannot be reached ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}); '
            'check the network and the credentials (gcloud auth application-default login)'
        ) from None


def absolute(path: str | os.PathLike[str], name: str = 'path') -> AnyPath:
    """Returns the path of `parse` as an absolute path, which stays valid if the working directory changes."""
    found = parse(path, name)
    return found.absolute() if isinstance(found, Path) else found


def content(path: AnyPath) -> str:
    """Returns the content of a text file; bytes that are not UTF-8, such as of a damaged file, are replaced."""
    return path.read_bytes().decode(errors='replace')


def file_size(path: AnyPath) -> int:
    """Returns the size of a file in bytes."""
    return path.stat().st_size if isinstance(path, Path) else path.stat().length


def cache_dir() -> Path:
    """Returns the folder of files that can be created again: $XDG_CACHE_HOME/combiner, else ~/.cache/combiner."""
    return local(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'XDG_CACHE_HOME') / 'combiner'


def argument(text: str) -> Path:
    """Works as `local`, for `type=` of argparse: raises ArgumentTypeError, whose message argparse shows."""
    try:
        return local(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def split_config(text: str) -> tuple[str, str]:
    """Splits `PATH:ARGUMENT`, the value of --config, into the file and the rest.

    Raises:
        ValueError: as `local`.
    """
    path, rest = _CONFIG.fullmatch(text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return (str(local(path, 'config file')) if path else path), rest


def with_data_dir(config: Any, data_dir: str | os.PathLike[str] | None = None) -> Any:
    """Returns a copy of a config with an absolute data directory: `data_dir`, or by default the config's own.

    Raises:
        ValueError: as `parse`.
    """
    given = config.data.data_dir if data_dir is None else data_dir
    config = config.copy_and_resolve_references()
    config.data.data_dir = None if given is None else str(absolute(given, 'data directory'))
    return config


def is_full(error: BaseException | None) -> bool:
    """Returns whether an error, or one of its causes, reports a full disk or an exhausted quota."""
    while error is not None:
        if getattr(error, 'errno', None) in _FULL or _SAYS_FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_space(folder: Path, what: str, needed: int | float, way_out: str) -> OSError:
    """Returns a one-line error for a full disk, with the purpose, the bytes needed and free, and the way out."""
    free = size(_free(folder))
    return OSError(
        errno.ENOSPC, f'no space left in {folder} for {what}, which takes about {size(needed)} ({free} free); {way_out}'
    )


@contextlib.contextmanager
def full_disk_explained(folder: AnyPath, what: str, needed: int | float, way_out: str) -> Iterator[None]:
    """Replaces any error that reports a full disk by the error of `no_space`; a cloud store is never full."""
    try:
        yield
    except Exception as error:
        if not is_full(error) or not isinstance(folder, Path):
            raise
        raise no_space(folder, what, needed, way_out) from None


def unwritable(path: AnyPath, error: OSError, way_out: str) -> OSError:
    """Returns a one-line error with the path that cannot be written, the reason and the way out."""
    return OSError(error.errno, f'{path} cannot be written ({error.strerror or error}); {way_out}')


def _free(folder: Path) -> int:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def size(count: int | float) -> str:
    """Formats a number of bytes, such as '1.5 GB'."""
    for unit, least in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if count >= least:
            return f'{count / least:,.1f} {unit}'
    return f'{count:,.0f} bytes'
