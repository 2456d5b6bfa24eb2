"""`flux-ir VERB --flag value`, also `python -m flux_ir VERB`. A verb's module is imported only when it is asked for."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from flux_ir.commands.cli.help import bold, table
from flux_ir.commands.cli.parse import exit_code
from flux_ir.errors import FluxIRError, nearest

VERBS = {
    "capture": "sample a picture, record every block, and show what each would have drawn",
    "plan": "what a capture takes on this machine or another: memory, disk, seconds, best setting",
    "collect": "collect activations over thousands of prompts, with any number of processes",
    "collect-clip": "collect CLIP's activations of a folder of pictures as training data",
    "convert-collection": "make a collection of shards of an old one",
    "export": "write captured activations as plain arrays: safetensors or npy",
    "train-lens": "fit a tuned or a Jacobian lens, judged on held-out prompts",
    "train-sae": "train sparse autoencoders on captured activations, or on live ones",
    "evaluate-sae": "measure autoencoders on images not trained on, and splice them into the model",
    "export-sae": "write an autoencoder as another program reads it, or put it on the hub",
    "study": "run a whole study by one small file: collect, train, measure, say what features mean",
    "features": "find out what the features of an autoencoder mean: all stages into one folder",
    "score-features": "what every feature of an autoencoder does, on every token, image and step",
    "find-examples": "images that show what each feature responds to: strong, weak, random, silent",
    "label-features": "words that lift each feature, and a short description judged on other images",
    "select-features": "which features deserve a look: coherent ones, those of a word, those of most effect",
    "draw-features": "contact sheets of features with maps, their neighbours, and what each one draws",
    "compare-features": "match the features of two sites, steps, autoencoders or models, and say what has moved",
    "export-features": "the table of features as CSV or Parquet, or all of them as Neuronpedia imports them",
    "score-concepts": "how well single features tell known concepts, beside probes and chance",
    "probe": "which site and step know what: linear probes, judged on other prompts",
    "steer": "turn a feature to several strengths, with the price of each and controls beside it",
    "demonstrate": "which features do something: each turned down and up beside a random direction",
    "attribute": "which features a part of one picture owes most to, by gradients and by removing them",
    "transfer": "one prompt's features in a region of another's picture, beside other methods",
    "play": "a local page: click a patch for its features, turn them, compare before with after",
    "score-steering": "how often an edit changes one known thing of a scene, and nothing else",
    "maps": "exact attention maps of the prompt's words in every block, and maps of any concept",
    "text-lens": "what is drawn from earlier layers of the text encoders, or from some tokens alone",
    "ablate": "what each block is for: skipped, cut, shifted, patched, and what is lost",
    "lens": "decode an existing capture again, without sampling",
    "visualize": "make a film or a contact sheet of what each block would have drawn",
    "compare-models": "how far apart two models are in every block at every step, from the same noise",
    "compare-quantized": "how much nf4, int8 or fp8 weights change each block, and the picture",
    "weights": "what a file of weights is; of a LoRA, how much it changes each block",
    "explore": "write one HTML page to look at runs with: every block at every step",
    "explore-features": "write pages to look at features with: a list of all of them, and a page for each",
}
"""What every verb does. Its flags and its `main` are in the module of its name, in this room."""


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
    if words[0] not in VERBS:
        near = nearest(words[0], VERBS)
        meant = f"; did you mean {near}?" if near else ""
        raise FluxIRError(f"{words[0]}: no such verb{meant}", hint="flux-ir --help lists the verbs")
    module = import_module(f"flux_ir.commands.{words[0].replace('-', '_')}")
    code: int = module.main(words[1:], prog=f"flux-ir {words[0]}")
    return code


def overview() -> str:
    """What `flux-ir` alone prints: the verbs, one line each."""
    verbs = table(VERBS, column=max(map(len, VERBS)) + 6)
    return "\n\n".join(
        [
            "Look inside FLUX.1: capture what every block puts out, and see what each would have drawn.",
            f"{bold('usage:')} flux-ir VERB [--flag value ...]",
            f"{bold('verbs:')}\n{verbs}",
            "flux-ir VERB --help lists the flags of a verb; flux-ir --version prints the version.",
        ]
    )
