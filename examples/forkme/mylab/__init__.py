"""My laboratory: attentions of my own, on top of the package `combiner`."""
