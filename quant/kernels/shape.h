// How rows are stored, and how their codes become operands.

template <int H_, int R_, int DK_, int DV_, int KB_, int KG_, int VB_, int VG_, bool PACKS_, bool BF_, bool WIDE_, bool MAPS_>
struct DecodeShape {
  enum {
    H = H_, R = R_, DK = DK_, DV = DV_, KB = KB_, KG = KG_, VB = VB_, VG = VG_, PACKS = PACKS_, BF = BF_, MAPS = MAPS_,
    COLUMNS = WIDE_ ? 2 : 1,                  // of products, in eights
    PAIRS = 4 * COLUMNS,
    K_WHOLE = KB == 4 || KB == 8,             // a lane's key codes are whole words
    K_SPLIT = KB == 5 || KB == 6,             // they begin within a word, and some lie across two
    KC = K_SPLIT ? 8 : KB,                    // bits of a key's code whose order of dims they have
    EACH = DK / 32,                           // dims of a vector that a lane has
    K_GROUPS = DK / KG, V_GROUPS = DV / VG,
    K_CHUNKS = KG / 32,                       // of 8 dims, per lane and group
    CHUNKS = DK / 32,
    K_WORDS = K_CHUNKS * (KC == 8 ? 2 : 1),   // per lane, group and token, and at least as many as are read
    K_READ = K_SPLIT ? (KG + 32) / 32 : K_WORDS,
    V_QUADS = VG / 32,                        // of 4 dims, per lane and group
    V_WORDS = VB == 8 ? V_QUADS : 1,
    V_DIMS = VG / 8,
    V_BITS = VB == 8 ? 32 : V_DIMS * VB,      // per word
    OUTS = DV / 16,
    K_PAIRS_AT = H * DK * KB / 32,
    V_CODES_AT = K_PAIRS_AT + H * K_GROUPS,
    V_PAIRS_AT = V_CODES_AT + H * DV * VB / 32,
    RAW_WORDS = H * (DK + DV) / 2,
    ROW_WORDS = PACKS ? V_PAIRS_AT + H * V_GROUPS : RAW_WORDS,
    QUERY_WORDS = PAIRS * (DK + 2 * K_GROUPS + 2),
    LAID_WORDS = 4 * (DV + 4),                // of a warp's results, four columns at a time
    // Where two words may be read at once
    K_EVEN = K_WHOLE && ROW_WORDS % 2 == 0 && DK * KB / 32 % 2 == 0 && K_WORDS % 2 == 0,
    K_PAIRS_EVEN = ROW_WORDS % 2 == 0 && K_PAIRS_AT % 2 == 0 && K_GROUPS % 2 == 0,
    V_PAIRS_EVEN = ROW_WORDS % 2 == 0 && V_PAIRS_AT % 2 == 0 && V_GROUPS % 2 == 0
  };
};

struct Four { float x[4]; };

// -- codes ------------------------------------------------------------------------------------------------------------------

// BITS bits of a row that begin at bit `at`
template <int BITS> FN unsigned bits_at(const GLOBAL unsigned* row, unsigned at) {
  const unsigned word = at / 32, shift = at % 32;
  unsigned x = LOAD(row + word) >> shift;
  if (BITS + shift > 32) x |= LOAD(row + word + 1) << (32 - shift);
  return BITS == 32 ? x : x & ((1u << (BITS & 31)) - 1u);
}

// WORDS words of which the first code begins at bit `shift` -> FOURS words with four codes of BITS bits at their lower end
template <int BITS, int WORDS, int FOURS> FN void in_fours(PRIVATE unsigned* to, const PRIVATE unsigned* from, unsigned shift) {
  unsigned x[WORDS + 1];
  UNROLL for (int i = 0; i < WORDS; i++) {
    x[i] = (from[i] >> shift) | (i + 1 < WORDS ? (from[i + 1] << 1) << (31u - shift) : 0u);
  }
  x[WORDS] = 0;
  UNROLL for (int i = 0; i < FOURS; i++) {
    const int bit = 4 * BITS * i, word = bit / 32 < WORDS ? bit / 32 : WORDS;
    to[i] = x[word] >> (bit % 32);
    if (bit % 32 + 4 * BITS > 32 && word < WORDS) to[i] |= x[word + 1] << (31 - (bit + 31) % 32);
  }
}

// Codes i and i + 2 of four that lie side by side, in the device's form for products
template <int BITS> FN unsigned split_pair(unsigned four, int i) {
  const unsigned one = (1u << BITS) - 1u;
  const int up = 16 - BITS * (2 + i);
  return CODES(((four >> (BITS * i)) & one) | ((up < 0 ? four >> -up : four << up) & (one << 16)));
}

// N words; two at a time where they lie at even places
template <int N, bool EVEN> FN void words_at(PRIVATE unsigned* to, const GLOBAL unsigned* from) {
  UNROLL for (int i = 0; i < N; i += EVEN ? 2 : 1) {
    if (EVEN) LOAD_TWO(to + i, from + i);
    else to[i] = LOAD(from + i);
  }
}

// How many values of BITS bits a 16-bit half holds for us
template <int BITS> struct Half { enum { VALUES = BITS == 8 ? 2 : 4 }; };

// Value i of both halves of z as integers times `unit(i)`, in the device's form for products
template <int BITS> FN unsigned values_of(unsigned z, int i) {
  if (BITS == 8) return CODES((i ? z >> 8 : z) & 0x00ff00ffu);
  if (BITS == 4) return CODES((i < 2 ? z : z >> 8) & (i % 2 ? 0x00f000f0u : 0x000f000fu));
  return CODES(i == 3 ? (z >> 9) & 0x00070007u : z & (0x00070007u << (3 * i)));
}

template <int BITS> FN float unit(int i) {
  if (BITS == 4) return i % 2 ? 16.0f : 1.0f;
  if (BITS == 3) return i == 1 ? 8.0f : i == 2 ? 64.0f : 1.0f;
  return 1.0f;
}

// Which two of 8 dims pair p of a chunk holds
template <int BITS> FN unsigned first_of(int p) { return BITS == 8 ? (p / 2) * 4 + p % 2 : p; }
template <int BITS> FN unsigned second_of(int p) { return first_of<BITS>(p) + (BITS == 8 ? 2 : 4); }

// Pair p of a chunk whose words are given
template <int BITS> FN unsigned chunk_pair(const PRIVATE unsigned* words, int p) {
  if (BITS == 8) return values_of<8>(words[p / 2], p % 2);
  if (BITS == 4) return values_of<4>(words[0], p);
  return values_of<3>((words[0] & 0xfffu) | ((words[0] & 0xfff000u) << 4), p);
}

// The half that holds part `part` of quad `quad` of token a, and the same of token b
template <int BITS> FN unsigned quad_halves(const PRIVATE unsigned* a, const PRIVATE unsigned* b, int quad, int part) {
  if (BITS == 8) {
    return part ? (a[quad] >> 16) | (b[quad] & 0xffff0000u) : (a[quad] & 0xffffu) | (b[quad] << 16);
  }
  if (BITS == 4) return quad ? (a[0] >> 16) | (b[0] & 0xffff0000u) : (a[0] & 0xffffu) | (b[0] << 16);
  return ((a[0] >> (12 * quad)) & 0xfffu) | (((b[0] >> (12 * quad)) & 0xfffu) << 16);
}

// -- stored halves ----------------------------------------------------------------------------------------------------------

FN float in_half(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }
FN unsigned two_halves(float x, float y) { return PACK_HALF(in_half(x), in_half(y)); }

// Two stored halves as two of float16
template <bool BF> FN unsigned as_halves(unsigned x) { return BF ? two_halves(wide<true>(x), wide<true>(x >> 16)) : x; }
