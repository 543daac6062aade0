"""One file for each figure: `python -m experiments.figures.figure1`. A file declares what is drawn."""
