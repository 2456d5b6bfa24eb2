"""Activations that are stored, or made as they are read, as rows of tokens: what a dictionary trains on.

Read in this order: `blocks`, what every source gives; `source`, which opens one; `shards`, the files of
a collection, and `shard_source`, a collection as a source; `captures`, `arrays` and `exported`, the
other files; `spans`, how all of them read the disk; `prefetch`, live streams made ahead of whoever
consumes them; `remote` and `downloads`, collections in object storage.
"""
