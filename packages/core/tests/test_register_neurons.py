"""Register neurons as a file: plain JSON, strictly read."""

import json
from pathlib import Path

import pytest
from edits import one_line
from vitreg_core.errors import InputError
from vitreg_core.test_time import (
    Neuron,
    RegisterNeurons,
    Step,
)

RESULT = RegisterNeurons(
    neurons=(Neuron(1, 5),),
    scores=(3.5,),
    tokens=2,
    steps=(Step(1, 0.0, found=False, cosine=0.99),),
    before=0.02,
    after=0.0,
    cosine=0.99,
    met=True,
    cut=1.1,
    cutoff=30.0,
    outlier_block=2,
    emergence_block=1,
    rule="mixture",
    images=100,
    source="here",
    weights="0" * 64,
    remaining=0.1,
    guard=0.98,
)


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    RESULT.save(tmp_path / "neurons.json")
    values = json.loads((tmp_path / "neurons.json").read_text())
    assert values["neurons"] == [{"layer": 1, "unit": 5}]
    assert (values["source"], values["images"], values["weights"]) == ("here", 100, "0" * 64)
    assert values["steps"] == [{"neurons": 1, "fraction": 0.0, "found": False, "cosine": 0.99}]
    assert RegisterNeurons.load(tmp_path / "neurons.json") == RESULT
    with pytest.raises(InputError, match=r"cannot write the register neurons .*; give another path"):
        RESULT.save(tmp_path / "no" / "folder.json")


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"tokens": 0}, "tokens: Input should be greater than 0"),
        ({"neurons": [{"layer": 1}]}, "neurons.0"),
        ({"neurons": [{"layer": -1, "unit": 2}]}, "neurons.0"),
        ({"scores": []}, "1 neurons with 0 scores"),
        ({"scores": ["a"]}, "scores.0"),
        ({"cosine": "nan"}, "cosine"),
        ({"extra": 1}, "extra: "),
        ({"weights": None}, "weights"),
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, object], advice: str, tmp_path: Path) -> None:
    path = tmp_path / "neurons.json"
    RESULT.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=advice) as error:
        RegisterNeurons.load(path)
    assert one_line(error)


def test_no_file_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        RegisterNeurons.load(tmp_path / "missing.json")
    (tmp_path / "text").write_text("{")
    with pytest.raises(InputError, match="the file: Invalid JSON") as error:
        RegisterNeurons.load(tmp_path / "text")
    assert one_line(error)
