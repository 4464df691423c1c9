"""Builds the one C++ extension. Everything else about the package is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "fastdiff._native",
            sources=sorted(map(str, Path("csrc").glob("*.cpp"))),  # sorted: same bytes from every build
            depends=sorted(map(str, Path("csrc").glob("*.hpp"))),  # puts headers in the sdist, rebuilds on edit
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ]
)
