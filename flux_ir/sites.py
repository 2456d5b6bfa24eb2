"""Places in the networks whose output can be recorded, by name: one grammar for flags, file keys and plots.

`double.18.img` is the image output of double block 18, `single.9` text and image behind single block 9, `single.9.img`
its image half; a last word names a part of the block (`double.18.img.mlp`). A model that is given a reference picture
(Kontext) has its tokens too: `double.18.cond`, `single.9.cond`. `double.18.q` and `double.18.k` are the queries and
keys of a block's attention, of text and image together in blocks of both kinds. `t5.12` and `clip.7` are the outputs
of layers of the text encoders. Those run once for a prompt: their sites have no step. `recording.recorder` records all
of them.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from flux_ir.errors import FluxIRError

Kind = Literal["t5", "clip", "double", "single"]
Stream = Literal["img", "txt"]
SiteStream = Literal["img", "txt", "cond"]
"""`cond`: the tokens of a reference picture, which stand behind those of the image."""
Part = Literal["q", "k", "attn", "mlp", "neurons", "update", "out"]

# In the order sites sort by. None is the whole: both streams of a block, the block's own output.
_KINDS: tuple[Kind, ...] = get_args(Kind)
_PER_PROMPT: tuple[Kind, ...] = ("t5", "clip")
_STREAMS: dict[Kind, tuple[SiteStream | None, ...]] = {
    "t5": (None,),
    "clip": (None,),
    "double": (None, "img", "txt", "cond"),
    "single": (None, "img", "txt", "cond"),
}
_PARTS: dict[Kind, tuple[Part | None, ...]] = {
    "t5": (None,),
    "clip": (None,),
    "double": (None, "q", "k", "attn", "mlp", "neurons", "update"),
    "single": (None, "q", "k", "attn", "neurons", "update", "out"),
}
_JOINT: tuple[Part, ...] = ("q", "k")
"""What a double block has of both streams together."""
_GRAMMAR = re.compile(
    r"(?P<kind>t5|clip|double|single)\.(?P<block>0|[1-9][0-9]*)(\.(?P<stream>img|txt|cond))?(\.(?P<part>q|k|attn|mlp|neurons|update|out))?"
)
_HINT = "sites look like double.18.img, double.18.txt.mlp, single.9, single.9.img, single.9.q, t5.12 or clip.7"
_COND_HINT = "leave it out; flux-dev-kontext takes a --reference_image"
_PER_PROMPT_HINT = "it is recorded once per prompt: by `capture` and `collect` with such --sites, or a TextRecorder"


@functools.total_ordering
@dataclass(frozen=True, repr=False)
class Site:
    """One place in a network. `str(site)` is its name; sites sort by depth: double before single, 2 before 10.

    Those of the text encoders come first.
    """

    kind: Kind
    block: int
    stream: SiteStream | None = None
    """None: text and image together, which single blocks have, and queries and keys; or there is one stream, as in
    text encoders."""
    part: Part | None = None
    """None: the block's output. q, k: queries and keys after norm and rotation, heads joined; attn, mlp, out: before
    the gate, and attn of a single block before `linear2`; neurons: after the activation; update: the block's output
    minus its input."""

    def __post_init__(self) -> None:
        if self.block < 0 or self.stream not in _STREAMS[self.kind] or self.part not in _parts(self.kind, self.stream):
            raise FluxIRError(f"there is no site {self}: {self._what_exists()}", hint=_HINT)

    def _what_exists(self) -> str:
        if self.per_prompt:
            return f"a layer of {self.kind.upper()} has its output and no parts"
        streams = " or ".join(stream or "none" for stream in _STREAMS[self.kind])
        parts = ", ".join(part for part in _PARTS[self.kind] if part)
        if self.kind == "double":
            return f"a double block has the streams img, txt or cond, and the parts {parts}; q and k have none too"
        return f"a {self.kind} block has the streams {streams}, and the parts {parts}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site of this name. Raises FluxIRError if there can be none."""
        found = _GRAMMAR.fullmatch(text)
        if found is None:
            raise FluxIRError(f"a site is kind.block[.stream][.part]: got {text!r}", hint=_HINT)
        return cls(found["kind"], int(found["block"]), found["stream"], found["part"])  # type: ignore[arg-type]

    def __str__(self) -> str:
        return ".".join(str(word) for word in (self.kind, self.block, self.stream, self.part) if word is not None)

    def __repr__(self) -> str:
        return f"Site.parse({str(self)!r})"

    @property
    def per_prompt(self) -> bool:
        """Whether it is a layer of a text encoder, whose output belongs to a prompt and to no step."""
        return self.kind in _PER_PROMPT

    @property
    def whole(self) -> "Site":
        """The site this one is half of; itself, unless it is the image or the text of what has both.

        The tokens of a reference picture are no part of a whole: `single.9` is text and image.
        """
        joint = self.kind == "single" or self.part in _JOINT
        return replace(self, stream=None) if joint and self.stream != "cond" else self

    @property
    def in_residual(self) -> bool:
        """Whether its values are in the space of the block's output: not neurons, queries, keys or joined heads."""
        return self.part not in (*_JOINT, "neurons") and (self.kind, self.part) != ("single", "attn")

    def __lt__(self, other: "Site") -> bool:
        return self._depth_order() < other._depth_order()

    def _depth_order(self) -> tuple[int, ...]:
        streams, parts = _STREAMS[self.kind], _PARTS[self.kind]
        return _KINDS.index(self.kind), self.block, streams.index(self.stream), parts.index(self.part)


def _parts(kind: Kind, stream: SiteStream | None) -> tuple[Part | None, ...]:
    """The parts that a block has of a stream, or of both together."""
    return _JOINT if kind == "double" and stream is None else _PARTS[kind]


SiteNames = str | Site | Iterable[str | Site]
"""Sites as people give them: one or several, as text or as `Site`; text may be patterns with commas between them."""


def site_names(sites: SiteNames) -> tuple[str, ...]:
    """The names and patterns in `sites`, one by one: what `match_sites` takes."""
    given = (sites,) if isinstance(sites, str | Site) else sites
    return tuple(name.strip() for site in given for name in str(site).split(","))


def as_site(site: str | Site) -> Site:
    """A site that is given as text or as a `Site`. Raises FluxIRError if there can be none of this name."""
    return Site.parse(site) if isinstance(site, str) else site


def all_sites(depth: int, depth_single_blocks: int, *, cond: bool = False) -> list[Site]:
    """Every site of a transformer with so many double and single blocks, in depth order.

    `cond`: also those of the tokens of a reference picture, for models that take one.
    """
    blocks: dict[Kind, int] = {"double": depth, "single": depth_single_blocks}
    return [
        Site(kind, block, stream, part)
        for kind in blocks
        for block in range(blocks[kind])
        for stream in _STREAMS[kind]
        if cond or stream != "cond"
        for part in _parts(kind, stream)
    ]


def text_sites(t5_layers: int, clip_layers: int) -> list[Site]:
    """Every site of text encoders of so many layers: T5's, then CLIP's."""
    return [Site("t5", layer) for layer in range(t5_layers)] + [Site("clip", layer) for layer in range(clip_layers)]


def block_outputs(depth: int, depth_single_blocks: int) -> list[Site]:
    """What every block puts out: both streams of the double blocks, then the single blocks whole."""
    return [site for site in all_sites(depth, depth_single_blocks) if site.part is None and site.whole == site]


def check_sites(sites: Iterable[Site], depth: int, depth_single_blocks: int) -> None:
    """Raises FluxIRError for the first site a transformer of this depth does not have, naming the nearest."""
    available = all_sites(depth, depth_single_blocks)
    every = all_sites(depth, depth_single_blocks, cond=True)
    unknown = next(iter(sorted(set(sites) - set(every))), None)
    if unknown is not None:
        if unknown.per_prompt:
            raise FluxIRError(f"{unknown} is a site of a text encoder, not of the transformer", hint=_PER_PROMPT_HINT)
        raise FluxIRError(
            f"this model has {depth} double and {depth_single_blocks} single blocks, and no site {unknown}",
            hint=f"the nearest are {nearest_names(str(unknown), map(str, available))}",
        )


def sites_of(sites: SiteNames, depth: int, depth_single_blocks: int) -> list[Site]:
    """The sites that are meant, of a transformer of this depth, each once: in the order given, a pattern's by depth.

    Raises FluxIRError for a site the transformer does not have, and for a pattern that matches nothing.
    """
    chosen: list[Site] = []
    available = all_sites(depth, depth_single_blocks, cond=True)
    for name in (sites,) if isinstance(sites, str | Site) else sites:
        chosen += [name] if isinstance(name, Site) else match_sites(site_names(name), available)
    check_sites(chosen, depth, depth_single_blocks)
    return list(dict.fromkeys(chosen))


def sites_among(sites: SiteNames, available: Sequence[Site]) -> list[Site]:
    """The sites that are meant, each once, by depth. Raises FluxIRError for one that is not among those available."""
    chosen: set[Site] = set()
    for name in (sites,) if isinstance(sites, str | Site) else sites:
        chosen.update([name] if isinstance(name, Site) else match_sites(site_names(name), available))
    if unknown := sorted(chosen - set(available)):
        nearest = nearest_names(str(unknown[0]), map(str, available))
        raise FluxIRError(f"this model has no site {unknown[0]}", hint=f"the nearest are {nearest}")
    return sorted(chosen)


def match_sites(patterns: Iterable[str], available: Sequence[Site]) -> list[Site]:
    """The available sites that match any of the shell patterns (`double.*.img`, `single.3?`, `*.update`), by depth.

    A pattern that matches a site of a single block whole does not match its two halves as well: they are views of it.
    Halves are matched by patterns that name them (`single.*.img`), and so are the tokens of a reference picture
    (`*.cond`) and layers of the text encoders (`t5.*`): `*` stands for text and image in the transformer.

    Raises FluxIRError for a pattern that matches nothing, naming the nearest sites.
    """
    found = {site for pattern in patterns for site in _matching(pattern, available)}
    return sorted(found)


def _matching(pattern: str, available: Sequence[Site]) -> set[Site]:
    names_text, names_cond = pattern.startswith(_PER_PROMPT), ".cond" in pattern
    named = [site for site in available if site.per_prompt == names_text and (names_cond or site.stream != "cond")]
    found = {site for site in named if fnmatchcase(str(site), pattern)}
    if not found and names_text and not any(site.per_prompt for site in available):
        raise FluxIRError(f"{pattern!r} names sites of a text encoder, not of the transformer", hint=_PER_PROMPT_HINT)
    if not found:
        if names_cond and not any(site.stream == "cond" for site in available):
            raise FluxIRError(
                f"{pattern!r} names tokens of a reference picture, which this model takes none of", hint=_COND_HINT
            )
        nearest = nearest_names(pattern, map(str, named))
        raise FluxIRError(f"no site of this model matches {pattern!r}", hint=f"the nearest are {nearest}")
    return {site for site in found if site.whole == site or site.whole not in found}


def nearest_names(wanted: str, names: Iterable[str]) -> str:
    """The three names most like the wanted one, for error messages."""
    return ", ".join(difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.0)) or "none"
