// What the bodies share. MLX puts an array of fewer than 8 elements into Metal's constant memory: where one may be as small, the
// type of its pointer is a parameter of the template. Words that Metal reserves (thread, half, kernel...) name nothing.
//
// 16-bit elements as raw rows and the scales of packed ones have them: float16, or bfloat16 (BF).

template <bool BF> FN float wide(unsigned x) { return BF ? AS_FLOAT(x << 16) : FROM_HALF(x & 0xffffu); }

// The nearest bfloat16, in the upper half of the word; of two that are as near the even one
FN unsigned narrow(float x) { return (AS_UINT(x) + 0x7fffu + ((AS_UINT(x) >> 16) & 1u)) & 0xffff0000u; }

// Two elements in a word
template <bool BF> FN unsigned two_elements(float x, float y) {
  return BF ? (narrow(x) >> 16) | narrow(y) : PACK_HALF(x, y);
}
