"""Benchmarks that print ratios measured in one run."""

import agentmem.quant  # noqa: F401  (loads the fast BLAS before mlx)
