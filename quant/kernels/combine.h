// The entries of one sequence and query head, merged by their log-sum-exp. A group of four warps; `parts` is shared by them.

#define WARPS 4

// starts [sequences + 1], order: the entries of each sequence. sinks [heads], where there are any.
template <int DV, class T>
FN void combine(const GLOBAL float* partial, const GLOBAL float* stats, const GLOBAL unsigned* starts,
                const GLOBAL unsigned* order, const GLOBAL float* sinks, bool sunk, unsigned heads, GLOBAL T* out,
                SHARED_ARGUMENT float* parts, unsigned group, unsigned warp, unsigned lane) {
  const unsigned sequence = group / heads, head = group % heads;
  const unsigned begin = starts[sequence], end = starts[sequence + 1];
  float top = sunk ? sinks[head] * 1.44269504f : NOTHING;
  for (unsigned i = begin + lane; i < end; i += 32) top = fmaxf(top, stats[2 * (order[i] * heads + head)]);
  top = WARP_MAX(top);
  float sum = 0, mine[DV / 32];
  UNROLL for (int d = 0; d < DV / 32; d++) mine[d] = 0;
  for (unsigned i = begin + warp; i < end; i += WARPS) {
    const unsigned at = order[i] * heads + head;
    const float weight = EXP2(stats[2 * at] - top);
    sum += weight * stats[2 * at + 1];
    UNROLL for (int d = 0; d < DV / 32; d++) mine[d] += weight * partial[at * DV + d * 32 + lane];
  }
  UNROLL for (int d = 0; d < DV / 32; d++) parts[warp * (DV + 1) + d * 32 + lane] = mine[d];
  if (lane == 0) parts[warp * (DV + 1) + DV] = sum;
  BARRIER;
  float total = sunk ? EXP2(sinks[head] * 1.44269504f - top) : 0.0f;
  for (int w = 0; w < WARPS; w++) total += parts[w * (DV + 1) + DV];
  for (unsigned d = warp * 32 + lane; d < DV; d += 32 * WARPS) {
    float x = 0;
    for (int w = 0; w < WARPS; w++) x += parts[w * (DV + 1) + d];
    out[(sequence * heads + head) * DV + d] = (T)(x / total);
  }
}
