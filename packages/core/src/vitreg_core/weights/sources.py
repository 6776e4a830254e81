"""Where weights come from: every form of a model source, as a file or folder on this machine."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from vitreg_core.config import nearest
from vitreg_core.errors import InputError
from vitreg_core.extras import require
from vitreg_core.presets import list_models
from vitreg_core.weights.download import cache_folder, download
from vitreg_core.weights.files import read_config
from vitreg_core.weights.official import OFFICIAL
from vitreg_core.whole import write_json

CONFIGS = ("config.json", "preprocessor_config.json", "open_clip_config.json")
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""Names of weights in a repository, best first."""
TOWERS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
"""The same for open_clip, where `model.safetensors` may be the image tower in the names of another library."""


def from_hub(name: str, weights: Sequence[str] = WEIGHTS) -> Path:
    """Weights of a repository on the Hugging Face hub, with their configs beside them in its cache.

    Args:
        name: `org/name`, or `org/name@revision`.
        weights: names of the weights file, best first.

    Raises:
        InputError: no such repository, no access, no weights in it, or no network and nothing in the cache.
    """
    hub = require("huggingface_hub", "hub", f"model source hub:{name}")
    repository = name.partition("@")[0]
    address = f"https://huggingface.co/{repository}"
    try:
        file, offline = first_of(hub, name, weights, offline=False)
        if file is None and not offline:
            file, offline = first_of(hub, name, [f"{weight}.index.json" for weight in weights], offline=False)
            for part in sorted(set(read_config(file).get("weight_map", {}).values())) if file else ():
                first_of(hub, name, [part], offline=False)
        for config in CONFIGS if file else ():
            first_of(hub, name, [config], offline=offline)
    except hub.errors.GatedRepoError:
        raise InputError(f"hub:{name}: no access; accept its terms at {address} and run: hf auth login") from None
    except hub.errors.RepositoryNotFoundError:
        raise InputError(f"hub:{name}: no such repository; give org/name, if private after: hf auth login") from None
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"hub:{name}: cannot be fetched ({reason}); try again") from None
    if file:
        return file
    wanted = " or ".join(weights)
    if offline:
        raise InputError(
            f"hub:{name}: out of reach and not in the cache; put {wanted} from {address} into a folder, "
            f"with {CONFIGS[0]} beside it, and give the folder"
        )
    raise InputError(f"hub:{name}: holds no weights that can be read (looked for {wanted}); give another repository")


def first_of(hub: ModuleType, name: str, files: Sequence[str], *, offline: bool) -> tuple[Path | None, bool]:
    """The first of some files that a repository has, and whether the cache alone was asked at the end."""
    repository, _, revision = name.partition("@")
    for file in files:
        try:
            found = hub.hf_hub_download(repository, file, revision=revision or None, local_files_only=offline)
            return Path(found), offline
        except hub.errors.LocalEntryNotFoundError:  # no network: every further question would wait for it again
            offline = True
        except hub.errors.EntryNotFoundError:
            continue
    return None, offline


def from_transformers(name: str) -> Path:
    """Weights in the names of transformers."""
    return from_hub(name, ("model.safetensors", "pytorch_model.bin"))


def from_timm(name: str) -> Path:
    """Weights of timm: `architecture.tag`, or an architecture alone for its default weights, which timm must tell.

    Raises:
        InputError: timm does not know them (names the nearest), or is needed and not installed.
    """
    if importlib.util.find_spec("timm") is None and "." in name:
        return from_hub(f"timm/{name}")
    timm = require("timm", "timm", f"model source timm:{name} without a tag")
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a known architecture with an unknown tag
        config = None
    if config is None or not config.hf_hub_id:
        raise InputError(
            f"model source timm:{name}: timm has no such weights{nearest(name, timm.list_pretrained())}; "
            "give a name of timm.list_pretrained()"
        )
    return from_hub(config.hf_hub_id, [config.hf_hub_filename] if config.hf_hub_filename else WEIGHTS)


def from_open_clip(name: str) -> Path:
    """Weights of open_clip: `ARCH/TAG`, or `ARCH` where there is one tag.

    Raises:
        InputError: an unknown architecture (names the nearest) or tag (names all), or open_clip is not installed.
    """
    clip = require("open_clip", "open-clip", f"model source open_clip:{name}")
    arch, _, tag = name.partition("/")
    tags = clip.list_pretrained_tags_by_model(arch)
    if not tags:
        known = {model for model, _ in clip.list_pretrained()}
        raise InputError(f"model source open_clip:{name}: no weights for {arch}{nearest(arch, known)}; give ARCH/TAG")
    tag = tag or (tags[0] if len(tags) == 1 else "")
    if tag not in tags:
        raise InputError(
            f"model source open_clip:{name}: no tag {tag!r}{nearest(tag, tags)}; "
            f"give open_clip:{arch}/TAG with TAG one of {', '.join(tags)}"
        )
    config = clip.get_pretrained_cfg(arch, tag)
    if not config["hf_hub"]:
        return from_address(clip, arch, tag, config)
    repository, _, file = config["hf_hub"].rpartition("/")
    return from_hub(repository, [file] if file else TOWERS)


def from_address(clip: ModuleType, arch: str, tag: str, config: Mapping[str, object]) -> Path:
    """Weights of open_clip that lie outside the hub, with the config that a repository would have beside them.

    The activation is that of the weights: open_clip's architectures of the same name may be built with another.
    """
    file = download(str(config["url"]), cache_folder() / "open_clip" / f"{arch}_{tag}")
    model = clip.get_model_config(arch)
    model["quick_gelu"] = bool(config.get("quick_gelu", model.get("quick_gelu", False)))
    preprocess = {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in config}
    write_json(file.with_name(CONFIGS[2]), {"model_cfg": model, "preprocess_cfg": preprocess})
    return file


FETCHERS: dict[str, Callable[[str], Path]] = {
    "hub": from_hub,
    "timm": from_timm,
    "transformers": from_transformers,
    "open_clip": from_open_clip,
}


def locate(source: str) -> Path:
    """The file or folder that a model source names, fetched where it is remote.

    Args:
        source: a file or folder; `hub:org/name[@revision]`; `timm:NAME`; `transformers:ID`; `open_clip:ARCH[/TAG]`; or
            an official name such as `dinov2_vitb14_reg4`. Hub files are kept in Hugging Face's cache, others in
            $VITREG_CACHE (default ~/.cache/vitreg).

    Raises:
        InputError: no such source (with the nearest name), an extra is not installed, or the files cannot be fetched.
    """
    if Path(source).exists():
        return Path(source)
    kind, colon, name = source.partition(":")
    if kind in FETCHERS and name:
        return FETCHERS[kind](name)
    if source in OFFICIAL:
        return download(OFFICIAL[source], cache_folder())
    hint = nearest(kind, FETCHERS) if colon else nearest(source, [*list_models(), *OFFICIAL])
    raise InputError(
        f"model source {source!r}: no such file or folder, and no preset or official name{hint}; give a folder with "
        "model.safetensors and config.json, hub:org/name, timm:NAME, transformers:ID, open_clip:ARCH/TAG, an official "
        "name such as dinov2_vitb14_reg4, or a preset such as vit_s16_reg4"
    )
