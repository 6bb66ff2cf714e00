"""The command line's grammar. What the subcommands do is in a module each, imported when they run."""

from __future__ import annotations

import math
from typing import Any

import click

from .console import CommandGroup

__all__ = ["xcos"]

_MODEL_HELP = "Weights: an xCos model, or a recogniser to be plugged in (.pt, .pth, .safetensors)."

# Options that several commands share.
_model = click.option(
    "--model",
    envvar="XCOS_MODEL",
    metavar="FILE",
    type=click.Path(),
    help=f"{_MODEL_HELP} [env: XCOS_MODEL; default: the shipped compact model; faithful and local are shipped too]",
)
_detector = click.option(
    "--detector",
    default="cascade",
    show_default=True,
    metavar="cascade|FILE.onnx",
    help="OpenCV's bundled cascades, or a YuNet network.",
)
_aligned = click.option(
    "--aligned", is_flag=True, help="The pictures are aligned crops already (112 x 112): detect nothing."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_quiet = click.option("--quiet", "-q", is_flag=True, help="No progress bar, no summary.")
_face = click.option(
    "--face",
    "policy",
    type=click.Choice(["prominent", "largest", "centre", "only"]),
    default="prominent",
    show_default=True,
    help="Which of several faces: large and near the middle, the largest, the most central; or refuse.",
)


class _DeviceName(click.ParamType):
    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from xcos_ext.devices import check_device_name
        from xcos_ext.io.errors import DeviceError

        try:
            check_device_name(value)
        except DeviceError as error:
            self.fail(str(error).removeprefix("device: "), param, ctx)
        return str(value)


_DEVICES = "cpu|cuda|cuda:N|auto"
_device = click.option(
    "--device",
    type=_DeviceName(),
    default="auto",
    show_default=True,
    metavar=_DEVICES,
    help="Where networks and operators run; auto: CUDA if it works.",
)


def _faces(command: Any) -> Any:
    """The options of a command that takes one face of each picture."""
    for option in (_device, _face, _aligned, _detector, _model):
        command = option(command)
    return command


_gallery = click.argument("gallery", type=click.Path(), metavar="GALLERY")


class _Finite(click.ParamType):
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.fail(f"expected a number, got {value!r}", param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value}", param, ctx)
        return number


_threshold = click.option(
    "--threshold", type=_Finite(), metavar="T", help="The same person if score >= T; by default the model's."
)
_max_pixels = click.option(
    "--max-pixels", type=click.IntRange(min=1), metavar="N", help="Refuse larger pictures. [default: 100 million]"
)
_bootstrap = click.option(
    "--bootstrap",
    "replicates",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    metavar="N",
    help="Replicates for the confidence intervals; 0 for none.",
)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from xcos_ext import __version__

        click.echo(f"xcos {__version__}")
        ctx.exit()


@click.group(cls=CommandGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
@click.pass_context
def xcos(ctx: click.Context) -> None:
    """Explainable face similarity: a score, and the map of what it is made of.

    Messages go to stderr. Exit status: 0 success, 2 trouble; verify and explain: 0 the same person, 1 different
    people, 2 trouble. XCOS_DEBUG=1 shows tracebacks.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@xcos.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@_faces
@_threshold
@_max_pixels
@click.option("--out", metavar="FILE", type=click.Path(), help="Draw the decision: .png, .pdf or .svg.")
@_json
def verify(**options: Any) -> int:
    """Are the faces of pictures A and B the same person's?"""
    from .verify import Request, run

    return run(Request(**options))


@xcos.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@_faces
@_threshold
@_max_pixels
@click.option("--html", metavar="FILE", type=click.Path(), help="Write a page: hover a cell to see what it did.")
@click.option("--figure", metavar="FILE", type=click.Path(), help="Draw the decision: .png, .pdf or .svg.")
@_json
def explain(**options: Any) -> int:
    """Why does the model say what it says about the faces of A and B?

    Exit status as verify's; 2 also where the model has no threshold and so there is no verdict.
    """
    from .explain import Request, run

    return run(Request(**options))


@xcos.command()
@click.argument("pairs", type=click.Path(), metavar="PAIRS.csv")
@click.option("--html", required=True, metavar="FILE", type=click.Path(), help="The page to write.")
@click.option(
    "--root",
    metavar="DIR|ZIP",
    type=click.Path(),
    help="Where the pictures' paths start.  [default: the folder of PAIRS.csv]",
)
@click.option("--title", metavar="TEXT", help="Of the page.  [default: the list's name]")
@_faces
@_threshold
@_max_pixels
@click.option(
    "--threads", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Threads that read."
)
@_quiet
@_json
def report(**options: Any) -> int:
    """Compare the pairs of a list and write them on one page, to be sorted by score and by cell.

    PAIRS.csv has a header and the columns a, b, optionally genuine (1 or 0), and any others, which are shown. Pairs
    whose pictures have no face are listed with the reason.
    """
    from .report import Request, run

    return run(Request(**options))


@xcos.command()
@_json
def info(as_json: bool) -> int:
    """What was built, what is installed, and what it runs on."""
    from .info import run

    return run(as_json)


@xcos.command()
@click.argument("pictures", nargs=-1, type=click.Path(), metavar="[A B]")
@_model
@_device
@click.option("--out", metavar="FILE", type=click.Path(), help="The picture to draw. [default: xcos_demo.png]")
@_json
def demo(pictures: tuple[str, ...], model: str | None, device: str, out: str | None, as_json: bool) -> int:
    """Pair scoring, gradients and a gallery search on generated feature maps, timed beside plain torch.

    With two photographs A B and a weights file it verifies them instead.
    """
    if len(pictures) not in (0, 2):
        raise click.UsageError(f"expected two pictures or none, got {len(pictures)}", click.get_current_context())
    from .demo import run

    return run(pictures, model, device, out, as_json)


@xcos.command()
@click.argument("config", type=click.Path())
@click.option(
    "--set", "assignments", multiple=True, metavar="TABLE.KEY=VALUE", help="Change a setting of the file; repeatable."
)
@click.option("--out", metavar="DIR", type=click.Path(), help="Folder for the results.  [default: runs/CONFIG's name]")
@click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads of torch's operators.")
@_json
def train(**options: Any) -> int:
    """Train a head or a model as a TOML file says; with torchrun, on several processes.

    The folder gets a log (CSV), checkpoints that resume to the bit, and the model. Files for a start are in configs/.
    """
    from .train import Request, run

    return run(Request(**options))


@xcos.command()
@click.argument("weights", type=click.Path())
@click.option(
    "--faces",
    metavar="DIR|ZIP",
    type=click.Path(),
    help="Aligned crops (112 x 112) of some hundred people: <person>/<picture>, in a folder or zip archive.",
)
@click.option("--out", metavar="FILE", type=click.Path(), help="The model to write: .safetensors or .onnx (a graph).")
@click.option("--project", type=click.IntRange(min=1), metavar="K", help="Keep K principal axes per cell, e.g. 32.")
@click.option("--threshold", type=_Finite(), metavar="T", help="The decision threshold; by default from the faces.")
@click.option(
    "--limit", type=click.IntRange(min=2), metavar="N", default=1000, show_default=True, help="Use at most N people."
)
@click.option("--list", "list_maps", is_flag=True, help="ONNX: show where the graph may be split; needs no faces.")
@click.option("--tensor", metavar="NAME", help="ONNX: the feature map.  [default: the one that --list marks]")
@click.option("--output", metavar="NAME", help="ONNX: the embedding.  [default: the graph's only output [N, D]]")
@click.option(
    "--mean",
    metavar="M[,M,M]",
    help="ONNX: the network gets (RGB * scale - mean) / std.  [default: what the graph asks for, else 0.5]",
)
@click.option("--std", metavar="S[,S,S]", help="ONNX: see --mean.")
@click.option("--scale", type=_Finite(), metavar="F", help="ONNX: see --mean; 1 for pixels 0..255.  [default: 1/255]")
@_device
@_json
def plug(**options: Any) -> int:
    """Make an explainable model of a face recogniser, without training.

    WEIGHTS is a recogniser's state dict, or an ONNX graph, which runs on the CPU and whose model is a graph too. One
    picture of each person gives the mean of every cell; every pair of different people gives the threshold.
    """
    from .plug import Request, run

    return run(Request(**options))


@xcos.group(invoke_without_command=True)
@click.pass_context
def export(ctx: click.Context) -> None:
    """Write a model for other runtimes."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@export.command("onnx")
@_model
@click.option(
    "--kind",
    type=click.Choice(["pair", "template", "score"]),
    default="pair",
    show_default=True,
    help="Two pictures to score and maps; a picture to its template; two templates to score and maps.",
)
@click.option("--out", required=True, metavar="FILE", type=click.Path(), help="The graph to write: .onnx.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of the backbone inside; the head, inputs and outputs are float32.",
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="A fixed batch; by default any.")
@click.option("--opset", type=int, metavar="N", help="Of the standard operators. [default: 18]")
@_quiet
@_json
def export_onnx(**options: Any) -> int:
    """An ONNX graph of standard operators, with preprocessing, threshold and calibration in its metadata.

    xcos verify --model FILE.onnx then needs no torch.
    """
    from .export import OnnxRequest, run_onnx

    return run_onnx(OnnxRequest(**options))


@export.command("tensorrt")
@click.argument("onnx", type=click.Path(), metavar="GRAPH.onnx")
@click.option("--out", required=True, metavar="FILE", type=click.Path(), help="The engine to write: .plan or .engine.")
@click.option(
    "--batch", multiple=True, metavar="MIN:OPT:MAX", help="Batches that the engine runs, e.g. 1:8:64; may be repeated."
)
@click.option("--tf32", is_flag=True, help="Allow TF32 where the graph says float32.")
@click.option("--device", default="cuda", show_default=True, metavar="cuda[:N]", help="The GPU to build for.")
@_quiet
@_json
def export_tensorrt(**options: Any) -> int:
    """A TensorRT engine of a graph, for this GPU and this TensorRT; beside it a JSON file that says what it fits.

    Types are those of the graph: for half precision export it with --dtype float16.
    """
    from .export_tensorrt import Request, run

    return run(Request(**options))


@xcos.group(invoke_without_command=True)
@click.pass_context
def evaluate(ctx: click.Context) -> None:
    """Measure a model on a data set."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _pair_list(command: Any) -> Any:
    """The options of a command that reads a list of pairs."""
    for option in (
        click.option(
            "--format",
            "list_format",
            type=click.Choice(["lfw", "cfp", "bin", "csv"]),
            help="Of the pairs; by default told from the file.",
        ),
        click.option("--root", metavar="DIR|ZIP", type=click.Path(), help="The pictures; a .bin file holds its own."),
        click.option(
            "--pairs",
            required=True,
            metavar="FILE",
            type=click.Path(),
            help="LFW's pairs.txt, CFP's folder Split/FF or Split/FP, an insightface .bin, or CSV with a, b, "
            "genuine[, fold].",
        ),
    ):
        command = option(command)
    return command


@evaluate.command()
@_pair_list
@_aligned
@_model
@_detector
@click.option("--flip", is_flag=True, help="Average in the features of the mirrored pictures.")
@click.option(
    "--attention",
    type=click.Choice(["own", "uniform", "norm", "corr", "symmetric"]),
    multiple=True,
    default=("own",),
    show_default=True,
    help="How the cells are weighed; may be repeated.",
)
@click.option(
    "--teacher", metavar="WEIGHTS", type=click.Path(), help="A recogniser: its plain cosine is measured and correlated."
)
@_bootstrap
@_device
@click.option("--plot", metavar="FILE", type=click.Path(), help="Draw the ROC curves: .png, .pdf or .svg.")
@_json
def verification(**options: Any) -> int:
    """Accuracy, AUC, EER and TAR at false match rates on a list of pairs, with confidence intervals."""
    from .evaluate import VerificationRequest, run_verification

    return run_verification(VerificationRequest(**options))


@evaluate.command("faithfulness")
@_pair_list
@click.option("--folds", metavar="N,N", help="Only pairs of these folds, e.g. 7,8: a CSV file's numbers, else from 1.")
@_aligned
@_model
@_detector
@click.option(
    "--teacher", metavar="WEIGHTS", type=click.Path(), help="A recogniser, whose plain cosine is explained too."
)
@click.option("--only-teacher", is_flag=True, help="Explain the teacher's cosine and nothing else.")
@click.option(
    "--explainer",
    "explainers",
    multiple=True,
    metavar="NAME",
    help="May be repeated. [default: xCos's own maps and other cheap ones; random and centre always]",
)
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice(["region-swap", "deletion", "identification", "locality", "patch"]),
    multiple=True,
    help="May be repeated. [default: all]",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Pairs of each kind; people, for identification. [default: 60, or all there are]",
)
@click.option(
    "--size",
    "sizes",
    type=click.Choice(["small", "medium", "large"]),
    multiple=True,
    default=("medium",),
    show_default=True,
    help="Of swapped regions; may be repeated.",
)
@click.option(
    "--blend",
    type=click.Choice(["hard", "soft"]),
    default="hard",
    show_default=True,
    help="Edges of what is pasted.",
)
@click.option("--match-colour", is_flag=True, help="Give what is pasted the colours of what it replaces.")
@click.option("--pixels", is_flag=True, help="Region swap: areas over pixels too (in the JSON).")
@click.option(
    "--fill",
    "fills",
    type=click.Choice(["zero", "blur", "mean-face"]),
    multiple=True,
    default=("zero",),
    show_default=True,
    help="In place of pixels that are taken away; may be repeated.",
)
@click.option(
    "--gallery",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    metavar="N",
    help="Identification: people enrolled, at most.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="Identification: explain against the K best.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of all draws.")
@_bootstrap
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, metavar="N", help="Pairs at once.")
@_device
@click.option("--plot", metavar="FILE", type=click.Path(), help="Draw the curves: .png, .pdf or .svg.")
@click.option(
    "--out", metavar="FILE", type=click.Path(), help="Write all figures as JSON, anew after every protocol: .json."
)
@_quiet
@_json
def evaluate_faithfulness(**options: Any) -> int:
    """Are explanations true? Region swaps with known truth, deletion and insertion, locality, decision patches.

    Every figure stands beside those of two controls that know nothing of the pair.
    """
    from .faithfulness import FaithfulnessRequest, run_faithfulness

    return run_faithfulness(FaithfulnessRequest(**options))


@xcos.command()
@_gallery
@click.argument("photos", nargs=-1, required=True, type=click.Path(), metavar="PHOTOS...")
@_faces
@click.option("--person", metavar="NAME", help="Who is on all of them; by default the folder each lies in.")
@click.option(
    "--labels",
    metavar="CSV",
    type=click.Path(),
    help="Columns picture (path below its folder or archive), person, and any others, which become metadata.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the templates, for a new gallery.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=256, show_default=True, metavar="N", help="Faces a commit."
)
@click.option("--replace", is_flag=True, help="Enrol pictures again that are in; by default they are skipped.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Threads that read."
)
@_quiet
@_json
def enroll(**options: Any) -> int:
    """Enrol photographs in GALLERY: files, folders (all below them) and zip archives.

    GALLERY is a folder, made if it is not there. Running the command again goes on where it was interrupted.
    Pictures without a face are listed and left out.
    """
    from .enroll import Request, run

    return run(Request(**options))


@xcos.command()
@_gallery
@click.argument("probes", nargs=-1, required=True, type=click.Path(), metavar="PROBES...")
@_faces
@click.option(
    "-k", type=click.IntRange(1, 2048), default=5, show_default=True, metavar="N", help="Candidates for each probe."
)
@_threshold
@click.option(
    "--fpir",
    type=_Finite(),
    metavar="RATE",
    help="The threshold at which a stranger finds anybody at most at this rate, for a gallery of this size.",
)
@click.option("--where", metavar="SQL", help="Only faces that a condition selects: \"person = 'Ann'\".")
@click.option(
    "--attention",
    type=click.Choice(["own", "uniform", "norm"]),
    default="own",
    show_default=True,
    help="How the cells are weighed.",
)
@click.option("--by-person", is_flag=True, help="Candidates are persons, by the best of their faces.")
@click.option(
    "--fuse", "fusion", type=click.Choice(["max", "mean"]), help="All PROBES are one person: one score of all."
)
@click.option(
    "--rerank",
    type=click.IntRange(1, 2048),
    metavar="R",
    help="Approximate: re-rank the R best by norm attention; the recall is measured on some of the probes.",
)
@click.option("--explain", is_flag=True, help="With --json: the maps of every candidate.")
@_quiet
@_json
def search(**options: Any) -> int:
    """Who in GALLERY looks like the faces of PROBES? Exact: every enrolled face is scored."""
    from .search import Request, run

    return run(Request(**options))


@xcos.group(invoke_without_command=True)
@click.pass_context
def gallery(ctx: click.Context) -> None:
    """Look after a gallery."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@gallery.command("info")
@_gallery
@_json
def gallery_info(gallery: str, as_json: bool) -> int:
    """Faces, persons, sizes, and the model that it belongs to."""
    from .gallery import info

    return info(gallery, as_json)


@gallery.command("remove")
@_gallery
@click.argument("ids", nargs=-1)
@click.option("--person", "persons", multiple=True, metavar="NAME", help="All faces of a person; repeatable.")
@click.option("--ids-from", metavar="FILE", type=click.Path(allow_dash=True), help="Ids, one a line; - is stdin.")
@_json
def gallery_remove(**options: Any) -> int:
    """Remove faces: all that are named, or none if one is not there."""
    from .gallery import remove

    return remove(**options)


@gallery.command("compact")
@_gallery
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="To wait for readers of old versions.",
)
@_json
def gallery_compact(gallery: str, timeout: float, as_json: bool) -> int:
    """Delete removed faces from the disk, with all old versions."""
    from .gallery import compact

    return compact(gallery, timeout, as_json)


@gallery.command("verify")
@_gallery
@_quiet
@_json
def gallery_verify(gallery: str, quiet: bool, as_json: bool) -> int:
    """Compare everything with the checksums it was written with; exit status 2 if something is damaged."""
    from .gallery import verify

    return verify(gallery, quiet, as_json)


@xcos.command()
@_gallery
@_model
@_device
@click.option("--threshold", type=_Finite(), metavar="T", help="Pairs that score T or more; by default the model's.")
@click.option("--out", metavar="CSV", type=click.Path(), help="Write the pairs.")
@_quiet
@_json
def dedupe(**options: Any) -> int:
    """Find faces of GALLERY that look like the same person: every pair is scored."""
    from .gallery import dedupe

    return dedupe(**options)


@xcos.command()
@click.argument("new", required=False, type=click.Path(), metavar="[NEW.json]")
@_model
@click.option(
    "--stage",
    "stages",
    type=click.Choice(["decode", "detect", "align", "backbone", "projection", "head", "pair", "search"]),
    multiple=True,
    help="May be repeated. [default: all]",
)
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(["eager", "for_inference", "compiled", "graph", "onnxruntime", "tensorrt"]),
    multiple=True,
    help="May be repeated. [default: all]",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1, 65_536),
    multiple=True,
    metavar="N",
    help="Pictures, pairs or probes a call; may be repeated. [default: 1, 4 and 16]",
)
@click.option(
    "--device",
    "devices",
    type=_DeviceName(),
    multiple=True,
    default=("auto",),
    show_default=True,
    metavar=_DEVICES,
    help="May be repeated; auto: CUDA if it works.",
)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    multiple=True,
    default=("fp32",),
    show_default=True,
    help="Of the backbone and of searched templates; may be repeated.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads of every runtime. [default: torch's]")
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 3600),
    default=0.5,
    show_default=True,
    metavar="S",
    help="To spend on a case, making its runtime ready not counted.",
)
@click.option("--cold", is_flag=True, help="Empty the caches before every call.")
@click.option(
    "--gallery",
    type=click.IntRange(1, 100_000_000),
    default=20_000,
    show_default=True,
    metavar="N",
    help="Generated faces that search goes through.",
)
@click.option("--picture", metavar="FILE", type=click.Path(), help="A photograph of a face, for decode, detect, align.")
@_detector
@click.option(
    "--compare",
    "old",
    metavar="OLD.json",
    type=click.Path(),
    help="Say what changed since OLD.json; with NEW.json nothing is measured.",
)
@click.option(
    "--minimum",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="X",
    help="The smallest change that counts. [default: 0.05]",
)
@click.option("--plot", metavar="FILE", type=click.Path(), help="Draw latency and stages: .png, .pdf or .svg.")
@click.option(
    "--json",
    "json_file",
    metavar="FILE|-",
    type=click.Path(allow_dash=True),
    help="Write all figures and samples; - prints them instead of tables.",
)
@_quiet
def bench(**options: Any) -> int:
    """Latency and throughput of a model on this machine, by stage and runtime; or what changed between two runs.

    Runtimes that are missing here are listed with the reason. Nothing else should run meanwhile.
    """
    from .bench import Request, run

    return run(Request(**options))
