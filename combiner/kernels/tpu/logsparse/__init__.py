"""A fused kernel for Combiner-Logsparse."""
