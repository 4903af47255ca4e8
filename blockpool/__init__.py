"""Where the state with a given identity is, and whether it is safe: pages in RAM, extents on disk, the index."""

import agentmem.quant  # noqa: F401  (loads the fast BLAS before mlx)
