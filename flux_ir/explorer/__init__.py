"""One HTML page to look at runs with: from a run folder's files alone, no model, no torch."""
