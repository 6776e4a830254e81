import copy
import json
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vitreg_core import VisionTransformer, ViTConfig, load_model, save_model
from vitreg_core.errors import InputError

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, registers=2, num_classes=5)
KINDS = ("vitreg", "timm", "pickle")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as our folder, as timm's, and as timm's with a pickled file."""
    torch.manual_seed(0)
    root, model = tmp_path_factory.mktemp("pristine"), VisionTransformer(CONFIG)
    save_model(model, root / "vitreg")
    save_model(model, root / "timm", layout="timm")
    save_model(model, root / "pickle", layout="timm")
    torch.save(load_file(root / "pickle" / "model.safetensors"), root / "pickle" / "pytorch_model.bin")
    (root / "pickle" / "model.safetensors").unlink()
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, pristine: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    (tmp_path / "model").mkdir()
    for file in pristine[request.param].iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "model"


def weights(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name != "config.json")


def refused(source: Path) -> str:
    """The one line with which a source is refused; it names a file of the source."""
    with pytest.raises(InputError) as error:
        load_model(source)
    message = str(error.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a file."""
    file = weights(folder)
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    else:
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)


def test_the_pristine_folders_load(folder: Path) -> None:
    assert load_model(folder).config.embed_dim == 24


def test_a_file_cut_off_anywhere_is_refused(folder: Path) -> None:
    whole = weights(folder).read_bytes()
    draw = random.Random(0)
    for length in [
        0,
        1,
        7,
        8,
        9,
        100,
        len(whole) // 2,
        len(whole) - 1,
        *(draw.randrange(len(whole)) for _ in range(8)),
    ]:
        weights(folder).write_bytes(whole[:length])
        assert "not a readable weights file" in refused(folder)


def test_flipped_bytes_in_the_header_never_load_a_wrong_model(folder: Path) -> None:
    whole, intact = weights(folder).read_bytes(), load_model(folder).state_dict()
    safe = weights(folder).suffix == ".safetensors"
    header = 8 + int.from_bytes(whole[:8], "little") if safe else whole.index(b"/data/0")
    draw = random.Random(1)
    refusals = 0
    for _ in range(40):
        broken = bytearray(whole)
        broken[draw.randrange(header)] ^= 1 << draw.randrange(8)
        weights(folder).write_bytes(bytes(broken))
        try:
            loaded = load_model(folder).state_dict()
        except InputError as error:
            assert "\n" not in str(error)
            refusals += 1
        else:  # the bit stands where nothing depends on it, or inside the values themselves
            assert {name: tensor.shape for name, tensor in loaded.items()} == {
                name: tensor.shape for name, tensor in intact.items()
            }
            assert all(tensor.isfinite().all() for tensor in loaded.values())
    assert refusals >= 5


def tensor_named(tensors: Tensors, ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def replace(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    def apply(tensors: Tensors) -> None:
        name = tensor_named(tensors, ending)
        tensors[name] = change(tensors[name])

    return apply


def one_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return apply


VALUES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "integers": (
        replace("blocks.1.norm1.weight", lambda t: t.long()),
        "blocks.1.norm1.weight holds values that are not",
    ),
    "booleans": (replace("norm.weight", lambda t: t.bool()), "norm.weight holds values that are not"),
    "complex": (
        replace("blocks.0.attn.proj.bias", lambda t: t.to(torch.complex64)),
        "attn.proj.bias holds values that",
    ),
    "nan": (replace("patch_embed.proj.weight", one_value(torch.nan)), "patch_embed.proj.weight holds values that are"),
    "infinite": (replace("head.bias", one_value(torch.inf)), "head.bias holds values that are not finite"),
    "extra": (lambda t: t.update(extra=torch.zeros(3)), r"unexpected tensor extra of shape \(3,\)"),
    "extra block": (lambda t: t.update({"blocks.1.extra": torch.zeros(3)}), "unexpected tensor blocks.1.extra"),
    "missing": (lambda t: t.pop("blocks.1.mlp.fc2.bias"), r"tensor blocks.1.mlp.fc2.bias of shape \(24,\) is missing"),
    "missing stem": (lambda t: t.pop("patch_embed.proj.weight"), ""),
    "no tensors": (lambda t: t.clear(), ""),
    "transposed": (
        replace("blocks.1.mlp.fc1.weight", lambda t: t.T),
        r"fc1.weight has shape \(24, 96\), not \(96, 24\)",
    ),
    "scalar": (replace("blocks.0.mlp.fc1.weight", lambda t: t.sum()), r"fc1.weight has shape \(\)"),
    "empty": (replace("patch_embed.proj.weight", lambda t: t[:0]), r"patch_embed.proj.weight has shape \(0, "),
    "flat": (replace("patch_embed.proj.weight", lambda t: t.flatten()), r"patch_embed.proj.weight has shape \(4608,\)"),
}


@pytest.mark.parametrize("damage", VALUES)
def test_wrong_tensors_are_refused_by_name(folder: Path, damage: str) -> None:
    change, advice = VALUES[damage]
    edit(folder, change)
    message = refused(folder)
    assert re.search(advice, message), message


def test_every_misshapen_tensor_is_refused(folder: Path) -> None:
    intact = weights(folder).read_bytes()
    names: list[str] = []
    edit(folder, lambda tensors: names.extend(sorted(tensors)))
    for name in names:
        weights(folder).write_bytes(intact)
        edit(folder, lambda tensors, name=name: tensors.update({name: torch.zeros(2, 3, 5, 7, 2)}))  # type: ignore[misc]
        refused(folder)


def test_eight_bit_floats_are_numbers_or_are_refused(folder: Path) -> None:
    edit(folder, replace("blocks.0.norm1.weight", lambda t: t.to(torch.float8_e4m3fn)))
    try:
        loaded = load_model(folder)
    except InputError as error:
        assert "blocks.0.norm1.weight" in str(error)
    else:
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


class Bomb:
    """Would make a file while it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pth", "model.pt"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("saved_by", ["pickle", "torch"])
def test_code_in_a_file_is_not_run(tmp_path: Path, name: str, protocol: int, saved_by: str) -> None:
    content = {"norm.weight": torch.zeros(3), "bomb": Bomb(tmp_path / "exploded")}
    if saved_by == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, tmp_path / name, pickle_protocol=protocol)
    assert "not a readable weights file" in refused(tmp_path / name)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()  # it would have gone off


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"hello, this is a text\n" * 50, b"\x89PNG\r\n" + bytes(200), b"\xff" * 64])
def test_files_that_are_no_weights_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert "not a readable weights file" in refused(tmp_path / name)


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("photo.txt", "no weights")
    assert "not a readable weights file" in refused(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_folder_named_like_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for source in (tmp_path, tmp_path / name):
        assert "no model.safetensors in it; give a model folder" in refused(source)


@pytest.mark.parametrize(
    "content",
    [
        {"a": {"b": {"c": torch.zeros(3)}}},
        {1: torch.zeros(3)},
        {"cls": "text"},
        {("a", "b"): torch.zeros(3), "model": 3},
        [torch.zeros(3)],
        torch.zeros(3),
        {},
        {"model": {}},
        {"state_dict": {0: 1}},
        None,
        "text",
    ],
    ids=str,
)
def test_other_things_that_torch_saves_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "model.pth")
    refused(tmp_path / "model.pth")


CONFIGS: dict[str, object] = {
    "cut off": '{"library": "vitreg", ',
    "list": [],
    "number": 3,
    "text": "vitreg",
    "null": None,
    "binary": b"\xff\xfe\x00{",
    "deep": "[" * 100_000,
    "huge integer": '{"library": "vitreg", "model": {"depth": ' + "9" * 5000 + "}}",
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_broken_configs_are_refused(folder: Path, damage: str) -> None:
    content = CONFIGS[damage]
    if isinstance(content, bytes):
        (folder / "config.json").write_bytes(content)
    else:
        (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert "config.json" in refused(folder)


WRONG = (-1, 0, 10**12, 10**30, 1.5, "many", None, [], {}, True, [1, 2, 3], float("nan"), float("inf"))


def keys(values: dict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths to all values of nested objects."""
    found = []
    for key, value in values.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += keys(value, (*prefix, key))
    return found


def test_wrong_values_in_a_config_are_refused_or_change_no_tensor(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    intact = load_model(folder).state_dict()
    draw = random.Random(2)
    refusals = 0
    for path in keys(config):
        broken = copy.deepcopy(config)
        place = broken
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = draw.choice(WRONG)
        (folder / "config.json").write_text(json.dumps(broken))
        try:
            loaded = load_model(folder).state_dict()
        except InputError as error:
            assert "\n" not in str(error), path
            refusals += 1
        else:
            assert all(torch.equal(tensor, intact[name]) for name, tensor in loaded.items()), path
    assert refusals >= 10


@pytest.mark.parametrize("name", ["depth", "embed_dim", "num_heads", "patch_size", "image_size", "registers"])
@pytest.mark.parametrize("value", [-1, 10**6, 10**12, 10**30, "many"])
def test_impossible_shapes_are_refused_before_they_are_built(
    pristine: dict[str, Path], tmp_path: Path, name: str, value: object
) -> None:
    config = json.loads((pristine["vitreg"] / "config.json").read_text())
    config["model"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((pristine["vitreg"] / "model.safetensors").read_bytes())
    refused(tmp_path)
