"""One file for each claim: `python -m experiments.claims.photographs`. A file declares rows, rates and comparisons."""
