"""The shards of a collection as training data, wherever they are: `collection` opens them."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from flux_ir.activations.blocks import (
    Drawn,
    Generation,
    Sampling,
    SiteName,
    TokenBlock,
    TokenRun,
    leading_txt,
    not_said,
    pictured_runs,
    steered_runs,
    token_positions,
)
from flux_ir.activations.shards import (
    POSITIONS_KEY,
    ShardFile,
    parse_site_key,
    scale_key,
    site_key,
    state_key,
)
from flux_ir.activations.spans import Memory, Span, SpanReader
from flux_ir.errors import FluxIRError
from flux_ir.models.quantisation import Method
from flux_ir.models.registry import get_spec
from flux_ir.sampling.latents import image_ids
from flux_ir.sampling.schedule import schedule_of
from flux_ir.sites import Site, as_site, nearest_names

CLIP_IMAGE, CLIP_TEXT = "clip.image", "clip.text"
"""What a collection of CLIP's activations holds: they have no site and no step."""

STATISTICS = "stats.safetensors"
"""The file of a collection that is no shard."""

_POSITIONS = 64  # shards whose token positions are remembered


class ShardSource:
    """The generations of shards that belong together."""

    def __init__(
        self,
        shards: Sequence[ShardFile],
        *,
        settings: bytes = b"",
        key: str | None = None,
        fetch: Callable[[str], Path] | None = None,
    ) -> None:
        """`settings` is the content of collection.json; `key` the tensors without a step that are read: CLIP's
        activations, which have no site, or a layer of a text encoder, which is then the only site.

        `fetch` brings a shard of a collection that is elsewhere, by its path there.
        """
        self._shards, self._settings, self._without_step, self._fetch = list(shards), settings, key, fetch
        first = self._shards[0]
        for shard in self._shards:
            _check_same(first, shard)
        names = first.tensors if key is None else ()
        found = [named for name in names if (named := parse_site_key(name))]
        layer = [Site.parse(key)] if key is not None and is_layer(key) else []
        self.sites: Sequence[Site] = layer or sorted({Site.parse(site) for site, _ in found})
        self.steps: Sequence[int] = sorted({step for _, step in found}) or [0]
        self.model: str | None = first.metadata.get("model")
        collected: dict[str, Any] = json.loads(settings or b"{}").get("settings", {})
        self.loras: Sequence[dict[str, Any]] = collected.get("loras", [])
        self.quantize: Method | None = collected.get("quantize")
        self._txt_tokens: int = first.metadata.get("txt_tokens") or 0
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard.images)
        self.runs: Sequence[range] = [range(*ends) for ends in zip(self._starts, self._starts[1:], strict=False)]
        self.generations: Sequence[Generation] = _Generations(self._shards, self._starts)
        self._reader = SpanReader()
        # Remembered, because these are asked for at every read.
        self._img_positions = lru_cache(_POSITIONS)(self._read_img_positions)
        self._plain_positions = lru_cache(_POSITIONS)(self._make_plain_positions)
        self._stored_as = lru_cache(None)(self._find)

    @cached_property
    def identity(self) -> str:
        """A digest of the settings, with the model's weights among them, and of what the shards hold."""
        digest = hashlib.sha256(self._settings)
        for shard in self._shards:
            described = {key: [str(tensor.dtype), tensor.shape] for key, tensor in shard.tensors.items()}
            digest.update(json.dumps([described, shard.metadata], sort_keys=True).encode())
        digest.update((self._without_step or "").encode())
        return digest.hexdigest()[:16]

    def d(self, site: SiteName) -> int:
        """The width of a site."""
        return self._shards[0].tensors[self._key(_site(site), self.steps[0])].shape[2]

    def tokens(self, site: SiteName) -> int:
        """Tokens of a site per generation and step."""
        return len(self._stored_tokens(_site(site)))

    def read(self, generation: int, site: SiteName, step: int) -> TokenBlock:
        """One generation."""
        site = _site(site)
        run, known = self.read_run(range(generation, generation + 1), site, step), self.generations[generation]
        return TokenBlock(
            values=run.values[0],
            scale=None if run.scale is None else run.scale[0],
            site=site,
            step=step,
            generation=known.id,
            prompt=known.prompt,
            positions=run.positions[0],
            txt_tokens=run.txt_tokens,
            used_txt=run.used_txt[0],
        )

    def read_run(
        self, images: range, site: SiteName, step: int, tokens: range | None = None, memory: Memory | None = None
    ) -> TokenRun:
        """Some tokens of images of one shard: one read where they lie in one piece, else one for each image."""
        site = _site(site)
        key, stored, text = self._stored_as(site, step)
        tokens = range(len(stored)) if tokens is None else tokens
        number = bisect_right(self._starts, images.start) - 1
        shard, start = self._shards[number], self._starts[number]
        first, last = images.start - start, images.stop - start
        path = self._local_path(shard)
        leading = min(max(text - tokens.start, 0), len(tokens))
        within = range(stored.start + tokens.start, stored.start + tokens.stop)
        scale = None
        if scale_key(key) in shard.tensors:
            scale = self._read(path, shard, scale_key(key), range(first, last), within, None)
        used = shard.metadata.get("used_txt")
        return TokenRun(
            values=self._read(path, shard, key, range(first, last), within, memory),
            scale=scale,
            positions=self._positions(number, path, site, range(first, last))[:, tokens.start : tokens.stop],
            txt_tokens=leading,
            used_txt=[None] * len(images) if used is None else used[first:last],
        )

    def sampling(self, generation: int) -> Sampling:
        """How one generation was made: by its row, and by the settings of the collection."""
        shard, row = self._shard_and_row(generation)
        try:
            made: dict[str, Any] = json.loads(self._settings)["settings"]
            if "edits" in made:
                raise steered_runs(shard.path)
            if made.keys() & {"init_image", "reference_image"}:
                raise pictured_runs(shard.path)
            width, height = shard.metadata["width"], shard.metadata["height"]
            img_tokens = image_ids(1, height, width).shape[1]
            spec = get_spec(shard.metadata["model"])
            return Sampling(
                shard.metadata["prompts"][row],
                shard.metadata["seeds"][row],
                width,
                height,
                tuple(schedule_of(spec, made["num_steps"], img_tokens)),
                float(made["guidance"]),
                getattr(torch, made["dtype"]),
            )
        except (KeyError, ValueError) as error:
            raise not_said(shard.path, str(error.args[0])) from error

    def state(self, generation: int, step: int) -> Tensor | None:
        """The packed latent that a step began with; None where only some tokens were kept."""
        shard, row = self._shard_and_row(generation)
        tensor = shard.tensors.get(state_key(step))
        if tensor is None or POSITIONS_KEY in shard.tensors:
            return None
        path = self._local_path(shard)
        return self._read(path, shard, state_key(step), range(row, row + 1), range(tensor.shape[1]), None)[0]

    def drawn(self, generation: int) -> Drawn:
        """Its picture, as `flux-ir collect --save_images` keeps it beside the shards."""
        shard, row = self._shard_and_row(generation)
        facts, picture = shard.metadata, None
        if self._fetch is None:
            folder = shard.path.parents[1] / "pictures" / shard.path.stem
            picture = folder / f"{Path(facts['ids'][row]).name}.jpg"
        seeds = facts.get("seeds")
        seed = None if seeds is None else seeds[row]
        kept = picture if picture is not None and picture.is_file() else None
        return Drawn(seed, facts.get("width"), facts.get("height"), kept)

    def noisy(self, images: range, step: int) -> Tensor:
        """The packed latents before a step, of images of one shard: [images, tokens, channels]."""
        (shard, row), key = self._shard_and_row(images.start), state_key(step)
        if key not in shard.tensors:
            raise FluxIRError(
                f"{shard.path} holds no noisy latents of step {step}", hint="collect them: flux-ir collect keeps them"
            )
        path = self._local_path(shard)
        rows = range(row, row + len(images))
        return self._read(path, shard, key, rows, range(shard.tensors[key].shape[1]), None)

    def _shard_and_row(self, generation: int) -> tuple[ShardFile, int]:
        """The shard that holds a generation, and its row there."""
        number = bisect_right(self._starts, generation) - 1
        return self._shards[number], generation - self._starts[number]

    def _local_path(self, shard: ShardFile) -> Path:
        """The file of a shard on this machine, fetched unless it is here."""
        return shard.path if self._fetch is None else self._fetch(shard.path.as_posix())

    def _read(
        self, path: Path, shard: ShardFile, key: str, images: range, tokens: range, memory: Memory | None
    ) -> Tensor:
        """Some tokens of some images of a tensor of a shard."""
        tensor = shard.tensors[key]
        each = tensor.bytes_per_image // tensor.shape[1]
        if len(tokens) == tensor.shape[1]:
            spans = [Span(*shard.span(key, images.start, images.stop))]
        else:
            spans = [
                Span(shard.span(key, image, image)[0] + tokens.start * each, len(tokens) * each) for image in images
            ]
        return self._reader.tensor(path, spans, tensor.dtype, (len(images), len(tokens), *tensor.shape[2:]), memory)

    def _positions(self, number: int, path: Path, site: Site | None, images: range) -> Tensor:
        """The positions of a site's tokens: int32 [images, tokens]."""
        count = len(self._stored_as(site, self.steps[0])[1])
        whole = site is None or site.per_prompt or site.stream in ("txt", "cond")
        if whole or POSITIONS_KEY not in self._shards[number].tensors:
            return self._plain_positions(site, count).expand(len(images), count)
        img = self._img_positions(number, path)[images.start : images.stop]
        leading = torch.arange(count - img.shape[1], dtype=torch.int32).expand(len(images), -1)
        return torch.cat([leading, img], dim=1)

    def _make_plain_positions(self, site: Site | None, count: int) -> Tensor:
        if site is None or site.per_prompt:
            return torch.arange(count, dtype=torch.int32)
        return token_positions(site, self._txt_tokens, None, count)

    def _read_img_positions(self, number: int, path: Path) -> Tensor:
        shard = self._shards[number]
        tensor = shard.tensors[POSITIONS_KEY]
        span = Span(*shard.span(POSITIONS_KEY, 0, shard.images))
        return self._reader.tensor(path, [span], tensor.dtype, tensor.shape)

    def _find(self, site: Site | None, step: int) -> tuple[str, range, int]:
        """The tensor that holds the site, which of its tokens are the site's, and how many of them are text."""
        return self._key(site, step), self._stored_tokens(site), self._leading(site)

    def _key(self, site: Site | None, step: int) -> str:
        """The name of the tensor that holds the site. Raises FluxIRError for what is not there."""
        if self._without_step is not None:
            known = site in self.sites if self.sites else site is None
            if not known or step != 0:
                only = f"the site {self._without_step}" if self.sites else "no sites"
                raise FluxIRError(
                    f"activations of {self._without_step} have {only}, and the step 0 alone: got {site} at step {step}",
                    hint="leave --site and --steps out",
                )
            return self._without_step
        stored = self._stored(site)
        if step not in self.steps:
            raise FluxIRError(
                f"step {step} was not collected in {self._shards[0].path.parent.parent}",
                hint=f"it holds the steps {', '.join(map(str, self.steps))}",
            )
        return site_key(stored, step)

    def _stored(self, site: Site | None) -> Site:
        if site is None:
            raise FluxIRError("collections are read by site: got None", hint="name a site such as double.18.img")
        for stored in (site, site.whole):
            if stored in self.sites:
                return stored
        raise FluxIRError(
            f"{site} was not collected in {self._shards[0].path.parent.parent}, which holds {len(self.sites)} sites",
            hint=f"the nearest are {nearest_names(str(site), map(str, self.sites))}",
        )

    def _stored_tokens(self, site: Site | None) -> range:
        """Which of the tokens of its tensor a site has: half of them, if it is half of a single block."""
        count = self._shards[0].tensors[self._key(site, self.steps[0])].shape[1]
        if site is None or site in self.sites:
            return range(count)
        return range(self._txt_tokens) if site.stream == "txt" else range(self._txt_tokens, count)

    def _leading(self, site: Site | None) -> int:
        if site is None or site.kind == "clip":
            return 0
        if site.kind == "t5":  # it is known which tokens are padding: the leading ones are the prompt's
            return len(self._stored_tokens(site))
        return len(self._stored_tokens(site)) if site.stream == "txt" else leading_txt(site, self._txt_tokens)


def _site(site: SiteName) -> Site | None:
    return as_site(site) if site is not None else None


class _Generations(Sequence[Generation]):
    """The rows of shards as `Generation`s, made when they are asked for: there may be a million."""

    def __init__(self, shards: Sequence[ShardFile], starts: Sequence[int], rows: range | None = None) -> None:
        self._shards, self._starts = shards, starts
        self._rows = range(starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Generation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Generation]: ...
    def __getitem__(self, index: int | slice) -> Generation | Sequence[Generation]:
        if isinstance(index, slice):
            return _Generations(self._shards, self._starts, self._rows[index])
        row = self._rows[index]
        number = bisect_right(self._starts, row) - 1
        shard, row = self._shards[number], row - self._starts[number]
        return Generation(shard.metadata["ids"][row], shard.metadata["prompts"][row] or "", shard.path)


def is_layer(name: str) -> bool:
    """Whether this is the name of a layer of a text encoder, `t5.12`."""
    try:
        return Site.parse(name).per_prompt
    except FluxIRError:
        return False


def _check_same(first: ShardFile, other: ShardFile) -> None:
    """Raises FluxIRError for the first thing in which a shard differs from the first one."""
    model = (first.metadata.get("model"), other.metadata.get("model"))
    tensors = [
        {key: (str(tensor.dtype).removeprefix("torch."), *tensor.shape[1:]) for key, tensor in shard.tensors.items()}
        for shard in (first, other)
    ]
    names = (listed(tensors[0]), listed(tensors[1]))
    differences: list[tuple[str, Any, Any]] = [("model", *model), ("sites and steps", *names)]
    differences += [(f"form of {key}", tensors[0][key], tensors[1].get(key)) for key in tensors[0]]
    for word, one, another in differences:
        if one != another:
            raise FluxIRError(
                f"all shards of a collection must have the same {word}: {other.path} has {another}, {first.path} has "
                f"{one}",
                hint="two collections were put into one folder: keep them apart",
            )


def listed(names: Any) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
