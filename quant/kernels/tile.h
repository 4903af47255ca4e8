// What a warp does with 16 rows. A lane is (row, col) = (0..7, 0..3). product(c, a0, a1, a2, a3, b0, b1): c[16 x 8] += a[16 x 16]
// b[16 x 8], where
//   a0 = a[row][2col..], a1 = a[row + 8][2col..], a2 = a[row][2col + 8..], a3 = a[row + 8][2col + 8..]
//   b0, b1 = operand(b[row][2col..]), operand(b[row + 8][2col..]), in the device's own form
//   c = c[row][2col], c[row][2col + 1], c[row + 8][2col], c[row + 8][2col + 1]
// Scores are keys x queries, with tokens as rows; their result lies as the second product, values x weights, wants its `b`.
// The order of dims and tokens inside a product is free, so each lane loads what lies together in memory. Codes enter the
// products as small integers; scales and biases join behind them, on the scores and on the weights, so that no element is
// dequantised.

#define PACKED 0u
#define RAW 1u
#define TAIL 2u
#define COUNT 0x3fffffffu  // the rows of a run, beside its kind
#define SLACK 4.0f  // how far (in powers of two) weights may grow before the maximum that they refer to is moved

// -- state of a warp --------------------------------------------------------------------------------------------------------

template <class S> struct Result {
  Four out[S::COLUMNS][S::OUTS];
  float bias[S::COLUMNS][2][S::V_GROUPS];
  float top[S::COLUMNS][2], sum[S::COLUMNS][2]; // `sum` and `bias` of this lane's tokens only
};

template <class S> struct Keys {                // a lane's part of 16 rows
  unsigned codes[2][S::K_GROUPS * S::K_WORDS], pairs[2][S::K_GROUPS];
};

template <class S> struct Values {
  unsigned codes[4][S::V_GROUPS * S::V_WORDS], pairs[2][S::V_GROUPS];
};

// Where a lane's part of a packed run begins: one pointer per kind of row it reads, so that all else is a constant offset
struct Places {
  const GLOBAL unsigned *keys, *pairs, *values;
};

template <class S> FN Places places_of(const GLOBAL unsigned* run, unsigned head, unsigned row, unsigned col) {
  Places p;
  p.pairs = run + row * S::ROW_WORDS + S::K_PAIRS_AT + head * S::K_GROUPS;
  p.keys = run + row * S::ROW_WORDS + (S::KB == 3 ? 0u : (head * S::DK + col * (S::KG / 4)) * S::KB / 32);
  p.values = run + 2 * col * S::ROW_WORDS + S::V_CODES_AT;
  if (S::V_BITS == 32) p.values += (head * S::DV + row * S::V_DIMS) * S::VB / 32;
  return p;
}

template <class S> FN void advance(PRIVATE Places& p) {
  p.keys += 16 * S::ROW_WORDS;
  p.pairs += 16 * S::ROW_WORDS;
  p.values += 16 * S::ROW_WORDS;
}

// 16 rows from these places on, of which those behind the run's end may be anything that the slot still holds
template <class S>
FN void load_keys(PRIVATE Keys<S>& t, const Places p, unsigned head, unsigned col) {
  UNROLL for (int x = 0; x < 2; x++) {
    const int at = 8 * x * S::ROW_WORDS;
    UNROLL for (int kg = 0; kg < S::K_GROUPS; kg++) {
      if (S::KB == 3) {
        const unsigned bit = (head * S::DK + kg * S::KG + col * (S::KG / 4)) * 3;
        UNROLL for (int w = 0; w < S::K_WORDS; w++) {
          t.codes[x][kg * S::K_WORDS + w] = bits_at<24>(p.keys + at, bit + 24 * w);
        }
      } else {
        // What is split is taken apart where it is used: until then its words are under way.
        words_at<S::K_READ, S::K_EVEN>(t.codes[x] + kg * S::K_WORDS, p.keys + at + kg * (S::KG * S::KB / 32));
      }
    }
    words_at<S::K_GROUPS, S::K_PAIRS_EVEN>(t.pairs[x], p.pairs + at);
  }
}

template <class S>
FN void load_values(PRIVATE Values<S>& t, const Places p, unsigned head, unsigned row) {
  const GLOBAL unsigned* values = p.pairs + (S::V_PAIRS_AT - S::K_PAIRS_AT) + head * (S::V_GROUPS - S::K_GROUPS);
  UNROLL for (int x = 0; x < 2; x++) {
    words_at<S::V_GROUPS, S::V_PAIRS_EVEN>(t.pairs[x], values + 8 * x * S::ROW_WORDS);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    const GLOBAL unsigned* codes = p.values + (8 * (i / 2) + i % 2) * S::ROW_WORDS;
    UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) {
      UNROLL for (int w = 0; w < S::V_WORDS; w++) {
        if (S::V_BITS == 32) {
          t.codes[i][vg * S::V_WORDS + w] = LOAD(codes + vg * (S::VG * S::VB / 32) + w);
        } else {
          const unsigned bit = (head * S::DV + vg * S::VG + row * S::V_DIMS) * S::VB;
          t.codes[i][vg * S::V_WORDS + w] = bits_at<S::V_BITS>(codes, bit + S::V_BITS * w);
        }
      }
    }
  }
}

// -- one tile ---------------------------------------------------------------------------------------------------------------

// A lane's codes of one group of a row, in order
template <class S> FN void lane_codes(PRIVATE unsigned* to, const PRIVATE unsigned* read, unsigned col) {
  if (S::K_SPLIT) {
    in_fours<S::KB, S::K_READ, S::K_WORDS>(to, read, col * (S::KG / 4) * S::KB % 32);
  } else {
    UNROLL for (int w = 0; w < S::K_WORDS; w++) to[w] = read[w];
  }
}

// Pair p of a chunk of `lane_codes`
template <class S> FN unsigned key_pair(const PRIVATE unsigned* chunk, int p) {
  return S::K_SPLIT ? split_pair<S::KB>(chunk[p / 2], p % 2) : chunk_pair<S::KC>(chunk, p);
}

template <class S>
FN void packed_scores(PRIVATE Four (&s)[S::COLUMNS], const PRIVATE Keys<S>& t, const PRIVATE Query<S>& q,
                      const SHARED_ARGUMENT float* sums, unsigned col) {
  UNROLL for (int c = 0; c < S::COLUMNS; c++) s[c] = Four{{0, 0, 0, 0}};
  UNROLL for (int kg = 0; kg < S::K_GROUPS; kg++) {
    Four sum[S::COLUMNS];
    UNROLL for (int c = 0; c < S::COLUMNS; c++) sum[c] = Four{{0, 0, 0, 0}};
    unsigned codes[2][S::K_WORDS];
    UNROLL for (int x = 0; x < 2; x++) lane_codes<S>(codes[x], t.codes[x] + kg * S::K_WORDS, col);
    UNROLL for (int ch = 0; ch < S::K_CHUNKS; ch++) {
      const int at = ch * (S::K_WORDS / S::K_CHUNKS);
      UNROLL for (int p = 0; p < 4; p += 2) {
        const unsigned a0 = key_pair<S>(codes[0] + at, p), a1 = key_pair<S>(codes[1] + at, p);
        const unsigned a2 = key_pair<S>(codes[0] + at, p + 1), a3 = key_pair<S>(codes[1] + at, p + 1);
        UNROLL for (int c = 0; c < S::COLUMNS; c++) {
          const PRIVATE unsigned* b = q.b[c][kg * S::K_CHUNKS + ch];
          product(sum[c].x, a0, a1, a2, a3, b[p], b[p + 1]);
        }
      }
    }
    UNROLL for (int x = 0; x < 2; x++) {
      const float scale = wide<S::BF>(t.pairs[x][kg]) * CODE_UNIT, bias = wide<S::BF>(t.pairs[x][kg] >> 16);
      UNROLL for (int c = 0; c < S::COLUMNS; c++) {
        UNROLL for (int j = 0; j < 2; j++) {
          s[c].x[2 * x + j] += sum[c].x[2 * x + j] * scale + bias * sums[column_of(c, j, 0) * S::K_GROUPS + kg];
        }
      }
    }
  }
}

// Rows behind the run's end weigh nothing; what lies there must not spoil that by being no number
template <class S> FN void blank(PRIVATE Values<S>& t, unsigned left, unsigned row) {
  UNROLL for (int x = 0; x < 2; x++) {
    if (8 * x + row >= left) {
      UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) t.pairs[x][vg] = 0;
    }
  }
}

// Refer the weights to the maximum of all rows so far
template <class S> FN void raise(PRIVATE Four (&s)[S::COLUMNS], PRIVATE Result<S>& r) {
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    UNROLL for (int j = 0; j < 2; j++) {
      const float top = ROW_MAX(fmaxf(r.top[c][j], fmaxf(s[c].x[j], s[c].x[2 + j])));
      const float shrink = EXP2(r.top[c][j] - top);
      r.top[c][j] = top;
      r.sum[c][j] *= shrink;
      UNROLL for (int g = 0; g < S::V_GROUPS; g++) r.bias[c][j][g] *= shrink;
      UNROLL for (int n = 0; n < S::OUTS; n++) {
        r.out[c][n].x[j] *= shrink;
        r.out[c][n].x[2 + j] *= shrink;
      }
    }
  }
}

// From scores to weights. Those of rows that do not count, or that a column does not see, are nothing.
template <class S>
FN void soften(PRIVATE Four (&s)[S::COLUMNS], PRIVATE Result<S>& r, const SHARED_ARGUMENT unsigned* lows,
               unsigned pos, unsigned first, unsigned rows, unsigned row) {
  bool edge = first + 16 > rows, grew = false;
  UNROLL for (int c = 0; c < S::COLUMNS; c++) edge = edge || pos + first < max(lows[8 * c], lows[8 * c + 1]);
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    UNROLL for (int i = 0; i < 4; i++) {
      const unsigned token = first + 8 * (i / 2) + row;
      if (edge && (token >= rows || pos + token < lows[8 * c + i % 2])) s[c].x[i] = 2 * NOTHING;
      grew = grew || s[c].x[i] > r.top[c][i % 2] + SLACK;
    }
  }
  if (ANY(grew)) raise<S>(s, r);
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    UNROLL for (int i = 0; i < 4; i++) {
      s[c].x[i] = EXP2(s[c].x[i] - r.top[c][i % 2]);
      r.sum[c][i % 2] += s[c].x[i];
    }
  }
}

template <class S>
FN void packed_values(PRIVATE Result<S>& r, const PRIVATE Values<S>& t, const PRIVATE Four (&w)[S::COLUMNS]) {
  UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) {
    unsigned b[S::COLUMNS][2];
    UNROLL for (int x = 0; x < 2; x++) {
      const float scale = wide<S::BF>(t.pairs[x][vg]) * WEIGHT_UNIT, bias = wide<S::BF>(t.pairs[x][vg] >> 16);
      UNROLL for (int c = 0; c < S::COLUMNS; c++) {
        b[c][x] = OPERAND(PACK_HALF(w[c].x[2 * x] * scale, w[c].x[2 * x + 1] * scale));
        UNROLL for (int j = 0; j < 2; j++) r.bias[c][j][vg] += w[c].x[2 * x + j] * bias;
      }
    }
    const int at = vg * S::V_WORDS;
    UNROLL for (int n = 0; n < S::V_DIMS; n += 2) {
      const int values = Half<S::VB>::VALUES, quad = n / 4, part = n % 4 / values, i = n % values;
      const unsigned z0 = quad_halves<S::VB>(t.codes[0] + at, t.codes[1] + at, quad, part);
      const unsigned z1 = quad_halves<S::VB>(t.codes[2] + at, t.codes[3] + at, quad, part);
      UNROLL for (int c = 0; c < S::COLUMNS; c++) {
        product(r.out[c][(vg * S::V_DIMS + n) / 2].x, values_of<S::VB>(z0, i), values_of<S::VB>(z0, i + 1),
                values_of<S::VB>(z1, i), values_of<S::VB>(z1, i + 1), b[c][0], b[c][1]);
      }
    }
  }
}

// N words of a raw row as float16
template <class S, int N> FN void raw_words(PRIVATE unsigned* to, const GLOBAL unsigned* at) {
  UNROLL for (int i = 0; i < N; i += N % 4 ? 2 : 4) {
    if (N % 4) NEAR_TWO(to + i, at + i);
    else NEAR_FOUR(to + i, at + i);
  }
  UNROLL for (int i = 0; i < N; i++) to[i] = as_halves<S::BF>(to[i]);
}

// Rows of a raw run; from row `kept` on they lie elsewhere, because the last is the step's own token's
struct RawRun {
  const GLOBAL unsigned *rows, *fresh;
  unsigned last, kept;
};

// What lies behind the last row is read as the last one
template <class S> FN const GLOBAL unsigned* row_at(const RawRun run, unsigned token) {
  return token >= run.kept ? run.fresh : run.rows + min(token, run.last) * S::RAW_WORDS;
}

template <class S>
FN void raw_scores(PRIVATE Four (&s)[S::COLUMNS], const PRIVATE Query<S>& q, const RawRun run, unsigned first,
                   unsigned head, unsigned row, unsigned col) {
  UNROLL for (int c = 0; c < S::COLUMNS; c++) s[c] = Four{{0, 0, 0, 0}};
  UNROLL for (int kg = 0; kg < S::K_GROUPS; kg++) {
    UNROLL for (int ch = 0; ch < S::K_CHUNKS; ch++) {
      unsigned a[2][4];
      const unsigned dim = key_dim<S>(kg, ch, col);
      UNROLL for (int x = 0; x < 2; x++) {
        raw_words<S, 4>(a[x], row_at<S>(run, first + 8 * x + row) + (head * S::DK + dim) / 2);
      }
      UNROLL for (int p = 0; p < 4; p += 2) {
        UNROLL for (int c = 0; c < S::COLUMNS; c++) {
          const PRIVATE unsigned* b = q.b[c][kg * S::K_CHUNKS + ch];
          product(s[c].x, a[0][p], a[1][p], a[0][p + 1], a[1][p + 1], b[p], b[p + 1]);
        }
      }
    }
  }
}

template <class S>
FN void raw_values(PRIVATE Result<S>& r, const PRIVATE Four (&s)[S::COLUMNS], const RawRun run, unsigned first,
                   unsigned head, unsigned row, unsigned col) {
  unsigned b[S::COLUMNS][2];
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    UNROLL for (int x = 0; x < 2; x++) b[c][x] = OPERAND(PACK_HALF(s[c].x[2 * x], s[c].x[2 * x + 1]));
  }
  UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) {
    unsigned z[4][S::V_DIMS / 2];
    const unsigned dim = vg * S::VG + row * S::V_DIMS;
    UNROLL for (int i = 0; i < 4; i++) {
      const GLOBAL unsigned* at = row_at<S>(run, first + 8 * (i / 2) + 2 * col + i % 2);
      raw_words<S, S::V_DIMS / 2>(z[i], at + (S::H * S::DK + head * S::DV + dim) / 2);
    }
    UNROLL for (int n = 0; n < S::V_DIMS / 2; n++) {
      UNROLL for (int c = 0; c < S::COLUMNS; c++) {
        product(r.out[c][vg * S::V_DIMS / 2 + n].x, (z[0][n] & 0xffffu) | (z[1][n] << 16),
                (z[0][n] >> 16) | (z[1][n] & 0xffff0000u), (z[2][n] & 0xffffu) | (z[3][n] << 16),
                (z[2][n] >> 16) | (z[3][n] & 0xffff0000u), b[c][0], b[c][1]);
      }
    }
  }
}
