"""The layout contract: loss and gradient norm of every step do not depend on how the work is spread."""

from __future__ import annotations

import pytest
from comparison import BFLOAT16, RELATIVE, assert_all_close, difference
from runs import MEGA, MRA, NYSTROMFORMER, Run, Trainer, train_here

from farspan.benchmarks.layouts import LAYOUTS
from farspan.benchmarks.layouts import worst as worst_steps

# Further ones, for fewer steps.
MIXED = {
    "TP2 × DP2, ZeRO 3 + SP, full recomputation": LAYOUTS["TP2 + SP"]
    | LAYOUTS["DP2, ZeRO 3"]
    | {"training.recompute": "full"},
    "TP2 × DP2, ZeRO 2, offload": LAYOUTS["TP2"] | LAYOUTS["DP2, ZeRO 2"] | {"parallel.offload_optimizer": True},
    "PP2 × DP2 interleaved, ZeRO 1, selective recomputation": LAYOUTS["PP2 interleaved"]
    | LAYOUTS["DP2, ZeRO 1"]
    | {"training.recompute": "selective"},
    "PP4": {"parallel.pipeline": 4},
    "PP4, full recomputation": {"parallel.pipeline": 4, "training.recompute": "full"},
    "microbatches of 1": {"training.micro_batch_size": 1},
    "microbatches of 8": {"training.micro_batch_size": 8},
}
DROPOUT = {"model.hidden_dropout_prob": 0.1, "model.attention_probs_dropout_prob": 0.1}
RELATIVE_KEY_QUERY = {"model.position_embedding_type": "relative_key_query"}
PADDED = {"data.rows": "padded"}
CLM = {"objective.name": "clm", "model.is_decoder": True}
PAIRS = {"model.model_type": "megatron-bert", "objective.name": "mlm+nsp", "data.rows": "pairs"}
BY_FEATURE = {"model.use_feature_dropout": True}
# What is trained, and the ZeRO stage that its replicas are compared under.
KINDS = {
    "dropout": (DROPOUT, 3),
    "clm": (CLM | DROPOUT, 1),
    "clm, padded": (CLM | PADDED | {"model.tie_word_embeddings": False}, 2),
    "pairs": (PAIRS, 1),
    "pairs, relative": (PAIRS | DROPOUT | RELATIVE_KEY_QUERY, 2),
    "relative": (RELATIVE_KEY_QUERY, 3),
    "padded": (PADDED, 0),  # an uneven number of predictions on the ranks and in the microbatches
    "padded, dropout, relative": (PADDED | DROPOUT | RELATIVE_KEY_QUERY | {"training.recompute": "selective"}, 3),
    "sentence order": (PAIRS | DROPOUT | {"objective.name": "mlm+sop"}, 1),
    "lamb": (DROPOUT | {"optimizer.name": "lamb", "optimizer.lr": 1e-2}, 3),
    "mega": ({"model": MEGA, "data.rows": "padded"}, 3),
    "mega, chunked": (
        {"model": MEGA | {"use_chunking": True, "chunk_size": 12, "attention_activation": "laplace"}} | BY_FEATURE,
        2,
    ),
    "mega, causal": (CLM | {"model": MEGA | {"bidirectional": False, "truncation": 6}} | BY_FEATURE, 1),
    "mega, batch norm": ({"model": MEGA | {"normalization_type": "batchnorm"}}, 2),
    "mra": ({"model": MRA | {"hidden_dropout_prob": 0.1}, "data.sequence_length": 160}, 3),
    "mra, padded": ({"model": MRA | {"approx_mode": "sparse"}, "data.sequence_length": 96} | PADDED, 1),
    "nystromformer": ({"model": NYSTROMFORMER | {"hidden_dropout_prob": 0.1}}, 3),
    "nystromformer, padded": ({"model": NYSTROMFORMER} | PADDED | {"training.recompute": "selective"}, 2),
    "batch ramp": (DROPOUT | {"training.batch_ramp": {"start": 4, "increment": 4, "samples": 15}}, 1),
}


@pytest.fixture
def trainer(ranks, prepared, tmp_path):
    return Trainer(ranks, prepared, tmp_path)


def worst(run: Run, single: Run) -> tuple[float, float]:
    """The largest relative difference of a step's loss, and of its gradient norm."""
    return worst_steps(run.steps(), single.steps())


@pytest.mark.timeout(600)
def test_every_layout(trainer, capsys):
    """The short form of benchmarks/layouts.py, with the final weights."""
    common = DROPOUT | {"training.micro_batch_size": 4}
    single = trainer(20, common)
    losses = [loss for loss, _ in single.steps()]
    assert losses[-1] < losses[0] - 0.2, "it must have learned something"
    for name, overrides in LAYOUTS.items():
        if overrides.get("parallel.zero_stage") == 3:
            trainer.ranks.stop()  # see below
        run = trainer(20, common | overrides)
        found = worst(run, single)
        with capsys.disabled():
            print(f"\n{name:32s} loss {found[0]:.1e}, gradient norm {found[1]:.1e}", end="")
        partitioned = overrides.get("parallel.data", 1) > 1 or "parallel.offload_optimizer" in overrides
        layout = {"tensor": 1, "pipeline": 1, "virtual_stages": 1, "data": 1, "zero_stage": 0}
        layout |= {key.split(".")[1]: value for key, value in overrides.items() if key.split(".")[1] in layout}
        assert run.layout() == layout and (layout["zero_stage"] > 0) <= partitioned
        assert max(found) <= RELATIVE, f"{name}: {found}"
        assert_all_close(run.weights(), single.weights(), f"{name}: final")


@pytest.mark.parametrize("name", MIXED)
def test_mixed_layouts_and_microbatches(trainer, name):
    if MIXED[name].get("parallel.zero_stage") == 3:
        # DeepSpeed numbers modules for as long as a process lives, and compares the numbers of all ranks: these have
        # had different pasts.
        trainer.ranks.stop()
    assert max(worst(trainer(6, DROPOUT | MIXED[name]), trainer(6, DROPOUT))) <= RELATIVE


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_training(trainer, name):
    kind, zero_stage = KINDS[name]
    overrides = kind | {"evaluation.interval": 4, "evaluation.rows": 16}
    single = trainer(8, overrides)
    assert len(single.validations()) == 2
    for layout in ("TP2 + SP", "PP2", f"DP2, ZeRO {zero_stage}"):
        run = trainer(8, overrides | LAYOUTS[layout])
        assert max(worst(run, single)) <= RELATIVE, f"{layout}: {worst(run, single)}"
        assert max(map(difference, run.validations(), single.validations())) <= RELATIVE, layout


def train_partitioned(values: dict) -> str | None:
    """Train with every weight partitioned, those too that ZeRO 3 leaves whole because they are small."""
    import deepspeed

    initialize = deepspeed.initialize

    def with_all(**arguments):
        arguments["config"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        made = initialize(**arguments)
        assert not any(p.ds_persist for p in made[0].module.parameters())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "initialize", with_all)
        return train_here(values)


@pytest.mark.parametrize("name", ["relative", "mega", "mega, causal"])
def test_zero_3_of_every_weight(trainer, name):
    kind, _ = KINDS[name]
    trainer.ranks.stop()  # see above
    run = trainer(6, kind | LAYOUTS["DP2, ZeRO 3"], function=train_partitioned)
    single = trainer(6, kind)
    assert max(worst(run, single)) <= RELATIVE
    assert_all_close(run.weights(), single.weights(), "final")


@pytest.mark.parametrize("layout", ["1 rank", "TP2", "PP2", *(f"DP2, ZeRO {stage}" for stage in range(4))])
def test_bfloat16_follows_float32(trainer, layout):
    run = trainer(4, {"training.dtype": "bfloat16"} | LAYOUTS.get(layout, {}))
    assert RELATIVE < max(worst(run, trainer(4, {}))) <= BFLOAT16


def test_another_run_is_told_apart(trainer):
    """What the comparisons above allow is less than any of these would change."""
    single = trainer(3, {})
    for overrides in ({"training.seed": 1}, {"optimizer.lr": 1.01e-3}, DROPOUT, {"objective.probability": 0.2}):
        assert max(worst(trainer(3, overrides), single)) > RELATIVE, overrides
