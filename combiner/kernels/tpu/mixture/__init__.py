"""The kernels of Combiner-Mixture."""
