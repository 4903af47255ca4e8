"""OpenBLAS first: a test module that imports mlx before our packages would run on the slow bundled BLAS."""

import agentmem.quant  # noqa: F401
