"""Hooks on a finished model that are gone again, whatever raises, and which module's call shows which site.

What recorders and interventions share: `recorder` reads at sites, `intervention` writes there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from inspect import signature
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeVar

from einops import rearrange
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.models.suite import TextEncoders
from flux_ir.sites import Site, text_sites

# Why a hook that was set is not called.
NOT_CALLED = (
    "a compiled model calls no hooks that came later, and block.forward(...) calls none: "
    "run the model as it was loaded, by model(...)"
)


Entered = TypeVar("Entered", bound="Hooked")  # not Self: the tests' shape checks cannot see what it stands for


class TokenCounts(NamedTuple):
    """How many tokens each stream of a forward has."""

    txt: int
    img: int
    cond: int
    """Those of a reference picture; 0: there is none."""


class Hooked(ABC):
    """A context manager that hangs hooks on modules when it is entered, and takes them off at the end of its `with`."""

    name: ClassVar[str]
    """What messages call it."""
    _hooks: ExitStack | None = None

    def __enter__(self: Entered) -> Entered:
        if self._hooks is not None:
            raise RuntimeError(f"this {self.name} is already entered")
        with ExitStack() as hooks:  # undone at once if one of them cannot be set
            self._hang(hooks)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.close()
        if kind is None:
            self._check_end()

    @abstractmethod
    def _hang(self, hooks: ExitStack) -> None:
        """Set every hook, and give `hooks` what removes it."""

    @abstractmethod
    def _check_end(self) -> None:
        """Raises FluxIRError for what should have happened in the `with` and did not; not called after an exception."""


class StepHooks(Hooked):
    """Hooks on sites of a transformer, step by step: one forward is one step, counted from 0 when they are hung.

    `steps` are those in which the hooks do something (None: all): in these every site must come. `first_step` is the
    number of the first forward: not 0 where a picture is begun with, and the steps before it are not run.
    """

    def __init__(
        self, model: Transformer, sites: Iterable[Site], steps: Collection[int] | None, first_step: int = 0
    ) -> None:
        self.model, self.sites = model, tuple(sites)
        self.steps = None if steps is None else frozenset(steps)
        self.first_step = first_step
        self._step, self._active = first_step - 1, False
        self._tokens = TokenCounts(0, 0, 0)
        self._to_come: set[Site] = set()

    def _hang(self, hooks: ExitStack) -> None:
        check_not_compiled(self.model, self.sites)
        self._step, self._active = self.first_step - 1, False
        self._to_come.clear()
        hooks.callback(self.model.register_forward_pre_hook(self._next_step, with_kwargs=True).remove)

    def _next_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._to_come:
            raise self._incomplete()
        self._step += 1
        self._active = self.steps is None or self._step in self.steps
        if self._active:
            # The streams of a block's output are told apart by their lengths, which only the forward knows.
            given = forward_arguments(model, args, kwargs)
            cond = given.get("cond")
            self._tokens = TokenCounts(
                given["txt"].shape[1], given["img"].shape[1], 0 if cond is None else cond.shape[1]
            )
            self._check_cond()
            self._begin_step(given)
            self._to_come = set(self.sites)

    def _check_cond(self) -> None:
        if not self._tokens.cond and (sites := [site for site in self.sites if site.stream == "cond"]):
            raise FluxIRError(
                f"{named(sites)} is of a reference picture, and the model is run without one",
                hint="pass a reference picture, or leave the site out",
            )

    def _begin_step(self, given: dict[str, Any]) -> None:
        """Called before an active step, with what the forward is given by name."""

    def _check_end(self) -> None:
        if self._step < self.first_step:
            raise FluxIRError(f"the {self.name} saw no forward of its model while it was entered", hint=NOT_CALLED)

    @abstractmethod
    def _incomplete(self) -> FluxIRError:
        """What to say of a step in which not every site came."""


class Listener:
    """The hook of one site that only reads. Its own type tells it from edits: see `listeners_last`."""

    def __init__(self, take: Callable[[Site, tuple[Any, ...], dict[str, Any], Any], None], site: Site) -> None:
        self.take, self.site = take, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.take(self.site, args, kwargs, output)


def listeners_last(module: nn.Module) -> None:
    """Has a module's listeners called after its edits: a recorder sees what is computed with, whoever came first."""
    hooks = module._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, Listener)]:
        hooks[key] = hooks.pop(key)


def named(sites: Iterable[Site]) -> str:
    """Names of sites for a message, by depth."""
    return ", ".join(map(str, sorted(sites)))


def check_not_compiled(model: Transformer, sites: Iterable[Site]) -> None:
    """Raises FluxIRError if the model is compiled, or a module around one of the sites is."""
    for site in (None, *sites):
        names = module_of(site).split(".") if site else []
        for depth in range(len(names) + 1):
            name = ".".join(names[:depth])
            module = model.get_submodule(name)
            # `torch.compile(module)` wraps the module, `module.compile()` marks it.
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise FluxIRError(
                    f"a recorder or an intervention needs a model that is not compiled: {name or 'the model'} is",
                    hint="pass the model as it was before torch.compile, and run that one",
                )


def forward_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a forward was called with, by name. From the class: others wrap the `forward` of an instance."""
    return signature(type(model).forward).bind(model, *args, **kwargs).arguments


def module_of(site: Site) -> str:
    """The name of the module whose call shows this site: its output, or output - input for an update."""
    block = f"{site.kind}_blocks.{site.block}"
    stream = "txt" if site.stream == "txt" else "img"  # a reference's tokens run with those of the image
    match site.kind, site.part:
        case _, None | "update":
            return block
        case _, "q":
            return f"{block}.attention.queries"
        case _, "k":
            return f"{block}.attention.keys"
        case "single", "attn":
            return f"{block}.attention"
        case "double", "attn":
            return f"{block}.{stream}_attn.proj"
        case "double", "mlp":
            return f"{block}.{stream}_mlp"
        case "double", _:
            return f"{block}.{stream}_mlp.1"  # 0 and 2 are the linears: their names are the checkpoint's
        case "single", "neurons":
            return f"{block}.mlp_act"
        case _:
            return f"{block}.linear2"


def is_outside(site: Site) -> bool:
    """Whether the site is what a whole block was called with and put out, and not something inside of it."""
    return site.per_prompt or site.part in (None, "update")


def stream_of(site: Site, output: Any) -> Tensor:
    """The tensor of a module's output that the site is in, [batch, tokens, d]: double blocks put out a pair, image
    first; queries and keys have their heads joined.
    """
    if site.part in ("q", "k"):
        return rearrange(output, "b heads n d -> b n (heads d)")
    if not isinstance(output, tuple):
        return output
    return output[1] if site.stream == "txt" else output[0]


def put_back(site: Site, new: Tensor, output: Any) -> Any:
    """A module's output with another tensor where `stream_of` finds the site's."""
    if site.part in ("q", "k"):
        return rearrange(new, "b n (heads d) -> b heads n d", heads=output.shape[1]).contiguous()
    if not isinstance(output, tuple):
        return new
    return (output[0], new) if site.stream == "txt" else (new, output[1])


def rows_of(site: Site, tokens: TokenCounts) -> slice:
    """Which of the rows of `stream_of` are the site's: text, then image, then a reference picture in a single block and
    among queries and keys; image, then reference in the image stream of a double block.
    """
    first = tokens.txt if site.kind == "single" or site.part in ("q", "k") else 0
    match site.stream:
        case "txt":
            return slice(0, tokens.txt)
        case "img":
            return slice(first, first + tokens.img)
        case "cond":
            return slice(first + tokens.img, first + tokens.img + tokens.cond)
        case None:
            return slice(0, tokens.txt + tokens.img)


def block_input(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the site's block was called with, of the site's stream; both streams for a single block."""
    names = ("img", "txt") if site.kind == "double" else ("x",)
    position = 1 if site.kind == "double" and site.stream == "txt" else 0
    return args[position] if position < len(args) else kwargs[names[position]]


def text_layers(encoders: TextEncoders) -> dict[Site, nn.Module]:
    """The module whose output each site of the text encoders is, in depth order."""
    t5: Any = encoders.t5.model.get_submodule("encoder.block")
    clip: Any = encoders.clip.model.get_submodule("text_model.encoder.layers")
    return dict(zip(text_sites(len(t5), len(clip)), [*t5, *clip], strict=True))
