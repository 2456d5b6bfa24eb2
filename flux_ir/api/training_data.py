"""What `train-sae` trains on: stored activations, or those of a model that runs meanwhile, behind one interface."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.activations.blocks import TokenBlock, TokenSource, changed_by, changes_of, run_of
from flux_ir.activations.source import open_source
from flux_ir.api.model_settings import PictureSettings
from flux_ir.api.progress import unwatched
from flux_ir.api.training_settings import TrainSAESettings
from flux_ir.collecting.collection import CollectSettings, weights_digest
from flux_ir.collecting.live import live_blocks
from flux_ir.collecting.prompts import prompts_digest, read_prompts
from flux_ir.collecting.recipe import Recipe
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.models.registry import get_spec
from flux_ir.models.suite import Suite
from flux_ir.sae.architectures.initialise import normalisation_of
from flux_ir.sae.data.batches import TokenBatches
from flux_ir.sae.data.buffer import slot_bytes
from flux_ir.sae.data.feed import Blocks, TokenFormat
from flux_ir.sae.data.filters import Filters, SiteKey, choose_sites
from flux_ir.sae.data.held_out import EvaluationData, EvaluationTokens
from flux_ir.sae.data.measure import measure_normalisation, norm_limits, sample_tokens
from flux_ir.sae.data.splits import Side, Split, split_prompts, split_source
from flux_ir.sae.data.whitening import Whitening, repeated, undecided_covariance, whitening_of
from flux_ir.sae.evaluation.metrics import EvaluationBatch, Group, outlier_limits
from flux_ir.sampling.generate import check_steps
from flux_ir.sites import all_sites, match_sites
from flux_ir.threads import ahead

SAMPLE_TOKENS = 8_192  # b_dec starts from their mean or median
MEASURED_TOKENS = 100_000  # the normalisation is measured on them
MEASURED_BYTES = 2**29  # of a live stream's first blocks, held in memory while they are measured
AHEAD_BYTES = 2**28  # of a live stream, prefetched
EVALUATION_TOKENS = 4_096  # encoded at once
COUNTED_GENERATIONS = 64  # their tokens are counted to estimate an epoch
LIVE_POOL_PART, LIVE_POOL_BATCHES = 8, 8  # a live run's pool: an eighth of its tokens, and at least so many batches
WITHOUT_END = 2**62  # tokens: the number of steps ends a run, not the data


@dataclass(frozen=True)
class TrainingData:
    """Where tokens come from, and which of them are trained on."""

    name: str
    model: str | None
    sites: list[SiteKey]
    steps: list[int]
    source: TokenSource | Blocks
    """Stored activations, or what begins a live stream."""
    to_measure: Callable[[], TokenSource | Blocks]
    """Enough of it to measure: all that is stored, or the first blocks of the stream, held in memory."""
    held_out: Blocks | None
    """A live stream of the held-out prompts; None: they are in the source."""
    split: Split
    filters: Filters
    generations: int
    """On the training side."""
    widths: dict[SiteKey, int]
    described: dict[str, Any]
    """What the weights depend on, for comparisons."""
    whitening_source: TokenSource | None = None
    """Several generations of each prompt, by whose differences tokens are whitened; None: they are not."""

    def batches(
        self, sites: list[SiteKey], settings: TrainSAESettings, ranks: Ranks, device: torch.device, *, tokens: int
    ) -> TokenBatches:
        """Training batches for a run of so many tokens: without end, or until a live stream ends."""
        pool_bytes = int(settings.pool_gb * 1e9)
        if callable(self.source):  # the first batch waits until a model has filled the pool: a smaller one will do
            few = max(tokens // LIVE_POOL_PART, LIVE_POOL_BATCHES * settings.batch_tokens)
            pool_bytes = min(
                pool_bytes, few * slot_bytes({s: TokenFormat(self.widths[s], torch.bfloat16) for s in sites})
            )
        return TokenBatches(
            self.source,
            sites,
            batch_tokens=settings.batch_tokens,
            pool_bytes=pool_bytes,
            seed=settings.seed[0],
            filters=self.filters,
            split=self.split,
            max_tokens=WITHOUT_END,
            ranks=ranks,
            device=device,
        )

    def measure(self, site: SiteKey, *, normalise: bool) -> "Measured":
        """What autoencoders of a site start from."""
        source = self.to_measure()
        sample = sample_tokens(source, [site], SAMPLE_TOKENS, filters=self.filters, split=self.split)[site].float()
        if not normalise:
            return Measured(torch.zeros(sample.shape[1]), 1.0, sample, None)
        normalisation = measure_normalisation(
            source, [site], filters=self.filters, split=self.split, least_tokens=MEASURED_TOKENS
        )[site]
        if self.whitening_source is None:
            return Measured(normalisation.mean.float(), normalisation.scale, sample, None)
        filters = replace(self.filters, steps=self.steps)
        undecided = undecided_covariance(self.whitening_source, site, filters=filters, split=self.split)
        whitening = whitening_of(normalisation.mean, undecided)
        whitened = whitening(sample)
        return Measured(*normalisation_of(whitened), whitened, whitening)

    def epoch_tokens(self, site: SiteKey) -> int:
        """Tokens of a site that one pass over the training side gives; where padding is left out, an estimate."""
        half, source = self.filters.half(site), self.to_measure()
        if half is not None and half.stream == "img" and self.split.by != "tokens" and not callable(source):
            return source.tokens(half) * self.generations * len(self.steps)  # image tokens: none is padding
        counts = [self._count_kept(block) for block in self._first_blocks(site)]
        return int(sum(counts) / max(1, len(counts)) * self.generations * len(self.steps))

    def _first_blocks(self, site: SiteKey) -> Iterator[TokenBlock]:
        source = self.to_measure()
        if callable(source):
            yield from (block for block in source() if block.site == site)
            return
        training = (i for i, one in enumerate(source.generations) if self.split.has("training", one.id, one.prompt))
        for index in islice(training, COUNTED_GENERATIONS):
            yield source.read(index, site, self.steps[0])

    def _count_kept(self, block: TokenBlock) -> int:
        """How many tokens of a block are trained on."""
        run = run_of(block, self.filters.rows(block))
        kept, used = torch.ones(run.positions.shape[1], dtype=torch.bool), self.filters.used(run)
        side = self.split.tokens("training", block.generation, run.positions[0])
        for mask in (None if used is None else used[0], side):
            kept = kept if mask is None else kept & mask
        return int(kept.sum())

    def evaluation_batches(self, site: SiteKey, most_tokens: int) -> Iterator[EvaluationBatch]:
        """Held-out tokens of a site; where nothing is held out, training tokens."""
        filters = replace(self.filters, outlier_factor=None, limits={})  # outliers are part of the data
        if not callable(self.source):
            yield from EvaluationData(self.source, site, self.split, filters).tokens(
                self._side, EVALUATION_TOKENS, most_tokens
            )
            return
        yield from self._live_tokens(self.held_out or self.source, site, self._side, most_tokens)

    def outlier_limits(self, site: SiteKey, most_tokens: int) -> dict[Group, float]:
        """The length above which a token is an outlier, by step and stream.

        From the tokens that autoencoders are measured on; of a live stream, from its first blocks.
        """
        first = self.to_measure()
        batches = self.evaluation_batches(site, most_tokens)
        if callable(first):
            batches = self._live_tokens(first, site, "training", most_tokens)
        return outlier_limits(batches, self.steps)

    @property
    def _side(self) -> Side:
        return "held_out" if self.split.threshold > 0 else "training"

    def _live_tokens(self, blocks: Blocks, site: SiteKey, side: Side, most_tokens: int) -> Iterator[EvaluationBatch]:
        with TokenBatches(
            blocks,
            [site],
            batch_tokens=EVALUATION_TOKENS,
            pool_bytes=AHEAD_BYTES,
            filters=replace(self.filters, outlier_factor=None, limits={}),
            split=self.split,
            side=side,
            max_tokens=most_tokens,
        ) as batches:
            for batch in batches:
                yield EvaluationTokens(batch.values[site], batch.steps, batch.is_text)

    def note(self) -> str:
        """The data in one line for a note."""
        stored = not callable(self.source)
        what = (
            f"{self.generations} generations" if stored else f"live generations of {self.described['prompts']} prompts"
        )
        text = f"{what} of {self.model or 'an array'}, {self.split.note}"
        if self._holds_unknown_padding():
            text += "; the captures do not say which text tokens are padding: all are trained on"
        return text

    def _holds_unknown_padding(self) -> bool:
        """Whether padding should be left out, and cannot be."""
        if callable(self.source) or self.filters.padding:
            return False
        blocks = (self.source.read(0, self.filters.half(site), self.steps[0]) for site in self.sites)
        return any(block.txt_tokens > 0 and block.used_txt is None for block in blocks)

    def metadata(self) -> dict[str, Any]:
        """What an autoencoder's folder says of its data, so that it can be judged on what was held out."""
        filters = {"stream": self.filters.stream, "padding": self.filters.padding, "steps": self.steps}
        named = {} if callable(self.source) else {"captures": self.name}
        return {"split": asdict(self.split), "filters": filters, "data": named | self.described}


class Measured(NamedTuple):
    """What autoencoders of a site start from; with `whitening`, all else is of whitened tokens."""

    mean: Tensor
    scale: float
    sample: Tensor
    whitening: Whitening | None


def open_data(settings: TrainSAESettings, ranks: Ranks) -> TrainingData:
    """The data the settings name. Raises FluxIRError for all that can be wrong with them, before they are read."""
    data = _stored(settings, settings.captures) if settings.captures is not None else _live(settings, ranks)
    return data if settings.whiten is None else _whitened(data, settings.whiten)


def _whitened(data: TrainingData, path: Path) -> TrainingData:
    """The data, whitened by the captures at this path. Raises FluxIRError for other sites, steps or models."""
    source = open_source(path)
    if None not in (source.model, data.model) and source.model != data.model:
        raise FluxIRError(
            f"tokens are whitened by captures of the same model: {path} is of {source.model}, and this of {data.model}",
            hint="collect some prompts of this model with --repeats 4",
        )
    repeated(source, data.split)
    replace(data.filters, steps=data.steps).steps_of(source.steps)
    for site in data.sites:
        half = data.filters.half(site)
        if half is not None and half not in choose_sites(source, [str(half)]):
            raise FluxIRError(f"{path} does not hold {half}, which shall be whitened", hint="collect it there too")
        if source.d(half) != data.widths[site]:
            raise FluxIRError(
                f"tokens are whitened by others of their width, {data.widths[site]}: "
                f"{half or 'the array'} is {source.d(half)} wide in {path}",
                hint="name captures of the same model and site",
            )
    return replace(data, whitening_source=source, described=data.described | {"whitened_by": source.identity})


def _stored(settings: TrainSAESettings, path: Path) -> TrainingData:
    """Activations that are on the disk."""
    source = open_source(path)
    filters = _filters(settings)
    steps = filters.steps_of(source.steps)
    sites = _of_stream(choose_sites(source, _patterns(settings, source)), settings)
    split = split_source(source, settings.held_out)
    filters = norm_limits(source, sites, filters, split=split)
    # The last: NAME/t5.12, a layer of the text encoders in a collection, is no path on the disk.
    name = path.resolve().name if path.is_dir() else path.stem if path.is_file() else path.name
    described = {
        "content": source.identity,
        "generations": len(source.generations),
        "tokens_each": {str(site): source.tokens(site) for site in sites},
        **changes_of(source),
    }
    return TrainingData(
        name=name,
        model=source.model,
        sites=sites,
        steps=steps,
        source=source,
        to_measure=lambda: source,
        held_out=None,
        split=split,
        filters=filters,
        generations=sum(split.has("training", one.id, one.prompt) for one in source.generations),
        widths={site: source.d(site) for site in sites},
        described=described,
    )


def _patterns(settings: TrainSAESettings, source: TokenSource) -> tuple[str, ...]:
    if settings.site is not None:
        if not source.sites:
            raise FluxIRError(
                f"these activations have no sites: got --site {','.join(settings.site)}", hint="leave --site out"
            )
        return settings.site
    if len(source.sites) > 1:
        raise FluxIRError(
            f"the captures have {len(source.sites)} sites, {source.sites[0]} to {source.sites[-1]}: say which",
            hint=f"pass --site {source.sites[0]}, or patterns such as --site 'single.*'",
        )
    return tuple(map(str, source.sites))


def _of_stream(sites: list[SiteKey], settings: TrainSAESettings) -> list[SiteKey]:
    """The sites that have tokens of the stream asked for."""
    if settings.stream is not None and None in sites:
        raise FluxIRError(
            f"these activations have no streams: got --stream {settings.stream}", hint="leave --stream out"
        )
    kept = [site for site in sites if settings.stream is None or site is None or site.stream in (None, settings.stream)]
    if not kept:
        raise FluxIRError(
            f"none of the sites has {settings.stream} tokens: {', '.join(map(str, sites))}", hint="leave --stream out"
        )
    return kept


def _filters(settings: TrainSAESettings) -> Filters:
    return Filters(
        stream=settings.stream, steps=settings.steps, padding=settings.padding, outlier_factor=settings.outliers
    )


def _live(settings: TrainSAESettings, ranks: Ranks) -> TrainingData:
    """Activations that a model makes from prompts while an autoencoder trains on them."""
    assert settings.model is not None
    assert settings.prompts is not None
    assert settings.site is not None
    spec = get_spec(settings.model)
    given = settings.prompts
    prompts = read_prompts(given) if isinstance(given, Path) else list(given)
    sites = match_sites(settings.site, all_sites(spec.flux.depth, spec.flux.depth_single_blocks))
    sites = [site for site in _of_stream(list(sites), settings) if site is not None]
    model = PictureSettings(
        model=settings.model,
        device=settings.device,
        lora=settings.lora,
        lora_strength=settings.lora_strength,
        quantize=settings.quantize,
    )
    machine, picture = model.settle_machine(ranks=ranks), model.settle_picture()
    recipe = Recipe(
        spec=spec,
        width=picture.grid.width,
        height=picture.grid.height,
        num_steps=picture.num_steps,
        guidance=picture.guidance,
        sites=tuple(sites),
        steps=tuple(check_steps(settings.steps, picture.num_steps)),
        stored_dtype=torch.bfloat16,
        network_dtype=machine.compute.dtype,
        compiled=machine.compiled,
        attention=machine.attention,
    )
    split = split_prompts(prompts, settings.held_out)
    training = [prompt for prompt in prompts if split.has("training", "", prompt)]
    held_out = [prompt for prompt in prompts if split.has("held_out", "", prompt)]
    if not training:
        raise FluxIRError(f"all {len(prompts)} prompts are held out", hint="give more prompts, or --held_out 0")
    shape = recipe.plan()
    # With --max_tokens far more repeats than needed, one token each: activations are made only as they are read.
    repeats = settings.repeats or -(-(settings.max_tokens or 1) // len(training))
    suite = model.suite(machine, unwatched, autoencoder=False)
    filters = _filters(settings)
    most_tokens = min(MEASURED_TOKENS, settings.max_tokens or MEASURED_TOKENS) * len(sites)
    job = CollectSettings(recipe=recipe, prompts=training, repeats=repeats)
    first = _FirstGenerations(_stream(job, suite), most_tokens=most_tokens)
    if filters.outlier_factor is not None:
        filters = norm_limits(first(), list(sites), filters, split=split)
    return TrainingData(
        name=spec.name,
        model=spec.name,
        sites=list(sites),
        steps=list(recipe.steps),
        source=first.followed_by_the_rest,
        to_measure=first,
        held_out=partial(_stream(replace(job, prompts=held_out, repeats=1), suite), 0) if held_out else None,
        split=split,
        filters=filters,
        generations=len(training) * repeats,
        widths={site: shape.shape(site)[2] for site in sites},
        described={
            "model": spec.name,
            "weights": weights_digest(suite.source, autoencoder=False),
            "dtype": machine.compute.name,
            "guidance": recipe.guidance,
            "prompts": len(prompts),
            "prompts_sha256": prompts_digest(prompts),
            "repeats": settings.repeats,
            **changed_by([lora.to_json() for lora in suite.source.loras], suite.source.quantize),
        },
    )


def _stream(settings: CollectSettings, suite: Suite) -> Callable[[int], Iterator[TokenBlock]]:
    """What begins the live stream of these settings at a generation."""

    def blocks(start: int) -> Iterator[TokenBlock]:
        live = partial(live_blocks, settings, suite, start=start)
        with ahead(live, capacity=AHEAD_BYTES, size=lambda block: block.nbytes) as made:
            yield from made

    return blocks


class _FirstGenerations:
    """The first generations of a stream, made once and then held: everything is measured on them."""

    def __init__(self, stream: Callable[[int], Iterator[TokenBlock]], *, most_tokens: int) -> None:
        self.stream, self.most_tokens = stream, most_tokens
        self._held: list[TokenBlock] = []
        self._generations = 0

    def __call__(self) -> Blocks:
        """The first generations as a stream of their own."""
        if not self._held:
            self._held = list(self._first())
        return lambda: iter(self._held)

    def followed_by_the_rest(self) -> Iterator[TokenBlock]:
        """The whole stream."""
        yield from self._held
        yield from self.stream(self._generations)

    def _first(self) -> Iterator[TokenBlock]:
        """Whole generations, until there are enough tokens or bytes."""
        tokens, nbytes, generation = 0, 0, None
        for block in self.stream(0):
            if block.generation != generation:
                if tokens >= self.most_tokens or nbytes >= MEASURED_BYTES:
                    return
                self._generations += 1
            generation = block.generation
            tokens, nbytes = tokens + len(block.values), nbytes + block.nbytes
            yield block
