"""One file per data set; the argument picks the row of a table."""
