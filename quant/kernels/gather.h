// Stored rows and a chunk's own as whole keys and values, and the chunk's rows as they will be stored.
//
// A thread takes 8 elements of one head's key or value of one token. Tokens are packed rows, raw ones, those of the tail, and
// the chunk's, one behind the other. offsets: the word at which each packed or raw row begins.

template <int H, int DK, int DV, int KB, int KG, int VB, int VG, bool BF, class T, class Offsets, class Tail>
FN void gather_rows(const GLOBAL unsigned* arena, Offsets offsets, Tail tail, const GLOBAL T* keys, const GLOBAL T* values,
                    unsigned packed, unsigned raw, unsigned tailed, unsigned fresh, GLOBAL T* all_keys,
                    GLOBAL T* all_values, GLOBAL unsigned* rows, unsigned tid) {
  const unsigned units = (DK + DV) / 8, stored = packed + raw + tailed, total = stored + fresh, raw_words = H * (DK + DV) / 2;
  if (tid >= units * total * H) return;
  const unsigned unit = tid % units, s = tid / units % total, h = tid / (units * total);
  const bool key = unit < DK / 8;
  const unsigned dim = key ? DK : DV, at = 8 * (key ? unit : unit - DK / 8);
  const unsigned raw_word = ((key ? 0 : H * DK) + h * dim + at) / 2;
  float x[8];
  if (s < packed) {
    const unsigned bits = key ? KB : VB, group = key ? KG : VG, mask = (1u << bits) - 1u;
    const unsigned base = offsets[s] + (key ? 0 : H * DK * KB / 32 + H * DK / KG);
    const unsigned first = (h * dim + at) * bits;  // a multiple of 8 bits; codes of 3 bits may lie in two words
    const unsigned pair = arena[base + H * dim * bits / 32 + (h * dim + at) / group];
    const float scale = wide<BF>(pair), bias = wide<BF>(pair >> 16);
    for (unsigned i = 0; i < 8; i++) {
      const unsigned word = base + (first + bits * i) / 32, from = (first + bits * i) % 32;
      unsigned code = arena[word] >> from;
      if (from + bits > 32) code |= arena[word + 1] << (32 - from);
      x[i] = scale * (float)(code & mask) + bias;
    }
  } else if (s < stored) {
    for (unsigned i = 0; i < 4; i++) {
      const unsigned word = s < packed + raw ? arena[offsets[s] + raw_word + i]
                                             : tail[(s - packed - raw) * raw_words + raw_word + i];
      x[2 * i] = wide<BF>(word);
      x[2 * i + 1] = wide<BF>(word >> 16);
    }
  } else {
    const unsigned n = s - stored;
    const GLOBAL T* from = (key ? keys : values) + (h * fresh + n) * dim + at;
    for (unsigned i = 0; i < 8; i++) x[i] = (float)from[i];
    for (unsigned i = 0; i < 4; i++) rows[n * raw_words + raw_word + i] = two_elements<BF>(x[2 * i], x[2 * i + 1]);
  }
  GLOBAL T* to = (key ? all_keys : all_values) + (h * total + s) * dim + at;
  for (unsigned i = 0; i < 8; i++) to[i] = (T)x[i];
}
