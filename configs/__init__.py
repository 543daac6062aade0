"""One file per data set; the argument after the colon picks the row of a table. Installed as `combiner.configs`."""
