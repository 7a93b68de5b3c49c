"""Mutation testing of the kernels: changes one place of a source, and runs the comparisons with float64.

``python -m tests.runtime.cuda.kernel_mutants --mutants 200``. A change removes a barrier, moves an index or a constant
by one, or exchanges an operator. A mutant is killed if a comparison fails, if the kernel deadlocks, writes outside of
its memory, crashes, or does not end in time. One that g++ does not compile is not counted. Survivors are listed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from blip2edge.runtime.cuda.kernel import KERNELS
from tests.runtime.cuda import test_attention, test_products, test_sampling, test_steps
from tests.runtime.cuda.shimmed import Shim

SUITES: dict[str, tuple[ModuleType, ...]] = {
    "gemv.cuh": (test_products,),
    "gemm.cuh": (test_products,),
    "weights.cuh": (test_products, test_steps),
    "common.cuh": (test_products, test_steps, test_attention, test_sampling),
    "norm.cuh": (test_steps,),
    "embed.cuh": (test_steps,),
    "choose.cuh": (test_steps, test_sampling),
    "sample.cuh": (test_sampling,),
    "move.cuh": (test_steps,),
    "attention.cuh": (test_attention,),
}
"""The tests of each source: ``KERNELS`` and ``verify(shim)``. ``mma.cuh`` is PTX, which the shim replaces."""

CHANGES: tuple[tuple[str, str], ...] = (
    (r"__syncthreads\(\);", ";"),
    (r"__syncwarp\(\);", ";"),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" % ", " / "),
    (r" \+= ", " -= "),
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r"(?<![\w.x])(\d+)(?=[;,\])}: ]|$)", "{+1}"),
    (r"\bfmaxf\b", "fminf"),
    (r"\bthreadIdx\.x\b", "(threadIdx.x + 1)"),
    (r"\bblockIdx\.([xyz])\b", "0"),
)
"""Regular expressions and what replaces a match; ``{+1}`` is the number plus one."""

EQUIVALENT = (
    r"^#|#pragma|unroll|__launch_bounds__|static_assert",
    r"constexpr int (SEGMENT|MOST_MATRICES|THREADS|WARP|WARPS|LEAST_BLOCK)\b",  # the host's constants
    r"^enum \w+ \{.*=",
    r"constexpr int (NEEDED|LANES|LOADED|PITCH|GEMM_\w+)\b",  # more lanes or words than needed change no result
)
"""Lines that are not changed: directives, constants that the host shares, and sizes that only decide about time."""

SAME: tuple[tuple[str, str], ...] = (
    (r"threadIdx\.x( % WARP == 1| \+ 1\) % WARP == 0)\) (scratch|shared)", "all lanes of a warp have the sum"),
    (r"== 0\) (scratch|shared)\[\(threadIdx\.x \+ 1\) / WARP\]", "lane 0 and lane 1 are of the same warp"),
    (r"(threadIdx\.x \+ 1\) % WARP < LANES|WARP <= LANES)", "the sums of lane i are also those of lane i + LANES"),
    (r"lane <= LANES && channel < WIDTH", "the channels of this lane lie behind the head"),
    (r"first_column > m\.width", "a block without columns writes nothing"),
    (r"threadIdx\.x (== 1|!= 0)\) (\*flag|part|parts)", "one thread writes, whichever; or all write the same"),
    (r"b\.token <= a\.token", "tokens differ"),
    (r"broken \? 1 :", "a row with a NaN has no log-probability"),
    (r"a\.seen\[start \+ token\] = 2", "any mark counts"),
    (r"slots - oldest \+ splits \+ 1", "longer cuts cover the slots too"),
    (r"splits >= 1 && at == 0", "one cut is not read again"),
    (r"first \+ cut <= slots", "equal values"),
    (r"0 == 0 && i < GROUP \* WIDTH", "every cut writes the same zeros"),
    (r"\[FRAGMENTS\]\[5\]|(inputs|gates|weights)\[5\]", "one more value, which is not used"),
    (r"steps \+ a\.splits \+ 1\) / a\.splits", "longer parts cover K too"),
    (r"GEMM_DEPTH - 1\) \* GEMM_DEPTH, own", "the first part of K is all of it"),
    (r"GEMM_DEPTH \+ 1\) / GEMM_DEPTH, own", "longer parts cover K too"),
    (r"first - GEMM_DEPTH < end\) step\.load", "what is loaded behind the end of a part is not used"),
    (r"last <= kept\) kept", "with top-k, the sum reaches the limit at a kept token"),
    (r"return threadIdx\.x == 1", "one thread writes, whichever"),
    (r"slot == own \|\| blockIdx", "every new slot is written again, with the same values"),
    (r"vocabulary >= LISTED|first <= second", "equal values"),
    (r"i = ids\.first; i <= ids\.end; \+\+i", "the id behind the share is reached by no number"),
    (r"splits > 1 && at != 0", "all channels of a head have the largest score and the total"),
    (r"lane (== 1|!= 0)\) a\.maxima", "all lanes have the largest score of the warp"),
    (r"most (>|<) (LEAST_)?NUCLEUS|NUCLEUS \|\| most|NUCLEUS = \d", "another number of tokens is sorted"),
    (r"(i <= (LISTED|size)|at <= LISTED|pair <= size / 2)\b", "what lies behind is not read, or is written later"),
    (r"group <= groups", "a group behind the last one has no ids"),
    (r"size <= (kept|count)", "more padding is sorted"),
    (r"top_k > 1 \? top_k : some|most = groups [*+/] \d", "another number of tokens is sorted"),
    (r"threadIdx\.x % WARP != 0\) (scratch|shared)\[", "all lanes of a warp have the sum, or the best token"),
    (r"limit >= 0\.0f", "without top-p the last kept token completes the sum"),
    (r"own && 0 % a\.shares", "the blocks of a head write the same"),
    (r"splits - 1\) \* splits", "longer cuts cover the slots too"),
    (r"wanted >= most", "either bound will do"),
    (r"int found = 1", "another block or share has a weight"),
    (r"token < 0 \? 1", "the step after a row without a token is not used"),
    (r"share <= THREADS|chunk <= CHUNKS", "what lies behind is reached by no number"),
    (r"top_k <= count", "equal values"),
    (r"\+ \(threadIdx\.x \+ 1\) % WARP; i <", "the lanes are exchanged"),
    (r"unsigned bound = 1", "every key of a number is larger"),
    (r"first \+ share <= whole|first <= whole\.end|place <= none|token <= 0 \?", "equal values"),
    (r"shared\.order\[i\] = 1;|\+ 1\); i < LISTED; i \+= THREADS\) shared\.order", "padding"),
    (r"kept \+ 1, \[&\]", "the sum of all weights passes every number below 1"),
    (r"parts \+ 1\) / parts", "longer parts cover the ids too"),
    (r"block <= gridDim\.x; \+\+block\) \{", "a block behind the last one is reached by no number"),
    (r"entry >> 32\) : 1;", "padding, which is below every entry"),
    (r"ordered\(values\[i\]\) > \(bound", "a lower bound: more tokens are sorted"),
    (r"BITS == 17", "fp16 has no scales, and their address is not read"),
)
"""Changes that change no result, with the reason; they are not counted."""

SECONDS = 60


@dataclass
class Mutant:
    """One change, and whether a test noticed it: ``killed``, ``survived`` or ``invalid``."""

    file: str
    line: int
    before: str
    after: str
    outcome: str = ""


def mutants(file: str) -> Iterator[Mutant]:
    """All changes of a source; comments are left alone."""
    for number, line in enumerate((KERNELS / file).read_text().splitlines(), 1):
        code = line.split("//")[0]
        if any(re.search(pattern, code) for pattern in EQUIVALENT):
            continue
        for pattern, replacement in CHANGES:
            for match in re.finditer(pattern, code):
                new = str(int(match[1]) + 1) if replacement == "{+1}" else replacement
                after = f"{line[: match.start()]}{new}{line[match.end() :]}"
                if not any(re.search(same, after) for same, _ in SAME):
                    yield Mutant(file, number, line.strip(), after)


def outcome(mutant: Mutant) -> str:
    """Runs the comparisons on a changed source, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        sources = Path(scratch) / "kernels"
        shutil.copytree(KERNELS, sources)
        lines = (sources / mutant.file).read_text().splitlines()
        lines[mutant.line - 1] = mutant.after
        (sources / mutant.file).write_text("\n".join(lines) + "\n")
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                _child(mutant, sources)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        return {0: "survived", 2: "invalid"}.get(os.waitstatus_to_exitcode(status), "killed")


def _child(mutant: Mutant, sources: Path) -> None:
    signal.alarm(SECONDS)
    faulthandler.disable()  # a mutant may crash
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    for suite in SUITES[mutant.file]:
        try:
            shim = Shim(suite.KERNELS, sources, keep=False)
        except RuntimeError:
            os._exit(2)
        suite.verify(shim)
    os._exit(0)


def run(count: int, seed: int, files: Sequence[str]) -> list[Mutant]:
    """Tries ``count`` mutants, drawn from all of these sources; all of them if there are fewer."""
    every = [mutant for file in files for mutant in mutants(file)]
    chosen = random.Random(seed).sample(every, min(count, len(every)))
    for mutant in chosen:
        mutant.outcome = outcome(mutant)
    return [mutant for mutant in chosen if mutant.outcome != "invalid"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mutants", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", choices=sorted(SUITES), action="append")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tried = run(given.mutants, given.seed, given.file or sorted(SUITES))
    for mutant in tried:
        if mutant.outcome == "survived":
            print(f"{mutant.file}:{mutant.line}: {mutant.before}  ->  {mutant.after.strip()}")
    killed = sum(mutant.outcome == "killed" for mutant in tried)
    print(f"{killed} of {len(tried)} killed ({killed / max(len(tried), 1):.1%})")
    if given.json:
        given.json.write_text(json.dumps([asdict(mutant) for mutant in tried], indent=1) + "\n")


if __name__ == "__main__":
    main()
