"""agentmem: a memory below the prompt for every AI agent on this machine."""

__version__ = "0.1.0"
