"""Pictures of networks: well-formed, complete, the same every time, nothing on top of anything else."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch

import irgrow as ig
from irgrow.ir import errors
from irgrow.viz import network_svg, save_svg
from irgrow.viz.drawing import NEGATIVE, POSITIVE, ROLES
from irgrow.viz.layout import Layout, layout

SVG = "{http://www.w3.org/2000/svg}"


def inserted(inputs: int, outputs: int, neurons: int) -> ig.Network:
    network = ig.mlp([inputs, outputs], seed=0)
    for seed in range(neurons):
        network = ig.InsertNeuron(seed=seed)(network).after
    return network


def residual() -> ig.Network:
    b = ig.Builder(seed=0)
    b.input("image", (3, 8, 8))
    b.group("stem", (8, 8, 8), activation="relu", norm="batch")
    b.connect("image", "stem", ig.Conv2d((3, 3), padding=(1, 1)))
    b.group("inner", (8, 8, 8), activation="relu")
    b.connect("stem", "inner", ig.Conv2d((3, 3), padding=(1, 1), channel_groups=2))
    b.group("sum", (8, 8, 8), activation="relu")
    b.connect("inner", "sum", ig.Conv2d((3, 3), padding=(1, 1)))
    b.connect("stem", "sum", ig.Identity())
    b.group("mean", (8, 1, 1))
    b.connect("sum", "mean", ig.Pool2d((8, 8)), 1 / 64, trainable=False)
    b.output("classes", 10, bias=True)
    b.connect("mean", "classes")
    return b.build()


def branches() -> ig.Network:
    b = ig.Builder(seed=0)
    b.input("x", 8)
    b.input("late", 3)
    b.group("a", 6, activation="tanh")
    b.connect("x", "a")
    b.group("b", 5)
    b.connect("a", "b")
    b.connect("late", "b")
    b.output("y", 2)
    b.connect("b", "y")
    b.connect("x", "y")
    b.output("early", 2)
    b.connect("a", "early")
    return b.build()


NETWORKS = {
    "mlp": ig.mlp([64, 36, 10]),
    "large": ig.mlp([784, 300, 10], norm="batch"),
    "cnn": ig.cnn((1, 16, 16), (4, 8), 5),
    "residual": residual(),
    "inserted": inserted(8, 3, 60),
    "mixed": ig.InsertNeuron(seed=1)(ig.mlp([12, 10, 4])).after,
    "branches": branches(),
    "perceptron": ig.mlp([1, 1], bias=False),
}


def parsed(network: ig.Network, **named: object) -> ET.Element:
    return ET.fromstring(network_svg(network, **named))  # type: ignore[arg-type]


def segments(root: ET.Element) -> dict[str, int]:
    """How many lines there are of each sign (one `M` each), the legend's two left out."""
    counts = {"p": 0, "n": 0}
    for path in root.iter(f"{SVG}path"):
        if path.get("class") in counts and path.get("stroke-opacity"):
            counts[path.get("class", "")] += path.get("d", "").count("M")
    return counts


def texts(root: ET.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_kind_of_network_can_be_drawn(kind: str) -> None:
    network = NETWORKS[kind]
    text = network_svg(network, title=f"<{kind}> & co")
    root = ET.fromstring(text)
    words = texts(root)
    assert f"<{kind}> & co" in words
    for name in network.groups:
        assert any(name in word for word in words), name
    assert any(f"{network.counts.neurons:,} neurons" in word for word in words)
    assert any(f"{network.counts.edges:,}" in word for word in words if "drawn" in word or "folded" in word)
    assert "nan" not in text and "inf" not in re.sub("info|infer", "", text)
    for outside in ("http://", "https://", "<script", "<image", "@import", "url("):
        assert text.count(outside) == (1 if outside == "http://" else 0), outside  # the namespace
    assert network_svg(network, title=f"<{kind}> & co") == text


@pytest.mark.parametrize("kind", NETWORKS)
def test_everything_is_inside_the_picture(kind: str) -> None:
    root = parsed(NETWORKS[kind])
    left, top, width, height = map(float, root.get("viewBox", "").split())
    xs, ys = [], []
    for path in root.iter(f"{SVG}path"):
        numbers = re.findall(r"([MLCHVQ ])(-?[\d.]+)(?: (-?[\d.]+))?", path.get("d", ""))
        for command, a, b in numbers:
            if command == "H":
                xs.append(float(a))
            elif command == "V":
                ys.append(float(a))
            elif b:
                xs.append(float(a))
                ys.append(float(b))
    for circle in root.iter(f"{SVG}circle"):
        x, y, r = (float(circle.get(k, "nan")) for k in ("cx", "cy", "r"))
        xs += [x - r, x + r]
        ys += [y - r, y + r]
    for box in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(box.get(k, "nan")) for k in ("x", "y", "width", "height"))
        assert w > 0 and h > 0
        xs += [x, x + w]
        ys += [y, y + h]
    assert left <= min(xs) and max(xs) <= left + width
    assert top <= min(ys) and max(ys) <= top + height


def test_every_edge_of_a_small_network_is_a_line_of_its_sign() -> None:
    network = NETWORKS["mlp"]
    weights = torch.cat([b.weight.flatten() for b in network.bundles.values()])
    root = parsed(network)
    assert segments(root) == {"p": int((weights >= 0).sum()), "n": int((weights < 0).sum())}
    assert any("all 2,664 edges are drawn" in word for word in texts(root))
    network = NETWORKS["inserted"]
    assert sum(segments(parsed(network)).values()) == network.counts.edges


def test_strong_edges_are_the_opaque_ones() -> None:
    weight = torch.zeros(3, 3)
    weight[0, 0], weight[1, 1], weight[2, 2] = 1.0, -1.0, 0.1
    root = parsed(ig.mlp([3, 3], bias=False).with_tensors({"weight.input_output": weight}))
    opacity: dict[int, float] = {}
    for path in root.iter(f"{SVG}path"):
        if path.get("stroke-opacity") and path.get("class") in ("p", "n"):
            opacity[path.get("d", "").count("M")] = float(path.get("stroke-opacity", "0"))
    assert segments(root) == {"p": 8, "n": 1}
    assert opacity[1] > 2 * opacity[max(opacity)]


def test_many_edges_are_folded_and_the_picture_says_so() -> None:
    network = NETWORKS["large"]
    root = parsed(network)
    drawn = sum(segments(root).values())
    assert 0 < drawn <= 6000 < network.counts.edges
    assert any(f"{drawn:,} of {network.counts.edges:,} edges are drawn one by one" in word for word in texts(root))
    assert "764 not drawn" in texts(root)
    root = parsed(NETWORKS["mlp"], edges=500)
    assert sum(segments(root).values()) == 500
    assert any("500 of 2,664 edges" in word for word in texts(root))


def test_the_edges_that_are_left_are_the_strongest() -> None:
    network = ig.mlp([4, 3], bias=False)
    weight = torch.full((3, 4), -0.01)
    weight[1, 2] = 5.0
    root = parsed(network.with_tensors({"weight.input_output": weight}), edges=1)
    assert segments(root) == {"p": 1, "n": 0}


def test_images_and_windows() -> None:
    root = parsed(NETWORKS["cnn"])
    words = texts(root)
    assert words.count("conv 3×3") == 2 and words.count("pool 2×2") == 2 and "stride 2" in words
    assert "4×16×16 · relu" in words and "4×8×8 · max" in words
    notes = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert any("8 channels of 8×8" in note for note in notes)
    words = texts(parsed(NETWORKS["residual"]))
    assert "identity" in words and "2 groups" in words and "8×8×8 · batch norm · relu" in words


def test_neurons_have_their_serials_as_tooltips() -> None:
    notes = [title.text or "" for title in parsed(NETWORKS["mlp"]).iter(f"{SVG}title")]
    assert any(re.fullmatch(r"hidden#64, bias -?[\d.e-]+", note) for note in notes)


def test_large_irregular_parts_become_a_histogram() -> None:
    root = parsed(NETWORKS["inserted"], neurons=50)
    assert any("60 neurons on" in word for word in texts(root))
    assert sum(segments(root).values()) == 0
    bars = [r for r in root.iter(f"{SVG}rect") if r.get("class") == "hidden"]
    assert len(bars) == np.unique(NETWORKS["inserted"].levels["inserted"]).size


# ---- positions --------------------------------------------------------------------------------------------------


def positions(plan: Layout) -> np.ndarray:
    return np.concatenate([p[~np.isnan(p[:, 0])] for p in plan.neurons.values()])


@pytest.mark.parametrize("kind", ["mlp", "large", "inserted", "mixed", "branches"])
def test_no_neuron_covers_another(kind: str) -> None:
    plan = layout(NETWORKS[kind])
    at = positions(plan)
    distance = np.linalg.norm(at[:, None] - at[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    radius = max(item.radius for item in plan.items)
    assert distance.min() > 2 * min(item.radius for item in plan.items if item.radius)
    assert radius < 10


@pytest.mark.parametrize("kind", ["inserted", "mixed"])
def test_edges_run_from_left_to_right(kind: str) -> None:
    network = NETWORKS[kind]
    plan = layout(network)
    for bundle in network.bundles.values():
        s, t, _ = bundle.pattern.all_edges(*network.shapes(bundle))
        assert np.all(plan.neurons[bundle.source][s, 0] < plan.neurons[bundle.target][t, 0])


@pytest.mark.parametrize("kind", NETWORKS)
def test_groups_do_not_overlap(kind: str) -> None:
    items = layout(NETWORKS[kind]).items
    for n, a in enumerate(items):
        for b in items[:n]:
            apart = a.box[2] < b.box[0] or b.box[2] < a.box[0] or a.box[3] < b.box[1] or b.box[3] < a.box[1]
            assert apart, (a.groups, b.groups)


def test_an_input_stands_beside_its_first_use() -> None:
    plan = layout(NETWORKS["branches"])
    assert plan.of["x"].first == 0 and plan.of["late"].first == plan.of["b"].first - 1


# ---- colours ----------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def seen_by(colour: str, kind: str) -> np.ndarray:
    """A colour (linear RGB) as a deuteranope or protanope sees it (Viénot, Brettel and Mollon 1999)."""
    parts = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    lost = {
        "protan": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
        "deutan": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
    }[kind]
    return np.linalg.inv(to_lms) @ lost @ to_lms @ linear


def test_colours_can_be_told_apart_on_white_and_on_black() -> None:
    from irgrow.viz.drawing import STYLE

    text = re.search(r"\.t\{fill:(#\w+)\}", STYLE)
    assert text is not None
    for colour in (text[1], POSITIVE, NEGATIVE, *ROLES.values()):
        for page in ("#ffffff", "#0d1117"):
            assert contrast(colour, page) > 2.8, (colour, page)
    assert contrast(text[1], "#ffffff") > 3.7 and contrast(text[1], "#0d1117") > 3.7
    for kind in ("protan", "deutan"):
        assert np.abs(seen_by(POSITIVE, kind) - seen_by(NEGATIVE, kind)).max() > 0.25
        assert np.abs(seen_by("#d62728", kind) - seen_by("#2ca02c", kind)).max() < 0.25  # red and green: not so


# ---- files and imports ------------------------------------------------------------------------------------------


def test_saving_a_picture(tmp_path: Path) -> None:
    save_svg(NETWORKS["mlp"], tmp_path / "net.svg", title="digits")
    assert (tmp_path / "net.svg").read_text(encoding="utf-8") == network_svg(NETWORKS["mlp"], title="digits")
    with pytest.raises(errors.BadFile, match="drawing to .*No such file"):
        save_svg(NETWORKS["mlp"], tmp_path / "missing" / "net.svg")


def test_drawing_is_quick() -> None:
    network = NETWORKS["mlp"]
    begin = time.perf_counter()
    text = network_svg(network)
    assert time.perf_counter() - begin < 1.0
    assert len(text) < 120_000


def test_drawing_needs_no_matplotlib() -> None:
    code = """
import sys
import irgrow.viz
assert not {"matplotlib", "torch"} & set(sys.modules)
import irgrow as ig
irgrow.viz.network_svg(ig.mlp([3, 2]))
assert "matplotlib" not in sys.modules
irgrow.viz.growth_plot
assert "matplotlib" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
