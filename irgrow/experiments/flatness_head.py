"""A RoBERTa classification head grown in three phases, as an irgrow network inside the Hugging Face model.

    grown    the head starts without hidden neurons; after epochs 2, 5 and 7 of 10 a third of them is inserted
    fixed    a dense head of as many parameters: hidden size -> neurons -> classes
    scratch  the control the paper lacks: the grown head's final graph, from scratch

The encoder is trained along. All heads are tanh, without biases, from U(-0.5, 0.5). By default the encoder is a random
tiny one and classifies made-up token sequences; `full`: roberta-large and CoLA, batch 16, 1024 neurons. The paper does
not state the learning rate (1e-5), the length of sentences (48 tokens) or on how much data it measures sharpness (256).
A neuron gets I = nI + nO - nI nO / h parents: with as many neurons as the hidden size exactly nI.
Source: Caillon & Cerisara, Growing Neural Networks Achieve Flatter Minima, section 4.2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import irgrow as ig
from irgrow.analysis import flatness
from irgrow.experiments import full_data, pictures
from irgrow.experiments.claims import claim
from irgrow.experiments.flatness import bare, budget, drawn
from irgrow.experiments.reproduce import Findings, MissingData, Setting
from irgrow.passes import InsertNeuron
from irgrow.runtime.model import CompiledNetwork

SOURCE = "Caillon & Cerisara 2021, table 2"
NETWORKS = ("grown", "scratch", "fixed")
MEASURES = ("depth blocks", "edge", "plain")
HEAD_FILE = "head.safetensors"
Split = tuple[tuple[Tensor, Tensor], Tensor]  # (tokens, attention mask) [n, length], classes [n]


@dataclass(frozen=True)
class Plan:
    """`weights`: the name of a pretrained encoder; None: a random tiny one of these sizes."""

    weights: str | None = None
    neurons: int = 32
    hidden: int = 32
    layers: int = 2
    tokens: int = 60
    length: int = 12
    samples: int = 400
    phases: tuple[int, ...] = (2, 5, 7)
    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-3
    measured_on: int = 128


FULL = Plan("roberta-large", 1024, 1024, learning_rate=1e-5, measured_on=256)


def run(setting: Setting, plan: Plan | None = None) -> Findings:
    """Every head of every seed. Raises MissingData where transformers, weights or data are missing."""
    plan = plan or (FULL if setting.full else Plan())
    transformers()
    if plan.weights:
        data_of(plan)
        encoder(plan)
    runs = [row for rows in setting.each(one, [(plan, seed) for seed in setting.seeds], "seeds") for row in rows]
    return findings(setting, plan, runs)


# ---- the Hugging Face side ------------------------------------------------------------------------------------


def transformers() -> Any:
    """The module `transformers` with its RoBERTa classes loaded; MissingData where it is not installed."""
    try:
        with _without_ours("kernels"):
            import transformers as found

            _ = found.RobertaForSequenceClassification  # loaded on first use
    except ImportError as error:
        raise MissingData(
            "flatness-head", f"no working transformers ({error})", "transformers", do="pip install irgrow[hf]"
        ) from None
    return found


@contextmanager
def _without_ours(name: str) -> Iterator[None]:
    """In a checkout our folder `kernels` stands where transformers looks for a package of that name."""
    hide = name not in sys.modules
    if hide:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            sys.modules.pop(name, None)


class Head(nn.Module):
    """A compiled network as the `classifier` of a RoBERTa model: it reads the first token's features."""

    def __init__(self, network: CompiledNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor, **_: Any) -> Tensor | tuple[Tensor, ...]:
        out: Tensor | tuple[Tensor, ...] = self.network(features[:, 0, :].contiguous())
        return out


class Logits(nn.Module):
    """The model as a function of (tokens, attention mask) to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, attention_mask=mask).logits
        return logits


def encoder(plan: Plan) -> Any:
    """A RobertaForSequenceClassification; random ones draw from torch's global generator."""
    library = transformers()
    if plan.weights is None:
        config = library.RobertaConfig(
            vocab_size=plan.tokens,
            hidden_size=plan.hidden,
            num_hidden_layers=plan.layers,
            num_attention_heads=max(1, plan.hidden // 16),
            intermediate_size=2 * plan.hidden,
            max_position_embeddings=plan.length + 2,
            num_labels=2,
        )
        config._attn_implementation = "eager"  # the fused one cannot be differentiated twice
        return library.RobertaForSequenceClassification(config)
    try:
        return library.RobertaForSequenceClassification.from_pretrained(
            plan.weights, num_labels=2, local_files_only=True, attn_implementation="eager"
        )
    except OSError as error:
        raise _no_weights(plan, error) from None


def _no_weights(plan: Plan, error: OSError) -> MissingData:
    return MissingData(
        f"flatness-head: {plan.weights}",
        f"no weights ({str(error).splitlines()[0]})",
        "them in the Hugging Face cache, or in the folder that HF_HOME names",
        do=f"run hf download {plan.weights}",
    )


def save(model: Any, folder: Path) -> None:
    """The folder holds the model: Hugging Face's own files, and the head's structure beside them."""
    bars = transformers().utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            bars.enable_progress_bar()
    ig.save(folder / HEAD_FILE, model.classifier.network.network())


def load(folder: Path) -> Any:
    """The model that `save` wrote; every tensor must be there, under its name."""
    from safetensors.torch import load_file

    library = transformers()
    config = library.RobertaConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = library.RobertaForSequenceClassification(config)
    model.classifier = Head(ig.compile(ig.load(folder / HEAD_FILE)))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


# ---- data -----------------------------------------------------------------------------------------------------


def data_of(plan: Plan) -> tuple[Split, Split]:
    """Training and test sentences."""
    if plan.weights is None:
        draw = torch.Generator().manual_seed(0)
        return made_up(plan, plan.samples, draw), made_up(plan, plan.samples, draw)
    texts = full_data.sentences("cola")
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(plan.weights, local_files_only=True)
    except OSError as error:
        raise _no_weights(plan, error) from None
    parts = []
    for sentences, labels in texts:
        words = tokenizer(sentences, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
        parts.append(((words["input_ids"], words["attention_mask"]), labels))
    return parts[0], parts[1]


def made_up(plan: Plan, samples: int, draw: torch.Generator) -> Split:
    """Sequences `<s> ... </s>` of random length; class 1 if most of their words are in the upper half of all words."""
    first = 3  # 0: <s>, 1: padding, 2: </s>
    words = torch.randint(first, plan.tokens, (samples, plan.length - 2), generator=draw)
    count = torch.randint(3, plan.length - 1, (samples, 1), generator=draw)
    place = torch.arange(plan.length - 2)
    inside = place < count
    upper = (words >= (first + plan.tokens) // 2) & inside
    tokens = torch.where(inside, words, torch.where(place == count, 2, 1))
    last = torch.where(count == plan.length - 2, 2, 1)
    tokens = torch.cat([torch.zeros(samples, 1, dtype=torch.long), tokens, last], 1)
    return (tokens, (tokens != 1).long()), (2 * upper.sum(1) > count[:, 0]).long()


# ---- one seed -------------------------------------------------------------------------------------------------


def one(plan: Plan, seed: int) -> list[dict[str, Any]]:
    """The three heads on the same encoder: one row each. torch's global random state is left as it was."""
    with torch.random.fork_rng():
        train, test = data_of(plan)
        parents = budget(plan.hidden, 2, plan.neurons)
        final = None
        rows = []
        for name in NETWORKS:
            torch.manual_seed(seed)
            model = encoder(plan)
            if name == "grown":
                network = bare(plan.hidden, 2, seed)
            elif name == "scratch":
                assert final is not None
                network = drawn(final, seed)
            else:
                sizes = [plan.hidden, plan.neurons, 2]
                network = drawn(ig.mlp(sizes, activation="tanh", bias=False), seed)
            head = ig.compile(network)
            model.classifier = Head(head)
            losses = trained(plan, model, train, parents if name == "grown" else [], seed)
            final = head.network() if name == "grown" else final
            rows.append({"seed": seed, "network": name, "losses": losses, **measured(plan, model, train, test)})
        return rows


def trained(plan: Plan, model: Any, train: Split, parents: list[int], seed: int) -> list[float]:
    """Mean loss of every epoch of the whole model; after each phase's epoch its share of neurons is inserted."""
    (tokens, mask), labels = train
    head: CompiledNetwork = model.classifier.network
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate)
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(1, plan.epochs + 1):
        model.train()
        total = torch.zeros(())
        for batch in torch.randperm(len(labels), generator=draw).split(plan.batch_size):
            optimizer.zero_grad()
            logits = model(input_ids=tokens[batch], attention_mask=mask[batch]).logits
            loss = F.cross_entropy(logits, labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        del logits, loss
        losses.append(float(total) / len(labels))
        if parents and epoch in plan.phases:
            k, phases = plan.phases.index(epoch), len(plan.phases)
            for n in range(plan.neurons * k // phases, plan.neurons * (k + 1) // phases):
                insertion = InsertNeuron(parents[n], seed=1000 * seed + n, activation="tanh")
                head.grow(insertion(head.structure), optimizer)
    return losses


def measured(plan: Plan, model: Any, train: Split, test: Split) -> dict[str, Any]:
    """Loss, accuracy, flatness of the whole model and of the head alone, and what a reload changes."""
    model.eval()
    head: CompiledNetwork = model.classifier.network
    with TemporaryDirectory() as folder:
        save(model, Path(folder))
        again = load(Path(folder))
    with torch.no_grad():
        outputs, reloaded = ([_logits(m, part[0]) for part in (train, test)] for m in (model, again))
    parameters, depth = head.structure.counts.parameters, head.structure.depth
    exact = Logits(again.double())
    n = plan.measured_on
    part = (tuple(t[:n] for t in train[0]), train[1][:n])
    found = flatness(exact, part, F.cross_entropy, measures=MEASURES[:1], tolerance=1e-3)
    only = [name for name, _ in exact.named_parameters() if ".classifier." in name]
    inside = flatness(exact, part, F.cross_entropy, measures=MEASURES, parameters=only, tolerance=1e-3)
    return {
        "parameters": parameters,
        "depth": depth,
        "loss": float(F.cross_entropy(outputs[0], train[1])),
        "accuracy": float((outputs[1].argmax(1) == test[1]).double().mean()),
        "reload": max(float((a - b).abs().max()) for a, b in zip(outputs, reloaded, strict=True)),
        "whole model": abs(found["depth blocks"]),
        "per loss": abs(found["depth blocks"]) / float(F.cross_entropy(outputs[0], train[1])),
        **{f"head, {name}": abs(value) for name, value in inside.items()},
    }


def _logits(model: Any, inputs: tuple[Tensor, Tensor]) -> Tensor:
    tokens, mask = inputs
    parts = zip(tokens.split(256), mask.split(256), strict=True)
    return torch.cat([model(input_ids=t, attention_mask=m).logits for t, m in parts])


# ---- what was found -------------------------------------------------------------------------------------------


def findings(setting: Setting, plan: Plan, runs: list[dict[str, Any]]) -> Findings:
    """Claims, table, pictures."""
    columns = ("parameters", "depth", "loss", "accuracy", "whole model", "per loss", *(f"head, {m}" for m in MEASURES))

    def of(name: str, value: str) -> list[float]:
        return [float(r[value]) for r in runs if r["network"] == name]

    def ratio(name: str, value: str) -> list[float]:
        return [a / b for a, b in zip(of(name, value), of("grown", value), strict=True)]

    out = Findings(columns=("head", *columns))
    out.rows = [(name, *(median(of(name, c)) for c in columns)) for name in NETWORKS]
    out.claims = [
        claim("reload", "a saved and reloaded model has equal outputs (largest difference)", "save_pretrained",
              max(r["reload"] for r in runs), "==", 0.0),
        claim("parameters", "the grown head has the dense head's number of parameters (difference)", SOURCE,
              max(abs(a - b) for a, b in zip(of("grown", "parameters"), of("fixed", "parameters"), strict=True)),
              "==", 0.0, paper="equal"),
        claim("flatter", "the model with the dense head is sharper than the one with the grown head (depth blocks, all "
              "parameters)", SOURCE, ratio("fixed", "whole model"), ">", 1.0, paper="3.6"),
        claim("flatter-per-loss", "the same after dividing by the training loss, with which a Hessian scales",
              "losses are not matched in the paper", ratio("fixed", "per loss"), ">", 1.0),
        claim("flatter-head", "the same for the head's own parameters", SOURCE,
              ratio("fixed", "head, depth blocks"), ">", 1.0),
        claim("flatter-edge", "the same for the head's own parameters by `edge`", "another measure",
              ratio("fixed", "head, edge"), ">", 1.0),
        claim("control", "the same graph from scratch is sharper than the grown head (depth blocks, all parameters)",
              "control, not in the paper", ratio("scratch", "whole model"), ">", 1.0,
              note="losses differ after the same number of epochs (see the table), and a Hessian scales with the loss"),
        claim("control-per-loss", "the same after dividing by the training loss", "control, not in the paper",
              ratio("scratch", "per loss"), ">", 1.0),
        claim("accuracy", "the grown head is at least as accurate as the dense one (difference)", SOURCE,
              [a - b for a, b in zip(of("grown", "accuracy"), of("fixed", "accuracy"), strict=True)], ">=", 0.0,
              paper="+0.002"),
    ]  # fmt: skip
    out.data = {"runs": runs}
    out.notes = [
        f"Medians over seeds. {plan.neurons} neurons in three phases, after epochs "
        f"{', '.join(map(str, plan.phases))} of {plan.epochs}; "
        + (f"{plan.weights}, CoLA." if plan.weights else "a random tiny encoder and made-up sentences."),
        "Where the loss is near 0 the largest eigenvalue varies by a factor of ten from seed to seed; the paper gives "
        "one number for each model, without a spread and without the losses.",
        f"Flatness over {plan.measured_on} training sentences in float64, dropout off. tanh is not homogeneous, so "
        "rescaling changes all measures here.",
    ]
    pictures.bars(setting.out / "flatness.png", "Sharpness of the whole model (depth blocks)",
                  {name: of(name, "whole model") for name in NETWORKS}, x="largest eigenvalue", log=True)  # fmt: skip
    epochs = range(1, plan.epochs + 1)
    curves = {name: (epochs, [r["losses"] for r in runs if r["network"] == name]) for name in NETWORKS}
    phases = ", ".join(map(str, plan.phases))
    title = f"Training loss; neurons are inserted after epochs {phases}"
    pictures.lines(setting.out / "training.png", [(title, curves)], x="epoch", y="training loss", log=True)
    out.figures = {"flatness.png": "sharpness of the three models", "training.png": "training loss"}
    return out
