"""How words become options: declared in `option`, read in `parse`, shown by `help`; `shared` has common flags."""
