"""Loads the compiled library and holds what the operators' Python halves share: autograd, autocast and vmap plumbing.

An eager call takes the shortest way that is right:

* nothing to differentiate: straight to the CPU or CUDA kernel (about 3 us for one pair on a CPU);
* something to differentiate: the operator's ``autograd.Function``;
* something to differentiate in forward mode (``torch.func.jvp``, ``jacfwd``, ``torch.autograd.forward_ad``): the
  operator in plain torch, of :mod:`xcos_ext.reference`, which has derivatives of every kind and order;
* inside ``torch.compile``, ``torch.export`` or a ``torch.func`` transform: the registered operator, whose autograd,
  autocast and vmap kernels are the same function and rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # first: it loads the libraries that xcos_ext._C is linked against
from torch import Tensor
from torch.autograd import forward_ad

from ._vmap import unfold

__all__ = [
    "apply",
    "backward_function",
    "below_autograd",
    "build_info",
    "compiled",
    "differentiable",
    "forward_mode",
    "inference_only",
    "library",
    "plain_forms",
    "promote_under_autocast",
    "say_it_better",
    "tracked",
]


def _load() -> Any:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise ImportError(
            f"xcos_ext needs torch 2.10 or later (its operators use the stable ABI of that release); "
            f"this is torch {torch.__version__}. Upgrade it:  pip install 'torch>=2.10'"
        )
    try:
        from xcos_ext import _C  # type: ignore[attr-defined]
    except ImportError as error:
        folder = Path(__file__).resolve().parent.parent
        if not list(folder.glob("_C*.so")):
            raise ImportError(
                f"xcos_ext was imported from {folder}, which holds no compiled library. If that is the source folder, "
                "run from another folder, or build it in place:  pip install -e ."
            ) from error
        raise ImportError(
            f"the compiled part of xcos_ext could not be loaded ({error}). Build it against this torch "
            f"({torch.__version__}) from the source folder:  pip install --force-reinstall --no-deps ."
        ) from error
    _C.build_info()  # a wrong XCOS_CPU_ISA is said now (ValueError): torch would make it a RuntimeError of an operator
    return _C


compiled = _load()

# Fragment of the library that the compiled code defined; it must outlive the module.
library = torch.library.Library("xcos_ext", "FRAGMENT")

#: Operators in plain torch, by name with overload; _forward_mode.py, which knows them all, fills it.
plain_forms: dict[str, Callable[..., Any]] = {}

below_autograd = torch._C._AutoDispatchBelowAutograd


def build_info() -> dict[str, Any]:
    """What was built and what runs: version, compiler, torch, instruction sets, CUDA architectures.

    Returns:
        A dictionary with the keys ``version``, ``compiler``, ``torch`` (built against), ``torch_abi``,
        ``isa_compiled``, ``isa_supported``, ``isa`` (in use), ``cuda`` (bool), ``cuda_compiler`` and
        ``cuda_architectures``.

    >>> sorted(build_info())[:3]
    ['compiler', 'cuda', 'cuda_architectures']
    """
    return compiled.build_info()


def forward_mode(*values: Any) -> bool:
    """Whether one of the values may have a tangent, which a kernel would lose without a word."""
    if forward_ad._current_level < 0:
        return False
    tensors = [value for value in values if isinstance(value, Tensor)]
    if torch._C._are_functorch_transforms_active():  # some of which cannot be asked for tangents
        return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def tracked(*tensors: Tensor | None) -> bool:
    """Whether what is computed from the tensors is to be differentiated."""
    wanted = torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)
    return wanted or forward_mode(*tensors)


def say_it_better(error: RuntimeError) -> None:
    """Raise what the dispatcher says of arguments of a wrong kind in the words of all other errors.

    Looking at their types before every call would cost what the call costs.
    """
    if found := _WRONG_TYPE.search(str(error)):
        name, expected, argument, got = found.groups()
        words = _IN_WORDS.get(expected, f"a value of type {expected}")
        raise TypeError(f"{name}: {argument}: expected {words}, got {got}") from None
    if found := _WRONG_BACKEND.search(str(error)):
        name, got = found.groups()
        raise RuntimeError(f"{name}: expected dense tensors of a CPU or a CUDA device, got {got} ones") from None


_WRONG_TYPE = re.compile(
    r"xcos_ext::(\w+)\(\) Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(\w+)'"
)
_WRONG_BACKEND = re.compile(r"Could not run 'xcos_ext::(\w+)(?:\.\w+)?' with arguments from the '(\w+)' backend")
_IN_WORDS = {
    "float": "a number",
    "int": "an integer of 64 bits",
    "bool": "True or False",
    "Tensor": "a tensor",
    "Optional[Tensor]": "a tensor or None",
    "List[Tensor]": "tensors",
    "List[float]": "numbers",
}


def apply(function: type[torch.autograd.Function], op: Any, needs_grad: bool, *args: Any) -> Any:
    """Calls an operator on the shortest right way; see the module's docstring."""
    if torch.compiler.is_compiling():
        return op(*args)
    if forward_ad._current_level >= 0 and forward_mode(*args):
        return plain_forms.get(getattr(function, "operator", ""), function.apply)(*args)
    try:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        if needs_grad and torch.is_grad_enabled():
            # autograd.Function.apply binds the arguments to forward's signature first, which costs 20 us a call and
            # changes nothing for positional arguments.
            return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
        with below_autograd():
            return op(*args)
    except RuntimeError as error:
        say_it_better(error)
        raise


def promote_under_autocast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast, maps of different precision are brought to the wider one; nothing else is ever cast.

    The kernels read half precision and sum in fp32, so there is nothing to gain from casting maps that agree.
    """
    if torch.is_autocast_enabled(a.device.type) and a.is_floating_point() and b.is_floating_point():
        wide = torch.promote_types(a.dtype, b.dtype)
        return a.to(wide), b.to(wide)
    return a, b


def backward_function(name: str, op: Any, vmap_rule: Callable[..., Any] | None = None) -> type[torch.autograd.Function]:
    """The backward operator ``op`` as a function of its own, which refuses to be differentiated again.

    Without it, a gradient penalty on a constant incoming gradient would silently get no gradient at all.
    """

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"{name}: double backward is not implemented; xcos_ext.reference.{name} can be differentiated "
            "any number of times"
        )

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:  # type: ignore[override]
            with below_autograd():
                return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        backward = jvp = staticmethod(refuse)  # type: ignore[assignment]

    library.impl(f"{name}_backward", Backward.apply, "Autograd")
    if vmap_rule is not None:
        Backward.vmap = staticmethod(vmap_rule)  # type: ignore[method-assign]
        torch.library.register_vmap(op, vmap_rule, lib=library)
    return Backward


def inference_only(name: str, op: Any, check: Callable[..., None]) -> None:
    """Register an autograd kernel for an operator without derivatives: ``check`` refuses to lose any."""

    def kernel(*args: Any) -> Any:
        check(*args)
        with below_autograd():
            return op(*args)

    library.impl(name, kernel, "Autograd")


def differentiable(
    name: str,
    op: Any,
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
    fold_arguments: Callable[..., Any] | None = None,
) -> type[torch.autograd.Function]:
    """The operator ``name`` as an ``autograd.Function``, registered as its autograd kernel.

    Args:
        name: with its overload, e.g. ``"xcos_score.maps"``.
        op: the operator; its first two arguments are feature maps where ``fold_arguments`` is given.
        setup_context: of the function.
        gradients: its backward.
        fold_arguments: ``(size, in_dims, *args) -> args``: folds a mapped dimension of ``size`` examples into the
            batch. With it come kernels for autocast and vmap.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:  # type: ignore[override]
            with below_autograd():
                return op(*args)

    Function.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    Function.backward = staticmethod(gradients)  # type: ignore[method-assign]
    Function.operator = name  # type: ignore[attr-defined]
    library.impl(name, Function.apply, "Autograd")
    if fold_arguments is None:
        return Function

    def vmap_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        folded = fold_arguments(info.batch_size, in_dims, *args)
        needs_grad = any(isinstance(value, Tensor) and value.requires_grad for value in folded)
        made = unfold(apply(Function, op, needs_grad, *folded), info.batch_size)
        return made, 0 if isinstance(made, Tensor) else (0,) * len(made)

    Function.vmap = staticmethod(vmap_rule)  # type: ignore[method-assign]
    for device in ("CPU", "CUDA"):

        def autocast_kernel(a: Tensor, b: Tensor, *rest: Any, _device: str = device.lower()) -> Any:
            a, b = promote_under_autocast(a, b)
            with torch.autocast(_device, enabled=False):
                return op(a, b, *rest)

        library.impl(name, autocast_kernel, f"Autocast{device}")

    torch.library.register_vmap(op, vmap_rule, lib=library)
    return Function
