import subprocess
import sys
from pathlib import Path

import pytest
from vitreg_core.config import field_names, override
from vitreg_core.errors import InputError
from vitreg_recipes import find
from vitreg_recipes.config import TrainConfig, check_same, local_batch


def test_configs_and_the_list_of_runs_need_no_torch() -> None:
    code = "import sys, vitreg_recipes as r; r.list_runs(); r.TrainConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_option_says_what_it_is() -> None:
    sections = [TrainConfig, *(field.annotation for field in TrainConfig.model_fields.values())]
    fields = [field for s in sections if hasattr(s, "model_fields") for field in s.model_fields.values()]
    assert len(fields) > len(list(field_names(TrainConfig))) / 2
    assert all(field.description for field in fields)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"model.num_classes": 5}, "comes from the data; leave it at 0"),
        ({"optim.warmup_steps": 9, "steps": 8}, "warmup_steps=9 of steps=8; warm up for fewer steps"),
        (
            {"optim.warmup_epochs": 9, "optim.warmup_steps": 0, "optim.schedule": "epochs", "steps": None, "epochs": 8},
            "warmup_epochs=9 of epochs=8; warm up for fewer epochs",
        ),
        ({"steps": None}, "steps=None and epochs=None: give one of them, and none for the other"),
        ({"epochs": 3}, "steps=1100 and epochs=3: give one of them, and none for the other"),
        (
            {"optim.warmup_epochs": 5},
            "warmup_epochs=5 has no effect with optim.schedule=steps; set it to 0, and give optim.warmup_steps",
        ),
        (
            {"optim.schedule": "epochs"},
            "warmup_steps=60 has no effect with optim.schedule=epochs; set it to 0, and give optim.warmup_epochs",
        ),
        ({"optim.lr": 1e-7}, "lr is the highest of the three"),
        ({"loss.smoothing": 0.1}, "set smoothing to 0, or name to ce"),
        (
            {"data.label": "relation", "data.path": "photos"},
            "data.path=photos: only scenes have that; use class",
        ),
        ({"strategy": "fsdp2"}, "strategy=fsdp2 with optim.name=lamb.*use strategy=ddp, or optim.name=adamw"),
        ({"elastic.sample": True}, "elastic.sample=True with model.registers=0.*give registers"),
        (
            {"elastic.diversity": 0.1, "model.registers": 1},
            "elastic.diversity=0.1 with model.registers=1.*give at least 2, or set it to 0",
        ),
        ({"init": "runs/deit3_b61"}, "init=runs/deit3_b61.*train deit3_b61 first, or give --init SOURCE"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(changes: dict[str, object], advice: str) -> None:
    with pytest.raises(InputError, match=advice) as refused:
        override(find("deit3_scenes"), changes).check()
    assert "\n" not in str(refused.value)


def test_fields_that_fit_together_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = find("deit3_scenes")
    override(scenes, {"elastic.sample": True, "elastic.diversity": 1, "model.registers": 2}).check()
    override(scenes, {"strategy": "fsdp2", "optim.name": "adamw"}).check()
    override(scenes, {"optim.lr": 1e-5, "optim.warmup_lr": 1e-5}).check()
    by_epochs = {"optim.schedule": "epochs", "optim.warmup_steps": 0, "optim.warmup_epochs": 2}
    override(scenes, by_epochs | {"steps": None, "epochs": 2}).check()
    override(scenes, by_epochs).check()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    override(scenes, {"init": "runs/mine"}).check()
    override(scenes, {"init": "hub:some/model"}).check()


@pytest.mark.parametrize(("name", "value"), [("optim.lr", 0), ("steps", 0), ("seed", -1), ("precision", "fp16")])
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        override(find("deit3_scenes"), {name: value})


def test_a_batch_is_shared_evenly_and_in_pairs() -> None:
    config = override(find("deit3_scenes"), {"data.batch_size": 12, "mix.mixup": 0.8})
    assert local_batch(config, 2) == 6
    with pytest.raises(InputError, match="batch_size=12 does not divide by 5 processes; give a multiple"):
        local_batch(config, 5)
    with pytest.raises(InputError, match="odd, and mixing takes pairs; give an even share, or turn off"):
        local_batch(config, 4)
    assert local_batch(override(config, {"mix.mixup": 0, "mix.cutmix": 0}), 4) == 3


def test_another_config_is_refused_by_field() -> None:
    before = override(find("deit3_scenes"), {"out": "a", "optim.lr": 1e-3})
    check_same(override(before, {"out": Path("b"), "log_every": 7, "data.workers": 5}), before)
    with pytest.raises(InputError, match=r"b: the run there has optim.lr=0.001, not 0.002; resume with the same"):
        check_same(override(before, {"out": "b", "optim.lr": 2e-3}), before)
