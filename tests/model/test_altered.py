"""One head, several answers: whatever is done to a module, every path gives its answer or refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import randomised
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import fuse_conv_bn_eval, parametrize, prune

import xcos_ext
from xcos_ext.backbones import Recogniser
from xcos_ext.backbones.layers import from_layer
from xcos_ext.deploy import for_inference
from xcos_ext.deploy.graphs import check_exportable
from xcos_ext.model import XCosAttention, XCosHead, XCosModel, plug
from xcos_ext.ops.xcos_head import xcos_head


class Body(Recogniser):
    """Convolution, batch norm and ReLU."""

    grid_shape = (8, 7, 7)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 16, 1), nn.BatchNorm2d(8), nn.ReLU())

    def grid(self, images: Tensor) -> Tensor:
        return self.net(images)


def built(**options: Any) -> XCosModel:
    torch.manual_seed(0)
    attention = XCosAttention(temperature=0.1, **options)
    nn.init.normal_(attention.attention[3].weight)  # of a residual one it is zero
    return randomised(XCosModel(Body(), XCosHead(8, 32, attention=attention))).float()


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Flat(XCosAttention):
    def _weights(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, 1 / 49)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def replaced(place: int, make: Callable[[nn.Module], nn.Module], net: str = "embedding_net") -> Callable[..., None]:
    def change(model: XCosModel) -> None:
        layers = getattr(model.head.attention, net)
        layers[place] = make(layers[place])

    return change


def with_options(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def make(old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.Conv2d)
        torch.manual_seed(1)
        settings = {"kernel_size": 3, "padding": 1} | options
        return nn.Conv2d(old.in_channels, old.out_channels, **settings)  # type: ignore[arg-type]

    return make


def subclassed(old: nn.Module) -> nn.Module:
    made = Doubled(32, 16, 3, padding=1)
    made.load_state_dict(old.state_dict())
    return made


def times(factor: float) -> Callable[..., Tensor]:
    return lambda _module, _args, made: made * factor


def layer_of(model: XCosModel, net: str, place: int) -> Any:
    return getattr(model.head.attention, net)[place]


def patched(net: str, place: int, name: str) -> Callable[[XCosModel], None]:
    def change(model: XCosModel) -> None:
        layer = layer_of(model, net, place)
        own = getattr(layer, name)
        setattr(layer, name, lambda *given: 2 * own(*given))

    return change


def flat(model: XCosModel) -> None:
    made = Flat(**model.head.attention.config()).eval()
    made.load_state_dict(model.head.attention.state_dict())
    model.head.attention = made


def fused_by_hand(model: XCosModel) -> None:
    layers = model.head.attention.embedding_net
    layers[0], layers[1] = fuse_conv_bn_eval(layers[0], layers[1]), nn.Identity()


def appended(net: str) -> Callable[[XCosModel], None]:
    return lambda model: getattr(model.head.attention, net).append(nn.Tanh())


def pruned(model: XCosModel) -> None:
    prune.l1_unstructured(layer_of(model, "attention", 0), "weight", 0.5)


#: What is done to the attention network, by name.
DONE: dict[str, Callable[[XCosModel], Any]] = {
    "forward hook": lambda m: layer_of(m, "embedding_net", 0).register_forward_hook(times(2)),
    "hook of a network": lambda m: m.head.attention.attention.register_forward_hook(times(2)),
    "pre-hook": lambda m: layer_of(m, "attention", 3).register_forward_pre_hook(lambda _, given: (2 * given[0],)),
    "hook of the attention": lambda m: m.head.attention.register_forward_hook(lambda _, given, made: made.roll(1, 2)),
    "patched forward": patched("embedding_net", 2, "forward"),
    "patched convolution": patched("attention", 0, "_conv_forward"),
    "subclass of a layer": replaced(0, subclassed),
    "subclass of the attention": flat,
    "weight norm": lambda m: nn.utils.weight_norm(layer_of(m, "embedding_net", 0)),
    "spectral norm": lambda m: nn.utils.spectral_norm(layer_of(m, "attention", 0)).eval(),
    "parametrised": lambda m: parametrize.register_parametrization(layer_of(m, "attention", 0), "weight", Half()),
    "pruned": pruned,
    "dilation": replaced(0, with_options(padding=2, dilation=2)),
    "kernel": replaced(0, with_options(kernel_size=5, padding=2)),
    "small kernel": replaced(3, with_options(kernel_size=1, padding=0), "attention"),
    "padding": replaced(0, with_options(padding="same")),
    "border": replaced(0, with_options(padding_mode="circular")),
    "groups": replaced(0, with_options(groups=2)),
    "no bias": replaced(0, with_options(bias=False)),
    "ReLU": replaced(2, lambda _: nn.ReLU()),
    "slopes": replaced(2, lambda _: nn.PReLU(16, 0.6)),
    "no affine": replaced(1, lambda _: nn.BatchNorm2d(16, affine=False).eval(), "attention"),
    "no statistics": replaced(1, lambda _: nn.BatchNorm2d(16, track_running_stats=False).eval()),
    "norm in training": lambda m: layer_of(m, "attention", 1).train(),
    "fused by hand": fused_by_hand,
    "one layer more": appended("embedding_net"),
    "one layer more behind": appended("attention"),
}
#: Of these, what templates and graphs can fold.
HONOURED = ("parametrised", "no bias", "slopes", "no affine")
FORMS: dict[str, dict[str, Any]] = {"": {}, "ordered": {"symmetric": False}, "residual": {"residual": True}}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("form", [f if f == "" else pytest.param(f, marks=pytest.mark.thorough) for f in FORMS])
@pytest.mark.parametrize("done", DONE)
def test_every_path_answers_alike_or_refuses(done: str, form: str) -> None:
    model = built(**FORMS[form])
    images, (a, b) = torch.randn(4, 3, 112, 112), torch.randn(2, 3, 32, 7, 7)
    with torch.no_grad():
        before = model.score(a, b, return_maps=True)
    DONE[done](model)
    in_training = done == "norm in training"
    if not in_training:
        model.eval()

    def again() -> XCosModel:
        return copy.deepcopy(model) if in_training else model  # there statistics move at every call

    expected = again().score(a, b, return_maps=True)  # with gradients: layers are called one by one
    assert expected.score.requires_grad or done == "subclass of the attention"
    assert done in ("fused by hand", "weight norm") or not torch.allclose(expected.attention, before.attention, 1e-3)
    with torch.no_grad():
        torch.testing.assert_close(again().score(a, b, return_maps=True), expected, rtol=1e-4, atol=1e-5)
    try:
        found = xcos_ext.xcos_matrix(model.templates(a, "probe"), model.templates(b, "gallery")).diagonal()
    except RuntimeError as error:
        assert str(error).startswith("templates: ") and done not in HONOURED
        with pytest.raises(ValueError, match="model: expected"):
            check_exportable(model)
    else:
        torch.testing.assert_close(found, expected.score, rtol=1e-4, atol=1e-5)
        assert done in HONOURED
        check_exportable(model)
    if in_training:
        with pytest.raises(ValueError, match="evaluation mode"):
            for_inference(model)
    else:
        with torch.no_grad():
            maps = model(images[:2], images[2:])
        torch.testing.assert_close(for_inference(model)(images[:2], images[2:]), maps, rtol=1e-3, atol=1e-3)


def test_the_refusal_names_the_layer_and_what_was_found() -> None:
    for done, message in {
        "dilation": r"embedding_net\.0: expected padding \(1, 1\), got \(2, 2\)",
        "border": r"embedding_net\.0: expected padding_mode 'zeros', got 'circular'",
        "ReLU": r"embedding_net\.2: expected PReLU as it was built, got ReLU",
        "forward hook": r"embedding_net\.0: expected Conv2d as it was built, got a forward hook",
        "subclass of the attention": r"attention: expected XCosAttention's _weights, got another one \(Flat\)",
        "one layer more": r"embedding_net: expected 3 layers, got 4",
    }.items():
        model = built()
        DONE[done](model)
        with pytest.raises(RuntimeError, match=rf"^templates: {message}: .* score pairs with head\.score"):
            model.templates(torch.randn(2, 32, 7, 7))


@pytest.mark.parametrize("backward", [False, True])
def test_hooks_of_all_modules(backward: bool) -> None:
    model, images = built(), torch.randn(2, 3, 112, 112)
    kind = "register_module_full_backward_hook" if backward else "register_module_forward_hook"

    def hook(module: nn.Module, *given: Any) -> Any:
        if backward:
            return None
        return given[-1] * 2 if isinstance(module, nn.Conv2d) else None

    handle = getattr(torch_module, kind)(hook)
    try:
        expected = model(images, images.flip(0))
        with torch.no_grad():
            torch.testing.assert_close(model(images, images.flip(0)), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(for_inference(model)(images, images.flip(0)), expected, rtol=1e-4, atol=1e-5)
        for refuse in (lambda: model.templates(torch.randn(1, 32, 7, 7)), lambda: check_exportable(model)):
            with pytest.raises((RuntimeError, ValueError), match="ward hook of all modules"):
                refuse()
    finally:
        handle.remove()
    assert model.templates(torch.randn(1, 32, 7, 7)).features.shape == (1, 49, 32)


def test_gradients_go_through_hooks_or_are_refused() -> None:
    model = built()
    model.head.attention.attention[0].register_full_backward_hook(lambda _m, given, _out: (given[0] * 0,))
    with pytest.raises(RuntimeError, match=r"templates: attention\.0: .*got a backward hook"):
        model.templates(torch.randn(1, 32, 7, 7))


def test_a_plain_attention_goes_through_the_fused_head(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("xcos_ext.model.head.xcos_head", lambda *a, **o: calls.append(1) or xcos_head(*a, **o))
    for model in (built(), built(residual=True), built(symmetric=False)):
        model.head.attention.embedding_net[1] = nn.SyncBatchNorm(16).eval()
        with torch.no_grad():
            model.score(torch.randn(1, 32, 7, 7), torch.randn(1, 32, 7, 7))
    assert len(calls) == 3


# --- the head and the body


def test_a_head_of_the_users_own() -> None:
    class Shifted(XCosHead):
        def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: bool = False) -> Any:
            return super().score(features_a, features_b, return_maps=return_maps)

    model, features = built(), torch.randn(1, 32, 7, 7)
    with pytest.raises(
        RuntimeError, match=r"expected a head whose pairs are scored by Head\.score, got a score of its"
    ):
        Shifted(8, 32, attention="norm").templates(features)
    model.head.register_forward_hook(lambda _m, _a, made: made._replace(score=made.score + 1))
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        assert float(model(images, images).score) == pytest.approx(2, abs=1e-5)
        assert float(for_inference(model)(images, images).score) == pytest.approx(2, abs=1e-5)
    with pytest.raises(RuntimeError, match="got a forward hook"):
        model.templates(features)
    with pytest.raises(ValueError, match="head: a forward hook"):
        check_exportable(model)


def body_norm(model: XCosModel) -> Any:
    return model.backbone.net[1]  # type: ignore[union-attr, index]


BODY: dict[str, Callable[[XCosModel], Any]] = {
    "hook": lambda m: body_norm(m).register_forward_hook(times(2)),
    "patched": lambda m: setattr(body_norm(m), "forward", lambda x: 3 * x),
    "weight norm": lambda m: nn.utils.weight_norm(m.backbone.net[0]),  # type: ignore[union-attr, index]
    "no statistics": lambda m: m.backbone.net.__setitem__(1, nn.BatchNorm2d(8, track_running_stats=False).eval()),
    "projection hooked": lambda m: m.head.conv1x1[1].register_forward_hook(times(2)),
    "projection appended": lambda m: m.head.conv1x1.append(nn.Tanh()),
    "projection activation": lambda m: m.head.conv1x1.__setitem__(2, nn.Tanh()),
}


@pytest.mark.parametrize("done", BODY)
def test_what_is_folded_for_inference(done: str) -> None:
    model, images = built(), torch.randn(4, 3, 112, 112)
    BODY[done](model)
    model.eval()
    with torch.no_grad():
        expected = model(images[:2], images[2:])
        torch.testing.assert_close(for_inference(model)(images[:2], images[2:]), expected, rtol=1e-3, atol=1e-4)
    if done not in ("projection appended", "projection activation"):  # these are in the graph as they are
        with pytest.raises(ValueError, match=r"model: expected one without hooks, .* got "):
            check_exportable(model)


def test_a_subclassed_activation_is_not_packed() -> None:
    class Leaky(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) - 1

    model, images = built(), torch.randn(2, 3, 112, 112)
    model.backbone.net[2] = Leaky().eval()  # type: ignore[union-attr, index, operator]
    torch.testing.assert_close(for_inference(model).features(images), model.features(images), rtol=1e-3, atol=1e-4)


def test_a_hooked_network_is_run_not_followed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(294, 8))
    net.register_forward_pre_hook(lambda _m, given: (given[0] * 2,))
    images = torch.randn(1, 3, 112, 112)
    made = from_layer(net, "1")
    assert torch.equal(made.grid(images), net[1](net[0](images * 2))) and made.embedding_size is None


def test_the_closed_form_refuses_a_hooked_recogniser() -> None:
    net = from_layer(nn.Sequential(nn.Conv2d(3, 6, 16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(294, 8)), "1")
    net.register_forward_hook(times(2))
    with pytest.raises(xcos_ext.ModelError, match="got a forward hook"):
        plug(net, centre=False)
