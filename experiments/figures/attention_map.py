"""Draws what one layer of a trained model attends to: the matrix q(j|i) of each head, on a test example.

    python -m experiments.figures.attention_map --workdir DIR [--layer N|all] [--image 0] [--length N]
        [--parameters ema] [--data_dir DIR]

Row `i` holds the weight that the output at position `i` gives to the value of each position `j`, directly or through
the local expectation of a span. Writes DIR/attention_map_LAYER_IMAGE.png, and a JSON file of the same name with the
largest error of the row sums (which are 1 over the full support), the largest weight beyond the support (0), the
numerical rank within every span (1), and the ranks of the direct part and of the whole matrix. For
`experiments.report`, which shows them with a slider, it also writes a picture of each head without axes,
DIR/attention_map_LAYER_IMAGE_headN.png, of at most 256 × 256 pixels, and one of the pattern. If the sequence is longer,
a pixel is the largest weight of several positions.
"""

from experiments.harness import attention_map

if __name__ == '__main__':
    attention_map.command(__doc__)
