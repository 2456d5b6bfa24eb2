import pytest

from flux_ir.errors import nearest


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("promt", "prompt"),
        ("PROMPT", "prompt"),
        ("gpu", "multi_gpu"),
        ("w", "width"),
        ("out", "output_dir"),
        ("zz", None),
        ("", None),
    ],
)
def test_the_nearest_name_is_found(word, near):
    assert nearest(word, ["prompt", "width", "multi_gpu", "output_dir"]) == near
