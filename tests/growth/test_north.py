"""NORTH: orthogonal to what is there, in the sense each variant says; the trigger."""

from __future__ import annotations

import pytest
import torch
from growth_nets import DOUBLE, conv_pair, drawn, mlp, pooled, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.effective_rank import FullRank, effective_rank, effective_ranks
from irgrow.growth.entries import Entrance
from irgrow.growth.fit import Growth, fit
from irgrow.growth.probe import probe
from irgrow.ir.errors import BadData, Refused, StaleMorphism, UnknownName
from irgrow.ir.interpreter import interpret_groups


def measured(network, count: int = 40, site: str | None = None):
    model, data = ig.compile(network), drawn(network, count)
    s = probe(model, [], F.cross_entropy, want=())
    return s[site or next(iter(s))], model, data


def conv(activation: str = "tanh", **more):
    return conv_pair(ig.Conv2d((3, 3), padding=(1, 1)), ig.Conv2d((3, 3), (2, 2)), activation, **more)


def preactivations(network, group: str, data, alpha):
    """Old `[rows, units]` and new pre-activations, from patches taken by hand."""
    if len(network.groups[group].shape) == 1:
        source = network.bundles[next(b.name for b in network.entering(group))].source
        x = interpret_groups(network, data[0])[source]
        b = torch.cat([x, torch.ones(len(x), 1, dtype=DOUBLE)], 1)
    else:
        x = F.unfold(data[0], 3, padding=1).mT.reshape(-1, 9 * data[0].shape[1])
        b = torch.cat([x, torch.ones(len(x), 1, dtype=DOUBLE)], 1)
    bundle = network.entering(group)[0]
    old = torch.cat(
        [bundle.weight.reshape(len(network.groups[group].bias), -1), network.groups[group].bias[:, None]], 1
    )
    return b @ old.mT, b @ alpha.mT


@pytest.mark.parametrize("name", ["mlp", "conv", "pooled"])
def test_pre_is_orthogonal_to_old_preactivations(name: str) -> None:
    network = {"mlp": mlp("relu", (9, 5, 4, 3)), "conv": conv(), "pooled": pooled("max", True)}[name]
    s, model, data = measured(network, 60)
    p = ig.North(3, how="pre").propose_with(s, model, data)
    old, new = preactivations(network, s.site, data, p.alpha)
    cosines = (old / old.norm(dim=0)).mT @ (new / new.norm(dim=0))
    assert float(cosines.abs().max()) < 1e-12
    assert isinstance(ig.AddUnits(p)(network).verify().promise, ig.SameFunction)
    other = ig.North(3, how="weight").propose_with(s, model, data)
    _, off = preactivations(network, s.site, data, other.alpha)
    assert float(((old / old.norm(dim=0)).mT @ (off / off.norm(dim=0))).abs().max()) > 1e-3


def test_pre_has_the_distribution_of_its_formula() -> None:
    """S^+ B V_ker(A) r with r normal has the covariance S^+ B V V^T B^T S^+, up to the normalisation."""
    network = mlp("tanh", (6, 3, 3))
    s, model, data = measured(network, 30)
    p = ig.North(4000, how="pre", fan_out="zero").propose_with(s, model, data)
    B = torch.cat([data[0], torch.ones(30, 1, dtype=DOUBLE)], 1).mT  # [features, samples]
    S = B @ B.mT / 30
    W = Entrance("test", network, "hidden").weights
    V = torch.linalg.svd(W @ B)[2][3:].mT  # right null space of A
    draw = torch.Generator().manual_seed(1)
    direct = torch.linalg.solve(S, B @ V @ torch.randn(27, 4000, generator=draw, dtype=DOUBLE))
    direct = direct / direct.norm(dim=0)
    ours = (p.alpha / p.alpha.norm(dim=1, keepdim=True)).mT
    assert float((W @ S @ direct).abs().max()) < 1e-12
    assert relative(ours @ ours.mT, direct @ direct.mT) < 0.08  # 4000 draws


def test_weight_is_orthogonal_to_old_weights() -> None:
    for network in (mlp("relu", (9, 5, 4, 3)), conv()):
        s, model, _ = measured(network)
        p = ig.North(3, how="weight").propose_with(s, model)
        W = Entrance("test", network, s.site).weights
        assert float((p.alpha @ W.mT).abs().max()) < 1e-12
        assert relative(p.alpha.norm(dim=1), W.norm(dim=1).mean().expand(3)) < 1e-12


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_select_takes_the_largest_residuals(name: str, greedy: bool) -> None:
    network = {"mlp": mlp("relu", (9, 5, 4, 3)), "conv": conv("relu")}[name]
    s, model, data = measured(network, 60)
    p = ig.North(3, candidates=50, greedy=greedy, samples=10_000).propose_with(s, model, data)
    everything = ig.North(50, candidates=50, greedy=False, samples=10_000).propose_with(s, model, data)  # all of them
    old, new = preactivations(network, s.site, data, everything.alpha)
    A, H = old.relu(), new.relu()
    H = H / H.norm(dim=0)
    chosen = []
    for _ in range(3):
        left = H - A @ torch.linalg.lstsq(A, H).solution
        size = left.norm(dim=0)
        size[chosen] = -1
        chosen.append(int(size.argmax()))
        if greedy:
            A = torch.cat([A, H[:, chosen[-1:]]], 1)
    assert relative(p.alpha, everything.alpha[chosen]) < 1e-12


def test_batch_norm_is_seen() -> None:
    network = mlp("tanh", (7, 4, 3))
    network = ig.mlp([7, 4, 3], activation="tanh", norm="batch", seed=0, dtype=DOUBLE)
    s, model, data = measured(network)
    p = ig.North(2).propose_with(s, model, data)
    after = ig.AddUnits(p)(network).after
    H = interpret_groups(after, data[0])["hidden"]
    b = torch.cat([data[0], torch.ones(40, 1, dtype=DOUBLE)], 1)
    assert relative(H[:, 4:], torch.tanh(b @ p.alpha.mT / (1 + 1e-5) ** 0.5)) < 1e-12


def test_the_kernel_can_be_empty() -> None:
    network = mlp("tanh", (4, 5, 3))
    s, model, data = measured(network)
    for how in ("pre", "weight"):
        with pytest.raises(Refused, match=r"North: site 'hidden': found 5 units on a fan-in of 5 .*kernel is empty"):
            ig.North(1, how=how).propose_with(s, model, data)
    assert ig.North(2).propose_with(s, model, data).units == 2
    network = mlp("tanh", (4, 3, 3))
    s, model, data = measured(network)
    p = ig.North(3, how="pre").propose_with(s, model, data)
    assert p.notes == ("3 units from a kernel of dimension 2: they depend on each other",)
    with pytest.raises(Refused, match="0 of 1 units whose activations are new"):
        s, model, data = measured(mlp("identity", (4, 6, 3)))
        ig.North(1).propose_with(s, model, data)


def test_refusals_and_purity() -> None:
    network = mlp("relu")
    s, model, data = measured(network)
    before = {n: t.clone() for n, t in model.tensors().items()}
    model.train()
    ig.North(2, fan_out="random").propose_with(s, model, data)
    with pytest.raises(Refused, match="North: site 'hidden1': found statistics alone"):
        ig.North(1).propose(s)
    with pytest.raises(BadData, match="North: site 'hidden1': found no data"):
        ig.North(1).propose_with(s, model)
    with pytest.raises(BadData, match="group 'input': activations: found NaN"):
        ig.North(1).propose_with(s, model, (data[0] * torch.nan, data[1]))
    assert model.training and all(torch.equal(before[n], t) for n, t in model.tensors().items())
    with pytest.raises(StaleMorphism, match="North: site 'hidden1'"):
        ig.North(1).propose_with(s, ig.compile(mlp("tanh", (6, 5, 3))), data)
    with pytest.raises(UnknownName, match="North: how 'best'"):
        ig.North(how="best")
    with pytest.raises(Refused, match="North: candidates: found 2"):
        ig.North(3, candidates=2)
    s, model, data = measured(residual())
    with pytest.raises(Refused, match="entered at 2 groups"):
        ig.North(1).propose_with(s, model, data)
    assert isinstance(ig.North(), ig.NeedsModel) and not isinstance(ig.Tiny(), ig.NeedsModel)


def test_bound_to_a_model_it_grows_in_fit() -> None:
    network = mlp("relu", (9, 2, 3))
    data = drawn(network, 64)
    model = ig.compile(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    growth = Growth(when=ig.Every(epochs=1), how=ig.North(2, how="pre").on(model, data, F.cross_entropy))
    history = fit(model, data, F.cross_entropy, optimizer, epochs=3, growth=growth, progress=False)
    assert model.structure.groups["hidden"].units == 6 and not history.notes


def test_effective_rank() -> None:
    draw = torch.Generator().manual_seed(0)
    A = torch.randn(50, 3, generator=draw, dtype=DOUBLE) @ torch.randn(3, 6, generator=draw, dtype=DOUBLE)
    for scale in (1.0, 1e-3):
        assert effective_rank((scale * A).mT @ (scale * A) / 50) == 3
    assert effective_rank(1e-6 * A.mT @ A / 50, absolute=True) == 0  # the authors' count depends on the scale
    assert effective_rank(torch.zeros(4, 4)) == 0
    network = mlp("relu", (9, 5, 4, 3))
    model, data = ig.compile(network), drawn(network, 100)
    found = effective_ranks(model, data, ["hidden1", "hidden2"], batch_size=33)
    H = interpret_groups(network, data[0])["hidden1"]
    values = torch.linalg.svdvals(H / 10)
    assert found["hidden1"] == int((values > 0.01 * values[0]).sum())
    with pytest.raises(BadData, match="effective_ranks: data: found no samples"):
        effective_ranks(model, [], ["hidden1"])


def test_full_rank_triggers_growth_until_it_is_not() -> None:
    network = mlp("relu", (3, 3, 2))
    data = drawn(network, 64)
    model = ig.compile(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    growth = Growth(when=FullRank(data, threshold=0.05), how=ig.Silent(2), refine=False)
    fit(model, data, F.cross_entropy, optimizer, epochs=4, growth=growth, progress=False)
    # silent units say the constant 1: one direction for several units
    assert model.structure.groups["hidden"].units == 5
    with pytest.raises(Refused, match="FullRank: found share=0"):
        FullRank(data, share=0.0)


def test_full_rank_says_where_as_well() -> None:
    """Of two groups, one of which says the same thing twice, only the other one grows."""
    network = mlp("tanh", (6, 3, 2, 3))
    tensors = network.tensors()
    for name in ("weight.hidden1_hidden2", "bias.hidden2"):
        tensors[name][1] = tensors[name][0]
    network = network.with_tensors(tensors)
    data = drawn(network, 60)
    full = ig.FullRank(data, times=1)
    assert full.ranks(network, ["hidden1", "hidden2"]) == {"hidden1": 3, "hidden2": 1}
    model = ig.compile(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    growth = Growth(when=full, where=full, how=ig.North(1))
    history = fit(model, data, F.cross_entropy, optimizer, epochs=3, growth=growth, progress=False)
    assert [e["site"] for e in history.growths] == ["hidden1"]
