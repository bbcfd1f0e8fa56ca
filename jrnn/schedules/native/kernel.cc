// The loop of an affine cell and its derivative, for one CPU, in float32: everything but the cell's gates (cell.cc).
//
// Compiled once for a machine, with bind.cc. T steps, N sequences, F features, H units. Units are taken in blocks of UB;
// what the library owns is laid out by row (a step of a sequence), block, gate: [row][block][gate][UB]. Weights are packed
// once a call into panels of UB columns, but for calls of few steps. Threads share the batch, the units, or both; those
// that share units meet at a barrier at each step.

#include "kernel.h"

#include <deque>

#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace {

// --- how threads share a run ---------------------------------------------------------------------------------------

// The sizes of a run, and how threads share it: `across` parts of the batch times `units` parts of the units.
struct Run {
  const Cell& cell;
  long T, N, F, H;
  bool reverse;
  long G = cell.gates, blocks = (H + UB - 1) / UB, width = G * H, across = 1, units = 1;
  bool apart = cell.sums != cell.gates;  // whether u and v have gradients of their own
  long threads() const { return across * units; }
  long time(long i) const { return reverse ? T - 1 - i : i; }

  // How many threads pay, of at most `most`, and what they share.
  void plan(long most) {
    const double work = 2.0 * T * N * (F + H) * width, step = 2.0 * N * H * width;
    const double weights = 4.0 * width * (F + H);
    most = std::min<long>(most, std::max(1.0, work / 4e6));
    units = 1;
    while (units * 2 <= most && (weights / units > 5e5 || N / (most / units) < 4) && blocks >= 2 * units &&
           step / units > 1.5e5)
      units *= 2;
    across = std::max(1L, std::min(most / units, N / 4));
  }
};

// What one thread of a run does: sequences n0 to n1, and of all else what it shares with others.
struct Part {
  long id, threads, n0, n1, unit, units;  // unit: its place among those that share its sequences
  Barrier &all, &group;                   // group: of those
  Pieces &steps, &panels, &rows;          // of a step's units, in the group; of the gradients of weights and of inputs
  std::pair<long, long> share(long count) const { return ::share(count, threads, id); }
};

template <class Function>
void divide(const Run& run, Crew& crew, Function work) {
  const long threads = run.threads();
  Barrier all;
  std::vector<Barrier> groups(run.across);
  std::deque<Pieces> steps;
  Pieces panels(threads), rows(threads);
  all.reset(threads);
  for (auto& group : groups) {
    group.reset(run.units);
    steps.emplace_back(run.units);
  }
  crew.run(threads, [&](long id) {
    const long across = id / run.units;
    const auto [n0, n1] = share(run.N, run.across, across);
    work(Part{id, threads, n0, n1, id % run.units, run.units, all, groups[across], steps[across], panels, rows});
  });
}

// Columns of w (K, G * H), units of one block of one gate, as a panel (K, UB).
void pack(const Run& run, const float* w, long K, long ub, long g, float* out) {
  pack_columns(std::min<long>(UB, run.H - ub * UB), K, w + g * run.H + ub * UB, run.width, out);
}

// Rows first .. first + UB of w (K, G * H) as a panel (blocks * G * UB, UB) of its transpose.
void pack_transposed(const Run& run, const float* w, long K, long first, float* out) {
  for (long ub = 0; ub < run.blocks; ++ub)
    for (long g = 0; g < run.G; ++g, out += UB * UB)
      pack_rows(std::min<long>(UB, K - first), std::min<long>(UB, run.H - ub * UB),
                w + first * run.width + g * run.H + ub * UB, run.width, out);
}

// Vectors (H) of theta, in whole blocks.
void pack_theta(const Run& run, const std::vector<const float*>& theta, float* out) {
  for (const float* from : theta)
    for (long u = 0; u < run.blocks * UB; ++u) *out++ = u < run.H ? from[u] : 0.0f;
}

// Bytes of weights that stay in a core's own cache from step to step.
constexpr long NEAR = 1 << 18;

// A length of row that is no multiple of a page, so that rows do not share the few places of a cache.
inline long padded(long floats) { return floats % 256 ? floats : floats + 16; }

// Parameters as a run reads them, by the floats of each; packed by the first run that is given them.
class Weights {
 public:
  Weights(size_t ih, size_t hh, size_t b, size_t theta)
      : scratch_(Scratch::rounded(ih) + Scratch::rounded(hh) + Scratch::rounded(b) + Scratch::rounded(theta)),
        ih(scratch_.take(ih)), hh(scratch_.take(hh)), b(scratch_.take(b)), theta(scratch_.take(theta)) {}

 private:
  Scratch scratch_;

 public:
  float *const ih, *const hh, *const b, *const theta;
  bool packed = false;
};

// --- the loop ----------------------------------------------------------------------------------------------------

using Inputs = std::vector<const float*>;  // an array for each state, or each vector of theta
using Outputs = std::vector<float*>;

struct Forward {
  const float *x, *w_ih, *b, *w_hh;
  const uint8_t *valid, *resets;  // (T, N) or null
  const float* mask;              // (N, H) or null: what h is multiplied by on its way into the recurrent product
  Inputs theta, state, restart;
  Outputs last;
  float* parts;   // (T, N, parts_row) or null: what the gates read, for the derivative
  Outputs after;  // (T, N, H): the states after each step; null, but for h, where nobody asks for them
  long parts_row;
};

// Few steps of few sequences read the weights where they are: to pack them would take longer than to use them.
inline bool reads_in_place(const Run& run) { return run.T <= 4 && run.N <= FEW && run.H % UB == 0; }

Weights forward_weights(const Run& run) {
  const size_t columns = reads_in_place(run) ? 0 : run.blocks * run.G * UB;
  return Weights(columns * run.F, columns * run.H, columns, run.cell.thetas * run.blocks * UB);
}

void forward_steps(Run run, const Forward& f, Weights& weights) {
  run.plan(processors());
  Crew crew(run.threads());
  if (crew.size() < run.threads()) run.plan(crew.size());
  const Cell& cell = run.cell;
  const long T = run.T, N = run.N, F = run.F, H = run.H, G = run.G, blocks = run.blocks, threads = run.threads();
  const long P = cell.parts, S = cell.states, hidden = blocks * UB;
  const long most_rows = (N + run.across - 1) / run.across, most_blocks = (blocks + run.units - 1) / run.units;
  const long chunk = std::max(1L, std::min(T, 96 / most_rows));
  const bool far = 4 * (F + H) * run.width > NEAR, in_place = reads_in_place(run);
  const long u_row = padded(blocks * G * UB);
  const long at_once = most_rows > FEW ? 1 : most_blocks;  // blocks of units whose gates follow their product
  const size_t tile_size = most_rows * at_once * P * UB;
  const size_t u_size = chunk * most_rows * u_row;
  const size_t own = Scratch::rounded(tile_size) + Scratch::rounded(most_rows * H);
  Scratch scratch(run.across * Scratch::rounded(u_size) + threads * own);
  float *p_ih = weights.ih, *p_hh = weights.hh, *p_b = weights.b, *p_theta = weights.theta;
  std::vector<float*> projected(run.across), mine(threads);
  for (auto& u : projected) u = scratch.take(u_size);
  for (auto& m : mine) m = scratch.take(own);
  std::vector<Inputs> olds(threads, Inputs(S));
  std::vector<Outputs> news(threads, Outputs(S));
  std::vector<int> own_places(G);
  for (long g = 0; g < G; ++g) own_places[g] = g;

  divide(run, crew, [&](const Part& part) {
    const long id = part.id, n0 = part.n0, n1 = part.n1;
    if (!weights.packed) {
      const auto [k0, k1] = part.share(blocks * G);
      for (long p = k0; p < k1 && !in_place; ++p) {
        pack(run, f.w_ih, F, p / G, p % G, p_ih + p * F * UB);
        pack(run, f.w_hh, H, p / G, p % G, p_hh + p * H * UB);
        pack(run, f.b, 1, p / G, p % G, p_b + p * UB);
      }
      if (id == 0) pack_theta(run, f.theta, p_theta);
      part.all.wait();
    }
    const long rows = n1 - n0;
    const Split split{blocks, part.units, rows};
    float* us = projected[id / run.units];
    float* tile = mine[id];
    float* fed = tile + Scratch::rounded(tile_size);
    Inputs& old = olds[id];   // states before the step, (N, H)
    Outputs& now = news[id];  // and after it
    Panels at;
    for (long p = 0; p < at_once * G; ++p) {
      const long g = p % G, slot = cell.slot[g];
      at.from.push_back(slot == g ? p * UB : -1);
      at.to.push_back((p / G * P + slot) * UB);
    }

    for (long start = 0; start < T; start += chunk) {
      const long count = std::min(chunk, T - start), low = run.reverse ? T - start - count : start;
      // The input product of some blocks and rows, for all steps of the chunk.
      const auto project = [&](long first, long end, long r0, long r1) {
        for (long p = first * G; p < end * G; ++p) {
          const float *panel = p_ih + p * F * UB, *next = far ? panel + F * UB : nullptr;
          if (r1 - r0 == N)
            multiply(count * N, F, f.x + low * N * F, F, panel, p_b + p * UB, 0, us + p * UB, u_row, next);
          else
            for (long i = 0; i < count; ++i)
              multiply(r1 - r0, F, f.x + ((low + i) * N + n0 + r0) * F, F, panel, p_b + p * UB, 0,
                       us + (i * rows + r0) * u_row + p * UB, u_row, next);
        }
      };
      // Both products of a step, onto the bias.
      const auto product = [&](long first, long end, const float* x, const float* h, float* parts, long row) {
        for (long n = 0; n < rows; ++n)
          for (long p = 0; p < (end - first) * P; ++p)
            for (long j = 0; j < UB; ++j)
              parts[n * row + p * UB + j] = p % P < G ? f.b[p % P * H + (first + p / P) * UB + j] : 0;
        stream(rows, F, x, F, f.w_ih + first * UB, run.width, G, H, end - first, parts, row, P * UB, own_places.data());
        stream(rows, H, h, H, f.w_hh + first * UB, run.width, G, H, end - first, parts, row, P * UB, cell.slot);
      };
      for (long i = start; i < start + count; ++i) {
        const long t = run.time(i), before = run.time(i - 1);
        const uint8_t* valid = f.valid ? f.valid + t * N : nullptr;
        const uint8_t* resets = f.resets ? f.resets + t * N : nullptr;
        for (long s = 0; s < S; ++s) {
          old[s] = i == 0 ? f.state[s] : f.after[s] ? f.after[s] + before * N * H : f.last[s];
          now[s] = f.after[s] ? f.after[s] + t * N * H : f.last[s];
        }
        const float* h = old[cell.hidden_state] + n0 * H;
        if (resets || f.mask) {
          for (long n = n0; n < n1; ++n) {
            const float* from = (resets && resets[n] ? f.restart : old)[cell.hidden_state] + n * H;
            float* to = fed + (n - n0) * H;
            gather(1, H, from, H, f.mask ? f.mask + n * H : nullptr, to);
          }
          h = fed;
        }
        // Some blocks and rows of the step.
        const auto advance = [&](long ub, long end, long r0, long r1) {
          const float *u = us + ((t - low) * rows + r0) * u_row + ub * G * UB, *from = h + r0 * H;
          float* parts = f.parts ? f.parts + (t * N + n0 + r0) * f.parts_row + ub * P * UB : tile;
          const long row = f.parts ? f.parts_row : at_once * P * UB;
          if (in_place)
            product(ub, end, f.x + t * N * F, h, parts, row);
          else if (rows <= FEW)
            narrow(rows, H, h, H, p_hh + ub * G * H * UB, at, (end - ub) * G, u, u_row, parts, row);
          else
            for (long g = 0; g < G; ++g)
              multiply(r1 - r0, H, from, H, p_hh + (ub * G + g) * H * UB, at.from[g] < 0 ? nullptr : u + at.from[g],
                       u_row, parts + at.to[g], row, far ? p_hh + (ub * G + g + 1) * H * UB : nullptr);
          for (long p = 0; p < (end - ub) * G && !in_place; ++p)
            if (at.from[p] < 0)
              for (long n = 0; n < r1 - r0; ++n)
                std::memcpy(parts + n * row + (p / G * P + p % G) * UB, u + n * u_row + p * UB, 4 * UB);
          cell.forward({n0 + r0, n0 + r1, ub, end, H, valid, resets, p_theta, hidden, parts, row, old.data(),
                        f.restart.data(), now.data()});
          // Nobody reads what lengthens a row, but it is returned, and memory that was never written may hold NaN.
          for (long n = 0; n < r1 - r0 && f.parts && end == blocks; ++n)
            std::fill(parts + n * row + (end - ub) * P * UB, parts + n * row + row - ub * P * UB, 0.0f);
        };
        // Of few rows each thread has one piece, of as many blocks as the others.
        const long pieces = at_once == 1 ? split.pieces() : part.units;
        for (;;) {
          const auto [p0, p1] = part.steps.take(i + 1, pieces, part.unit);
          if (p0 == p1) break;
          const auto work = [&](long b0, long b1, long r0, long r1) {
            if (i == start && !in_place) project(b0, b1, r0, r1);
            for (long ub = b0; ub < b1; ub += at_once) advance(ub, std::min(b1, ub + at_once), r0, r1);
          };
          if (at_once == 1)
            split.each(p0, p1, work);
          else
            work(blocks * p0 / pieces, blocks * p1 / pieces, 0L, rows);
        }
        part.group.wait();
      }
    }
    if (id % run.units == 0)
      for (long s = 0; s < S; ++s)
        if (f.after[s])
          std::memcpy(f.last[s] + n0 * H, f.after[s] + (run.time(T - 1) * N + n0) * H, 4 * rows * H);
  });
  weights.packed = !in_place;
}

// --- its derivative ----------------------------------------------------------------------------------------------

struct Backward {
  const float *x, *w_ih, *w_hh;
  const uint8_t *valid, *resets;
  const float* mask;
  Inputs theta, state, restart, after, dlast, dafter;  // dafter: null where a state is not put out
  const float* parts;
  long parts_row;
  long kept_rows;  // sequences to a step of parts and after
  float *dx, *dw_ih, *db, *dw_hh;  // dx may be null
  Outputs dtheta, dstate, drestart;
  bool more = false;  // whether these, of dx and dstate apart, are added to what is there
};

// out (M, UB) += A B for the gradient of weights, where the last block of units may be short.
void accumulate(const Run& run, long M, long K, const float* A, const float* B, long ub, bool fresh, float* out) {
  const long n = std::min<long>(UB, run.H - ub * UB);
  // The tile below is next, and its rows are pages apart.
  if (!fresh)
    for (long r = M; r < 2 * M; ++r)
      for (long j = 0; j < UB; j += 16) __builtin_prefetch(out + r * run.width + j, 1, 2);
  if (n == UB) return multiply_strip(M, K, A, B, fresh ? nullptr : out, run.width, out, run.width);
  float tile[MR * UB];
  multiply_strip(M, K, A, B, nullptr, 0, tile, UB);
  for (long r = 0; r < M; ++r)
    for (long j = 0; j < n; ++j) out[r * run.width + j] = tile[r * UB + j] + (fresh ? 0 : out[r * run.width + j]);
}

Weights backward_weights(const Run& run, bool by_inputs) {
  const size_t K = run.blocks * run.G * UB, f_blocks = (run.F + UB - 1) / UB;
  return Weights(by_inputs ? f_blocks * K * UB : 0, run.blocks * K * UB, 0, run.cell.thetas * run.blocks * UB);
}

void backward_steps(Run run, const Backward& f, Weights& weights) {
  run.plan(processors());
  Crew crew(run.threads());
  if (crew.size() < run.threads()) run.plan(crew.size());
  const Cell& cell = run.cell;
  const long T = run.T, N = run.N, F = run.F, H = run.H, G = run.G, blocks = run.blocks, threads = run.threads();
  const long S = cell.states, thetas = cell.thetas, h_state = cell.hidden_state;
  const bool apart = run.apart;
  const long K = blocks * G * UB, row = padded(K), hidden = blocks * UB;
  // Many rows, so that gradients of weights, which are far, are added to seldom.
  const long chunk = std::max(1L, std::min(T, 320 / N)), most = chunk * N;
  const long f_blocks = (F + UB - 1) / UB, f_strips = (F + MR - 1) / MR, h_strips = (H + MR - 1) / MR;
  const size_t sizes[] = {size_t(most * row), apart ? size_t(most * row) : 0, size_t(S * N * hidden),
                          size_t(threads * thetas * hidden), size_t(most * f_strips * MR),
                          size_t(most * h_strips * MR), size_t(threads * most * UB), f.mask ? size_t(N * hidden) : 0};
  size_t total = 0;
  for (size_t size : sizes) total += Scratch::rounded(size);
  Scratch scratch(total);
  float *p_ih = weights.ih, *p_hh = weights.hh, *p_theta = weights.theta;
  float *du = scratch.take(sizes[0]), *dv = apart ? scratch.take(sizes[1]) : du, *carry = scratch.take(sizes[2]),
        *dtheta = scratch.take(sizes[3]), *strips_x = scratch.take(sizes[4]), *strips_h = scratch.take(sizes[5]),
        *panels = scratch.take(sizes[6]), *masked = scratch.take(sizes[7]);
  std::vector<Inputs> olds(threads, Inputs(S)), dafters(threads, Inputs(S));

  divide(run, crew, [&](const Part& part) {
    const long id = part.id, n0 = part.n0, n1 = part.n1;
    const auto [b0, b1] = ::share(blocks, part.units, part.unit);
    if (!weights.packed) {
      const auto [k0, k1] = part.share(blocks);
      for (long p = k0; p < k1; ++p) pack_transposed(run, f.w_hh, H, p * UB, p_hh + p * K * UB);
      const auto [i0, i1] = part.share(f.dx ? f_blocks : 0);
      for (long p = i0; p < i1; ++p) pack_transposed(run, f.w_ih, F, p * UB, p_ih + p * K * UB);
      if (id == 0) pack_theta(run, f.theta, p_theta);
    }
    const Split split{blocks, part.units, n1 - n0};
    Inputs &old = olds[id], &dafter = dafters[id];
    Panels at;
    for (long ub = b0; ub < b1; ++ub) {
      at.from.push_back(f.mask ? -1 : ub * UB);
      at.to.push_back(ub * UB);
    }
    float* my_theta = dtheta + id * thetas * hidden;
    std::memset(my_theta, 0, 4 * thetas * hidden);
    for (long n = n0; n < n1; ++n)
      for (long s = 0; s < S; ++s)
        for (long unit = b0 * UB; unit < b1 * UB; unit += VL)
          store(carry + (s * N + n) * hidden + unit, load(f.dlast[s] + n * H + unit, H - unit));
    if (f.drestart[0] && !f.more)
      for (long s = 0; s < S; ++s)
        for (long n = n0; n < n1; ++n)
          for (long unit = b0 * UB; unit < std::min(H, b1 * UB); ++unit) f.drestart[s][n * H + unit] = 0;
    part.all.wait();

    for (long start = 0; start < T; start += chunk) {
      const long count = std::min(chunk, T - start), low = run.reverse ? start : T - start - count;
      for (long i = start; i < start + count; ++i) {
        const long t = run.time(T - 1 - i), before = run.time(T - 2 - i);
        const bool opens = i == T - 1;  // the first step of the loop, the last of its derivative
        const uint8_t* valid = f.valid ? f.valid + t * N : nullptr;
        const uint8_t* resets = f.resets ? f.resets + t * N : nullptr;
        for (long s = 0; s < S; ++s) {
          old[s] = opens ? f.state[s] : f.after[s] + before * f.kept_rows * H;
          dafter[s] = f.dafter[s] ? f.dafter[s] + t * N * H : nullptr;
        }
        const long place = ((t - low) * N + n0) * row;
        cell.backward({n0, n1, b0, b1, H, valid, resets, p_theta, my_theta, hidden,
                       f.parts + (t * f.kept_rows + n0) * f.parts_row + b0 * cell.parts * UB, f.parts_row, old.data(),
                       f.restart.data(), dafter.data(), carry, N * hidden, hidden, du + place + b0 * G * UB,
                       dv + place + b0 * G * UB, row});
        part.group.wait();
        float* dh = carry + (h_state * N + n0) * hidden;
        float* through = f.mask ? masked + n0 * hidden : dh;  // what comes through the product, apart from the rest
        if (n1 - n0 <= FEW) {
          narrow(n1 - n0, K, dv + place, row, p_hh + b0 * K * UB, at, b1 - b0, dh, hidden, through, hidden);
        } else {
          for (;;) {
            const auto [p0, p1] = part.steps.take(i + 1, split.pieces(), part.unit);
            if (p0 == p1) break;
            split.each(p0, p1, [&](long first, long end, long r0, long r1) {
              float* to = through + r0 * hidden + first * UB;
              multiply_long(r1 - r0, K, dv + place + r0 * row, row, p_hh + first * K * UB, end - first,
                            f.mask ? nullptr : to, hidden, to, hidden);
            });
          }
          // What others took of these units is read below, and by the gates of the next step.
          part.group.wait();
        }
        for (long n = n0; n < n1 && f.mask; ++n)
          for (long unit = b0 * UB; unit < std::min(H, b1 * UB); ++unit)
            carry[(h_state * N + n) * hidden + unit] += masked[n * hidden + unit] * f.mask[n * H + unit];
        if (resets)
          for (long n = n0; n < n1; ++n)
            for (long s = 0; s < S && resets[n]; ++s)
              for (long unit = b0 * UB; unit < b1 * UB; ++unit) {
                float& d = carry[(s * N + n) * hidden + unit];
                if (unit < H) f.drestart[s][n * H + unit] += d;
                d = 0;
              }
      }

      // Of the chunk at once: the gradients of weights, by columns, and of the inputs, by rows.
      const long rows = count * N;
      const bool fresh = start == 0 && !f.more;
      {
        const auto [s0, s1] = part.share(f_strips + h_strips);
        for (long s = s0; s < s1; ++s) {
          const bool recurrent = s >= f_strips;
          const long k = (recurrent ? s - f_strips : s) * MR, m = std::min<long>(MR, (recurrent ? H : F) - k);
          float* to = (recurrent ? strips_h : strips_x) + k * most;
          if (!recurrent) gather(rows, m, f.x + low * N * F + k, F, nullptr, to);
          for (long t = low; t < low + count && recurrent; ++t) {
            const float* mask = f.mask ? f.mask + k : nullptr;
            const long before = run.reverse ? t + 1 : t - 1;
            const float* from = t == run.time(0) ? f.state[h_state] : f.after[h_state] + before * f.kept_rows * H;
            gather(N, m, from + k, H, mask, to + (t - low) * N * m);
            for (long n = 0; n < N && f.resets; ++n)
              if (f.resets[t * N + n])
                gather(1, m, f.restart[h_state] + n * H + k, H, mask ? mask + n * H : nullptr,
                       to + ((t - low) * N + n) * m);
          }
        }
      }
      part.all.wait();
      const long phase = start / chunk + 1;
      while (f.dx) {
        const auto [r0, r1] = part.rows.take(phase, rows, id, 8 * MR);
        if (r0 == r1) break;
        const long whole = F / UB, short_by = F % UB;
        float* to = f.dx + low * N * F;
        multiply_long(r1 - r0, K, du + r0 * row, row, p_ih, whole, nullptr, 0, to + r0 * F, F);
        for (long r = r0; r < r1 && short_by; r += MR) {
          float tile[MR * UB];
          const long m = std::min<long>(MR, r1 - r);
          multiply(m, K, du + r * row, row, p_ih + whole * K * UB, nullptr, 0, tile, UB);
          for (long j = 0; j < m; ++j) std::memcpy(to + (r + j) * F + whole * UB, tile + j * UB, 4 * short_by);
        }
      }
      float* panel = panels + id * most * UB;
      for (;;) {
        const auto [p0, p1] = part.panels.take(phase, blocks * G, id);
        if (p0 == p1) break;
        for (long p = p0; p < p1; ++p) {
          const long ub = p / G, column = p % G * H + ub * UB;
          float sum[UB];
          gather_block(rows, du + p * UB, row, panel, sum);
          for (long j = 0; j < UB && ub * UB + j < H; ++j)
            f.db[column + j] = sum[j] + (fresh ? 0 : f.db[column + j]);
          for (long k = 0; k < F; k += MR)
            accumulate(run, std::min<long>(MR, F - k), rows, strips_x + k * most, panel, ub, fresh,
                       f.dw_ih + k * run.width + column);
          if (apart) gather_block(rows, dv + p * UB, row, panel, nullptr);
          for (long k = 0; k < H; k += MR)
            accumulate(run, std::min<long>(MR, H - k), rows, strips_h + k * most, panel, ub, fresh,
                       f.dw_hh + k * run.width + column);
        }
      }
      part.all.wait();
    }
    for (long s = 0; s < S; ++s)
      for (long n = n0; n < n1; ++n)
        for (long unit = b0 * UB; unit < b1 * UB; unit += VL)
          store(f.dstate[s] + n * H + unit, load(carry + (s * N + n) * hidden + unit), H - unit);
    part.all.wait();
    if (id == 0)
      for (long j = 0; j < thetas; ++j)
        for (long u = 0; u < H; ++u) {
          float sum = f.more ? f.dtheta[j][u] : 0;
          for (long i = 0; i < threads; ++i) sum += dtheta[(i * thetas + j) * hidden + u];
          f.dtheta[j][u] = sum;
        }
  });
  weights.packed = true;
}

// --- in chunks: only the states before each are kept ---------------------------------------------------------------

// Some steps of a run, from `start` on.
template <class Call>
Call beginning(const Run& run, Call f, long start) {
  f.x += start * run.N * run.F;
  if (f.valid) f.valid += start * run.N;
  if (f.resets) f.resets += start * run.N;
  return f;
}

// `together` chunks of `length` steps are a group; steps that fill none are run last, and all of theirs is kept.
struct Chunks {
  const Run& run;
  long length, together;
  long groups() const { return run.T / (length * together); }
  long rest() const { return run.T - groups() * together * length; }
  long rest_start() const { return run.reverse ? 0 : run.T - rest(); }
  // Where a chunk begins, by its place in the order in which they are run.
  long start(long i) const { return run.reverse ? run.T - (i + 1) * length : i * length; }
  Run steps(long count, long sequences) const {
    Run some = run;
    some.T = count, some.N = sequences;
    return some;
  }
};

// What is kept of a run in chunks: the states (groups, together, N, H) that chunks met; the one that the rest met, and
// all that its derivative needs.
struct Met {
  Outputs states, rest_state, rest_after;
  float* rest_parts;
};

void forward_in_chunks(const Chunks& chunks, const Forward& f, const Met& met) {
  const Run& run = chunks.run;
  const long S = run.cell.states, size = run.N * run.H, count = chunks.groups() * chunks.together;
  const long rest = chunks.rest();
  Weights weights = forward_weights(run);
  for (long s = 0; s < S; ++s) std::memcpy(count ? met.states[s] : met.rest_state[s], f.state[s], 4 * size);
  for (long i = 0; i < count; ++i) {
    Forward part = beginning(run, f, chunks.start(i));
    for (long s = 0; s < S; ++s) {
      part.state[s] = met.states[s] + i * size;
      part.last[s] = i + 1 < count ? met.states[s] + (i + 1) * size : rest ? met.rest_state[s] : f.last[s];
      if (f.after[s]) part.after[s] = f.after[s] + chunks.start(i) * size;
    }
    forward_steps(chunks.steps(chunks.length, run.N), part, weights);
  }
  if (!rest) return;
  Forward part = beginning(run, f, chunks.rest_start());
  for (long s = 0; s < S; ++s) part.state[s] = met.rest_state[s];
  part.after = met.rest_after;
  part.parts = met.rest_parts;
  forward_steps(chunks.steps(rest, run.N), part, weights);
  for (long s = 0; s < S; ++s)
    if (f.after[s]) std::memcpy(f.after[s] + chunks.rest_start() * size, met.rest_after[s], 4 * rest * size);
}

// `b` is that of the forward run, `work` has room for what a group makes again.
void backward_in_chunks(const Chunks& chunks, const Backward& f, const Met& met, const float* b, float* work) {
  const Run& run = chunks.run;
  const Cell& cell = run.cell;
  const long S = cell.states, N = run.N, H = run.H, size = N * H, together = chunks.together, length = chunks.length;
  const long wide = together * N;  // sequences of a group
  const Run group_run = chunks.steps(length, wide);
  Weights forward = forward_weights(group_run), backward = backward_weights(run, f.dx != nullptr);
  bool more = false;
  const auto differentiate = [&](long start, long count, Backward part) {
    for (long s = 0; s < S; ++s)
      if (f.dafter[s]) part.dafter[s] = f.dafter[s] + start * size;
    if (f.dx) part.dx = f.dx + start * N * run.F;
    part.more = more;
    if (more)
      for (long s = 0; s < S; ++s) part.dlast[s] = f.dstate[s];
    backward_steps(chunks.steps(count, N), part, backward);
    more = true;
  };
  if (chunks.rest()) {
    Backward part = beginning(run, f, chunks.rest_start());
    part.state.assign(met.rest_state.begin(), met.rest_state.end());
    part.after.assign(met.rest_after.begin(), met.rest_after.end());
    part.parts = met.rest_parts;
    differentiate(chunks.rest_start(), chunks.rest(), part);
  }

  if (!chunks.groups()) return;

  Forward again{};
  again.w_ih = f.w_ih, again.b = b, again.w_hh = f.w_hh, again.theta = f.theta;
  again.parts = work, again.parts_row = f.parts_row;
  for (long s = 0; s < S; ++s) again.after.push_back(work + length * wide * (f.parts_row + s * H));
  Scratch beside(Scratch::rounded(length * wide * run.F) + Scratch::rounded(length * wide / 2 + 1) +
                 (2 * S + 1) * Scratch::rounded(wide * H));
  float* xs = beside.take(length * wide * run.F);
  uint8_t* marks = reinterpret_cast<uint8_t*>(beside.take(length * wide / 2 + 1));
  const auto tiled = [&](const float* from) {  // the same for each of the chunks
    float* to = from ? beside.take(wide * H) : nullptr;
    for (long i = 0; i < together && from; ++i) std::memcpy(to + i * size, from, 4 * size);
    return to;
  };
  for (long s = 0; s < S; ++s) {
    again.last.push_back(beside.take(wide * H));
    again.restart.push_back(tiled(f.restart[s]));
  }
  again.mask = tiled(f.mask);
  for (long group = chunks.groups() - 1; group >= 0; --group) {
    // Its chunks side by side.
    for (long i = 0; i < together; ++i) {
      const long start = chunks.start(group * together + i);
      for (long t = 0; t < length; ++t) {
        const long to = t * wide + i * N, at = (start + t) * N;
        std::memcpy(xs + to * run.F, f.x + at * run.F, 4 * N * run.F);
        if (f.valid) std::memcpy(marks + to, f.valid + at, N);
        if (f.resets) std::memcpy(marks + length * wide + to, f.resets + at, N);
      }
    }
    again.x = xs;
    again.valid = f.valid ? marks : nullptr;
    again.resets = f.resets ? marks + length * wide : nullptr;
    again.state.clear();
    for (long s = 0; s < S; ++s) again.state.push_back(met.states[s] + group * together * size);
    forward_steps(group_run, again, forward);
    for (long i = together - 1; i >= 0; --i) {
      Backward part = beginning(run, f, chunks.start(group * together + i));
      for (long s = 0; s < S; ++s) {
        part.state[s] = met.states[s] + (group * together + i) * size;
        part.after[s] = again.after[s] + i * size;
      }
      part.parts = again.parts + i * N * f.parts_row;
      part.kept_rows = wide;
      differentiate(chunks.start(group * together + i), length, part);
    }
  }
}

// --- the way in --------------------------------------------------------------------------------------------------

// Operands or results in order; those without elements are null.
struct Arrays {
  const Array* next;
  bool fresh = false;  // whether they are yet to be written
  template <class Type = float>
  Type* take() {
    const Array& array = *next++;
    if (fresh) in_large_pages(array.data, array.count * sizeof(Type));
    return array.count ? static_cast<Type*>(array.data) : nullptr;
  }
  template <class List>
  void take(List& list, int count) {
    for (int i = 0; i < count; ++i) list.push_back(take());
  }
};

template <class Call>
Run start(const Cell& cell, Arrays& in, Call& f, bool reverse) {
  const Array &x = in.next[0], &w_hh = in.next[2];
  f.x = in.take();
  f.w_ih = in.take();
  f.w_hh = in.take();
  f.valid = in.take<uint8_t>();
  f.resets = in.take<uint8_t>();
  f.mask = in.take();
  in.take(f.theta, cell.thetas);
  in.take(f.state, cell.states);
  in.take(f.restart, cell.states);
  return Run{cell, x.dims[0], x.dims[1], x.dims[2], w_hh.dims[0], reverse};
}

Met take_met(const Chunks& chunks, Arrays& from) {
  const int states = chunks.run.cell.states;
  Met met{};
  from.take(met.states, states);
  if (chunks.rest()) {
    from.take(met.rest_state, states);
    from.take(met.rest_after, states);
    met.rest_parts = from.take();
  }
  return met;
}

}  // namespace

void run_forward(const Cell& cell, const Array* args, const Array* rets, const Options& options) {
  Arrays in{args}, out{rets, true};
  Forward f{};
  const Run run = start(cell, in, f, options.reverse);
  f.b = in.take();
  f.parts_row = options.parts_row;
  out.take(f.last, cell.states);
  out.take(f.after, cell.states);
  if (options.chunk) {
    const Chunks chunks{run, options.chunk, options.together};
    return forward_in_chunks(chunks, f, take_met(chunks, out));
  }
  f.parts = out.take();
  Weights weights = forward_weights(run);
  forward_steps(run, f, weights);
}

void run_backward(const Cell& cell, const Array* args, const Array* rets, const Options& options) {
  Arrays in{args}, out{rets, true};
  Backward f{};
  const Run run = start(cell, in, f, options.reverse);
  const Chunks chunks{run, options.chunk, options.together};
  const float* b = in.take();
  Met met{};
  if (options.chunk) {
    met = take_met(chunks, in);
    f.after.resize(cell.states);
  } else {
    in.take(f.after, cell.states);
    f.parts = in.take();
  }
  f.parts_row = options.parts_row;
  f.kept_rows = run.N;
  in.take(f.dlast, cell.states);
  in.take(f.dafter, cell.states);
  f.dx = out.take();
  f.dw_ih = out.take();
  f.dw_hh = out.take();
  out.take(f.dtheta, cell.thetas);
  out.take(f.dstate, cell.states);
  out.take(f.drestart, cell.states);
  f.db = out.take();
  if (options.chunk) return backward_in_chunks(chunks, f, met, b, out.take());
  Weights weights = backward_weights(run, f.dx != nullptr);
  backward_steps(run, f, weights);
}
