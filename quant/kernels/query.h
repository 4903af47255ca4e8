// What a step brings along: queries as operands, and the rows of its own tokens. Where MAPS, both go through the key map here.
//
// A map is a product with a Hadamard matrix of a power of two: dims are scaled, then added and subtracted in pairs, one bit of
// the dim after the other, whether that bit tells registers or lanes apart. map [H, 3, DK]: scales of queries, scales of keys,
// what is added to mapped keys.

template <class S> struct Query {
  unsigned b[S::COLUMNS][S::CHUNKS][4];         // pairs of dims, as the rows in hand pair them
  float sums[S::COLUMNS][2][S::K_GROUPS];       // of a column's elements, per group
};

// Which sequence and query head of the item a column belongs to; `used` columns are real
FN unsigned column_of(int c, int j, unsigned col) { return 8 * c + 2 * col + j; }

// Dims that lane column `col` holds of keys: chunk c of group kg
template <class S> FN unsigned key_dim(int kg, int c, unsigned col) { return kg * S::KG + col * (S::KG / 4) + c * 8; }

template <class T> struct alignas(16) Eight { T x[8]; };

// x and its partner: their sum in the lower place, their difference in the upper one
FN void butterfly(PRIVATE float& x, PRIVATE float& y) {
  const float sum = x + y;
  y = x - y;
  x = sum;
}

// A column of a query lies in the registers [CHUNKS][4] of the 8 lanes that share `col`.
template <class S> FN void rotate_query(PRIVATE float (&x)[S::CHUNKS][4], unsigned row) {
  UNROLL for (int c = 0; c < S::CHUNKS; c++) {
    butterfly(x[c][0], x[c][1]);
    butterfly(x[c][2], x[c][3]);
    butterfly(x[c][0], x[c][2]);
    butterfly(x[c][1], x[c][3]);
  }
  UNROLL for (int bit = 1; bit < S::CHUNKS; bit *= 2) {
    UNROLL for (int c = 0; c < S::CHUNKS; c++) {
      if ((c & bit) == 0 && (c | bit) < S::CHUNKS) {
        UNROLL for (int p = 0; p < 4; p++) butterfly(x[c][p], x[c | bit][p]);
      }
    }
  }
  UNROLL for (int bit = 1; bit < 8; bit *= 2) {
    UNROLL for (int c = 0; c < S::CHUNKS; c++) {
      UNROLL for (int p = 0; p < 4; p++) {
        const float other = ROW_OTHER(x[c][p], bit);
        x[c][p] = row & bit ? other - x[c][p] : x[c][p] + other;
      }
    }
  }
}

// A row of `b` is dim 2col + j of a product's keys: that of lane column row / 2, its pair's half row % 2
template <class S, class T, class Entries>
FN void load_query(PRIVATE Query<S>& q, const GLOBAL T* queries, const GLOBAL float* map, Entries entries, unsigned used,
                   unsigned head, float scale, bool packed, unsigned row, unsigned col) {
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    float live[2], x[2][S::CHUNKS][4];
    UNROLL for (int j = 0; j < 2; j++) {
      const unsigned n = column_of(c, j, col), m = n < used ? n : 0;
      const GLOBAL T* from = queries + ((entries[m / S::R] * S::H + head) * S::R + m % S::R) * S::DK;
      live[j] = n < used ? scale : 0.0f;
      UNROLL for (int ch = 0; ch < S::CHUNKS; ch++) {
        const unsigned dim = key_dim<S>(ch / S::K_CHUNKS, ch % S::K_CHUNKS, row / 2);
        const Eight<T> all = *(const GLOBAL Eight<T>*)(from + dim);
        UNROLL for (int p = 0; p < 4; p++) {
          const unsigned first = packed ? first_of<S::KB>(p) : 2u * p, second = packed ? second_of<S::KB>(p) : 2u * p + 1u;
          x[j][ch][p] = row % 2 ? (float)all.x[second] : (float)all.x[first];
          if (S::MAPS) x[j][ch][p] *= map[3 * head * S::DK + dim + (row % 2 ? second : first)];
        }
      }
    }
    if (S::MAPS) {
      UNROLL for (int j = 0; j < 2; j++) rotate_query<S>(x[j], row);
    }
    UNROLL for (int kg = 0; kg < S::K_GROUPS; kg++) {
      float sums[2] = {0, 0};
      UNROLL for (int ch = kg * S::K_CHUNKS; ch < (kg + 1) * S::K_CHUNKS; ch++) {
        UNROLL for (int p = 0; p < 4; p++) {
          const float whole = unit<S::KB>(p % Half<S::KB>::VALUES), part = packed ? 1.0f / whole : 1.0f;
          const unsigned pair = two_halves(x[0][ch][p] * live[0] * part, x[1][ch][p] * live[1] * part);
          q.b[c][ch][p] = OPERAND(pair);
          sums[0] += FROM_HALF(pair & 0xffffu) * (packed ? whole : 1.0f);
          sums[1] += FROM_HALF(pair >> 16) * (packed ? whole : 1.0f);
        }
      }
      UNROLL for (int j = 0; j < 2; j++) q.sums[c][j][kg] = ROW_SUM(sums[j]);
    }
  }
}

// -- the step's own token -----------------------------------------------------------------------------------------------------

// Its mapped key, as it will be stored: a lane has dims that lie together
template <class S, class T>
FN void keep_mapped(GLOBAL unsigned* words, const GLOBAL T* key, const GLOBAL float* map, unsigned lane) {
  enum { EACH = S::DK / 32 };
  const unsigned at = lane * EACH;
  float x[EACH];
  UNROLL for (int i = 0; i < EACH; i++) x[i] = (float)key[at + i] * map[S::DK + at + i];
  UNROLL for (int bit = 1; bit < EACH; bit *= 2) {
    UNROLL for (int i = 0; i < EACH; i++) {
      if ((i & bit) == 0 && (i | bit) < EACH) butterfly(x[i], x[i | bit]);
    }
  }
  UNROLL for (int bit = 1; bit < 32; bit *= 2) {
    UNROLL for (int i = 0; i < EACH; i++) {
      const float other = LANE_OTHER(x[i], bit);
      x[i] = lane & bit ? other - x[i] : x[i] + other;
    }
  }
  UNROLL for (int i = 0; i + 1 < EACH; i += 2) {
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
