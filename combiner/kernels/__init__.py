"""Implementations of mechanisms by fused kernels, and the choice among them by platform.

choice     the implementations that a mechanism states, and the choice among them
dropout    seeds of dropout in the kernels of this project
ring       softmax attention over sequences that are cut over devices
shards     a kernel on the shard of every device
summaries  the summaries that XLA computes for a kernel
libraries  the kernels of JAX and cuDNN for softmax attention
tpu, gpu   the kernels of this project
"""
