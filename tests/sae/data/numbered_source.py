"""Tokens that say who they are, stored or as a stream, and the batches made of them: shared by the tests of both."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from flux_ir.activations.blocks import Generation, TokenBlock, TokenRun, run_of
from flux_ir.sae.data.batches import TokenBatches
from flux_ir.sae.data.buffer import slot_bytes
from flux_ir.sae.data.feed import TokenFormat
from flux_ir.sites import Site

IMG, OTHER_IMG, TXT, WHOLE = (Site.parse(name) for name in ("double.0.img", "double.1.img", "double.0.txt", "single.0"))
TOKENS = {"img": (0, 12), "txt": (7, 0), None: (7, 12)}  # text and image
PLENTY = 2**30
SLOT_BYTES = slot_bytes({IMG: TokenFormat(5, torch.float32), OTHER_IMG: TokenFormat(5, torch.float32)})


@dataclass
class NumberedSource:
    """Tokens that say who they are: [generation, step, place, is text, site]; `used_txt` may be known."""

    count: int = 5
    sites: list[Site] = field(default_factory=lambda: [IMG, OTHER_IMG])
    steps: tuple[int, ...] = (0, 3, 4)
    dtype: torch.dtype = torch.float32
    used_txt: int | None = None
    model: str | None = "random"
    repeats: int = 1
    seed: int = 0
    reads: list = field(default_factory=list)

    @property
    def generations(self):
        return [Generation(f"{i:016x}", f"prompt {i // self.repeats}", Path(f"{i}.pt")) for i in range(self.count)]

    @property
    def runs(self):
        return [range(self.count)]

    @property
    def identity(self):
        return f"{self.count} of {self.seed}"

    def d(self, site):
        return 5

    def tokens(self, site):
        return sum(TOKENS[site.stream])

    def read(self, index, site, step):
        self.reads.append((index, step))
        txt, img = TOKENS[site.stream]
        places = torch.cat([torch.arange(txt), torch.arange(img)])
        is_text = torch.arange(txt + img) < txt
        columns = [torch.full_like(places, n) for n in (index, step)]
        stored = site if site in self.sites else site.whole
        values = torch.stack([*columns, places, is_text, torch.full_like(places, self.sites.index(stored))], dim=1)
        one = self.generations[index]
        return TokenBlock(values.to(self.dtype), None, site, step, one.id, one.prompt, places.int(), txt, self.used_txt)

    def read_run(self, images, site, step, tokens=None, memory=None):
        runs = [run_of(self.read(index, site, step), tokens) for index in images]
        parts = [torch.cat(part) for part in ([run.values for run in runs], [run.positions for run in runs])]
        return TokenRun(parts[0], None, parts[1], runs[0].txt_tokens, [self.used_txt] * len(images))

    def everything(self, site, steps=None):
        """All of its tokens, sorted."""
        blocks = [self.read(i, site, step).values for i in range(self.count) for step in steps or self.steps]
        return sorted_rows(torch.cat(blocks))

    def stream(self):
        """Its blocks as the network makes them: a generation after the other, step by step."""
        for i in range(self.count):
            for step in self.steps:
                for site in self.sites:
                    yield self.read(i, site, step)


def sorted_rows(tokens):
    return sorted(map(tuple, tokens.tolist()))


def batches_of(source, sites=(IMG, OTHER_IMG), **changes):
    known = {"batch_tokens": 16, "pool_bytes": 80 * SLOT_BYTES, "seed": 1}
    return TokenBatches(source, list(sites), **{**known, **changes})


def rows_of(batches, site=IMG):
    return [batch.values[site].clone() for batch in batches]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
