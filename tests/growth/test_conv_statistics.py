"""Image sites: the map from fan-out filters to the gradient of the fan-in filters is exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from growth_nets import DOUBLE, conv_pair, drawn, image_stream, mobile, pooled, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.methods.base import columns, proposal
from irgrow.growth.probe import probe
from irgrow.growth.windows import Windows
from irgrow.ir.errors import BadData, Refused

ALL = ("S", "M_prev", "S_in", "M", "C", "E")

PAIRS = {
    "valid": (ig.Conv2d(3), ig.Conv2d(3)),
    "same": (ig.Conv2d(3, padding=1), ig.Conv2d(3, padding=1)),
    "strided first": (ig.Conv2d(3, stride=2, padding=1), ig.Conv2d(3, padding=1)),
    "strided second": (ig.Conv2d(3, padding=1), ig.Conv2d(3, stride=2, padding=1)),
    "dilated": (ig.Conv2d(2, dilation=2, padding=1), ig.Conv2d(3, dilation=2, padding=2)),
    "rectangular": (ig.Conv2d((3, 1), stride=(1, 2)), ig.Conv2d((1, 3), padding=(1, 2))),
    "1x1": (ig.Conv2d(1), ig.Conv2d(3)),
}


def fan_in_gradient(network, site, omega, statistics, data, taps):
    """The autograd gradient of new fan-in weights at zero, for these fan-out columns: `[F, k]`."""
    method = ig.GradMax(omega.shape[1], taps=taps)
    silent = proposal(method, statistics, torch.zeros(statistics.M_prev.shape[0], omega.shape[1], dtype=DOUBLE), omega)
    morphism = ig.AddUnits(silent)(network)
    morphism.verify()
    biased = dict.fromkeys(network.bundles[n].target for n in silent.fan_in)  # a new unit's bias is one number
    tensors = {f"weight.{n}": None for n in silent.fan_in} | {f"bias.{n}": None for n in biased}
    tensors = {n: morphism.after.tensors()[n].clone().requires_grad_() for n in tensors}
    loss = F.cross_entropy(ig.interpret(morphism.after, data[0], tensors=tensors), data[1])
    parts, bias = [], 0.0
    for name, g in zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True):
        new = g[-omega.shape[1] :].reshape(omega.shape[1], -1)
        if name.startswith("bias."):
            bias = bias + new
        else:
            parts.append(new)
    return torch.cat([*parts, bias], 1).mT


@pytest.mark.parametrize("taps", ["full", "centre"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_gradient_of_new_filters_is_exact(pair, taps: str, activation: str) -> None:
    network = conv_pair(*pair, activation=activation)
    check_gradient(network, "grown", taps)


SITES = {
    "pool, flatten": pooled("mean", True),
    "pool, conv": pooled("mean", False),
    "batch norm": pooled("mean", True, "gelu", norm="batch"),
    "depthwise": mobile(),
    "stream": residual(),
    "image stream": image_stream(),
}


@pytest.mark.parametrize("network", SITES.values(), ids=SITES)
def test_gradient_along_the_site_is_exact(network) -> None:
    for site in ig.Site.all(network):
        check_gradient(network, site.name, "full")


def check_gradient(network, site: str, taps: str) -> None:
    data = drawn(network, 6)
    s = probe(ig.compile(network), data, F.cross_entropy, sites=[site], want=["M_prev"], taps=taps)[site]
    draw = torch.Generator().manual_seed(1)
    omega = torch.randn(columns(s), 2, generator=draw, dtype=DOUBLE)
    predicted = s.slope * s.M_prev @ omega
    expected = fan_in_gradient(network, site, omega, s, data, taps)
    assert float(expected.abs().max()) > 0
    assert relative(predicted, expected) < 1e-10


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_moments_from_the_edges(pair) -> None:
    """S, C and N by loops over the edges of the patterns."""
    network = conv_pair(*pair)
    data, model = drawn(network, 9), ig.compile(network)
    s = probe(model, data, F.cross_entropy, sites=["grown"], want=ALL)["grown"]
    bundles = {b.target: b for b in network.bundles.values()}
    b = patches(data[0], bundles["grown"].pattern, network.groups["x"].shape)
    _, values = model.record(data[0], values=["grown"])
    c = patches(values["grown"].detach(), bundles["target"].pattern, network.groups["grown"].shape)
    assert relative(s.S, torch.einsum("nfp,ngp->fg", b, b) / 9) < 1e-12
    assert relative(s.S_in, torch.einsum("nfp,ngp->fg", c, c) / 9) < 1e-12
    taps = bundles["target"].pattern.kernel[0] * bundles["target"].pattern.kernel[1]
    C = torch.zeros(b.shape[1], taps, c.shape[1], dtype=DOUBLE)
    for q, r, t in zip(*bundles["target"].pattern.taps(network.groups["grown"].shape), strict=True):
        C[:, t] += torch.einsum("nf,ng->fg", b[:, :, q], c[:, :, r]) / 9
    assert relative(s.C, C.flatten(1)) < 1e-12
    left = -s.M_prev.reshape(b.shape[1], 2, taps) - torch.einsum("ftc,oc->fot", C, s.best_move)
    assert relative(s.N, left.flatten(1)) < 1e-12


@pytest.mark.parametrize("kind", ["conv", "pool, flatten", "pool, conv", "depthwise", "stream"])
@pytest.mark.parametrize("taps", ["full", "centre"])
def test_N_in_a_second_run(kind: str, taps: str) -> None:
    """Measured with dW* it is what -M_prev + C S_in^+ M says; data that can be read once is kept."""
    networks = {
        "conv": conv_pair(*PAIRS["strided second"]),
        "pool, flatten": pooled("mean", True, "gelu"),
        "pool, conv": pooled("max", False),
        "depthwise": mobile(),
        "stream": image_stream(),
    }
    network = networks[kind]
    data, model = drawn(network, 60), ig.compile(network)
    expected = probe(model, data, F.cross_entropy, want=ALL, taps=taps)
    once = ((data[0][i : i + 20], data[1][i : i + 20]) for i in (0, 20, 40))
    for site, s in probe(model, once, F.cross_entropy, want=["N"], taps=taps).items():
        assert s.n == 60
        assert s.C is None and s.residual is not None
        assert relative(s.N, expected[site].N) < 1e-8
        assert relative(s.M_prev, expected[site].M_prev) < 1e-12
    if s.residual is not None:
        with pytest.raises(BadData, match="N measured with the dW"):
            _ = s + s


def patches(x, pattern, shape):
    """`[n, channels * taps + 1, positions]`, edge by edge, the constant 1 last."""
    positions = pattern.output(shape)
    count = pattern.kernel[0] * pattern.kernel[1]
    out = torch.zeros(len(x), shape[0], count, positions[0] * positions[1], dtype=DOUBLE)
    flat = x.flatten(2)
    for source, target, tap in zip(*pattern.taps(shape), strict=True):
        out[:, :, tap, target] = flat[:, :, source]
    out = out.flatten(1, 2)
    return torch.cat([out, torch.ones_like(out[:, :1])], 1)


def test_restricted_form_lowers_the_bottleneck_exactly() -> None:
    """With centre taps only: Psi falls by sum lambda^2, also where the second convolution is strided."""
    for pair in (PAIRS["same"], PAIRS["strided second"]):
        network = conv_pair(*pair)
        data, model = drawn(network, 5), ig.compile(network)
        s = probe(model, data, F.cross_entropy, sites=["grown"], taps="centre")["grown"]
        p = ig.Tiny(2, taps="centre").propose(s)
        bundles = {b.target: b for b in network.bundles.values()}
        shift = torch.zeros(5, *network.groups["target"].shape, dtype=DOUBLE, requires_grad=True)
        outputs, values = model.record(data[0], values=["grown"], shifts={"target": shift})
        (g,) = torch.autograd.grad(F.cross_entropy(outputs, data[1]) * 5, shift)
        c = patches(values["grown"].detach(), bundles["target"].pattern, network.groups["grown"].shape)
        v = -g.flatten(2) - torch.einsum("oc,ncr->nor", s.best_move, c)
        b = patches(data[0], bundles["grown"].pattern, network.groups["x"].shape)
        z = torch.einsum("kf,nfp->nkp", p.alpha, b).reshape(5, 2, *network.groups["grown"].shape[1:])
        second = bundles["target"].pattern
        new = F.conv2d(z, p.fan_out[bundles["target"].name], None, second.stride, second.padding, second.dilation)
        before, after = (x.square().sum() / 5 for x in (v, v - new.flatten(2)))
        assert relative(before - after, p.singular_values.square().sum()) < 1e-10


def test_chunks_do_not_matter(monkeypatch) -> None:
    network = conv_pair(*PAIRS["same"])
    data, model = drawn(network, 7), ig.compile(network)
    whole = probe(model, data, F.cross_entropy, want=ALL)["grown"]
    monkeypatch.setattr("irgrow.growth.conv_statistics.MEMORY", 20_000)
    small = probe(model, data, F.cross_entropy, want=ALL)["grown"]
    for name in ALL:
        assert relative(getattr(small, name), getattr(whole, name)) < 1e-12


def test_pooling_by_max_is_linearised_with_a_note() -> None:
    network = pooled("max", True)
    data, model = drawn(network, 60), ig.compile(network)
    s = probe(model, data, F.cross_entropy)["grown"]
    averaged = pooled("mean", True)
    assert not s.smooth and "pooling by max into pool taken as the mean" in s.notes[0]
    assert ig.Tiny(2).propose(s).predicted_gain is None
    expected = probe(ig.compile(averaged), data, F.cross_entropy, want=["S"])["grown"]
    assert relative(s.S, expected.S) < 1e-12


def test_what_is_not_linear_is_refused() -> None:
    b = ig.Builder(dtype=DOUBLE)
    b.input("x", (4, 5, 5))
    b.group("grown", (4, 5, 5), activation="relu")
    b.connect("x", "grown", ig.Conv2d(3, padding=1, channel_groups=2))
    b.output("out", 3)
    b.connect("grown", "out")
    network = b.build()
    with pytest.raises(Refused, match="bundle 'x_grown' .*channel groups"):
        probe(ig.compile(network), drawn(network, 4), F.cross_entropy)


@pytest.mark.parametrize(
    ("taps", "method"), list(itertools.product(["full", "centre"], [ig.GradMax, ig.Tiny, ig.Random]))
)
def test_every_method_fits_image_sites(taps: str, method) -> None:
    for network in (conv_pair(*PAIRS["strided second"]), pooled("mean", True), pooled("max", False), mobile()):
        data, how = drawn(network, 60), method(2, taps=taps)
        for name, s in probe(ig.compile(network), data, F.cross_entropy, taps=taps).items():
            morphism = ig.AddUnits(how.propose(s))(network)
            morphism.verify()
            assert morphism.after.groups[name].units == network.groups[name].units + 2


@pytest.mark.parametrize("kind", ["same", "strided second", "dilated"])
def test_both_ways_of_multiplying_agree(kind: str, monkeypatch) -> None:
    """Gradients spread over entry positions, or features gathered at target positions."""
    for network in (conv_pair(*PAIRS[kind]), pooled("max", False), image_stream()):
        data, model, found = drawn(network, 5), ig.compile(network), []
        for pays in (True, False):
            monkeypatch.setattr("irgrow.growth.conv_statistics._spreading_pays", lambda sums, way, pays=pays: pays)
            found.append(probe(model, data, F.cross_entropy, want=["M_prev"]))
        for site, s in found[0].items():
            assert relative(s.M_prev, found[1][site].M_prev) < 1e-12


@pytest.mark.parametrize("image", [(7, 6), (4, 9)])
@pytest.mark.parametrize(
    "windows",
    [
        Windows((3, 2), (2, 1), (1, 0), (1, 2)),
        Windows((2, 2), (2, 2), (0, 0), (1, 1)),
        Windows((3, 3), (1, 1), (2, 2), (2, 2)),
    ],
)
def test_windows_and_their_transposes(image, windows) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *image, generator=draw, dtype=DOUBLE)
    unfolded = windows.unfold(x).reshape(2, 3, windows.taps, *windows.output(image))
    g = torch.randn(2, 3, *windows.output(image), generator=draw, dtype=DOUBLE)
    spread = windows.spread(g, image, None).reshape(2, 3, windows.taps, *image)
    for tap in range(windows.taps):
        assert torch.equal(windows.pick(x, tap), unfolded[:, :, tap])
        assert torch.equal(windows.spread(g, image, tap), spread[:, :, tap])
        assert relative((windows.pick(x, tap) * g).sum(), (x * spread[:, :, tap]).sum()) < 1e-12
    assert relative(windows.sum(x), unfolded.sum(2)) < 1e-12
    assert relative((windows.sum(x) * g).sum(), (x * windows.share(g, image)).sum()) < 1e-12
