"""The plugin and `compress_methods` spell names that both need in the same way."""

from __future__ import annotations

import subprocess
import sys

from compress_methods.checkpoint import quantization_config
from compress_methods.kernels.cpu import build
from vllm_compress import names


def test_names_are_those_of_compress_methods() -> None:
    assert names.QUANT_METHOD == quantization_config.QUANT_METHOD
    assert (names.CACHE_VARIABLE, names.ISA_VARIABLE) == (build.CACHE_VARIABLE, build.ISA_VARIABLE)


def test_names_load_nothing() -> None:
    program = "import sys; import vllm_compress.names; print({'torch', 'vllm'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout == b"set()\n"
