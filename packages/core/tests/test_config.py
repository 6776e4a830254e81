import subprocess
import sys

import pytest
from pydantic import ValidationError
from vitreg_core.config import Config, ViTConfig, nearest, override, validate
from vitreg_core.errors import InputError


class Outer(Config):
    model: ViTConfig = ViTConfig()
    rate: float = 0.5


def test_override_reaches_into_sections_and_leaves_the_rest() -> None:
    changed = override(Outer(), {"model.registers": 4, "rate": 1.0})
    assert (changed.model.registers, changed.rate) == (4, 1.0)
    assert override(changed, {"model.registers": 0, "rate": 0.5}) == Outer()


def test_configs_cannot_change() -> None:
    with pytest.raises(ValidationError):
        ViTConfig().depth = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"model.regsters": 4}, "did you mean model.registers"),
        ({"modle.registers": 4}, "did you mean model.registers"),
        ({"rate": "fast"}, "rate='fast'"),
        ({"model.drop_path": 1.0}, "less than 1"),
        ({"model.registers": -1}, "greater than or equal to 0"),
    ],
)
def test_override_names_the_field_and_what_to_do(changes: dict, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        override(Outer(), changes)


def test_validate_says_where_the_value_stands() -> None:
    with pytest.raises(InputError, match=r"config\.json depht=1: unknown option; did you mean depth"):
        validate(ViTConfig, {"depht": 1}, "config.json")


def test_nearest_says_nothing_when_nothing_is_near() -> None:
    assert nearest("zzz", ["registers"]) == ""


def test_the_package_and_its_configs_import_no_torch() -> None:
    code = "import sys, vitreg_core, vitreg_core.config, vitreg_core.options; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"False\n"


def test_the_models_import_no_other_library() -> None:
    others = {"timm", "transformers", "open_clip", "xformers", "torchvision", "onnx", "onnxscript", "huggingface_hub"}
    every_name = "import sys, vitreg_core; [getattr(vitreg_core, name) for name in vitreg_core.__all__]"
    code = f"{every_name}; print(sorted({others} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"[]\n"
