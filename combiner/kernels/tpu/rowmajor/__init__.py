"""The kernels of Combiner-Axial, row-major."""
