from __future__ import annotations

import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.parallel.mesh import Mesh
from farspan.pretrain import run
from farspan.pretrain.batch import Batch, microbatches
from farspan.pretrain.losses import Counts, LossFunction

ROWS, LENGTH, PREDICTIONS, VOCABULARY, FEATURES = 8, 10, 5, 11, 6


def batch_of(weights: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    documents = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    documents[1, 4:] = 0
    return Batch(
        input_ids=ids,
        document_ids=documents,
        positions=torch.arange(LENGTH).expand(ROWS, LENGTH),
        token_type_ids=torch.zeros_like(ids),
        sample_ids=torch.arange(ROWS),
        attention="padding",
        labels=ids[:, :PREDICTIONS],
        label_weights=weights,
        label_positions=torch.arange(PREDICTIONS).expand(ROWS, PREDICTIONS),
        sentence_labels=torch.arange(ROWS) % 2,
    )


def test_a_step_computes_on_the_meshs_device() -> None:
    """Rows come from the loader on the CPU; meta stands for a GPU: what would be added up across devices fails."""
    mesh, sizes = Mesh.solo("meta"), types.SimpleNamespace(micro_batch_size=3)
    batch = batch_of(torch.ones(ROWS, PREDICTIONS))
    parts, _ = run.microbatches_of(types.SimpleNamespace(training=sizes), mesh, batch, ROWS)
    assert len(parts) == 3
    outputs = {name: torch.ones(3, PREDICTIONS, device="meta") for name in ("lm_losses", "lm_correct")}
    outputs |= {name: torch.ones(3, device="meta") for name in ("sentence_losses", "sentence_correct")}
    loss, sums = LossFunction(["mlm", "nsp"])(outputs, parts[0], Counts(40.0, ROWS, 74.0))
    assert (loss.device.type, sums.device.type) == ("meta", "meta")


# Very uneven numbers of predictions: none at all in the second microbatch of two rows.
UNEVEN = torch.tensor([5, 5, 0, 0, 1, 0, 3, 2]).unsqueeze(1) > torch.arange(PREDICTIONS)


@dataclasses.dataclass
class Model:
    """A linear classifier, in float64: enough to see the loss and its gradient."""

    words: Tensor
    sentences: Tensor
    features: Tensor  # [rows, predictions, features], of the whole batch

    @staticmethod
    def make() -> Model:
        generator = torch.Generator().manual_seed(2)
        shapes = ((VOCABULARY, FEATURES), (2, FEATURES), (ROWS, PREDICTIONS, FEATURES))
        words, sentences, features = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        return Model(words.requires_grad_(), sentences.requires_grad_(), features)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        features = self.features[batch.sample_ids]
        logits, sentences = features @ self.words.t(), features[:, 0] @ self.sentences.t()
        assert batch.sentence_labels is not None
        return {
            "lm_losses": F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(
                batch.label_weights
            ),
            "lm_correct": (logits.argmax(-1) == batch.labels).double(),
            "sentence_losses": F.cross_entropy(sentences, batch.sentence_labels, reduction="none"),
            "sentence_correct": (sentences.argmax(-1) == batch.sentence_labels).double(),
        }


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """Microbatches of equal shape: where they do not divide, some rows are repeated."""
    parts, (rows, _) = microbatches(dataclasses.replace(batch, attention="full"), count, multiple=1, equal=True)
    assert {part.rows for part in parts} == {rows} == {-(-ROWS // count)}
    return parts


def accumulated(heads: tuple[str, ...], count: int, weights: Tensor) -> tuple[float, list[float], list[Tensor]]:
    """Loss, statistics and gradients of the whole batch in so many microbatches."""
    model, function, batch = Model.make(), LossFunction(heads), batch_of(weights.double())
    counts = Counts.of(batch, Mesh.solo())
    total, sums = 0.0, torch.zeros(function.statistics, dtype=torch.float64)
    for microbatch in parts_of(batch, count):
        loss, statistics = function(model(microbatch), microbatch, counts)
        loss.backward()
        total += loss.item()
        sums += statistics[: function.statistics]
    parameters = [model.words, *([model.sentences] if "nsp" in heads else [])]
    return total, sums.tolist(), [p.grad for p in parameters if p.grad is not None]


def expected(heads: tuple[str, ...], weights: Tensor) -> tuple[float, list[Tensor]]:
    """The definition: one mean over all predicted tokens, and one over all rows."""
    model, batch = Model.make(), batch_of(weights)
    chosen = weights.bool()
    assert batch.sentence_labels is not None
    loss = F.cross_entropy(model.features[chosen] @ model.words.t(), batch.labels[chosen])
    if "nsp" in heads:
        loss = loss + F.cross_entropy(model.features[:, 0] @ model.sentences.t(), batch.sentence_labels)
    loss.backward()
    return loss.item(), [p.grad for p in (model.words, model.sentences) if p.grad is not None]


@pytest.mark.parametrize("count", [1, 2, 4, 8, 3, 5, 11])
@pytest.mark.parametrize("heads", [("lm",), ("lm", "nsp")])
def test_microbatches_do_not_change_the_loss(heads: tuple[str, ...], count: int) -> None:
    loss, sums, gradients = accumulated(heads, count, UNEVEN)
    whole, whole_gradients = expected(heads, UNEVEN)
    assert loss == pytest.approx(whole, rel=1e-13)
    for ours, theirs in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    means = LossFunction(heads).means(sums, Counts.of(batch_of(UNEVEN), Mesh.solo()))
    assert means.loss == pytest.approx(whole, rel=1e-13)


def test_a_mean_of_means_would_be_seen() -> None:
    """The fault that this guards against, and that public trainers have: it is far outside the tolerance."""
    model, batch = Model.make(), batch_of(UNEVEN.double())
    means = []
    for microbatch in batch.split(4):
        weights = microbatch.label_weights
        means.append(((model(microbatch)["lm_losses"] * weights).sum() / weights.sum().clamp(min=1)).item())
    assert abs(sum(means) / len(means) - expected(("lm",), UNEVEN)[0]) > 0.05


def test_statistics() -> None:
    batch, heads = batch_of(UNEVEN.double()), ("lm", "nsp")
    counts = Counts.of(batch, Mesh.solo())
    assert (counts.predictions, counts.rows, counts.tokens) == (16, 8, ROWS * LENGTH - 6)
    outputs = Model.make()(batch)
    _, sums, _ = accumulated(heads, 4, UNEVEN)
    means = LossFunction(heads).means(sums, counts)
    assert means.lm_accuracy == pytest.approx(outputs["lm_correct"][UNEVEN].mean().item())
    assert means.sentence_accuracy == pytest.approx(outputs["sentence_correct"].mean().item())
    assert means.parts["lm_loss"] == pytest.approx(outputs["lm_losses"][UNEVEN].mean().item())
    assert means.parts["sentence_loss"] == pytest.approx(outputs["sentence_losses"].mean().item())
    assert means.loss == pytest.approx(sum(means.parts.values()))
    alone = LossFunction(("lm",)).means(sums[:2], counts)
    assert (alone.parts, alone.sentence_accuracy) == ({}, None)
    assert LossFunction(("lm",)).statistics == 2
    assert LossFunction(heads).statistics == 4


@pytest.mark.parametrize("count", [2, 3, 11])
def test_each_row_has_its_mean_loss(count: int) -> None:
    batch, function, model = batch_of(UNEVEN.double()), LossFunction(("lm", "nsp")), Model.make()
    losses = model(batch)["lm_losses"].detach()
    wanted = [row[used].mean().item() if used.any() else 0.0 for row, used in zip(losses, UNEVEN, strict=True)]
    counts, found = Counts.of(batch, Mesh.solo()), []
    for microbatch in parts_of(batch, count):
        found += function(model(microbatch), microbatch, counts)[1][function.statistics :].tolist()
    assert found == pytest.approx(wanted, rel=1e-12)


def test_a_batch_without_predictions_has_no_loss() -> None:
    loss, sums, gradients = accumulated(("lm",), 4, torch.zeros_like(UNEVEN))
    assert (loss, sums) == (0.0, [0.0, 0.0])
    assert not gradients[0].any()


def test_weightless_predictions_may_be_anything_finite() -> None:
    """What stands where the weight is 0 reaches neither the loss nor the gradient."""
    first = accumulated(("lm",), 4, UNEVEN)
    model, batch = Model.make(), batch_of(UNEVEN.double())
    model.features = torch.where(UNEVEN.unsqueeze(-1), model.features, 1e6)
    loss, _ = LossFunction(("lm",))(model(batch), batch, Counts.of(batch, Mesh.solo()))
    loss.backward()
    assert loss.item() == pytest.approx(first[0], rel=1e-13)
    torch.testing.assert_close(model.words.grad, first[2][0], rtol=1e-12, atol=1e-14)
