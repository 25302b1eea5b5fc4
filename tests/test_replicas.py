"""Any number of replicas: a step's rows spread over them, whether they divide or not, train as on one rank."""

from __future__ import annotations

import pytest
from comparison import FAULT, RELATIVE, difference
from runs import MEGA, MRA, NYSTROMFORMER, Trainer, ranks_of, settings, train_here

from farspan.benchmarks.layouts import worst

DROPOUT = {"model.hidden_dropout_prob": 0.1, "model.attention_probs_dropout_prob": 0.1}
PADDED = {"data.rows": "padded"}
PAIRS = {"model.model_type": "megatron-bert", "objective.name": "mlm+nsp", "data.rows": "pairs"}
CLM = {"objective.name": "clm", "model.is_decoder": True}
ONE = {"training.micro_batch_size": 1}  # so that the third of three replicas has a microbatch without a row
# Of 8 rows: 3, 3 and 2 to each of three replicas, in microbatches of 2 and 1 (or 1 and 1).
CASES = {
    "ZeRO 0": ({"parallel.zero_stage": 0}, DROPOUT),
    "ZeRO 1": ({}, DROPOUT),
    "ZeRO 2": ({"parallel.zero_stage": 2}, DROPOUT),
    "ZeRO 3": ({"parallel.zero_stage": 3}, DROPOUT),
    "ZeRO 3, a row at a time": ({"parallel.zero_stage": 3} | ONE, DROPOUT),
    "padded": ({"parallel.zero_stage": 2}, DROPOUT | PADDED),
    "padded, a row at a time": (ONE, PADDED),
    "causal, padded, a row at a time": (ONE, CLM | PADDED | DROPOUT),
    "pairs": ({"parallel.zero_stage": 0}, DROPOUT | PAIRS),
    "pairs, a row at a time": (ONE, PAIRS),
    "lamb": ({"parallel.zero_stage": 1}, DROPOUT | {"optimizer.name": "lamb", "optimizer.lr": 1e-2}),
    "mega, a row at a time": (ONE, {"model": MEGA} | PADDED),
    "mra": ({}, {"model": MRA, "data.sequence_length": 96}),
    "nystromformer": ({}, {"model": NYSTROMFORMER} | PADDED),
    "a batch ramp": ({}, DROPOUT | {"training.batch_ramp": {"start": 3, "increment": 5, "samples": 8}}),
    "no more rows than replicas": ({}, DROPOUT | {"training.global_batch_size": 3}),
}
EVALUATED = {"evaluation.interval": 3, "evaluation.rows": 7}


@pytest.fixture
def trainer(ranks, prepared, tmp_path):
    return Trainer(ranks, prepared, tmp_path)


def assert_the_same(trainer, layout: dict, kind: dict, steps: int = 6) -> None:
    single = trainer(steps, kind | EVALUATED | {"training.micro_batch_size": 8})
    if layout.get("parallel.zero_stage") == 3:
        trainer.ranks.stop()  # DeepSpeed compares numbers that a process's past decides
    run = trainer(steps, kind | EVALUATED | layout)
    found = worst(run.steps(), single.steps())
    assert max(found) <= RELATIVE, found
    assert max(map(difference, run.validations(), single.validations())) <= RELATIVE
    assert len(run.validations()) == 2
    assert_near(run, single)


def assert_near(run, single) -> None:
    """After few steps: Adam divides by a gradient's size, and makes much of the rounding of one that is nearly 0."""
    weights = single.weights()
    found = {name: difference(tensor, weights[name]) for name, tensor in run.weights().items()}
    assert found.keys() == weights.keys() and max(found.values()) <= 10 * RELATIVE, found


@pytest.mark.parametrize("name", CASES)
def test_three_replicas(trainer, name):
    layout, kind = CASES[name]
    assert_the_same(trainer, {"parallel.data": 3} | layout, kind)


PIPELINE = {"parallel.pipeline": 2}
INTERLEAVED = PIPELINE | {"parallel.virtual_stages": 2}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        # 7 rows: microbatches of 2, 2, 2 and 1, of which the last has a row twice
        (PIPELINE, DROPOUT | PAIRS | {"training.global_batch_size": 7}),
        (PIPELINE, DROPOUT | PADDED | {"training.global_batch_size": 7}),
        # of 3: 4 microbatches, as the schedule needs, of 2, 2, 2 and 1
        (INTERLEAVED | {"training.micro_batch_size": 3}, DROPOUT | {"training.global_batch_size": 7}),
        (PIPELINE | {"parallel.data": 3}, DROPOUT | PAIRS),
        (INTERLEAVED | {"parallel.data": 3} | ONE, DROPOUT | PADDED),
    ],
    ids=["pairs", "padded", "interleaved", "three replicas", "interleaved, three replicas, a row at a time"],
)  # fmt: skip
def test_pipelines(trainer, layout, kind):
    assert_the_same(trainer, layout, kind, steps=4)


def test_a_repeated_row_would_be_seen(trainer):
    """What the comparisons allow is less than one row that counts twice changes."""
    single = trainer(3, PAIRS)
    run = trainer(3, PAIRS | ONE | {"parallel.data": 3}, function=train_counting_repeats)
    assert max(worst(run.steps(), single.steps())) > FAULT


def train_counting_repeats(values: dict) -> str | None:
    from farspan.pretrain.batch import Batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "own_rows", property(lambda batch: batch.rows))
        return train_here(values)


def test_a_run_goes_on_with_fewer_and_with_more(trainer):
    """Saved by four, gone on by three, then by two, and by four again: the same losses as without."""
    steps, counts = 8, (4, 3, 2, 4)
    kind = DROPOUT | {"checkpoint.keep_last": 0}
    single, run = trainer(steps, kind), None
    for number, count in enumerate(counts, 1):
        layout = {"parallel.data": count, "parallel.zero_stage": number % 3}
        run = trainer(steps, kind | layout, run=run, stop_after=steps * number // len(counts))
    assert max(worst(run.steps(), single.steps())) <= RELATIVE
    assert_near(run, single)


def train_and_gather(values: dict) -> list[list[float]]:
    """Train; what the loss function said of every row of each step."""
    from farspan.parallel.engine import Engine

    train_batch, gathered = Engine.train_batch, []

    def gathering(engine, *arguments, **options):
        result = train_batch(engine, *arguments, **options)
        gathered.append(engine.gather_rows(result, values["training"]["global_batch_size"]))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_batch", gathering)
        problem = train_here(values)
    assert problem is None, problem
    return gathered


def test_what_is_said_of_each_row_comes_together_in_order(ranks, prepared, tmp_path):
    told = []
    for number, layout in enumerate(({}, {"parallel.data": 3}, PIPELINE)):
        values = settings(prepared, tmp_path / str(number), 3, layout | {"training.global_batch_size": 7})
        everywhere = ranks.run(train_and_gather, values, count=ranks_of(values))
        assert all(rank == everywhere[0] for rank in everywhere)
        told.append(everywhere[0])
    assert all(len(step) == 7 and min(step) > 1.0 for step in told[0])
    for other in told[1:]:
        assert max(map(difference, other, told[0])) <= RELATIVE


def test_fewer_rows_than_replicas_are_refused(ranks, prepared, tmp_path):
    values = settings(prepared, tmp_path, 1, {"parallel.data": 3, "training.global_batch_size": 2})
    (line, *_) = ranks.run(train_here, values, count=3)
    assert "training.global_batch_size 2 leaves some of 3 data ranks without a row: set at least 3, or" in line
