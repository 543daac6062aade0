"""How many files a process may have open."""

import resource


def allow_open_files() -> None:
    """Lets this process open as many files as the system allows: a reader keeps each shard of a data set open.

    The usual limit is 1,024, which is the number of shards of C4.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
