"""Starting vLLM in this process: checks before anything is loaded, then engine, then decoder.

vLLM loads the checkpoint and the decoder adopts its tensors (sharing.py), so an optimizer step is a
weight update of the engine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intfast import ranks
from intfast.config import Config
from intfast.engine import hygiene, sharing
from intfast.engine.cache import bytes_per_slot
from intfast.engine.memory import GIB
from intfast.engine.vllm import VllmEngine
from intfast.model import weights
from intfast.model.shards import Shards

# Tokens of a block of the prefix cache on a CPU; the default, 128, is more than short prompts have.
CPU_BLOCK = 32
# On CUDA decode steps are replayed as graphs; False runs them one by one, to compare.
CUDA_GRAPHS = True
# Engines live as long as the process: deleting one frees the weights that the trainer trains and
# destroys the process group.
_ALIVE: list[Any] = []


def start(folder: Path, config: Config, device: torch.device) -> VllmEngine:
    """An engine on the checkpoint in `folder`; its `decoder` is what to train.

    What can be checked without loading vLLM is checked first: ValueError names the setting.
    """
    architecture = weights.check(folder)
    context = config.rollout.context or architecture.max_positions
    dtype, kernels = getattr(torch, config.model.dtype), config.model.kernels
    if len(set(architecture.windows)) > 1:
        raise ValueError(
            "the model has sliding windows in some layers only, which is not supported with "
            'rollout.engine = "vllm"; use rollout.engine = "native"'
        )
    if any(rope.llama_4_scaling_beta for rope in architecture.ropes):
        raise ValueError(
            "rope_parameters.llama_4_scaling_beta of the model is not read by vLLM, which would "
            'compute another model; use rollout.engine = "native"'
        )
    needed_gib = (context + CPU_BLOCK) * bytes_per_slot(architecture, dtype) / GIB
    needed_gib /= ranks.now().tp
    if needed_gib > config.rollout.cache_gib:
        raise ValueError(
            f"rollout.cache_gib = {config.rollout.cache_gib} holds no sample of {context} tokens, "
            f"which takes {needed_gib:.2f} GiB; raise it, or lower rollout.context"
        )
    with hygiene.preserved(_environment(device)):
        llm = _launch(folder, config, context, device)
    _ALIVE.append(llm)
    [module] = llm.apply_model(lambda module: module)
    own = Shards(architecture, ranks.now()) if ranks.now().tp > 1 else None
    if config.rollout.engine == "vllm_copy":
        decoder, _ = weights.load(folder, dtype, device, kernels, own)
        return VllmEngine(llm, decoder, sharing.Copied(decoder, module), context)
    decoder = sharing.adopt(module, architecture, dtype, kernels, own)
    return VllmEngine(llm, decoder, sharing.Shared(decoder, module), context)


def _environment(device: torch.device) -> dict[str, str]:
    """What vLLM reads when it is imported and started."""
    found = {
        # The engine and the model live in this process.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    here = ranks.now()
    if here.neighbours == here.world:
        # The process group of one machine listens on the loopback interface, and nowhere else.
        found |= {"VLLM_HOST_IP": "127.0.0.1"}
        found |= {f"{name}_SOCKET_IFNAME": "lo" for name in ("GLOO", "NCCL")}
    if device.type == "cpu":
        # One helper for log-probs would be compiled on first use, which takes 5 to 15 s.
        found["TORCHDYNAMO_DISABLE"] = "1"
    return found


def _launch(folder: Path, config: Config, context: int, device: torch.device) -> Any:
    """A vllm.LLM in this process."""
    import vllm

    options: dict[str, Any] = {}
    rollout = config.rollout
    if ranks.now().world > 1:
        # The world is there: every rank is an engine of its own in it, on the device of its rank.
        # Those of one copy of the model must be asked for the same, in the same order.
        options["distributed_executor_backend"] = "external_launcher"
        options["tensor_parallel_size"] = ranks.now().tp
    if config.model.dtype == "bfloat16":
        # The loss takes its logits in fp32; on one side only it would widen the gap.
        options["hf_overrides"] = {"head_dtype": "float32"}
    if device.type == "cpu":
        from vllm.model_executor.layers import utils

        # vLLM packs linear weights into a private layout; with this it uses them as they are, which
        # costs 13 to 19 % of its speed, and is what lets the trainer write them.
        def plain(layer: nn.Module, remove_weight: bool) -> None:
            layer.cpu_linear = nn.functional.linear

        utils.dispatch_cpu_unquantized_gemm = plain
        options |= {"enforce_eager": True, "block_size": CPU_BLOCK}
    else:
        free, total = torch.cuda.mem_get_info(device)
        # Only checked against what is free: the cache has an explicit size.
        options["gpu_memory_utilization"] = min(0.5, 0.9 * free / total)
        options["enable_sleep_mode"] = rollout.sleep
        options["enforce_eager"] = not CUDA_GRAPHS
        if CUDA_GRAPHS:
            # Graphs without torch.compile: they hold the addresses of weights, which stay.
            options["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return vllm.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="safetensors",
        use_tqdm_on_load=False,
        generation_config="vllm",
        dtype=config.model.dtype,
        seed=0,
        max_model_len=context,
        max_num_seqs=rollout.max_rows,
        kv_cache_memory_bytes=int(rollout.cache_gib * GIB),
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        worker_cls="intfast.engine.vllm_worker.SharingWorker",
        disable_log_stats=True,
        **options,
    )
