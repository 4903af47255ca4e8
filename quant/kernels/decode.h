// Flash-decoding over stored rows: one body for every device.
//
// A warp takes one KV head of one item. An item is a stretch of runs (rows that lie one behind the other) and the sequences
// that read it. The up to 16 rows of the products are (sequence, query head of this KV head). Codes enter the products as small
// integers; scales and biases join behind them, on the scores and on the weights, so that no element is dequantised.
//
// A lane is (row, col) = (0..7, 0..3) of the 8 x 4 fragment layout that the device's header defines:
//   product(c, a0, a1, a2, a3, b0, b1): c[16 x 8] += a[16 x 16] b[16 x 8], 16-bit times 16-bit into float
//   a0 = a[row][2col..], a1 = a[row + 8][2col..], a2 = a[row][2col + 8..], a3 = a[row + 8][2col + 8..]
//   b0 = b[2col..][row], b1 = b[2col + 8..][row], c = c[row][2col], c[row][2col + 1], c[row + 8][2col], c[row + 8][2col + 1]
// The order of dims and tokens inside a product is free, so each lane loads what lies together in memory.

#define PACKED 0u
#define RAW 1u
#define TAIL 2u

template <int H_, int R_, int DK_, int DV_, int KB_, int KG_, int VB_, int VG_, bool PACKS_, bool BF_, bool WIDE_>
struct DecodeShape {
  enum {
    H = H_, R = R_, DK = DK_, DV = DV_, KB = KB_, KG = KG_, VB = VB_, VG = VG_,
    PACKS = PACKS_, BF = BF_, WIDE = WIDE_, HALVES = WIDE_ ? 2 : 1,
    K_GROUPS = DK / KG, V_GROUPS = DV / VG,
    K_CHUNKS = KG / 32,                       // of 8 dims, per lane and group
    K_WORDS = K_CHUNKS * (KB == 8 ? 2 : 1),   // per lane, group and token
    V_QUADS = VG / 32,                        // of 4 dims, per lane and group
    V_WORDS = VB == 8 ? V_QUADS : 1,
    V_DIMS = VG / 8,
    V_BITS = VB == 8 ? 32 : V_DIMS * VB,      // per word
    K_PAIRS_AT = H * DK * KB / 32,
    V_CODES_AT = K_PAIRS_AT + H * K_GROUPS,
    V_PAIRS_AT = V_CODES_AT + H * DV * VB / 32,
    RAW_WORDS = H * (DK + DV) / 2,
    ROW_WORDS = PACKS ? V_PAIRS_AT + H * V_GROUPS : RAW_WORDS,
    // Where two words may be read at once
    K_EVEN = KB != 3 && ROW_WORDS % 2 == 0 && DK * KB / 32 % 2 == 0 && K_WORDS % 2 == 0,
    K_PAIRS_EVEN = ROW_WORDS % 2 == 0 && K_PAIRS_AT % 2 == 0 && K_GROUPS % 2 == 0,
    V_PAIRS_EVEN = ROW_WORDS % 2 == 0 && V_PAIRS_AT % 2 == 0 && V_GROUPS % 2 == 0
  };
};

struct Four { float x[4]; };

// -- codes ------------------------------------------------------------------------------------------------------------------

// BITS bits of a row that begin at bit `at`
template <int BITS> FN unsigned bits_at(const GLOBAL unsigned* row, unsigned at) {
  const unsigned word = at / 32, shift = at % 32;
  unsigned x = LOAD(row + word) >> shift;
  if (BITS + shift > 32) x |= LOAD(row + word + 1) << (32 - shift);
  return BITS == 32 ? x : x & ((1u << (BITS & 31)) - 1u);
}

// N words; two at a time where they lie at even places
template <int N, bool EVEN> FN void words_at(PRIVATE unsigned* to, const GLOBAL unsigned* from) {
  UNROLL for (int i = 0; i < N; i += EVEN ? 2 : 1) {
    if (EVEN) LOAD_TWO(to + i, from + i);
    else to[i] = LOAD(from + i);
  }
}

// How many values of BITS bits a 16-bit half holds for us
template <int BITS> struct Half { enum { VALUES = BITS == 8 ? 2 : 4 }; };

// Value i of both halves of z as integers times `unit(i)`, in the device's form for products
template <int BITS> FN unsigned values_of(unsigned z, int i) {
  if (BITS == 8) return CODES((i ? z >> 8 : z) & 0x00ff00ffu);
  if (BITS == 4) return CODES((i < 2 ? z : z >> 8) & (i % 2 ? 0x00f000f0u : 0x000f000fu));
  return CODES(i == 3 ? (z >> 9) & 0x00070007u : z & (0x00070007u << (3 * i)));
}

template <int BITS> FN float unit(int i) {
  if (BITS == 4) return i % 2 ? 16.0f : 1.0f;
  if (BITS == 3) return i == 1 ? 8.0f : i == 2 ? 64.0f : 1.0f;
  return 1.0f;
}

// Which two of 8 dims pair p of a chunk holds
template <int BITS> FN unsigned first_of(int p) { return BITS == 8 ? (p / 2) * 4 + p % 2 : p; }
template <int BITS> FN unsigned second_of(int p) { return first_of<BITS>(p) + (BITS == 8 ? 2 : 4); }

// Pair p of a chunk whose words are given
template <int BITS> FN unsigned chunk_pair(const PRIVATE unsigned* words, int p) {
  if (BITS == 8) return values_of<8>(words[p / 2], p % 2);
  if (BITS == 4) return values_of<4>(words[0], p);
  return values_of<3>((words[0] & 0xfffu) | ((words[0] & 0xfff000u) << 4), p);
}

// The half that holds part `part` of quad `quad` of token a, and the same of token b
template <int BITS> FN unsigned quad_halves(const PRIVATE unsigned* a, const PRIVATE unsigned* b, int quad, int part) {
  if (BITS == 8) {
    return part ? (a[quad] >> 16) | (b[quad] & 0xffff0000u) : (a[quad] & 0xffffu) | (b[quad] << 16);
  }
  if (BITS == 4) return quad ? (a[0] >> 16) | (b[0] & 0xffff0000u) : (a[0] & 0xffffu) | (b[0] << 16);
  return ((a[0] >> (12 * quad)) & 0xfffu) | (((b[0] >> (12 * quad)) & 0xfffu) << 16);
}

// -- stored halves ----------------------------------------------------------------------------------------------------------

template <bool BF> FN float wide(unsigned x) { return BF ? AS_FLOAT(x << 16) : FROM_HALF(x & 0xffffu); }
FN float in_half(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }
FN unsigned two_halves(float x, float y) { return PACK_HALF(in_half(x), in_half(y)); }

// Two stored halves as two of float16
template <bool BF> FN unsigned as_halves(unsigned x) { return BF ? two_halves(wide<true>(x), wide<true>(x >> 16)) : x; }

// -- state of a warp --------------------------------------------------------------------------------------------------------

template <class S> struct Query {
  unsigned a[S::HALVES][S::DK / 32][4];   // pairs of dims, as the rows in hand pair them
  float sums[S::HALVES][S::K_GROUPS];     // of a row's elements, per group
};

template <class S> struct Result {
  Four out[S::DV / 8];
  float bias[S::HALVES][S::V_GROUPS];
  float top[S::HALVES], sum[S::HALVES];
  bool packed;                            // whether `out` is in the units of codes
};

template <class S> struct Keys {          // a lane's part of 16 rows
  unsigned codes[2][S::K_GROUPS * S::K_WORDS], pairs[4][S::K_GROUPS];
};

template <class S> struct Values {
  unsigned codes[4][S::V_GROUPS * S::V_WORDS], pairs[4][S::V_GROUPS];
};

// Dims that lane `col` holds of keys: chunk c of group kg
template <class S> FN unsigned key_dim(int kg, int c, unsigned col) { return kg * S::KG + col * (S::KG / 4) + c * 8; }

template <class S, class T>
FN void load_query(PRIVATE Query<S>& q, const GLOBAL T* queries, const GLOBAL unsigned* entries, unsigned used,
                   unsigned head, float scale, bool packed, unsigned row, unsigned col) {
  UNROLL for (int h = 0; h < S::HALVES; h++) {
    const unsigned r = row + 8 * h;
    const bool real = r < used;
    const GLOBAL T* from = queries + ((real ? entries[r / S::R] : 0u) * S::H + head) * (S::R * S::DK) + (r % S::R) * S::DK;
    UNROLL for (int kg = 0; kg < S::K_GROUPS; kg++) {
      float sum = 0;
      UNROLL for (int c = 0; c < S::K_CHUNKS; c++) {
        UNROLL for (int p = 0; p < 4; p++) {
          const unsigned at = key_dim<S>(kg, c, col);
          const float x = real ? scale * (float)from[at + (packed ? first_of<S::KB>(p) : 2 * p)] : 0;
          const float y = real ? scale * (float)from[at + (packed ? second_of<S::KB>(p) : 2 * p + 1)] : 0;
          const float part = packed ? 1.0f / unit<S::KB>(p % Half<S::KB>::VALUES) : 1.0f;
          const unsigned pair = two_halves(x * part, y * part);
          q.a[h][kg * S::K_CHUNKS + c][p] = pair;
          sum += (FROM_HALF(pair & 0xffffu) + FROM_HALF(pair >> 16)) / part;
        }
      }
      q.sums[h][kg] = COL_SUM(sum);
    }
  }
}

// Where a lane's part of a packed run begins: one pointer per kind of row it reads, so that all else is a constant offset
struct Places {
  const GLOBAL unsigned *codes, *values, *pairs;
};

template <class S> FN Places places_of(const GLOBAL unsigned* run, unsigned head, unsigned row, unsigned col) {
  Places p;
  p.codes = run + row * S::ROW_WORDS + (S::KB == 3 ? 0u : (head * S::DK + col * (S::KG / 4)) * S::KB / 32);
  p.pairs = run + 2 * col * S::ROW_WORDS;
  p.values = p.pairs + S::V_CODES_AT + (S::V_BITS == 32 ? (head * S::DV + row * S::V_DIMS) * S::VB / 32 : 0u);
  return p;
}

// 16 rows from `first` on, of which those behind the run's end may be anything that the slot still holds
template <class S> FN void load_keys(PRIVATE Keys<S>& t, const Places p, unsigned first, unsigned head, unsigned col) {
  UNROLL for (int x = 0; x < 2; x++) {
    const GLOBAL unsigned* codes = p.codes + (first + 8 * x) * S::ROW_WORDS;
    UNROLL for (int kg = 0; kg < S::K_GROUPS; kg++) {
      if (S::KB == 3) {
        const unsigned bit = (head * S::DK + kg * S::KG + col * (S::KG / 4)) * 3;
        UNROLL for (int w = 0; w < S::K_WORDS; w++) t.codes[x][kg * S::K_WORDS + w] = bits_at<24>(codes, bit + 24 * w);
      } else {
        words_at<S::K_WORDS, S::K_EVEN>(t.codes[x] + kg * S::K_WORDS, codes + kg * (S::KG * S::KB / 32));
      }
    }
  }
  UNROLL for (int i = 0; i < 4; i++) {
    const GLOBAL unsigned* at = p.pairs + (first + 8 * (i / 2) + i % 2) * S::ROW_WORDS + S::K_PAIRS_AT;
    words_at<S::K_GROUPS, S::K_PAIRS_EVEN>(t.pairs[i], at + head * S::K_GROUPS);
  }
}

template <class S> FN void load_values(PRIVATE Values<S>& t, const Places p, unsigned first, unsigned head, unsigned row) {
  UNROLL for (int i = 0; i < 4; i++) {
    const unsigned at = (first + 8 * (i / 2) + i % 2) * S::ROW_WORDS;
    words_at<S::V_GROUPS, S::V_PAIRS_EVEN>(t.pairs[i], p.pairs + at + S::V_PAIRS_AT + head * S::V_GROUPS);
    UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) {
      UNROLL for (int w = 0; w < S::V_WORDS; w++) {
        if (S::V_BITS == 32) {
          t.codes[i][vg * S::V_WORDS + w] = LOAD(p.values + at + vg * (S::VG * S::VB / 32) + w);
        } else {
          const unsigned bit = (head * S::DV + vg * S::VG + row * S::V_DIMS) * S::VB;
          t.codes[i][vg * S::V_WORDS + w] = bits_at<S::V_BITS>(p.values + at, bit + S::V_BITS * w);
        }
      }
    }
  }
}

// -- one tile ---------------------------------------------------------------------------------------------------------------

template <class S> FN void packed_scores(PRIVATE Four* s, const PRIVATE Keys<S>& t, const PRIVATE Query<S>& q) {
  UNROLL for (int x = 0; x < 2; x++) {
    UNROLL for (int i = 0; i < 4; i++) s[x].x[i] = 0;
    UNROLL for (int kg = 0; kg < S::K_GROUPS; kg++) {
      Four c = {{0, 0, 0, 0}};
      UNROLL for (int ch = 0; ch < S::K_CHUNKS; ch++) {
        const int at = kg * S::K_CHUNKS + ch;
        const PRIVATE unsigned* words = t.codes[x] + kg * S::K_WORDS + ch * (S::K_WORDS / S::K_CHUNKS);
        UNROLL for (int p = 0; p < 4; p += 2) {
          product(c.x, q.a[0][at][p], S::WIDE ? q.a[S::HALVES - 1][at][p] : 0u,
                  q.a[0][at][p + 1], S::WIDE ? q.a[S::HALVES - 1][at][p + 1] : 0u,
                  chunk_pair<S::KB>(words, p), chunk_pair<S::KB>(words, p + 1));
        }
      }
      UNROLL for (int j = 0; j < 2; j++) {
        const unsigned pair = t.pairs[2 * x + j][kg];
        const float scale = wide<S::BF>(pair) * CODE_UNIT, bias = wide<S::BF>(pair >> 16);
        UNROLL for (int h = 0; h < S::HALVES; h++) s[x].x[2 * h + j] += c.x[2 * h + j] * scale + bias * q.sums[h][kg];
      }
    }
  }
}

// Rows behind the run's end weigh nothing; what lies there must not spoil that by being no number
template <class S> FN void blank(PRIVATE Values<S>& t, unsigned left, unsigned col) {
  UNROLL for (int i = 0; i < 4; i++) {
    if (8 * (i / 2) + 2 * col + i % 2 >= left) {
      UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) t.pairs[i][vg] = 0;
    }
  }
}

// From scores to weights, with the running maximum; out and sums are rescaled where it grew
template <class S> FN void soften(PRIVATE Four* s, PRIVATE Result<S>& r, const PRIVATE unsigned* lows, unsigned pos,
                                  unsigned first, unsigned rows, unsigned col) {
  float shrink[S::HALVES];
  bool grew = false;
  UNROLL for (int h = 0; h < S::HALVES; h++) {
    if (first + 16 > rows || pos + first < lows[h]) {
      UNROLL for (int i = 0; i < 4; i++) {
        const unsigned token = first + 8 * (i / 2) + 2 * col + i % 2;
        if (token >= rows || pos + token < lows[h]) s[i / 2].x[2 * h + i % 2] = 2 * NOTHING;
      }
    }
    float top = r.top[h];
    UNROLL for (int i = 0; i < 4; i++) top = fmaxf(top, s[i / 2].x[2 * h + i % 2]);
    top = COL_MAX(top);
    grew = grew || top > r.top[h];
    shrink[h] = EXP2(r.top[h] - top);
    r.top[h] = top;
  }
  if (ANY(grew)) {
    UNROLL for (int h = 0; h < S::HALVES; h++) {
      r.sum[h] *= shrink[h];
      UNROLL for (int g = 0; g < S::V_GROUPS; g++) r.bias[h][g] *= shrink[h];
      UNROLL for (int n = 0; n < S::DV / 8; n++) {
        r.out[n].x[2 * h] *= shrink[h];
        r.out[n].x[2 * h + 1] *= shrink[h];
      }
    }
  }
  UNROLL for (int h = 0; h < S::HALVES; h++) {
    UNROLL for (int i = 0; i < 4; i++) {
      PRIVATE float& score = s[i / 2].x[2 * h + i % 2];
      score = EXP2(score - r.top[h]);
      r.sum[h] += score;
    }
  }
}

// c += weights x values, where only the first 8 rows count unless the shape is wide
template <class S> FN void weigh(PRIVATE Four& c, const PRIVATE unsigned (&a)[2][2], unsigned b0, unsigned b1) {
  if (S::WIDE) {
    product(c.x, a[0][0], a[1][0], a[0][1], a[1][1], b0, b1);
  } else {
    Four whole = {{c.x[0], c.x[1], 0, 0}};
    product(whole.x, a[0][0], 0u, a[0][1], 0u, b0, b1);
    c.x[0] = whole.x[0];
    c.x[1] = whole.x[1];
  }
}

template <class S> FN void packed_values(PRIVATE Result<S>& r, const PRIVATE Values<S>& t, const PRIVATE Four* w) {
  UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) {
    float scale[4], bias[4];
    UNROLL for (int i = 0; i < 4; i++) {
      scale[i] = wide<S::BF>(t.pairs[i][vg]) * WEIGHT_UNIT;
      bias[i] = wide<S::BF>(t.pairs[i][vg] >> 16);
    }
    unsigned a[2][2] = {{0, 0}, {0, 0}};
    UNROLL for (int h = 0; h < S::HALVES; h++) {
      UNROLL for (int x = 0; x < 2; x++) {
        const float p = w[x].x[2 * h], y = w[x].x[2 * h + 1];
        a[h][x] = PACK_HALF(p * scale[2 * x], y * scale[2 * x + 1]);
        r.bias[h][vg] += p * bias[2 * x] + y * bias[2 * x + 1];
      }
    }
    const int at = vg * S::V_WORDS;
    UNROLL for (int n = 0; n < S::V_DIMS; n++) {
      const int values = Half<S::VB>::VALUES, quad = n / 4, part = n % 4 / values, i = n % values;
      const unsigned b0 = quad_halves<S::VB>(t.codes[0] + at, t.codes[1] + at, quad, part);
      const unsigned b1 = quad_halves<S::VB>(t.codes[2] + at, t.codes[3] + at, quad, part);
      weigh<S>(r.out[vg * S::V_DIMS + n], a, values_of<S::VB>(b0, i), values_of<S::VB>(b1, i));
    }
  }
}

template <class S> FN void raw_tile(PRIVATE Result<S>& r, const PRIVATE Query<S>& q, const GLOBAL unsigned* run,
                                    const PRIVATE unsigned* lows, unsigned pos, unsigned rows, unsigned first,
                                    unsigned head, unsigned row, unsigned col) {
  Four s[2] = {{{0, 0, 0, 0}}, {{0, 0, 0, 0}}};
  UNROLL for (int x = 0; x < 2; x++) {
    const unsigned token = min(first + 8 * x + row, rows - 1);
    const GLOBAL unsigned* keys = run + token * S::RAW_WORDS + head * S::DK / 2;
    UNROLL for (int kg = 0; kg < S::K_GROUPS; kg++) {
      UNROLL for (int ch = 0; ch < S::K_CHUNKS; ch++) {
        const GLOBAL unsigned* from = keys + key_dim<S>(kg, ch, col) / 2;
        const int at = kg * S::K_CHUNKS + ch;
        UNROLL for (int p = 0; p < 4; p += 2) {
          product(s[x].x, q.a[0][at][p], S::WIDE ? q.a[S::HALVES - 1][at][p] : 0u,
                  q.a[0][at][p + 1], S::WIDE ? q.a[S::HALVES - 1][at][p + 1] : 0u,
                  as_halves<S::BF>(LOAD(from + p)), as_halves<S::BF>(LOAD(from + p + 1)));
        }
      }
    }
  }
  soften<S>(s, r, lows, pos, first, rows, col);
  unsigned a[2][2] = {{0, 0}, {0, 0}};
  UNROLL for (int h = 0; h < S::HALVES; h++) {
    UNROLL for (int x = 0; x < 2; x++) a[h][x] = PACK_HALF(s[x].x[2 * h], s[x].x[2 * h + 1]);
  }
  UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) {
    UNROLL for (int n = 0; n < S::V_DIMS; n += 2) {
      unsigned z[4];
      UNROLL for (int i = 0; i < 4; i++) {
        const unsigned token = min(first + 8 * (i / 2) + 2 * col + i % 2, rows - 1);
        const unsigned dim = S::H * S::DK + head * S::DV + vg * S::VG + row * S::V_DIMS + n;
        z[i] = as_halves<S::BF>(LOAD(run + token * S::RAW_WORDS + dim / 2));
      }
      const int at = vg * S::V_DIMS + n;
      weigh<S>(r.out[at], a, (z[0] & 0xffffu) | (z[1] << 16), (z[2] & 0xffffu) | (z[3] << 16));
      weigh<S>(r.out[at + 1], a, (z[0] >> 16) | (z[1] & 0xffff0000u), (z[2] >> 16) | (z[3] & 0xffff0000u));
    }
  }
}

// -- one item ---------------------------------------------------------------------------------------------------------------

// `out` in the units of codes and weights, or in plain ones
template <class S> FN void turn_to(PRIVATE Result<S>& r, bool packed) {
  if (r.packed == packed) return;
  UNROLL for (int n = 0; n < S::DV / 8; n++) {
    const float factor = OUT_UNIT / unit<S::VB>(n % S::V_DIMS % Half<S::VB>::VALUES);
    UNROLL for (int i = 0; i < 2 * S::HALVES; i++) r.out[n].x[i] *= packed ? 1.0f / factor : factor;
  }
  r.packed = packed;
}

template <class S> FN void store(const PRIVATE Result<S>& r, GLOBAL float* partial, GLOBAL float* stats, unsigned entry,
                                 unsigned used, unsigned head, unsigned row, unsigned col) {
  UNROLL for (int h = 0; h < S::HALVES; h++) {
    const float sum = COL_SUM(r.sum[h]);
    float bias[S::V_GROUPS];
    UNROLL for (int g = 0; g < S::V_GROUPS; g++) bias[g] = COL_SUM(r.bias[h][g]);
    const unsigned q = row + 8 * h;
    if (q >= used) continue;
    const unsigned at = ((entry + q / S::R) * S::H + head) * S::R + q % S::R;
    if (col == 0) {
      stats[2 * at] = r.top[h];
      stats[2 * at + 1] = sum;
    }
    UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) {
      UNROLL for (int j = 0; j < 2; j++) {
        UNROLL for (int n = 0; n < S::V_DIMS; n++) {
          const unsigned dim = vg * S::VG + (2 * col + j) * S::V_DIMS + n;
          partial[at * S::DV + dim] = r.out[vg * S::V_DIMS + n].x[2 * h + j] + bias[vg];
        }
      }
    }
  }
}

// items [n, 5]: first run, end run, first entry, end entry, position of the first row. entries: sequence of each.
// runs [n, 2]: first word, rows | kind << 30. state [sequences, 2]: rows of its tail, first position that it sees.
template <class S, class T>
FN void flash_decode(const GLOBAL T* queries, const GLOBAL unsigned* arena, const GLOBAL unsigned* tails,
                     const GLOBAL unsigned* items, const GLOBAL unsigned* entries, const GLOBAL unsigned* runs,
                     const GLOBAL unsigned* state, float scale, unsigned count, GLOBAL float* partial,
                     GLOBAL float* stats, unsigned warp, unsigned row, unsigned col) {
  const unsigned item = warp / S::H, head = warp % S::H;
  if (item >= count) return;
  const unsigned first_run = items[5 * item], end_run = items[5 * item + 1];
  const unsigned entry = items[5 * item + 2], used = (items[5 * item + 3] - entry) * S::R;
  unsigned pos = items[5 * item + 4];
  Query<S> q;
  Result<S> r;
  unsigned lows[S::HALVES];
  UNROLL for (int h = 0; h < S::HALVES; h++) {
    lows[h] = row + 8 * h < used ? state[2 * entries[entry + (row + 8 * h) / S::R] + 1] : 0u;
    r.top[h] = NOTHING;
    r.sum[h] = 0;
    UNROLL for (int g = 0; g < S::V_GROUPS; g++) r.bias[h][g] = 0;
  }
  UNROLL for (int n = 0; n < S::DV / 8; n++) UNROLL for (int i = 0; i < 4; i++) r.out[n].x[i] = 0;
  r.packed = false;
  bool loaded = false, packed = false;
  for (unsigned i = first_run; i < end_run; i++) {
    const unsigned kind = runs[2 * i + 1] >> 30;
    const unsigned rows = kind == TAIL ? state[2 * entries[entry]] : runs[2 * i + 1] & 0x3fffffffu;
    const GLOBAL unsigned* run = (kind == TAIL ? tails : arena) + runs[2 * i];
    if (rows == 0) continue;
    if (!loaded || packed != (kind == PACKED)) {
      packed = kind == PACKED;
      load_query<S, T>(q, queries, entries + entry, used, head, scale, packed, row, col);
      turn_to<S>(r, packed);
      loaded = true;
    }
    if (S::PACKS && packed) {
      const Places places = places_of<S>(run, head, row, col);
      Keys<S> keys;
      Values<S> values;
      load_keys<S>(keys, places, 0, head, col);
      load_values<S>(values, places, 0, head, row);
      for (unsigned first = 0; first < rows; first += 16) {
        Four s[2];
        packed_scores<S>(s, keys, q);
        if (first + 16 < rows) load_keys<S>(keys, places, first + 16, head, col);
        soften<S>(s, r, lows, pos, first, rows, col);
        if (first + 16 > rows) blank<S>(values, rows - first, col);
        packed_values<S>(r, values, s);
        if (first + 16 < rows) load_values<S>(values, places, first + 16, head, row);
      }
    } else {
      for (unsigned first = 0; first < rows; first += 16) {
        raw_tile<S>(r, q, run, lows, pos, rows, first, head, row, col);
      }
    }
    pos += rows;
  }
  turn_to<S>(r, false);
  store<S>(r, partial, stats, entry, used, head, row, col);
}
