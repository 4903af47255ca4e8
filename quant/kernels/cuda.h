// What the bodies need of CUDA.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FN __device__ __forceinline__
#define GLOBAL
#define NOTHING -1e30f
#define PRIVATE
#define SHARED_ARGUMENT
#define UNROLL _Pragma("unroll")
#define ONE_BY_ONE _Pragma("unroll 1")
#define BARRIER __syncthreads()
#define WARP_BARRIER __syncwarp()
#define LANE_OTHER(x, bit) __shfl_xor_sync(0xffffffffu, x, bit)
#define LANE_AT(x, from) __shfl_sync(0xffffffffu, x, from)
#define LANE_WORD(x, from) __shfl_sync(0xffffffffu, x, from)
#define ANY(x) __any_sync(0xffffffffu, x)
#define AS_FLOAT(x) __uint_as_float(x)
#define AS_UINT(x) __float_as_uint(x)
#define LOAD(p) __ldcs(p)
#define FAR(p) __ldcg(p)
#define SHOW_OTHERS __threadfence()
#define SEE_OTHERS __threadfence()
// Whether this is the last of `count` to arrive here, which leaves the counter as the first had found it
#define LAST_OF(counter, count) (atomicInc(counter, (count) - 1) == (count) - 1)

// The tensor cores take subnormal numbers as they are: a code is a float16 already, times 2^-24.
#define CODES(x) (x)
#define CODE_UNIT 16777216.0f
#define WEIGHT_UNIT 4.0f
#define OUT_UNIT 4194304.0f

FN void LOAD_TWO(unsigned* to, const unsigned* from) {
  const uint2 x = __ldcs((const uint2*)from);
  to[0] = x.x;
  to[1] = x.y;
}
// Raw rows are read piecemeal, so that they had better stay in the nearest cache; one may have been written by this very warp.
FN void NEAR_TWO(unsigned* to, const unsigned* from) {
  const uint2 x = *(const uint2*)from;
  to[0] = x.x;
  to[1] = x.y;
}
FN void NEAR_FOUR(unsigned* to, const unsigned* from) {
  const uint4 x = *(const uint4*)from;
  to[0] = x.x;
  to[1] = x.y;
  to[2] = x.z;
  to[3] = x.w;
}
FN void LOAD_FOUR(float* to, const float* from) {
  const float4 x = __ldcg((const float4*)from);
  to[0] = x.x;
  to[1] = x.y;
  to[2] = x.z;
  to[3] = x.w;
}
FN void STORE_FOUR(float* to, const float* from) { *(float4*)to = make_float4(from[0], from[1], from[2], from[3]); }
FN float FROM_HALF(unsigned x) { return __half2float(__ushort_as_half((unsigned short)x)); }
FN unsigned PACK_HALF(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *(const unsigned*)&pair;
}
FN unsigned SCALED(unsigned pair, float by) {
  const __half2 x = __hmul2(*(const __half2*)&pair, __float2half2_rn(by));
  return *(const unsigned*)&x;
}
FN float EXP2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FN float ROW_SUM(float x) {
  for (int mask = 4; mask < 32; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}
FN float ROW_MAX(float x) {
  for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}
FN float WARP_MAX(float x) {
  for (int mask = 16; mask; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

FN float WARP_SUM(float x) {
  for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// The tensor cores want the columns of `b` in the lanes.
FN unsigned OPERAND(unsigned x) {
  unsigned y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
FN void product(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
