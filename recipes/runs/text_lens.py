"""Which layer of the text encoders first gives the right colour, shape and relation? flux-tiny, judged exactly.

uv run python recipes/runs/text_lens.py --scenes 30 --seeds 2 --output_dir text_lens

Held-out captions, each from several noises. First every layer of T5 with all tokens, the words alone and the padding
alone, then CLIP's layers; then, at the last layer, the controls: the pooled vector zeroed, another caption's words with
this one's padding, the padding of this one with nothing else. Last, one word of the first object's colour, or the whole
phrase of the object, told as that of a caption that differs in this colour alone. A run that was stopped goes on.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flux_ir
from flux_ir.demo.scenes import COLOURS, Scene, held_out_scenes
from flux_ir.models.suite import Suite
from flux_ir.studies.text_lens import ASPECTS, AspectScore, PooledSource, wilson


def main() -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("text_lens"))
    arguments = parser.parse_args()
    model = flux_ir.load_model("flux-tiny", dtype="float32")
    scenes = held_out_scenes(arguments.scenes, 12)
    captions = [scene.caption for scene in scenes]
    others = captions[1:] + captions[:1]
    last = f"t5.{model.spec.t5_layers - 1}"

    def told(name: str, **changes: Any) -> flux_ir.TextLensResult:
        return flux_ir.text_lens(
            prompts=captions,
            judge=True,
            model=model,
            seeds=arguments.seeds,
            name=name,
            output_dir=arguments.output_dir,
            progress=print_notes,
            **changes,
        )

    layers = told("layers", tokens=("all", "words", "padding"))
    clip = told("clip", layers="clip.*")
    controls = {
        "plain": only(layers.scores, "all", last),
        "words alone": only(layers.scores, "words", last),
        "padding alone": only(layers.scores, "padding", last),
        "words alone, the rest removed": told("removed", layers=last, tokens="words", rest="removed").scores,
        "pooled vector zeroed": told("zeroed", layers=last, pooled="zeros").scores,
        "pooled vector of another caption": told("pooled", layers=last, pooled="other", other_prompt=others).scores,
        "another caption's words": told(
            "words", layers=last, tokens="padding", rest="other", other_prompt=others
        ).scores,
    }
    print(f"\n{len(captions)} captions, {arguments.seeds} seeds\n")
    print_table({f"{tokens}, {layer}": only(layers.scores, tokens, layer) for tokens, layer in lines(layers.scores)})
    print_table({layer: only(clip.scores, "all", layer) for _, layer in lines(clip.scores)})
    print_table(controls)
    print_table({f"{name}: of the other caption": rows for name, rows in controls.items()}, "other")
    print_table(controls, "chance")
    print_settled(layers)
    print_swaps(model, scenes, arguments.seeds, arguments.output_dir / "swaps", last)


def print_notes(event: object) -> None:
    """Notes as they come."""
    if isinstance(event, flux_ir.Note):
        print(event.text, flush=True)


def lines(scores: Sequence[AspectScore]) -> list[tuple[str, str]]:
    """Every selection of tokens with every layer, in order."""
    return list(dict.fromkeys((one.tokens, one.layer) for one in scores))


def only(scores: Sequence[AspectScore], tokens: str, layer: str) -> list[AspectScore]:
    """The scores of one selection and layer."""
    return [one for one in scores if (one.tokens, one.layer) == (tokens, layer)]


def print_table(rows: dict[str, list[AspectScore]], value: str = "right") -> None:
    """A line per name, aspects across: shares with their intervals, or one of the controls."""
    print("| |", " | ".join(ASPECTS), "|")
    print("| --- |", " --- |" * len(ASPECTS), sep="")
    for name, scores in rows.items():
        cells = {one.aspect: one for one in scores}
        texts = []
        for aspect in ASPECTS:
            one = cells.get(aspect)
            share = None if one is None else getattr(one, value)
            interval = f" ({one.low:.2f}-{one.high:.2f})" if one is not None and value == "right" else ""
            texts.append("" if share is None else f"{share:.2f}{interval}")
        print(f"| {name} |", " | ".join(texts), "|")
    print()


def print_settled(done: flux_ir.TextLensResult) -> None:
    """From which layer on each aspect stays right, of all tokens."""
    chosen = [one for one in done.settled if one.tokens == "all"]
    names = list(chosen[0].layers)
    print("| stays right from |", " | ".join(names), "|")
    print("| --- |", " --- |" * len(names), sep="")
    for one in chosen:
        print(f"| {one.aspect} |", " | ".join(f"{share:.2f}" for share in one.layers.values()), "|")
    print()


def print_swaps(model: Suite, scenes: Sequence[Scene], seeds: int, folder: Path, last: str) -> None:
    """How often the first object has its own colour, and the other caption's, when words are told as the other's."""
    found: dict[str, list[tuple[float, float]]] = {}
    for number, scene in enumerate(scenes):
        first, *rest = scene.things
        if any(thing.colour == first.colour for thing in rest):
            continue  # the word would stand there twice
        named = [thing.colour for thing in scene.things]
        colour = next(c for c in COLOURS[number % len(COLOURS) :] + COLOURS if c not in named)
        recoloured = replace(first, colour=colour)
        other = replace(scene, things=(recoloured, *rest))
        phrase, other_phrase = (f"{thing.size} {thing.colour} {thing.shape}" for thing in (first, recoloured))
        swaps: dict[str, tuple[str | None, PooledSource]] = {
            "nothing": (None, "prompt"),
            "the colour": (f"{first.colour}={colour}", "prompt"),
            "the object's phrase": (f"{phrase}={other_phrase}", "prompt"),
            "the colour and the pooled vector": (f"{first.colour}={colour}", "other"),
            "the object's phrase and the pooled vector": (f"{phrase}={other_phrase}", "other"),
            "the pooled vector alone": (None, "other"),
        }
        for name, (swap, pooled) in swaps.items():
            needed = swap is not None or pooled == "other"
            done = flux_ir.text_lens(
                scene.caption,
                layers=last,
                swap=swap,
                pooled=pooled,
                other_prompt=other.caption if needed else None,
                judge=True,
                model=model,
                seeds=seeds,
                name=f"{number}_{name.replace(' ', '_')}",
                output_dir=folder,
            )
            (score,) = [one for one in done.scores if one.aspect == "colour"]
            found.setdefault(name, []).append((score.right, score.other or 0.0))
    print("| told as the other caption's | own colours | other caption's colours |")
    print("| --- | --- | --- |")
    for name, pairs in found.items():
        cells = []
        for column in range(2):
            share = sum(pair[column] for pair in pairs) / len(pairs)
            low, high = wilson(share, len(pairs))
            cells.append(f"{share:.2f} ({low:.2f}-{high:.2f})")
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
