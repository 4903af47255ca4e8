"""OpenBLAS first, also where a program of this folder is run without pytest."""

import agentmem.quant  # noqa: F401
