"""The child process of grader.py: one JSON line (gold, answer) in, one verdict byte out.

Run as a script, never imported: model output is parsed here and nowhere else. The process has a
minimal environment and memory, CPU and file limits, and ends at the first audit event that no
comparison needs. Only a verdict byte leaves it: parsed expressions are never printed or converted
to text, because that alone can run forever.
"""

import json
import logging
import os
import re
import sys

from intfast.grading.reasons import READY, VERDICTS, Reason

BYTES = {reason: byte for byte, reason in VERDICTS.items()}
REFUSED, GOLD_REFUSED = b"u", b"g"
refusal = REFUSED
"""The last verdict of this process when the text being read would have to be evaluated."""

# What may reach sympy's evaluating parser: one number, as latex2sympy hands it over, or one name.
_ATOM = re.compile(r"\s*-?\s*((Integer|Float|Symbol)\s*\(\s*'?[\w.+-]+'?\s*\)|[A-Za-z]\w*)\s*")


# One of each kind: what sympy imports late is imported by these.
WARM = (
    r"\sqrt{2}",
    r"x^{2}+\sin(x)",
    r"\log_{2}(x)+\ln(2)+e^{i\pi/3}",
    r"\binom{n}{2}+3!",
    r"\int_0^1 x dx",
    r"\sum_{k=1}^{9} k",
    r"|x|+\lfloor x\rfloor",
    r"\lim_{x\to 0} x",
    r"\arctan(x)+\cosh(x)",
    r"\frac{1}{x-1}",
)


def set_limits(memory_bytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        # What is mapped and never touched costs nothing: only what may be added is counted.
        with open("/proc/self/statm") as statm:
            mapped, resident, *_ = (int(n) * resource.getpagesize() for n in statm.read().split())
        limit = mapped + max(memory_bytes - resident, 0)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def limit_cpu(seconds: int) -> None:
    """Let this process use `seconds` more CPU seconds, should the parent be unable to kill it."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_s = int(usage.ru_utime + usage.ru_stime) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (used_s + seconds, hard))


def restrict_eval(verdict_fd: int | None = None) -> None:
    """End this process when more than an atom reaches the one place where sympy evaluates text.

    The verdict on that text, `refusal`, is written before.
    """
    from sympy.parsing import sympy_parser

    evaluate = sympy_parser.eval_expr

    def guarded(code, local_dict, global_dict):
        if not _ATOM.fullmatch(code):
            # An exception would be caught on the way, and what follows would be graded.
            if verdict_fd is not None:
                os.write(verdict_fd, refusal)
            os._exit(2)
        return evaluate(code, local_dict, global_dict)

    sympy_parser.eval_expr = guarded


# Audit events of what no comparison of answers does.
_FORBIDDEN = re.compile(
    r"ctypes\.dlopen|(pty|shutil|socket|subprocess)\.|os\.(chmod|exec|fork|kill|link|mkdir"
    r"|posix_spawn|putenv|remove|rename|rmdir|spawn|symlink|system|truncate)"
)


def forbid_side_effects(also=lambda event, args: False, tell=lambda event: None) -> None:
    """End this process when anything in it writes a file, starts a program or opens a socket.

    also, tell: what else must not happen, and who hears of it first
    """
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def watch(event, args):
        opens = event == "open" and args[2] & writing
        if _FORBIDDEN.match(event) or opens or also(event, args):
            tell(event)
            os._exit(2)

    sys.addaudithook(watch)


def judge(gold: str, answer: str, digits: int = 0) -> bytes:
    """The verdict byte on two answers as they were written; equal texts are parsed all the same."""
    from intfast.grading import algebra, compare
    from intfast.grading.normal import normalise

    def on_gold(is_gold: bool) -> None:
        global refusal
        refusal = GOLD_REFUSED if is_gold else REFUSED

    reason = compare.verdict(normalise(gold), normalise(answer), algebra.leaf(on_gold, digits))
    return BYTES[reason]


def warm_up() -> None:
    """Build the parser's tables and import what comparisons use, before any deadline runs."""
    for text in WARM:
        judge(text, text + "+0")


def main() -> None:
    """Arguments: CPU seconds for one answer, bytes of memory, digits that a decimal may have."""
    cpu_s, memory_bytes, digits = map(int, sys.argv[1:])
    verdict_fd = os.dup(1)
    null_fd = os.open(os.devnull, os.O_RDWR)
    restrict_eval(verdict_fd)
    warm_up()
    # Nothing that a library prints may reach the verdict pipe.
    logging.disable()
    for fd in (1, 2):
        os.dup2(null_fd, fd)
    sys.dont_write_bytecode = True
    set_limits(memory_bytes)
    forbid_side_effects()
    os.write(verdict_fd, READY)
    for line in sys.stdin.buffer:
        limit_cpu(cpu_s)
        gold, answer = json.loads(line)
        try:
            verdict = judge(gold, answer, digits)
        except MemoryError:
            os._exit(1)
        except Exception:
            verdict = BYTES[Reason.UNPARSEABLE]
        os.write(verdict_fd, verdict)


if __name__ == "__main__":
    main()
