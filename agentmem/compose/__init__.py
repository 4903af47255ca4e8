"""Composed reuse: a segment's attention state, moved behind another left context. Approximate, and never stored as exact."""
