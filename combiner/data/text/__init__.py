"""Text: documents, tokens, the windows that models read."""
