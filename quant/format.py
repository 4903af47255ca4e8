"""KV formats: how many bits a key and a value get, and which rows keep full precision.

A *row* is one token's keys and values of one layer, all heads, as uint32 words. Formats are row-wise: every row can be
packed, moved and attended to without its neighbours. A *packed* row is `[key codes | key scale,bias pairs | value codes |
value scale,bias pairs]`; a *raw* row is `[keys | values]` in 16 bits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import mlx.core as mx

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV geometry of one attention layer: `heads` KV heads, `key_dim` and `value_dim` elements each."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Code:
    """Group-wise affine code: `bits` per element, one 16-bit scale and one 16-bit bias per `group` elements."""

    bits: int
    group: int

    def fits(self, dim: int) -> bool:
        return dim % self.group == 0 and dim * self.bits % WORD_BITS == 0

    def code_words(self, shape_heads: int, dim: int) -> int:
        return shape_heads * dim * self.bits // WORD_BITS

    def scale_words(self, shape_heads: int, dim: int) -> int:
        return shape_heads * dim // self.group


@dataclass(frozen=True, slots=True)
class KVFormat:
    """A named way to hold keys and values.

    `keys`/`values` of None keep 16 bits. `rotation` names the map that keys go through as they enter the cache and queries at
    attention, so that scores do not change: "none", "hadamard" along head_dim, or "calibrated" (static mean, scale per channel,
    then Hadamard; see `agentmem.quant.calibration`). `raw_first_page` keeps the first page, which holds the attention sink, in
    16 bits. The keys of the layers that lose most get `spare_bits`, as long as an element takes no more than `most_bits` in all,
    on average over the layers, scales and biases included.
    """

    name: str
    keys: Code | None
    values: Code | None
    rotation: str = "none"
    raw_first_page: bool = True
    most_bits: float = 0.0
    spare_bits: int = 0

    @property
    def packs(self) -> bool:
        return self.keys is not None and self.values is not None

    @property
    def calibrated(self) -> bool:
        return self.rotation == "calibrated"

    def identity(self) -> dict[str, object]:
        """Every field that changes the bytes of a row, for the fingerprint; who gets spare bits shows in the layers' formats."""
        return {k: v for k, v in asdict(self).items() if k not in ("most_bits", "spare_bits")}

    def for_shape(self, shape: LayerShape) -> KVFormat:
        """This format with groups that divide the layer's head dims (64, else 32); raises ValueError when none fits."""
        if not self.packs:
            return self
        assert self.keys is not None
        assert self.values is not None
        for group in (self.keys.group, 32):
            keys, values = Code(self.keys.bits, group), Code(self.values.bits, group)
            if keys.fits(shape.key_dim) and values.fits(shape.value_dim):
                return replace(self, keys=keys, values=values)
        raise ValueError(
            f"format {self.name!r} needs head dims that are multiples of 32; this model has "
            f"{shape.key_dim}/{shape.value_dim}. Use kv_format 'fp16'."
        )


def _plain(name: str, key_bits: int, value_bits: int, rotation: str = "none") -> KVFormat:
    return KVFormat(name, Code(key_bits, 64), Code(value_bits, 64), rotation)


FORMATS: dict[str, KVFormat] = {
    f.name: f
    for f in (
        replace(_plain("q4", 4, 4, rotation="calibrated"), most_bits=4.7, spare_bits=5),
        replace(_plain("q3", 3, 3, rotation="calibrated"), most_bits=3.8, spare_bits=4),
        _plain("k4v3", 4, 3, rotation="calibrated"),
        _plain("k5v3", 5, 3, rotation="calibrated"),
        _plain("k5v4", 5, 4, rotation="calibrated"),
        _plain("k6v4", 6, 4, rotation="calibrated"),
        _plain("k8v4", 8, 4, rotation="calibrated"),
        _plain("q8", 8, 8, rotation="calibrated"),
        KVFormat("q4-stock", Code(4, 64), Code(4, 64), raw_first_page=False),
        _plain("q4-plain", 4, 4),
        _plain("q4-rotated", 4, 4, rotation="hadamard"),
        _plain("k8v4-plain", 8, 4),
        _plain("q8-plain", 8, 8),
        KVFormat("fp16", None, None),
    )
}


def kv_format(name: str) -> KVFormat:
    """The format called `name`; raises ValueError with the known names."""
    try:
        return FORMATS[name]
    except KeyError:
        raise ValueError(f"unknown kv_format {name!r}; known: {', '.join(sorted(FORMATS))}") from None


def kv_formats(spec: str, layers: int) -> list[KVFormat]:
    """One format for each of a model's layers, as `spec` says: a name for all, or "q4,0=k8v4,29=k8v4" with names for some.

    A model may mix formats that pack with "fp16". Raises ValueError with what is wrong.
    """
    name, *exceptions = [part.strip() for part in spec.split(",")]
    default = kv_format(name)
    formats = [default] * layers
    for part in exceptions:
        number, _, other = part.partition("=")
        if not number.isdecimal() or int(number) >= layers:
            raise ValueError(
                f"kv_format {spec!r}: {part!r} is not like 0=k8v4, for one of the model's layers 0 to {layers - 1}"
            )
        chosen = kv_format(other)
        if chosen.packs and chosen.raw_first_page != default.raw_first_page:
            raise ValueError(f"kv_format {spec!r}: {other} and {name} keep different pages in 16 bits")
        formats[int(number)] = chosen
    if not default.packs and any(f.packs for f in formats):
        raise ValueError(
            f"kv_format {spec!r}: name a format that packs first, and fp16 for the layers that do not"
        )
    return formats


def stored_dtype(compute: mx.Dtype) -> mx.Dtype:
    """The 16-bit type of raw rows and scales: bfloat16 for bfloat16 models (lossless), float16 for all others."""
    return mx.bfloat16 if compute == mx.bfloat16 else mx.float16
