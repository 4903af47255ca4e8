// The fused path's two kernels for one shape, as functions of a shared library. SHAPE holds the template's constants.

#include "host.h"

#include "../../../quant/kernels/combine.h"
#include "../../../quant/kernels/decode.h"

using S = DecodeShape<SHAPE>;

extern "C" void run_decode(const float* queries, const float* keys, const float* values, const unsigned* arena, const unsigned* tails, const unsigned* items,
                           const unsigned* entries, const unsigned* runs, const unsigned* state,
                           const unsigned* settings, unsigned count, float* partial, float* stats, unsigned* rows) {
  for (unsigned warp = 0; warp < count * S::H; warp++) {
    run_group(32, [&](unsigned lane) {
      flash_decode<S, float>(queries, keys, values, arena, tails, items, entries, runs, state, settings, count, partial,
                             stats, rows, warp, lane, lane / 4, lane % 4);
    });
  }
}

extern "C" void run_combine(const float* partial, const float* stats, const unsigned* starts, const unsigned* order,
                            const float* sinks, unsigned heads, unsigned sequences, float* out) {
  for (unsigned group = 0; group < sequences * heads; group++) {
    std::vector<float> weights(AT_ONCE), parts(WARPS * (S::DV + 1)), tops(WARPS);
    std::vector<unsigned> places(AT_ONCE);
    run_group(32 * WARPS, [&](unsigned thread) {
      combine<S::DV, float>(partial, stats, starts, order, sinks, sinks != nullptr, heads, out, weights.data(),
                              places.data(), parts.data(), tops.data(), group, thread, thread % 32);
    });
  }
}
