"""`flux-ir VERB --flag value`: the table of verbs. A verb's module is imported only when it is asked for."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple

from flux_ir.commands.front import exit_code, launch
from flux_ir.commands.help_page import bold, table
from flux_ir.errors import FluxIRError
from flux_ir.options import nearest


class Verb(NamedTuple):
    """Where a verb is: its module, the names of its options dataclass and of its function, and what it does."""

    module: str
    options: str
    run: str
    help: str


VERBS = {
    "capture": Verb(
        "flux_ir.commands.capture",
        "CaptureOptions",
        "run",
        "sample a picture, record every block, and show what each would have drawn",
    ),
    "collect": Verb(
        "flux_ir.commands.collect",
        "CollectOptions",
        "run",
        "collect activations over thousands of prompts, with any number of processes",
    ),
    "collect-clip": Verb(
        "flux_ir.commands.collect_clip",
        "CollectClipOptions",
        "run",
        "collect CLIP's activations of a folder of pictures as training data",
    ),
    "export": Verb(
        "flux_ir.commands.export",
        "ExportOptions",
        "run",
        "write captured activations as plain arrays: safetensors or npy",
    ),
    "train-sae": Verb(
        "flux_ir.commands.train_sae",
        "TrainSAEOptions",
        "run",
        "train sparse autoencoders on captured activations, or on live ones",
    ),
    "evaluate-sae": Verb(
        "flux_ir.commands.evaluate_sae",
        "EvaluateSAEOptions",
        "run",
        "measure autoencoders on images they were not trained on, and splice them into the model",
    ),
    "export-sae": Verb(
        "flux_ir.commands.export_sae",
        "ExportSAEOptions",
        "run",
        "write an autoencoder as another program reads it, or put it on the hub",
    ),
    "lens": Verb(
        "flux_ir.commands.lens",
        "LensOptions",
        "run",
        "decode an existing capture again, without sampling",
    ),
    "visualize": Verb(
        "flux_ir.commands.visualize",
        "VisualizeOptions",
        "run",
        "make a film or a contact sheet of what each block would have drawn",
    ),
    "explore": Verb(
        "flux_ir.commands.explore",
        "ExploreOptions",
        "run",
        "write one HTML page to look at runs with: every block at every step",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: runs the verb that the first word names, and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _dispatch(words))


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"flux-ir {version('flux-ir')}")
        return 0
    verb = VERBS.get(words[0])
    if verb is None:
        near = nearest(words[0], VERBS)
        meant = f"; did you mean {near}?" if near else ""
        raise FluxIRError(f"{words[0]}: no such verb{meant}", hint="flux-ir --help lists the verbs")
    module = import_module(verb.module)
    return launch(getattr(module, verb.options), getattr(module, verb.run), words[1:], prog=f"flux-ir {words[0]}")


def overview() -> str:
    """What `flux-ir` alone prints: the verbs, one line each."""
    verbs = table({name: verb.help for name, verb in VERBS.items()}, column=max(map(len, VERBS)) + 6)
    return "\n\n".join(
        [
            "Look inside FLUX.1: capture what every block puts out, and see what each would have drawn.",
            f"{bold('usage:')} flux-ir VERB [--flag value ...]",
            f"{bold('verbs:')}\n{verbs}",
            "flux-ir VERB --help lists the flags of a verb; flux-ir --version prints the version.",
        ]
    )
