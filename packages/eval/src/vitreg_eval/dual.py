"""Models that read images and texts: ours, or any of open_clip's in its own class."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from vitreg_core.backbones.adapter import Adapter, Shape, pair
from vitreg_core.capturing import Arguments, Captured
from vitreg_core.config import PreprocessConfig, validate
from vitreg_core.data.images import Preprocess
from vitreg_core.errors import InputError
from vitreg_core.extras import require
from vitreg_core.features import QKV, Features
from vitreg_core.presets import list_models
from vitreg_core.weights.clip import load_clip
from vitreg_core.weights.files import read_config, weights_file
from vitreg_core.weights.openclip import CONFIG
from vitreg_core.weights.sources import TOWERS, from_hub, locate

Tokenize = Callable[[list[str]], Int[Tensor, "n context"]]
"""From texts to tokens; texts that are too long lose their end."""
OWN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}
"""What our dual encoder knows of a text tower; a tower of which more is said runs in open_clip's class."""
RESIZE: dict[str, Literal["shorter", "squash"]] = {"shortest": "shorter", "squash": "squash"}
EXTRA = ("open_clip", "open-clip")


class Dual(Adapter):
    """A dual encoder. As a backbone it has a single token in a single block: an image's place in the joint space.

    `model` has `encode_image` and `encode_text`, as the models of open_clip and our `DualEncoder` have.
    """

    attention_path = hidden_path = patches_path = blocks_path = norm_path = ""

    def __init__(self, model: nn.Module, preprocess: Preprocess, tokenize: Tokenize) -> None:
        super().__init__(
            model, Shape(patch_size=1, embed_dim=1, num_heads=1, class_token=True, num_registers=0), preprocess
        )
        self.tokenize = tokenize
        self.embed_dim = self.encode_text([""]).shape[1]

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        """Texts in the joint space, of length 1, in float32."""
        tokens = self.tokenize(list(texts)).to(self.device)
        encoder: Any = self.model
        return F.normalize(encoder.encode_text(tokens).float(), dim=-1)

    def too_long(self, texts: Sequence[str]) -> int:
        """How many texts lose their end, where the tokenizer is open_clip's own; 0 for others."""
        encode = getattr(self.tokenize, "encode", None)
        length = getattr(self.tokenize, "context_length", None)
        if encode is None or length is None:
            return 0
        return sum(len(encode(text)) + 2 > length for text in texts)  # a token before and one after

    def features(self, images: Float[Tensor, "b 3 height width"]) -> Features:
        """Images in the joint space, of any length, as class tokens; no other tokens."""
        encoder: Any = self.model
        places = encoder.encode_image(images).float()
        none = places[:, None][:, :0]
        return Features(places, none, none, (0, 0))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The whole model."""
        return [self.model]

    @property
    def native(self) -> None:
        """Sizes are not told apart."""

    def run(self, images: Float[Tensor, "b 3 height width"]) -> None:
        """Run the image tower."""
        self.features(images)

    def look(self, images: Tensor, layers: Sequence[int], *parts: str) -> Captured:  # noqa: ARG002 (as the adapters)
        """Refuse to show what is inside."""
        raise no_inside()

    def project(self, attention: nn.Module, tokens: Tensor) -> QKV:  # noqa: ARG002
        """Refuse to show what is inside."""
        raise no_inside()

    def weights(self, attention: nn.Module, arguments: Arguments) -> Tensor:  # noqa: ARG002
        """Refuse to show what is inside."""
        raise no_inside()


def no_inside() -> InputError:
    """What the user is told who asks for tokens."""
    return InputError("a dual encoder gives one vector for each image; to see tokens, open its image tower alone")


def open_model(source: str) -> Dual:
    """Open a dual encoder, in evaluation mode on the CPU.

    Args:
        source: a folder that open_clip or a run wrote, `open_clip:ARCH/TAG`, or `hub:org/name`. What our model cannot
            hold (other image towers, other text towers) runs in open_clip's own class.

    Raises:
        InputError: nothing there, no text tower in it, open_clip is not installed, or neither our model nor open_clip's
            can hold it.
    """
    if source in list_models() and not Path(source).exists():
        raise InputError(f"{source}: a preset has no text tower; give a dual encoder, such as open_clip:ARCH/TAG")
    require(*EXTRA, f"the text tower of {source}")
    kind, _, name = source.partition(":")
    remote = kind == "hub" and bool(name) and not Path(source).exists()
    file = clip_file(from_hub(name, TOWERS) if remote else locate(source))
    try:
        dual = build_own(file)
    except InputError as reason:
        dual = build_foreign(file, source, reason)
    dual.source = source
    return dual.eval()


def clip_file(where: Path) -> Path:
    """The weights of a source; in folders that hold several, those in open_clip's names."""
    found = (where / name for name in TOWERS if where.is_dir() and (where / name).is_file())
    return next(found, None) or weights_file(where)


def build_own(file: Path) -> Dual:
    """Our dual encoder.

    Raises:
        InputError: it cannot hold the weights.
    """
    text = text_section(file)
    if more := sorted(key for key, value in text.items() if key not in OWN_TEXT and value not in (None, False)):
        raise InputError(f"{file.parent / CONFIG}: a text tower with {', '.join(more)} is not known here")
    model = load_clip(file)
    from open_clip import SimpleTokenizer

    length, words = model.config.text.context_length, model.config.text.vocab_size
    tokenize = SimpleTokenizer(context_length=length)
    if words < tokenize.vocab_size:
        raise InputError(f"{file}: {words} tokens in the text tower, {tokenize.vocab_size} in open_clip's tokenizer")
    return Dual(model, model.visual.preprocess, tokenize)


def text_section(file: Path) -> Mapping[str, Any]:
    """What the config beside the weights says of the text tower.

    Raises:
        InputError: the config is damaged.
    """
    section: Any = read_config(file.parent / CONFIG)
    for name in ("model_cfg", "text_cfg"):
        section = section.get(name, {})
        if not isinstance(section, Mapping):
            raise InputError(f"{file.parent / CONFIG}: {name} is no object of names and values; write it again")
    return section


def build_foreign(file: Path, source: str, reason: InputError) -> Dual:
    """The class of open_clip around weights that ours cannot hold.

    Raises:
        InputError: no config of open_clip beside them with a text tower (gives our reason), or open_clip cannot build
            it either.
    """
    folder = file.parent
    if not text_section(file):
        raise reason
    clip = require(*EXTRA, str(folder))
    try:
        model = clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        return Dual(model.eval(), read_preprocess(model, folder), clip.get_tokenizer(tokenizer_name(source, folder)))
    except InputError:
        raise
    except Exception as error:  # libraries fail on weights in ways that nobody lists
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{reason}; open_clip cannot build it either ({said})") from None


def tokenizer_name(source: str, folder: Path) -> str:
    """How open_clip finds the tokenizer of a source: by its own name where the model is not on this disk."""
    kind, _, name = source.partition(":")
    if Path(source).exists() or not name:
        return f"local-dir:{folder}"
    return name.partition("/")[0] if kind == "open_clip" else f"hf-hub:{name.partition('@')[0]}"


def read_preprocess(model: Any, folder: Path) -> Preprocess:  # noqa: ANN401 (a class of open_clip)
    """What open_clip does to an image in evaluation.

    Raises:
        InputError: a setting that is not known here.
    """
    config = model.visual.preprocess_cfg
    size = set(pair(config["size"]))
    if config["resize_mode"] not in RESIZE or len(size) > 1:
        raise InputError(
            f"{folder}: resize_mode={config['resize_mode']!r} to {sorted(size)} pixels is not supported; "
            f"give a model of square images and one of {', '.join(RESIZE)}"
        )
    values = {"image_size": size.pop(), "resize": RESIZE[config["resize_mode"]]}
    rest = {name: config[name] for name in ("interpolation", "mean", "std")}
    return Preprocess(validate(PreprocessConfig, {**values, **rest}, str(folder / CONFIG)))
