"""The report of a run: statistics, claims, figures and a page, made from results only (never from a model)."""
