"""The shape of the package in numbers: how many files, how long, and how many one opens to follow a piece of work.

Nothing is timed. `--before REVISION` prints the numbers of another commit beside those of the working tree. They serve
the reading: a number that rises is a question, not a fault.
"""

import argparse
import ast
import io
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from measure import print_report

PACKAGE = "flux_ir"
OWN_KIND = ("commands", "architectures")
"""Rooms whose files are members of a family, found by name: one importer is what they shall have."""
LONG_LINES = 60
TRAINING_PATH = (
    "flux_ir.commands.train_sae.run",
    "flux_ir.api.train_sae.run_training",
    "flux_ir.api.training_run.TrainingRun.work",
    "flux_ir.api.training_run.TrainingRun._train",
    "flux_ir.sae.training.step.train",
    "flux_ir.sae.training.step.Trainer.step",
    "flux_ir.sae.training.step.Member.step",
    "flux_ir.sae.training.optimiser.RowAdam.step",
)
"""The functions from the word on the command line to the step that changes the weights, each called by the one before.
What they are handed stands elsewhere: settings, data, and the loss of an architecture."""


class Module(NamedTuple):
    """One file of the package."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.split(".")[1] if "." in self.name else ""


class Function(NamedTuple):
    """A function with its length: from its def to its last line."""

    name: str
    lines: int


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", help="another commit, whose numbers stand beside")
    parser.add_argument("--list", action="store_true", help="also the modules with one importer, and who imports them")
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    columns = {"now": numbers_of(here)}
    if options.before:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            run = ["git", "-C", str(here), "worktree"]
            subprocess.run([*run, "add", "--quiet", "--detach", str(tree), options.before], check=True)
            try:
                columns = {options.before: numbers_of(tree), **columns}
            finally:
                subprocess.run([*run, "remove", "--force", str(tree)], check=True)
    rows = [[name, *(numbers.get(name, "") for numbers in columns.values())] for name in columns["now"]]
    print_report("The shape of the package", ["", *columns], rows, f"python {sys.version.split()[0]}")
    if options.list:
        for name, importers in sorted(with_one_importer(modules_of(here)).items()):
            print(f"{name:50} {importers}")


def numbers_of(root: Path) -> dict[str, str]:
    """All numbers of one checkout."""
    modules = modules_of(root)
    functions = [function for module in modules for function in functions_of(module)]
    lines = sum(module.text.count("\n") for module in modules)
    comments = sum(comment_lines(module) for module in modules)
    long = [function for function in functions if function.lines > LONG_LINES]
    largest = max(functions, key=lambda function: function.lines)
    contract = (root / "pyproject.toml").read_text(encoding="utf-8")
    documented, public = documentation(modules)
    return {
        "modules": f"{len(modules)}",
        "lines": f"{lines:,}",
        "functions": f"{len(functions):,}",
        "median lines of a module": f"{sorted(m.text.count(chr(10)) for m in modules)[len(modules) // 2]}",
        f"modules with one importer, outside {' and '.join(OWN_KIND)}": f"{len(with_one_importer(modules))}",
        f"functions above {LONG_LINES} lines": f"{len(long)}",
        "largest function": f"{largest.lines} lines, {largest.name}",
        "files opened to follow train-sae from word to weight": files_on(modules, TRAINING_PATH),
        "ignored imports": f"{contract.count('ignore_imports')}",
        "lines with a comment": f"{100 * comments / lines:.1f} %",
        "public names with a docstring": f"{100 * documented / public:.1f} % of {public:,}",
    }


def modules_of(root: Path) -> list[Module]:
    """Every file of the package that holds code."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if path.name == "__init__.py" and all(isinstance(node, ast.Expr) for node in tree.body):
            continue  # a docstring only
        parts = path.relative_to(root).with_suffix("").parts
        found.append(Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path, text, tree))
    return found


def with_one_importer(modules: Sequence[Module]) -> dict[str, str]:
    """Modules that one other module imports, and which. A lazily imported public name counts as an import."""
    names = {module.name for module in modules}
    importers = defaultdict[str, set[str]](set)
    for module in modules:
        for imported in imports_of(module):
            target = imported if imported in names else imported.rpartition(".")[0]
            if target in names and target != module.name:
                importers[target].add(module.name)
    return {
        name: next(iter(found))
        for name, found in importers.items()
        if len(found) == 1 and not set(name.split(".")) & set(OWN_KIND)
    }


def imports_of(module: Module) -> Iterator[str]:
    """Dotted names, and modules that are named in a text, as the package's lazy names are."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(PACKAGE + "."):
            yield node.value


def files_on(modules: Sequence[Module], path: Sequence[str]) -> str:
    """How many files hold the functions of a call path, or the first step of it that the code does not take.

    A step is taken if the function has a call of the next one's name, in the same file or one that it imports.
    """
    homes: dict[str, Module] = {}
    bodies: dict[str, ast.AST] = {}
    for module in modules:
        for node in module.tree.body:
            members = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{module.name}.{node.name}." if isinstance(node, ast.ClassDef) else f"{module.name}."
            for function in members:
                if isinstance(function, ast.FunctionDef):
                    homes[prefix + function.name], bodies[prefix + function.name] = module, function
    for caller, callee in pairwise(path):
        if caller not in bodies or callee not in bodies:
            return f"no {caller if caller not in bodies else callee}"
        calls = (node.func for node in ast.walk(bodies[caller]) if isinstance(node, ast.Call))
        names = {f.id if isinstance(f, ast.Name) else f.attr for f in calls if isinstance(f, ast.Name | ast.Attribute)}
        here, there = homes[caller], homes[callee].name
        reached = here.name == there or any(name.rpartition(".")[0] == there for name in imports_of(here))
        if callee.rpartition(".")[2] not in names or not reached:
            return f"{caller} does not call {callee}"
    return str(len({homes[name].name for name in path}))


def functions_of(module: Module) -> Iterator[Function]:
    """Functions and methods, those inside functions too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(f"{module.name}.{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)


def comment_lines(module: Module) -> int:
    """Lines with a comment that is one for a reader: directives to linters are none."""
    tokens = tokenize.generate_tokens(io.StringIO(module.text).readline)
    comments = (token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)
    return sum(not comment.startswith(("noqa", "type:", "fmt:", "pragma")) for comment in comments)


def documentation(modules: Sequence[Module]) -> tuple[int, int]:
    """Public modules, classes, functions and methods: how many have a docstring, and how many there are."""
    documented = public = 0
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, kinds) and not getattr(node, "name", "").startswith("_"):
                public += 1
                documented += ast.get_docstring(node) is not None
    return documented, public


if __name__ == "__main__":
    main()
