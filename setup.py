"""Runs CMake for the compiled core; everything else is in pyproject.toml.

Needs no torch. Without a C++ compiler the install goes on and the reference back end serves.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake",
            f"-S{Path(__file__).parent.resolve()}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # an isolated build's is gone by the next
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPARSEKERN_CUDA={os.environ.get('SPARSEKERN_CUDA', 'OFF')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)  # a compile error is an error
        built = build / target.name
        if built.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place: a process that has the old one mapped keeps it whole.
            fresh = target.with_suffix(".new")
            self.copy_file(str(built), str(fresh))
            fresh.replace(target)
        elif ext.name.endswith("_cpu"):
            print(
                "sparsekern: no C++ compiler, installing without the compiled kernels",
                file=sys.stderr,
            )
        if ext.name.endswith("_cuda") and not (self.inplace or self.editable_mode):
            self.copy_sources(target.parent / "csrc")

    def copy_sources(self, to: Path) -> None:
        """What NVRTC compiles at first use, next to the modules; in place, the source tree has it."""
        csrc = Path(__file__).parent / "csrc"
        for path in [csrc / "layout.h", *sorted((csrc / "cuda").iterdir())]:
            (to / path.relative_to(csrc)).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(path), str(to / path.relative_to(csrc)))

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


# Optional: without its compiler a module is not there, and nothing is copied.
modules = [Extension(f"sparsekern.{name}", sources=[], optional=True) for name in ("_cpu", "_cuda")]
setup(ext_modules=modules, cmdclass={"build_ext": CMakeBuild})
