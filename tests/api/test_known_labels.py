"""What is known of a set of pictures, before anything is scored on it."""

import numpy as np

from flux_ir.api.known_labels import labels_of
from flux_ir.studies.labels import POSITIVE
from tests.studies.drawn import SITE, TOKENS, drawn


def test_positives_of_fewer_pictures_are_still_counted_by_shape(tmp_path):
    source = drawn(tmp_path / "captures", 40, 0)
    few = labels_of(source, "report", None, tmp_path, 20 * TOKENS, SITE, lambda _: None)
    assert 10 < len(few.images) <= 20
    counted = {question: counts for question, counts in few.by_shape.items() if counts and question.of_tokens}
    assert len(counted) == 2 * (8 + 2)  # colours and sizes, at two levels
    for question, counts in counted.items():
        assert sum(counts.values()) == np.count_nonzero(few.of(question) & POSITIVE)
