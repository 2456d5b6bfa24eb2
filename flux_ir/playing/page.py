"""The page itself: what stands where, and what a click does. All work is the studio's; every session has its own state.

Gradio takes seconds to import, so that only who serves the page does it (`server`).
"""

import functools
import html
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from PIL import Image

from flux_ir.api.progress import Begun, Note, Progress, Watch
from flux_ir.errors import FluxIRError
from flux_ir.playing.studio import MOST_TURNED, Generation, Studio, Turned
from flux_ir.steering.dose import Picture, Price

if TYPE_CHECKING:
    import gradio as gr

WEB = Path(__file__).parent / "web"
EXAMPLE_PROMPT = "a large red circle left of a small blue square on a white background"
LARGEST_VIEW_PX = 256
"""Pictures of blocks are shown no larger: those of FLUX.1 would be a hundred megabytes for the browser."""
STRENGTH, STRENGTH_STEP = 8.0, 0.25
MOST_SEED = 2**53 - 1
"""The largest seed that a browser's numbers hold exactly."""

Which = Literal["unsteered", "steered"]
WHICH: tuple[Which, Which] = ("unsteered", "steered")


@dataclass
class Session:
    """What one visitor looks at."""

    before: Generation | None = None
    after: Generation | None = None
    which: Which = "unsteered"
    """The picture whose patch is looked at, and whose blocks are shown."""
    token: int | None = None
    shown: tuple[int, int] | None = None
    """The feature whose places are drawn over the picture, by its autoencoder and its number."""
    turned: list[tuple[int, int]] = field(default_factory=list)
    """The features with a slider, likewise."""

    @property
    def looked_at(self) -> Generation | None:
        """The picture that is looked at."""
        return self.after if self.which == "steered" and self.after is not None else self.before


class Stopped(Exception):  # noqa: N818 (a signal, not an error)
    """The visitor wants no more."""


class _Parts(NamedTuple):
    """The components that events read and change."""

    session: Any
    prompt: Any
    seed: Any
    num_steps: Any
    generate: Any
    stop: Any
    before: Any
    after: Any
    notes: Any
    price: Any
    command: Any
    price_command: Any
    step: Any
    which: Any
    blocks: Any
    features: Any
    number: Any
    dictionary: Any
    add: Any
    sliders: list[Any]
    removes: list[Any]
    rows: list[Any]
    kind: Any
    first: Any
    last: Any
    steer: Any


class Page:
    """The page of one studio. `build` gives Gradio's blocks, `style` what belongs into the page's head."""

    def __init__(self, studio: Studio) -> None:
        import gradio

        self.gr, self.studio = gradio, studio
        self.has_features = bool(studio.dictionaries)
        self.stopped = Event()

    def build(self) -> "gr.Blocks":
        """What stands where, with its events."""
        title = f"flux_ir play: {self.studio.suite.spec.name}"
        with self.gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as blocks:
            parts = self._layout()
            self._connect(blocks, parts)
        return blocks

    # ---- What stands where

    def _layout(self) -> _Parts:
        gr = self.gr
        session = gr.State(Session())
        gr.HTML(self._head())
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                EXAMPLE_PROMPT, label="Prompt", elem_id="prompt", lines=1, max_lines=4, scale=8, min_width=320
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED, min_width=100, elem_id="seed")
            num_steps = gr.Number(self.studio.num_steps, label="Steps", precision=0, minimum=1, min_width=80)
            with gr.Column(min_width=120, scale=1):
                generate = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", size="sm", elem_id="stop")
        with gr.Row():
            with gr.Column(scale=7, min_width=340):
                with gr.Row():
                    before = self._picture("before", self._shot(None, "Unsteered"))
                    after = self._picture("after", self._shot(None, "Steered"))
                notes = gr.HTML("", elem_id="notes")
                price = gr.HTML("", elem_id="price")
                command = gr.Textbox(
                    label="The same picture from the command line",
                    elem_id="command",
                    interactive=False,
                    lines=2,
                    max_lines=6,
                    buttons=["copy"],
                    visible=False,
                )
                price_command = gr.Textbox(
                    label="What it costs, beside random directions",
                    elem_id="price-command",
                    interactive=False,
                    lines=2,
                    max_lines=6,
                    buttons=["copy"],
                    visible=False,
                )
            with gr.Column(scale=5, min_width=340):
                step = gr.Slider(
                    0,
                    self.studio.num_steps - 1,
                    self._first_step(),
                    step=1,
                    label="Look at step",
                    elem_id="step",
                )
                features = gr.HTML(
                    None,
                    html_template=_web("features.html"),
                    js_on_load=_web("features.js"),
                    rows=self._rows(Session(), 0),
                    elem_id="features",
                    visible=self.has_features,
                )
                with gr.Group(visible=self.has_features):
                    number, dictionary, add = self._number()
                    rows, sliders, removes = self._sliders()
                with gr.Row(visible=self.has_features):
                    kind = gr.Dropdown(
                        ["add", "clamp", "ablate"], value="add", label="Kind", min_width=100, elem_id="kind"
                    )
                    first = gr.Number(0, label="From step", precision=0, minimum=0, min_width=80)
                    last = gr.Number(self.studio.num_steps - 1, label="To step", precision=0, minimum=0, min_width=80)
                steer = gr.Button(
                    "Steer", variant="primary", elem_id="steer", interactive=False, visible=self.has_features
                )
        with gr.Row(equal_height=True):
            gr.HTML("<h2>What each block would have drawn</h2>", scale=1, min_width=260)
            which = gr.Radio(
                ["unsteered", "steered"],
                value="unsteered",
                show_label=False,
                container=False,
                elem_id="which",
                interactive=False,
                visible=self.has_features,
            )
        blocks = gr.HTML(
            None, html_template=_web("blocks.html"), js_on_load=_web("blocks.js"), views=[], elem_id="blocks"
        )
        return _Parts(**{name: value for name, value in locals().items() if name in _Parts._fields})

    def _head(self) -> str:
        studio, spec = self.studio, self.studio.suite.spec
        dtype = str(studio.suite.dtype).removeprefix("torch.")
        facts = [f"{spec.name}, {studio.grid.width} x {studio.grid.height} px, {dtype} on {studio.device}"]
        for dictionary in studio.dictionaries:
            config = dictionary.sae.config
            facts.append(f"{dictionary.site}: {config.architecture}, {config.d_sae} features")
        if not studio.dictionaries:
            facts.append("no autoencoder: pictures and blocks alone; --sae FOLDER adds features to turn")
        said = "".join(f"<p>{html.escape(fact)}</p>" for fact in facts)
        return f'<div class="head"><h1>flux_ir play</h1>{said}</div>'

    def _picture(self, name: str, shot: dict[str, Any]) -> Any:
        return self.gr.HTML(
            {"token": None, "region": []},
            html_template=_web("picture.html"),
            js_on_load=_web("picture.js"),
            shot=shot,
            marks={"token": None, "heat": None},
            elem_id=name,
            min_width=240,
            visible=name == "before" or self.has_features,
        )

    def _number(self) -> tuple[Any, Any, Any]:
        gr, names = self.gr, [str(dictionary.site) for dictionary in self.studio.dictionaries]
        with gr.Row(elem_classes="beside"):
            # No gr.Number: it shows 0 where there is none.
            number = gr.Textbox(label="Feature by its number", max_lines=1, min_width=120, elem_id="number")
            dictionary = gr.Dropdown(
                [(name, place) for place, name in enumerate(names)],
                value=0 if names else None,
                label="Autoencoder",
                min_width=120,
                visible=len(names) > 1,
            )
            add = gr.Button("Add", size="sm", scale=0, min_width=80, elem_id="add")
        return number, dictionary, add

    def _sliders(self) -> tuple[list[Any], list[Any], list[Any]]:
        gr, rows, sliders, removes = self.gr, [], [], []
        for place in range(MOST_TURNED):
            with gr.Row(visible=False, elem_classes="beside") as row:
                slider = gr.Slider(
                    -STRENGTH, STRENGTH, 0, step=STRENGTH_STEP, label="", scale=6, elem_id=f"strength-{place}"
                )
                removes.append(gr.Button("Remove", size="sm", scale=0, min_width=80))
            rows.append(row)
            sliders.append(slider)
        return rows, sliders, removes

    def _first_step(self) -> int:
        """The latest step that an autoencoder was trained on, else the middle."""
        known = [step for one in self.studio.dictionaries for step in one.steps if step < self.studio.num_steps]
        return max(known, default=self.studio.num_steps // 2)

    # ---- What a click does

    def _connect(self, blocks: "gr.Blocks", parts: _Parts) -> None:
        """Every event waits its turn at the one model. What takes long shows its progress on the pictures."""
        gr = self.gr
        turn = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        # Of clicks that come while the model is busy the last one counts, but where each adds something.
        quick = turn | {"show_progress": "hidden", "trigger_mode": "always_last"}
        every = quick | {"trigger_mode": "multiple"}
        pictures = [parts.before, parts.after]
        result = [parts.session, *pictures, parts.notes, parts.price, parts.command, parts.price_command]
        result += [parts.step, parts.which, parts.steer]

        shown = gr.Progress()  # Gradio finds it among the defaults

        def generate(
            session: Session, prompt: str, seed: int, num_steps: int, step: int, progress: Any = shown
        ) -> list[Any]:
            before = self._make(prompt, seed, num_steps, (), progress)
            session = Session(before=before, token=session.token, turned=session.turned)
            return self._result(session, step)

        def steer(
            session: Session,
            region: dict[str, Any],
            kind: str,
            first: int,
            last: int,
            step: int,
            *strengths: float,
            progress: Any = shown,
        ) -> list[Any]:
            before = session.before
            if before is None:
                raise FluxIRError("there is no picture yet", hint="press Generate first")
            turned = [Turned(*one, strength) for one, strength in zip(session.turned, strengths, strict=False)]
            steps = self._steps(first, last, before.num_steps)
            edits = self.studio.edits(turned, kind=kind, region=region["region"], steps=steps)  # type: ignore[arg-type]
            session.after = self._make(before.prompt, before.seed, before.num_steps, edits, progress)
            session.which = "steered"
            return self._result(session, step)

        asked = [parts.session, parts.prompt, parts.seed, parts.num_steps, parts.step]
        look = [parts.session, parts.step]
        for ask in (parts.generate.click, parts.prompt.submit, parts.seed.submit):
            done = ask(
                self._mendable(generate), asked, result, show_progress="full", show_progress_on=parts.before, **turn
            )
            self._look_again(done.success, parts, look, quick)
        edit = [parts.session, parts.before, parts.kind, parts.first, parts.last, parts.step, *parts.sliders]
        done = parts.steer.click(
            self._mendable(steer), edit, result, show_progress="full", show_progress_on=parts.after, **turn
        )
        self._look_again(done.success, parts, look, quick)
        parts.stop.click(lambda: self.stopped.set(), queue=False, show_progress="hidden", api_visibility="private")

        self._look_again(parts.step.release, parts, look, quick)
        looked = [parts.session, parts.features, *pictures, parts.which]
        for which, picture in zip(WHICH, pictures, strict=True):
            chosen = picture.select(
                self._mendable(functools.partial(self._choose, which)),
                [parts.session, picture, parts.step],
                looked,
                **quick,
            )
            chosen.success(self._mendable(self._views), look, parts.blocks, **quick)
        turned_rows = [parts.session, parts.features, *pictures, parts.steer, *parts.rows, *parts.sliders]
        wish = [parts.session, parts.features, parts.step, *parts.sliders]
        parts.features.input(self._mendable(self._wish), wish, turned_rows, **every)
        by_number = [parts.session, parts.number, parts.dictionary, parts.step, *parts.sliders]
        for ask in (parts.add.click, parts.number.submit):
            ask(self._mendable(self._add), by_number, turned_rows, **every)
        for place, remove in enumerate(parts.removes):
            remove.click(
                self._mendable(functools.partial(self._remove, place)),
                [parts.session, parts.step, *parts.sliders],
                turned_rows,
                **every,
            )
        switched = parts.which.input(
            self._mendable(self._switch), [parts.session, parts.which, parts.step], looked[:-1], **quick
        )
        switched.success(self._mendable(self._views), look, parts.blocks, **quick)
        parts.kind.change(
            lambda kind: [gr.update(interactive=kind != "ablate") for _ in parts.sliders],
            parts.kind,
            parts.sliders,
            **quick,
        )

    def _look_again(self, then: Any, parts: _Parts, look: list[Any], quick: dict[str, Any]) -> None:
        """Show features and blocks anew: first what is quicker."""
        done = then(self._mendable(self._features), look, [parts.features, parts.before, parts.after], **quick)
        done.success(self._mendable(self._views), look, parts.blocks, **quick)

    def _mendable(self, handle: Callable[..., Any]) -> Callable[..., Any]:
        """What a user can mend is one line on the page, with its hint; what was shown stays."""

        @functools.wraps(handle)
        def handled(*args: Any, **kwargs: Any) -> Any:
            try:
                return handle(*args, **kwargs)
            except FluxIRError as error:
                message, hint = html.escape(error.message), html.escape(error.hint or "")
                said = f"{message}. {hint}" if hint else message
                raise self.gr.Error(said, title="Not possible", duration=None, print_exception=False) from error
            except Stopped:
                raise self.gr.Error(
                    "The picture before stays.", title="Stopped", duration=3, print_exception=False
                ) from None

        return handled

    def _make(self, prompt: str, seed: int, num_steps: int, edits: Sequence[Any], progress: Any) -> Generation:
        for name, value in (("Seed", seed), ("Steps", num_steps)):
            if value is None:
                raise FluxIRError(f"{name} is a whole number: got nothing", hint="type one")
        self.stopped.clear()
        return self.studio.generate(prompt, seed=seed, num_steps=num_steps, edits=edits, progress=self._watch(progress))

    def _watch(self, progress: Any) -> Watch:
        def watch(event: Progress | Note | Begun) -> None:
            if self.stopped.is_set():
                raise Stopped
            if isinstance(event, Progress):
                progress((event.done, event.total), desc=event.stage)

        return watch

    @staticmethod
    def _steps(first: int | None, last: int | None, num_steps: int) -> range | None:
        """The steps from first to last, both included; None: all."""
        first, last = 0 if first is None else first, num_steps - 1 if last is None else last
        if first > last:
            raise FluxIRError(f"the edit's first step is not behind its last: got {first} to {last}", hint="swap them")
        return None if first == 0 and last >= num_steps - 1 else range(first, min(last, num_steps - 1) + 1)

    # Updates of the page

    def _result(self, session: Session, step: int) -> list[Any]:
        gr, before, after = self.gr, session.before, session.after
        assert before is not None
        newest = after or before
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in newest.notes)
        price = "" if after is None else _price(self.studio.compare(after, before))
        costs = None if after is None else self.studio.price_command(after)
        return [
            session,
            gr.update(shot=self._shot(before, "Unsteered")),
            gr.update(shot=self._shot(after, "Steered")),
            notes,
            price,
            gr.update(value=self.studio.command(newest), visible=True),
            gr.update(value=costs or "", visible=costs is not None),
            gr.update(maximum=before.num_steps - 1, value=min(step, before.num_steps - 1)),
            gr.update(value=session.which, interactive=after is not None),
            gr.update(interactive=bool(session.turned)),
        ]

    def _shot(self, generation: Generation | None, title: str) -> dict[str, Any]:
        grid = self.studio.grid
        shot = {"title": title, "picture": None, "width": grid.width, "height": grid.height, "paints": False}
        shot |= {"columns": grid.columns, "rows": grid.rows, "alt": "", "empty": ""}
        if generation is None:
            waiting = "Type a prompt and press Generate." if title == "Unsteered" else "Turn a feature and press Steer."
            return shot | {"empty": waiting}
        said = f"{title}, seed {generation.seed}, {generation.seconds:.2f} s"
        paints = title == "Unsteered" and self.has_features
        return shot | {"title": said, "picture": picture_uri(generation.picture), "alt": said, "paints": paints}

    def _choose(self, which: Which, session: Session, picture: dict[str, Any], step: int) -> list[Any]:
        session.which, session.token = which, picture["token"]
        return [session, *self._features(session, step), which]

    def _switch(self, session: Session, which: Which, step: int) -> list[Any]:
        session.which = which
        return [session, *self._features(session, step)]

    def _features(self, session: Session, step: int) -> list[Any]:
        """The list of features, and the marks on both pictures."""
        heat = None
        if session.shown is not None and session.looked_at is not None:
            heat = self.studio.activity(session.looked_at, *session.shown, step).flatten().tolist()
        marks = [
            self.gr.update(
                marks={
                    "token": session.token if session.which == which else None,
                    "heat": heat if session.which == which else None,
                }
            )
            for which in WHICH
        ]
        return [self.gr.update(rows=self._rows(session, step)), *marks]

    def _rows(self, session: Session, step: int) -> dict[str, Any]:
        found, several = session.looked_at, len(self.studio.dictionaries) > 1
        if found is None or session.token is None:
            said = "Generate a picture, then click one of its patches: its strongest features appear here."
            return {"said": said, "rows": [], "several": several}
        row, column = divmod(session.token, self.studio.grid.columns)
        active = self.studio.features(found, token=session.token, step=step)
        said = f"Patch in row {row + 1}, column {column + 1} of the {session.which} picture at step {step}: "
        said += "strongest features, in their own maximum." if active else "no feature is active."
        strongest = max((one.activation for one in active), default=1.0)
        rows = []
        for one in active:
            dictionary, place = self.studio.dictionaries[one.dictionary], (one.dictionary, one.feature)
            rows.append(
                one._asdict()
                | {
                    "site": str(dictionary.site),
                    "length": one.activation / strongest,
                    "said": f"{one.activation:.3g}" if one.share is None else f"{one.share:.0%}",
                    "label": dictionary.label(one.feature),
                    "examples": [image_uri(example) for example in dictionary.examples(one.feature)],
                    "shown": session.shown == place,
                    "turned": place in session.turned,
                }
            )
        return {"said": said, "rows": rows, "several": several}

    def _views(self, session: Session, step: int) -> Any:
        found = session.looked_at
        if found is None:
            return self.gr.skip()
        views = self.studio.beliefs(found, step)
        return self.gr.update(views=[{"block": str(site.whole), "picture": view_uri(view)} for site, view in views])

    # Features that are turned

    def _wish(self, session: Session, wish: dict[str, Any], step: int, *strengths: float) -> list[Any]:
        place, strengths_now = (wish["dictionary"], wish["feature"]), list(strengths)
        if wish["action"] == "where":
            session.shown = None if session.shown == place else place
        elif place in session.turned:
            del strengths_now[session.turned.index(place)]
            session.turned.remove(place)
        else:
            self._turn(session, place)
        return self._turned(session, step, strengths_now)

    def _add(self, session: Session, number: str, dictionary: int, step: int, *strengths: float) -> list[Any]:
        if not number.strip().isdecimal():
            raise FluxIRError(
                f"a feature has a number: got {number.strip()!r}",
                hint="type one such as 12, or click a patch for its features",
            )
        self._turn(session, (dictionary, int(number)))
        return self._turned(session, step, list(strengths))

    def _remove(self, at: int, session: Session, step: int, *strengths: float) -> list[Any]:
        strengths_now = list(strengths)
        del strengths_now[at], session.turned[at]
        return self._turned(session, step, strengths_now)

    def _turn(self, session: Session, place: tuple[int, int]) -> None:
        self.studio.dictionaries[place[0]].check_feature(place[1])
        if place in session.turned:
            raise FluxIRError(f"feature {place[1]} is turned already", hint="move its slider")
        if len(session.turned) == MOST_TURNED:
            raise FluxIRError(f"{MOST_TURNED} features can be turned together", hint="remove one of them first")
        session.turned.append(place)

    def _turned(self, session: Session, step: int, strengths: list[float]) -> list[Any]:
        gr, rows, sliders = self.gr, [], []
        strengths = [*strengths[: len(session.turned)], *[0.0] * MOST_TURNED]
        for at in range(MOST_TURNED):
            there = at < len(session.turned)
            rows.append(gr.update(visible=there))
            value = strengths[at] if there else 0.0
            label = self._slider_label(*session.turned[at]) if there else ""
            sliders.append(gr.update(label=label, value=value))
        can = bool(session.turned) and session.before is not None
        return [session, *self._features(session, step), gr.update(interactive=can), *rows, *sliders]

    def _slider_label(self, dictionary: int, feature: int) -> str:
        chosen = self.studio.dictionaries[dictionary]
        said = f"Feature {feature}"
        if (label := chosen.label(feature)) is not None:
            said += f": {label}"
        where = f" of {chosen.site}" if len(self.studio.dictionaries) > 1 else ""
        unit = "its own maximum" if chosen.unit == "max" else "the tokens' length"
        return f"{said}{where}, strength in {unit}"


# ---- What the browser is given


def _web(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def image_uri(image: Image.Image) -> str:
    """A picture as an address that holds it: nothing is served from files."""
    encoded = BytesIO()
    image.save(encoded, format="PNG")
    return f"data:image/png;base64,{b64encode(encoded.getbuffer()).decode()}"


def picture_uri(picture: Picture) -> str:
    """A picture with every pixel it has."""
    return image_uri(Image.fromarray(picture.numpy()))


def view_uri(picture: Picture) -> str:
    """The same for a small view."""
    view = Image.fromarray(picture.numpy())
    view.thumbnail((LARGEST_VIEW_PX, LARGEST_VIEW_PX))
    return image_uri(view)


def _price(price: Price) -> str:
    if price.identical:
        return '<p class="price"><b>The same bytes as the unsteered picture.</b></p>'

    def said(name: str, db: float | None, distance: float | None) -> str:
        if distance is None:
            return ""
        likeness = "no pixel differs" if db is None else f"{db:.1f} dB"
        return f"<span>{name}<b>{likeness}</b>, latent <b>{distance:.1%}</b></span>"

    inside = said(
        "inside" if price.latent_outside is not None else "whole picture", price.psnr_inside_db, price.latent_inside
    )
    outside = said("outside", price.psnr_outside_db, price.latent_outside)
    return f'<p class="price" title="against the unsteered picture">{inside}{outside}</p>'
