// What a step brings along: queries as operands, and the rows of its own tokens. Where MAPS, both go through the key map here.
//
// A map is a product with a Hadamard matrix of a power of two: dims are scaled, then added and subtracted in pairs, one bit of
// the dim after the other. map [H, 3, DK]: scales of queries, scales of keys, what is added to mapped keys.

template <class S> struct Query {
  unsigned b[S::COLUMNS][S::CHUNKS][4];         // pairs of dims, as the rows in hand pair them
};

// Which sequence and query head of the item a column belongs to; `used` columns are real
FN unsigned column_of(int c, int j, unsigned col) { return 8 * c + 2 * col + j; }

// Dims that lane column `col` holds of keys: chunk c of group kg
template <class S> FN unsigned key_dim(int kg, int c, unsigned col) { return kg * S::KG + col * (S::KG / 4) + c * 8; }

// x and its partner: their sum in the lower place, their difference in the upper one
FN void butterfly(PRIVATE float& x, PRIVATE float& y) {
  const float sum = x + y;
  y = x - y;
  x = sum;
}

// A vector of 32 N elements times a Hadamard matrix; the order of its elements in lanes and registers is free.
template <int N> FN void rotate(PRIVATE float (&x)[N], unsigned lane) {
  UNROLL for (int bit = 1; bit < N; bit *= 2) {
    UNROLL for (int i = 0; i < N; i++) {
      if ((i & bit) == 0 && (i | bit) < N) butterfly(x[i], x[i | bit]);
    }
  }
  UNROLL for (int bit = 1; bit < 32; bit *= 2) {
    const float sign = lane & bit ? -1.0f : 1.0f;
    UNROLL for (int i = 0; i < N; i++) x[i] = LANE_OTHER(x[i], bit) + sign * x[i];
  }
}

// Of the elements of a column, per group: from this lane's first column on
template <class S> FN const SHARED_ARGUMENT float* sums_of(const SHARED_ARGUMENT unsigned* held, unsigned col) {
  return (const SHARED_ARGUMENT float*)(held + S::PAIRS * S::DK) + column_of(0, 0, col) * S::K_GROUPS;
}

// First position that a column sees
template <class S> FN const SHARED_ARGUMENT unsigned* lows_of(const SHARED_ARGUMENT unsigned* held, unsigned col) {
  return held + S::PAIRS * S::DK + 2 * S::PAIRS * S::K_GROUPS + column_of(0, 0, col);
}

// The columns of a bundle, laid out by all warps of its group: float16 [DK][8 COLUMNS], the sums of their groups float
// [8 COLUMNS][K_GROUPS], and the first position that each sees. A loop that is not unrolled: each line of code that runs for
// the first time takes as long as a read of memory.
template <class S, int GROUP, class T, class State>
FN void hold_queries(SHARED_ARGUMENT unsigned* held, const GLOBAL T* queries, const GLOBAL float* map,
                     const GLOBAL unsigned* entries, State state, unsigned used, unsigned head, float scale, unsigned warp,
                     unsigned lane) {
  SHARED_ARGUMENT float* sums = (SHARED_ARGUMENT float*)(held + S::PAIRS * S::DK);
  if (warp == 0 && lane < 2 * S::PAIRS) {
    held[S::PAIRS * S::DK + 2 * S::PAIRS * S::K_GROUPS + lane] =
        lane < used ? state[2 * entries[lane / S::R] + 1] : 0u;
  }
  ONE_BY_ONE for (unsigned pair = warp; pair < S::PAIRS; pair += GROUP) {
    float x[2][S::EACH];
    UNROLL for (int j = 0; j < 2; j++) {
      const unsigned n = 2 * pair + j, m = n < used ? n : 0;
      const GLOBAL T* from = queries + ((entries[m / S::R] * S::H + head) * S::R + m % S::R) * S::DK + lane;
      UNROLL for (int i = 0; i < S::EACH; i++) x[j][i] = n < used ? (float)from[32 * i] * scale : 0.0f;
    }
    if (S::MAPS) {
      UNROLL for (int j = 0; j < 2; j++) {
        UNROLL for (int i = 0; i < S::EACH; i++) x[j][i] *= map[3 * head * S::DK + 32 * i + lane];
        rotate<S::EACH>(x[j], lane);
      }
    }
    UNROLL for (int g = 0; g < S::K_GROUPS; g++) {
      float sum[2] = {0, 0};
      UNROLL for (int i = g * S::KG / 32; i < (g + 1) * S::KG / 32; i++) {
        const unsigned halves = two_halves(x[0][i], x[1][i]);
        held[(32 * i + lane) * S::PAIRS + pair] = halves;
        sum[0] += FROM_HALF(halves & 0xffffu);
        sum[1] += FROM_HALF(halves >> 16);
      }
      UNROLL for (int j = 0; j < 2; j++) {
        const float whole = WARP_SUM(sum[j]);
        if (lane == 0) sums[(2 * pair + j) * S::K_GROUPS + g] = whole;
      }
    }
  }
}

// A row of `b` is dim 2col + j of a product's keys: that of lane column row / 2, its pair's half row % 2
template <class S>
FN void load_query(PRIVATE Query<S>& q, const SHARED_ARGUMENT unsigned* held, bool packed, unsigned row, unsigned col) {
  // Where pair p of a chunk lies: of codes of 3 and 4 bits and of raw rows, `step` apart
  const unsigned step = packed ? 1u : 2u;
  unsigned at = key_dim<S>(0, 0, row / 2) + (packed ? row % 2 * second_of<S::KC>(0) : row % 2);
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    UNROLL for (int ch = 0; ch < S::CHUNKS; ch++) {
      const unsigned dim = at + key_dim<S>(ch / S::K_CHUNKS, ch % S::K_CHUNKS, 0);
      UNROLL for (int p = 0; p < 4; p++) {
        const unsigned own = S::KC == 8 && packed ? first_of<8>(p) : step * p;
        unsigned halves = held[(dim + own) * S::PAIRS + 4 * c + col];
        if (unit<S::KC>(p % Half<S::KC>::VALUES) != 1.0f) halves = packed ? SCALED(halves, 1.0f / unit<S::KC>(p % Half<S::KC>::VALUES)) : halves;
        q.b[c][ch][p] = OPERAND(halves);
      }
    }
  }
}

// -- the step's own token -----------------------------------------------------------------------------------------------------

// Its mapped key, as it will be stored: a lane has dims that lie together
template <class S, class T>
FN void keep_mapped(GLOBAL unsigned* words, const GLOBAL T* key, const GLOBAL float* map, unsigned lane) {
  const unsigned at = lane * S::EACH;
  float x[S::EACH];
  UNROLL for (int i = 0; i < S::EACH; i++) x[i] = (float)key[at + i] * map[S::DK + at + i];
  rotate<S::EACH>(x, lane);
  UNROLL for (int i = 0; i + 1 < S::EACH; i += 2) {
    words[(at + i) / 2] =
        two_elements<S::BF>(x[i] + map[2 * S::DK + at + i], x[i + 1] + map[2 * S::DK + at + i + 1]);
  }
}

// The words of one head of its row, as they will be stored; the warp may read them afterwards
template <class S, class T>
FN void keep(GLOBAL unsigned* row, const GLOBAL T* key, const GLOBAL T* value, const GLOBAL float* map, unsigned head,
             unsigned lane) {
  const unsigned key_words = S::MAPS ? 0u : S::DK / 2;
  if (S::MAPS) keep_mapped<S, T>(row + head * S::DK / 2, key, map + 3 * head * S::DK, lane);
  for (unsigned w = lane; w < key_words + S::DV / 2; w += 32) {
    const bool is_key = w < key_words;
    const unsigned at = is_key ? w : w - key_words;
    const GLOBAL T* from = (is_key ? key : value) + 2 * at;
    row[(is_key ? head * S::DK : S::H * S::DK + head * S::DV) / 2 + at] =
        two_elements<S::BF>((float)from[0], (float)from[1]);
  }
  WARP_BARRIER;
}
