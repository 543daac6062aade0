"""The Long Range Arena: generated data sets, and readers of its released files."""
