"""README's two pictures of the package are true: what is where, and what imports what.

A line of the tree is names, two or more spaces, and what they are: either a list of single words, which are then
names of files and folders inside, or prose, in which words in backticks and words that end in a slash are names.
"""

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flux_ir"


class Line(NamedTuple):
    """One line of the tree: the folder it is in, the names on its left and the text on its right."""

    folder: Path
    names: list[str]
    text: str


def block_after(words: str) -> str:
    """The first fenced block of README behind these words."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(words) == 1
    return re.search(r"^```\n(.*?)^```$", readme.split(words)[1], flags=re.MULTILINE | re.DOTALL).group(1)


def tree_lines(tree: str) -> list[Line]:
    """The lines of a tree; a line that is indented is inside the folder of the line above that is less so."""
    lines, open_folders = [], {-1: ROOT}
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        left, _, text = line.strip().partition("  ")
        open_folders = {depth: folder for depth, folder in open_folders.items() if depth < indent}
        folder = open_folders[max(open_folders)]
        names = left.split(", ")
        lines.append(Line(folder, names, text.strip()))
        if names[0].endswith("/"):
            open_folders[indent] = folder / names[0]
    return lines


def exists(folder: Path, name: str) -> bool:
    """Whether a name of the tree is there: a folder (`web/`), a file, or a module without its ending."""
    if name.endswith("/"):
        return (folder / name).is_dir()
    return (folder / name).exists() or (folder / f"{name}.py").is_file()


def named_in(text: str) -> list[str]:
    """The names in what a line says of its own."""
    bare = re.sub(r"\([^()]*\)", "", text)
    items = [item.strip() for item in re.split(r"[,;]", bare)]
    if len(items) > 1 and all(re.fullmatch(r"[\w.]+/?", item) for item in items):
        return items
    return re.findall(r"(?<![\w/])\w+/(?!\w)", text)


def missing(tree: str) -> list[str]:
    """What a tree names that is not there."""
    gone = []
    for folder, names, text in tree_lines(tree):
        gone += [name for name in names if not exists(folder, name)]
        inside = folder / names[0] if names[0].endswith("/") else folder
        gone += [name for name in named_in(text) if not (exists(inside, name) or exists(ROOT, name))]
        gone += [
            name
            for name in re.findall(r"`([\w.]+)`", text)
            if not (exists(ROOT, name) or list(inside.rglob(name)) or list(inside.rglob(f"{name}.py")))
        ]
        gone += [name for name in re.findall(r"\bflux_ir(?:\.\w+)+", text) if not exists(ROOT, name.replace(".", "/"))]
    return gone


def test_everything_in_the_tree_is_there():
    assert missing(block_after("## What is where")) == []


def test_the_tree_has_every_room():
    named = {
        (folder / name).resolve() for folder, names, _ in tree_lines(block_after("## What is where")) for name in names
    }
    rooms = {init.parent for init in PACKAGE.glob("*/__init__.py")}
    assert len(rooms) > 10
    assert rooms - named == set()


@pytest.mark.parametrize(
    ("line", "gone"),
    [
        ("attic/   what is kept", ["attic/"]),
        ("flux_ir/   models/, attic/ (old things)", ["attic/"]),
        ("flux_ir/\n  models/   autoencoder, attics", ["attics"]),
        ("flux_ir/\n  models/   the networks; attic/ holds old ones", ["attic/"]),
        ("flux_ir/\n  sites, attic   shared nouns", ["attic"]),
        ("flux_ir/\n  models/   networks; `attic` keeps old ones", ["attic"]),
        ("train_sae.py   calls flux_ir.commands.attic", ["flux_ir.commands.attic"]),
        ("flux_ir/\n  models/   networks\ntests/   mirrors the package; benchmarks/ and docs/", []),
    ],
)
def test_what_is_not_there_is_found(line, gone):
    assert missing(line) == gone


def layer(text: str) -> tuple[list[str], list[str]]:
    """The rooms of one line of the contract that there are, and what stands between them."""
    rooms = [room.strip(" ()") for room in re.split("[|:]", text)]
    rooms = [room for room in rooms if exists(PACKAGE, room) and room != "__main__"]
    return rooms, re.findall("[|:]", text)[: max(len(rooms) - 1, 0)]


def test_the_picture_of_the_imports_is_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (rooms,) = (contract for contract in contracts["contracts"] if contract["id"] == "rooms")
    held = [layer(line) for line in rooms["layers"]]
    lines = block_after("Imports run one way; a line may import lines below it").splitlines()
    assert [layer(line.split("  ")[0]) for line in lines] == [line for line in held if line[0]]
