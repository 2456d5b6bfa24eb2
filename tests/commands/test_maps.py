"""`flux-ir maps`: the whole command, and what it refuses."""

import pytest

from flux_ir.commands.main import main

WORDS = ("maps", "--model", "flux-tiny", "--prompt", "a red circle, on white", "--num_steps", "2", "--seed", "1")


def test_the_command_writes_maps_and_says_where_attention_goes(tmp_path, capsys):
    words = ("--words", "red,circle", "--blocks", "double.*", "--output_dir", str(tmp_path))
    assert main([*WORDS, *words]) == 0
    (folder,) = tmp_path.iterdir()
    assert {"maps.json", "mean.safetensors", "sheet.png", "maps.html", "picture.jpg", "step_0.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    out = capsys.readouterr().out
    assert "maps of red, circle" in out
    assert "padding" in out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("--words", "green"),
            "the prompt has no word 'green'\nhint: its words are a, red, circle, on, white\n",
        ),
        (("--blocks", "single.8"), "4 double and 8 single blocks, and none matches 'single.8'"),
        (("--patches", "-1"), "got -1"),
        (("--image", "none.png"), "cannot read the picture of --image in none.png"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_code_2(tmp_path, capsys, words, error):
    assert main([*WORDS, *words, "--output_dir", str(tmp_path)]) == 2
    assert error in capsys.readouterr().err
