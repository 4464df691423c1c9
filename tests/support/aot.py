"""Compile what the launchers launch for GPUs that are not there, and hold the machine code to a budget.

    python -P tests/support/aot.py                     all architectures, against tests/kernels/aot_budget.json
    python -P tests/support/aot.py --arch 90 --write   renew the budget of one
    python -P tests/support/aot.py --rules-only        only what must hold under any version of Triton

`aot_cases` calls the launchers on device="meta" at real sizes: the specialisation (types, alignment, constants, tile,
warps) is the one that runs on a GPU, a grid that CUDA would refuse is found, and since meta tensors have no values, a
launcher that waits for one fails here. Every kernel must have no spills and no floating-point atomics, fit the shared
memory, and multiply 16-bit matrices with the matrix unit of its architecture. The budget adds, per kernel and
architecture of the pinned Triton: no stack, at most these registers, at least these 128-bit loads and matrix
instructions, and no kernel missing or unlisted. (Triton 3.9 reserves a stack for some kernels that never touch it.)

Triton must compile, not interpret: run with TRITON_INTERPRET unset. The disassemblers come with Triton's wheel.
"""

import argparse
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SUPPORT = Path(__file__).resolve().parent
if str(SUPPORT) not in sys.path:
    sys.path.append(str(SUPPORT))  # python -P leaves it out

from stub_driver import StubDriver  # noqa: E402

BUDGET = SUPPORT.parent / "kernels" / "aot_budget.json"
# bytes of shared memory a program may have, by architecture
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
MATRIX_UNIT = {80: "hmma", 86: "hmma", 89: "hmma", 90: "hgmma", 100: "tcgen05"}
OPCODES = {
    "spills": r"LDL|STL",
    "loads128": r"(LDG|LDGSTS)\.(\w+\.)*(128|256)",
    "hmma": r"HMMA",
    "hgmma": r"HGMMA",
    "tcgen05": r"UTC\w*MMA",
    "float_atomics": r"(ATOM|ATOMG|RED|REDG|ATOMS)\.(\w+\.)*(F16|F16x2|BF16|BF16x2|F32|F64)",
}
AT_LEAST = ("loads128", "hmma", "hgmma", "tcgen05")


@dataclass
class Job:
    """One specialisation of a kernel."""

    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    cases: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Name and a hash of all that makes the compiler's input differ, but the source."""
        facts = (self.signature, self.described, sorted(map(str, self.attributes.items())), self.launch_options)
        return f"{self.kernel.__name__} {hashlib.sha256(repr(facts).encode()).hexdigest()[:6]}"

    @property
    def described(self) -> str:
        """Constants, None for absent pointers, and types of the pointers."""
        names = self.kernel.arg_names
        constants = [f"{names[path[0]]}={getattr(v, '__name__', v)}" for path, v in self.constants.items()]
        types = dict.fromkeys(t[1:] for t in self.signature.values() if isinstance(t, str) and t.startswith("*"))
        return " ".join([*constants, "|", *types])

    @property
    def launch_options(self) -> str:
        """What the launcher chose besides the arguments."""
        o = self.options
        return f"{o['num_warps']} warps, {o['num_stages']} stages, fusion {'on' if o['enable_fp_fusion'] else 'off'}"


def collect(arch: int, cases: dict[str, Callable[[], None]]) -> tuple[dict[str, Job], list[str]]:
    """Run the launchers for a GPU of this architecture, compile nothing.

    Returns:
        The kernels they launch, by key; the cases that raised, for a value that a meta tensor does not have, or for a
        grid that CUDA would refuse.
    """
    triton.runtime.driver.set_active(StubDriver(arch))
    jobs: dict[str, Job] = {}
    failed: list[str] = []
    running = ""

    def record(kernel, key, signature, device, constants, options, attributes, warmup):
        job = Job(kernel, dict(signature), dict(constants), dict(attributes), dict(options.__dict__))
        job = jobs.setdefault(job.key, job)
        if running not in job.cases:
            job.cases.append(running)
        # no compiled kernel: `run` ends here

    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        if callable(grid):
            named = {k: v for k, v in kwargs.items() if k in kernel.arg_names}
            grid = grid(kernel.signature.bind(*args, **named).arguments)
        size = (*grid, 1, 1)[:3]
        if not all(isinstance(n, int) and n >= 1 for n in size) or size[0] >= 2**31 or max(size[1:]) > 65535:
            raise ValueError(f"CUDA refuses grid {grid} of {kernel.__name__}")
        return run(kernel, *args, grid=grid, warmup=True, **kwargs)

    with (
        mock.patch.object(JITFunction, "_do_compile", record),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        for name, case in cases.items():
            running = name
            try:
                case()
            except Exception as error:  # whatever it is, the other cases are of interest too
                frames = traceback.extract_tb(error.__traceback__)
                where = [f for f in frames if "site-packages" not in f.filename and f.filename != __file__][-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                failed.append(f"sm_{arch} case {name!r}: {type(error).__name__}: {error} ({place})")
    return jobs, failed


@functools.cache
def tool(name: str) -> str:
    """Path of a program of Triton's wheel; some wheels lack the execute bit, then it is a copy that has it."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if os.access(path, os.X_OK):
        return str(path)
    copy = Path(os.environ["TRITON_CACHE_DIR"]) / f"{name}-{os.getpid()}"
    shutil.copy(path, copy)
    copy.chmod(0o755)
    return str(copy)


def disassemble(cubin: bytes) -> tuple[str, list[str]]:
    """Resource usage as cuobjdump prints it, and the opcodes with their modifiers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    return usage, re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_][A-Za-z0-9_.]+)", sass, re.M)


def measure(job: Job, arch: int) -> dict[str, Any]:
    """Compile a job: registers, stack and shared memory in bytes, counts of opcodes."""
    start = time.perf_counter()
    source = ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=job.options)
    usage, opcodes = disassemble(compiled.asm["cubin"])
    if not opcodes:
        raise RuntimeError(f"nothing disassembled of {job.key}")
    used = {name: int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "SHARED")}
    figures = {
        "registers": used["REG"],
        "stack": used["STACK"],
        "shared": max(used["SHARED"], compiled.metadata.shared),
        "instructions": len(opcodes),
    }
    for name, pattern in OPCODES.items():
        figures[name] = sum(re.match(pattern, opcode) is not None for opcode in opcodes)
    # 16-bit operands; float32 products are exact on purpose and have no matrix unit
    figures["multiplies"] = bool(re.search(r"tt\.dot .*x(bf16|f16)> \*", compiled.asm["ttir"]))
    figures["seconds"] = round(time.perf_counter() - start, 1)
    return figures


def broken_rules(figures: dict[str, Any], arch: int) -> list[str]:
    """What no kernel may do, whatever the budget says."""
    broken = [f"{name} {figures[name]}" for name in ("spills", "float_atomics") if figures[name]]
    if figures["shared"] > SHARED_LIMIT[arch]:
        broken.append(f"shared memory {figures['shared']} > {SHARED_LIMIT[arch]}")
    if figures["multiplies"]:
        unit = MATRIX_UNIT[arch]
        others = [f"{other} {figures[other]}" for other in ("hmma", "hgmma", "tcgen05") if other != unit]
        if not figures[unit] or any(figures[other] for other in ("hmma", "hgmma", "tcgen05") if other != unit):
            broken.append(f"multiplies 16-bit matrices with {unit} {figures[unit]}, {', '.join(others)}")
    return broken


def entry(figures: dict[str, Any]) -> dict[str, int]:
    """What the budget keeps of the figures."""
    return {"registers": figures["registers"]} | {name: figures[name] for name in AT_LEAST if figures[name]}


def over_budget(figures: dict[str, Any], allowed: dict[str, int]) -> list[str]:
    """Where figures miss the budget of their kernel."""
    missed = [f"stack {figures['stack']}"] if figures["stack"] else []
    if figures["registers"] > allowed["registers"]:
        missed.append(f"registers {figures['registers']} > {allowed['registers']}")
    for name in AT_LEAST:
        if figures[name] < allowed.get(name, 0):
            missed.append(f"{name} {figures[name]} < {allowed[name]}")
    return missed


_jobs: list[tuple[int, Job]] = []  # workers are forked, so they find it here


def _measure_number(i: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    arch, job = _jobs[i]
    triton.runtime.driver.set_active(StubDriver(arch))
    return measure(job, arch)


def measure_all(jobs: list[tuple[int, Job]], workers: int) -> Iterator[dict[str, Any] | str]:
    """Figures of every job, or the text of the error it ended in, in order and as they come."""
    _jobs[:] = jobs
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from map(_result, [pool.submit(_measure_number, i) for i in range(len(jobs))])


def _result(future: Future) -> dict[str, Any] | str:
    try:
        return future.result()
    except BrokenProcessPool:
        return "no result: the compiler crashed, here or in a kernel beside this one"
    except Exception as error:  # whatever the compiler raises is this kernel's result
        return f"{type(error).__name__}: {str(error).strip()[-600:]}"


def renewed(budget: dict, arch: int, jobs: dict[str, Job], figures: dict[str, dict]) -> dict:
    """The budget with this architecture's part replaced."""
    kernels = {key: dict(value) for key, value in budget.get("kernels", {}).items()}
    for value in kernels.values():
        value.pop(str(arch), None)
    for key in figures:
        job = jobs[key]
        described = {"constants": job.described, "options": job.launch_options, "cases": sorted(job.cases)}
        kernels.setdefault(key, {}).update(described | {str(arch): entry(figures[key])})
    kept = {key: kernels[key] for key in sorted(kernels) if any(part.isdigit() for part in kernels[key])}
    return {"triton": triton.__version__, "kernels": kept}


def write_budget(path: Path, budget: dict) -> None:
    """One line per kernel and architecture, so that a diff shows what changed."""
    blocks = []
    for key, value in budget["kernels"].items():
        lines = [f"      {json.dumps(name)}: {json.dumps(value[name])}" for name in sorted(value, key=_order)]
        blocks.append(f"    {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n    }")
    text = f'{{\n  "triton": "{budget["triton"]}",\n  "kernels": {{\n' + ",\n".join(blocks) + "\n  }\n}\n"
    json.loads(text)
    path.write_text(text)


def _order(name: str) -> tuple[bool, int, str]:
    return name.isdigit(), int(name) if name.isdigit() else 0, name


def check(arch: int, jobs: dict[str, Job], figures: dict[str, dict], budget: dict, selected: set[str]) -> list[str]:
    """Where this architecture's kernels miss the budget, unlisted and missing ones included."""
    listed = {
        key: value[str(arch)]
        for key, value in budget["kernels"].items()
        if str(arch) in value and selected & set(value["cases"])
    }
    missed = [f"sm_{arch} {key}: not in the budget" for key in jobs if key not in listed]
    missed += [f"sm_{arch} {key}: in the budget, but no case launches it" for key in listed if key not in jobs]
    for key in sorted(figures.keys() & listed.keys()):
        missed += [f"sm_{arch} {key}: {what}" for what in over_budget(figures[key], listed[key])]
    return missed


def report(arch: int, key: str, job: Job, f: dict[str, Any]) -> str:
    """One line of figures."""
    matrix = " ".join(f"{name} {f[name]}" for name in ("hmma", "hgmma", "tcgen05") if f[name])
    return (
        f"sm_{arch:<3} {key:36} reg {f['registers']:3} stack {f['stack']} spills {f['spills']} shared {f['shared']:6} "
        f"instr {f['instructions']:5} ld128 {f['loads128']:3} {matrix} {f['seconds']}s  {job.launch_options}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    parser.add_argument("--case", metavar="PATTERN", default="", help="regular expression of the cases to run")
    parser.add_argument("--cases", default="aot_cases", help="module of the cases, or module:TABLE")
    parser.add_argument("--budget", type=Path, default=BUDGET)
    parser.add_argument(
        "--write", action="store_true", help="renew the budget of each architecture where no rule is broken"
    )
    parser.add_argument("--rules-only", action="store_true", help="leave the budget alone")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if arguments.write and (arguments.case or arguments.rules_only):
        parser.error("--write needs every case and the budget")
    return arguments


def main() -> int:
    """Compile, print, compare; 1 if anything is wrong."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 turns compilation off; unset it")
    arguments = parse_arguments()
    start = time.perf_counter()
    module, _, table = arguments.cases.partition(":")
    every_case = getattr(importlib.import_module(module), table or "CASES")
    cases = {name: case for name, case in every_case.items() if re.search(arguments.case, name)}
    if not cases:
        raise SystemExit(f"no case matches {arguments.case!r}")
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        by_arch, wrong = {}, []
        for arch in arguments.arch:
            by_arch[arch], failed = collect(arch, cases)
            wrong += failed
        todo = [(arch, job) for arch, jobs in by_arch.items() for job in jobs.values()]
        figures: dict[int, dict[str, dict]] = {arch: {} for arch in by_arch}
        for (arch, job), result in zip(todo, measure_all(todo, arguments.workers), strict=True):
            if isinstance(result, str):
                wrong.append(f"sm_{arch} {job.key} ({job.described}): {result}")
                continue
            figures[arch][job.key] = result
            click.echo(report(arch, job.key, job, result))
            wrong += [f"sm_{arch} {job.key} ({job.described}): {rule}" for rule in broken_rules(result, arch)]

    budget = json.loads(arguments.budget.read_text()) if arguments.budget.exists() else {"kernels": {}}
    if arguments.write:
        # the rules are no part of it: whatever breaks one keeps doing so
        for arch, jobs in by_arch.items():
            budget = renewed(budget, arch, jobs, figures[arch])
        write_budget(arguments.budget, budget)
    elif not arguments.rules_only:
        if budget.get("triton") != triton.__version__:
            wrong.append(f"the budget is of Triton {budget.get('triton')}, this is {triton.__version__}")
        for arch, jobs in by_arch.items():
            wrong += check(arch, jobs, figures[arch], budget, set(cases))
    for line in wrong:
        click.echo(f"WRONG {line}")
    click.echo(
        f"Triton {triton.__version__}: {len(todo)} kernels of {len(cases)} cases, {len(wrong)} wrong, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
