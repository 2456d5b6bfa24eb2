"""Second stage: T5 and CLIP learn to describe the scene, so that the flow model meets encoders that know captions.

Real text encoders come pre-trained; random ones would leave it to the image loss to find out which colour belongs to
which shape, and that takes hours. Here every word of an object's phrase learns to tell the object's whole description,
and the pooled vector to tell what stands at each place. The heads that ask are thrown away. Both encoders go on
learning with the flow model.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from types import ModuleType

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from flux_ir.demo.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, scenes, vocabulary
from flux_ir.errors import FluxIRError
from flux_ir.models.text import TextEncoder
from flux_ir.models.text.clip import ClipText, ClipTextParams
from flux_ir.models.text.t5 import T5Encoder, T5Params
from flux_ir.models.text.tokenizer import PromptTokenizer
from recipes.flux_tiny.checkpoints import Checkpoint

TEXT_TOKENS = 20
TEXT_DIM = 128
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
NOTHING = -100  # cross-entropy leaves these targets out
QUESTIONS = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": tuple(PLACES)}


@dataclass(frozen=True)
class TextConfig:
    """How the text encoders are trained before the flow model."""

    steps: int = 1_500
    batch: int = 128
    learning_rate: float = 1e-3
    seed: int = 0


def build_tokenizer() -> PromptTokenizer:
    """One token per word of the scenes' vocabulary, an end token behind each caption."""
    numbers = {token: i for i, token in enumerate([PAD, END, UNKNOWN, *vocabulary()])}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token=UNKNOWN))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, numbers[END])])
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    return PromptTokenizer(tokenizer, end=END, padding=PAD, unknown=UNKNOWN)


def build_t5(tokenizer: PromptTokenizer) -> TextEncoder:
    """An untrained T5 encoder, small. How its weights are drawn is transformers' affair."""
    params = T5Params(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        eos_token_id=tokenizer.end_id,
    )
    library = transformers()
    config = library.T5Config(**asdict(params), pad_token_id=tokenizer.padding_id)
    drawn = library.T5EncoderModel(config).state_dict()
    with torch.device("meta"):  # draws nothing
        t5 = T5Encoder(params)
    t5.load_state_dict({name: drawn[name] for name in t5.state_dict()}, assign=True)
    return TextEncoder(t5, tokenizer, TEXT_TOKENS)


def build_clip(tokenizer: PromptTokenizer) -> TextEncoder:
    """An untrained CLIP text encoder, small. Its pooled vector is the state of the end token."""
    params = ClipTextParams(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        eos_token_id=tokenizer.end_id,
    )
    library = transformers()
    config = library.CLIPTextConfig(**asdict(params), bos_token_id=None, pad_token_id=tokenizer.padding_id)
    with torch.device("meta"):
        clip = ClipText(params)
    # transformers 5 has one level of names less than the checkpoints.
    drawn = {
        name.removeprefix("text_model."): value for name, value in library.CLIPTextModel(config).state_dict().items()
    }
    clip.load_state_dict({name: drawn[name.removeprefix("text_model.")] for name in clip.state_dict()}, assign=True)
    return TextEncoder(clip, tokenizer, TEXT_TOKENS)


def transformers() -> ModuleType:
    """The library that draws untrained weights. Raises FluxIRError where it is not installed: no command needs it."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise FluxIRError(
            f"training flux-tiny needs transformers, which is not installed: {error}",
            hint="pip install 'flux-ir[dev]'",
        ) from error


class Describer(nn.Module):
    """Asks both encoders about the scene: per token about its own object, per place about what stands there."""

    def __init__(self, t5: TextEncoder, clip: TextEncoder) -> None:
        super().__init__()
        self.t5, self.clip = t5, clip
        self.of_token = nn.ModuleDict({name: nn.Linear(TEXT_DIM, len(words)) for name, words in QUESTIONS.items()})
        self.of_token["background"] = nn.Linear(TEXT_DIM, len(BACKGROUNDS))
        pooled = {name: len(PLACES) * (len(words) + 1) for name, words in QUESTIONS.items() if name != "place"}
        self.of_place = nn.ModuleDict({name: nn.Linear(TEXT_DIM, width) for name, width in pooled.items()})
        self.of_place["background"] = nn.Linear(TEXT_DIM, len(BACKGROUNDS))

    def forward(self, batch: list[Scene]) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over all questions, and the share of questions answered correctly."""
        captions = [scene.caption for scene in batch]
        tokens, pooled = self.t5(captions), self.clip(captions)
        asked = [(head(tokens), token_targets(batch, name)) for name, head in self.of_token.items()]
        for name, head in self.of_place.items():
            answer = head(pooled)
            if name != "background":
                answer = answer.unflatten(-1, (len(PLACES), -1))
            asked.append((answer, place_targets(batch, name)))
        losses = [F.cross_entropy(a.flatten(0, -2), t.flatten(), ignore_index=NOTHING) for a, t in asked]
        right = torch.cat([(a.argmax(-1) == t)[t != NOTHING] for a, t in asked])
        return torch.stack(losses).mean(), right.float().mean()


def token_targets(batch: list[Scene], question: str) -> Tensor:
    """int64 [batch, TEXT_TOKENS]: the answer at every word of an object's phrase (background: at every word)."""
    targets = torch.full((len(batch), TEXT_TOKENS), NOTHING)
    for row, scene in zip(targets, batch, strict=True):
        if question == "background":
            row[: len(scene.caption.split())] = BACKGROUNDS.index(scene.background)
            continue
        starts = [1] if scene.relation is None else [1, 5 + len(scene.relation.split())]
        for start, thing in zip(starts, scene.things, strict=True):
            row[start : start + 3] = QUESTIONS[question].index(getattr(thing, question))
    return targets


def place_targets(batch: list[Scene], question: str) -> Tensor:
    """int64 [batch, places]: what stands at each place, the last answer meaning nothing does (background: [batch])."""
    if question == "background":
        return torch.tensor([BACKGROUNDS.index(scene.background) for scene in batch])
    words = QUESTIONS[question]
    targets = torch.full((len(batch), len(PLACES)), len(words))
    for row, scene in zip(targets, batch, strict=True):
        for thing in scene.things:
            row[tuple(PLACES).index(thing.place)] = words.index(getattr(thing, question))
    return targets


def train_text(config: TextConfig, checkpoint: Checkpoint) -> Iterator[dict[str, float]]:
    """Yields the numbers of every optimiser step, on the CPU (a minute or two); the checkpoint holds the describer."""
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer()
    model = Describer(build_t5(tokenizer), build_clip(tokenizer))
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps)
    for step in checkpoint.steps(config.steps, model=model, optimiser=optimiser, schedule=schedule):
        batch = list(islice(scenes(config.seed + 1 + step, "train"), config.batch))
        loss, right = model(batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        yield {"step": step, "loss": loss.item(), "right": right.item()}
