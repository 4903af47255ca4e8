// The kernels for one shape, as functions of a shared library. SHAPE holds the template's constants.

#include "host.h"

#include "../../../quant/kernels/elements.h"

#include "../../../quant/kernels/combine.h"
#include "../../../quant/kernels/shape.h"
#include "../../../quant/kernels/query.h"
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

extern "C" void run_decode(const float* queries, const float* keys, const float* values, const float* map, const unsigned* arena,
                           const unsigned* tails, const unsigned* items, const unsigned* entries, const unsigned* runs, const unsigned* state,
                           const unsigned* settings, unsigned count, float* partial, float* stats, unsigned* rows) {
  for (unsigned warp = 0; warp < count * S::H; warp++) {
    std::vector<unsigned> held(S::HELD);
    run_group(32, [&](unsigned lane) {
      flash_decode<S, float>(queries, keys, values, map, arena, tails, constant(items), constant(entries), constant(runs),
                             constant(state), constant(settings), count, partial, stats, rows, held.data(), warp, lane, lane / 4,
                             lane % 4);
    });
  }
}

extern "C" void run_combine(const float* partial, const float* stats, const unsigned* starts, const unsigned* order,
                            const float* sinks, unsigned heads, unsigned sequences, float* out) {
  for (unsigned group = 0; group < sequences * heads; group++) {
    std::vector<float> weights(AT_ONCE), parts(WARPS * (S::DV + 1)), tops(WARPS);
    std::vector<unsigned> places(AT_ONCE);
    run_group(32 * WARPS, [&](unsigned tid) {
      combine<S::DV, float>(partial, constant(stats), constant(starts), constant(order), constant(sinks),
                            sinks != nullptr, heads, out, weights.data(), places.data(), parts.data(), tops.data(),
                            group, tid, tid % 32);
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
