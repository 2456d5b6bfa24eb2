"""Steering: edits of features and directions (`edits`), where they reach (`regions`), how they are done (`apply`)."""
