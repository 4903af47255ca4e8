// The entries of one sequence and query head, merged by their log-sum-exp: the work of a warp.

#define LOG2_E 1.44269504f

// order [count]: the entries, which other groups may have written while this kernel runs: FAR reads where all of them write.
// sinks [heads], where there are any. out [DV].
template <int DV, class T, class Sinks>
FN void combine(const GLOBAL float* partial, const GLOBAL float* stats, const GLOBAL unsigned* order, unsigned count,
                Sinks sinks, bool sunk, unsigned heads, unsigned head, GLOBAL T* out, unsigned lane) {
  float top = sunk ? sinks[head] * LOG2_E : NOTHING;
  ONE_BY_ONE for (unsigned i = lane; i < count; i += 32) top = fmaxf(top, FAR(stats + 2 * (order[i] * heads + head)));
  top = WARP_MAX(top);

  // A lane holds 4 dims that lie together, of every 128.
  float sum = 0, mine[(DV + 127) / 128][4];
  UNROLL for (int d = 0; d < DV; d += 128) UNROLL for (int i = 0; i < 4; i++) mine[d / 128][i] = 0;
  ONE_BY_ONE for (unsigned first = 0; first < count; first += 32) {
    // Lanes that have no entry take the first once more, and nothing of it
    const bool real = first + lane < count;
    const unsigned at = order[real ? first + lane : 0] * heads + head;
    const float weight = real ? EXP2(FAR(stats + 2 * at) - top) : 0.0f;
    sum += weight * FAR(stats + 2 * at + 1);
    const unsigned here = min(count - first, 32u);
    ONE_BY_ONE for (unsigned eight = 0; eight < here; eight += 8) {
      UNROLL for (unsigned i = 0; i < 8; i++) {
        const float w = LANE_AT(weight, eight + i);
        const GLOBAL float* from = partial + LANE_WORD(at, eight + i) * DV + 4 * lane;
        UNROLL for (int d = 0; d < DV; d += 128) {
          float x[4] = {0, 0, 0, 0};
          if (d + 4 * lane < DV) LOAD_FOUR(x, from + d);
          UNROLL for (int j = 0; j < 4; j++) mine[d / 128][j] += w * x[j];
        }
      }
    }
  }
  const float share = 1.0f / (WARP_SUM(sum) + (sunk ? EXP2(sinks[head] * LOG2_E - top) : 0.0f));
  UNROLL for (int d = 0; d < DV; d += 128) {
    UNROLL for (int i = 0; i < 4; i++) {
      if (d + 4 * lane < DV) out[d + 4 * lane + i] = (T)(mine[d / 128][i] * share);
    }
  }
}
