"""Make the Megatron-LM checkpoints beside this file, with Megatron-LM itself.

    python tests/golden/make_megatron_lm_cases.py CHECKOUTS [CASE ...]

writes the folders `megatron-lm-*`: a checkpoint as Megatron-LM's own `save_checkpoint` writes it, every rank its file,
and `reference.safetensors` with inputs and what Megatron-LM's own model computes of them on these ranks. CHECKOUTS has
one folder for each git reference in `CASES`, with the files of that version of Megatron-LM; for `core` the installed
megatron-core is taken. The ranks are processes on the CPU with gloo. What Megatron-LM needs a GPU for is replaced by
the same thing in plain PyTorch: layer norm, the place of tensors, the random state of a GPU. Every parameter is drawn
by its name, so that none is zero, one or a twin of another, and copies are equal; nothing else of a model is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import math
import os
import shutil
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from safetensors.torch import save_file

HERE = Path(__file__).parent
PADDED_VOCABULARY, VOCABULARY, HIDDEN, POSITIONS, LENGTH, BATCH = 48, 43, 16, 20, 13, 3
PORT = 29617
# Packages that Megatron-LM imports and these cases do not use.
UNUSED = ("amp_C", "apex", "fused_layer_norm_cuda", "fused_mix_prec_layer_norm_cuda", "nltk", "regex", "six", "tools")


@dataclasses.dataclass(frozen=True)
class Case:
    """``reference``: the version of Megatron-LM; ``chunks``: of a pipeline stage; ``options``: of its command line."""

    reference: str
    layers: int = 2
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    options: tuple[str, ...] = ()

    @property
    def year_2020(self) -> bool:
        return self.reference in ("v1.0", "64e45f2972")


CASES = {
    "megatron-lm-v1.0": Case("v1.0", tensor=2),  # checkpoint version 0
    "megatron-lm-64e45f2972": Case("64e45f2972", tensor=2),  # of 2020-09-29: checkpoint version 1
    "megatron-lm-v2.5": Case("v2.5", tensor=2, pipeline=2),  # checkpoint version 3 from here on
    "megatron-lm-v2.5-openai-gelu": Case("v2.5", options=("--openai-gelu", "--no-bias-gelu-fusion")),
    "megatron-lm-23.04": Case("23.04", layers=6, pipeline=3, chunks=2, options=("--bert-no-binary-head",)),
    "megatron-lm-core": Case("core", tensor=2, pipeline=2),
}


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module, with anything in it, for the packages that are not used."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        unused = name.partition(".")[0] in UNUSED or name == "torch._six"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if unused else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module: Any = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: MagicMock(name=name)
        module.inf = math.inf  # of torch._six
        if spec.name == "apex.normalization.fused_layer_norm":
            module.FusedLayerNorm = torch.nn.LayerNorm
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def same_state(*arguments: Any, **options: Any) -> Iterator[None]:
    yield


def without_gpu() -> None:
    """What is asked of CUDA is answered for the CPU."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.set_device = lambda *arguments: None
    cuda.synchronize = lambda *arguments: None
    cuda.device_count = lambda: 1
    cuda.get_rng_state = lambda *arguments: torch.get_rng_state()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *arguments, **options: self


def command_line(case: Case) -> list[str]:
    options = {
        "num-layers": case.layers, "hidden-size": HIDDEN, "num-attention-heads": 4, "seq-length": POSITIONS,
        "max-position-embeddings": POSITIONS, "lr": 1e-4, "train-iters": 10, "vocab-file": "vocab.txt",
        "tokenizer-type": "BertWordPieceLowerCase", "make-vocab-size-divisible-by": 8, "save": ".",
        "save-interval": 10, "batch-size" if case.year_2020 else "micro-batch-size": 1,
        "model-parallel-size" if case.year_2020 else "tensor-model-parallel-size": case.tensor,
    }  # fmt: skip
    if not case.year_2020:
        options["pipeline-model-parallel-size"] = case.pipeline
    if case.chunks > 1:
        options["num-layers-per-virtual-pipeline-stage"] = case.layers // case.pipeline // case.chunks
    line = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    line += [] if case.reference == "v1.0" else ["--use-cpu-initialization"]
    line += ["--no-gradient-accumulation-fusion"] if case.reference == "23.04" else []
    return [*line, *case.options]


class MegatronLM:
    """One rank of Megatron-LM, of a checkout."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case = case
        arguments = importlib.import_module("megatron.arguments")
        sys.argv = ["pretrain_bert.py", *command_line(case)]
        self.args = arguments.parse_args()
        if hasattr(arguments, "validate_args"):
            arguments.validate_args(self.args)
        self.args.model_type, self.args.rank, self.args.padded_vocab_size = None, rank, PADDED_VOCABULARY
        variables = importlib.import_module("megatron.global_vars")
        variables._GLOBAL_ARGS = self.args
        variables._GLOBAL_NUM_MICROBATCHES_CALCULATOR = types.SimpleNamespace(get=lambda: 1)
        core = case.reference == "23.04"
        self.mpu = importlib.import_module("megatron.core.parallel_state" if core else "megatron.mpu")
        sizes = [case.tensor] if case.year_2020 else [case.tensor, case.pipeline]
        self.mpu.initialize_model_parallel(*sizes, *([case.chunks] if case.chunks > 1 else []))
        random = importlib.import_module("megatron.core.tensor_parallel.random" if core else "megatron.mpu.random")
        random.CudaRNGStatesTracker.fork = same_state
        if not case.year_2020:
            norm = importlib.import_module("megatron.model.fused_layer_norm").MixedFusedLayerNorm
            norm.forward = lambda self, x: torch.nn.functional.layer_norm(
                x, self.normalized_shape, self.weight, self.bias, self.eps
            )
            softmax = importlib.import_module("megatron.model.fused_softmax").FusedScaleMaskSoftmax
            softmax.is_kernel_available = lambda *arguments: False
        self.tensor_group = (
            self.mpu.get_model_parallel_group() if case.year_2020 else self.mpu.get_tensor_model_parallel_group()
        )
        self.binary = getattr(self.args, "bert_binary_head", True)

    def chunk(self, index: int) -> torch.nn.Module:
        options: dict[str, Any] = {}
        if not self.case.year_2020:
            self.enter(index)
            options = {"pre_process": self.mpu.is_pipeline_first_stage()}
            options["post_process"] = self.mpu.is_pipeline_last_stage()
        made = importlib.import_module("megatron.model.bert_model").BertModel
        return made(
            num_tokentypes=2 if self.binary else 0, add_binary_head=self.binary, parallel_output=True, **options
        )

    def enter(self, index: int) -> None:
        if self.case.chunks > 1:
            self.mpu.set_virtual_pipeline_model_parallel_rank(index)

    def pipeline_group(self) -> Any:
        return self.mpu.get_pipeline_model_parallel_group()

    def save(self, chunks: list[torch.nn.Module]) -> None:
        saving = importlib.import_module("megatron.checkpointing")
        saving.unwrap_model = lambda model: model
        saving.utils = types.SimpleNamespace(unwrap_model=lambda model: model)
        schedule = types.SimpleNamespace(state_dict=lambda: {"max_lr": 1e-4, "num_steps": 7})
        saving.save_checkpoint(7, chunks[0] if self.case.year_2020 else chunks, None, schedule)


class MegatronCore:
    """One rank of megatron-core, its file written as megatron/training/checkpointing.py writes the format `torch`."""

    binary = True

    def __init__(self, case: Case, rank: int) -> None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        from megatron.core.transformer import TransformerConfig

        CudaRNGStatesTracker.fork = same_state
        self.case, self.mpu = case, parallel_state
        parallel_state.initialize_model_parallel(case.tensor, case.pipeline)
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.config = TransformerConfig(
            num_layers=case.layers, hidden_size=HIDDEN, num_attention_heads=4, use_cpu_initialization=True,
            tensor_model_parallel_size=case.tensor, pipeline_model_parallel_size=case.pipeline,
            pipeline_dtype=torch.float32, bias_activation_fusion=True, hidden_dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip

    def chunk(self, index: int) -> torch.nn.Module:
        from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
        from megatron.core.models.bert.bert_model import BertModel

        return BertModel(
            self.config, 2, bert_layer_local_spec, PADDED_VOCABULARY, POSITIONS,
            pre_process=self.mpu.is_pipeline_first_stage(), post_process=self.mpu.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=True,
        )  # fmt: skip

    def enter(self, index: int) -> None:
        pass

    def pipeline_group(self) -> Any:
        return self.mpu.get_pipeline_model_parallel_group()

    def save(self, chunks: list[Any]) -> None:
        config = self.config
        args = argparse.Namespace(
            num_layers=config.num_layers, hidden_size=HIDDEN, ffn_hidden_size=config.ffn_hidden_size,
            num_attention_heads=4, kv_channels=config.kv_channels, max_position_embeddings=POSITIONS,
            padded_vocab_size=PADDED_VOCABULARY, vocab_size=None, layernorm_epsilon=config.layernorm_epsilon,
            normalization=config.normalization, bias_gelu_fusion=True, add_bias_linear=True, init_method_std=0.02,
            position_embedding_type="learned_absolute", untie_embeddings_and_output_weights=False,
            tensor_model_parallel_size=self.case.tensor, pipeline_model_parallel_size=self.case.pipeline,
            params_dtype=torch.float32, attention_backend=config.attention_backend, bert_binary_head=True,
        )  # fmt: skip
        state = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
        state["model"] = chunks[0].state_dict_for_save_checkpoint()
        ranks = (self.mpu.get_tensor_model_parallel_rank(), self.mpu.get_pipeline_model_parallel_rank())
        folder = Path("iter_0000007") / "mp_rank_{:02d}_{:03d}".format(*ranks)
        folder.mkdir(parents=True)
        torch.save(state, folder / "model_optim_rng.pt")
        Path("latest_checkpointed_iteration.txt").write_text("7")


def fill(chunk: torch.nn.Module, stage: int, index: int, rank: int) -> None:
    """Draw every parameter by its name; copies on several ranks, and the tied word embedding, are the same."""
    for name, parameter in chunk.named_parameters():
        split = getattr(parameter, "tensor_model_parallel", getattr(parameter, "model_parallel", False))
        words = name.endswith(("word_embeddings.weight", "output_layer.weight"))
        key = f"words {rank}" if words else f"{name} {stage} {index} {rank if split else 0}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        is_norm_weight = "norm" in name and name.endswith("weight")
        value = torch.randn(parameter.shape, generator=generator) * 0.3 + is_norm_weight
        parameter.data.copy_(value)


def inputs(binary: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, LENGTH)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1, 9:], mask[2, 4:] = 0, 0
    ids = torch.randint(VOCABULARY, shape, generator=generator)
    types_of_tokens = torch.randint(2, shape, generator=generator)
    return {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types_of_tokens} if binary else {})


def outputs(system: Any, chunks: list[Any], case: Case, rank: int) -> dict[str, torch.Tensor]:
    """What the last stage computes, the vocabulary gathered; chunk after chunk, each over all stages."""
    given = inputs(system.binary)
    results: dict[str, torch.Tensor] = {}
    hidden = torch.empty(LENGTH, BATCH, HIDDEN)
    for index, chunk in enumerate(chunks):
        for stage in range(case.pipeline):
            if stage == rank // case.tensor:
                system.enter(index)
                if index or stage:
                    chunk.set_input_tensor(hidden)
                result = chunk(given["input_ids"], given["attention_mask"], tokentype_ids=given.get("token_type_ids"))
                if index == len(chunks) - 1 and stage == case.pipeline - 1:
                    logits, sentence = result
                    parts = [torch.empty_like(logits) for _ in range(case.tensor)]
                    dist.all_gather(parts, logits.contiguous(), group=system.tensor_group)
                    results = {"logits": torch.cat(parts, -1)} | given
                    if sentence is not None:
                        results["seq_relationship_logits"] = sentence
                else:
                    hidden = result.contiguous()
            if case.pipeline > 1:
                dist.broadcast(hidden, src=stage * case.tensor + rank % case.tensor, group=system.pipeline_group())
    return results


@torch.no_grad()
def run(rank: int, case: Case, source: str | None, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(case.tensor * case.pipeline), CUDA_DEVICE_MAX_CONNECTIONS="1")
    os.chdir(out)
    without_gpu()
    if source is not None:
        sys.meta_path.insert(0, Unused())
        sys.path.insert(0, source)
    world = case.tensor * case.pipeline
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=rank, world_size=world)
    system: Any = MegatronCore(case, rank) if source is None else MegatronLM(case, rank)
    chunks = [system.chunk(index).eval() for index in range(case.chunks)]
    for index, chunk in enumerate(chunks):
        fill(chunk, rank // case.tensor, index, rank % case.tensor)
    results = outputs(system, chunks, case, rank)
    if results and rank % case.tensor == 0:
        save_file({name: value.contiguous() for name, value in results.items()}, "reference.safetensors")
    system.save(chunks)
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkouts", type=Path)
    parser.add_argument("cases", nargs="*", default=[])
    given = parser.parse_args()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # megatron-core compiles its fused gelu
    for name in given.cases or CASES:
        case, out = CASES[name], HERE / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        source = None if case.reference == "core" else str((given.checkouts / case.reference).resolve())
        torch.multiprocessing.spawn(run, (case, source, str(out)), nprocs=case.tensor * case.pipeline)


if __name__ == "__main__":
    main()
