"""Fused kernels for accelerators: implementations of mechanisms, which `ops.backends` chooses by platform."""
