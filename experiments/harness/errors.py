"""The text of an error, for a report of one line."""


def lines(error: Exception) -> list[str]:
    """Returns the lines of an error's text; of one without text, such as MemoryError(), the line that Python shows."""
    return str(error).strip().splitlines() or [repr(error)]
