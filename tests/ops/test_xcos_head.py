"""xcos_head: against the reference, what heads do with it, contracts, errors, torch's machinery."""

from __future__ import annotations

import copy

import pytest
import torch
from samples import LAYOUTS, feature_maps
from torch._subclasses.fake_tensor import FakeTensorMode

import xcos_ext
from xcos_ext import reference
from xcos_ext.model import XCosAttention, XCosHead

# Two bfloat16 for a value, where the matrix unit is used, lose up to 2^-16 of a logit's terms.
CLOSE = {"rtol": 0, "atol": 1e-5}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(5, 32, 7, 7), (3, 64, 7, 7), (2, 5, 3, 5), (1, 17, 1, 1), (3, 33, 8, 8), (2, 3, 1, 64), (2, 32, 64, 1),
          (4, 1, 4, 6), (2, 32, 1, 63), (2, 32, 32, 1)]  # fmt: skip
FORMS = [(symmetric, residual) for symmetric in (False, True) for residual in (False, True)]


def attention(channels=32, *, seed=0, **options):
    """An attention whose batch norms and last convolution are not as they start."""
    torch.manual_seed(seed)
    net = XCosAttention(channels, **options)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 1, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, torch.nn.PReLU):
            torch.nn.init.uniform_(module.weight, -0.2, 0.5)
    if net.residual:
        torch.nn.init.normal_(net.attention[3].weight, 0, 0.2)
    return net.eval().requires_grad_(False)


def head(channels=32, **options):
    return XCosHead(channels, channels, attention=attention(channels, **options), projection="none").eval()


def exact(net, a, b):
    """The reference in float64, from the parameters as they are."""
    parameters = copy.deepcopy(net).double().head_parameters()
    options = {"temperature": net.temperature, "symmetric": net.symmetric, "return_maps": True}
    return reference.xcos_head(a.double(), b.double(), parameters, **options)


def call(net, a, b):
    options = {"temperature": net.temperature, "symmetric": net.symmetric, "return_maps": True}
    return xcos_ext.xcos_head(a, b, net.head_parameters(), **options)


def assert_same(actual, expected, **tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32 and one.is_contiguous()
        torch.testing.assert_close(one.double(), other.double(), **(tolerance or CLOSE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric, residual", FORMS)
def test_matches_the_reference(shape, symmetric, residual, dtype, device):
    net = attention(shape[1], symmetric=symmetric, residual=residual, temperature=0.8).to(device)
    a, b = feature_maps(shape, dtype, "contiguous", device)
    maps = call(net, a, b)
    assert_same(maps, exact(net, a, b))
    options = {"temperature": 0.8, "symmetric": symmetric}
    assert torch.equal(xcos_ext.xcos_head(a, b, net.head_parameters(), **options), maps.score)
    torch.testing.assert_close(maps.attention.sum((1, 2)), torch.ones(shape[0], device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_every_layout(layout, dtype, device):
    net = attention(temperature=0.8).to(device)
    a, b = feature_maps((4, 32, 7, 7), dtype, layout, device)
    assert_same(call(net, a, b), exact(net, a, b))
    mixed = b.contiguous(memory_format=torch.channels_last)
    assert_same(call(net, a, mixed), exact(net, a, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_reads_parameters_of_every_type_and_layout(memory_format, dtype, device):
    net = attention(residual=True).to(device=device, dtype=dtype, memory_format=memory_format)
    a, b = feature_maps((4, 32, 7, 7), torch.float32, "contiguous", device)
    assert_same(call(net, a, b), exact(net, a, b))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("residual", [False, True])
def test_temperature(temperature, residual, device):
    net = attention(temperature=temperature, residual=residual).to(device)
    a, b = feature_maps((4, 32, 7, 7), torch.float32, "contiguous", device)
    # What logits of the order of 1 lose reaches W in units of the temperature.
    assert_same(call(net, a, b), exact(net, a, b), rtol=0, atol=max(1e-5, 2e-6 / temperature))


def test_one_face_against_many_is_read_in_place(device):
    net = attention().to(device)
    a, b = feature_maps((9, 32, 7, 7), torch.float32, "contiguous", device)
    shared = a[:1].expand(9, -1, -1, -1)
    for one, other in ((shared, b), (b, shared), (shared, shared)):
        for x, y in zip(call(net, one, other), call(net, one.clone(), other.clone()), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_order_of_faces(symmetric, device):
    net = attention(symmetric=symmetric).to(device)
    a, b = feature_maps((6, 32, 7, 7), torch.float32, "contiguous", device)
    forth, back = call(net, a, b).attention, call(net, b, a).attention
    assert torch.allclose(forth, back, rtol=0, atol=1e-6) == symmetric


def test_alone_as_in_a_batch_and_for_every_number_of_threads(device):
    net = attention().to(device)
    a, b = feature_maps((37, 32, 7, 7), torch.float32, "contiguous", device)
    together = call(net, a, b)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert all(torch.equal(x, y) for x, y in zip(call(net, a, b), together, strict=True))
    finally:
        torch.set_num_threads(threads)
    for i in (0, 1, 17, 36):
        alone = call(net, a[i : i + 1], b[i : i + 1])
        assert all(torch.equal(x[0], y[i]) for x, y in zip(alone, together, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "payload"])
@pytest.mark.parametrize("shape", [(5, 32, 7, 7), (5, 7, 3, 5)], ids=str)
def test_nan_and_infinity_stay_in_their_pair(shape, value, device):
    net = attention(shape[1]).to(device)
    a, b = feature_maps(shape, torch.float32, "contiguous", device)
    clean = call(net, a, b)
    broken = a.clone()
    if value == "payload":  # a NaN whose every bit is set
        broken.view(torch.int32)[2, 3, 1, 2] = -1
    else:
        broken[2, 3, 1, 2] = value
    maps = call(net, broken, b)
    others = torch.arange(shape[0], device=device) != 2
    for one, other in zip(maps, clean, strict=True):
        assert torch.equal(one[others], other[others])
    assert maps.score[2].isnan() and maps.attention[2].isnan().all()
    assert maps.similarity[2].isnan().sum() == 1 and maps.similarity[2, 1, 2].isnan()


def test_zero_cells_and_zero_faces(device):
    for residual in (False, True):
        net = attention(residual=residual).to(device)
        a, b = feature_maps((4, 32, 7, 7), torch.float32, "contiguous", device)
        a[:, :, 2, 3] = 0
        b[1] = 0
        a[3] = b[3] = 0
        maps = call(net, a, b)
        assert_same(maps, exact(net, a, b))
        assert (maps.similarity[:, 2, 3] == 0).all() and (maps.score[[1, 3]] == 0).all()


@pytest.mark.parametrize("maps", [False, True])
def test_no_pairs(maps, device):
    net = attention().to(device)
    a = torch.empty(0, 32, 7, 7, device=device)
    out = xcos_ext.xcos_head(a, a, net.head_parameters(), return_maps=maps)
    shapes = [tuple(t.shape) for t in (out if maps else (out,))]
    assert shapes == ([(0,), (0, 7, 7), (0, 7, 7)] if maps else [(0,)])


# ------------------------------------------------------------------------------------------------ heads


@pytest.fixture
def calls(monkeypatch):
    """How often heads went through the operator."""
    made = []

    def counted(*args, **options):
        made.append(1)
        return xcos_ext.xcos_head(*args, **options)

    monkeypatch.setattr("xcos_ext.model.head.xcos_head", counted)
    return made


@pytest.mark.parametrize("symmetric, residual", FORMS)
def test_a_head_uses_it_without_gradients(symmetric, residual, calls, device):
    model = head(symmetric=symmetric, residual=residual, temperature=0.7).to(device)
    a, b = feature_maps((6, 32, 7, 7), torch.float32, "contiguous", device)
    with torch.no_grad():
        fused, alone = model.score(a, b, return_maps=True), model.score(a, b)
    with torch.inference_mode():
        inference = model.score(a, b)
    assert len(calls) == 3
    composed = model.score(a, b, return_maps=True)
    assert len(calls) == 3
    assert_same(fused, composed)
    assert torch.equal(alone, fused.score) and torch.equal(inference, alone)


def test_when_a_head_keeps_to_the_composition(calls, device):
    a, b = feature_maps((3, 32, 7, 7), torch.float32, "contiguous", device)
    large = torch.randn(2, 32, 8, 9, device=device)
    cases = {
        "training": (head().train(), a, b),
        "norms in training": (head(), a, b),
        "min-shift": (head(normalize="min-shift"), a, b),
        "hidden": (head(hidden=8), a, b),
        "matching": (head(), a, b),
        "65 cells and more": (head(), large, large),
        "float64": (head().double(), a.double(), b.double()),
        "hook": (head(), a, b),
        "replaced": (head(), a, b),
        "bare norms": (head(), a, b),
        "norms wider": (head().half(), a.half(), b.half()),
    }
    cases["norms in training"][0].attention.attention[1].train()
    cases["matching"][0].set_matching(1)
    seen = []
    cases["hook"][0].attention.embedding_net.register_forward_hook(lambda *_: seen.append(1))
    cases["replaced"][0].attention.embedding_net[2] = torch.nn.ReLU()
    cases["bare norms"][0].attention.attention[4] = torch.nn.BatchNorm2d(1, affine=False).eval()
    for module in cases["norms wider"][0].modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.float()
    with torch.no_grad():
        for model, x, y in cases.values():
            model.to(device).score(x, y)
    assert not calls and len(seen) == 2


def test_a_heads_mistakes_are_named_as_before():
    model = head()
    with torch.no_grad():
        for bad in (torch.randn(2, 31, 7, 7), torch.randn(32, 7, 7)):
            with pytest.raises(ValueError, match=r"^features_a: expected \[N, 32, H, W\]"):
                model.score(bad, bad)


@pytest.mark.thorough
def test_parameters_are_read_at_every_call(calls, device):
    """Nothing is kept that could go stale, whichever way parameters change."""
    model = head().to(device)
    net = model.attention
    a, b = feature_maps((3, 32, 7, 7), torch.float32, "contiguous", device)

    def optimiser_step():
        net.requires_grad_(True)
        model.score(a, b).sum().backward()
        torch.optim.SGD(net.parameters(), 1.0).step()
        net.requires_grad_(False)

    def training_forward():
        net.train()
        model.score(3 * a, b)
        net.eval()

    changes = {
        "optimiser": optimiser_step,
        "running statistics": training_forward,
        "load_state_dict": lambda: net.load_state_dict(attention(seed=3).state_dict()),
        "assign": lambda: net.load_state_dict(attention(seed=4).to(device).state_dict(), assign=True),
        "data": lambda: net.attention[0].weight.data.mul_(1.5),
        "dtype": lambda: net.half().float(),
        "numpy": lambda: net.attention[3].weight.data.cpu().numpy().__imul__(0.5) if device == "cpu" else None,
    }
    before = None
    for name, change in changes.items():
        change()
        with torch.no_grad():
            fused = model.score(a, b, return_maps=True)
        assert_same(fused, exact(net, a, b))
        assert name == "numpy" or before is None or not torch.equal(fused.attention, before), name
        before = fused.attention
    assert len(calls) == len(changes)


def test_a_heads_state_is_as_before(device):
    model = head().to(device)
    keys = list(model.state_dict())
    a, b = feature_maps((3, 32, 7, 7), torch.float32, "contiguous", device)
    with torch.no_grad():
        model.score(a, b)
    assert list(model.state_dict()) == keys
    assert not [name for name in vars(model.attention) if "cache" in name]


# ------------------------------------------------------------------------------------------------ mistakes


def test_gradients_are_refused(device):
    net = attention().to(device)
    a, b = feature_maps((2, 32, 7, 7), torch.float32, "contiguous", device)
    a.requires_grad_()
    for run in (
        lambda: call(net, a, b),
        lambda: call(copy.deepcopy(net).requires_grad_(True), a.detach(), b),
        lambda: torch.ops.xcos_ext.xcos_head(a, b, net.head_parameters().tensors(), [1e-5] * 3, 1.0, True, False, 1e-6),
    ):
        with pytest.raises(RuntimeError, match=r"xcos_head: expected no gradient .*torch.no_grad\(\)"):
            run()
    with torch.no_grad():
        call(net, a, b)


@pytest.mark.thorough
def test_the_reference_can_be_differentiated():
    net = attention(4).double()
    a, b = (t.requires_grad_() for t in feature_maps((2, 4, 3, 2), torch.float64, "contiguous", "cpu"))
    assert torch.autograd.gradcheck(lambda x, y: reference.xcos_head(x, y, net.head_parameters()), (a, b))


def _replaced(index, tensor):
    def change(tensors):
        tensors[index] = tensor
        return tensors

    return change


BAD = {
    "rank": ({"a": (32, 7, 7)}, "a: expected a feature map [N, C, H, W], got shape [32, 7, 7]"),
    "shapes": ({"b": (3, 32, 7, 7)}, "b: expected shape [2, 32, 7, 7] like a, got [3, 32, 7, 7]"),
    "float64": ({"dtype": torch.float64}, "a: expected dtype float16, bfloat16 or float32, got float64"),
    "cells": (
        {"a": (2, 32, 8, 9), "b": (2, 32, 8, 9)},
        "a: expected at most 64 cells, got shape [2, 32, 8, 9]",
    ),
    "channels": (
        {"a": (2, 31, 7, 7), "b": (2, 31, 7, 7)},
        "embed_weight: expected shape [16, 31, 3, 3], got [16, 32, 3, 3]",
    ),
    "too few": ({"parameters": lambda t: t[:3]}, "parameters: expected 21 tensors without residual, got 3"),
    "residual": ({"residual": True}, "parameters: expected 16 tensors with residual, got 21"),
    "rank of a parameter": (
        {"parameters": _replaced(8, torch.ones(16, 1))},
        "first_bias: expected shape [16], got [16, 1]",
    ),
    "slope": ({"parameters": _replaced(20, torch.ones(16))}, "last_slope: expected shape [1], got [16]"),
    "type of parameters": (
        {"parameters": lambda t: [x.double() for x in t]},
        "embed_weight: expected dtype float16, bfloat16 or float32, got float64",
    ),
    "types of parameters": (
        {"parameters": _replaced(15, torch.ones(1).half())},
        "last_bias: expected dtype float32 like embed_weight, got float16",
    ),
    "norm_eps": ({"norm_eps": [1e-5]}, "norm_eps: expected 3 numbers, got 1"),
    "negative norm_eps": ({"norm_eps": [1e-5, -1.0, 0.0]}, "norm_eps: expected finite numbers, 0 or more, got -1"),
    "temperature": ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0"),
    "eps": ({"eps": float("nan")}, "eps: expected a finite number above 0, got nan"),
}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name, fake, device):
    changes, message = BAD[name]
    dtype = changes.get("dtype", torch.float32)
    arguments = [
        torch.ones(changes.get("a", (2, 32, 7, 7)), dtype=dtype, device=device),
        torch.ones(changes.get("b", (2, 32, 7, 7)), dtype=dtype, device=device),
        [t.to(device) for t in changes.get("parameters", lambda t: t)(list(attention().head_parameters().tensors()))],
        changes.get("norm_eps", [1e-5] * 3),
        changes.get("temperature", 1.0),
        True,
        changes.get("residual", False),
        changes.get("eps", 1e-6),
    ]
    for op in (torch.ops.xcos_ext.xcos_head.default, torch.ops.xcos_ext.xcos_head.maps):
        with pytest.raises(RuntimeError) as error:
            if fake:
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    made = [mode.from_tensor(t) for t in arguments[2]]
                    op(mode.from_tensor(arguments[0]), mode.from_tensor(arguments[1]), made, *arguments[3:])
            else:
                op(*arguments)
        assert str(error.value) == f"xcos_head: {message}"


def test_types_are_named():
    parameters, a = attention().head_parameters(), torch.ones(2, 32, 7, 7)
    for arguments, options, message in (
        (([1.0], a, parameters), {}, "a: expected a torch.Tensor, got list"),
        ((a, None, parameters), {}, "b: expected a torch.Tensor, got NoneType"),
        ((a, a, parameters.tensors()), {}, "parameters: expected HeadParameters, got list"),
        ((a, a, parameters), {"temperature": torch.ones(1)}, "temperature: expected a number, got a tensor"),
        ((a, a, parameters), {"symmetric": "no"}, "symmetric: expected True or False, got str"),
        ((a, a, parameters), {"return_maps": 1}, "return_maps: expected True or False, got int"),
    ):
        with pytest.raises(TypeError) as error:
            xcos_ext.xcos_head(*arguments, **options)
        assert f"xcos_head: {message}" in str(error.value)


# ------------------------------------------------------------------------------------------------ machinery


@pytest.mark.parametrize("overload", ["default", "maps"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(overload, layout, residual, device):
    parameters = attention(8, residual=residual).to(device).head_parameters()
    a, b = feature_maps((3, 8, 3, 5), torch.float32, layout, device)
    arguments = (a, b, parameters.tensors(), parameters.norm_eps(), 0.9, True, residual, 1e-6)
    op = getattr(torch.ops.xcos_ext.xcos_head, overload)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.thorough
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_head(dynamic, device):
    model = head().to(device)
    a, b = feature_maps((4, 32, 7, 7), torch.float32, "contiguous", device)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    def run(x, y):
        return model.score(x * 2, y, return_maps=True)

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
        assert_same(compiled(a, b), exact(model.attention, 2 * a, b))
        assert "xcos_head" in graphs[-1]
        again = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert_same(again(a, b), exact(model.attention, 2 * a, b))
    assert_same([t.detach() for t in compiled(a, b)], exact(model.attention, 2 * a, b))  # with gradients: composed


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace says that its days are over
@pytest.mark.parametrize("strict", [False, True])
def test_exported_graphs_hold_standard_operators(strict):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head()

        def forward(self, a, b):
            return self.head.score(a, b)

    module, n = Attention().eval(), torch.export.Dim("n", min=2, max=64)
    a, b = feature_maps((4, 32, 7, 7), torch.float32, "contiguous", "cpu")
    with torch.no_grad():
        program = torch.export.export(module, (a, b), dynamic_shapes=({0: n}, {0: n}), strict=strict)
        assert "xcos_ext.xcos_head" not in str(program.graph)
        traced = torch.jit.trace(module, (a, b), check_trace=False)
        assert "xcos_ext::xcos_head" not in str(traced.inlined_graph)
        torch.testing.assert_close(program.module()(a, b), module(a, b), **CLOSE)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("dims", [(0, 0), (1, None), (None, 2)])
def test_vmap(dims, maps):
    net = attention(8)
    made = [torch.randn(2, 8, 3, 5) if d is None else torch.randn(3, 2, 8, 3, 5).movedim(0, d) for d in dims]

    def run(operator):
        def one(x, y):
            out = operator(x, y, net.head_parameters(), return_maps=maps)
            return tuple(out) if maps else out

        return torch.vmap(one, in_dims=dims)(*made)

    torch.testing.assert_close(run(xcos_ext.xcos_head), run(reference.xcos_head), **CLOSE)


def test_vmap_refuses_mapped_parameters():
    net, a = attention(8), torch.randn(2, 8, 3, 5)
    parameters = net.head_parameters()
    with pytest.raises(RuntimeError, match="parameters: expected the same for all examples under vmap"):
        torch.vmap(
            lambda bias: xcos_ext.xcos_head(a, a, parameters._replace(embed=parameters.embed._replace(bias=bias)))
        )(torch.randn(3, 16))


def test_autocast_brings_features_to_the_wider_type(device):
    model = head().to(device)
    a, b = feature_maps((3, 32, 7, 7), torch.float32, "contiguous", device)
    expected = exact(model.attention, a, b.half()).score
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        score = xcos_ext.xcos_head(a, b.half(), model.attention.head_parameters())
        assert_same([model.score(a, b)], [exact(model.attention, a, b).score])
    assert_same([score], [expected])
