// What the kernel bodies need of a device, on a CPU: every lane is a fibre, lanes meet at each operation of their warp.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define FN static inline
#define GLOBAL
#define PRIVATE
#define SHARED_ARGUMENT
#define UNROLL
#define ONE_BY_ONE
#define NOTHING -1e30f
#define BARRIER meet(true)
#define WARP_BARRIER meet()
#define CODES(x) (x)
#define CODE_UNIT 16777216.0f
#define WEIGHT_UNIT 4.0f
#define OUT_UNIT 4194304.0f
#define OPERAND(x) (x)
#define FAR(p) (*(p))
#define SHOW_OTHERS
#define SEE_OTHERS
#define LAST_OF(counter, count) arrived(counter, count)
using std::max;
using std::min;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 18);
  unsigned long met[2] = {0, 0};  // of its warp's meetings and its group's
  bool over = false;
  unsigned words[6];
};
static std::vector<Lane> lanes;
static ucontext_t scheduler;
static unsigned now;

// Wait until all lanes of the warp, or of the group, are here
static void meet(bool group = false) {
  Lane& me = lanes[now];
  const unsigned self = now, first = group ? 0 : now / 32 * 32, end = group ? lanes.size() : first + 32;
  me.met[group]++;
  for (unsigned i = first; i < end;) {
    if (!lanes[i].over && lanes[i].met[group] < me.met[group]) {
      swapcontext(&me.context, &scheduler);
      now = self;
    } else {
      i++;
    }
  }
}
template <class Body> static void run_group(unsigned threads, Body body) {
  static Body* current;
  current = &body;
  lanes = std::vector<Lane>(threads);
  for (unsigned i = 0; i < threads; i++) {
    getcontext(&lanes[i].context);
    lanes[i].context.uc_stack.ss_sp = lanes[i].stack.data();
    lanes[i].context.uc_stack.ss_size = lanes[i].stack.size();
    lanes[i].context.uc_link = &scheduler;
    makecontext(&lanes[i].context, (void (*)())+[] {
      const unsigned self = now;
      (*current)(self);
      lanes[self].over = true;
    }, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (now = 0; now < threads; now++) {
      const unsigned self = now;
      if (!lanes[self].over) {
        left = true;
        swapcontext(&scheduler, &lanes[self].context);
      }
      now = self;
    }
  }
}

FN float AS_FLOAT(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
FN unsigned AS_UINT(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
FN float FROM_HALF(unsigned x) { uint16_t h = x; _Float16 y; std::memcpy(&y, &h, 2); return (float)y; }
FN unsigned half_of(float x) { _Float16 y = x; uint16_t h; std::memcpy(&h, &y, 2); return h; }
FN unsigned PACK_HALF(float x, float y) { return half_of(x) | half_of(y) << 16; }
FN unsigned SCALED(unsigned x, float by) { return PACK_HALF(FROM_HALF(x & 0xffff) * by, FROM_HALF(x >> 16) * by); }
FN float EXP2(float x) { return std::exp2(x); }
FN unsigned LOAD(const unsigned* p) { return *p; }
FN void LOAD_TWO(unsigned* to, const unsigned* from) { to[0] = from[0]; to[1] = from[1]; }

FN void NEAR_TWO(unsigned* to, const unsigned* from) { std::memcpy(to, from, 8); }
FN void NEAR_FOUR(unsigned* to, const unsigned* from) { std::memcpy(to, from, 16); }
FN void STORE_FOUR(float* to, const float* from) { std::memcpy(to, from, 16); }
FN void LOAD_FOUR(float* to, const float* from) { std::memcpy(to, from, 16); }

FN unsigned swapped(unsigned x, unsigned mask) {
  lanes[now].words[0] = x;
  meet();
  const unsigned y = lanes[now ^ mask].words[0];
  meet();
  return y;
}
static bool groups_see_others;
static bool arrived(unsigned* counter, unsigned count) {
  if (!groups_see_others) return false;
  *counter = (*counter + 1) % count;
  return *counter == 0;
}
FN unsigned LANE_WORD(unsigned x, unsigned from) {
  lanes[now].words[0] = x;
  meet();
  const unsigned y = lanes[now / 32 * 32 + from].words[0];
  meet();
  return y;
}
FN float LANE_AT(float x, unsigned from) { return AS_FLOAT(LANE_WORD(AS_UINT(x), from)); }
FN float LANE_OTHER(float x, unsigned bit) { return AS_FLOAT(swapped(AS_UINT(x), bit)); }
FN float ROW_SUM(float x) {
  for (unsigned mask = 4; mask < 32; mask *= 2) x += AS_FLOAT(swapped(AS_UINT(x), mask));
  return x;
}
FN float ROW_MAX(float x) {
  for (unsigned mask = 4; mask < 32; mask *= 2) x = fmaxf(x, AS_FLOAT(swapped(AS_UINT(x), mask)));
  return x;
}
FN float WARP_MAX(float x) {
  for (int mask = 16; mask; mask /= 2) x = fmaxf(x, AS_FLOAT(swapped(AS_UINT(x), mask)));
  return x;
}
FN float WARP_SUM(float x) {
  for (int mask = 16; mask; mask /= 2) x += AS_FLOAT(swapped(AS_UINT(x), mask));
  return x;
}
FN bool ANY(bool x) {
  for (int mask = 16; mask; mask /= 2) x = swapped(x, mask) || x;
  return x;
}

FN float half_at(unsigned pair, int i) { return FROM_HALF((i ? pair >> 16 : pair) & 0xffff); }
FN void product(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1}, first = now / 32 * 32;
  std::memcpy(lanes[now].words, mine, sizeof mine);
  meet();
  const unsigned row = now % 32 / 4, col = now % 4;
  for (int i = 0; i < 4; i++) {
    const unsigned r = row, high = i / 2, n = 2 * col + i % 2;
    for (int k = 0; k < 16; k++) {
      const unsigned half = k / 8, pair = k % 8 / 2;
      c[i] += half_at(lanes[first + r * 4 + pair].words[high + 2 * half], k % 2) *
              half_at(lanes[first + k % 8 * 4 + n / 2].words[4 + half], n % 2);
    }
  }
  meet();
}
