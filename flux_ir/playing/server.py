"""Who serves the page: on 127.0.0.1 alone, and without a request to anywhere else, from Python or from the browser.

Gradio's own `launch` asks its makers for news and tries its address through the network; here uvicorn serves the same
app from a socket that is bound before anything heavy is loaded.
"""

import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from flux_ir.api.progress import Watch, phase, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.suite import Suite
from flux_ir.playing.page import WEB, Page
from flux_ir.playing.studio import PlaySettings, Studio, open_studio

if TYPE_CHECKING:
    import gradio as gr

HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")
LARGEST_PORT = 65535
SECONDS_TO_CLOSE = 2
CSP = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "connect-src": "'self' data: blob:",
    "worker-src": "'self' blob:",
    "frame-ancestors": "'none'",
}
"""Where a browser may load from: whatever a page of Gradio's may ask for, no request leaves the machine."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class PlayPage:
    """A page that is served until it is closed. `studio` does its work, from a notebook too."""

    def __init__(self, studio: Studio, address: str, close: Callable[[], None], thread: Thread) -> None:
        self.studio, self.address = studio, address
        self._close, self._thread = close, thread

    def __repr__(self) -> str:
        return f"<PlayPage {self.address}: {self.studio.suite!r}>"

    def wait(self) -> None:
        """Returns when the page is closed; Ctrl-C comes through."""
        while self._thread.is_alive():
            self._thread.join(timeout=1)

    def close(self) -> None:
        """Ends the page. What it saved stays."""
        self._close()
        self._thread.join()


def play(
    model: str | Suite = "flux-schnell",
    *,
    sae: str | Path | Iterable[str | Path] | None = None,
    features: str | Path | Iterable[str | Path] | None = None,
    port: int = 7860,
    width: int | None = None,
    height: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    device: str | None = None,
    multi_gpu: MultiGpuWord = False,
    offload: OffloadWord = False,
    compile: bool = False,
    attention: AttentionWord = "auto",
    vram_gb: float | None = None,
    memory_gb: float | None = None,
    dtype: DtypeWord = "auto",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] | None = None,
    lora_strength: float | Sequence[float] | None = None,
    quantize: Method | None = None,
    output_dir: str | Path = "play",
    progress: Watch = unwatched,
) -> PlayPage:
    """Serve a local page: type a prompt, click a patch for its features, turn them, and compare before with after.

    `sae` are folders of autoencoders of image tokens, `features` the folders that `flux-ir features` made of them: then
    features have labels and examples. The page is on 127.0.0.1 (`port` 0: any free one), and no request leaves the
    machine. Regions and edits go into `output_dir`, so that the command lines the page shows can be run.

    Returns when the page can be opened at `.address`; it is served until `.close()`. The other arguments are those of
    `capture`. Raises FluxIRError for what a user can mend, before a weight is loaded where that is possible.
    """
    settings = PlaySettings(
        model=model,
        sae=_paths(sae),
        features=_paths(features),
        port=port,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=guidance,
        device=device,
        multi_gpu=multi_gpu,
        offload=offload,
        compile=compile,
        attention=attention,
        vram_gb=vram_gb,
        memory_gb=memory_gb,
        dtype=dtype,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
        lora=lora,
        lora_strength=lora_strength,
        quantize=quantize,
        output_dir=output_dir,
    )
    return run_play(settings, progress)


def run_play(settings: PlaySettings, progress: Watch = unwatched) -> PlayPage:
    """The same, with its settings in one object."""
    if find_spec("gradio") is None:
        raise FluxIRError("flux-ir play needs the package gradio", hint='pip install "flux-ir[play]"')
    listening = bound(settings.port)
    try:
        studio = open_studio(settings, progress)
        with phase(progress, "page"):
            return serve(studio, listening)
    except BaseException:
        listening.close()
        raise


def bound(port: int) -> socket.socket:
    """A socket on this port of 127.0.0.1. Raises FluxIRError for one that is in use, or that there is not."""
    if not 0 <= port <= LARGEST_PORT:
        raise FluxIRError(
            f"--port must be from 0 to {LARGEST_PORT}: got {port}", hint="leave it out, or choose another"
        )
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is in use" if error.errno == errno.EADDRINUSE else "may not be used"
        other = port + 1 if 1024 <= port < LARGEST_PORT else 7860
        raise FluxIRError(
            f"the port {port} of {HOST} {why}", hint=f"close what uses it, or choose another, such as --port {other}"
        ) from error


def serve(studio: Studio, listening: socket.socket) -> PlayPage:
    """The page of a studio, served from this socket by a thread of its own."""
    # Read when Gradio and the hub's client are imported: neither shall tell anyone that it runs.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio
    import uvicorn
    from fastapi import FastAPI

    port = listening.getsockname()[1]
    page = Page(studio)
    blocks = page.build()
    blocks.queue(default_concurrency_limit=1, api_open=False)
    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="",
        server_name=HOST,
        server_port=port,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=True,
        max_file_size=0,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme(gradio),
        css_paths=[WEB / "page.css"],
    )
    config = uvicorn.Config(
        guarded(app),
        log_level="error",
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=SECONDS_TO_CLOSE,
    )
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, kwargs={"sockets": [listening]}, name="play", daemon=True)
    thread.start()

    def close() -> None:
        server.should_exit = True

    return PlayPage(studio, f"http://{HOST}:{port}", close, thread)


def guarded(app: App) -> App:
    """The app behind two guards: it answers only to this machine's own names, and says where a page may load from."""
    policy = "; ".join(f"{name} {value}" for name, value in CSP.items()).encode()

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        # A page elsewhere whose name has been pointed to 127.0.0.1 would else reach this one.
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        if host not in HOSTS:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"this page is served to this machine alone\n"})
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    *message["headers"],
                    (b"content-security-policy", policy),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, send_with_policy)

    return answer


def theme(gradio: Any) -> "gr.Theme":
    """The explorer's look: system fonts, one accent, paper and ink."""
    made = gradio.themes.Base(
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"],
        font_mono=["ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace"],
        radius_size="md",
        spacing_size="md",
        text_size="md",
    )
    colours = {  # light, dark
        "body_background_fill": ("#f4f2ec", "#131316"),
        "background_fill_primary": ("#f4f2ec", "#131316"),
        "background_fill_secondary": ("#ffffff", "#1c1c20"),
        "body_text_color": ("#1c1b1a", "#ecebe8"),
        "body_text_color_subdued": ("#5f5b54", "#a09c95"),
        "block_background_fill": ("transparent", "transparent"),
        "block_label_text_color": ("#5f5b54", "#a09c95"),
        "block_title_text_color": ("#5f5b54", "#a09c95"),
        "border_color_primary": ("#dcd7cc", "#2e2e34"),
        "input_background_fill": ("#ffffff", "#1c1c20"),
        "input_border_color": ("#dcd7cc", "#2e2e34"),
        "button_primary_background_fill": ("#1f4fc4", "#9db7ff"),
        "button_primary_background_fill_hover": ("#1a43a7", "#b4c8ff"),
        "button_primary_text_color": ("#ffffff", "#10131f"),
        "button_secondary_background_fill": ("#ffffff", "#1c1c20"),
        "button_secondary_background_fill_hover": ("#f0ede5", "#26262b"),
        "button_secondary_text_color": ("#1c1b1a", "#ecebe8"),
        "button_secondary_border_color": ("#dcd7cc", "#2e2e34"),
        "slider_color": ("#1f4fc4", "#9db7ff"),
        "color_accent": ("#1f4fc4", "#9db7ff"),
    }
    both = {name: light for name, (light, _) in colours.items()}
    has_dark = [name for name in colours if name != "color_accent"]
    both |= {f"{name}_dark": colours[name][1] for name in has_dark}
    return made.set(
        **both, block_border_width="0px", block_shadow="none", block_padding="0px", input_border_width="1px"
    )


def _paths(given: str | Path | Iterable[str | Path] | None) -> tuple[str | Path, ...] | None:
    return (given,) if isinstance(given, str | Path) else given if given is None else tuple(given)
