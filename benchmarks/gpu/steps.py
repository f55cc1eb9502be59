"""What a session runs, in which order and for how long at most. Needs Python's own library only."""

from __future__ import annotations

import importlib.util
import os
import sys

from benchmarks.gpu.session import ROOT, Session, Step, python, said

WHEELS, PACK = ROOT / "wheels", ROOT / "vllm"
SWITCH, RUNGS = "INTFAST_HEAD", ("odds", "odds-no-ws", "odds-no-tma", "rows", "plain")
"""Where the loss head starts on its ladder, from the youngest path down."""
VLLM = [
    "--dtype", "bfloat16", "--shape", "0.6b", "--prompt", "512", "--new", "128",
    "--context", "4096", "--cache-gib", "8", "--warmup", "1",
]  # fmt: skip
# On a CPU a whole run of the quickstart's short form takes a minute; this takes seconds.
SMALL_RUN = [
    "data.train_limit=4", "data.test_limit=2", "attempts.samples=2", "attempts.max_problems=4",
    "attempts.wrong_per_problem=1", "evaluate.samples=2", "evaluate.ks=[1,2]",
    "intervene.continuations=2", "intervene.wave=2", "sft.target=no_filter", "rl.steps=1",
    "rl.problems_per_step=2", "rl.group_size=4", "rl.from_base=false",
]  # fmt: skip


def run(session: Session, part: str, device: str, names: list[str]) -> None:
    """The steps of a part, only `names` of them where any are given."""
    gib = _look_around(session)
    if device == "cuda":
        if not gib:
            raise SystemExit("torch sees no CUDA device; device=cpu tries the session without one")
        # On Hopper cuDNN is the first choice for attention, and plans anew for every length.
        session.environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"
    else:
        session.environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    session.unpack(sorted(WHEELS.glob("*.whl")))
    make = Steps(session, device, gib)
    groups = {"first": make.first, "second": make.second}[part]()
    known = [step.name for group in groups for step in group]
    if unknown := set(names) - set(known):
        raise SystemExit(f"steps: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    climb(session, make)
    for group in groups:
        wanted = [step for step in group if not names or step.name in names]
        if wanted:
            session.run(*wanted)


def climb(session: Session, make: Steps) -> None:
    """Find the first rung from which the loss head is right; every later step starts there.

    A rung that does not compile is left by the head itself. This is for one that hangs or is wrong:
    it costs its own limit, and not that of every step.
    """
    kept = session.work / "rung.txt"
    # The second part begins where the first one ended.
    start = RUNGS.index(kept.read_text()) if kept.exists() else 0
    for rung in RUNGS[start:]:
        session.environment[SWITCH] = rung
        if session.run(make.check("odds", 75 if rung == RUNGS[0] else 45, name=f"head_{rung}")):
            kept.write_text(rung)
            return session.note(f"LOSS HEAD STARTS AT: {rung}")
    # The fault lies elsewhere, so nothing is changed.
    del session.environment[SWITCH]
    session.note("LOSS HEAD: wrong on every rung; goes on as shipped")


def _look_around(session: Session) -> float:
    """Note what machine this is; the GiB of its card, 0 without one."""
    asked = "name,driver_version,memory.total,memory.used,clocks.max.sm,power.limit"
    session.note(said(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"]))
    modules = "torch, triton, transformers, numpy"
    session.note(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}, {modules}:")
    code = (
        f"import {modules}; print(*(m.__version__ for m in ({modules})))\n"
        "card = torch.cuda.is_available() and torch.cuda.get_device_properties(0)\n"
        "print(card.total_memory / 2**30 if card else 0)"
    )
    answer = said(python("-c", code), 120)
    session.note(answer)
    gib = answer.split()[-1] if answer else ""
    return float(gib) if gib.replace(".", "").isdigit() else 0.0


class Steps:
    """Makes the steps of a device."""

    def __init__(self, session: Session, device: str, gib: float = 0.0) -> None:
        """gib: memory of the card."""
        self.session, self.device, self.is_cpu = session, device, device == "cpu"
        self.gib = gib
        self.has_vllm = not self.is_cpu and (PACK.is_dir() or _installed("vllm"))

    def check(self, group: str, limit: float, *words: str, name: str = "") -> Step:
        """A group of checks.py or figures.py, run by group.py."""
        module = "benchmarks.gpu.group"
        words = (group, f"device={self.device}", f"out={self.session.out}", *words)
        return Step(name or group, limit, python("-m", module, *words))

    def train(
        self,
        name: str,
        limit: float,
        *words: str,
        config: str = "quickstart_short",
        engine: str = "native",
    ) -> Step:
        """A whole run of the trainer."""
        folder = self.session.work / "runs" / f"{name}-{os.getpid()}"
        where = (f"run={folder}", f"model.device={self.device}", f"rollout.engine={engine}")
        small = SMALL_RUN if self.is_cpu else []
        module = ("-m", "intfast.train", f"configs/{config}.toml")
        paths = (self.session.vllm,) if engine == "vllm" else ()
        return Step(f"train_{name}", limit, python(*module, *where, *words, *small), paths)

    def bench(self, name: str, benchmark: str, limit: float, *words: str) -> Step:
        """A benchmark, whose rows come back."""
        words = (*words, "--device", self.device, "--results", str(self.session.out))
        # A packed vLLM may bring other versions of packages, which concern nobody else.
        paths = (self.session.vllm,) if benchmark == "vllm" else ()
        return Step(name, limit, python("-m", "benchmarks", benchmark, *words), paths)

    def gpu_tests(self, limit: float) -> Step:
        """The kernel tests of a GPU; conftest.py serves other tests and imports transformers."""
        words = ["-m", "gpu", "tests/test_kernels_gpu.py", "--noconftest", "-o", "addopts="]
        words += ["-p", "no:cacheprovider", "-q", "--tb=short", "--durations=5"]
        if _installed("xdist") and not self.is_cpu:
            # The largest cases take about 15 GB each, for fp64.
            words += ["-n", "5" if self.gib > 100 else "3"]
        return Step("gpu_tests", limit, python("-m", "pytest", *words))

    def first(self) -> list[list[Step]]:
        """Groups of steps side by side, then what is timed, one at a time."""
        bf16, fp32 = "model.dtype=bfloat16", "model.dtype=float32"
        right = [
            self.train("bf16", 120, bf16),
            *(self.check(g, 120) for g in ("decoder", "engine")),
        ]
        kernels = ["span_cross_entropy", "linear_objective", "--rounds", "7", "--caches", "hot"]
        if self.is_cpu:
            return [
                [self.gpu_tests(60)], *([step] for step in right),
                *([self.check(name, 60)] for name in ("ceilings", "step_4b", "memory", "decode")),
                [self.bench("kernels", "kernels", 60, *kernels, "--budget", "5")],
            ]  # fmt: skip
        right += [self.train("fp32", 120, fp32), self.gpu_tests(200)]
        if PACK.is_dir():
            command = ["bash", str(PACK / "install.sh"), str(self.session.vllm)]
            right.append(Step("unpack_vllm", 90, command))
        second = [self.train("liger", 90, bf16, "model.kernels=liger")]
        if self.has_vllm:
            eager = self.bench("vllm_eager", "vllm", 110, *VLLM, "--eager", "--rounds", "1")
            second.append(eager)
        peers = ["--budget", "40", "--peers", "eager,Liger,CCE"]
        timed = [
            self.check("ceilings", 45),
            self.check("step_4b", 80),
            self.check("step_4b", 70, "kernels=liger", name="step_4b_liger"),
            self.bench("kernels", "kernels", 60, *kernels, *peers),
            self.check("memory", 40),
            self.check("decode", 60),
        ]
        if self.has_vllm:
            timed.append(self.bench("vllm_graphs", "vllm", 100, *VLLM, "--rounds", "2"))
        return [right, second, *([step] for step in timed)]

    def second(self) -> list[list[Step]]:
        """What the first part had no time for, one at a time."""
        vllm_run = ["model.dtype=bfloat16", "rollout.sleep=true", "rollout.cache_gib=4"]
        ops = ["linear_logprob", "linear_logprob_gradient", "group_advantages", "--budget", "40"]
        no_checkpoints = ["checkpointing=0"]
        no_checkpoints += [] if self.is_cpu else ["kernels=liger", "tokens=8192"]
        memcheck = ["compute-sanitizer", "--tool", "memcheck", *self.check("odds", 0).command]
        steps = [
            self.check("step_4b", 60, *no_checkpoints, name="step_4b_kept"),
            self.bench("log_probs", "kernels", 60, *ops, "--caches", "hot"),
            self.train("quickstart", 120, "model.dtype=bfloat16", config="quickstart"),
        ]
        if self.has_vllm:
            sleep = self.bench("vllm_sleep", "vllm", 90, *VLLM, "--sleep", "--rounds", "2")
            steps = [self.train("vllm", 80, *vllm_run, engine="vllm"), sleep, *steps]
        if not self.is_cpu:
            steps.append(Step("memcheck", 60, memcheck))
        return [[step] for step in steps]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
