"""How a stretch of keys and values is held in few bits, and attended to."""

from agentmem.quant import blas

blas.preload()
