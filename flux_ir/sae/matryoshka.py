"""Matryoshka (Bussmann et al. 2025): BatchTopK whose first features must reconstruct on their own.

Each prefix of the dictionary is an autoencoder; the loss is the mean of theirs. So general features settle early in the
dictionary and keep their meaning, where a single large dictionary would split them up.
"""

from flux_ir.sae.batch_topk import BatchTopK


class Matryoshka(BatchTopK):
    """BatchTopK with nested dictionaries. The activations are chosen once, from the whole dictionary."""

    @property
    def nested_sizes(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries, ascending."""
        return self.config.nested_sizes
