"""The page of the viewer: controls on the left, maps on the right; everything is computed in `vitreg_eval.viewing`."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from vitreg_core.errors import InputError
from vitreg_eval.viewing import Choice, Viewer
from vitreg_eval.viewing_page import Shown, clickable, clickable_size, maps_page
from vitreg_eval.viewing_pictures import MOST_BYTES, MOST_LISTED, MOST_PIXELS

AT_ONCE = 8
"""Requests answered at a time; others wait in line."""
KEEP_SECONDS = 3600
"""How long gradio keeps files of a session."""
MEAN = "mean"
TOKENS = {"class token": "cls", "clicked patch": "patch"}
FONT = ("system-ui", "sans-serif")
CSS = """
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:12px}
.one .maps{grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.maps .card{border:1px solid var(--border-color-primary);border-radius:8px;padding:10px 12px;min-width:0;
  background:var(--background-fill-primary)}
.maps .wide{grid-column:1/-1}
.maps h3{margin:0;font-size:1rem}
.maps p{margin:2px 0 8px;font-size:.82rem;opacity:.75}
.maps .row{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:10px}
.maps .wide .row{grid-template-columns:repeat(5,minmax(0,1fr))}
.maps figure{margin:0}
.maps img{width:100%;display:block;image-rendering:pixelated;border-radius:3px}
.maps figcaption{font-size:.78rem;line-height:1.3;margin-top:3px;overflow-wrap:anywhere}
.maps .none{aspect-ratio:1;display:grid;place-items:center;text-align:center;font-size:.85rem;padding:8px;
  border:1px dashed var(--border-color-primary)}
.maps .bar{display:flex;align-items:center;gap:8px;font-size:.78rem;margin-top:6px}
.maps .bar i{flex:1;height:10px;border-radius:3px}
.one .card:not(.wide) .row{grid-template-columns:minmax(0,1fr)}
.one figcaption b{display:none}
#status .error{color:#c62828;font-weight:600}
#status p{margin:2px 0;font-size:.85rem;overflow-wrap:anywhere}
#picture img{width:100%;object-fit:contain;cursor:crosshair}
.maps .wide .row{margin:4px 0 10px}
@media(max-width:640px){.maps .wide .row{grid-template-columns:repeat(3,minmax(0,1fr))}}
"""
Updates = tuple[Any, ...]
"""New values of key, patch, picture, maps, status, token and list, in this order."""


class Page:
    """What happens in the page. A session is a picture's key and a clicked place; all else is in the controls."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.labels = {name: key for key, name in viewer.pictures.names.items()}

    def draw(self, key: str, patch: tuple[float, float], *controls: Any) -> Iterator[Updates]:  # noqa: ANN401 (gradio's)
        """Show a picture; says so first where models are searched for register neurons."""
        layer, head, token, test_time = controls
        choice = Choice(int(layer), None if head == MEAN else int(head), TOKENS.get(token, token), patch, test_time)
        if test_time and not all(found.done() for found in self.viewer.find_mended()):
            words = "Looking for the neurons that write outliers; this takes a minute or so, once."
            yield (*[gr.skip()] * 4, status(words), *[gr.skip()] * 2)
        try:
            yield self.updates(key, choice)
        except InputError as error:
            yield failure(error)

    def updates(self, key: str, choice: Choice) -> Updates:
        """Everything that a choice shows."""
        viewer = self.viewer
        picture = viewer.pictures.open(key)
        names = token_names(viewer.registers(test_time=choice.test_time))
        if choice.token not in names.values():  # a register that went with the switch
            choice = choice._replace(token="cls")  # noqa: S106 (a token of a transformer)
        shown = viewer.view(key, choice)
        plain = viewer.view(key, choice._replace(test_time=False)) if choice.test_time else shown
        image = clickable(viewer.pictures.pixels(picture), shown[0])
        found = viewer.find_mended() if choice.test_time else []
        lines = [f"{name}: {one.result().verdict}" for name, one in zip(viewer.names, found, strict=False)]
        label = next(name for name, token in names.items() if token == choice.token)
        page = maps_page(Shown(shown, plain, choice))
        token = gr.update(choices=list(names), value=label)
        listed = picture.name if picture.name in self.labels else None  # an upload is in no list
        return key, choice.patch, image, page, status(picture.name, *lines), token, listed

    def choose(self, label: str | None, _: str, patch: tuple[float, float], *controls: Any) -> Iterator[Updates]:  # noqa: ANN401
        """Show a listed picture."""
        if label in self.labels:
            yield from self.draw(self.labels[label], patch, *controls)

    def upload(self, path: str | None, _: str, patch: tuple[float, float], *controls: Any) -> Iterator[Updates]:  # noqa: ANN401
        """Show an uploaded photo."""
        try:
            if path is not None:
                yield from self.draw(self.viewer.pictures.add(Path(path)).key, patch, *controls)
        except InputError as error:
            yield failure(error)

    def click(self, event: gr.SelectData, key: str, _: tuple[float, float], *controls: Any) -> Iterator[Updates]:  # noqa: ANN401
        """Choose the patch below the pointer."""
        pictures = self.viewer.pictures
        try:
            height, width = clickable_size(pictures.pixels(pictures.open(key)))
        except InputError as error:  # an upload that was dropped meanwhile
            yield failure(error)
        else:
            yield from self.draw(key, (event.index[1] / height, event.index[0] / width), *controls)


def token_names(registers: int) -> dict[str, str]:
    """What the token menu offers, with the names of `Choice.token`."""
    own = {f"register {index}": f"register {index}" for index in range(registers)}
    return {"class token": "cls", **own, "clicked patch": "patch"}


def status(*lines: str, error: bool = False) -> str:
    """Lines below the picture."""
    kind = ' class="error"' if error else ""
    return f'<div role="status"{kind}>{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>'


def failure(error: InputError) -> Updates:
    """Say what is wrong and leave all else as it is."""
    return (*[gr.skip()] * 4, status(str(error), error=True), *[gr.skip()] * 2)


def build(viewer: Viewer) -> gr.Blocks:
    """The page with its events."""
    page, models = Page(viewer), viewer.models
    depth, heads = max(one.depth for one in models), max(one.num_heads for one in models)
    limits = f"at most {MOST_BYTES // 2**20} MB and {MOST_PIXELS // 10**6} megapixels"
    with gr.Blocks(title="vitreg viewer", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as blocks:
        key, patch = gr.State("scene 0"), gr.State((0.5, 0.5))
        gr.Markdown(f"## What {' and '.join(viewer.names)} see{'s' * (len(models) == 1)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture = gr.Image(
                    label="Click a patch", interactive=False, buttons=[], elem_id="picture", format="png"
                )
                state = gr.HTML(elem_id="status")
                listed = gr.Dropdown(list(page.labels), label=list_label(viewer), elem_id="listed")
                upload = gr.UploadButton(f"Upload a photo ({limits})", file_types=["image"], size="sm")
                layer = gr.Slider(0, depth - 1, value=depth - 1, step=1, label="Block", elem_id="layer")
                token = gr.Dropdown(list(token_names(viewer.registers(test_time=False))), label="Attention of")
                head = gr.Dropdown([MEAN, *map(str, range(heads))], value=MEAN, label="Head")
                test_time = gr.Checkbox(label="Test-time registers", elem_id="test-time")
            with gr.Column(scale=3, min_width=340):
                maps = gr.HTML(elem_id="maps", elem_classes=["one"] if len(models) == 1 else None)
        controls = [key, patch, layer, head, token, test_time]
        wiring: dict[str, Any] = {
            "outputs": [key, patch, picture, maps, state, token, listed],
            "show_progress": "minimal",
            "trigger_mode": "always_last",
        }
        changes = [blocks.load, layer.change, head.input, token.input, test_time.input]
        gr.on(changes, page.draw, controls, api_name="draw", **wiring)
        listed.input(page.choose, [listed, *controls], api_name="choose", **wiring)
        upload.upload(page.upload, [upload, *controls], api_name="upload", **wiring)
        picture.select(page.click, controls, api_name="click", **wiring)
    return blocks


def list_label(viewer: Viewer) -> str:
    """What stands above the list of pictures."""
    left_out = viewer.pictures.listed - MOST_LISTED
    return (
        "Picture"
        if left_out <= 0
        else f"Picture (the first {MOST_LISTED:,} of the folder; {left_out:,} are not listed)"
    )


def launch(blocks: gr.Blocks, host: str, port: int) -> None:
    """Answer in other threads; nothing is shared, loaded from elsewhere or reported to anybody."""
    blocks.queue(default_concurrency_limit=AT_ONCE)
    blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MOST_BYTES,
        theme=gr.themes.Default(font=FONT, font_mono=("ui-monospace", "monospace")),
        css=CSS,
    )
