"""Arguments from Python, which no parser of flags has read: words and numbers are checked here.

Flags take their lower bounds from here too (`commands.cli.option`), so that each stands in one place. Nothing heavy is
imported.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flux_ir.errors import FluxIRError, nearest

_ZERO = """
    bootstrap checkpoint_minutes cka_tokens controls effect_images ema fdr min_likeness null permutations seed
    splice_steps steps
"""
_ONE = """
    batch_size batch_tokens best candidates dead_after epochs examples examples_each expansion fit_tokens k k_start
    least_positives max_prompts max_tokens min_count most num_steps prefixes probes prompts repeats resample
    search_tasks seeds small_tasks splice_batch tasks top
"""
LEAST: Mapping[str, float] = {
    **dict.fromkeys(_ZERO.split(), 0),
    **dict.fromkeys(_ONE.split(), 1),
    "min_images": 2,
    "max_images": 2,
    "cell_px": 16,
}
"""The least that a number may be, by the name of the argument, which is the name of the flag."""


def check_words(declared: type | Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises FluxIRError for a word that is none of those that `declared`, a function or a dataclass, lists for it.

    Arguments that are annotated with other things than a `Literal`, or several of one, are passed over.
    """
    annotations = get_type_hints(declared)
    for name, value in arguments.items():
        words = _words(annotations[name])
        given = value if isinstance(value, Collection) and not isinstance(value, str) else [value]
        if isinstance(value, bool) and bool in get_args(annotations[name]):
            continue
        for word in given if words and value is not None else ():
            if word not in words:
                near = nearest(str(word), words)
                raise FluxIRError(
                    f"--{name} must be one of {', '.join(words)}: got {word!r}",
                    hint=f"did you mean {near}?" if near else f"leave it out, or pass {words[0]}",
                )


def check_least(arguments: Mapping[str, Any], **other: float) -> None:
    """Raises FluxIRError for a number, or one of several, below what `LEAST` says of it; `other` comes before `LEAST`.

    What is no number is passed over: some of these names are those of paths or texts in other functions (`prompts`).
    """
    for name, bound in {**LEAST, **other}.items():
        value = arguments.get(name)
        for number in value if isinstance(value, Collection) and not isinstance(value, str) else [value]:
            if isinstance(number, int | float) and not number >= bound:
                raise FluxIRError(f"--{name} must be at least {bound}: got {number}", hint="leave it out, or raise it")


def _words(annotation: Any) -> tuple[str, ...]:
    """The words an annotation lists: of a Literal, alone, in a union or of the elements of a collection."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for part in get_args(annotation) for word in _words(part))
