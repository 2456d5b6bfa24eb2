"""Files that say which site and step their arrays are of, as `flux-ir export` writes them, as training data.

`{id}.safetensors` holds an array [tokens, d] under `{site}/step_{s}` for each, and what else is known
of the generation as JSON in its metadata. As .npy each array is a file `{site}/step_{s}/{id}.npy`, and
the JSON is `{id}.json`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from flux_ir.activations.arrays import ArrayFile, open_safetensors, rows_digest
from flux_ir.activations.blocks import (
    Generation,
    SiteName,
    TokenBlock,
    TokenRun,
    leading_txt,
    required_site,
    run_of,
    token_positions,
)
from flux_ir.activations.shards import parse_site_key, site_key
from flux_ir.activations.spans import Memory, SpanReader
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site, nearest_names

METADATA_KEY = "flux_ir"
SETTINGS = "export.json"
"""What a folder was exported with."""

SiteStep = tuple[Site, int]


@dataclass(frozen=True)
class GenerationFacts:
    """What is known of an exported generation besides its numbers."""

    id: str
    prompt: str = ""
    model: str | None = None
    txt_tokens: int = 0
    """The length of the whole text: so many tokens lead those of a single block."""
    used_txt: int | None = None
    img_positions: Sequence[int] | None = None
    """None: all image tokens are there."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "GenerationFacts":
        """Raises ValueError, KeyError or TypeError for JSON that is not of `to_json`."""
        return cls(**json.loads(text))


class ExportedGeneration(NamedTuple):
    """One generation: where each of its arrays is, by file and name (None: the only one of the file)."""

    facts: GenerationFacts
    path: Path
    arrays: Mapping[SiteStep, tuple[Path, str | None]]


class ExportedSource:
    """Activations of generations that were exported: each holds the same sites and steps."""

    def __init__(self, exported: Sequence[ExportedGeneration]) -> None:
        self._exported = exported
        first = exported[0]
        for other in exported:
            _check_same(first, other)
        self._array = lru_cache(1024)(ArrayFile.open)
        self._reader = SpanReader()
        self._shapes = {at: self._array(*where).shape for at, where in first.arrays.items()}
        self.sites: Sequence[Site] = sorted({site for site, _ in first.arrays})
        self.steps: Sequence[int] = sorted({step for _, step in first.arrays})
        self.model: str | None = first.facts.model
        self.generations: Sequence[Generation] = [Generation(e.facts.id, e.facts.prompt, e.path) for e in exported]
        self.runs: Sequence[range] = [range(index, index + 1) for index in range(len(exported))]

    @cached_property
    def identity(self) -> str:
        """A digest of what is known of the generations, and of 16 rows of each of their arrays."""
        digest = hashlib.sha256()
        for facts, _, arrays in self._exported:
            digest.update(facts.to_json().encode())
            for at in sorted(arrays):
                array = self._array(*arrays[at])
                values = rows_digest(array, 0, array.rows, self._reader)
                digest.update(f"{site_key(*at)} {array.shape} {values}".encode())
        return digest.hexdigest()[:16]

    def d(self, site: SiteName) -> int:
        """The width of a site."""
        return self._shapes[self._stored(site), self.steps[0]][-1]

    def tokens(self, site: SiteName) -> int:
        """Tokens of a site per generation and step."""
        site = required_site(site, "exported activations")
        stored, facts = self._stored(site), self._exported[0].facts
        tokens = self._shapes[stored, self.steps[0]][0]
        if stored == site:
            return tokens
        return facts.txt_tokens if site.stream == "txt" else tokens - facts.txt_tokens

    def read(self, generation: int, site: SiteName, step: int) -> TokenBlock:
        """One block."""
        site = required_site(site, "exported activations")
        stored, (facts, path, arrays) = self._stored(site), self._exported[generation]
        if (stored, step) not in arrays:
            raise FluxIRError(f"step {step} was not exported to {path}", hint=f"it holds the steps {self.steps}")
        array = self._array(*arrays[stored, step])
        if array.shape != self._shapes[stored, step]:
            raise FluxIRError(
                f"all generations must have the same sizes: {stored} is {list(array.shape)} in {array.file} and "
                f"{list(self._shapes[stored, step])} in {self._exported[0].path}",
                hint="keep generations of different sizes in different folders",
            )
        values = array.read(0, array.rows, self._reader)
        if stored != site:
            values = values[: facts.txt_tokens] if site.stream == "txt" else values[facts.txt_tokens :]
        kept = None if facts.img_positions is None else torch.tensor(facts.img_positions, dtype=torch.int32)
        return TokenBlock(
            values=values,
            scale=None,
            site=site,
            step=step,
            generation=facts.id,
            prompt=facts.prompt,
            positions=token_positions(site, facts.txt_tokens, kept, len(values)),
            txt_tokens=len(values) if site.stream == "txt" else leading_txt(site, facts.txt_tokens),
            used_txt=facts.used_txt,
        )

    def read_run(
        self, images: range, site: SiteName, step: int, tokens: range | None = None, memory: Memory | None = None
    ) -> TokenRun:
        """Some tokens of one generation."""
        return run_of(self.read(images.start, site, step), tokens)

    def _stored(self, site: SiteName) -> Site:
        site = required_site(site, "exported activations")
        for stored in (site, site.whole):
            if stored in self.sites:
                return stored
        raise FluxIRError(
            f"{site} was not exported to {self._exported[0].path}, which holds {len(self.sites)} sites",
            hint=f"the nearest are {nearest_names(str(site), map(str, self.sites))}",
        )


def is_exported(file: Path) -> bool:
    """Whether all arrays of a safetensors file are named by site and step."""
    if file.suffix != ".safetensors":
        return False
    with open_safetensors(file) as archive:
        names = list(archive.keys())
    return bool(names) and all(_site_step(name) for name in names)


def safetensors_generation(file: Path) -> ExportedGeneration:
    """A generation exported as safetensors."""
    with open_safetensors(file) as archive:
        names, metadata = list(archive.keys()), archive.metadata() or {}
    arrays = {at: (file, name) for name in names if (at := _site_step(name))}
    if (text := metadata.get(METADATA_KEY)) is not None:
        return ExportedGeneration(_facts(file, text), file, arrays)
    array = ArrayFile.open(*next(iter(arrays.values())))  # the content names it: a file may be renamed
    return ExportedGeneration(GenerationFacts(rows_digest(array, 0, array.rows, SpanReader())), file, arrays)


def npy_generations(folder: Path) -> list[ExportedGeneration]:
    """The generations exported as .npy to this folder: those whose JSON, written last, is there."""
    steps = sorted(folder.glob("*/step_*"))
    named_steps = {at: step for step in steps if (at := _site_step(f"{step.parent.name}/{step.name}"))}
    exported = []
    for file in sorted(set(folder.glob("*.json")) - {folder / SETTINGS}) if named_steps else []:
        facts = _facts(file, file.read_text(encoding="utf-8"))
        arrays = {at: (path, None) for at, step in named_steps.items() if (path := step / f"{file.stem}.npy").is_file()}
        exported.append(ExportedGeneration(facts, file, arrays))
    return exported


def _site_step(name: str) -> SiteStep | None:
    """The site and step that an array's name says; None: it says none."""
    named = parse_site_key(name)
    try:
        return (Site.parse(named[0]), named[1]) if named else None
    except FluxIRError:
        return None


def _facts(file: Path, text: str) -> GenerationFacts:
    try:
        return GenerationFacts.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise FluxIRError(
            f"{file} does not say what flux-ir export says of a generation: {error}", hint="export it again"
        ) from error


def _check_same(first: ExportedGeneration, other: ExportedGeneration) -> None:
    names = [", ".join(site_key(*at) for at in sorted(e.arrays)) for e in (first, other)]
    differences: list[tuple[str, str | None, str | None]] = [
        ("model", first.facts.model, other.facts.model),
        ("sites and steps", names[0], names[1]),
    ]
    for word, one, another in differences:
        if one != another:
            raise FluxIRError(
                f"all exported generations of a folder must have the same {word}: {other.path} has {another}, "
                f"{first.path} has {one}",
                hint="keep different ones in different folders",
            )
