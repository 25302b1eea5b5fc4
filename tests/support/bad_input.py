"""The kinds of bad input: what is spoiled, what is run, the line that is said.  Here those of the configuration, of
places and of the environment; ``bad_files`` has those of data, tokenizers and checkpoints.

``@`` stands for the folder of a test, which holds ``run.yaml``, a prepared dataset ``data``, a run ``run`` stopped at
its second step, its export ``hf`` and ``text.txt``.  ``…`` in a line stands for any words, or none.
"""

from __future__ import annotations

import dataclasses

from spoil import Harm, added, both, gone, nothing, written

STEPS, STOP = 4, 2
STEP = f"run/checkpoints/step-{STOP:08d}"
WEIGHTS, OPTIMIZER = f"{STEP}/weights-00000.safetensors", f"{STEP}/optimizer-00000.safetensors"
NORM = "roberta_prelayernorm.LayerNorm.weight"

RESUME = "train @/run.yaml"
NEW = "train @/run.yaml run_dir=@/new"
PREPARE = "prepare @/out --vocab-size 300 --processes 1 --input"
IMPORT, EXPORT = "convert from-hf @/hf @/out", "convert to-hf @/run @/out"

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@dataclasses.dataclass(frozen=True)
class Kind:
    name: str
    harm: Harm
    command: str
    line: str
    leaves: tuple[str, ...] = ()  # new files: only what a run that has begun writes
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


CONFIGURATION = [
    Kind("no such file", nothing, "train @/none.yaml", "@/none.yaml is no file: give the path of a configuration …"),
    Kind("a folder", nothing, "train @/data", "@/data is no file: give the path of a configuration …"),
    Kind("below a file", nothing, "train @/run.yaml/a.yaml", "@/run.yaml/a.yaml … a file …"),
    Kind("no YAML", written("run.yaml", "a: [1, 2\nb: }"), RESUME, "@/run.yaml is not YAML: … line 2, column 2 …"),
    Kind("no text", written("run.yaml", b"\xff\xfe\0"), RESUME, "@/run.yaml is not YAML: 'utf-8' codec …"),
    Kind("a list", written("run.yaml", "- model\n- data\n"), RESUME, "@/run.yaml is not a mapping of sections …"),
    Kind("empty", written("run.yaml", ""), RESUME, "@/run.yaml is not a mapping of sections …"),
    Kind(
        "a key given twice", added("run.yaml", "run_dir: b\n"), RESUME, "@/run.yaml … run_dir is given twice … line …",
    ),
    Kind(
        "an unknown section", added("run.yaml", "trainig:\n  seed: 3\n"), RESUME,
        "@/run.yaml: unknown key trainig: did you mean training?",
    ),
    Kind(
        "an unknown key", nothing, f"{NEW} training.step=3",
        "@/run.yaml: unknown key training.step: did you mean training.steps?",
    ),
    Kind(
        "a key of another section", nothing, f"{NEW} training.lr=1",
        "@/run.yaml: unknown key training.lr: did you mean optimizer.lr?",
    ),
    Kind(
        "a word for a number", nothing, f"{NEW} training.steps=many", "@/run.yaml: training.steps = 'many': must be …",
    ),
    Kind("a fraction for a count", nothing, f"{NEW} training.steps=2.5", "@/run.yaml: training.steps = 2.5: must be …"),
    Kind(
        "a negative number", nothing, f"{NEW} training.steps=-3",
        "@/run.yaml: training.steps = -3: must be greater than 0",
    ),
    Kind("nan", nothing, f"{NEW} optimizer.lr=.nan", "@/run.yaml: optimizer.lr = nan: must be a finite number"),
    Kind("infinity", nothing, f"{NEW} optimizer.lr=.inf", "@/run.yaml: optimizer.lr = inf: must be a finite number"),
    Kind(
        "an unknown architecture", nothing, f"{NEW} model.model_type=bert",
        "@/run.yaml: model.model_type 'bert' is unknown: choose one of …roberta-prelayernorm…",
    ),
    Kind(
        "an unknown activation", nothing, f"{NEW} model.hidden_act=swash",
        "@/run.yaml: model.hidden_act 'swash' is unknown: choose one of … gelu …",
    ),
    Kind("an unknown objective", nothing, f"{NEW} objective.name=mml", "… 'mml' is unknown: choose one of mlm, clm, …"),
    Kind(
        "an unknown dtype", nothing, f"{NEW} training.dtype=float8",
        "@/run.yaml: training.dtype = 'float8': must be 'float32' … 'bfloat16' …",
    ),
    Kind(
        "a hidden size that the heads do not divide", nothing, f"{NEW} model.hidden_size=33",
        "@/run.yaml: model.hidden_size 33 does not divide by num_attention_heads 4: set one to fit the other",
    ),
    Kind(
        "heads that the tensor ranks do not divide", nothing, f"{NEW} parallel.tensor=3",
        "@/run.yaml: model.num_attention_heads 4 does not divide by parallel.tensor 3: set parallel.tensor "
        "to a divisor",
    ),
    Kind(
        "more stages than layers", nothing, f"{NEW} parallel.pipeline=8",
        "@/run.yaml: parallel.pipeline 8 … model.num_hidden_layers 4: set at most that …",
    ),
    Kind(
        "ZeRO 3 with a pipeline", nothing, f"{NEW} parallel.zero_stage=3 parallel.pipeline=2",
        "@/run.yaml: parallel.zero_stage 3 does not go with parallel.pipeline 2 … set zero_stage to 0 or 1, "
        "or pipeline to 1",
    ),
    Kind(
        "a batch of fewer rows than ranks", nothing, f"{NEW} training.global_batch_size=2 --ranks 3",
        "training.global_batch_size 2 leaves some of 3 data ranks without a row: set …",
    ),
    Kind(
        "an evaluation of fewer rows than ranks", nothing, f"{NEW} evaluation.interval=1 evaluation.rows=1 --ranks 2",
        "evaluation.rows 1 leaves some of 2 data ranks without a row: set at least 2, or parallel.data to fewer",
    ),
    Kind(
        "ranks that do not make the layout", nothing, f"{NEW} parallel.tensor=2 --ranks 3",
        "3 ranks do not make parallel.tensor 2 × pipeline 1: start a multiple of 2 ranks, or change the "
        "parallel section",
    ),
    Kind(
        "a warm-up longer than the run", nothing, f"{NEW} schedule.warmup_steps=10",
        "@/run.yaml: schedule… 10 warm-up steps … 4 …",
    ),
    Kind(
        "an objective against is_decoder", nothing, f"{NEW} objective.name=clm",
        "@/run.yaml: objective.name clm needs model.is_decoder true, it is false: set one to fit the other",
    ),
    Kind(
        "an objective without its rows", nothing, f"{NEW} data.rows=pairs",
        "@/run.yaml: objective.name mlm needs data.rows packed or padded, it is pairs: set one to fit the other",
    ),
    Kind(
        "a sequence longer than the positions", nothing, f"{NEW} data.sequence_length=64",
        "@/run.yaml: data.sequence_length 64 is longer than the model's positions (38): lower it or raise "
        "model.max_position_embeddings",
    ),
    Kind(
        "an override without a value", nothing, f"{NEW} training.steps",
        "override 'training.steps' is not of the form section.key=value",
    ),
    Kind(
        "an override through a value", nothing, f"{NEW} run_dir.x=3", "override 'run_dir.x=3': run_dir is not a section"
    ),
    Kind("an empty run_dir", nothing, f"{RESUME} run_dir=''", "@/run.yaml: run_dir = '': … at least 1 character"),
    Kind("an override that is no YAML", nothing, f"{NEW} training.steps=[1", "override … '[1' is not a YAML value"),
]  # fmt: skip

PLACES = [
    Kind("run_dir is a file", nothing, f"{RESUME} run_dir=@/text.txt", "@/text.txt: File exists (… another path)"),
    Kind("run_dir below a file", nothing, f"{RESUME} run_dir=@/text.txt/a", "@/text.txt/a: … (a file … another path)"),
    Kind("run_dir where nothing can be", nothing, f"{RESUME} run_dir=/proc/none/a", "/proc/none: No such file …"),
    Kind(
        "checkpoints is a file", both(gone("run/checkpoints"), written("run/checkpoints", "mine")), RESUME,
        "@/run/checkpoints is a file where the folder of checkpoints belongs: move it, or set another run_dir",
    ),
    Kind(
        "config.yaml is a folder", both(gone("run/config.yaml"), written("run/config.yaml/a", "mine")), RESUME,
        "@/run/config.yaml: Is a directory (a folder stands where a file is needed, move it away or give another path)",
    ),
    Kind(
        "a dataset where a file is", nothing, "prepare @/run.yaml --input @/text.txt",
        "@/run.yaml exists and is not a dataset being prepared: choose another folder",
    ),
    Kind(
        "a dataset below a file", nothing, "prepare @/run.yaml/a/b --input @/text.txt",
        "@/run.yaml/a: Not a directory (a file stands where a folder is needed, give another path)",
    ),
]  # fmt: skip

ENVIRONMENT = [
    Kind(
        "RANK alone", nothing, RESUME,
        "RANK is set but LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not: set all of RANK, LOCAL_RANK, "
        "WORLD_SIZE, MASTER_ADDR, MASTER_PORT, or none", environment={"RANK": "0"},
    ),
    Kind("WORLD_SIZE alone", nothing, RESUME, "WORLD_SIZE is set but RANK is not: …", environment={"WORLD_SIZE": "2"}),
    Kind(
        "a rank that is none of them", nothing, RESUME, "[rank 5] rank 5 is not among 1 ranks: check RANK "
        "and WORLD_SIZE", environment=LAUNCHED | {"RANK": "5"},
    ),
    Kind(
        "WORLD_SIZE that is no number", nothing, RESUME, "WORLD_SIZE='two' is not an integer",
        environment=LAUNCHED | {"WORLD_SIZE": "two"},
    ),
    Kind(
        "a port that is none", nothing, RESUME, "port 99999 is not from 1 to 65535: check MASTER_PORT",
        environment=LAUNCHED | {"MASTER_PORT": "99999"},
    ),
    Kind(
        "a first rank without address", nothing, RESUME,
        "the name no.invalid of the first rank's machine has no address here: set MASTER_ADDR to one that "
        "every node can reach", environment=LAUNCHED | {"MASTER_ADDR": "no.invalid"},
    ),
    Kind(
        "ranks started twice", nothing, f"{RESUME} --ranks 2",
        "--ranks starts ranks on this machine, but a launcher already started them: leave it out", environment=LAUNCHED,
    ),
    Kind(
        "a mode of kernels that is none", nothing, NEW,
        "FARSPAN_KERNELS is 'fast', must be one of auto, require, reference", environment={"FARSPAN_KERNELS": "fast"},
    ),
    Kind(
        "required kernels without a compiler", nothing, f"{NEW} kernels.mode=require kernels.cache=@/kernels",
        "kernels.mode is require and dropout cannot be had for cpu: no C++ compiler was found as '/none/c++': …",
        environment={"CXX": "/none/c++"},
    ),
    Kind(
        "launched ranks that do not make the layout", nothing, f"{RESUME} parallel.tensor=2",
        "1 ranks do not make parallel.tensor 2 × pipeline 1: start a multiple of 2 ranks, or change the "
        "parallel section", environment=LAUNCHED,
    ),
]  # fmt: skip
