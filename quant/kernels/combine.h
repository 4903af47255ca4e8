// The entries of one sequence and query head, merged by their log-sum-exp. A group of WARPS warps.

#define WARPS 16
#define AT_ONCE 512  // entries whose weights are held: one for each thread
#define LOG2_E 1.44269504f

// starts [sequences + 1], order: the entries of each sequence. sinks [heads], where there are any.
// shared: `weights` [AT_ONCE], `parts` [WARPS * (DV + 1)], `tops` [WARPS].
template <int DV, class T, class Stats, class Starts, class Order, class Sinks>
FN void combine(const GLOBAL float* partial, Stats stats, Starts starts, Order order, Sinks sinks, bool sunk,
                unsigned heads, GLOBAL T* out, SHARED_ARGUMENT float* weights, SHARED_ARGUMENT unsigned* places,
                SHARED_ARGUMENT float* parts, SHARED_ARGUMENT float* tops, unsigned group, unsigned tid, unsigned lane) {
  const unsigned sequence = group / heads, head = group % heads, warp = tid / 32;
  const unsigned begin = starts[sequence], end = starts[sequence + 1];
  float top = sunk ? sinks[head] * LOG2_E : NOTHING;
  for (unsigned i = begin + tid; i < end; i += AT_ONCE) top = fmaxf(top, stats[2 * (order[i] * heads + head)]);
  top = WARP_MAX(top);
  if (lane == 0) tops[warp] = top;
  BARRIER;
  for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w]);

  // A lane holds 4 dims that lie together, of every 128.
  float sum = 0, mine[(DV + 127) / 128][4];
  UNROLL for (int d = 0; d < DV; d += 128) UNROLL for (int i = 0; i < 4; i++) mine[d / 128][i] = 0;
  for (unsigned first = begin; first < end; first += AT_ONCE) {
    if (first + tid < end) {
      const unsigned at = order[first + tid] * heads + head;
      const float weight = EXP2(stats[2 * at] - top);
      weights[tid] = weight;
      places[tid] = at * DV;
      sum += weight * stats[2 * at + 1];
    }
    BARRIER;
    const unsigned count = min(end - first, (unsigned)AT_ONCE);
    UNROLL_FOUR for (unsigned i = warp; i < count; i += WARPS) {
      UNROLL for (int d = 0; d < DV; d += 128) {
        float x[4] = {0, 0, 0, 0};
        if (d + 4 * lane < DV) LOAD_FOUR(x, partial + places[i] + d + 4 * lane);
        UNROLL for (int j = 0; j < 4; j++) mine[d / 128][j] += weights[i] * x[j];
      }
    }
    BARRIER;
  }
  UNROLL for (int d = 0; d < DV; d += 128) {
    UNROLL for (int i = 0; i < 4; i++) {
      if (d + 4 * lane < DV) parts[warp * (DV + 1) + d + 4 * lane + i] = mine[d / 128][i];
    }
  }
  sum = WARP_SUM(sum);
  if (lane == 0) parts[warp * (DV + 1) + DV] = sum;
  BARRIER;
  float total = sunk ? EXP2(sinks[head] * LOG2_E - top) : 0.0f;
  for (int w = 0; w < WARPS; w++) total += parts[w * (DV + 1) + DV];
  for (unsigned d = tid; d < DV; d += 32 * WARPS) {
    float x = 0;
    for (int w = 0; w < WARPS; w++) x += parts[w * (DV + 1) + d];
    out[(sequence * heads + head) * DV + d] = (T)(x / total);
  }
}
