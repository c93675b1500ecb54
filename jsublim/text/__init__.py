"""Text on its way to a model: chat templates and their spans, rows, prompts."""
