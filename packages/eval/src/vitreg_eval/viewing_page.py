"""The maps of the viewer as a piece of a page: small pictures in the text itself, which load nothing."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from vitreg_eval.viewing import Choice, View

SIDE = 256
"""Pixels of the longer side of a map, about."""
CLICKED, OUTLIER, SEED, BOX = "#ffd400", "#00e5ff", "#ff2d2d", "#ff2d2d"

Pixels = UInt8[np.ndarray, "height width 3"]


class Mark(NamedTuple):
    """A patch to be framed."""

    row: int
    col: int
    colour: str


class Scale(NamedTuple):
    """How values become colours."""

    colours: str
    """Name of a colour map of matplotlib."""
    low: float
    high: float

    def paint(self, values: Float[np.ndarray, "rows cols"]) -> UInt8[np.ndarray, "rows cols 3"]:
        """Colours of values; those beyond the ends count as the ends."""
        span = max(self.high - self.low, 1e-12)
        return matplotlib.colormaps[self.colours](np.clip((values - self.low) / span, 0, 1), bytes=True)[..., :3]

    def legend(self, low: str, high: str) -> str:
        """A bar of the colours between the words for its ends."""
        stops = self.paint(np.linspace(self.low, self.high, 9)[None])[0].tolist()
        colours = ",".join(f"rgb({red},{green},{blue})" for red, green, blue in stops)
        gradient = f"background:linear-gradient(90deg,{colours})"
        return f'<div class="bar"><span>{escape(low)}</span><i style="{gradient}"></i><span>{escape(high)}</span></div>'


@dataclass(frozen=True, eq=False)
class Shown:
    """What the page shows of a picture."""

    views: Sequence[View]
    """One of each model."""
    plain: Sequence[View]
    """The same without test-time registers: colour scales span both, so that the switch can be compared."""
    choice: Choice

    def highest(self, values: Callable[[View], np.ndarray | None]) -> float:
        """Largest of some values of all views, above 0; 1 where there are none."""
        found = (values(view) for view in (*self.views, *self.plain))
        return max((max(float(one.max()), 1e-12) for one in found if one is not None), default=1.0)


def maps_page(shown: Shown) -> str:
    """All maps of a picture as HTML."""
    parts = (attention_card, norm_card, similarity_card, component_card, lost_card)
    return f'<div class="maps">{"".join(part(shown) for part in parts)}</div>'


def card(title: str, about: str, figures: str, legend: str = "", *, kind: str = "") -> str:
    """One kind of map: a title, a line on how to read it, figures, the colour scale."""
    return f'<section class="card {kind}"><h3>{escape(title)}</h3><p>{escape(about)}</p>{figures}{legend}</section>'


def row(figures: Iterable[str]) -> str:
    """Figures side by side."""
    return f'<div class="row">{"".join(figures)}</div>'


def figure(pixels: Pixels, name: str, words: str, alt: str) -> str:
    """A picture with words below it."""
    return f'<figure><img src="{data_uri(pixels)}" alt="{escape(alt, quote=True)}">{caption(name, words)}</figure>'


def caption(name: str, words: str = "") -> str:
    """What stands below a picture."""
    return f"<figcaption><b>{escape(name)}</b> {escape(words)}</figcaption>"


def attention_card(shown: Shown) -> str:
    """Attention of the chosen token."""
    choice, scale = shown.choice, Scale("viridis", 0.0, shown.highest(lambda view: view.attention))
    who = {"cls": "the class token", "patch": "the clicked patch"}.get(choice.token, choice.token)
    head = "mean over heads" if choice.head is None else f"head {choice.head}"

    def one(view: View) -> str:
        if view.attention is None:
            return f'<figure><div class="none">{escape(view.missing)}</div>{caption(view.name)}</figure>'
        median = float(np.median(view.attention))
        peak = f", largest / median {view.attention.max() / median:,.0f}" if median > 0 else ""
        pixels = painted(scale.paint(view.attention), [Mark(*view.patch, CLICKED)] * (choice.token == "patch"))  # noqa: S105
        return figure(pixels, view.name, f"block {view.layer}{peak}", f"attention map of {view.name}")

    about = f"Where {who} looks, {head}; each map sums to 1."
    return card("Attention", about, row(map(one, shown.views)), scale.legend("0", f"{scale.high:.2g}"))


def norm_card(shown: Shown) -> str:
    """Norms, outliers marked."""
    logs = [np.log(view.maps.norms) for view in (*shown.views, *shown.plain)]
    scale = Scale("magma", min(float(one.min()) for one in logs), max(float(one.max()) for one in logs))

    def one(view: View) -> str:
        maps = view.maps
        marks = [Mark(int(row), int(col), OUTLIER) for row, col in np.argwhere(maps.outliers)]
        count = len(marks)
        verdict = (
            f"{count} outlier{'s' * (count > 1)}, {maps.ratio or 0:.1f} times the others" if count else "no outliers"
        )
        pixels = painted(scale.paint(np.log(maps.norms)), marks)
        return figure(pixels, view.name, f"block {view.layer}, {verdict}", f"norm map of {view.name}: {verdict}")

    about = "Length of each patch token after the block, logarithmic; outliers are framed."
    ends = (f"{np.exp(end):.3g}" for end in (scale.low, scale.high))
    return card("Norms", about, row(map(one, shown.views)), scale.legend(*ends))


def similarity_card(shown: Shown) -> str:
    """Similarity to the clicked patch."""
    scale = Scale("RdBu_r", -1.0, 1.0)

    def one(view: View) -> str:
        pixels = painted(scale.paint(view.similarity), [Mark(*view.patch, CLICKED)])
        row, col = view.patch
        return figure(pixels, view.name, f"row {row}, column {col}", f"similarity map of {view.name}")

    about = "Cosine of each patch token to the clicked one."
    return card("Similarity", about, row(map(one, shown.views)), scale.legend("-1", "1"))


def component_card(shown: Shown) -> str:
    """Principal components."""
    figures = (
        figure(painted((255 * view.maps.components).astype(np.uint8)), view.name, "", f"PCA map of {view.name}")
        for view in shown.views
    )
    about = "First three principal components of the patch tokens, as red, green and blue; for each model by itself."
    return card("PCA", about, row(figures))


def lost_card(shown: Shown) -> str:
    """The steps of LOST: a strip for each model."""
    score = shown.highest(lambda view: view.maps.lost.score)
    similar = shown.highest(lambda view: np.sort(np.abs(view.maps.lost.similarity.ravel()))[-2:-1])  # but the seed
    strips = [(caption(view.name), lost_steps(view, score, similar)) for view in shown.views]
    figures = "".join(f"{name}{row(steps)}" for name, steps in strips)
    about = (
        "Finding an object from the keys of the block, less their mean: the patch that is similar to the fewest others "
        "is the seed (framed); patches like it vote for a mask; the part around the seed gives the box."
    )
    return card("LOST, step by step", about, figures, kind="wide")


def lost_steps(view: View, score: float, similar: float) -> list[str]:
    """Pictures of the steps for one model; the colours of score and similarity end at these values."""
    lost = view.maps.lost
    seed = [Mark(*lost.seed, SEED)]
    grey = Scale("gray", 0.0, 2.0)
    steps = (
        ("score", painted(Scale("viridis", 0.0, score).paint(lost.score), seed)),
        ("similarity to the seed", painted(Scale("RdBu_r", -similar, similar).paint(lost.similarity), seed)),
        ("voters", painted(grey.paint(2.0 * lost.voters), seed)),
        ("mask and object", painted(grey.paint(lost.mask + 1.0 * lost.component), seed)),
        ("box", framed(lost.image, lost.box)),
    )
    return [figure(pixels, "", name, f"LOST, {name}, {view.name}") for name, pixels in steps]


def painted(colours: UInt8[np.ndarray, "rows cols 3"], marks: Sequence[Mark] = ()) -> Pixels:
    """A map with every patch as a square of many pixels, some of them framed."""
    side = patch_side(max(colours.shape[:2]))
    image = Image.fromarray(colours.repeat(side, axis=0).repeat(side, axis=1))
    draw = ImageDraw.Draw(image)
    for row, col, colour in marks:
        corners = (col * side, row * side, (col + 1) * side - 1, (row + 1) * side - 1)
        draw.rectangle(corners, outline="black", width=3)
        draw.rectangle(corners, outline=colour, width=2)
    return np.asarray(image)


def patch_side(patches: int) -> int:
    """Pixels of a patch in a map with so many patches along its longer side."""
    return max(SIDE // patches, 4)


def framed(pixels: Float[np.ndarray, "height width 3"], box: Sequence[int]) -> Pixels:
    """The picture with a box around what was found."""
    image = Image.fromarray((255 * pixels).astype(np.uint8))
    x0, y0, x1, y1 = box
    ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), outline=BOX, width=max(2, image.width // 80))
    return np.asarray(image)


def clickable_size(pixels: Float[np.ndarray, "height width 3"]) -> tuple[int, int]:
    """Height and width of a picture as `clickable` gives it: a whole number of times larger where it is small."""
    height, width = pixels.shape[:2]
    factor = max(1, 448 // max(height, width))
    return height * factor, width * factor


def clickable(pixels: Float[np.ndarray, "rows cols 3"], view: View) -> Pixels:
    """The picture with the clicked patch framed."""
    (rows, cols), (row, col) = view.similarity.shape, view.patch
    height, width = clickable_size(pixels)
    image = Image.fromarray((255 * pixels).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    left, top, right, bottom = (
        round(place)
        for place in (
            col * width / cols,
            row * height / rows,
            (col + 1) * width / cols - 1,
            (row + 1) * height / rows - 1,
        )
    )
    draw = ImageDraw.Draw(image)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="black", width=4)
    draw.rectangle((left, top, right, bottom), outline=CLICKED, width=2)
    return np.asarray(image)


def data_uri(pixels: Pixels) -> str:
    """A picture as text: PNG for flat squares; JPEG would smear them."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
