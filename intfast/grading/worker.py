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

READY, CORRECT, WRONG, UNPARSEABLE, GOLD_UNPARSEABLE = b"R", b"C", b"W", b"U", b"G"
REFUSED, GOLD_REFUSED = b"u", b"g"
refusal = REFUSED
"""The last verdict of this process when the text being read would have to be evaluated."""

# What may reach sympy's evaluating parser: one number, as latex2sympy hands it over, or one name.
_ATOM = re.compile(r"\s*-?\s*((Integer|Float|Symbol)\s*\(\s*'?[\w.+-]+'?\s*\)|[A-Za-z]\w*)\s*")


def set_limits(memory_bytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
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


def forbid_side_effects() -> None:
    """End this process when anything in it writes a file, starts a program or opens a socket."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def watch(event, args):
        if _FORBIDDEN.match(event) or (event == "open" and args[2] & writing):
            os._exit(2)

    sys.addaudithook(watch)


def judge(gold: str, answer: str) -> bytes:
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(text: str) -> list:
        # The plain-expression extractor hands text to an evaluating parser, so only LaTeX.
        return parse(
            f"${text}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
        )

    global refusal
    refusal = GOLD_REFUSED
    gold_parsed = parsed(gold)
    refusal = REFUSED
    if not gold_parsed:
        return GOLD_UNPARSEABLE
    answer_parsed = parsed(answer)
    if not answer_parsed:
        return UNPARSEABLE

    def same(given: list) -> bool:
        # Time-outs are the parent's: alarms miss C code and cost their exception to broad handlers.
        return verify(gold_parsed, given, timeout_seconds=None)

    if not same(answer_parsed):
        return WRONG
    # Of "99=x+1" only the last side was compared; a number on another side must agree too.
    for side in answer.split("=")[:-1] if "=" not in gold else ():
        value = parsed(side)
        if value and getattr(value[0], "is_number", False) is True and not same(value):
            return WRONG
    return CORRECT


def main() -> None:
    """Arguments: CPU seconds for one answer, bytes of address space."""
    cpu_s, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    verdict_fd = os.dup(1)
    null_fd = os.open(os.devnull, os.O_RDWR)
    restrict_eval(verdict_fd)
    # The first call builds the parser's tables; do it before any deadline runs.
    assert judge("1", "1.0") == CORRECT
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
            verdict = judge(gold, answer)
        except MemoryError:
            os._exit(1)
        except Exception:
            verdict = UNPARSEABLE
        os.write(verdict_fd, verdict)


if __name__ == "__main__":
    main()
