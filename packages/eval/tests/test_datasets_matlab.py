"""MATLAB files as SciPy writes and reads them."""

import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from vitreg_core.errors import InputError
from vitreg_eval.datasets.matlab import read_variable


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u4", "i8", "f4", "f8"])
def test_numbers(dtype: str, compressed: bool, tmp_path: Path) -> None:  # noqa: FBT001
    values = {"short": np.array([[1, 2]], dtype), "long": np.arange(500, dtype=dtype)[None], "empty": np.zeros((0, 0))}
    savemat(tmp_path / "a.mat", values, do_compression=compressed)
    expected = loadmat(tmp_path / "a.mat")
    for key in values:
        found = read_variable(tmp_path / "a.mat", key)
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, expected[key].ravel())
        assert found.dtype == expected[key].dtype


@pytest.mark.parametrize("compressed", [False, True])
def test_texts_cells_and_structures(compressed: bool, tmp_path: Path) -> None:  # noqa: FBT001
    cells = np.array([["AM General", "x", "Citroën"]], dtype=object)
    rows = np.array([(7, "00001.jpg"), (196, "b.jpg"), (3, "")], dtype=[("class", "O"), ("a_long_field_name", "O")])
    savemat(tmp_path / "a.mat", {"cells": cells, "rows": rows[None], "text": "hello"}, do_compression=compressed)
    assert read_variable(tmp_path / "a.mat", "cells") == ["AM General", "x", "Citroën"]
    assert read_variable(tmp_path / "a.mat", "text") == "hello"
    found = read_variable(tmp_path / "a.mat", "rows")
    assert isinstance(found, dict)
    assert [int(value[0]) for value in found["class"]] == [7, 196, 3]
    assert [value if isinstance(value, str) else "" for value in found["a_long_field_name"]] == [
        "00001.jpg",
        "b.jpg",
        "",
    ]


def test_bytes_in_the_other_order(tmp_path: Path) -> None:
    def element(kind: int, data: bytes) -> bytes:
        return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)

    parts = [
        (6, struct.pack(">II", 11, 0)),
        (5, struct.pack(">ii", 1, 3)),
        (1, b"ids"),
        (4, struct.pack(">3H", 1, 2, 999)),
    ]
    matrix = element(14, b"".join(element(*part) for part in parts))
    (tmp_path / "a.mat").write_bytes(b"MATLAB 5.0".ljust(124) + b"\x01\x00MI" + matrix)
    found = read_variable(tmp_path / "a.mat", "ids")
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [1, 2, 999] == loadmat(tmp_path / "a.mat")["ids"].ravel().tolist()


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    with pytest.raises(InputError, match=r"a.mat: cannot be read \(No such file"):
        read_variable(path, "x")
    savemat(path, {"y": [1]})
    with pytest.raises(InputError, match=r"a.mat: holds no 'x'"):
        read_variable(path, "x")
    for content in (b"", b"\x89HDF", b"x" * 4000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a.mat: no MATLAB 5 file; .* save it with -v7"):
            read_variable(path, "x")


@pytest.mark.parametrize("compressed", [False, True])
def test_damage(compressed: bool, tmp_path: Path) -> None:  # noqa: FBT001
    path = tmp_path / "a.mat"
    rows = np.array([(7, "1.jpg"), (8, "2.jpg")], dtype=[("class", "O"), ("fname", "O")])
    savemat(path, {"x": rows[None]}, do_compression=compressed)
    good = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    random, refused = np.random.default_rng(0), 0
    for trial in range(400):
        damaged = good[: random.integers(len(good))].copy() if trial % 4 == 0 else good.copy()
        if len(damaged) > 128:
            damaged[random.integers(128, len(damaged), 3)] = random.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            read_variable(path, "x")
        except InputError:
            refused += 1
    assert refused > 200
