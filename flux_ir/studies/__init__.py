"""Questions asked of the parts below: what features know, and what would show that they do not."""
