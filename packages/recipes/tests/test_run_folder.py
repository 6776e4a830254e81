import json
from collections.abc import Callable
from pathlib import Path

import pytest
from vitreg_core.errors import InputError
from vitreg_recipes import train
from vitreg_recipes.config import TrainConfig

Tiny = Callable[..., TrainConfig]


def test_a_run_says_how_to_run_it_again(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path, steps=2, seed=5)
    train(config)
    record = json.loads((tmp_path / "run.json").read_text())
    assert type(config).model_validate(record["config"]) == config
    assert (record["seed"], record["processes"], len(record["classes"])) == (5, 1, 6)
    assert record["versions"].keys() >= {"python", "torch", "timm", "accelerate", "vitreg-recipes"}
    assert json.loads((tmp_path / "classes.json").read_text()) == record["classes"]
    assert record["commit"] is None or len(record["commit"].removesuffix("+changes")) == 40


def test_a_run_is_not_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(out=tmp_path, steps=2))
    with pytest.raises(InputError, match="already holds a run; give --resume or another --out"):
        train(tiny(out=tmp_path, steps=2))


def test_only_a_run_can_be_resumed(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run to resume; leave out --resume, or give the --out"):
        train(tiny(out=tmp_path), resume=True)
    with pytest.raises(InputError, match="without a folder cannot resume; give --out"):
        train(tiny(), resume=True)
    assert not list(tmp_path.iterdir())


def test_another_config_or_other_data_cannot_be_resumed(tiny: Tiny, tmp_path: Path, photos: Path) -> None:
    out, config = tmp_path / "run", tiny(out=tmp_path / "run", steps=2, data__path=str(photos))
    train(config)
    with pytest.raises(InputError, match=r"the run there has model.registers=2, not 0; resume with the same value"):
        train(tiny(out=out, steps=2, data__path=str(photos), model__registers=0), resume=True)
    (photos / "train" / "cat" / "0.png").unlink()
    with pytest.raises(InputError, match=r"the run there has other images \(7, not 6\); resume with the same"):
        train(config, resume=True)


def test_a_damaged_record_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json: not valid JSON .*; give another --out"):
        train(tiny(out=tmp_path), resume=True)


def test_an_unwritable_folder_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot write the run"):
        train(tiny(out=tmp_path / "file"))
