/* The fused kernel for vector processors: this one source is compiled once for each instruction set.
 *
 * The unit of work is a block: PIXELS neighbouring pixels of one output row, all classes. A column of
 * blocks is walked downwards, so the horizontal interpolation of a low-resolution row (`upper`,
 * `lower`) is done once and serves every output row between it and the next. Inside a block the loop
 * over classes is outermost and VECTORS independent chains hide the latency of the polynomials.
 * The order of operations of each pixel is that of fused_scalar.cpp, to the bit. */
#include "simd.h"
#include "work.h"

namespace cada {
namespace {

/* Of 1 to 4 vectors two were the fastest when it was tried on Zen 4: wider blocks are seldom settled
 * or of one label, narrower ones do too little between their loads. */
constexpr int VECTORS = 2;
constexpr int PIXELS = VECTORS * LANES;
static_assert(PIXELS <= MAX_BLOCK, "axes are padded by MAX_BLOCK");
constexpr uint64_t ALL = ~uint64_t{0} >> (64 - PIXELS);
constexpr uint32_t ALL_LANES = (1u << LANES) - 1;
constexpr int NOT_SETTLED = 255;  /* no class has this id: there are at most 255 */
constexpr int MIXED = -1;
constexpr uint32_t NAN_BITS = 0x7FC00000u;
/* A lane's 32-bit sum takes 511 probabilities of at most 2^23 each. */
constexpr int SUM_CAPACITY = 511;
/* Neighbours often fall into one bin; four tables keep an addition from waiting for the last one. */
constexpr int HISTOGRAMS = 4;

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Hands out 64-byte aligned pieces of one allocation; with no memory behind it, it only counts. */
struct Arena {
  char *start;
  size_t used;

  template <class T> T *take(int64_t count) {
    T *const piece = start ? reinterpret_cast<T *>(start + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

/* ---- the block ------------------------------------------------------------------------------- */

struct Block {
  float *values; /* (C, PIXELS): e_c (order logits) or p_c (order probs) */
  alignas(64) int32_t label[PIXELS];
  alignas(64) float entropy[PIXELS];    /* NaN where invalid */
  alignas(64) float confidence[PIXELS]; /* NaN where invalid */
  alignas(64) float scale[PIXELS];      /* values * scale = probabilities */
  int row, column, width;               /* width < PIXELS at the right edge */
  uint64_t inside, valid;               /* bit i = pixel i is in the image; ... and no tap is invalid */
  int label_of_all;                     /* or MIXED */
};

inline uint64_t bits_at(uint32_t lanes, int vector) {
  return static_cast<uint64_t>(lanes) << (vector * LANES);
}
inline uint32_t lanes_at(uint64_t bits, int vector) {
  return static_cast<uint32_t>(bits >> (vector * LANES)) & ALL_LANES;
}

/* ---- low-resolution rows ----------------------------------------------------------------------- */

/* A few low-resolution rows as float32: scores, or for the order `probs` their softmax. An invalid
 * pixel is NaN in every class. Rows repeat their last value past the end, so that the upper tap of
 * the last column may be read at lower + 1 (its weight is 0 and its value the same). */
struct Band {
  float *values;    /* (C, MAX_BAND_ROWS, stride) */
  uint8_t *settled; /* (MAX_BAND_ROWS, low_width): the class with score 0 = the maximum; or NOT_SETTLED */
  int64_t stride;
  int first;

  float *row(int c, int r) const {
    return values + (static_cast<int64_t>(c) * MAX_BAND_ROWS + r - first) * stride;
  }
};

inline Floats halves_until(const uint16_t *from, int64_t count) {
  if (count >= LANES) return load_halves(from);
  uint16_t few[LANES] = {};
  for (int64_t i = 0; i < count; ++i) few[i] = from[i];
  return load_halves(few);
}

void softmax_columns(const Band &band, int classes, int r, int64_t i) {
  Floats m = load(band.row(0, r) + i);
  for (int c = 1; c < classes; ++c) m = larger(load(band.row(c, r) + i), m);
  Floats s0 = splat(0.0f);
  for (int c = 0; c < classes; ++c) {
    const Floats e = exp_n(load(band.row(c, r) + i) - m);
    store(band.row(c, r) + i, e);
    s0 += e;
  }
  const Floats inv = 1.0f / s0;
  for (int c = 0; c < classes; ++c) store(band.row(c, r) + i, load(band.row(c, r) + i) * inv);
}

void widen_row(const cada_frame &frame, Band &band, int r) {
  const int classes = frame.classes;
  const int64_t width = frame.low_width;
  const int64_t plane = static_cast<int64_t>(frame.low_height) * width;
  const uint16_t *const scores = frame.scores + static_cast<int64_t>(r) * width;
  const Ints infinite = splat(0x7F800000);
  for (int64_t i = 0; i < width; i += LANES) {
    Ints winner = splat(NOT_SETTLED);
    Floats highest = splat(HALF_LEAST);
    uint32_t invalid = 0;
    for (int c = classes - 1; c >= 0; --c) { /* downwards: the smallest id with a score of 0 stays */
      const Floats s = halves_until(scores + c * plane + i, width - i);
      invalid |= lanes_of(same((Ints)s & infinite, infinite));
      winner = pick(same(s, splat(0.0f)), splat(static_cast<int32_t>(c)), winner);
      highest = larger(s, highest);
      store(band.row(c, r) + i, s);
    }
    /* Scores that some caller did not centre may be above 0: then nothing is settled. */
    winner = pick(greater(highest, splat(0.0f)), splat(NOT_SETTLED), winner);
    if (frame.order == CADA_ORDER_PROBS) softmax_columns(band, classes, r, i);
    if (invalid) {
      winner = pick(mask_of(invalid), splat(NOT_SETTLED), winner);
      for (int c = 0; c < classes; ++c) {
        float *const at = band.row(c, r) + i;
        store(at, pick(mask_of(invalid), splat(float_of(NAN_BITS)), load(at)));
      }
    }
    for (int64_t j = i; j < width && j < i + LANES; ++j) {
      band.settled[(r - band.first) * width + j] = static_cast<uint8_t>(winner[j - i]);
    }
  }
  for (int c = 0; c < classes; ++c) {
    float *const row = band.row(c, r);
    for (int64_t j = width; j < band.stride; ++j) row[j] = row[width - 1];
  }
}

/* ---- a column of blocks ------------------------------------------------------------------------ */

/* The horizontal taps of PIXELS columns. Where the taps of a vector lie within LANES samples (always,
 * unless the grid shrinks) they are chosen from two registers; else they are gathered. */
struct Columns {
  Ints lower[VECTORS];
  Floats weight[VECTORS];
  int64_t base[VECTORS];
  bool near;
  int first, last; /* low-resolution columns that the block touches */
};

Columns columns_at(const Frame &frame, int column) {
  Columns columns;
  columns.near = true;
  for (int v = 0; v < VECTORS; ++v) {
    const int32_t *const lower = frame.x.lower + column + v * LANES;
    columns.base[v] = lower[0];
    columns.near &= lower[LANES - 1] - lower[0] < LANES;
    columns.lower[v] = load_anywhere(lower);
    columns.weight[v] = load_anywhere(frame.x.weight + column + v * LANES);
  }
  if (columns.near) {
    for (int v = 0; v < VECTORS; ++v) {
      columns.lower[v] -= static_cast<int32_t>(columns.base[v]);
    }
  } else {
    for (int64_t &base : columns.base) base = 0;
  }
  const int32_t *const lower = frame.x.lower + column;
  const int end = frame.given.low_width - 1;
  columns.first = lower[0];
  columns.last = lower[PIXELS - 1] < end ? lower[PIXELS - 1] + 1 : end;
  return columns;
}

template <bool NEAR>
void spread_row(const Band &band, const Columns &columns, int classes, int r, float *spread) {
  for (int c = 0; c < classes; ++c) {
    const float *const row = band.row(c, r);
    for (int v = 0; v < VECTORS; ++v) {
      const float *const from = row + columns.base[v];
      const Floats a = NEAR ? choose(from, columns.lower[v]) : gather(from, columns.lower[v]);
      const Floats b = NEAR ? choose(from + 1, columns.lower[v]) : gather(from + 1, columns.lower[v]);
      store(spread + c * PIXELS + v * LANES, fused(columns.weight[v], b - a, a));
    }
  }
}

/* The block between two low-resolution rows, horizontally interpolated: u = upper + fy * step. */
struct Cell {
  float *upper, *lower, *step; /* (C, PIXELS) each */
  int row;                     /* low-resolution row of `upper`; -1 before the first */
  int settled;                 /* class whose score is the maximum, 0, at every tap; or MIXED */
};

/* With every tap's maximum 0 and won by the same class, that class wins every pixel between with
 * u = 0 exactly: classes of smaller id are strictly negative at all taps and stay so (pixel.h, taps),
 * others are at most 0. Then m = 0, d = u, and no search for the maximum is needed. About 2 blocks in
 * 3 of a street scene. */
int settled_label(const Band &band, const Columns &columns, int64_t width, int r0, int r1) {
  if (columns.last - columns.first > PIXELS) return MIXED; /* a shrinking grid: not worth looking */
  const uint8_t *const above = band.settled + (r0 - band.first) * width;
  const uint8_t *const below = band.settled + (r1 - band.first) * width;
  const int label = above[columns.first];
  bool settled = label != NOT_SETTLED;
  for (int i = columns.first; i <= columns.last; ++i) {
    settled &= above[i] == label && below[i] == label;
  }
  return settled ? label : MIXED;
}

void move_cell(const cada_frame &frame, const Band &band, const Columns &columns, int r, Cell &cell) {
  const int classes = frame.classes;
  const int below = r + 1 < frame.low_height ? r + 1 : r;
  const auto spread = columns.near ? spread_row<true> : spread_row<false>;
  if (cell.row >= 0 && r == cell.row + 1) {
    float *const upper = cell.upper;
    cell.upper = cell.lower;
    cell.lower = upper;
  } else {
    spread(band, columns, classes, r, cell.upper);
  }
  spread(band, columns, classes, below, cell.lower);
  for (int i = 0; i < classes * PIXELS; i += LANES) {
    store(cell.step + i, load(cell.lower + i) - load(cell.upper + i));
  }
  cell.row = r;
  cell.settled = frame.order == CADA_ORDER_LOGITS
                     ? settled_label(band, columns, frame.low_width, r, below)
                     : MIXED;
}

/* ---- one block: softmax, label, entropy ---------------------------------------------------------- */

struct Sums { /* over classes, in class order */
  Floats s0[VECTORS], s1[VECTORS];
};

inline Sums zero_sums() {
  Sums sums;
  for (int v = 0; v < VECTORS; ++v) sums.s0[v] = sums.s1[v] = splat(0.0f);
  return sums;
}

inline void add_class(Sums &sums, int v, Floats d, float *value) {
  const Floats e = exp_n(d);
  store(value, e);
  sums.s0[v] += e;
  sums.s1[v] = fused(d, e, sums.s1[v]);
}

inline Floats value_at(const Cell &cell, Floats fy, int at) {
  return fused(fy, load(cell.step + at), load(cell.upper + at));
}

/* First largest class and its value; interpolated values are left in block.values. */
inline void find_winner(const Cell &cell, int classes, Floats fy, Block &block, Floats *m, Ints *y) {
  for (int v = 0; v < VECTORS; ++v) {
    m[v] = value_at(cell, fy, v * LANES);
    y[v] = splat(0);
    store(block.values + v * LANES, m[v]);
  }
  for (int c = 1; c < classes; ++c) {
    const Ints id = splat(static_cast<int32_t>(c));
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const int at = c * PIXELS + v * LANES;
      const Floats u = value_at(cell, fy, at);
      store(block.values + at, u);
      y[v] = pick(greater(u, m[v]), id, y[v]);
      m[v] = larger(u, m[v]);
    }
  }
}

inline Mask valid_lanes(Floats m) { return same(m, m); } /* an invalid pixel is NaN in every class */

inline void keep_vector(Block &block, int v, Mask valid, Floats entropy, Floats confidence,
                        Floats scale) {
  const Floats nan = splat(float_of(NAN_BITS));
  store(block.entropy + v * LANES, pick(valid, entropy, nan));
  store(block.confidence + v * LANES, pick(valid, confidence, nan));
  store(block.scale + v * LANES, scale);
}

inline void finish_logits(Block &block, int v, const Sums &sums, Mask valid) {
  const Floats inv = 1.0f / sums.s0[v];
  const Floats entropy = fused(-sums.s1[v], inv, ln_n(sums.s0[v]));
  keep_vector(block, v, valid, entropy, inv, inv);
}

void logits_settled(const Cell &cell, int classes, Floats fy, Block &block) {
  Sums sums = zero_sums();
  for (int c = 0; c < classes; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const int at = c * PIXELS + v * LANES;
      add_class(sums, v, value_at(cell, fy, at), block.values + at);
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    finish_logits(block, v, sums, mask_of(ALL_LANES));
    store(block.label + v * LANES, splat(static_cast<int32_t>(cell.settled)));
  }
  block.valid = block.inside;
  block.label_of_all = cell.settled;
}

inline int common_label(const Ints *y) {
  const Ints first = splat(static_cast<int32_t>(y[0][0]));
  uint32_t equal = ALL_LANES;
  for (int v = 0; v < VECTORS; ++v) equal &= lanes_of(same(y[v], first));
  return equal == ALL_LANES ? first[0] : MIXED;
}

inline void keep_labels(Block &block, const Floats *m, const Ints *y) {
  uint64_t valid = 0;
  for (int v = 0; v < VECTORS; ++v) {
    store(block.label + v * LANES, y[v]);
    valid |= bits_at(lanes_of(valid_lanes(m[v])), v);
  }
  block.valid = valid & block.inside;
  block.label_of_all = common_label(y);
}

void logits_contested(const Cell &cell, int classes, Floats fy, Block &block) {
  Floats m[VECTORS];
  Ints y[VECTORS];
  find_winner(cell, classes, fy, block, m, y);
  Sums sums = zero_sums();
  for (int c = 0; c < classes; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float *const value = block.values + c * PIXELS + v * LANES;
      add_class(sums, v, load(value) - m[v], value);
    }
  }
  for (int v = 0; v < VECTORS; ++v) finish_logits(block, v, sums, valid_lanes(m[v]));
  keep_labels(block, m, y);
}

void probs(const Cell &cell, int classes, Floats fy, Block &block) {
  Floats m[VECTORS], sum[VECTORS];
  Ints y[VECTORS];
  find_winner(cell, classes, fy, block, m, y);
  for (int v = 0; v < VECTORS; ++v) sum[v] = splat(0.0f);
  for (int c = 0; c < classes; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const Floats p = load(block.values + c * PIXELS + v * LANES);
      sum[v] = pick(at_least(p, splat(PROBABILITY_CUT)), fused(p, ln_n(p), sum[v]), sum[v]);
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    keep_vector(block, v, valid_lanes(m[v]), 0.0f - sum[v], m[v], splat(1.0f));
  }
  keep_labels(block, m, y);
}

void evaluate(const Frame &frame, const Cell &cell, Block &block) {
  const Floats fy = splat(frame.y.weight[block.row]);
  if (frame.given.order == CADA_ORDER_PROBS) {
    probs(cell, frame.given.classes, fy, block);
  } else if (cell.settled != MIXED) {
    logits_settled(cell, frame.given.classes, fy, block);
  } else {
    logits_contested(cell, frame.given.classes, fy, block);
  }
}

/* ---- all blocks of the rows that this worker takes ------------------------------------------------- */

struct Memory {
  Band band;
  Cell cell;
  Block block;
};

Memory take_memory(const Frame &frame, Arena &arena) {
  const int64_t classes = frame.given.classes;
  Memory memory{};
  /* + 1: the upper tap of the last column; + LANES: a whole vector read from there. */
  memory.band.stride = padded(frame.given.low_width + 1 + LANES);
  memory.band.values = arena.take<float>(classes * MAX_BAND_ROWS * memory.band.stride);
  memory.band.settled = arena.take<uint8_t>(int64_t{MAX_BAND_ROWS} * frame.given.low_width);
  memory.cell.upper = arena.take<float>(classes * PIXELS);
  memory.cell.lower = arena.take<float>(classes * PIXELS);
  memory.cell.step = arena.take<float>(classes * PIXELS);
  memory.block.values = arena.take<float>(classes * PIXELS);
  return memory;
}

/* Calls use(block) for every block of the image; the host cut the rows so that a band holds them. */
template <class Use> void for_each_block(const Frame &frame, Memory &memory, Use use) {
  const cada_frame &given = frame.given;
  Band &band = memory.band;
  Block &block = memory.block;
  int64_t begin, end;
  while (frame.rows->take(&begin, &end)) {
    band.first = frame.y.lower[begin];
    const int last = frame.y.lower[end - 1];
    for (int r = band.first; r <= last + 1 && r < given.low_height; ++r) widen_row(given, band, r);

    for (int column = 0; column < given.width; column += PIXELS) {
      const Columns columns = columns_at(frame, column);
      block.column = column;
      block.width = given.width - column < PIXELS ? given.width - column : PIXELS;
      block.inside = ALL >> (PIXELS - block.width);
      memory.cell.row = -1;
      for (int64_t row = begin; row < end; ++row) {
        const int r = frame.y.lower[row];
        if (r != memory.cell.row) move_cell(given, band, columns, r, memory.cell);
        block.row = static_cast<int>(row);
        evaluate(frame, memory.cell, block);
        use(block);
      }
    }
  }
}

inline int64_t position(const Frame &frame, const Block &block) {
  return static_cast<int64_t>(block.row) * frame.given.width + block.column;
}

uint64_t masked_pixels(const Frame &frame, const Block &block) {
  if (frame.given.mask == nullptr) return 0;
  const uint8_t *const mask = frame.given.mask + position(frame, block);
  uint64_t masked = 0;
  for (int i = 0; i < block.width; ++i) masked |= static_cast<uint64_t>(mask[i] != 0) << i;
  return masked;
}

/* Labels of `kept` pixels, 255 for the rest. */
void write_labels(uint8_t *labels, const Frame &frame, const Block &block, const int32_t *label,
                  uint64_t kept) {
  if (labels == nullptr) return;
  alignas(64) uint8_t few[PIXELS];
  uint8_t *const to = labels + position(frame, block);
  uint8_t *const bytes = block.width == PIXELS ? to : few;
  for (int v = 0; v < VECTORS; ++v) {
    const Ints unselected = splat(CADA_UNSELECTED);
    store_bytes(bytes + v * LANES,
                pick(mask_of(lanes_at(kept, v)), load(label + v * LANES), unselected));
  }
  if (bytes == few) memcpy(to, few, static_cast<size_t>(block.width));
}

void write_floats(float *map, const Frame &frame, const Block &block, const float *values) {
  if (map == nullptr) return;
  float *const to = map + position(frame, block);
  if (block.width < PIXELS) {
    memcpy(to, values, static_cast<size_t>(block.width) * sizeof(float));
    return;
  }
  for (int v = 0; v < VECTORS; ++v) store_anywhere(to + v * LANES, load(values + v * LANES));
}

/* Blocks go downwards, each output line of memory is new: ask for the next one while this block is
 * computed. Inline by force: GCC 12 takes a function that only prefetches for one without effect
 * and drops the call. */
__attribute__((always_inline)) inline void prefetch_below(const Maps &maps, const Frame &frame, const Block &block) {
  const int64_t below = position(frame, block) + frame.given.width;
  if (block.row + 1 >= frame.given.height) return;
  if (maps.labels) __builtin_prefetch(maps.labels + below, 1);
  for (int i = 0; i < PIXELS; i += 16) {
    if (maps.entropy) __builtin_prefetch(maps.entropy + below + i, 1);
    if (maps.confidence) __builtin_prefetch(maps.confidence + below + i, 1);
  }
}

inline int64_t count_of(uint64_t bits) { return __builtin_popcountll(bits); }

/* ---- statistics -------------------------------------------------------------------------------------- */

/* 32-bit sums, one set for each lane, so that adding a pixel needs no reduction. A term is the float
 * 2^23 + q whose low bits are q; the bits of 2^23 are taken off at the end, once for each pixel. */
struct Tally {
  uint32_t *sums;        /* (C, C, LANES), wrapping */
  uint32_t *pixels;      /* (C, LANES) */
  uint32_t *histograms;  /* (HISTOGRAMS, C, bins) */
  uint8_t *touched;      /* (C): this class has something to flush */
  int filled;            /* vectors since the last flush: no lane has taken more pixels */
};

Tally take_tally(int64_t classes, Arena &arena) {
  Tally tally{};
  tally.sums = arena.take<uint32_t>(classes * classes * LANES);
  tally.pixels = arena.take<uint32_t>(classes * LANES);
  tally.histograms = arena.take<uint32_t>(HISTOGRAMS * classes * CADA_HISTOGRAM_BINS);
  tally.touched = arena.take<uint8_t>(classes);
  return tally;
}

void flush(Tally &tally, int classes, Evidence &evidence) {
  for (int y = 0; y < classes; ++y) {
    if (!tally.touched[y]) continue;
    uint32_t *const pixels = tally.pixels + y * LANES;
    for (int c = 0; c < classes; ++c) {
      uint32_t *const sums = tally.sums + (static_cast<int64_t>(y) * classes + c) * LANES;
      int64_t total = 0;
      for (int i = 0; i < LANES; ++i) {
        total += sums[i] - pixels[i] * UNIT_BITS;
      }
      evidence.sums[static_cast<int64_t>(y) * classes + c] += total;
      store(sums, splat(0u));
    }
    for (int i = 0; i < LANES; ++i) evidence.pixels[y] += pixels[i];
    store(pixels, splat(0u));
    tally.touched[y] = 0;
  }
  tally.filled = 0;
}

inline Words term(const float *value, Floats k) {
  return (Words)fused(load(value), k, splat(UNIT));
}

/* Every pixel of the block counts, and for one class. */
void add_block(Tally &tally, const Block &block, int classes, const Floats *k) {
  const int y = block.label_of_all;
  uint32_t *const sums = tally.sums + static_cast<int64_t>(y) * classes * LANES;
  tally.touched[y] = 1;
  store(tally.pixels + y * LANES, load(tally.pixels + y * LANES) + uint32_t{VECTORS});
  for (int c = 0; c < classes; ++c) {
    Words total = load(sums + c * LANES);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) total += term(block.values + c * PIXELS + v * LANES, k[v]);
    store(sums + c * LANES, total);
  }
}

/* Some lanes of one vector count, for whatever classes they have: once through for each class. */
void add_lanes(Tally &tally, const Block &block, int classes, int v, Floats k, uint32_t lanes) {
  const Ints label = load(block.label + v * LANES);
  while (lanes) {
    const int y = block.label[v * LANES + __builtin_ctz(lanes)];
    const uint32_t here = lanes & lanes_of(same(label, splat(static_cast<int32_t>(y))));
    const Mask where = mask_of(here);
    uint32_t *const sums = tally.sums + static_cast<int64_t>(y) * classes * LANES;
    uint32_t *const pixels = tally.pixels + y * LANES;
    tally.touched[y] = 1;
    store(pixels, add_where(where, load(pixels), splat(1u)));
#pragma GCC unroll 4
    for (int c = 0; c < classes; ++c) {
      const Words total = load(sums + c * LANES);
      store(sums + c * LANES,
            add_where(where, total, term(block.values + c * PIXELS + v * LANES, k)));
    }
    lanes &= ~here;
  }
}

void add_entropies(Tally &tally, const Block &block, int classes, uint64_t live) {
  alignas(64) int32_t bins[PIXELS];
  for (int v = 0; v < VECTORS; ++v) {
    Ints bin = ((Ints)load(block.entropy + v * LANES) >> 20) - ((127 - 13) << 3);
    bin = bin & ~(bin >> 31);                    /* at least 0 */
    const Ints over = (127 - bin) >> 31;         /* all ones above 127 */
    bin = (bin & ~over) | (over & 127);
    store(bins + v * LANES, bin + load(block.label + v * LANES) * int32_t{CADA_HISTOGRAM_BINS});
  }
  const int64_t size = static_cast<int64_t>(classes) * CADA_HISTOGRAM_BINS;
  if (live == ALL) {
    constexpr int APART = PIXELS / HISTOGRAMS;
    for (int i = 0; i < APART; ++i) {
#pragma GCC unroll 8
      for (int t = 0; t < HISTOGRAMS; ++t) {
        ++tally.histograms[t * size + static_cast<uint32_t>(bins[t * APART + i])];
      }
    }
    return;
  }
  for (; live; live &= live - 1) ++tally.histograms[bins[__builtin_ctzll(live)]];
}

void add_histograms(const Tally &tally, int classes, Evidence &evidence) {
  const int64_t size = static_cast<int64_t>(classes) * CADA_HISTOGRAM_BINS;
  for (int t = 0; t < HISTOGRAMS; ++t) {
    for (int64_t i = 0; i < size; ++i) evidence.histogram[i] += tally.histograms[t * size + i];
  }
}

void accumulate(const Frame &frame, int32_t weighting, const Maps &maps, Evidence &evidence,
                char *scratch) {
  const int classes = frame.given.classes;
  Arena arena{scratch, 0};
  Memory memory = take_memory(frame, arena);
  Tally tally = take_tally(classes, arena);

  for_each_block(frame, memory, [&](const Block &block) {
    const uint64_t masked = masked_pixels(frame, block);
    const uint64_t live = block.valid & ~masked;
    prefetch_below(maps, frame, block);
    evidence.masked += count_of(masked);
    evidence.invalid += count_of(block.inside & ~block.valid & ~masked);
    write_labels(maps.labels, frame, block, block.label, live);
    write_floats(maps.entropy, frame, block, block.entropy);

    Floats k[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      const Floats scale = load(block.scale + v * LANES);
      const Floats confidence = load(block.confidence + v * LANES);
      k[v] = (weighting == CADA_WEIGHT_CONFIDENCE ? confidence * scale : scale) * UNIT;
    }
    if (tally.filled + VECTORS > SUM_CAPACITY) flush(tally, classes, evidence);
    tally.filled += VECTORS;
    if (live == ALL && block.label_of_all != MIXED) {
      add_block(tally, block, classes, k);
    } else {
      for (int v = 0; v < VECTORS; ++v) {
        add_lanes(tally, block, classes, v, k[v], lanes_at(live, v));
      }
    }
    add_entropies(tally, block, classes, live);
  });
  flush(tally, classes, evidence);
  add_histograms(tally, classes, evidence);
}

/* ---- rules --------------------------------------------------------------------------------------------- */

/* What a rule looks at, for one block. */
struct Judged {
  alignas(64) int32_t label[PIXELS];
  alignas(64) float measure[PIXELS];
  alignas(64) float confidence[PIXELS];
  uint64_t passed; /* whatever the mask and validity say */
};

void measure_margin(const Block &block, int classes, Judged &judged) {
  for (int v = 0; v < VECTORS; ++v) {
    Floats first = load(block.values + v * LANES), second = splat(0.0f);
    for (int c = 1; c < classes; ++c) {
      const Floats value = load(block.values + c * PIXELS + v * LANES);
      second = larger(pick(greater(value, first), first, value), second);
      first = larger(value, first);
    }
    const Floats runner_up = second * load(block.scale + v * LANES);
    store(judged.measure + v * LANES, load(block.confidence + v * LANES) - runner_up);
  }
}

void measure_ratio(const Block &block, int classes, const float *class_weights, Judged &judged) {
  for (int v = 0; v < VECTORS; ++v) {
    const Floats scale = load(block.scale + v * LANES);
    Floats chosen = load(block.values + v * LANES) * scale;
    Floats ratio = chosen / class_weights[0];
    Ints label = splat(0);
    for (int c = 1; c < classes; ++c) {
      const Floats p = load(block.values + c * PIXELS + v * LANES) * scale;
      const Floats candidate = p / class_weights[c];
      const Mask better = greater(candidate, ratio);
      label = pick(better, splat(static_cast<int32_t>(c)), label);
      chosen = pick(better, p, chosen);
      ratio = pick(better, candidate, ratio);
    }
    const Floats nan = splat(float_of(NAN_BITS));
    const Mask valid = mask_of(lanes_at(block.valid, v));
    store(judged.label + v * LANES, label);
    store(judged.measure + v * LANES, ratio);
    store(judged.confidence + v * LANES, pick(valid, chosen, nan));
  }
}

/* Every comparison is false for NaN, as IEEE says. */
inline Mask passes(int32_t comparator, Floats measure, Floats threshold) {
  switch (comparator) {
  case CADA_LT: return greater(threshold, measure);
  case CADA_LE: return at_least(threshold, measure);
  case CADA_GT: return greater(measure, threshold);
  default: return at_least(measure, threshold);
  }
}

void judge(const Block &block, int classes, const cada_rule &rule, Judged &judged) {
  if (rule.measure == CADA_RATIO) {
    measure_ratio(block, classes, rule.class_weights, judged);
  } else {
    memcpy(judged.label, block.label, sizeof judged.label);
    memcpy(judged.confidence, block.confidence, sizeof judged.confidence);
    if (rule.measure == CADA_MARGIN) {
      measure_margin(block, classes, judged);
    } else {
      memcpy(judged.measure, rule.measure == CADA_ENTROPY ? block.entropy : block.confidence,
             sizeof judged.measure);
    }
  }
  judged.passed = 0;
  for (int v = 0; v < VECTORS; ++v) {
    const Floats threshold = gather(rule.thresholds, load(judged.label + v * LANES));
    const Mask passed = passes(rule.comparator, load(judged.measure + v * LANES), threshold);
    judged.passed |= bits_at(lanes_of(passed), v);
  }
}

/* counts[label] += 1 for every pixel in `pixels`: whole vectors of one label at once. */
void count_labels(const int32_t *label, uint64_t pixels, int64_t *counts) {
  while (pixels) {
    const int first = __builtin_ctzll(pixels), v = first / LANES;
    const Ints labels = load(label + v * LANES);
    const uint32_t lanes = lanes_of(same(labels, splat(label[first])));
    const uint64_t here = pixels & bits_at(lanes, v);
    counts[label[first]] += count_of(here);
    pixels &= ~here;
  }
}

void count(const Frame &frame, const cada_rule *rules, int32_t rule_count, Kept &kept,
           char *scratch) {
  const int classes = frame.given.classes;
  Arena arena{scratch, 0};
  Memory memory = take_memory(frame, arena);
  Judged judged;
  for_each_block(frame, memory, [&](const Block &block) {
    const uint64_t live = block.valid & ~masked_pixels(frame, block);
    if (live == 0) return;
    for (int r = 0; r < rule_count; ++r) {
      judge(block, classes, rules[r], judged);
      count_labels(judged.label, judged.passed & live,
                   kept.selected + static_cast<int64_t>(r) * classes);
    }
  });
}

void select(const Frame &frame, const cada_rule &rule, const Maps &maps, Kept &kept,
            char *scratch) {
  const int classes = frame.given.classes;
  Arena arena{scratch, 0};
  Memory memory = take_memory(frame, arena);
  Judged judged;
  for_each_block(frame, memory, [&](const Block &block) {
    const uint64_t masked = masked_pixels(frame, block);
    const uint64_t live = block.valid & ~masked;
    prefetch_below(maps, frame, block);
    judge(block, classes, rule, judged);
    const uint64_t selected = judged.passed & live;
    kept.masked += count_of(masked);
    kept.invalid += count_of(block.inside & ~block.valid & ~masked);
    count_labels(judged.label, live, kept.predicted);
    count_labels(judged.label, selected, kept.selected);
    write_labels(maps.labels, frame, block, judged.label, selected);
    write_floats(maps.entropy, frame, block, block.entropy);
    write_floats(maps.confidence, frame, block, judged.confidence);
  });
}

/* ---- encoding ---------------------------------------------------------------------------------------------- */

inline Floats raw_until(const Raw &raw, int64_t at, int64_t count) {
  if (raw.dtype == CADA_FLOAT16) {
    return halves_until(static_cast<const uint16_t *>(raw.values) + at, count);
  }
  const float *const from = static_cast<const float *>(raw.values) + at;
  if (count >= LANES) return load_anywhere(from);
  float few[LANES] = {};
  for (int64_t i = 0; i < count; ++i) few[i] = from[i];
  return load_anywhere(few);
}

/* One vector of low-resolution pixels, of which `count` exist; classes lie raw.pixels apart. */
void encode_columns(const Raw &raw, int64_t first, int64_t count) {
  const Floats infinity = splat(float_of(0x7F800000u));
  const bool probabilities = raw.meaning == CADA_PROBABILITIES;
  const auto score = [&](Floats z) {
    return probabilities ? ln_n(larger(z, splat(LEAST_PROBABILITY))) : z;
  };
  Floats m = -infinity;
  uint32_t valid = ALL_LANES;
  for (int c = 0; c < raw.classes; ++c) {
    const Floats z = raw_until(raw, first + c * raw.pixels, count);
    valid &= lanes_of(greater(infinity, z));
    m = larger(score(z), m);
  }
  valid &= lanes_of(greater(m, -infinity));
  uint16_t halves[LANES];
  for (int c = 0; c < raw.classes; ++c) {
    const Floats z = raw_until(raw, first + c * raw.pixels, count);
    const Floats s = larger(score(z) - m, splat(HALF_LEAST));
    const bool whole = valid == ALL_LANES && count >= LANES;
    uint16_t *const encoded = raw.encoded + first + c * raw.pixels;
    store_halves(whole ? encoded : halves, s);
    if (whole) continue;
    for (int64_t i = 0; i < count && i < LANES; ++i) {
      encoded[i] = valid >> i & 1 ? halves[i] : HALF_NAN;
    }
  }
}

void encode(const Raw &raw) {
  const int64_t pieces = (raw.pixels + PIECE - 1) / PIECE;
  int64_t begin, end;
  while (raw.pieces->take(&begin, &end)) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t frame = piece / pieces * raw.classes * raw.pixels;
      const int64_t first = piece % pieces * PIECE;
      const int64_t last = first + PIECE < raw.pixels ? first + PIECE : raw.pixels;
      for (int64_t i = first; i < last; i += LANES) encode_columns(raw, frame + i, last - i);
    }
  }
}

size_t scratch_bytes(const Frame &frame) {
  Arena arena{nullptr, 0};
  take_memory(frame, arena);
  take_tally(frame.given.classes, arena);
  return arena.used;
}

} // namespace

#if defined(__AVX512F__)
const InstructionSet AVX512 = {"avx512", scratch_bytes, encode, accumulate, count, select};
#elif defined(__AVX2__)
const InstructionSet AVX2 = {"avx2", scratch_bytes, encode, accumulate, count, select};
#else
const InstructionSet BASELINE = {"baseline", scratch_bytes, encode, accumulate, count, select};
#endif

} // namespace cada
