"""The contract of mechanisms, the Linen modules that hold them, and their registry."""
