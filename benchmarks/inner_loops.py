"""Instructions of the kernels' innermost loops, by kind, to check what the heads of the kernel files say.

    python benchmarks/inner_loops.py                                      build the core, print every kernel
    python benchmarks/inner_loops.py --symbol 'Panels.*Avx2' --show       one kernel, with its instructions
    python benchmarks/inner_loops.py --object some.so                     another build that has its symbols

A loop is a jump backwards within a function; an innermost one holds no other. Of each function the loops with the
most vector work are printed: which of them is hot is for the reader to see. An instruction with a memory operand
counts as load or store besides its own kind, so the columns may add up to more than the instructions there are.

How often each is executed, without a clock, valgrind counts. It knows no AVX-512 and shows the program a CPU without
it: that is for the avx2 and portable tiers alone. `make portability` builds the program, which then takes two minutes:

    valgrind --tool=callgrind --callgrind-out-file=callgrind.out build/portability/gcc/core_check avx2
    callgrind_annotate callgrind.out
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "inner_loops"

KINDS = {
    "fma/dot": r"vfn?m(add|sub)|vdpbf16|vpdp|v?(mul|add)[ps][sd]$|fmla|fmul|fadd",
    "shuffle": r"vperm|vp?(expand|compress)|v?p?(shuf|unpck|broadcast|align|insert|extract)|v?pack|v?pmov[sz]x",
}
COLUMNS = ["fma/dot", "shuffle", "load", "store", "other"]
MEMORY = re.compile(r"\(%?[^)]*\)")
VECTOR = re.compile(r"%[xyz]mm")


@dataclass
class Instruction:
    address: int
    name: str
    operands: str

    @property
    def kinds(self) -> set[str]:
        found = {kind for kind, pattern in KINDS.items() if re.match(pattern, self.name)}
        if MEMORY.search(self.operands) and not re.match(r"lea|nop|prefetch|j|call", self.name):
            into = re.split(r",(?![^(]*\))", self.operands)[-1]
            reads_only = re.match(r"v?u?comis|cmp|test|v?ptest", self.name)
            store = MEMORY.search(into) and not reads_only
            found.add("store" if store else "load")
            # A broadcast from memory is done by the load itself.
            if not store and "broadcast" in self.name:
                found.discard("shuffle")
        return found or {"other"}

    @property
    def target(self) -> int | None:
        """Where a jump goes."""
        if self.name.startswith("j") and (m := re.match(r"([0-9a-f]+)\b", self.operands)):
            return int(m[1], 16)
        return None


def functions(path: Path):
    """(name, instructions) of each function of a binary."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(path)]
    name, body = None, []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    ):
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            if body:
                yield name, body
            name, body = head[1], []
        elif m := re.match(
            r"\s+([0-9a-f]+):\s+(?:(?:data16|rep|lock|bnd|notrack|\{\w+\}) )*(\S+)\s*([^#<]*)", line
        ):
            body.append(Instruction(int(m[1], 16), m[2], m[3].strip()))
    if body:
        yield name, body


def innermost_loops(body: list[Instruction]) -> list[list[Instruction]]:
    place = {instruction.address: i for i, instruction in enumerate(body)}
    ranges = {
        (place[jump.target], i)
        for i, jump in enumerate(body)
        if jump.target in place and place[jump.target] <= i
    }
    inner = [
        (first, last)
        for first, last in ranges
        if not any((f, e) != (first, last) and first <= f and e <= last for f, e in ranges)
    ]
    return [body[first : last + 1] for first, last in sorted(inner)]


def count(loop: list[Instruction]) -> Counter:
    return Counter(kind for instruction in loop for kind in instruction.kinds)


def heat(loop: list[Instruction]) -> float:
    """Products first, then a high share of vector instructions that are more than moves; 0 without any."""
    vector = sum(bool(VECTOR.search(i.operands)) and not re.match(r"v?mov", i.name) for i in loop)
    return 4 * count(loop)["fma/dot"] * bool(vector) + vector**2 / len(loop)


def short(name: str) -> str:
    """A symbol without its parameters and what every kernel's has."""
    for noise in ("sparsekern::cpu::", "sparsekern::", "(anonymous namespace)::", "[abi:cxx11]"):
        name = name.replace(noise, "")
    name, clone, _ = name.removeprefix("void ").partition(" [clone")
    depth, at = 0, len(name)
    while name.endswith(")") and at:
        at -= 1
        depth += {")": 1, "(": -1}.get(name[at], 0)
        if depth == 0:
            name = name[:at]
            break
    name += clone and " [clone]"
    return name if len(name) <= 72 else name[:34] + " ... " + name[-33:]


def build() -> Path:
    """The core as it is installed, but with its symbols: in CMake's name, RelWithDebInfo."""
    import pybind11

    for tool in ("cmake", "ninja", "objdump"):
        if shutil.which(tool) is None:
            sys.exit(f"inner_loops: {tool} is missing")
    configure = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        BUILD,
        "-G",
        "Ninja",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
    ]
    configure += [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for command in (configure, ["cmake", "--build", BUILD]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(BUILD.glob("_cpu*.so"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--object", type=Path, help="a binary with symbols, in place of a fresh build"
    )
    parser.add_argument("--symbol", default="", help="only symbols that this pattern is found in")
    parser.add_argument("--loops", type=int, default=3, help="at most so many of a function")
    parser.add_argument("--show", action="store_true", help="print the instructions, too")
    args = parser.parse_args()
    print(f"{'':<72}{'instructions':>13}" + "".join(f"{c:>9}" for c in COLUMNS))
    for name, body in sorted(functions(args.object or build()), key=lambda f: f[0]):
        if "sparsekern" not in name or not re.search(args.symbol, name):
            continue
        loops = [loop for loop in innermost_loops(body) if heat(loop)]
        for loop in sorted(loops, key=heat, reverse=True)[: args.loops]:
            kinds = count(loop)
            print(f"{short(name):<72}{len(loop):>13}" + "".join(f"{kinds[c]:>9}" for c in COLUMNS))
            if args.show:
                for i in loop:
                    print(f"    {i.address:x}  {i.name:<16}{i.operands}")


if __name__ == "__main__":
    main()
