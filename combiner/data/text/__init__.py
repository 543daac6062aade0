"""Text: documents, tokens, and windows of tokens."""
