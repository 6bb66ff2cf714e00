"""Search a gallery with several processes, on one machine or several that share the gallery's folder.

    torchrun --nproc-per-node 4 examples/search_sharded.py faces.gallery ann.jpg bob.jpg
    torchrun --nproc-per-node 8 examples/search_sharded.py faces.gallery features.npy --device cuda -k 20

Probes are photographs (or folders and archives of them), or one .npy or .safetensors file with features [P, C, H, W] as
``model.features`` gives them. Rank 0 reads them and prints the hits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from xcos_ext.faces import choice_in_words, create_detector
from xcos_ext.gallery import ShardedGallery
from xcos_ext.gallery.enroll import find_probes, read_faces
from xcos_ext.io.errors import XCosError
from xcos_ext.io.shipped import default_weights
from xcos_ext.model import XCosModel, load_model
from xcos_ext.training.parallel import processes


def read_probes(paths: list[str], model: XCosModel) -> tuple[list[str], torch.Tensor]:
    """Names of the probes and their features [P, C, H, W]."""
    path = Path(paths[0])
    if path.suffix == ".npy":
        features = torch.from_numpy(np.load(path, allow_pickle=False))
    elif path.suffix == ".safetensors":
        features = next(iter(load_file(path).values()))
    else:
        faces = list(read_faces(find_probes(paths)[0], model.preprocessing.size, create_detector))
        for picture, face, problem in faces:
            if face is None:
                print(f"left out {problem}", file=sys.stderr)
            elif face.found > 1:
                print(f"{picture.id}: {choice_in_words(face.found)}", file=sys.stderr)
        found = [(picture.id, face.rgb) for picture, face, _ in faces if face is not None]
        if not found:
            raise XCosError("probes: expected a usable face, got none")
        return [name for name, _ in found], model.features(model.preprocessing([crop for _, crop in found]))
    return [f"{path.name}[{i}]" for i in range(len(features))], features


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery", help="its folder, as every process sees it")
    parser.add_argument("probes", nargs="+", help="photographs, or one file of features")
    parser.add_argument("--model", help="weights; by default the model that comes with the package")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: a GPU for each process")
    parser.add_argument("-k", type=int, default=5, help="hits a probe")
    parser.add_argument("--by", default="face", choices=("face", "person"))
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds after which a silent process is lost")
    options = parser.parse_args()
    with processes(torch.device(options.device)) as here:
        if options.device == "cuda":
            torch.cuda.set_device(here.local)
        model = load_model(options.model or str(default_weights()))
        with ShardedGallery.open(options.gallery, model, timeout=options.timeout) as gallery:
            # Another processor would round the templates differently, so all take those of the first.
            sent: list[Any] = [None, None]
            if here.first:
                names, features = read_probes(options.probes, model)
                sent = [names, model.templates(features, "probe", gallery.layout.dtype)]
            if here.world > 1:
                dist.broadcast_object_list(sent)
            names, probes = sent
            hits = gallery.search(probes.to(options.device), options.k, by=options.by)
        for name, row in zip(names, hits, strict=True) if here.first else ():
            print(name)
            for hit in row:
                print(f"   {hit.score:7.4f}  {hit.id}  {hit.person or ''}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
