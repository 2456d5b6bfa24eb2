"""Arguments from Python, which no parser of flags has read: words and numbers are checked here."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flux_ir.errors import FluxIRError, nearest


def check_words(declared: type | Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises FluxIRError for a word that is none of those that `declared`, a function or a dataclass, lists for it.

    Arguments that are annotated with other things than a `Literal`, or several of one, are passed over.
    """
    annotations = get_type_hints(declared)
    for name, value in arguments.items():
        words = _words(annotations[name])
        given = value if isinstance(value, Collection) and not isinstance(value, str) else [value]
        for word in given if words and value is not None else ():
            if word not in words:
                near = nearest(str(word), words)
                raise FluxIRError(
                    f"--{name} must be one of {', '.join(words)}: got {word!r}",
                    hint=f"did you mean {near}?" if near else f"leave it out, or pass {words[0]}",
                )


def check_least(least: Mapping[str, float], arguments: Mapping[str, Any]) -> None:
    """Raises FluxIRError for a number, or one of several, below what `least` says of it; None is no number."""
    for name, bound in least.items():
        value = arguments[name]
        for number in value if isinstance(value, Collection) else [value]:
            if number is not None and not number >= bound:
                raise FluxIRError(f"--{name} must be at least {bound}: got {number}", hint="leave it out, or raise it")


def _words(annotation: Any) -> tuple[str, ...]:
    """The words an annotation lists: of a Literal, alone, in a union or of the elements of a collection."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for part in get_args(annotation) for word in _words(part))
