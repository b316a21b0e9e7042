"""Every experiment, small: run twice from one seed it writes the same result.json but for its timings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from irgrow.experiments import (
    cnn_to_fcn,
    firefly_cells,
    firefly_continual,
    firefly_deepen,
    firefly_widen,
    flatness,
    flatness_head,
    gradmax_figures,
    gradmax_images,
    images,
    reproduce,
    teacher_student,
    tiny_methods,
    tiny_resnet,
    tiny_sine,
)
from irgrow.experiments.reproduce import EXPERIMENTS, Findings, Setting
from irgrow.experiments.teacher_student import Task
from irgrow.experiments.tiny_methods import Start

Run = Callable[[Setting], Findings]
HIDDEN = Task((4, 3, 2), start=1, growths=1, every=3, after=4, samples=16)


def _few(patch: pytest.MonkeyPatch) -> None:
    """96 digits to train on, 50 to test."""
    (x, y), (x_test, y_test) = images.load()
    patch.setattr(
        images, "load", lambda side=8, name="digits": _sized(side, (x[:96], y[:96]), (x_test[:50], y_test[:50]))
    )


def _sized(side: int, *parts: Any) -> Any:
    return tuple((x.repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3), y) for x, y in parts)


def _teacher_student(patch: pytest.MonkeyPatch) -> Run:
    patch.setattr(teacher_student, "TASKS", {n: replace(HIDDEN, kind=t.kind) for n, t in teacher_student.TASKS.items()})
    return teacher_student.run


def _figures(patch: pytest.MonkeyPatch) -> Run:
    """Runs of thirty steps, all of them recorded; what follows a growth takes as long as ever."""
    one = gradmax_figures.run_one

    def short(method: Any, task: Task, seed: int, signs: bool, **more: Any) -> Any:
        return one(method, replace(task, every=5, first=None, after=5, samples=20), seed, signs, record=1, **more)

    patch.setattr(gradmax_figures, "run_one", short)
    patch.setattr(gradmax_figures, "TASK", replace(gradmax_figures.TASK, samples=20))
    patch.setattr(gradmax_figures, "BATCHES", (4, 128))
    return gradmax_figures.run


def _images(patch: pytest.MonkeyPatch) -> Run:
    _few(patch)
    base = {n: replace(p, epochs=1, growths=1, steps=1, until=0.3, batch_size=32)
            for n, p in gradmax_images.bases(False).items()}  # fmt: skip
    return lambda setting: gradmax_images.run(setting, base)


def _rbf(patch: pytest.MonkeyPatch) -> Run:
    from irgrow.experiments import firefly_rbf

    return lambda setting: firefly_rbf.run(setting, iterations=3, neurons=2)


def _widen(patch: pytest.MonkeyPatch) -> Run:
    _few(patch)
    plan = firefly_widen.Plan(growths=1, epochs=1, new=1, steps=1, tuning=1)
    return lambda setting: firefly_widen.run(setting, plan)


def _deepen(patch: pytest.MonkeyPatch) -> Run:
    _few(patch)
    plan = firefly_deepen.Plan(growths=1, epochs=1, last=1, new=2, steps=1, tuning=1)
    return lambda setting: firefly_deepen.run(setting, (plan,))


def _continual(patch: pytest.MonkeyPatch) -> Run:
    short = {n: replace(s, tasks=2, epochs=1, masks=1) for n, s in firefly_continual.SEQUENCES.items()}
    return lambda setting: firefly_continual.run(setting, short)


def _cells(patch: pytest.MonkeyPatch) -> Run:
    _few(patch)
    patch.setattr(firefly_cells, "NODES", 2)
    plan = firefly_cells.Plan(rounds=1, steps=1, samples=64, last=1, controls=1)
    return lambda setting: firefly_cells.run(setting, plan)


def _flatness(patch: pytest.MonkeyPatch) -> Run:
    plan = flatness.Plan("digits", 9, ((1, 5), (2, 4)), ("a",), 1.8, 0.2, (400, 700), limit=8, measured_on=50)
    return lambda setting: flatness.run(setting, [plan])


def _head(patch: pytest.MonkeyPatch) -> Run:
    pytest.importorskip("transformers")
    plan = flatness_head.Plan(
        neurons=16, hidden=16, layers=1, tokens=20, length=6, samples=40, epochs=8, measured_on=16
    )
    return lambda setting: flatness_head.run(setting, plan)


def _fcn(patch: pytest.MonkeyPatch) -> Run:
    (x, y), (x_test, y_test) = cnn_to_fcn.data_of(cnn_to_fcn.Plan(samples=100))
    few = (x[:, :, ::2, ::2], y), (x_test[:100, :, ::2, ::2], y_test[:100])
    patch.setattr(cnn_to_fcn, "data_of", lambda plan: few)
    plan = cnn_to_fcn.Plan(channels=(2,), samples=100, batch_size=50, relax=(0, 1), epochs=1, curvature_on=10)
    return lambda setting: cnn_to_fcn.run(setting, plan)


def _sine(patch: pytest.MonkeyPatch) -> Run:
    size = tiny_sine.Size(inputs=4, classes=3, neurons=2, train=60)
    return lambda setting: tiny_sine.run(setting, {"as printed": size, "variance 1": size})


def _resnet(patch: pytest.MonkeyPatch) -> Run:
    size = tiny_resnet.Size(channels=(2, 2, 3), units=1, growths=3, train=40)
    return lambda setting: tiny_resnet.run(setting, size)


def _methods(patch: pytest.MonkeyPatch) -> Run:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    data = (x, x[:, :3].argmax(1))
    task = (Start((4, 2, 3), "relu"), data, data, {"growths": 1, "budget": 3e5})
    patch.setattr(tiny_methods, "tasks", lambda full: {"digits": task})
    return tiny_methods.run


SMALL: dict[str, Callable[[pytest.MonkeyPatch], Run]] = {
    "flatness": _flatness,
    "flatness-head": _head,
    "teacher-student": _teacher_student,
    "gradmax-figures": _figures,
    "gradmax-images": _images,
    "firefly-rbf": _rbf,
    "firefly-widen": _widen,
    "firefly-deepen": _deepen,
    "firefly-continual": _continual,
    "firefly-cells": _cells,
    "tiny-sine": _sine,
    "tiny-resnet": _resnet,
    "tiny-methods": _methods,
    "cnn-to-fcn": _fcn,
}


def test_none_is_forgotten() -> None:
    assert list(SMALL) == list(EXPERIMENTS)


LONG = ("gradmax-figures", "gradmax-images", "teacher-student")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in SMALL])
def test_equal_seeds_write_equal_results(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = SMALL[name](monkeypatch)
    monkeypatch.setitem(EXPERIMENTS, name, EXPERIMENTS[name]._replace(module="small"))
    monkeypatch.setitem(sys.modules, "irgrow.experiments.small", SimpleNamespace(run=run))
    texts, state, threads = [], torch.random.get_rng_state(), torch.get_num_threads()
    for n in range(2):
        torch.manual_seed(n)  # what a caller drew before makes no difference
        torch.set_num_threads(2 - n)  # nor do the caller's threads
        reproduce.reproduce(name, seeds=1, out=tmp_path / str(n), progress=False, workers=1)
        found = json.loads((tmp_path / str(n) / "result.json").read_text())
        assert found.pop("timings")["seconds"] > 0 and found["threads"] == 1
        texts.append(json.dumps(found))
        for file in found["figures"]:
            assert (tmp_path / str(n) / file).stat().st_size > 1000
    torch.random.set_rng_state(state)
    torch.set_num_threads(threads)
    assert texts[0] == texts[1]
    pictures = [{f: (tmp_path / n / f).read_bytes() for f in found["figures"]} for n in "01"]
    assert pictures[0] == pictures[1]
