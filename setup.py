"""Builds the fused CPU scan. It is a plain shared library in C, loaded through ctypes: no headers of Python or torch.

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


arguments = [] if platform.system() == "Windows" else ["-O3", "-ffp-contract=fast", "-pthread"]
setup(
    ext_modules=[
        Extension(
            "ssmgen.ops._cpu_scan",
            ["ssmgen/ops/csrc/cpu_scan.c"],
            depends=["ssmgen/ops/csrc/cpu_scan_kernel.h"],
            extra_compile_args=arguments,
            extra_link_args=[] if platform.system() == "Windows" else ["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)
