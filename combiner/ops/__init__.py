"""Tools that mechanisms share; they know no mechanism.

softmax     one softmax over several groups of keys, and its parts
segments    padding and packed documents
pooling     the pooling of the members of a span
blocks      blocks of a sequence, and their attention to groups of keys
spans       summaries of blocks, and of neighbouring spans
grid        attention along both axes of a grid
windows     neighbours of a block, and caches of keys and values
linear      weights that are products of features
flash       softmax attention block by block, in linear memory
chunking    computation in steps on a CPU
parts       sequences that are cut over devices
slices      loops over slices of arrays, in place
primitives  rules that primitives for tangents share
"""
