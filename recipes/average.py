"""The mean of several states of one training, calibrated on the people held out.

    python -m recipes.average recipes/default_model.toml one.safetensors two.safetensors --out runs/mean

States that were trained with other weights of the losses lie in one valley (Wortsman et al., Model soups, 2022): their
mean weights tell faces apart better than each of them does.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from recipes.common import say
from xcos_ext.backbones import Recogniser
from xcos_ext.io.errors import XCosError
from xcos_ext.model import CellProjection, XCosHead, XCosModel, load_model, save_model
from xcos_ext.training.tasks import load_experiment

__all__ = ["mean_of"]


def mean_of(models: Sequence[XCosModel]) -> XCosModel:
    """The model with the mean weights of all, every model alike, and norm attention.

    Raises:
        XCosError: models whose weights have other names or shapes than the first's.
    """
    parts = []
    for number, model in enumerate(models):
        cells = model.head.cells if isinstance(model.head, XCosHead) else None
        if cells is None:
            raise XCosError(f"models[{number}]: expected a head with a matrix for each cell")
        parts.append(nn.ModuleList([model.backbone, cells]))
        shapes = [{name: value.shape for name, value in part.state_dict().items()} for part in (parts[0], parts[-1])]
        if shapes[0] != shapes[1]:
            raise XCosError(f"models[{number}]: expected weights of the same names and shapes as models[0]")
    mean = AveragedModel(parts[0], use_buffers=True)
    for part in parts:
        mean.update_parameters(part)
    backbone, matrices = cast(nn.ModuleList, mean.module)
    projection = cast(CellProjection, matrices)
    head = XCosHead(projection.grid_shape[0], projection.channels, attention="norm", projection=projection)
    return XCosModel(cast(Recogniser, backbone), head, name=models[0].name).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="experiment with task = 'recipes.student'")
    parser.add_argument("models", nargs="+", help="states of its training")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True, help="folder for model.safetensors, in half precision")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        from recipes.student import Experiment, create

        experiment = load_experiment(options.config, options.assignments)
        if not isinstance(experiment, Experiment):
            raise XCosError("config: expected task = 'recipes.student'")
        with tempfile.TemporaryDirectory() as folder:
            start = Path(folder) / "mean.safetensors"
            # Halves are what is shipped, so halves are calibrated.
            save_model(mean_of([load_model(model) for model in options.models]), start, dtype=torch.float16)
            student = dataclasses.replace(experiment.student, start=str(start))
            task = create(dataclasses.replace(experiment, student=student))
        for figure, value in task.evaluate(task.module).items():
            say(f"{figure}: {value:.4f}")
        options.out.mkdir(parents=True, exist_ok=True)
        for path in task.export(task.module, options.out):
            save_model(load_model(path), path, dtype=torch.float16)
    except (XCosError, OSError, ValueError) as error:
        say(f"average: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
