"""`flux-ir text-lens`: the whole command, and what it refuses."""

import pytest

from flux_ir.commands.main import main

CAPTION = "a large red circle on the left on a white background"
WORDS = ("text-lens", "--model", "flux-tiny", "--prompt", CAPTION, "--num_steps", "1", "--seeds", "1")


def test_the_command_draws_a_sheet_and_says_what_is_right(tmp_path, capsys):
    words = ("--layers", "t5.embeddings,t5.2", "--judge", "True", "--output_dir", str(tmp_path))
    assert main([*WORDS, *words]) == 0
    (folder,) = tmp_path.iterdir()
    assert {"sheet_0.png", "text_lens.json", "scores.csv", "scores.png", "pictures"} <= {
        path.name for path in folder.iterdir()
    }
    out = capsys.readouterr().out
    assert "all, t5.embeddings" in out
    assert "2 readings drawn" in out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--layers", "t5.9"), "3 layers of T5 and 3 of CLIP, and none matches 't5.9'\nhint: the nearest are "),
        (
            ("--words", "green"),
            "the prompt has no word 'green'\nhint: its words are a#1, large, red, circle, on#1, the, left",
        ),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_code_2(tmp_path, capsys, words, error):
    assert main([*WORDS, *words, "--output_dir", str(tmp_path)]) == 2
    assert error in capsys.readouterr().err
