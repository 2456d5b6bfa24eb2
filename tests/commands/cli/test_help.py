from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from flux_ir.commands.cli.help import help_page
from flux_ir.commands.cli.option import REQUIRED, Options, option


@dataclass(frozen=True)
class Toy(Options):
    """Draw a toy.

    It is only a toy.
    """

    generation_id: str = option(REQUIRED, help="the id a capture printed")
    prompt: str = option("a cat", help="what is drawn", free_text=True, group="picture")
    width: int = option(256, help="width of the picture", unit="px", multiple_of=16, group="picture")
    num_steps: int | None = option(None, help="steps", default_text="4 for toys", minimum=1)
    seed: int | None = option(None, help="seed", minimum=0, maximum=2**63 - 1)
    strength: float = option(0.5, help="strength", minimum=0, maximum=1)
    should_decode_intermediates: bool = option(True, help="decode")
    output_dir: Path = option(Path("output"), help="folder")
    steps: tuple[int, ...] | None = option((0, 2), help="steps kept", group="picture")
    lens: Literal["euler", "x0"] = option("euler", help="reading")
    model: str = option("big", help="model", choices=("big", "middling", "quite small"))


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "100")
    return help_page(Toy, "toy").splitlines()


def test_the_page_starts_with_the_purpose_the_usage_and_the_details(lines):
    usage = "usage: toy --generation_id NAME [--flag value ...]"
    assert lines[:5] == ["Draw a toy.", "", usage, "", "It is only a toy."]


def test_every_flag_stands_once_with_its_facts_in_aligned_columns(lines):
    rows = [line.strip() for line in lines if line.startswith("  --")]
    assert rows == [
        "--generation_id NAME               the id a capture printed (required)",
        "--num_steps N                      steps (default: 4 for toys)",
        "--seed N                           seed (default: None)",
        "--strength X                       strength (0 to 1; default: 0.5)",
        "--[no]should_decode_intermediates  decode (default: True)",
        "--output_dir PATH                  folder (default: output)",
        "--lens euler|x0                    reading (default: euler)",
        "--model NAME                       model (one of big, middling, quite small; default: big)",
        '--prompt TEXT                      what is drawn (default: "a cat")',
        "--width N                          width of the picture (px; a multiple of 16; default: 256)",
        "--steps N,N,..                     steps kept (default: 0,2)",
    ]


def test_groups_keep_the_order_in_which_they_first_appear(lines):
    assert [line for line in lines if line.endswith(":") and not line.startswith(" ")] == ["options:", "picture:"]


def test_the_page_fits_the_terminal(monkeypatch):
    for columns in (60, 80, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, help_page(Toy, "toy").splitlines())) <= columns
