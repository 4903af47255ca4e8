// What the bodies need of Metal. Written from the language's specification; admitted by the self-test only.

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

#define FN inline
#define GLOBAL device
#define NOTHING -1e30f
#define PRIVATE thread
#define SHARED_ARGUMENT threadgroup
#define UNROLL _Pragma("clang loop unroll(full)")
#define ONE_BY_ONE _Pragma("clang loop unroll(disable)")
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define WARP_BARRIER simdgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup)
#define ANY(x) simd_any(x)
#define AS_FLOAT(x) as_type<float>(x)
#define AS_UINT(x) as_type<unsigned>(x)
#define LOAD(p) (*(p))
#define FAR(p) (*(p))
// Groups of one launch do not see for sure what others wrote: entries are merged by a launch of its own.
#define SHOW_OTHERS
#define SEE_OTHERS
#define LAST_OF(counter, count) 0u
#define EXP2(x) fast::exp2(x)
#define fmaxf(x, y) fmax(x, y)
#define fminf(x, y) fmin(x, y)

// Subnormal numbers may be flushed here: codes become whole numbers.
#define CODE_UNIT 1.0f
#define WEIGHT_UNIT 1.0f
#define OUT_UNIT 1.0f

FN unsigned CODES(unsigned x) { return as_type<unsigned>(as_type<half2>(x | 0x64006400u) - half2(1024.0h)); }
FN void LOAD_TWO(thread unsigned* to, const device unsigned* from) {
  to[0] = from[0];
  to[1] = from[1];
}
FN void NEAR_TWO(thread unsigned* to, const device unsigned* from) { LOAD_TWO(to, from); }
FN void NEAR_FOUR(thread unsigned* to, const device unsigned* from) {
  const uint4 x = *(const device uint4*)from;
  for (int i = 0; i < 4; i++) to[i] = x[i];
}
FN void LOAD_FOUR(thread float* to, const device float* from) {
  const float4 x = *(const device float4*)from;
  for (int i = 0; i < 4; i++) to[i] = x[i];
}
FN void STORE_FOUR(device float* to, const thread float* from) { *(device float4*)to = float4(from[0], from[1], from[2], from[3]); }
FN float FROM_HALF(unsigned x) { return float(as_type<half>(ushort(x))); }
FN unsigned PACK_HALF(float x, float y) { return as_type<unsigned>(half2(half(x), half(y))); }

FN unsigned SCALED(unsigned pair, float by) { return as_type<unsigned>(as_type<half2>(pair) * half2(half(by))); }

// Lanes lie in an 8 x 8 matrix of a simdgroup so that bits 0 and 3 of a lane are its column pair, the others its row.
FN unsigned row_of(unsigned lane) { return (lane / 2) % 4 + (lane / 16) * 4; }
FN unsigned col_of(unsigned lane) { return lane % 2 + (lane / 8) % 2 * 2; }
FN float LANE_OTHER(float x, int bit) { return simd_shuffle_xor(x, bit); }
FN float LANE_AT(float x, unsigned from) { return simd_shuffle(x, ushort(from)); }
FN unsigned LANE_WORD(unsigned x, unsigned from) { return simd_shuffle(x, ushort(from)); }
FN float ROW_SUM(float x) {
  x += simd_shuffle_xor(x, 2);
  x += simd_shuffle_xor(x, 4);
  return x + simd_shuffle_xor(x, 16);
}
FN float ROW_MAX(float x) {
  x = fmax(x, simd_shuffle_xor(x, 2));
  x = fmax(x, simd_shuffle_xor(x, 4));
  return fmax(x, simd_shuffle_xor(x, 16));
}
FN float WARP_MAX(float x) { return simd_max(x); }
FN float WARP_SUM(float x) { return simd_sum(x); }

// A simdgroup's matrices hold both operands by rows.
#define OPERAND(x) (x)

FN void product(thread float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const unsigned a[2][2] = {{a0, a2}, {a1, a3}};
  simdgroup_half8x8 first, second;
  first.thread_elements() = as_type<half2>(b0);
  second.thread_elements() = as_type<half2>(b1);
  for (int h = 0; h < 2; h++) {
    simdgroup_half8x8 left, right;
    simdgroup_float8x8 sum;
    left.thread_elements() = as_type<half2>(a[h][0]);
    right.thread_elements() = as_type<half2>(a[h][1]);
    sum.thread_elements() = float2(c[2 * h], c[2 * h + 1]);
    simdgroup_multiply_accumulate(sum, left, first, sum);
    simdgroup_multiply_accumulate(sum, right, second, sum);
    c[2 * h] = sum.thread_elements()[0];
    c[2 * h + 1] = sum.thread_elements()[1];
  }
}
