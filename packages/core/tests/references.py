"""The models to match: small peers of every published family with random weights, and the files that carry them.

timm, transformers and open_clip give the peers and, where they write files, the names. The names of DINO, DINOv2,
DINOv3, DeiT-III and MAE are given to peers of the same architecture, whose positions are resized here as those do it.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from einops import rearrange
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

Tensors = dict[str, Tensor]
Size = tuple[int, int]


@dataclass
class Seen:
    """What a peer computes for a batch of images."""

    tokens: Tensor
    """After the final norm, `b n d`."""
    stream: list[Tensor]
    """After each block, before any norm."""
    attention: list[Tensor]
    """Weights of each block after the softmax, `b h n n`."""


@dataclass
class Reference:
    """A peer, its file and what it computes."""

    path: Path
    """What `load_model` is given."""
    run: Callable[[Tensor], Seen]
    size: Size
    """Native height and width in pixels."""
    patch: int
    logits: Callable[[Tensor], Tensor] | None = None
    """What the head says, where the file has one."""
    any_size: bool = False
    """Whether the peer takes images that its patches do not divide."""
    native_only: bool = False


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter values that matter, so that none can be mapped wrongly or left out unseen."""
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        if "gamma" in name or "lambda1" in name:
            value.copy_(0.5 + 0.2 * noise)
        elif value.ndim == 1 and name.endswith("weight"):
            value.copy_(1 + 0.2 * noise)
        elif name.endswith(("weight", "proj")) and value.ndim > 1 and "embedding.weight" not in name:
            value.copy_(noise * value[0].numel() ** -0.5)
        else:
            value.copy_(0.3 * noise)
        if re.search("embed|conv1|token", name):  # so small that the first norm's epsilon shows
            value.mul_(0.03)
    return model.eval()


def watch(blocks: nn.ModuleList, attention: Callable[[nn.Module], nn.Module], run: Callable[[], Tensor]) -> Seen:
    """Run a model and keep what its blocks, and the modules that see the softmax, give."""
    stream: list[Tensor] = []
    weights: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, output: stream.append(output)) for block in blocks]
    hooks += [attention(block).register_forward_hook(lambda _, __, output: weights.append(output)) for block in blocks]
    tokens = run()
    for hook in hooks:
        hook.remove()
    return Seen(tokens, stream, weights)


def write(path: Path, tensors: Tensors, **configs: object) -> Path:
    """Write tensors, and configs as JSON files beside them; returns the folder."""
    path.mkdir()
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    for name, config in configs.items():
        (path / f"{name}.json").write_text(json.dumps(config))
    return path


def save(path: Path, content: object) -> Path:
    """Write what a training script would."""
    torch.save(content, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


# timm ---------------------------------------------------------------------------------------------------------------


SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3, "img_size": 112}


def timm_model(name: str, **changes: Any) -> nn.Module:  # noqa: ANN401 (timm's own)
    """A model of timm whose attention weights can be seen."""
    model = randomise(timm.create_model(name, dynamic_img_size=True, **changes))
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def see_timm(model: nn.Module, images: Tensor) -> Seen:
    return watch(model.blocks, lambda block: block.attn.attn_drop, lambda: model.forward_features(images))


def timm_config(name: str, **more: object) -> dict[str, object]:
    return {"architecture": name, "pretrained_cfg": {"crop_pct": 0.9}, **more}


def from_timm(name: str, **changes: Any) -> Callable[[Path], Reference]:  # noqa: ANN401 (timm's own)
    """A small model in a file as timm's repositories hold it."""
    return from_timm_full(name, **{**SMALL, **changes})


def from_timm_full(name: str, **changes: Any) -> Callable[[Path], Reference]:  # noqa: ANN401 (timm's own)
    """The same at the size of its name."""

    def build(folder: Path) -> Reference:
        model = timm_model(name, **changes)
        size = model.patch_embed.img_size
        config = timm_config(name, global_pool=model.global_pool)
        config["model_args"] = {"img_size": size[0]}
        return Reference(
            write(folder / "model", model.state_dict(), config=config),
            lambda images: see_timm(model, images),
            size,
            model.patch_embed.patch_size[0],
            model if model.num_classes else None,
        )

    return build


# official names on timm's models ------------------------------------------------------------------------------------


def resized(table: Tensor, native: Size, grid: Size, mode: str) -> Tensor:
    """Positions `1 n d` with a class row, or without, for another grid, as the official code does it."""
    prefix = table.shape[1] - native[0] * native[1]
    patches = rearrange(table[:, prefix:], "1 (rows cols) d -> 1 d rows cols", rows=native[0])
    if grid == native:
        return table
    if mode == "offset":
        scale = ((grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1])
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=False)
    else:
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=mode == "antialias")
    return torch.cat([table[:, :prefix], rearrange(patches, "1 d rows cols -> 1 (rows cols) d")], dim=1)


def see_resized(model: nn.Module, images: Tensor, mode: str) -> Seen:
    """What a timm model computes with positions resized as the mode says."""
    patch, table, native = model.patch_embed.patch_size[0], model.pos_embed, model.patch_embed.grid_size
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    model.pos_embed = nn.Parameter(resized(table, native, grid, mode))
    model.patch_embed.grid_size = grid
    seen = see_timm(model, images)
    model.pos_embed, model.patch_embed.grid_size = table, native
    return seen


def rename(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Tensors:
    """Replace parts of names."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = re.sub(old, new, name)
        renamed[name] = tensor.detach().clone()
    return renamed


def official(
    name: str,
    mode: str,
    pack: Callable[[Path, Tensors], Path],
    names: Mapping[str, str] | None = None,
    *,
    dropped: tuple[str, ...] = (),
    change: Callable[[nn.Module], None] | None = None,
    **changes: Any,  # noqa: ANN401 (timm's own)
) -> Callable[[Path], Reference]:
    """A timm model under official names.

    Args:
        name: of the timm model.
        mode: how positions are resized: "offset", "size" or "antialias".
        pack: writes the renamed tensors as the project publishes them.
        names: replacements in timm's names.
        dropped: beginnings of names that the project's files do not have.
        change: edits the model before it is saved.
        changes: arguments of the timm model.
    """

    def build(folder: Path) -> Reference:
        model = timm_model(name, **{**SMALL, **changes})
        if change is not None:
            with torch.no_grad():
                change(model)
        tensors = {n: t for n, t in rename(model.state_dict(), names or {}).items() if not n.startswith(dropped)}
        return Reference(
            pack(folder / "weights", tensors),
            lambda images: see_resized(model, images, mode),
            model.patch_embed.img_size,
            model.patch_embed.patch_size[0],
            model if model.num_classes else None,
        )

    return build


def zero_class_position(model: nn.Module) -> None:
    model.pos_embed[:, 0] = 0


def with_mask(path: Path, tensors: Tensors) -> Path:
    return save(path, tensors | {"mask_token": torch.randn(1, tensors["cls_token"].shape[-1])})


def dino_checkpoint(path: Path, tensors: Tensors) -> Path:
    """What DINO saves in training: two networks with heads, under wrappers."""
    teacher = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    teacher["head.mlp.0.weight"] = torch.zeros(2, 2)
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    return save(path, {"student": student, "teacher": teacher, "epoch": 3})


def dinov2_checkpoint(path: Path, tensors: Tensors) -> Path:
    """What DINOv2 saves in training: chunked blocks, and heads, under `teacher`."""
    chunked = {re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", name): tensor for name, tensor in tensors.items()}
    chunked["mask_token"] = torch.randn(1, tensors["cls_token"].shape[-1])
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight_g": torch.zeros(2, 1)}
    return save(path, {"teacher": {f"backbone.{name}": tensor for name, tensor in chunked.items()} | heads})


def under_model(path: Path, tensors: Tensors) -> Path:
    return save(path, {"model": tensors, "epoch": 800})


def autoencoder(path: Path, tensors: Tensors) -> Path:
    """MAE with its decoder."""
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 96)}
    return save(path, {"model": tensors | extra})


def with_class_row(path: Path, tensors: Tensors) -> Path:
    """Give the class token a row of positions again, which timm's register models hold added up."""
    row = torch.randn_like(tensors["cls_token"])
    apart = {"cls_token": tensors["cls_token"] - row, "pos_embed": torch.cat([row, tensors["pos_embed"]], dim=1)}
    return with_mask(path, tensors | apart)


SWIGLU = {r"mlp\.fc1": "mlp.w12", r"mlp\.fc2": "mlp.w3"}
DEIT3 = {r"ls(\d)\.gamma": r"gamma_\1", "reg_token$": "reg_tokens"}
DINOV3 = {r"gamma_(\d)": r"ls\1.gamma", "reg_token": "storage_tokens", "fc1_g": "w1", "fc1_x": "w2"}


def dinov3(name: str, **extra: Tensor) -> Callable[[Path], Reference]:
    """DINOv3's official names: a packed bias whose middle third is masked, periods, and more tensors."""

    def build(folder: Path) -> Reference:
        model = timm_model(name, **SMALL)
        names = DINOV3 | ({"fc2": "w3"} if "plus" in name else {})
        tensors = rename(model.state_dict(), names) | {"mask_token": torch.randn(1, 96), **extra}
        tensors["rope_embed.periods"] = (100.0 ** (torch.arange(8) / 8)).bfloat16()
        for block in range(2):
            start = f"blocks.{block}.attn."
            queries, values = tensors.pop(f"{start}q_bias"), tensors.pop(f"{start}v_bias")
            tensors[f"{start}qkv.bias"] = torch.cat([queries, torch.ones(96), values])
            tensors[f"{start}qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(96)
        return Reference(save(folder / "weights", tensors), lambda images: see_timm(model, images), (224, 224), 16)

    return build


# transformers -------------------------------------------------------------------------------------------------------


WITH_HEAD = ("ViTForImageClassification", "CLIPVisionModelWithProjection")


def from_transformers(
    cls: str,
    config: Callable[[], Any],
    *,
    new_names: bool = False,
    tower: Callable[[Any], Any] = lambda model: model,
) -> Callable[[Path], Reference]:
    """A folder as transformers writes it, or one with the names of its modules in version 5."""

    def build(folder: Path) -> Reference:
        theirs = config()
        theirs._attn_implementation = "eager"
        model = randomise(getattr(transformers, cls)(theirs))
        if new_names:
            write(folder / "model", model.state_dict(), config=theirs.to_dict())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.save_pretrained(folder / "model")
        image = getattr(theirs, "vision_config", theirs)
        return Reference(
            folder / "model",
            lambda images: see_transformers(tower(model), images),
            (image.image_size, image.image_size),
            image.patch_size,
            (lambda images: model(images, interpolate_pos_encoding=True)[0]) if cls in WITH_HEAD else None,
            any_size=True,
        )

    return build


def see_transformers(model: nn.Module, images: Tensor) -> Seen:
    kind = type(model).__name__
    more = {} if kind.startswith(("Dinov2", "DINOv3")) else {"interpolate_pos_encoding": True}
    output = model(images, output_hidden_states=True, output_attentions=True, **more)
    stream = list(output.hidden_states[1:])
    norm = {"CLIP": "post_layernorm", "DINOv": "norm"}.get(re.sub("(3|Vision).*", "", kind), "layernorm")
    return Seen(getattr(model, norm)(stream[-1]), stream, list(output.attentions))


def sizes(kind: type, **more: object) -> Callable[[], Any]:
    """A small config of transformers."""
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 112, "patch_size": 14}
    if kind is not transformers.Dinov2Config and kind is not transformers.Dinov2WithRegistersConfig:
        small["intermediate_size"] = 96
    return lambda: kind(**small, **more)


def clip_config() -> Any:  # noqa: ANN401 (transformers' own)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    vision = sizes(transformers.CLIPVisionConfig)().to_dict()
    return transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=10)


# open_clip ----------------------------------------------------------------------------------------------------------


def clip_model(*, quick_gelu: bool, custom_text: bool, image_size: int | Size) -> nn.Module:
    vision = {"image_size": image_size, "patch_size": 16, "layers": 2, "width": 128}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    return randomise(kind(24, vision, text, quick_gelu=quick_gelu))


def see_open_clip(tower: nn.Module, images: Tensor) -> Seen:
    """What open_clip's tower computes; its attention weights are asked for again, as its blocks leave them out."""
    weights: list[Tensor] = []

    def ask(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read = block.ln_1(inputs[0])
        weights.append(block.attn(read, read, read, need_weights=True, average_attn_weights=False)[1])

    hooks = [block.register_forward_pre_hook(ask) for block in tower.transformer.resblocks]
    stream: list[Tensor] = []
    hooks += [
        block.register_forward_hook(lambda _, __, output: stream.append(output))
        for block in tower.transformer.resblocks
    ]
    tower(images)
    for hook in hooks:
        hook.remove()
    return Seen(tower.ln_post(stream[-1]), stream, weights)


def from_open_clip(
    *, quick_gelu: bool = False, custom_text: bool = False, bare: bool = False
) -> Callable[[Path], Reference]:
    """A file of open_clip with its config; other sizes are built anew and loaded, as open_clip has it."""

    def build(folder: Path) -> Reference:
        native = 112
        model = clip_model(quick_gelu=quick_gelu, custom_text=custom_text, image_size=native)

        def at(images: Tensor) -> nn.Module:
            if images.shape[2:] == (native, native):
                return model.visual
            other = clip_model(quick_gelu=quick_gelu, custom_text=custom_text, image_size=tuple(images.shape[2:]))
            tensors = dict(model.state_dict())
            resize_pos_embed(tensors, other)
            other.load_state_dict(tensors)
            return other.visual

        tower = {"vision_cfg": {"image_size": native, "head_width": 64}, "quick_gelu": quick_gelu}
        tensors = (model.visual if bare else model).state_dict()
        return Reference(
            write(folder / "model", tensors, open_clip_config={"model_cfg": tower}),
            lambda images: see_open_clip(at(images), images),
            (native, native),
            16,
            lambda images: at(images)(images),
        )

    return build


def from_trunk(folder: Path) -> Reference:
    """An open_clip model whose image tower is timm's."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    model = randomise(open_clip.CustomTextCLIP(24, vision, text))
    trunk = model.visual.trunk
    for block in trunk.blocks:
        block.attn.fused_attn = False
    path = write(folder / "model", model.state_dict(), open_clip_config={"model_cfg": {"vision_cfg": vision}})
    return Reference(path, lambda images: see_timm(trunk, images), (160, 160), 16, model.visual, native_only=True)
