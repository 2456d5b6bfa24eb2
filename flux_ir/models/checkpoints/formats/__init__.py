"""Weights that are not plain numbers in their file: what stands there, and how it becomes numbers again.

`weights` joins every weight with what stands beside it (scales, tables) into one entry of the file. One file for each
family: `scaled` (float8 and int8 with scales), `bitsandbytes` (NF4, FP4), `gguf` and its `blocks`. `refused` names
those that cannot be read.
"""
