"""Activations that are stored, or made as they are read, as rows of tokens: what a dictionary trains on.

Read in this order: `blocks`, what every source gives; `source`, which opens one; `shards`, the files of a collection,
`shard_source`, these as a source, and `collection`, which opens one; `captures`, `arrays` and `exported`, the other
files; `spans`, how all of them read the disk; `remote` and `downloads`, collections in object storage. Activations that
a model makes while training reads them come from `collecting.live`.
"""
