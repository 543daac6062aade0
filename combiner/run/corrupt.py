"""Sets aside, in WORKDIR/corrupt, what cannot be read; nothing is deleted."""

from combiner import atomic, paths

# Words of errors that say nothing about a file: memory or open files are short, or a store is out of reach.
_NO_DAMAGE = (
    *('resource_exhausted', 'out of memory', 'too many open files'),
    *('unavailable', 'deadline_exceeded', 'permission denied', 'stale file handle', 'timed out'),
)


def is_damage(error: Exception) -> bool:
    """Returns whether an error while reading can mean a damaged file, which shows as any of a dozen exceptions."""
    return not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in _NO_DAMAGE)


def described(error: Exception | None) -> str:
    """Returns in a line why a file was not read: the error; None stands for an error of another process."""
    if error is None:
        return 'another process, which may see a file later, cannot read it'
    return f'{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}' if str(error) else repr(error)


def set_aside(workdir: paths.AnyPath, path: paths.AnyPath, name: str) -> paths.AnyPath:
    """Moves a file or folder of a run to WORKDIR/corrupt/NAME, with a + after the name for each earlier one.

    Args:
        workdir: the run's folder.
        path: what to move.
        name: its name there.

    Returns:
        The new path.
    """
    moved = workdir / 'corrupt' / name
    moved.parent.mkdir(exist_ok=True)
    while moved.exists():
        moved = moved.with_name(moved.name + '+')
    atomic.move(path, moved)
    return moved
