"""Models: where they come from, how they are loaded, and how their chat text becomes token ids."""

import agentmem.quant  # noqa: F401  (loads the fast BLAS before mlx)
