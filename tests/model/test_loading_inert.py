"""Checkpoints as the public xCos trainer writes them: weights beside settings of classes that are not there."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from xcos_ext.io.errors import ModelError
from xcos_ext.io.inert import Inert, Unpickler
from xcos_ext.io.weights import read_weights


class Settings(dict):
    """As the trainer's: a dictionary with a state of its own, which unpickling hands to its class."""

    def __getstate__(self):
        return (dict(self), tuple, True)

    def __setstate__(self, state):
        raise AssertionError("code of a class in the file was run")


Settings.__module__, Settings.__qualname__ = "utils.global_config", "SingleGlobalConfig"


@pytest.fixture
def settings(monkeypatch):
    """Settings of utils.global_config.SingleGlobalConfig, which exists only while the file is written."""
    package, module = types.ModuleType("utils"), types.ModuleType("utils.global_config")
    module.SingleGlobalConfig = Settings
    package.global_config = module
    monkeypatch.setitem(sys.modules, "utils", package)
    monkeypatch.setitem(sys.modules, "utils.global_config", module)
    return Settings(arch={"type": "xCosModel"}, trainer=Settings(epochs=3))


def checkpoint(settings, **more):
    return {
        "arch": "xCosModel",
        "epoch": 7,
        "state_dict": {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "monitor_best": np.float64(0.99),
        "config": settings,
    } | more


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_the_weights_come_out(settings, zipped, tmp_path, monkeypatch):
    file = tmp_path / "ckpt.pth"
    torch.save(checkpoint(settings), file, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "utils.global_config")
    contents, _ = read_weights(file)
    assert torch.equal(contents["state_dict"]["a.weight"], torch.arange(6.0).view(2, 3))
    assert contents["state_dict"]["b"].dtype == torch.float16
    assert type(contents["config"]) is Inert and not vars(contents["config"])


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_settings_open_no_door_for_code(settings, zipped, tmp_path, monkeypatch):
    file = tmp_path / "ckpt.pth"
    for where in ("config", "extra"):
        data = checkpoint(settings)
        if where == "config":
            data["config"]["hook"] = Payload(tmp_path / "run")
        else:
            data["extra"] = Payload(tmp_path / "run")
        torch.save(data, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            ModelError, match=r"refused, because the pickle could run code \(it asks for '(posix|os)\.system'"
        ):
            read_weights(file)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["os system", "builtins eval", "builtins getattr", "torch load", "torch._utils _rebuild_tensor", "x Inert"]
)
def test_other_names_are_refused(name):
    with pytest.raises(pickle.UnpicklingError, match="is not known"):
        Unpickler(io.BytesIO(f"c{name.replace(' ', chr(10))}\n.".encode())).load()


def test_a_stand_in_cannot_be_made_to_act():
    """Called, filled, given a state: it stays empty."""
    program = b"cutils.global_config\nSingleGlobalConfig\n(S'x'\ntR(S'k'\nS'v'\nu}S'__class__'\nS'y'\nsb."
    found = Unpickler(io.BytesIO(program)).load()
    assert type(found) is Inert and not vars(found)


def test_damaged_checkpoints_say_so(settings, tmp_path: Path, monkeypatch):
    file = tmp_path / "ckpt.pth"
    torch.save(checkpoint(settings), file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    for share in (0.3, 0.7, 0.95):
        file.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ModelError, match=r"ckpt\.pth: "):
            read_weights(file)
