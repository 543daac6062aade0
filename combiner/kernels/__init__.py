"""Fused attention kernels, by kind of device."""
