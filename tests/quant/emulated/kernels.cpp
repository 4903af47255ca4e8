// The kernels for one shape, as functions of a shared library. SHAPE holds the template's constants.

#include "host.h"

#include "../../../quant/kernels/elements.h"

#include "../../../quant/kernels/plan.h"
#include "../../../quant/kernels/shape.h"
#include "../../../quant/kernels/query.h"
#include "../../../quant/kernels/tile.h"
#include "../../../quant/kernels/combine.h"
#include "../../../quant/kernels/decode.h"
#include "../../../quant/kernels/gather.h"

using S = DecodeShape<SHAPE>;

// An array that lies in constant memory on Metal: no pointer of the device's
template <class T> struct Constant {
  const T* at;
  T operator[](unsigned i) const { return at[i]; }
  Constant operator+(unsigned i) const { return {at + i}; }
};
template <class T> static Constant<T> constant(const T* at) { return {at}; }

// In one launch that merges, or one that leaves this to `run_combine`
extern "C" void run_decode(const float* queries, const float* keys, const float* values, const float* map, const unsigned* arena,
                           const unsigned* tails, const unsigned* plan, const unsigned* state, const unsigned* settings,
                           const float* sinks, unsigned bundles, bool merges, unsigned* arrivals, float* partial, unsigned* rows,
                           float* out) {
  groups_see_others = merges;
  for (unsigned group = 0; group < bundles * S::H; group++) {
    std::vector<unsigned> held(max<int>(WARPS * S::LAID_WORDS, S::QUERY_WORDS));
    run_group(32 * WARPS, [&](unsigned tid) {
      flash_decode<S, WARPS, float>(queries, keys, values, map, arena, tails, plan, constant(state), constant(settings),
                                    constant(sinks), sinks != nullptr, arrivals, partial, rows, out, held.data(), group, tid,
                                    tid % 32, tid % 32 / 4, tid % 4);
    });
  }
}

extern "C" void run_combine(const float* partial, const unsigned* plan, const float* sinks, unsigned heads, unsigned sequences,
                            float* out) {
  for (unsigned group = 0; group < sequences * heads; group++) {
    const unsigned* starts = plan + plan[STARTS_AT] + group / heads;
    run_group(32, [&](unsigned lane) {
      combine<S::DV, float>(partial, partial + plan[ROOM_AT] * heads * S::DV, plan + plan[ORDER_AT] + starts[0],
                            starts[1] - starts[0], constant(sinks), sinks != nullptr, heads, group % heads, out + group * S::DV,
                            lane);
    });
  }
}

extern "C" void run_gather(const unsigned* arena, const unsigned* offsets, const unsigned* tail, const float* keys,
                           const float* values, const unsigned* sizes, unsigned threads, float* all_keys,
                           float* all_values, unsigned* rows) {
  for (unsigned tid = 0; tid < threads; tid++) {
    gather_rows<S::H, S::DK, S::DV, S::KB, S::KG, S::VB, S::VG, S::BF != 0, float>(
        arena, constant(offsets), constant(tail), keys, values, sizes[0], sizes[1], sizes[2], sizes[3], all_keys, all_values, rows, tid);
  }
}
