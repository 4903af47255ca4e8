"""How agent frameworks name their agents to the daemon. Importable without MLX."""
