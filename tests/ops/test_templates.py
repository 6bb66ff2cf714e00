"""Templates: what they hold, roles, selections, casts, gradients, and how another head's templates are told apart."""

from __future__ import annotations

import ast
import copy
import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import TinyBackbone
from template_samples import F64, KINDS, attention, eager, features, head, random_parameters, random_templates, sides
from torch import nn

from xcos_ext import reference
from xcos_ext.model import ClosedFormHead, XCosAttention, XCosHead, XCosModel
from xcos_ext.ops.templates import AttentionParameters, Templates, check_sides, resolve_attention
from xcos_ext.ops.templates import cells as cells_module
from xcos_ext.ops.templates import parameters as parameters_module

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.process
def test_knows_no_networks() -> None:
    code = (
        "import sys, xcos_ext.ops.templates; print({m.split('.')[1] for m in sys.modules if m.startswith('xcos_ext.')})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(found) == {"_C", "io", "ops"}


class TestWhatTheyHold:
    def test_unit_cells_and_norms(self) -> None:
        x = features(4)
        x[1, :, 2, 3] = 0
        t = Templates.from_features(x)
        cells = x.flatten(2).transpose(1, 2)
        assert t.features.shape == (4, 49, 32) and t.norms.shape == (4, 49)
        torch.testing.assert_close(t.norms, cells.norm(dim=2))
        length = t.features.norm(dim=2)
        assert t.norms[1, 17] == 0 and length[1, 17] == 0
        length[1, 17] = 1
        torch.testing.assert_close(length, torch.ones_like(length))
        torch.testing.assert_close(t.features * t.norms.unsqueeze(2), cells)

    def test_short_cells_are_divided_by_eps_as_in_the_operators(self) -> None:
        x, y = features(1, 8, (1, 2)), features(1, 8, (1, 2))
        x[..., 0] *= 1e-9
        product = (Templates.from_features(x).features * Templates.from_features(y).features).sum(2)
        torch.testing.assert_close(product.view(1, 1, 2), reference.grid_cosine(x, y), rtol=1e-12, atol=1e-15)

    def test_overflow_and_nan_stay_visible_in_their_face(self) -> None:
        x = features(3, dtype=torch.float32)
        x[0, :, 0, 0] = 1e25
        x[1, 3, 0, 0] = torch.nan
        t = Templates.from_features(x)
        assert t.features[:2, 0].isnan().all()
        assert t.features[:2, 1:].isfinite().all() and t.features[2].isfinite().all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_parts_make_the_network(self, kind: str) -> None:
        """u + v is the first block before its activation, and the pair's formula gives the network's logits."""
        net = attention(kind)
        a, b = features(3), features(3)
        u = net.templates(a, "both").as_probe().projection[:, 0]
        v = -net.templates(b, "both").as_gallery().projection[:, 0]
        block = net.attention[:2](torch.cat((net.embed(a), net.embed(b)), 1))
        torch.testing.assert_close((u + v).view_as(block), block, rtol=1e-12, atol=1e-12)

        p, g = net.templates(a), net.templates(b, "gallery")
        hidden = torch.maximum(p.projection[:, 0], g.projection[:, 0]).view_as(block)
        y = F.conv2d(hidden, p.parameters.weight[None], padding=1).flatten(1) + p.bias[:, 0] + g.bias[:, 0]
        logits = F.prelu(y, p.parameters.slope)
        torch.testing.assert_close(logits, net.logits(a, b).flatten(1), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("slope", [-0.7, 0.0, 1.0, 2.5])
    def test_any_slope(self, slope: float) -> None:
        net = attention()
        with torch.no_grad():
            net.attention[2].weight.fill_(slope)
        a, b = features(3), features(4)
        got = reference.xcos_matrix(net.templates(a), net.templates(b, "gallery"))
        torch.testing.assert_close(got, eager(net, a, b), rtol=0, atol=1e-12)

    def test_one_slope_a_channel(self) -> None:
        net = attention()
        net.embedding_net[2] = nn.PReLU(16).double()
        net.attention[2] = nn.PReLU(16).double()
        for layer in (net.embedding_net[2], net.attention[2]):
            nn.init.uniform_(layer.weight, -1, 2)
        a, b = features(3), features(4)
        got = reference.xcos_matrix(net.templates(a), net.templates(b, "gallery"))
        torch.testing.assert_close(got, eager(net, a, b), rtol=0, atol=1e-12)

    def test_batch_norm_without_affine_and_convolution_without_bias(self) -> None:
        net = attention()
        net.attention[0] = nn.Conv2d(32, 16, 3, padding=1, bias=False).double()
        norm = nn.BatchNorm2d(16, affine=False, eps=0.1).double().eval()
        nn.init.normal_(norm.running_mean)
        net.attention[1] = norm
        a, b = features(3), features(4)
        got = reference.xcos_matrix(net.templates(a), net.templates(b, "gallery"))
        torch.testing.assert_close(got, eager(net, a, b), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_dtypes(self, given: torch.dtype, storage: torch.dtype) -> None:
        net = attention().float()
        x = features(3, dtype=given)
        t = net.templates(x, dtype=storage)
        wide = torch.float64 if storage == torch.float64 else torch.float32
        assert t.dtype == t.features.dtype == t.projection.dtype == storage
        assert t.norms.dtype == t.bias.dtype == t.parameters.weight.dtype == t.parameters.slope.dtype == wide
        exact = copy.deepcopy(net).double().templates(x.double())
        eps = torch.finfo(storage).eps
        for name in ("features", "projection"):
            torch.testing.assert_close(
                getattr(t, name).double(), getattr(exact, name), rtol=max(eps, 2e-6), atol=2e-6, msg=name
            )
        torch.testing.assert_close(t.bias.double(), exact.bias, rtol=1e-5, atol=1e-5)
        assert net.templates(x).dtype == given

    def test_half_precision_parameters_are_computed_with_in_fp32(self) -> None:
        net = attention().half()
        t = net.templates(features(3, dtype=torch.float16))
        assert t.bias.dtype == torch.float32
        exact = copy.deepcopy(net).double().templates(features(0)).parameters
        torch.testing.assert_close(t.parameters.weight.double(), exact.weight, rtol=1e-5, atol=1e-6)

    def test_autocast_has_no_effect(self) -> None:
        net = attention().float()
        x = features(3, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            inside = net.templates(x, "both")
        outside = net.templates(x, "both")
        for name in ("features", "norms", "projection", "bias"):
            assert torch.equal(getattr(inside, name), getattr(outside, name)), name
        assert torch.equal(inside.parameters.weight, outside.parameters.weight)

    @pytest.mark.parametrize("kind", ["softmax", "symmetric"])
    def test_faces_in_chunks_are_the_faces_at_once(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        net = attention(kind)
        x = features(11).to(memory_format=torch.channels_last)
        whole = net.templates(x, "both").detach()
        fixed = Templates.from_features(x, torch.float16)
        monkeypatch.setattr(cells_module, "CHUNK", 4)
        with torch.no_grad():
            parts = net.templates(x, "both")
        for name in ("features", "norms", "projection", "bias"):
            one, other = getattr(whole, name), getattr(parts, name)
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
            assert other.is_contiguous()
        assert torch.equal(Templates.from_features(x, torch.float16).features, fixed.features)

    def test_no_faces(self) -> None:
        t = attention("symmetric").templates(features(0), "both")
        assert len(t) == 0 and t.projection.shape == (0, 3, 16, 49) and t.nbytes == 0

    def test_heads_and_models_forward(self) -> None:
        learned = head()
        x = features(3)
        assert torch.equal(learned.templates(x, "gallery").bias, learned.attention.templates(x, "gallery").bias)
        model = XCosModel(TinyBackbone(), learned).eval()
        t = model.templates(x, "both", torch.float16)
        assert t.role == "both" and t.dtype == torch.float16
        for fixed in ("uniform", "norm"):
            t = XCosHead(8, 32, attention=fixed).eval().templates(x, "probe")
            assert (t.attention, t.role, t.projection) == (fixed, "both", None)
        closed = ClosedFormHead(torch.randn(49, 5, 6), constant=torch.zeros(5), grid_shape=(6, 7, 7))
        t = XCosModel(TinyBackbone(), closed).templates(features(2, 5), "gallery")
        assert t.attention == "norm" and t.channels == 5


class TestRoles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_both_holds_what_probes_and_gallery_hold(self, kind: str) -> None:
        net = attention(kind)
        x = features(3)
        both = net.templates(x, "both")
        for role, view in (("probe", both.as_probe()), ("gallery", both.as_gallery())):
            alone = net.templates(x, role)
            assert view.role == role
            assert torch.equal(view.projection, alone.projection) and torch.equal(view.bias, alone.bias)
            assert view.features is both.features
            for name in ("projection", "bias"):
                own, whole = getattr(view, name), getattr(both, name)
                assert own.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                assert own[0].is_contiguous()  # a face's values are dense; only faces are apart

    def test_the_other_role_is_refused(self) -> None:
        net = attention()
        probe, gallery = net.templates(features(2)), net.templates(features(2), "gallery")
        assert probe.as_probe() is probe and gallery.as_gallery() is gallery
        with pytest.raises(ValueError, match="as_gallery: expected templates of role 'gallery' or 'both', got role"):
            probe.as_gallery()
        with pytest.raises(ValueError, match="as_probe: expected templates of role 'probe' or 'both', got role"):
            gallery.as_probe()
        fixed = Templates.from_features(features(2))
        assert fixed.as_probe().as_gallery().role == "gallery"


class TestSelection:
    @pytest.fixture
    def t(self) -> Templates:
        return attention().templates(features(6), "both").detach()

    def same(self, part: Templates, t: Templates, index: list[int]) -> None:
        for name in ("features", "norms", "projection", "bias"):
            assert torch.equal(getattr(part, name), getattr(t, name)[index]), name
        assert part.attention is t.attention and part.role == t.role and len(part) == len(index)

    def test_indices(self, t: Templates) -> None:
        self.same(t[2], t, [2])
        self.same(t[-1], t, [5])
        self.same(t[np.int64(3)], t, [3])
        self.same(t[torch.tensor(3)], t, [3])
        self.same(t[1:4], t, [1, 2, 3])
        self.same(t[::2], t, [0, 2, 4])
        self.same(t[9:], t, [])
        self.same(t[[4, 0, 0]], t, [4, 0, 0])
        self.same(t[[]], t, [])
        self.same(t[torch.tensor([5, 1])], t, [5, 1])
        self.same(t[torch.tensor([5, 1], dtype=torch.int32)], t, [5, 1])
        self.same(t[np.array([2, 3])], t, [2, 3])
        mask = torch.tensor([True, False, False, True, True, False])
        self.same(t[mask], t, [0, 3, 4])
        self.same(t[mask.numpy()], t, [0, 3, 4])
        self.same(t[mask.tolist()], t, [0, 3, 4])
        assert [len(face) for face in t] == [1] * 6

    def test_views_share_memory(self, t: Templates) -> None:
        start = t.features.untyped_storage().data_ptr()
        for view in (t[2], t[1:4], t[::2], t[::2][1]):
            assert view.features.untyped_storage().data_ptr() == start

    @pytest.mark.parametrize(
        ("index", "error", "message"),
        [
            (6, IndexError, "index 6 is out of range for 6 faces"),
            (-7, IndexError, "index -7 is out of range"),
            (torch.ones(5, dtype=torch.bool), IndexError, r"expected a mask of 6 bools, got \[5\]"),
            (torch.ones(2, 2, dtype=torch.int64), TypeError, "expected a one-dimensional tensor of int64 or bool"),
            (torch.ones(2), TypeError, "got float32"),
            ("3", TypeError, "expected int, slice, list or tensor, got str"),
            (True, TypeError, "got bool"),
            (slice(None, None, -1), ValueError, "expected a step above 0, got -1"),
        ],
    )
    def test_bad_indices(self, t: Templates, index: object, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            t[index]

    def test_cat_undoes_slices(self, t: Templates) -> None:
        self.same(Templates.cat([t[:2], t[2:2], t[2:]]), t, list(range(6)))
        assert Templates.cat(iter([t])) is t
        fixed = Templates.from_features(features(3), attention="norm")
        assert torch.equal(Templates.cat([fixed[:1], fixed[1:]]).norms, fixed.norms)

    def test_cat_refuses_what_does_not_fit(self, t: Templates) -> None:
        net = attention()
        for other, message in (
            (t.as_probe(), r"templates\[1\]: expected role both like templates\[0\], got probe"),
            (t.to(torch.float16), r"templates\[1\]: expected dtype float64 like templates\[0\], got float16"),
            (t.to("meta"), r"templates\[1\]: expected device cpu like templates\[0\], got meta"),
            (net.templates(features(1, grid=(5, 7)), "both"), r"templates\[1\]: expected grid 7x7 .*, got 5x7"),
            (attention(channels=8).templates(features(1, 8), "both"), r"expected channels 32 .*, got 8"),
            (Templates.from_features(features(1)), r"expected learned attention like templates\[0\], got 'uniform'"),
        ):
            with pytest.raises(ValueError, match=message):
                Templates.cat([t, other])
        mine, theirs = t.parameters.fingerprint, net.templates(features(1), "both")
        with pytest.raises(ValueError, match=f"got fingerprint {theirs.parameters.fingerprint} .* has {mine}; .*heads"):
            Templates.cat([t, theirs])
        with pytest.raises(ValueError, match="templates: expected at least one, got none"):
            Templates.cat([])
        with pytest.raises(TypeError, match=r"templates\[1\]: expected Templates, got Tensor"):
            Templates.cat([t, features(1)])  # type: ignore[list-item]


class TestCasts:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_to_dtype(self, dtype: torch.dtype) -> None:
        t = attention().float().templates(features(3, dtype=torch.float32)).detach()
        cast = t.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert cast.dtype == cast.projection.dtype == dtype
        assert cast.bias.dtype == cast.norms.dtype == cast.parameters.weight.dtype == wide
        assert cast.parameters.matches(t.parameters)
        assert (cast is t) == (dtype == torch.float32)
        assert t.to("cpu", dtype).dtype == t.to(device="cpu", dtype=dtype).dtype == dtype

    def test_to_device(self) -> None:
        t = attention().templates(features(3)).to("meta", torch.float16)
        assert t.device.type == t.parameters.weight.device.type == "meta" and t.dtype == torch.float16

    def test_bad_targets(self) -> None:
        t = Templates.from_features(features(1))
        with pytest.raises(TypeError, match="dtype: expected dtype float16, bfloat16, float32 or float64, got int8"):
            t.to(torch.int8)
        with pytest.raises(TypeError, match="device: expected one, got two"):
            t.to("cpu", "meta")
        with pytest.raises(TypeError, match="dtype: expected one, got two"):
            t.to(torch.float16, dtype=torch.float16)

    def test_size_in_memory(self) -> None:
        t = attention().float().templates(features(10, dtype=torch.float16))
        per_face = 2 * 49 * (32 + 16) + 4 * 49 * 2
        assert t.nbytes == 10 * per_face

    def test_immutable_and_described(self) -> None:
        t = attention("symmetric").templates(features(3)).detach()
        with pytest.raises(dataclasses.FrozenInstanceError):
            t.role = "gallery"  # type: ignore[misc]
        with pytest.raises((AttributeError, TypeError)):
            t.note = 1  # type: ignore[attr-defined]
        assert repr(t) == (
            "Templates(faces=3, grid=7x7, channels=32, role=probe, "
            "attention=learned (softmax, temperature=2, symmetric), dtype=float64, device=cpu)"
        )
        assert "attention=learned (min-shift)" in repr(attention("min-shift").templates(features(1)))
        assert "attention=norm" in repr(Templates.from_features(features(1), attention="norm"))

    def test_pickle_and_copy(self) -> None:
        t = attention().templates(features(3)).detach()
        for other in (pickle.loads(pickle.dumps(t)), copy.deepcopy(t)):
            assert torch.equal(other.projection, t.projection)
            assert other.parameters.matches(t.parameters) and other.grid == t.grid


class TestGradients:
    @pytest.mark.parametrize("kind", ["softmax", "symmetric"])
    @pytest.mark.parametrize("role", ["probe", "gallery", "both"])
    def test_gradcheck_to_features_and_every_parameter(self, kind: str, role: str) -> None:
        net = attention(kind, channels=3, hidden=2)
        names = [name for name, _ in net.named_parameters()]

        def outputs(x: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            saved = {name: p for name, p in net.named_parameters()}
            try:
                for name, value in zip(names, values, strict=True):
                    owner, _, leaf = name.rpartition(".")
                    del net.get_submodule(owner)._parameters[leaf]
                    setattr(net.get_submodule(owner), leaf, value)
                t = net.templates(x, role)
            finally:
                for name, p in saved.items():
                    owner, _, leaf = name.rpartition(".")
                    delattr(net.get_submodule(owner), leaf)
                    net.get_submodule(owner).register_parameter(leaf, p)
            return t.features, t.norms, t.projection, t.bias, t.parameters.weight, t.parameters.slope

        x = features(2, 3, (2, 3)).requires_grad_()
        values = [p.detach().clone().requires_grad_() for p in net.parameters()]
        assert torch.autograd.gradcheck(outputs, (x, *values), fast_mode=True)

    def test_zero_cells_get_no_gradient(self) -> None:
        x = features(2, 4, (2, 2))
        x[0, :, 0, 0] = 0
        x.requires_grad_()
        t = Templates.from_features(x, attention="norm")
        (t.features.sum() + t.norms.sum()).backward()
        assert (x.grad[0, :, 0, 0] == 0).all() and x.grad.isfinite().all()
        assert (x.grad[1] != 0).all()

    def test_casts_views_and_cat_carry_gradients_and_detach_cuts_them(self) -> None:
        net = attention()
        x = features(4).requires_grad_()
        t = net.templates(x, "both")
        moved = Templates.cat([t[:2].to(torch.float32), t[[3]].to(torch.float32)])
        grads = torch.autograd.grad(moved.as_gallery().projection.sum() + moved.parameters.weight.sum(), x)
        assert (grads[0][2] == 0).all() and (grads[0][3] != 0).any()
        cut = t.detach()
        tensors = (cut.features, cut.norms, cut.projection, cut.bias, cut.parameters.weight, cut.parameters.slope)
        assert not any(tensor.requires_grad for tensor in tensors)
        with torch.no_grad():
            assert not net.templates(x).features.requires_grad

    def test_a_head_learns_in_evaluation_mode(self) -> None:
        learned = head()
        nn.init.constant_(learned.attention.attention[4].bias, -1.0)  # logits of either sign
        x = learned.features(torch.randn(4, 8, 7, 7, dtype=F64))
        reference.xcos_matrix(learned.templates(x), learned.templates(x, "gallery")).square().sum().backward()
        missing = [name for name, p in learned.named_parameters() if p.grad is None or (p.grad == 0).all()]
        assert not missing


class TestTrainingMode:
    def test_refused_with_a_way_out(self) -> None:
        x = features(2)
        learned = head()
        for what in (attention().train(), head().train(), XCosHead(8, 32, attention="norm").double()):
            with pytest.raises(RuntimeError, match=r"templates: expected .* in evaluation mode, got training mode: .*"):
                what.templates(x)
        with pytest.raises(RuntimeError, match=r"batch.*\.eval\(\)"):
            XCosModel(TinyBackbone(), learned).train().templates(x)
        learned.eval()
        learned.attention.attention[1].train()  # one batch norm is enough
        with pytest.raises(RuntimeError, match="training mode"):
            learned.templates(x)

    def test_a_training_norm_before_the_attention_is_refused(self) -> None:
        net = head()
        net.conv1x1.train()  # the features themselves would be those of their batch
        with pytest.raises(RuntimeError, match="training mode"):
            net.templates(features(2))

    def test_frozen_batch_norms_and_a_training_backbone_are_fine(self) -> None:
        net = attention().train()
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
        assert len(net.templates(features(2))) == 2
        model = XCosModel(TinyBackbone(), head()).train()
        model.head.eval()
        assert len(model.templates(features(2))) == 2

    def test_batch_norm_without_statistics(self) -> None:
        net = attention()
        net.attention[1] = nn.BatchNorm2d(16, track_running_stats=False).double().eval()
        with pytest.raises(RuntimeError, match="expected batch norms with running statistics"):
            net.templates(features(1))


class TestFingerprint:
    def test_an_unchanged_network_is_recognised_without_hashing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net = attention()
        p, g = net.templates(features(1)), net.templates(features(2), "gallery")
        monkeypatch.setattr(parameters_module, "fingerprint_state", lambda *a, **k: pytest.fail("hashed"))
        assert p.parameters.matches(g.parameters)
        assert p.to(torch.float16)[0].parameters.matches(g.detach().parameters)

    @pytest.mark.parametrize(
        "change",
        [
            lambda net: net.embedding_net[0].weight[0, 0, 0, 0].add_(1e-3),
            lambda net: net.embedding_net[2].weight.mul_(1.01),
            lambda net: net.attention[0].bias[0].add_(1e-3),
            lambda net: net.attention[1].running_var.mul_(1.01),
            lambda net: net.attention[5].weight.mul_(1.01),
            lambda net: setattr(net, "temperature", 3.0),
            lambda net: setattr(net.attention[1], "eps", 1e-3),
            lambda net: net.train()(features(2), features(2)) is net.eval(),
            lambda net: net.load_state_dict(attention().state_dict()),
            lambda net: setattr(net.attention[3], "weight", nn.Parameter(net.attention[3].weight + 1)),
        ],
        ids=["embedding", "slope", "bias", "variance", "last", "temperature", "eps", "training", "load", "replaced"],
    )
    def test_every_change_is_seen(self, change) -> None:
        net = attention()
        before = net.templates(features(1))
        with torch.no_grad():
            change(net)
        after = net.templates(features(1), "gallery")
        assert not before.parameters.matches(after.parameters)
        assert not after.parameters.matches(before.parameters)

    def test_it_is_that_of_the_moment(self) -> None:
        """The hash is made late, but of the parameters as they were."""
        net = attention()
        t = net.templates(features(1))
        twin = copy.deepcopy(net).templates(features(1)).parameters
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        assert t.parameters.fingerprint == twin.fingerprint
        assert torch.equal(t.parameters.slope, twin.slope) and torch.equal(t.parameters.weight, twin.weight)

    def test_equal_parameters_match_across_copies_and_dtypes(self) -> None:
        net = attention()
        net.float()
        t = net.templates(features(1, dtype=torch.float32))
        for other in (copy.deepcopy(net), copy.deepcopy(net).double()):
            assert other.templates(features(1)).parameters.matches(t.parameters)
        assert len(t.parameters.fingerprint) == 16

    def test_memory_used_again_is_not_mistaken(self) -> None:
        """A new network often gets the addresses of one that is gone."""
        seen = set()
        for _ in range(5):
            net = attention()
            seen.add(net.templates(features(1)).parameters.fingerprint)
            del net
        assert len(seen) == 5

    def test_parameters_made_by_hand(self) -> None:
        one = random_parameters()
        assert one.matches(dataclasses.replace(one, state=None))
        assert not one.matches(dataclasses.replace(one, weight=one.weight + 1, state=None))
        assert not one.matches(dataclasses.replace(one, temperature=2.0, state=None))

    def test_the_cache_neither_copies_nor_travels_with_the_network(self) -> None:
        net = attention()
        net.templates(features(1))
        assert set(copy.deepcopy(net).__dict__) == set(XCosAttention().__dict__)
        assert len(pickle.dumps(net)) < 400_000

    def test_inference_tensors(self) -> None:
        with torch.inference_mode():
            net = attention()
            p, g = net.templates(features(1)), net.templates(features(1), "gallery")
            assert p.parameters.matches(g.parameters)
            net.attention[0].weight.zero_()
            assert not p.parameters.matches(net.templates(features(1)).parameters)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((torch.zeros(2, 32, 7),), ValueError, r"features: expected \[N, 32, H, W\], got \[2, 32, 7\]"),
            ((torch.zeros(2, 8, 7, 7),), ValueError, r"features: expected \[N, 32, H, W\], got \[2, 8, 7, 7\]"),
            ((torch.zeros(2, 32, 0, 7),), ValueError, "features: expected at least one channel and one cell"),
            ((torch.zeros(2, 32, 7, 7, dtype=torch.int64),), TypeError, "features: expected dtype float16, .*int64"),
            ((np.zeros((2, 32, 7, 7)),), TypeError, "features: expected a tensor, got ndarray"),
            ((torch.zeros(2, 32, 7, 7), "query"), ValueError, "role: expected 'probe', 'gallery' or 'both', got 'q"),
            ((torch.zeros(2, 32, 7, 7), "probe", torch.int8), TypeError, "dtype: expected dtype float16, .* got int8"),
        ],
    )
    @pytest.mark.parametrize("kind", ["learned", "norm"])
    def test_bad_features(self, kind: str, arguments: tuple, error: type[Exception], message: str) -> None:
        built = head() if kind == "learned" else XCosHead(8, 32, attention="norm").eval()
        with pytest.raises(error, match=f"templates: {message}" if "dtype: " not in message else message):
            built.templates(*arguments)

    def test_bad_from_features(self) -> None:
        with pytest.raises(ValueError, match=r"from_features: features: expected \[N, C, H, W\], got \[3, 7, 7\]"):
            Templates.from_features(torch.zeros(3, 7, 7))
        with pytest.raises(ValueError, match="attention: expected 'uniform' or 'norm', got 'learned'"):
            Templates.from_features(features(1), attention="learned")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="dtype: expected dtype float16"):
            Templates.from_features(features(1), dtype=torch.int8)

    @pytest.mark.parametrize(
        ("fields", "error", "message"),
        [
            ({"features": torch.zeros(3, 48, 32)}, ValueError, r"features: expected shape \[N, 49, C\] for a grid of"),
            ({"grid": (0, 7)}, ValueError, "grid: expected at least one cell, got 0x7"),
            ({"norms": torch.zeros(2, 49, dtype=F64)}, ValueError, r"norms: expected shape \[3, 49\], got \[2, 49\]"),
            ({"norms": torch.zeros(3, 49)}, ValueError, "norms: expected dtype float64, got float32"),
            ({"projection": None}, TypeError, "projection: expected a tensor, got NoneType"),
            ({"projection": torch.zeros(3, 2, 16, 49)}, ValueError, r"projection: expected shape \[3, 1, 16, 49\]"),
            ({"bias": torch.zeros(3, 1, 49)}, ValueError, "bias: expected dtype float64, got float32"),
            ({"role": "query"}, ValueError, "role: expected"),
            ({"attention": "learned"}, ValueError, "attention: expected AttentionParameters, 'uniform' or 'norm'"),
            ({"attention": "norm"}, ValueError, "projection: expected None with 'norm' attention, got a tensor"),
            ({"attention": random_parameters(dtype=torch.float32)}, ValueError, "attention.weight: expected dtype"),
            ({"features": None}, TypeError, "features: expected a tensor, got NoneType"),
        ],
    )
    def test_bad_parts(self, fields: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            dataclasses.replace(sides(3, 1)[0], **fields)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"weight": torch.zeros(16, 3)}, r"weight: expected shape \[hidden, 3, 3\], got \[16, 3\]"),
            ({"weight": torch.zeros(16, 3, 3).half()}, "weight: expected dtype float32 or float64, got float16"),
            ({"slope": torch.zeros(2)}, r"slope: expected shape \[1\], got \[2\]"),
            ({"slope": torch.zeros(1, dtype=F64)}, "slope: expected float32 on cpu like weight, got float64 on cpu"),
            ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
            ({"normalize": "sum"}, "normalize: expected 'softmax' or 'min-shift', got 'sum'"),
            ({"symmetric": "no"}, "symmetric: expected True or False, got str"),
        ],
    )
    def test_bad_parameters(self, fields: dict, message: str) -> None:
        with pytest.raises(TypeError if "symmetric" in fields else ValueError, match=message):
            AttentionParameters(**{"weight": torch.zeros(16, 3, 3), "slope": torch.zeros(1), **fields})


class TestSides:
    """What every all-pairs function refuses alike."""

    def test_types_and_roles(self) -> None:
        p, g = sides(2, 3)
        check_sides("op", p, g)
        with pytest.raises(TypeError, match=r"op: probes: expected Templates, got Tensor; make them with"):
            check_sides("op", features(2), g)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="op: gallery: expected Templates, got list"):
            check_sides("op", p, [g])  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="op: probes: expected templates of role 'probe' or 'both', got role 'g"):
            check_sides("op", g, g)
        with pytest.raises(RuntimeError, match="op: gallery: expected templates of role 'gallery' or 'both', got ro"):
            check_sides("op", p, p)
        check_sides("op", g, p, "uniform")  # features alone have no role
        with pytest.raises(RuntimeError, match="probes: expected templates of role"):
            check_sides("op", g, p, "own")

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (lambda g: random_templates(2, channels=8), "gallery: expected channels 32 like probes, got 8"),
            (lambda g: random_templates(2, grid=(7, 5)), "gallery: expected grid 7x7 like probes, got 7x5"),
            (lambda g: random_templates(2, grid=(49, 1)), "gallery: expected grid 7x7 like probes, got 49x1"),
            (lambda g: g.to(torch.float16), "gallery: expected dtype float64 like probes, got float16"),
            (lambda g: g.to("meta"), "gallery: expected device cpu like probes, got meta"),
            (lambda g: random_templates(2), "gallery: expected learned attention like probes, got 'uniform'"),
        ],
    )
    def test_shapes(self, other, message: str) -> None:
        p, g = sides(2, 3)
        with pytest.raises(RuntimeError, match=f"op: {message}"):
            check_sides("op", p, other(g))

    def test_another_heads_templates(self) -> None:
        one, two = head(), head()
        p, g = one.templates(features(2)), two.templates(features(2), "gallery")
        fingerprints = f"{g.parameters.fingerprint} where probes has {p.parameters.fingerprint}"
        for how in ("own", "uniform"):
            with pytest.raises(RuntimeError, match=f"op: gallery: .*{fingerprints}; .*different heads"):
                check_sides("op", p, g, how)
        two.load_state_dict(one.state_dict())
        check_sides("op", p, two.templates(features(2), "gallery"))

    def test_mixed_fixed_attention(self) -> None:
        uniform, norm = random_templates(2), random_templates(2, parameters="norm")
        with pytest.raises(RuntimeError, match="gallery: expected 'uniform' attention like probes, got 'norm'"):
            check_sides("op", uniform, norm)
        check_sides("op", uniform, norm, "norm")
        check_sides("op", *sides(2, 2)[:1], norm, torch.ones(7, 7))

    def test_resolved(self) -> None:
        p, g = sides(2, 3, dtype=torch.float16)
        own = resolve_attention("op", "own", p, g)
        assert own.kind == "learned" and own.parameters is p.attention and own.weights is None
        uniform = resolve_attention("op", "uniform", p, g)
        assert uniform.kind == "weights" and uniform.weights.shape == (1, 49)
        assert torch.equal(uniform.weights, torch.full((1, 49), 1 / 49))
        assert resolve_attention("op", "norm", p, g).kind == "norm"
        given = torch.rand(2, 7, 7, dtype=torch.bfloat16)
        for shape, weights in (((1, 49), given[0]), ((2, 49), given)):
            made = resolve_attention("op", weights, p, g).weights
            assert made.shape == shape and made.dtype == torch.float32
        fixed = random_templates(2, parameters="norm")
        assert resolve_attention("op", "own", fixed, fixed).kind == "norm"
        fixed = random_templates(2)
        assert resolve_attention("op", "own", fixed, fixed).weights.dtype == F64

    def test_the_parameters_being_learned_are_used(self) -> None:
        net = attention()
        trained = net.templates(features(2), "gallery")
        with torch.no_grad():
            kept = net.templates(features(2))
        assert resolve_attention("op", "own", kept, trained).parameters is trained.attention
        assert resolve_attention("op", "own", kept, trained.detach()).parameters is kept.attention

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            (
                "corr",
                RuntimeError,
                r"expected 'own', 'uniform', 'norm' or a tensor \[H, W\] or .*, got 'corr'",
            ),
            (None, TypeError, "expected a text or a tensor, got NoneType"),
            (torch.ones(7, 5), RuntimeError, r"expected shape \[7, 7\] or \[2, 7, 7\], got \[7, 5\]"),
            (torch.ones(3, 7, 7), RuntimeError, r"expected shape \[7, 7\] or \[2, 7, 7\], got \[3, 7, 7\]"),
            (torch.ones(7, 7, dtype=torch.int64), RuntimeError, "expected dtype float16, bfloat16, .* got int64"),
            (torch.ones(7, 7, device="meta"), RuntimeError, "expected device cpu like probes, got meta"),
        ],
    )
    def test_bad_attention(self, given: object, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"op: attention: {message}"):
            resolve_attention("op", given, *sides(2, 3))
