"""The page to try a detector on, made of Gradio's parts: nothing is fetched from elsewhere, by the server or by the browser."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio import themes
from starlette.responses import PlainTextResponse

from detpipe.serving.trial import GIVEN, OWN, TILES, Trial, Tried

UPLOAD_BYTES = 16 * 2**20
_MOST_FOLDERS = 256  # of uploads and of pictures
_JSON_BYTES = 2**20  # of a request that is no upload
_KEPT_SECONDS = 1800.0  # a file lies there, and longer if nobody uploads
_CSS = """
footer {display: none !important}
.gradio-container {max-width: 1200px !important; margin: auto}
.hint p {font-size: .9em; opacity: .8; margin: 0}
button[aria-label="Share"] {display: none}
@media (max-width: 640px) {
  .panes {flex-direction: column}
  .panes > .column {width: 100%; max-width: calc(100vw - 64px); min-width: 0 !important}
}
"""
_COLUMNS = ["", "class", "score", "x1", "y1", "x2", "y2"]


def build_page(trial: Trial) -> gr.Blocks:
    """Lay out the page, and say which control does what."""
    tried = trial.tried
    with gr.Blocks(analytics_enabled=False, title=f"detpipe: {tried.name}", fill_width=True) as page:
        gr.Markdown(f"## {_plain(tried.name)}\n{len(tried.class_names)} classes: {_classes(tried.class_names)}")
        with gr.Row(elem_classes="panes"):
            with gr.Column(min_width=300):
                image, threshold, source, boxes, tiles, detect, clear = _lay_out_controls(tried)
            with gr.Column(min_width=300, scale=2):
                line, pictures, attend, gates, tables, files = _lay_out_results(tried)
        key, corner = gr.State(""), gr.State(None)
        shown, controls = [line, *pictures, *tables, *files], [image, source, boxes, tiles, threshold]
        raw: dict[str, Any] = {"preprocess": False, "api_visibility": "private"}  # Trial reads uploads itself
        for event in (image.upload, image.clear, detect.click, tiles.input, source.input):
            event(trial.look, controls, [key, *shown], concurrency_id="detector", **raw)
        quiet: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
        threshold.change(trial.show, [key, threshold], shown, **quiet, **raw)
        attend.click(trial.attend, [key, threshold], [line, gates], concurrency_id="detector", **raw)
        image.select(_click, [boxes, corner], [boxes, corner, source], **raw)
        clear.click(lambda: ("", None), None, [boxes, corner], **raw)
    for part in page.blocks.values():  # Gradio looks for files in what a request gives to any of them
        part.async_move_resource_to_block_cache = _only_files(part.async_move_resource_to_block_cache)
    page.queue(max_size=16, default_concurrency_limit=1)
    return page


def _lay_out_controls(tried: Tried) -> tuple[Any, ...]:
    image = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], height=360)
    threshold = gr.Slider(0, 1, 0.5, step=0.01, label="Score threshold")
    choices = [*([] if tried.needs_boxes else [OWN]), GIVEN, *tried.sources]
    source = gr.Dropdown(choices, label="Proposals from", filterable=False)
    text = "Boxes, [[x1, y1, x2, y2], ...] in pixels"
    boxes = gr.Textbox(label=text, lines=2, placeholder="[]", max_length=2**18)
    gr.Markdown("Two clicks on the image add a box: two corners that lie across.", elem_classes="hint")
    tiles = gr.Radio(TILES, value=TILES[0], label="Tiles, for small objects in large images")
    with gr.Row():
        detect = gr.Button("Detect", variant="primary")
        clear = gr.Button("Clear boxes")
    return image, threshold, source, boxes, tiles, detect, clear


def _lay_out_results(tried: Tried) -> tuple[Any, ...]:
    line = gr.Textbox("Drop an image above.", label="Result", interactive=False, lines=1)
    pictures: list[Any] = []
    with gr.Tabs():
        for name in ("Detections", "Proposals", "Glimpses"):
            with gr.Tab(name):
                picture = gr.Image(label=name, show_label=False, interactive=False, buttons=["download", "fullscreen"])
                pictures.append(picture)
        with gr.Tab("Attention"):
            attend = gr.Button("Draw the gates of the backbone", interactive=tried.draw_attention is not None)
            shape: dict[str, Any] = {"preview": True, "height": 560, "object_fit": "contain"}
            gates = gr.Gallery(label="Gates", show_label=False, interactive=False, **shape)
        with gr.Tab("Classes"):
            classes = gr.Dataframe(label="Scores of the proposal that each detection came from", interactive=False)
        with gr.Tab("Time"):
            times = gr.Dataframe(headers=["stage", "milliseconds"], interactive=False)
    rows = gr.Dataframe(headers=_COLUMNS, label="Detections", interactive=False)
    with gr.Row():
        files = [gr.DownloadButton("Download JSON"), gr.DownloadButton("Download picture")]
    return line, pictures, attend, gates, [rows, classes, times], files


def create_page_app(trial: Trial) -> Callable[..., Any]:
    """Make the application that answers with the page."""
    page = build_page(trial)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None),
        page,
        path="/",
        ssr_mode=False,
        css=_CSS,
        theme=themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        max_file_size=UPLOAD_BYTES,
        show_error=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
    )
    return _Bounded(app, trial.folder)


class _Bounded:
    """An application whose requests are bounded in bytes, and its folder in files: old ones are removed when new ones come."""

    def __init__(self, app: Callable[..., Any], folder: Path) -> None:
        self._app, self._folder = app, folder

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refused = self._refuse(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (refused or self._app)(scope, receive, send)

    def _refuse(self, scope: Any) -> PlainTextResponse | None:
        uploads = scope["path"].rstrip("/").endswith("/upload")
        length = dict(scope["headers"]).get(b"content-length", b"")
        most = UPLOAD_BYTES + 4096 if uploads else _JSON_BYTES
        if not length.isdigit() or int(length) > most:
            return PlainTextResponse(f"a request may have {most} bytes, and says how many it has", 413)
        if uploads and self._sweep() > _MOST_FOLDERS:
            return PlainTextResponse("too many files were uploaded; try again in half an hour", 503)
        return None

    def _sweep(self) -> int:
        """Remove what is old; how much is left."""
        left = 0
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # removed by a thread that has made a newer one
                if path.stat().st_mtime < time.time() - _KEPT_SECONDS:
                    shutil.rmtree(path)
                else:
                    left += 1
        return left


def _only_files(move: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a part from fetching what a request names by an address."""

    async def moved(given: Any) -> Any:
        if given is not None and "://" in str(given):
            raise gr.Error("addresses are not followed: drop a file")
        return await move(given)

    return moved


def _click(text: Any, corner: Any, event: gr.SelectData) -> tuple[str, Any, str]:
    """Remember a corner, or with the one before add a box to those in the text."""
    x, y = event.index
    if corner is None:
        return str(text or ""), [x, y], GIVEN
    box = [min(x, corner[0]), min(y, corner[1]), max(x, corner[0]), max(y, corner[1])]
    before = str(text or "").strip().removesuffix("]").rstrip()
    return f"{before}, {box}]" if before.endswith("]") else f"[{box}]", None, GIVEN


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()<>#+-.!|~$&" else c for c in text if c.isprintable())


def _classes(names: Any) -> str:
    shown = ", ".join(map(_plain, names[:12]))
    return shown + (", ..." if len(names) > 12 else "")
