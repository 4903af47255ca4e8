"""The engine: one thread that owns MLX, and the objects it steps."""

import agentmem.quant  # noqa: F401  (loads the fast BLAS before mlx)
