"""Episodes: what a long conversation was about, and the part of its attention state that each topic asks for."""

import agentmem.quant  # noqa: F401  (loads the fast BLAS before mlx)
