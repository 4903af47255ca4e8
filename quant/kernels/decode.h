// Flash-decoding over stored rows: one body for every device.
//
// A group takes one KV head of one bundle, a warp of it one item: a stretch of runs of one kind (rows that lie one behind the
// other), packed or not. All items of a bundle are read for the same sequences. The columns of the products, 8 or 16, are
// (sequence, query head of this KV head). A group merges what its warps found into one entry for each column; the group that
// is the last to be done with a sequence merges its entries, where the device lets groups see what others wrote.

// -- one item ---------------------------------------------------------------------------------------------------------------

// Nothing read yet
template <class S> FN void clear(PRIVATE Result<S>& r) {
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    UNROLL for (int j = 0; j < 2; j++) {
      r.top[c][j] = NOTHING;
      r.sum[c][j] = 0;
      UNROLL for (int g = 0; g < S::V_GROUPS; g++) r.bias[c][j][g] = 0;
    }
    UNROLL for (int n = 0; n < S::OUTS; n++) r.out[c][n] = Four{{0, 0, 0, 0}};
  }
}

// `out` from the units of codes and weights to plain ones
template <class S> FN void decode_units(PRIVATE Result<S>& r) {
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    UNROLL for (int n = 0; n < S::OUTS; n++) {
      UNROLL for (int i = 0; i < 4; i++) {
        r.out[c][n].x[i] *= OUT_UNIT / unit<S::VB>((2 * n + i / 2) % S::V_DIMS % Half<S::VB>::VALUES);
      }
    }
  }
}

template <class S>
FN void packed_run(PRIVATE Result<S>& r, const PRIVATE Query<S>& q, const SHARED_ARGUMENT unsigned* held,
                   const GLOBAL unsigned* run, unsigned pos, unsigned rows, unsigned head, unsigned row, unsigned col) {
  Places next = places_of<S>(run, head, row, col);
  Keys<S> keys;
  Values<S> values;
  load_keys<S>(keys, next, head, col);
  load_values<S>(values, next, head, row);
  for (unsigned first = 0; first < rows; first += 16) {
    Four s[S::COLUMNS];
    packed_scores<S>(s, keys, q, sums_of<S>(held, col), col);
    advance<S>(next);
    if (first + 16 < rows) load_keys<S>(keys, next, head, col);
    soften<S>(s, r, lows_of<S>(held, col), pos, first, rows, row);
    if (first + 16 > rows) blank<S>(values, rows - first, row);
    packed_values<S>(r, values, s);
    if (first + 16 < rows) load_values<S>(values, next, head, row);
  }
}

// A run of raw rows, and how many it has. The last row of a tail is the step's own token's, kept as it will be stored.
template <class S, class T, class State>
FN unsigned raw_run(PRIVATE Result<S>& r, const GLOBAL T* keys, const GLOBAL T* values, const GLOBAL float* map,
                    const PRIVATE Query<S>& q, const SHARED_ARGUMENT unsigned* held, const GLOBAL unsigned* run,
                    const GLOBAL unsigned* tails, unsigned field, unsigned pos, unsigned sequence, State state,
                    GLOBAL unsigned* rows_out, unsigned head, unsigned lane, unsigned row, unsigned col) {
  unsigned rows = field & COUNT, kept = ~0u;
  if (field >> 30 == TAIL) {
    const unsigned there = state[2 * sequence], begin = rows & 0x7fffu, stop = min(there, begin + (rows >> 15));
    if (stop <= begin) return 0;
    run = tails + begin * S::RAW_WORDS;
    rows = stop - begin;
    if (stop == there) {
      kept = rows - 1;
      const unsigned token = sequence * S::H + head;
      keep<S, T>(rows_out + sequence * S::RAW_WORDS, keys + token * S::DK, values + token * S::DV, map, head, lane);
    }
  }
  const RawRun raw = {run, rows_out + sequence * S::RAW_WORDS, rows - 1, kept};
  for (unsigned first = 0; first < rows; first += 16) {
    Four s[S::COLUMNS];
    raw_scores<S>(s, q, raw, first, head, row, col);
    soften<S>(s, r, lows_of<S>(held, col), pos, first, rows, row);
    raw_values<S>(r, s, raw, first, head, row, col);
  }
  return rows;
}

// -- one bundle -------------------------------------------------------------------------------------------------------------

// Columns 8 c + 4 upper and the three behind it, as [4][DV] floats, and behind them (maximum, sum) of each
template <class S>
FN void lay_out(const PRIVATE Result<S>& r, SHARED_ARGUMENT float* to, int c, unsigned upper, unsigned row, unsigned col) {
  UNROLL for (int j = 0; j < 2; j++) {
    const float sum = ROW_SUM(r.sum[c][j]);
    float bias[S::V_GROUPS];
    UNROLL for (int g = 0; g < S::V_GROUPS; g++) bias[g] = ROW_SUM(r.bias[c][j][g]);
    if (col / 2 != upper) continue;
    const unsigned k = 2 * (col % 2) + j;
    if (row == 0) {
      to[4 * S::DV + 2 * k] = r.top[c][j];
      to[4 * S::DV + 2 * k + 1] = sum;
    }
    UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) {
      UNROLL for (int d = 0; d < S::V_DIMS; d++) {
        to[k * S::DV + vg * S::VG + row * S::V_DIMS + d] = r.out[c][(vg * S::V_DIMS + d) / 2].x[2 * (d % 2) + j] + bias[vg];
      }
    }
  }
}

// What all warps laid out of columns `from` to `from` + 3, merged, as entries
template <class S, int GROUP>
FN void merge(const SHARED_ARGUMENT float* laid, GLOBAL float* partial, GLOBAL float* stats, unsigned entry, unsigned used,
              unsigned from, unsigned head, unsigned tid) {
  ONE_BY_ONE for (unsigned x = 4 * tid; x < 4 * S::DV; x += 4 * 32 * GROUP) {
    const unsigned k = x / S::DV, n = from + k;
    if (n >= used) return;
    float top = NOTHING, sum = 0, value[4] = {0, 0, 0, 0};
    UNROLL for (int w = 0; w < GROUP; w++) top = fmaxf(top, laid[w * S::LAID_WORDS + 4 * S::DV + 2 * k]);
    UNROLL for (int w = 0; w < GROUP; w++) {
      const SHARED_ARGUMENT float* its = laid + w * S::LAID_WORDS;
      const float weight = EXP2(its[4 * S::DV + 2 * k] - top);
      sum += weight * its[4 * S::DV + 2 * k + 1];
      UNROLL for (int i = 0; i < 4; i++) value[i] += weight * its[x + i];
    }
    const unsigned at = ((entry + n / S::R) * S::H + head) * S::R + n % S::R;
    STORE_FOUR(partial + at * S::DV + x % S::DV, value);
    if (x % S::DV == 0) {
      stats[2 * at] = top;
      stats[2 * at + 1] = sum;
    }
  }
}

// keys, values [sequences, H, DK or DV]: of the step's own tokens, the last row of each tail; `rows_out` is how they are stored.
// state [sequences, 2]: rows of a sequence's tail, first position that it sees. map: see query.h. sinks [H * R], where any are.
// settings: the bits of the scale, the word at which the layer's tails begin. arrivals [sequences, H]: zeros, before and after.
// partial: entries [room, H * R, DV], and behind them their (maximum, sum). held: the group's, 16-byte aligned.
template <class S, int GROUP, class T, class State, class Settings, class Sinks>
FN void flash_decode(const GLOBAL T* queries, const GLOBAL T* keys, const GLOBAL T* values, const GLOBAL float* map,
                     const GLOBAL unsigned* arena, const GLOBAL unsigned* tails, const GLOBAL unsigned* plan, State state,
                     Settings settings, Sinks sinks, bool sunk, GLOBAL unsigned* arrivals, GLOBAL float* partial,
                     GLOBAL unsigned* rows_out, GLOBAL T* out, SHARED_ARGUMENT unsigned* held, unsigned group, unsigned tid,
                     unsigned lane, unsigned row, unsigned col) {
  const unsigned warp = tid / 32, head = group % S::H;
  const GLOBAL unsigned* item = plan + ITEMS_AT + 5 * (group / S::H * GROUP + warp);
  Result<S> r;
  {
    const GLOBAL unsigned* sequences = plan + plan[ENTRIES_AT] + item[2];
    const GLOBAL unsigned* runs = plan + plan[RUNS_AT];
    const unsigned i = item[0], end = item[1];
    const bool packed = S::PACKS && i < end && runs[2 * i + 1] >> 30 == PACKED;
    hold_queries<S, GROUP, T>(held, queries, map, sequences, state, (item[3] - item[2]) * S::R, head, AS_FLOAT(settings[0]),
                              warp, lane);
    BARRIER;
    clear<S>(r);
    Query<S> q;
    load_query<S>(q, held, packed, row, col);
    unsigned pos = item[4];
    if (packed) {
      for (unsigned at = i; at < end; at++) {
        const unsigned rows = runs[2 * at + 1] & COUNT;
        packed_run<S>(r, q, held, arena + runs[2 * at], pos, rows, head, row, col);
        pos += rows;
      }
      decode_units<S>(r);
    } else {
      // One run, where others are packed
      for (unsigned at = i; at < end; at++) {
        pos += raw_run<S, T>(r, keys, values, map, q, held, arena + runs[2 * at], tails + settings[1] + runs[2 * at],
                             runs[2 * at + 1], pos, sequences[0], state, rows_out, head, lane, row, col);
        if (S::PACKS) break;
      }
    }
  }
  // Read again: what is kept over the item costs registers, and with more than 128 fewer groups run at once.
  const unsigned entry = item[2], members = item[3] - entry;
  GLOBAL float* stats = partial + plan[ROOM_AT] * (S::H * S::R * S::DV);
  SHARED_ARGUMENT float* laid = (SHARED_ARGUMENT float*)held;
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    ONE_BY_ONE for (unsigned from = 8 * c; from < min(members * S::R, 8u * c + 8u); from += 4) {
      BARRIER;
      lay_out<S>(r, laid + warp * S::LAID_WORDS, c, from / 4 % 2, row, col);
      BARRIER;
      merge<S, GROUP>(laid, partial, stats, entry, members * S::R, from, head, tid);
    }
  }
  SHOW_OTHERS;
  BARRIER;
  const GLOBAL unsigned* sequences = plan + plan[ENTRIES_AT] + entry;
  const GLOBAL unsigned* starts = plan + plan[STARTS_AT];
  if (tid < members) {
    const unsigned s = sequences[tid];
    held[tid] = LAST_OF(arrivals + s * S::H + head, starts[s + 1] - starts[s]);
  }
  BARRIER;
  ONE_BY_ONE for (unsigned m = 0; m < members; m++) {
    if (!held[m]) continue;
    const unsigned s = sequences[m], begin = starts[s];
    SEE_OTHERS;
    ONE_BY_ONE for (unsigned h = head * S::R + warp; h < (head + 1) * S::R; h += GROUP) {
      combine<S::DV, T>(partial, stats, plan + plan[ORDER_AT] + begin, starts[s + 1] - begin, sinks, sunk, S::H * S::R, h,
                        out + (s * S::H * S::R + h) * S::DV, lane);
    }
  }
}
