"""The worker that vLLM is told to use: weights stay put, and only the KV cache can be released."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform

from intfast import ranks

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class SharingWorker(_Worker):
    """A worker whose weights another module may hold: nothing here moves, frees or reloads them."""

    def init_device(self) -> None:
        """On a CPU, ranks of one model meet in shared memory, under a name of this start alone.

        vLLM takes it from the init method, which torchrun has the same for all: another run would
        meet this one, and what a killed one left there would keep the next from starting.
        """
        if not current_platform.is_cpu():
            return super().init_device()
        name = ranks.now().first(lambda: uuid.uuid4().hex)
        self.distributed_init_method += f":{name}"
        super().init_device()
        # All have it now, and it lives as long as they do: without a name no kill leaves it behind.
        ranks.now().agree()
        if ranks.now().is_main:
            for file in Path("/dev/shm").glob(f"{name}-*"):
                file.unlink()

    def _maybe_get_memory_pool_context(self, tag: str) -> contextlib.AbstractContextManager:
        # Outside of the sleep pool, weights are ordinary tensors that no sleep can release.
        if tag == "weights":
            return contextlib.nullcontext()
        return super()._maybe_get_memory_pool_context(tag)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it rebuilds the tensors that the trainer's parameters live in."""
        raise RuntimeError("weights that the trainer shares cannot be reloaded by the engine")

    def release_kv(self) -> None:
        """Give the memory of the KV cache back; only for a CPU, where vLLM's sleep does nothing."""
        # Layers may lie in one storage.
        storages = {s._cdata: s for s in (c.untyped_storage() for c in self.model_runner.kv_caches)}
        self._released = [(storage, storage.nbytes()) for storage in storages.values()]
        for storage, _ in self._released:
            storage.resize_(0)

    def restore_kv(self) -> None:
        """Take the memory again, filled with zeros: what a masked slot holds must be finite."""
        for storage, num_bytes in self._released:
            storage.resize_(num_bytes)
            storage.fill_(0)
