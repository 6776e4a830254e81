"""Our presets in timm's registry, as `vitreg_<preset>`; importing this module puts them there."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

from jaxtyping import Float
from torch import Tensor, nn

from vitreg_core.config import ViTConfig, override, validate
from vitreg_core.errors import InputError
from vitreg_core.extras import require
from vitreg_core.features import Features
from vitreg_core.presets import list_models, preset_config
from vitreg_core.vit import VisionTransformer
from vitreg_core.weights.files import read_config

registry = require("timm", "timm", "vitreg_core.timm").models

Pool = Literal["token", "avg", ""]
POOLS = {"token": "cls", "avg": "avg", "": "cls"}
default_cfgs = {
    f"vitreg_{preset}": {
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "num_classes": 1000,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    for preset in list_models()
}
"""What timm knows of each model (the name is the one it looks for); there are no weights behind them."""


TIMM_FIELDS = {"reg_tokens": "registers", "init_values": "layer_scale"}
"""Timm's names of fields of `ViTConfig`; `dynamic_img_size` needs no field, as every size is taken."""


class TimmVisionTransformer(VisionTransformer):
    """Our model as timm's users call it: the forward pass gives logits, or what the head would read without one."""

    global_pool: Pool = "token"
    """What the head reads: the class token, the mean of the patches, or every token."""

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b *_"]:  # type: ignore[override]
        """Logits; without a head the pooled token, or all tokens where nothing is pooled."""
        return self.forward_head(self.forward_features(images))

    def features(self, images: Float[Tensor, "b 3 height width"]) -> Features:
        """Tokens after the final norm, by kind."""
        return super().forward(images)

    def pooled(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b *_"]:
        """What the head reads."""
        return super().pooled(tokens) if self.global_pool else tokens

    def forward_head(self, tokens: Float[Tensor, "b n d"], *, pre_logits: bool = False) -> Float[Tensor, "b *_"]:
        """Logits for the tokens of `forward_features`; what the head reads with `pre_logits` or without a head."""
        read = self.fc_norm(self.pooled(tokens))
        return read if pre_logits or self.head is None else self.head(read)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; `global_pool` changes what it reads."""
        self.global_pool = self.global_pool if global_pool is None else checked_pool(global_pool)
        super().reset_classifier(num_classes, "avg" if self.global_pool == "avg" else "token")


def checked_pool(pool: str) -> Pool:
    """Refuse pooling that the model does not have."""
    if pool not in POOLS:
        raise InputError(f"global_pool={pool!r} is not one of {', '.join(map(repr, POOLS))}; give one of these")
    return cast(Pool, pool)


def build(
    preset: str,
    *,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    global_pool: str = "token",
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    in_chans: int = 3,
    **fields: object,
) -> TimmVisionTransformer:
    """Build a preset from timm's arguments and fields of `ViTConfig`.

    As in timm, drop path rises linearly with the depth, and a model built for the mean of the patches has its final
    norm after it.

    Raises:
        InputError: an unknown field (with the nearest), dropout, which the models do not have, or not 3 channels.
    """
    renamed = {TIMM_FIELDS.get(name, name): value for name, value in fields.items() if name != "dynamic_img_size"}
    if drop_rate or in_chans != 3:
        raise InputError(f"drop_rate={drop_rate}, in_chans={in_chans}: vitreg models have no dropout and 3 channels")
    pool = checked_pool(global_pool)
    settings: dict[str, object] = {
        "image_size": img_size,
        "num_classes": num_classes,
        "pool": POOLS[pool],
        "norm_pooled": pool == "avg",
        "drop_path": drop_path_rate,
        "drop_path_schedule": "linear",
    }
    model = TimmVisionTransformer(override(preset_config(preset), {**settings, **renamed}), source=f"vitreg_{preset}")
    model.global_pool = pool
    return model


def entrypoint(preset: str) -> Callable[..., nn.Module]:
    """The function that timm calls for a preset."""

    def create(*, pretrained: bool = False, **arguments: object) -> nn.Module:
        return registry.build_model_with_cfg(
            build_preset,
            create.__name__,
            pretrained,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **arguments,
        )

    def build_preset(**arguments: object) -> TimmVisionTransformer:
        return build(preset, **arguments)  # type: ignore[arg-type]

    create.__name__ = create.__qualname__ = f"vitreg_{preset}"
    create.__doc__ = f"Build {preset} with random weights, from the arguments of timm's ViT and fields of ViTConfig."
    return create


def register_open_clip(folder: str | Path) -> str:
    """Put the image tower of a saved dual encoder into timm's registry, where open_clip looks for it.

    After it `open_clip.create_model_and_transforms("local-dir:FOLDER")` opens the folder.

    Args:
        folder: what `DualEncoder.export` wrote for a model with registers.

    Returns:
        The name in the registry.

    Raises:
        InputError: the folder holds no such model.
    """
    where = Path(folder) / "open_clip_config.json"
    config = read_config(where)
    name = config.get("model_cfg", {}).get("vision_cfg", {}).get("timm_model_name", "")
    if not str(name).startswith("vitreg_") or "vitreg" not in config:
        raise InputError(f"{where}: names no image tower of vitreg; give a folder that a dual encoder was exported to")
    vision = validate(ViTConfig, config["vitreg"].get("vision", {}), str(where))

    def tower(*, drop_path_rate: float = 0.0, **_: object) -> nn.Module:  # open_clip loads weights and makes the head
        changes = {"num_classes": 0, "drop_path": drop_path_rate, "drop_path_schedule": "linear"}
        model = TimmVisionTransformer(override(vision, changes), source=name)
        model.default_cfg = default_cfgs[name]  # type: ignore[assignment]
        return model

    tower.__name__ = tower.__qualname__ = name
    tower.__doc__ = f"Build the image tower of {folder} with random weights."
    tower.__module__ = __name__
    default_cfgs.setdefault(name, {**default_cfgs[f"vitreg_{list_models()[0]}"], "num_classes": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, where the name is there already
        registry.register_model(tower)
    return name


for _preset in list_models():
    registry.register_model(entrypoint(_preset))
