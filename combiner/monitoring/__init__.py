"""What a run measures: metrics and their files, arithmetic, memory, utilisation, traces."""
