"""Builds the kernels for a CPU, a plain shared library in C, loaded through ctypes: no headers of Python or torch.

The extension is optional: where there is no compiler, ssmgen installs without it and says at run time what it misses.
"""

import platform

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """A library without the entry point that a Python module has."""

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def get_ext_filename(self, fullname):
        """Without the tag of one Python version: every version loads the same file."""
        return fullname.replace(".", "/") + ".so"


class AnyPythonWheel(bdist_wheel):
    """The library does not depend on the version of Python: one wheel per platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


arguments = [] if platform.system() == "Windows" else ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-pthread"]
setup(
    ext_modules=[
        Extension(
            "ssmgen.ops._cpu_kernels",
            ["ssmgen/ops/csrc/cpu_kernels.c"],
            depends=[f"ssmgen/ops/csrc/cpu_{part}.h" for part in ("vectors", "scan_kernel", "layers_kernel")],
            extra_compile_args=arguments,
            extra_link_args=[] if platform.system() == "Windows" else ["-pthread", "-lm"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)
