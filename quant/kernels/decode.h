// Flash-decoding over stored rows: one body for every device.
//
// A group takes one KV head of one bundle, a warp of it one item: a stretch of runs of one kind (rows that lie one behind the
// other), packed or not. All items of a bundle are read for the same sequences. The columns of the products, 8 or 16, are
// (sequence, query head of this KV head). A group merges what its warps found into one entry for each column; the group that
// is the last to be done with a sequence merges its entries, where the device lets groups see what others wrote.

// -- one item ---------------------------------------------------------------------------------------------------------------

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
FN void packed_run(PRIVATE Result<S>& r, const PRIVATE Query<S>& q, const SHARED_ARGUMENT float* sums,
                   const GLOBAL unsigned* run,
                   const SHARED_ARGUMENT unsigned* lows, unsigned pos, unsigned rows, unsigned head,
                   unsigned row, unsigned col) {
  Places next = places_of<S>(run, head, row, col);
  Keys<S> keys;
  Values<S> values;
  load_keys<S>(keys, next, head, col);
  load_values<S>(values, next, head, row);
  for (unsigned first = 0; first < rows; first += 16) {
    Four s[S::COLUMNS];
    packed_scores<S>(s, keys, q, sums);
    advance<S>(next);
    if (first + 16 < rows) load_keys<S>(keys, next, head, col);
    soften<S>(s, r, lows, pos, first, rows, row);
    if (first + 16 > rows) blank<S>(values, rows - first, row);
    packed_values<S>(r, values, s);
    if (first + 16 < rows) load_values<S>(values, next, head, row);
  }
}

// Runs of an item, of which there may be none. For the rest see `flash_decode`.
template <class S, class T, class State, class Settings>
FN void read_item(PRIVATE Result<S>& r, const GLOBAL T* queries, const GLOBAL T* keys, const GLOBAL T* values,
                  const GLOBAL float* map, const GLOBAL unsigned* arena, const GLOBAL unsigned* tails,
                  const GLOBAL unsigned* plan, const GLOBAL unsigned* item, State state, Settings settings,
                  GLOBAL unsigned* rows_out, SHARED_ARGUMENT unsigned* held, unsigned head, unsigned lane, unsigned row,
                  unsigned col) {
  const unsigned first_run = item[0], end_run = item[1];
  if (first_run == end_run) return;
  const GLOBAL unsigned* entries = plan + plan[ENTRIES_AT] + item[2];
  const GLOBAL unsigned* runs = plan + plan[RUNS_AT];
  unsigned pos = item[4];
  hold_queries<S, T>(held, queries, map, entries, state, (item[3] - item[2]) * S::R, head, AS_FLOAT(settings[0]), lane);
  Query<S> q;
  const bool packed = S::PACKS && runs[2 * first_run + 1] >> 30 == PACKED;
  load_query<S>(q, held, packed, row, col);
  for (unsigned i = first_run; i < end_run; i++) {
    const unsigned kind = runs[2 * i + 1] >> 30, field = runs[2 * i + 1] & 0x3fffffffu;
    const GLOBAL unsigned* run = arena + runs[2 * i];
    if (packed) {
      packed_run<S>(r, q, sums_of<S>(held, col), run, lows_of<S>(held, col), pos, field, head, row, col);
      pos += field;
      continue;
    }
    unsigned rows = field;
    bool own = false;
    if (kind == TAIL) {
      const unsigned there = state[2 * entries[0]], begin = field & 0x7fffu, end = min(there, begin + (field >> 15));
      run = tails + settings[1] + runs[2 * i] + begin * S::RAW_WORDS;
      rows = end > begin ? end - begin : 0u;
      own = end == there;
    }
    if (rows == 0) continue;
    const unsigned sequence = entries[0], token = sequence * S::H + head;
    GLOBAL unsigned* fresh = rows_out + sequence * S::RAW_WORDS;
    if (own) keep<S, T>(fresh, keys + token * S::DK, values + token * S::DV, map, head, lane);
    const RawRun raw = {run, own ? fresh : run + (rows - 1) * S::RAW_WORDS, rows};
    for (unsigned first = 0; first < rows; first += 16) {
      Four s[S::COLUMNS];
      raw_scores<S>(s, q, raw, first, head, row, col);
      soften<S>(s, r, lows_of<S>(held, col), pos, first, rows, row);
      raw_values<S>(r, s, raw, first, head, row, col);
    }
    pos += rows;
  }
  if (packed) decode_units<S>(r);
}

// -- one bundle -------------------------------------------------------------------------------------------------------------

// Half of a warp's columns, every other one, as [4][DV] floats and behind them (maximum, sum) of each
template <class S>
FN void lay_out(const PRIVATE Result<S>& r, SHARED_ARGUMENT float* to, int c, int j, unsigned row, unsigned col) {
  const float sum = ROW_SUM(r.sum[c][j]);
  float bias[S::V_GROUPS];
  UNROLL for (int g = 0; g < S::V_GROUPS; g++) bias[g] = ROW_SUM(r.bias[c][j][g]);
  if (row == 0) {
    to[4 * S::DV + 2 * col] = r.top[c][j];
    to[4 * S::DV + 2 * col + 1] = sum;
  }
  UNROLL for (int vg = 0; vg < S::V_GROUPS; vg++) {
    UNROLL for (int d = 0; d < S::V_DIMS; d++) {
      to[col * S::DV + vg * S::VG + row * S::V_DIMS + d] = r.out[c][(vg * S::V_DIMS + d) / 2].x[2 * (d % 2) + j] + bias[vg];
    }
  }
}

// What all warps laid out, merged, as entries
template <class S, int GROUP>
FN void merge(const SHARED_ARGUMENT float* laid, GLOBAL float* partial, GLOBAL float* stats, unsigned entry, unsigned used,
              unsigned from, unsigned head, unsigned tid) {
  for (unsigned x = tid; x < 4 * S::DV; x += 32 * GROUP) {
    const unsigned k = x / S::DV, n = from + 2 * k;
    if (n >= used) continue;
    float top = NOTHING, sum = 0, value = 0;
    UNROLL for (int w = 0; w < GROUP; w++) top = fmaxf(top, laid[w * S::HELD + 4 * S::DV + 2 * k]);
    UNROLL for (int w = 0; w < GROUP; w++) {
      const SHARED_ARGUMENT float* its = laid + w * S::HELD;
      const float weight = EXP2(its[4 * S::DV + 2 * k] - top);
      sum += weight * its[4 * S::DV + 2 * k + 1];
      value += weight * its[x];
    }
    const unsigned at = ((entry + n / S::R) * S::H + head) * S::R + n % S::R;
    partial[at * S::DV + x % S::DV] = value;
    if (x % S::DV == 0) {
      stats[2 * at] = top;
      stats[2 * at + 1] = sum;
    }
  }
}

// keys, values [sequences, H, DK or DV]: of the step's own tokens, the last row of each tail; `rows_out` is how they are stored.
// state [sequences, 2]: rows of a sequence's tail, first position that it sees. map: see query.h. sinks [H * R], where any are.
// settings: the bits of the scale, the word at which the layer's tails begin. arrivals [sequences, H]: zeros, before and after.
// partial: entries [room, H * R, DV], and behind them their (maximum, sum). held: GROUP times HELD words.
template <class S, int GROUP, class T, class State, class Settings, class Sinks>
FN void flash_decode(const GLOBAL T* queries, const GLOBAL T* keys, const GLOBAL T* values, const GLOBAL float* map,
                     const GLOBAL unsigned* arena, const GLOBAL unsigned* tails, const GLOBAL unsigned* plan, State state,
                     Settings settings, Sinks sinks, bool sunk, GLOBAL unsigned* arrivals, GLOBAL float* partial,
                     GLOBAL unsigned* rows_out, GLOBAL T* out, SHARED_ARGUMENT unsigned* held, unsigned group, unsigned tid,
                     unsigned lane, unsigned row, unsigned col) {
  const unsigned warp = tid / 32, head = group % S::H;
  const GLOBAL unsigned* item = plan + ITEMS_AT + 5 * (group / S::H * GROUP + warp);
  Result<S> r;
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    UNROLL for (int j = 0; j < 2; j++) {
      r.top[c][j] = NOTHING;
      r.sum[c][j] = 0;
      UNROLL for (int g = 0; g < S::V_GROUPS; g++) r.bias[c][j][g] = 0;
    }
    UNROLL for (int n = 0; n < S::OUTS; n++) r.out[c][n] = Four{{0, 0, 0, 0}};
  }
  read_item<S, T>(r, queries, keys, values, map, arena, tails, plan, item, state, settings, rows_out, held + warp * S::HELD,
                  head, lane, row, col);
  // Read again: what is kept over the item costs registers, and with more than 128 fewer groups run at once.
  const unsigned entry = item[2], members = item[3] - entry;
  GLOBAL float* stats = partial + plan[ROOM_AT] * (S::H * S::R * S::DV);
  SHARED_ARGUMENT float* laid = (SHARED_ARGUMENT float*)held;
  UNROLL for (int c = 0; c < S::COLUMNS; c++) {
    UNROLL for (int j = 0; j < 2; j++) {
      if (8 * c + j >= members * S::R) continue;
      if (c + j) BARRIER;
      lay_out<S>(r, laid + warp * S::HELD, c, j, row, col);
      BARRIER;
      merge<S, GROUP>(laid, partial, stats, entry, members * S::R, 8 * c + j, head, tid);
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
  for (unsigned m = 0; m < members; m++) {
    if (!held[m]) continue;
    const unsigned s = sequences[m], begin = starts[s];
    SEE_OTHERS;
    for (unsigned h = head * S::R + warp; h < (head + 1) * S::R; h += GROUP) {
      combine<S::DV, T>(partial, stats, plan + plan[ORDER_AT] + begin, starts[s + 1] - begin, sinks, sunk, S::H * S::R, h,
                        out + (s * S::H * S::R + h) * S::DV, lane);
    }
  }
}
